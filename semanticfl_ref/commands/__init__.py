"""The commands, one file each: HELP, add_flags, and run, which returns the exit code.

torch is only imported inside run.
"""
