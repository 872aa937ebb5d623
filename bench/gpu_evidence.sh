#!/bin/sh
# The grid of docs/results.md in one call: nine methods, three scenarios, five seeds, 40 rounds of the
# embedded default. Finished runs are kept: the same command goes on where it was cut off.
# Environment: PYTHON, DEVICE (cuda), WORKERS (8 runs at a time), SECONDS_LEFT (530), OUT.
# Further arguments go to `compare`; a rehearsal on a CPU:
#   DEVICE=cpu WORKERS=2 OUT=/tmp/evidence bench/gpu_evidence.sh --seeds 1 --rounds 1 --at 1 --width 2
cd "$(dirname "$0")/.." || exit 2
METHODS='fedavg,fedprox[fedprox.mu=0.1],scaffold,moon,fedrcl[fedrcl.contrast=0.3;fedrcl.beta=0.3],feddisco[feddisco.a=0.1],fedcda,feddifrc[feddifrc.lambda_text=0.1],semanticfl'
# INT: as Ctrl-C, which saves a checkpoint of every run.
exec timeout --signal=INT "${SECONDS_LEFT:-530}" "${PYTHON:-python3}" -m semanticfl_ref compare \
    --methods "$METHODS" --scenarios nid1:0.1,nid1:0.3,nid2 --seeds 5 --rounds 40 --at 15,40 \
    --device "${DEVICE:-cuda}" --workers "${WORKERS:-8}" --offline --out "${OUT:-runs/evidence}" "$@"
