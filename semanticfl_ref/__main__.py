"""`python -m semanticfl_ref`."""

import sys

from semanticfl_ref.cli import main

if __name__ == "__main__":
    sys.exit(main())
