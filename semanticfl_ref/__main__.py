"""`python -m semanticfl_ref`."""

import sys

from semanticfl_ref.cli import program

if __name__ == "__main__":
    sys.exit(program())
