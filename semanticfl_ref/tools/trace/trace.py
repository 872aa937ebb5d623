"""A real round on a few images of each client, watched while it runs.

Its results are reported by the round's own observer; the statements come from the tracer.
"""

import re
from bisect import bisect
from dataclasses import dataclass, replace

import torch

from semanticfl_ref.config.settings import Config, to_flat
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.report import ClientReport, FirstBatch
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.server_optimizer import server_step
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.formatting import Say
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import RunData, build_anchors, cache_plan, load_data, set_up_torch
from semanticfl_ref.tools.trace.diffusion_pass import diffusion_pass
from semanticfl_ref.tools.trace.equations import equations, sources
from semanticfl_ref.tools.trace.tracer import Source, Step, Tracer
from semanticfl_ref.tools.trace.values import describe, plain

STORY = "federated/round.py"
FILES = (
    STORY,
    "federated/replicas.py",
    "federated/client.py",
    "federated/losses.py",
    "federated/aggregate.py",
    "federated/robust.py",
    "federated/metrics.py",
    "federated/server_optimizer.py",
    "diffusion/anchors.py",
    "run/setup.py",
)
IMAGES = 4  # images of the first batch that the diffusion model is watched on


@dataclass(frozen=True, kw_only=True)
class TracedRound:
    """A watched round.

    Attributes:
        document: JSON values; `trace_round` lists its keys.
        context: the run's context.
        shown_B: int64 [B], the training images that are shown.
        stages: stages of the diffusion model's pass over them; for a method without anchors, only
            the images.
    """

    document: dict
    context: RunContext
    shown_B: torch.Tensor
    stages: dict[str, torch.Tensor]


def trace_round(config: Config, *, images: int, round: int, offline: bool, say: Say) -> TracedRound:
    """Make the anchors, run the rounds before `round` unwatched, and watch that one.

    Args:
        config: the configuration.
        images: maximum number of images per client; anchors are made from all images, as in a run.
        round: the round to watch.
        offline: no network access.
        say: takes one line of progress.

    Returns:
        Its document has settings, letters, diffusion_pass (its stages), before (the statements that
        make anchors), turns (four, each with number, title and steps), terms and loss of the first
        client's first batch, clients, parameters (before, average, after), communication, metrics
        (the round's line), equations (those beside a step, by tag).

    Raises:
        UserError: and its kinds, as in `train`.
    """
    set_up_torch(config)
    files = [*FILES, *(file for file in sources() if file.startswith("federated/methods/"))]
    data = load_data(config, offline=offline)
    with Tracer(files) as anchor_tracer:
        anchors = build_anchors(config, data, offline=offline, say=say)
    partition = few_images(data, images, config.run.seed)
    context = make_context(config, data.dataset, partition, anchors)
    # A step that is captured as a CUDA graph has no values to show, and a replay no statements.
    context = replace(context, method=replace(context.method, capturable=False))
    state = initial_state(context)
    while state.round < round - 1:
        state, _ = run_round(state, context)

    updates = []

    def keep(update: LocalUpdate, params_P: torch.Tensor, report: ClientReport) -> None:
        updates.append((update, params_P.clone(), report))

    with Tracer(files) as tracer:
        after, metrics = run_round(state, context, keep)

    first = updates[0][2].first
    shown_B = first.indices[:IMAGES].cpu()
    stages, before = {"image": data.dataset.train_images[shown_B]}, []
    if context.anchors is not None:
        plan = cache_plan(config, data.dataset, offline=offline)
        stages, before = diffusion_pass(plan, shown_B)
        stages["anchor"] = context.anchors.visual_for(plan.labels[shown_B], shown_B)
        before += anchor_tracer.steps
    tags = {tag for step in before + tracer.steps for tag in step.equations}
    average = tracer.arguments[server_step.__name__][-1]
    document = {
        "settings": {**to_flat(config), "images": images, "round": round},
        "letters": letters(tracer.sources),
        "diffusion_pass": describe(stages) if before else [],
        "before": [vars(step) for step in before],
        "turns": turns(tracer.steps, tracer.sources[STORY]),
        "terms": term_summaries(first),
        "loss": plain(first.loss),
        "clients": [client_summary(*update) for update in updates],
        "parameters": describe({"before": state.params, "average": average, "after": after.params}),
        "communication": {
            "down": metrics["bytes_down"],
            "up": metrics["bytes_up"],
            "anchors": metrics["bytes"]["down"]["anchors"],
        },
        "metrics": metrics,
        "equations": {e.tag: vars(e) for e in equations() if e.tag in tags},
    }
    return TracedRound(document=document, context=context, shown_B=shown_B, stages=stages)


def few_images(data: RunData, count: int, seed: int) -> Partition:
    """The partition with at most `count` images of each client, sampled by the seed."""
    indices = []
    for client, own in enumerate(data.partition.indices):
        source = generator(seed, "trace", client=client)
        indices.append(own[torch.randperm(len(own), generator=source)[:count]].sort().values)
    labels, classes = data.dataset.train_labels, data.dataset.classes
    counts = (torch.bincount(labels[own], minlength=classes).tolist() for own in indices)
    return replace(
        data.partition,
        indices=tuple(indices),
        sizes=tuple(map(len, indices)),
        histograms=tuple(map(tuple, counts)),
    )


def client_summary(update: LocalUpdate, params_P: torch.Tensor, report: ClientReport) -> dict:
    """A local update's results: means over its steps, and how far its parameters moved."""
    moved_P = (params_P - update.start_P)[update.context.layout.optimised]
    return {
        "client": update.client,
        "images": update.context.partition.sizes[update.client],
        "steps": report.steps,
        "loss": plain(report.loss / report.steps),
        "moved": plain(moved_P.norm()),
        "terms": {name: plain(total / report.steps) for name, total in report.terms.items()},
    }


def term_summaries(first: FirstBatch) -> list[dict]:
    """The terms of a first batch, each with its gradient at the features if it depends on them."""
    terms = describe(first.terms)
    for term in terms:
        if gradient := first.gradients.get(term["name"]):
            about = gradient._asdict().items()
            term |= {f"gradient_{key}": plain(value) for key, value in about}
    return terms


def letters(sources: dict[str, Source]) -> dict[str, str]:
    """Letter -> meaning, from the line `Letters:` that heads a file; the first file wins."""
    found = {}
    for source in sources.values():
        paragraph = source.docstring.partition("Letters: ")[2].partition("\n\n")[0]
        for letter, meaning in re.findall(r"(\w)\s([^,.]+)", paragraph):
            found.setdefault(letter, " ".join(meaning.split()))
    return found


def turns(steps: list[Step], story: Source) -> list[dict]:
    """The steps by whose turn it is, as the numbered comments in the round's source say."""
    heads, found = [], []
    for line, text in enumerate(story.lines, 1):
        if match := re.match(r"\s*# (\d)\. (.*)", text):
            heads.append(line if heads else 0)  # what is above the first belongs to its turn
            found.append({"number": int(match[1]), "title": match[2], "steps": []})
    for step in steps:  # the first one is the round's own
        if step.function == run_round.__name__:
            turn = found[bisect(heads, step.line) - 1]
        turn["steps"].append(vars(step))
    return found
