"""A run from end to end: data -> partition -> anchors -> rounds -> summary, and its folder."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.distributed import Store

from semanticfl_ref.config.command_line import shell_command
from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import is_embedded
from semanticfl_ref.config.settings import Config
from semanticfl_ref.cores import memory, rank, ranks
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import RankLost, UserError
from semanticfl_ref.federated.context import RunContext, make_context
from semanticfl_ref.federated.evaluate import confusion
from semanticfl_ref.federated.flat import load_params
from semanticfl_ref.federated.ranks import (
    AcrossRanks,
    gathered,
    joined,
    require_agreement,
    state_of_first,
)
from semanticfl_ref.federated.round import received, run_round
from semanticfl_ref.federated.state import (
    FederatedState,
    initial_state,
    load_checkpoint,
    require_identity,
    require_shapes,
    save_checkpoint,
)
from semanticfl_ref.formatting import Say, format_bytes, progress_bar
from semanticfl_ref.run.dry_run import rehearse
from semanticfl_ref.run.environment import changes, environment_of
from semanticfl_ref.run.folder import RunFolder, stopping_point
from semanticfl_ref.run.initial import read_initial
from semanticfl_ref.run.setup import (
    RunData,
    build_anchors,
    identity_of,
    load_data,
    provenance_of,
    set_up_torch,
)
from semanticfl_ref.run.summary import best_round, out_of_patience, summarise
from semanticfl_ref.storage import save_tensors, sha256_of

OnRound = Callable[[dict], None]
IDENTITY = "identity.json"
AGREED = ("semanticfl_ref", "versions", "threads", "precision")  # of the environment, by all ranks
LARGE_STATE = 1 << 30  # bytes, from which on a user is told


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
    with joined(config) as store:
        set_up_torch(config)
        data = data or load_data(config, offline=offline)
        read_initial(config, data.dataset)  # checked before any work
        context = prepare(config, data=data, anchors=anchors, offline=offline, say=say)
        context = _shared(context, store)
        if rank() > 0:
            return _follow(context, RunFolder(out), say)
        state, identity = start(context, say)
        folder = RunFolder.create(out, config, documents_of(context, identity))
        with folder.held():
            if config.run.init:  # so that a resumed run does not need what it started from
                save_checkpoint(folder.checkpoint, state, identity)
            return _finish(context, folder, state, on_round, say)


def documents_of(context: RunContext, identity: dict) -> dict[str, dict]:
    """The documents of a new run folder: file name -> JSON document."""
    documents = {"environment.json": environment_of(context), IDENTITY: identity}
    return documents | _descriptions(context)


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
    folder = RunFolder(path)
    with joined(config) as store:
        context = _shared(prepare(config, offline=offline, say=say), store)
        if rank() > 0:
            return _follow(context, folder, say)
        with folder.held():
            state = _last_state(context, folder, say)
            return _finish(context, folder, state, on_round, say)


def prepare(
    config: Config,
    *,
    data: RunData | None = None,
    anchors: Anchors | None = None,
    offline: bool = False,
    say: Say = lambda text: None,
) -> RunContext:
    """The constants of a run. Arguments and errors as of `train`."""
    set_up_torch(config)
    data = data or load_data(config, offline=offline)
    partition = data.partition
    for note in data.dataset.notes:
        say(f"note: {note}")
    say(
        f"{len(data.dataset.train_labels)} training images, {len(partition.sizes)} clients with "
        f"{min(partition.sizes)} to {max(partition.sizes)} each, skew {partition.skew:.2f}"
    )
    if anchors is None and METHODS[config.federation.method].needs_anchors:
        rehearse(config, data)  # what does not fit is known before features are extracted
        anchors = build_anchors(config, data, offline=offline, say=say)
    return make_context(config, data.dataset, partition, anchors)


def start(context: RunContext, say: Say = lambda text: None) -> tuple[FederatedState, dict]:
    """The state before the first round, and the identity of the run.

    Raises:
        UserError: the machine has not the memory for the state.
    """
    identity, initial = identity_of(context), read_initial(context.config, context.dataset)
    if initial:
        context.model.load_state_dict(initial, strict=False)
        identity["init"] = sha256_of({}, initial)
    return _initial_state(context, say), identity


def one_round(
    context: RunContext, folder: RunFolder, state: FederatedState, history: list[dict], began: float
) -> FederatedState:
    """A round, its line of metrics in the folder and, as configured, a checkpoint.

    Args:
        context: the run.
        folder: its folder.
        state: before the round.
        history: the lines of metrics so far; the round's is added.
        began: when the round began, by `time.perf_counter`.
    """
    following, line = run_round(state, context)
    seal = folder.append(line, time.perf_counter() - began, state.seal)
    state, config = replace(following, seal=seal), context.config
    history.append(line)
    if config.run.patience and best_round(history) is line:
        about = {"round": state.round, "identity": folder.read(IDENTITY)}
        save_tensors(folder.best, {"params": state.params}, about)
    is_last = state.round == config.federation.rounds
    if state.round % config.run.checkpoint_every == 0 or is_last:
        save_checkpoint(folder.checkpoint, state, folder.read(IDENTITY))
    return state


def write_summary(context: RunContext, folder: RunFolder, state: FederatedState) -> None:
    """Write the summary of a run, which finishes it."""
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


def shared_facts(context: RunContext) -> dict:
    """What all processes of a run must have in common; JSON values."""
    environment, end = environment_of(context), list(stopping_point(context.config))
    return identity_of(context) | {key: environment[key] for key in AGREED} | {"end": end}


def _last_state(context: RunContext, folder: RunFolder, say: Say) -> FederatedState:
    """The state of the last checkpoint; the folder is truncated to it."""
    recorded, saved = folder.read(IDENTITY), folder.checkpoint.exists()
    if saved:
        state = initial = _initial_state(context, say)
        # What the run started from is in the checkpoint, and need not be there any more.
        identity = identity_of(context) | {k: recorded[k] for k in ["init"] if k in recorded}
    else:
        state, identity = start(context, say)
    require_identity(folder.path / IDENTITY, recorded, identity)
    folder.verify()
    if saved:
        state = load_checkpoint(folder.checkpoint, identity).to(context.device)
        require_shapes(folder.checkpoint, state, initial)
    now = environment_of(context)
    changed = changes(folder.environment(), now)
    if changed:
        say(f"note: {', '.join(changed)} changed; resumed results may differ in the last bits")
    if stopping_point(context.config) != stopping_point(folder.config()):
        folder.reopen(context.config)
    folder.truncate(state.round)
    folder.write_again(_descriptions(context))
    folder.add_environment(now, state.round)
    say(f"resuming from round {state.round} in {folder.path}")
    return state


def _initial_state(context: RunContext, say: Say) -> FederatedState:
    """The state before the first round.

    Raises:
        UserError: the machine has not the memory for it; a round holds it twice.
    """
    state, config = initial_state(context), context.config
    needed = 2 * sum(tensor.nbytes for tensor in state.tensors.values())
    told = f"{config.federation.method} with {config.partition.clients} clients needs"
    told += f" {format_bytes(needed)} of memory for its state"
    if needed > memory():
        raise UserError(
            f"{told}, the machine has {format_bytes(memory())}: lower partition.clients or "
            f"model.width"
        )
    if needed > LARGE_STATE:
        say(told)
    return state


def _descriptions(context: RunContext) -> dict[str, dict]:
    """The files of a run that follow from its configuration and data, and only inform."""
    dataset = context.dataset
    partition = {
        **context.partition.manifest(),
        "dataset_sha256": dataset.sha256,
        "class_names": dataset.class_names,
        "image_size": dataset.image_size,
    }
    return {"partition.json": partition, "anchors.json": provenance_of(context)}


def _shared(context: RunContext, store: Store | None) -> RunContext:
    """The run with the replicas of all ranks, once they agree; as it is in a process alone."""
    if store is None:
        return context
    require_agreement(shared_facts(context))
    return replace(context, replicas=AcrossRanks(context.replicas, context.config, store))


def _follow(context: RunContext, folder: RunFolder, say: Say) -> RunFolder:
    """What all ranks but the first do: their share of every round; nothing is written."""
    config, state = context.config, state_of_first(initial_state(context))
    _fit(context, state, say)
    history = gathered([])[0]  # of the first rank
    while state.round < config.federation.rounds and not out_of_patience(
        history, config.run.patience
    ):
        state, line = run_round(state, context)
        history.append(line)
    load_params(context.model, state.params)
    confusion(context.model, context)  # computed by all ranks together
    return folder


def _finish(
    context: RunContext, folder: RunFolder, state: FederatedState, on_round: OnRound, say: Say
) -> RunFolder:
    """Run the remaining rounds and write the summary."""
    if ranks() > 1:
        state = state_of_first(state)
    _fit(context, state, say)
    state = _run_rounds(context, folder, state, on_round, say)
    write_summary(context, folder, state)
    return folder


def _run_rounds(
    context: RunContext, folder: RunFolder, state: FederatedState, on_round: OnRound, say: Say
) -> FederatedState:
    """Each round is followed by its line of metrics and, as configured, a checkpoint."""
    config, history = context.config, folder.rounds()
    if ranks() > 1:
        history = gathered(history)[0]  # the others stop with this one
    rounds, patience = config.federation.rounds, config.run.patience
    try:
        with progress_bar(
            total=rounds, initial=state.round, desc=config.federation.method, unit="round"
        ) as bar:
            while state.round < rounds and not out_of_patience(history, patience):
                state = one_round(context, folder, state, history, time.perf_counter())
                line = history[-1]
                if line["test_accuracy"] is not None:
                    numbers = f"accuracy={line['test_accuracy']:.1%}, loss={line['loss']:.3f}"
                    bar.set_postfix_str(numbers, refresh=False)
                bar.update()
                on_round(line)
    except (KeyboardInterrupt, RankLost) as stop:
        save_checkpoint(folder.checkpoint, state, folder.read(IDENTITY))
        raise type(stop)(
            f"interrupted and saved after round {state.round} of {rounds}; continue with: "
            f"{shell_command('train', '--resume', str(folder.path))}"
        ) from None
    if state.round < rounds:
        save_checkpoint(folder.checkpoint, state, folder.read(IDENTITY))
        say(
            f"stopped after round {state.round}: no better validation accuracy in {patience} "
            f"evaluations; the best round is {best_round(history)['round']}"
        )
    return state


def _fit(context: RunContext, state: FederatedState, say: Say) -> None:
    sizes = context.partition.sizes
    context.replicas.fit(received(state, context, sizes.index(max(sizes))), say)


def _warnings(context: RunContext) -> list[str]:
    config = context.config
    if context.anchors is None or config.diffusion.source != "tiny" or is_embedded(config):
        return []
    return [
        f"the anchors for {config.data.name} come from the embedded model, which knows digits "
        f"only: a stand-in for a trial, not the paper's setting; pass a Stable Diffusion with --sd"
    ]
