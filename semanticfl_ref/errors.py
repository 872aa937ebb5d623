"""Errors of a user's making. The exit code is the class; the message says how to fix it."""

import difflib
from collections.abc import Iterable

# What users of the field write -> what it is called here.
SYNONYMS = {
    "lr": "learning_rate",
    "epochs": "local_epochs",
    "num_clients": "clients",
    "fraction": "clients_per_round",
    "dataset": "name",
    "wd": "weight_decay",
    "arch": "name",
    "gpu": "device",
}


class UserError(Exception):
    """Usage or configuration: an unknown name, a value out of range, a run folder that exists."""

    exit_code = 2


class DataError(UserError):
    """A data file or folder that was named is missing, incomplete, damaged or hostile."""

    exit_code = 3


class MismatchError(UserError):
    """A feature cache or a checkpoint is damaged or belongs to another configuration."""

    exit_code = 4


class DownloadError(UserError):
    """A download is needed and impossible: no network, `--offline`, or only wrong content."""

    exit_code = 5


class RankLost(UserError):
    """Another process of torchrun ended."""


class NonFiniteError(UserError):
    """Training produced NaN or infinity."""

    exit_code = 6


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name that suggests the nearest known one.

    Args:
        kind: the kind of name, for example "data set".
        name: what the user wrote.
        known: every admissible name, in the order in which to list them.
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}.")


def unknown_setting(name: str, known: Iterable[str]) -> UserError:
    """An error for an unknown dotted name that suggests those it may stand for."""
    section, _, key = name.rpartition(".")
    key = SYNONYMS.get(key, key)
    near = [f for f in known if f.endswith(f".{key}") and f.startswith(section)]
    near = near or difflib.get_close_matches(f"{section}.{key}", known, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`config list` shows all"
    return UserError(f"unknown setting {name!r}; {hint}")
