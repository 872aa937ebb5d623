"""SemanticFL's rounds as a Flower app: docs/scale.md says how to start it."""

import os

# Flower reads this when it is imported. Its command-line tools run before this file: export it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
