"""Several runs in one start of torchrun: `torchrun ... rank_jobs.py JSON`, a list of command lines.

Exit codes are those of the command line; the first that is not 0 ends it.
"""

import json
import sys

from semanticfl_ref import cli

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        code = cli.main(arguments)
        if code:
            sys.exit(code)
