"""Watched rounds, and what is in them."""

import json

import pytest

from semanticfl_ref.commands.trace import SMALL
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.tools.trace import trace


def parsed(text: str) -> dict:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def watched(method: str, round: int = 1, **settings):
    """A narrow model's round of a method: the configuration, and what was seen."""
    settings = {**SMALL, "model.width": 4, "federation.method": method, **settings}
    config = resolve(settings)
    return config, trace.trace_round(
        config, images=6, round=round, offline=True, say=lambda text: None
    )


def steps_of(document):
    return [step for turn in document["turns"] for step in turn["steps"]]


def made(document, function, name):
    return next(
        value
        for step in steps_of(document)
        if step["function"] == function
        for value in step["values"]
        if value["name"] == name
    )
