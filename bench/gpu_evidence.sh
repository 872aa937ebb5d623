#!/bin/sh
# The grids of docs/results.md, in stages. Nine methods are tuned with the same budget (four
# configurations, two seeds, on the validation images); then, with five other seeds, come the main
# table and, with the settings so chosen, controls, label counts and teachers. 40 rounds of the
# embedded default. Finished runs are kept: the same command goes on where it was cut off.
# Environment: PYTHON, DEVICE (cuda), WORKERS (8 runs at a time), SECONDS_LEFT (265 for each stage),
# OUT, STAGES (all of: search main controls longer labels teachers). The stage unmatched needs
# UNMATCHED, the folder that `scripts/make_tiny.py --align 0 --work DIR --out FOLDER` wrote: a
# teacher that was not matched with class names. It is used with the settings that were chosen for
# SemanticFL with the embedded teacher, with those that the same search chooses for itself, and with
# those of a second search, of smaller weights.
# Further arguments go to all grids; a rehearsal on a CPU:
#   DEVICE=cpu WORKERS=2 OUT=/tmp/evidence bench/gpu_evidence.sh --seeds 1 --rounds 1 --width 2
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-runs/evidence}
NINE=fedavg,fedprox,scaffold,moon,fedrcl,feddisco,fedcda,feddifrc,semanticfl
RATES=0.05,0.1,0.2,0.4 # learning rates and SemanticFL's weights that the searches try
WEIGHTS=5,20,50
SLOW='fedavg at 0.05=fedavg[federation.learning_rate=0.05]'
BLOCKS='--layers vae,down.0,down.1,mid,up.0,up.1 --timesteps 20,150,300'
PROX='with prox=semanticfl[semanticfl.mu=0.1]'

run() { # command, its arguments. INT: as Ctrl-C, which saves a checkpoint of every run.
    timeout --signal=INT "${SECONDS_LEFT:-265}" "${PYTHON:-python3}" -m semanticfl_ref "$@" \
        --device "${DEVICE:-cuda}" --offline
}
grid() { # as run
    command=$1
    shift
    run "$command" --workers "${WORKERS:-8}" --rounds 40 "$@"
}
searched() { # folder, methods, further arguments
    folder=$1 methods=$2
    shift 2
    grid search --methods "$methods" --scenarios nid1:0.3 --configurations 4 --seeds 2 \
        --out "$OUT/$folder" "$@"
}
tuned() { # folder, methods, further arguments
    folder=$1 methods=$2
    shift 2
    grid compare --tuned "$OUT/search/search.json" --methods "$methods" --seeds 5 --out "$OUT/$folder" "$@"
}
chosen() { # folder, learning rates, weights, further arguments: SemanticFL's, by a search
    folder=$1 rates=$2 weights=$3
    shift 3
    searched "$folder" semanticfl --vary "federation.learning_rate=$rates" \
        --vary "semanticfl.lambda_kd=$weights" "$@" >&2 &&
        sed -n 's/.*"semanticfl": "semanticfl\[\(.*\)\]".*/\1/p' "$OUT/$folder/search.json"
}
variants() { # the settings of SemanticFL, each of which makes a variant NAME=semanticfl[...]
    for variant; do printf ',%s=semanticfl[%s]' "${variant%%:*}" "${variant#*:}"; done
}

for stage in ${STAGES:-search main controls longer labels teachers}; do
    case $stage in
    search)
        searched search "$NINE" --vary "federation.learning_rate=$RATES" \
            --vary fedprox.mu=0.01,0.1,1 --vary moon.mu=1,5 --vary fedrcl.contrast=0.1,0.3,1 \
            --vary feddisco.a=0.1,0.5 --vary fedcda.warm_up=5,10 \
            --vary feddifrc.lambda_text=0.1,1 --vary feddifrc.consistency=kl,l2 \
            --vary "semanticfl.lambda_kd=$WEIGHTS" "$@" ;;
    main)
        tuned main "$NINE" --baseline semanticfl --scenarios nid1:0.1,nid1:0.3,nid2 "$@" &&
            tuned proximal "$NINE,$PROX" --baseline semanticfl --scenarios nid1:0.1 "$@" ;;
    controls)
        tuned controls "fedavg,semanticfl$(variants shuffled:anchors.control=shuffled \
            permuted:anchors.control=permuted random:anchors.control=random \
            one-hot:anchors.control=onehot consistency:semanticfl.lambda_con=0 \
            contrast:semanticfl.lambda_kd=0 'vae:diffusion.layers=vae;anchors.width=64' \
            'three levels:diffusion.layers=vae,mid,up.0' 'per class:anchors.per=class' \
            'missing modalities:partition.modality=mixed' \
            'semanticfl at 0.2:federation.learning_rate=0.2'),$SLOW" --baseline semanticfl \
            --scenarios nid1:0.3 "$@" &&
            tuned held-out fedavg,semanticfl --anchor-images heldout:10 \
                --scenarios nid1:0.3 "$@" ;;
    longer)
        tuned longer fedavg,semanticfl --scenarios nid1:0.3 --rounds 120 --at 40,80,120 "$@" ;;
    labels)
        for count in 100 225 450 900; do
            tuned "labels-$count" fedavg,semanticfl --import scripts/more_labels.py \
                --dataset "digit-scenes-$count" --scenarios nid1:0.3 "$@" || exit
        done ;;
    teachers)
        tuned teachers "fedavg$(variants t20:diffusion.timestep=20 t150:diffusion.timestep=150 \
            t300:diffusion.timestep=300 t500:diffusion.timestep=500 \
            t700:diffusion.timestep=700 t900:diffusion.timestep=900)" --scenarios nid1:0.3 "$@" &&
            run features probe --layers mid --timesteps 20,150,300,500,700,900 --json \
                >"$OUT/teachers/probe.json" ;;
    unmatched)
        source=diffusion.source=${UNMATCHED:?needs a folder, see above}
        mkdir -p "$OUT/unmatched" &&
            run features probe $BLOCKS --set "$source" --json >"$OUT/unmatched/probe.json" &&
            run features probe $BLOCKS --json >"$OUT/unmatched/probe-embedded.json" &&
            same=$(chosen unmatched-search "$RATES" "$WEIGHTS" --set "$source" "$@") &&
            smaller=$(chosen unmatched-smaller 0.1,0.2 0.5,2 --set "$source" "$@") &&
            tuned unmatched "fedavg,semanticfl$(variants "unmatched:$source" \
                "unmatched and tuned:$source;$same" "smaller weight:$source;$smaller")" \
                --scenarios nid1:0.3 "$@" ;;
    *) echo "unknown stage $stage" >&2 && exit 2 ;;
    esac || exit
done
