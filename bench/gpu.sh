#!/bin/sh
# Everything that needs a GPU, in one call of under nine minutes, without network access.
# Arguments go to `python -m bench.gpu.run` (--only, --out, --seconds, --rehearse).
# Results: bench/results/<device>.json. PYTHON names the interpreter that has torch and triton.
# The stage "diffusion" needs diffusers. Where it is missing, carry the wheels: here
#   pip download --no-deps -d wheels diffusers==0.42.1 importlib_metadata==8.7.0
# there, before this script
#   pip install --no-deps --no-index --target site wheels/*.whl; export PYTHONPATH=$PWD/site
cd "$(dirname "$0")/.." || exit 2
exec "${PYTHON:-python3}" -m bench.gpu.run "$@"
