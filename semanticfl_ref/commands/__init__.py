"""The sub-commands, a file each: HELP, the flags of its own, and `run`, which returns the exit
code. torch comes in with `run` alone.
"""
