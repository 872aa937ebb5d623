"""What a user is told when a run cannot go on. The exit code is the error's class; the message
names the remedy.
"""

import difflib


class UserError(Exception):
    """Usage or configuration: an unknown name, a value out of range, a run folder that exists."""

    exit_code = 2


class DataError(UserError):
    """A data file or folder that was named is missing, incomplete, damaged or hostile."""

    exit_code = 3


class MismatchError(UserError):
    """A feature bank or a checkpoint does not belong to this configuration, or its bytes were
    damaged.
    """

    exit_code = 4


class DownloadError(UserError):
    """A download is needed and impossible: no network, `--offline`, or no mirror with the right
    content.
    """

    exit_code = 5


class NonFiniteError(UserError):
    """Training produced NaN or infinity."""

    exit_code = 6


def unknown(what: str, name: str, known) -> UserError:
    """An error for an unknown name that offers the nearest known one.

    Args:
        what: the kind of name, for example "dataset".
        name: what the user wrote.
        known: every admissible name, in the order in which to list them.
    """
    known = [str(k) for k in known]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}{hint or '.'} Known: {', '.join(known)}.")
