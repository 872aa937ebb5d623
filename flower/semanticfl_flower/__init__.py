"""SemanticFL's rounds as a Flower app: docs/scale.md says how to start it."""

import os
from importlib.metadata import version

# Flower reads this when it is imported. Its command-line tools run before this file: export it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if tuple(map(int, version("flwr").split(".")[:2])) < (1, 42):
    raise ImportError(
        f"flwr {version('flwr')} is installed, the app needs 1.42 or newer: pip install -e "
        f"'.[flower]'"
    )
