"""A real round on a few images of each client, watched while it runs.

What it came to is reported by the round's own observer; the statements come from the tracer.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from semanticfl_ref.config.settings import Config, to_flat
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.federated.client import ClientReport, FirstBatch
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.server_optimizer import server_step
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.setup import build_anchors, load_data, set_threads
from semanticfl_ref.tools.trace.diffusion_pass import diffusion_pass
from semanticfl_ref.tools.trace.equations import equations, sources
from semanticfl_ref.tools.trace.tracer import Source, Step, Tracer
from semanticfl_ref.tools.trace.values import plain, tensor_summary, term_summary

STORY = "federated/round.py"
FILES = (
    STORY,
    "federated/client.py",
    "federated/losses.py",
    "federated/aggregate.py",
    "federated/server_optimizer.py",
    "diffusion/anchors.py",
    "run/setup.py",
)
IMAGES = 4  # images of the first batch that the diffusion model is watched on


@dataclass(frozen=True, kw_only=True)
class TracedRound:
    """A watched round.

    Attributes:
        document: for JSON; `trace_round` lists its keys.
        context: of the run.
        shown_B: int64 [B], the training images that are shown.
        stages: of the diffusion model's pass over them; empty for a method without anchors.
    """

    document: dict
    context: RunContext
    shown_B: torch.Tensor
    stages: dict[str, torch.Tensor]


def trace_round(
    config: Config, *, images: int, round: int, offline: bool, say: Callable[[str], None]
) -> TracedRound:
    """Make the anchors, run the rounds before `round` unwatched, and watch that one.

    Args:
        config: the configuration.
        images: at most so many of each client; anchors are made from all images, as in a run.
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
    set_threads(config)
    files = [*FILES, *(file for file in sources() if file.startswith("federated/methods/"))]
    data = load_data(config, offline=offline)
    with Tracer(files) as anchor_tracer:
        anchors = build_anchors(config, data, offline=offline, say=say)
    partition = few_images(data.partition, data.dataset.train_labels, images, config.run.seed)
    context = make_context(config, data.dataset, partition, anchors)
    state = initial_state(context)
    while state.round < round - 1:
        state, _ = run_round(state, context)

    updates: list[tuple[LocalUpdate, torch.Tensor, ClientReport]] = []
    with Tracer(files) as tracer:
        after, metrics = run_round(state, context, lambda *update: updates.append(update))

    first = updates[0][2].first
    shown_B, stages, before = first.indices[:IMAGES], {}, []
    if context.anchors is not None:
        stages, before = diffusion_pass(context, shown_B, offline)
        before += anchor_tracer.steps
    tags = {tag for step in before + tracer.steps for tag in step.equations}
    parameters = {
        "before": state.params,
        "average": tracer.arguments[server_step.__name__][-1],
        "after": after.params,
    }
    document = {
        "settings": {**to_flat(config), "images": images, "round": round},
        "letters": letters(tracer.sources),
        "diffusion_pass": described(stages),
        "before": [asdict(step) for step in before],
        "turns": turns(tracer.steps, tracer.sources[STORY]),
        "terms": term_summaries(first),
        "loss": plain(first.loss),
        "clients": [client_summary(*update) for update in updates],
        "parameters": described(parameters),
        "communication": {
            "down": metrics["bytes_down"],
            "up": metrics["bytes_up"],
            "anchors": metrics["bytes"]["down"]["anchors"],
        },
        "metrics": metrics,
        "equations": {e.tag: asdict(e) for e in equations() if e.tag in tags},
    }
    return TracedRound(document=document, context=context, shown_B=shown_B, stages=stages)


def described(values: dict[str, torch.Tensor]) -> list[dict]:
    """Tensors in a few numbers."""
    return [{"name": name, **tensor_summary(tensor)} for name, tensor in values.items()]


def few_images(partition: Partition, labels: torch.Tensor, count: int, seed: int) -> Partition:
    """The partition with at most `count` images of each client, sampled by the seed."""
    indices = []
    for client, own in enumerate(partition.indices):
        source = generator(seed, "trace", client=client)
        indices.append(own[torch.randperm(len(own), generator=source)[:count]].sort().values)
    classes = len(partition.histograms[0])
    counts = [torch.bincount(labels[own], minlength=classes).tolist() for own in indices]
    return replace(
        partition,
        indices=tuple(indices),
        sizes=tuple(map(len, indices)),
        histograms=tuple(map(tuple, counts)),
    )


def client_summary(update: LocalUpdate, params_P: torch.Tensor, report: ClientReport) -> dict:
    """What a local update came to: means over its steps, and how far its parameters moved."""
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
    summaries = []
    for name, (weight, value) in first.terms.items():
        gradient = first.gradients[name]._asdict() if name in first.gradients else {}
        at_features = {f"gradient_{key}": plain(number) for key, number in gradient.items()}
        summaries.append({"name": name, **term_summary(weight, value), **at_features})
    return summaries


def letters(sources: dict[str, Source]) -> dict[str, str]:
    """Letter -> meaning, from the line `Letters:` that heads a file; the first file wins."""
    found: dict[str, str] = {}
    for source in sources.values():
        paragraph = source.docstring.partition("Letters: ")[2].partition("\n\n")[0]
        for letter, meaning in re.findall(r"(\w)\s([^,.]+)", paragraph):
            found.setdefault(letter, " ".join(meaning.split()))
    return found


def turns(steps: list[Step], story: Source) -> list[dict]:
    """The steps by whose turn it is, as the numbered comments in the round's source say."""
    heads, found, turn = [], [], 0
    for line, text in enumerate(story.lines, 1):
        if match := re.match(r"\s*# (\d)\. (.*)", text):
            heads.append(line)
            found.append({"number": int(match[1]), "title": match[2], "steps": []})
    for step in steps:
        if step.function == run_round.__name__:
            turn = max(sum(line <= step.line for line in heads) - 1, 0)
        found[turn]["steps"].append(asdict(step))
    return found
