"""A run from end to end: data -> partition -> anchors -> rounds -> summary, and its folder."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from semanticfl_ref.config.command_line import shell_command
from semanticfl_ref.config.resolve import is_embedded
from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.build_model import feature_width
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.evaluate import confusion
from semanticfl_ref.federated.flat import load_params
from semanticfl_ref.federated.round import received, run_round
from semanticfl_ref.federated.state import (
    FederatedState,
    initial_state,
    load_checkpoint,
    require_identity,
    save_checkpoint,
)
from semanticfl_ref.formatting import Say, progress_bar
from semanticfl_ref.run.environment import changes, environment_of
from semanticfl_ref.run.folder import RunFolder, stopping_point
from semanticfl_ref.run.initial import read_initial
from semanticfl_ref.run.setup import (
    RunData,
    build_anchors,
    identity_of,
    load_data,
    provenance_of,
    set_threads,
)
from semanticfl_ref.run.summary import best_round, out_of_patience, summarise
from semanticfl_ref.storage import save_tensors, sha256_of

OnRound = Callable[[dict], None]
IDENTITY = "identity.json"


def train(
    config: Config,
    out: Path,
    *,
    data: RunData | None = None,
    anchors: Anchors | None = None,
    on_round: OnRound = lambda line: None,
    offline: bool = False,
    say: Say = lambda text: None,
) -> RunFolder:
    """Train, and write a run folder.

    Args:
        config: the configuration.
        out: the folder to make.
        data, anchors: results of `load_data` and `build_anchors` for the same configuration; made
            here if absent.
        on_round: called with a round's line of metrics.
        offline: no network access.
        say: takes one line of progress.

    Returns:
        The folder of the finished run.

    Raises:
        UserError: and its kinds, see errors.py; before the first round nothing is left on disk.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    set_threads(config)
    data = data or load_data(config, offline=offline)
    read_initial(config, data.dataset)  # checked before any work
    context = _prepare(config, data, anchors, offline, say)
    dataset, (state, identity) = context.dataset, _start(context)
    documents = {
        "environment.json": environment_of(context),
        "partition.json": {
            **context.partition.manifest(),
            "dataset_sha256": dataset.sha256,
            "class_names": dataset.class_names,
            "image_size": dataset.image_size,
        },
        "anchors.json": provenance_of(context),
        IDENTITY: identity,
    }
    folder = RunFolder.create(out, config, documents)
    with folder.held():
        if config.run.init:  # so that a resumed run does not need what it started from
            save_checkpoint(folder.checkpoint, state, identity)
        return _finish(context, folder, state, on_round, say)


def resume(
    config: Config,
    path: Path,
    *,
    on_round: OnRound = lambda line: None,
    offline: bool = False,
    say: Say = lambda text: None,
) -> RunFolder:
    """Continue a run from its last checkpoint; on the same machine the result is bitwise the same.

    Args:
        config: the run's configuration, perhaps with more rounds: then a finished run goes on too.
        path: the run's folder.
        on_round, offline, say: as in `train`.

    Raises:
        UserError: and its kinds, see errors.py.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    context, folder = _prepare(config, None, None, offline, say), RunFolder(path)
    with folder.held():
        recorded = folder.read(IDENTITY)
        if folder.checkpoint.exists():
            identity = identity_of(context) | {k: recorded[k] for k in ["init"] if k in recorded}
            state = load_checkpoint(folder.checkpoint, identity).to(context.device)
        else:
            state, identity = _start(context)
        require_identity(folder.path / IDENTITY, recorded, identity)
        now = environment_of(context)
        changed = changes(folder.read("environment.json"), now)
        if changed:
            say(f"note: {', '.join(changed)} changed; resumed results may differ in the last bits")
        if stopping_point(config) != stopping_point(folder.config()):
            folder.reopen(config)
        folder.truncate(state.round, state.seal)
        folder.add_environment(now, state.round)
        say(f"resuming from round {state.round} in {path}")
        return _finish(context, folder, state, on_round, say)


def _prepare(
    config: Config, data: RunData | None, anchors: Anchors | None, offline: bool, say: Say
) -> RunContext:
    """What both ways to start a run need."""
    set_threads(config)
    data = data or load_data(config, offline=offline)
    feature_width(config, data.dataset.classes, data.dataset.image_size)  # checks the model
    partition = data.partition
    for note in data.dataset.notes:
        say(f"note: {note}")
    say(
        f"{len(data.dataset.train_labels)} training images, {len(partition.sizes)} clients with "
        f"{min(partition.sizes)} to {max(partition.sizes)} each, skew {partition.skew:.2f}"
    )
    anchors = anchors or build_anchors(config, data, offline=offline, say=say)
    return make_context(config, data.dataset, partition, anchors)


def _start(context: RunContext) -> tuple[FederatedState, dict]:
    """The state before the first round, and the identity of the run."""
    identity, initial = identity_of(context), read_initial(context.config, context.dataset)
    if initial:
        context.model.load_state_dict(initial, strict=False)
        identity["init"] = sha256_of({}, initial)
    return initial_state(context), identity


def _finish(
    context: RunContext, folder: RunFolder, state: FederatedState, on_round: OnRound, say: Say
) -> RunFolder:
    """Run the remaining rounds and write the summary."""
    state = _run_rounds(context, folder, state, on_round, say)
    # A resumed run may have had no round left.
    load_params(context.model, state.params)
    config = context.config
    about = {
        "dataset": config.data.name,
        "method": config.federation.method,
        "seed": config.run.seed,
        "folder": str(folder.path),
        "anchors": provenance_of(context),
        "confusion": confusion(context.model, context),
        "warnings": _warnings(context),
    }
    folder.finish(summarise(folder.rounds(), folder.seconds(), about))
    return folder


def _run_rounds(
    context: RunContext, folder: RunFolder, state: FederatedState, on_round: OnRound, say: Say
) -> FederatedState:
    """Each round is followed by its line of metrics and, as configured, a checkpoint."""
    sizes = context.partition.sizes
    context.replicas.fit(received(state, context, sizes.index(max(sizes))), say)
    config, identity, history = context.config, folder.read(IDENTITY), folder.rounds()
    rounds, method, patience = (
        config.federation.rounds,
        config.federation.method,
        config.run.patience,
    )
    try:
        with progress_bar(total=rounds, initial=state.round, desc=method, unit="round") as bar:
            while state.round < rounds and not out_of_patience(history, patience):
                started = time.perf_counter()
                following, line = run_round(state, context)
                seal = folder.append(line, time.perf_counter() - started, state.seal)
                state = replace(following, seal=seal)
                history.append(line)
                if patience and best_round(history) is line:
                    about = {"round": state.round, "identity": identity}
                    save_tensors(folder.best, {"params": state.params}, about)
                if state.round % config.run.checkpoint_every == 0 or state.round == rounds:
                    save_checkpoint(folder.checkpoint, state, identity)
                if line["test_accuracy"] is not None:
                    numbers = f"accuracy={line['test_accuracy']:.1%}, loss={line['loss']:.3f}"
                    bar.set_postfix_str(numbers, refresh=False)
                bar.update()
                on_round(line)
    except KeyboardInterrupt:
        save_checkpoint(folder.checkpoint, state, identity)
        raise KeyboardInterrupt(
            f"interrupted and saved after round {state.round} of {rounds}; continue with: "
            f"{shell_command('train', '--resume', str(folder.path))}"
        ) from None
    if state.round < rounds:
        save_checkpoint(folder.checkpoint, state, identity)
        say(
            f"stopped after round {state.round}: no better validation accuracy in {patience} "
            f"evaluations; the best round is {best_round(history)['round']}"
        )
    return state


def _warnings(context: RunContext) -> list[str]:
    config = context.config
    if context.anchors is None or config.diffusion.source != "tiny" or is_embedded(config):
        return []
    return [
        f"the anchors for {config.data.name} come from the embedded model, which knows digits "
        f"only: a stand-in for a trial, not the paper's setting; pass a Stable Diffusion with --sd"
    ]
