#!/bin/sh
# Everything that needs a GPU, in one call of under nine minutes, without network access.
# Arguments go to `python -m bench.gpu.run` (--only, --out, --seconds, --rehearse).
# Results: bench/results/<device>.json. PYTHON names the interpreter that has torch and triton.
cd "$(dirname "$0")/.." || exit 2
exec "${PYTHON:-python3}" -m bench.gpu.run "$@"
