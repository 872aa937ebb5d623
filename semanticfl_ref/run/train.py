"""A run from end to end: data -> partition -> anchors -> rounds -> summary, and its folder."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.distributed import Store
from tqdm import tqdm

from semanticfl_ref.config.command_line import shell_command
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
from semanticfl_ref.formatting import Say, format_bytes
from semanticfl_ref.run.dry_run import rehearse
from semanticfl_ref.run.environment import changes, environment_of
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.setup import (
    RunData,
    build_anchors,
    identity_of,
    load_data,
    provenance_of,
    set_up_torch,
)
from semanticfl_ref.run.summary import summarise

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
        context = prepare(config, data=data, anchors=anchors, offline=offline, say=say)
        context = _shared(context, store)
        if rank() > 0:
            return _follow(context, RunFolder(out), say)
        state = _initial_state(context, say)
        folder = RunFolder.create(out, config, documents_of(context))
        with folder.held():
            return _finish(context, folder, state, on_round, say)


def documents_of(context: RunContext) -> dict[str, dict]:
    """The documents of a new run folder: file name -> JSON document."""
    documents = {"environment.json": environment_of(context), IDENTITY: identity_of(context)}
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
    if anchors is None:
        rehearse(config, data)
        anchors = build_anchors(config, data, offline=offline, say=say)
    return make_context(config, data.dataset, partition, anchors)


def one_round(
    context: RunContext, folder: RunFolder, state: FederatedState, identity: dict, started: float
) -> tuple[FederatedState, dict]:
    """A round, its line of metrics in the folder and, as configured, a checkpoint.

    Args:
        started: when it began, by `time.perf_counter`.
    """
    following, line = run_round(state, context)
    seal = folder.append(line, time.perf_counter() - started, state.seal)
    state, config = replace(following, seal=seal), context.config
    is_last = state.round == config.federation.rounds
    if state.round % config.run.checkpoint_every == 0 or is_last:
        save_checkpoint(folder.checkpoint, state, identity)
    return state, line


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
    environment, rounds = environment_of(context), context.config.federation.rounds
    return identity_of(context) | {key: environment[key] for key in AGREED} | {"rounds": rounds}


def _last_state(context: RunContext, folder: RunFolder, say: Say) -> FederatedState:
    """The state of the last checkpoint; the folder is truncated to it."""
    initial, identity = _initial_state(context, say), identity_of(context)
    require_identity(folder.path / IDENTITY, folder.read(IDENTITY), identity)
    folder.verify()
    config, state = context.config, initial
    if folder.checkpoint.exists():
        state = load_checkpoint(folder.checkpoint, identity).to(context.device)
        require_shapes(folder.checkpoint, state, initial)
    now = environment_of(context)
    changed = changes(folder.environment(), now)
    if changed:
        say(f"note: {', '.join(changed)} changed; resumed results may differ in the last bits")
    if config.federation.rounds != folder.config().federation.rounds:
        folder.reopen(config)
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
    state = state_of_first(initial_state(context))
    _fit(context, state, say)
    while state.round < context.config.federation.rounds:
        state, _ = run_round(state, context)
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
    state = _run_rounds(context, folder, state, on_round)
    write_summary(context, folder, state)
    return folder


def _run_rounds(
    context: RunContext, folder: RunFolder, state: FederatedState, on_round: OnRound
) -> FederatedState:
    """Each round is followed by its line of metrics and, as configured, a checkpoint."""
    config, identity = context.config, identity_of(context)
    rounds, method = config.federation.rounds, config.federation.method
    try:
        with tqdm(total=rounds, initial=state.round, desc=method, unit="round") as bar:
            while state.round < rounds:
                state, line = one_round(context, folder, state, identity, time.perf_counter())
                numbers = f"accuracy={line['test_accuracy']:.1%}, loss={line['loss']:.3f}"
                bar.set_postfix_str(numbers, refresh=False)
                bar.update()
                on_round(line)
    except (KeyboardInterrupt, RankLost) as stop:
        save_checkpoint(folder.checkpoint, state, identity)
        raise type(stop)(
            f"interrupted and saved after round {state.round} of {rounds}; continue with: "
            f"{shell_command('train', '--resume', str(folder.path))}"
        ) from None
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
