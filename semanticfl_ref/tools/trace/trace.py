"""One real round, on a few images of each client, watched while it is played: the document that the
terminal, JSON and the page show.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from semanticfl_ref.config.settings import Config, to_flat
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.federated.context import RunContext, make_context, new_state
from semanticfl_ref.federated.flat import flatten_params
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import build_anchors, load_data
from semanticfl_ref.tools.trace.equations import equations, sources
from semanticfl_ref.tools.trace.tracer import Source, Tracer
from semanticfl_ref.tools.trace.values import describe

STORY = "federated/round.py"
FILES = (
    STORY,
    "federated/client.py",
    "federated/losses.py",
    "federated/aggregation.py",
    "diffusion/anchors.py",
)


def observe(
    config: Config, *, images: int, round: int, offline: bool, say: Callable[[str], None]
) -> tuple[dict, RunContext]:
    """Make the anchors, play the rounds before `round` unwatched, and watch that one.

    Args:
        images: at most so many of each client; the anchors are made of the whole data set, as in a
            run.

    Returns:
        A document for JSON: settings, letters, before (the anchors' steps), turns (four, each with
        number, title and steps), terms and loss of the first client's first batch, clients, rows
        (before, average, after), bytes, metrics (the round's line), equations (those beside a step,
        by tag).

    Raises:
        UserError: and its kinds, as `train` does.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    files, found, clients = (
        [file for file in sources() if file in FILES or file.startswith("federated/methods/")],
        equations(),
        [],
    )
    dataset, partition, held = load_data(config, offline)
    with Tracer(files, found) as before:
        anchors = build_anchors(config, dataset, partition, held, offline, say)
    context = make_context(
        config, dataset, few(partition, dataset.train_labels, images, config.run.seed), anchors
    )
    state = new_state(context)
    while state.round < round - 1:
        state, _ = run_round(state, context)
    with Tracer(
        files,
        found,
        lambda name, value, known: (
            clients.append(client(value, known["update"])) if name == "train_client" else None
        ),
    ) as during:
        after, metrics = run_round(state, context)
    made = [
        value | {"function": step["function"]} for step in during.steps for value in step["values"]
    ]
    trained = [value for value in made if value["function"] == "train_client"]
    average = next(
        value
        for value in made
        if (value["function"], value["name"]) == ("Aggregator.finish", "return")
    )
    document = {
        "settings": to_flat(config) | {"images": images, "round": round},
        "letters": letters(during.sources),
        "before": before.steps,
        "turns": turns(during.steps, during.sources[STORY]),
        "terms": [
            value | {"name": value["name"].split("'")[1]} for value in trained if "weight" in value
        ],
        "loss": next(value["first"][0] for value in trained if value["name"] == "loss"),
        "clients": clients,
        "rows": [
            *describe("before", state.params),
            average | {"name": "average"},
            *describe("after", after.row),
        ],
        "bytes": {
            "down": metrics["bytes_down"],
            "up": metrics["bytes_up"],
            "anchors": metrics["bytes"]["down"]["anchors"],
        },
        "metrics": metrics,
        "equations": {
            e.tag: asdict(e)
            for e in found
            if any(e.tag in step["equations"] for step in before.steps + during.steps)
        },
    }
    return document, context


def few(partition: Partition, labels: torch.Tensor, images: int, seed: int) -> Partition:
    """The partition with at most so many images of each client, drawn by the seed."""
    drawn = [
        own[torch.randperm(len(own), generator=generator(seed, "trace", client=k))[:images]]
        .sort()
        .values
        for k, own in enumerate(partition.indices)
    ]
    histograms = tuple(
        tuple(torch.bincount(labels[own], minlength=len(partition.histograms[0])).tolist())
        for own in drawn
    )
    return replace(
        partition, indices=tuple(drawn), sizes=tuple(map(len, drawn)), histograms=histograms
    )


def letters(sources: dict[str, Source]) -> dict[str, str]:
    """Letter -> meaning, from the line `Letters:` that heads a file; the first of FILES that
    explains one wins.
    """
    found: dict[str, str] = {}
    for text in (
        re.search(r"^Letters: (.*?)\.$", sources[file].docstring, re.M | re.S) for file in FILES
    ):
        for pair in text[1].split(",") if text else ():
            found.setdefault(*pair.split(maxsplit=1))
    return found


def turns(steps: list[dict], story: Source) -> list[dict]:
    """The steps by whose turn it is, as the numbered comments in the round's source say."""
    heads = [
        (line, match)
        for line, text in enumerate(story.lines, 1)
        if (match := re.match(r"\s*# (\d)\. (.*)", text))
    ]
    found, now = (
        [{"number": int(match[1]), "title": match[2], "steps": []} for _, match in heads],
        0,
    )
    for step in steps:
        if step["function"] == "run_round":
            now = max(sum(line <= step["line"] for line, _ in heads) - 1, 0)
        found[now]["steps"].append(step)
    return found


def client(report, update) -> dict:
    """What a client's update came to, at its end; losses are means over its steps. moved: how far
    its parameters went, as a norm.
    """
    moved_P = flatten_params(update.context.model) - update.start_P
    moved_P[update.context.layout.buffers] = 0
    terms = {name: float(total) / report.steps for name, total in report.terms.items()}
    return {
        "client": update.client,
        "images": update.context.partition.sizes[update.client],
        "steps": report.steps,
        "loss": float(report.loss) / report.steps,
        "moved": moved_P.norm().item(),
        "terms": terms,
    }
