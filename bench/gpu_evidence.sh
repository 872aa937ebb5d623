#!/bin/sh
# The grid of docs/results.md in one call. Nine methods, tuned with the same budget (four configurations,
# two seeds, on the validation images), then three scenarios, five other seeds, 40 rounds of the embedded
# default. Finished runs are kept: the same command goes on where it was cut off.
# Environment: PYTHON, DEVICE (cuda), WORKERS (8 runs at a time), SECONDS_LEFT (265 for each half), OUT.
# Further arguments go to both commands; a rehearsal on a CPU:
#   DEVICE=cpu WORKERS=2 OUT=/tmp/evidence bench/gpu_evidence.sh --seeds 1 --rounds 1 --width 2
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-runs/evidence}

each() { # command, its arguments. INT: as Ctrl-C, which saves a checkpoint of every run.
    timeout --signal=INT "${SECONDS_LEFT:-265}" "${PYTHON:-python3}" -m semanticfl_ref "$@" \
        --methods fedavg,fedprox,scaffold,moon,fedrcl,feddisco,fedcda,feddifrc,semanticfl \
        --device "${DEVICE:-cuda}" --workers "${WORKERS:-8}" --offline
}

each search --scenarios nid1:0.3 --configurations 4 --seeds 2 --rounds 40 --out "$OUT/search" \
    --vary federation.learning_rate=0.05,0.1,0.2,0.4 --vary fedprox.mu=0.01,0.1,1 --vary moon.mu=1,5 \
    --vary fedrcl.contrast=0.1,0.3,1 --vary feddisco.a=0.1,0.5 --vary fedcda.warm_up=5,10 \
    --vary feddifrc.lambda_text=0.1,1 --vary feddifrc.consistency=kl,l2 \
    --vary semanticfl.lambda_kd=5,20,50 "$@" || exit
each compare --tuned "$OUT/search/search.json" --scenarios nid1:0.1,nid1:0.3,nid2 --seeds 5 --rounds 40 \
    --out "$OUT/compare" "$@"
