"""`train`: train from end to end, or continue a run."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.runs import flat
from semanticfl_ref.commands.settings_flags import add_settings, given, settings_of
from semanticfl_ref.config.command_line import shell_command, to_flags
from semanticfl_ref.config.registry import is_foreign
from semanticfl_ref.config.resolve import is_embedded, resolve
from semanticfl_ref.config.settings import NOT_IDENTITY, STABLE_DIFFUSION, Config, to_flat
from semanticfl_ref.cores import rank
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.formatting import format_bytes, format_percent, format_seconds
from semanticfl_ref.run.folder import (
    RunFolder,
    default_folder,
    refuse_existing,
    reserve,
    stopping_point,
)
from semanticfl_ref.run.summary import LAST
from semanticfl_ref.storage import user_path

HELP = "train, by default on the embedded digit scenes; writes a run folder"
SUMMARY = """\
last round             {test_accuracy:.2%} test accuracy
mean of the last {last}     {test_accuracy_last_five:.2%}
{validated}\
worst 10 % of clients  {client_accuracy[worst_tenth]:.2%} \
(worst client: {worst_client}, {worst_client_accuracy:.2%})
time                   {seconds:.0f} s for {rounds} rounds
communication          {total} ({down} to the clients, {up} back)
run folder             {folder}"""
VALIDATED = """\
best validation round  {test_accuracy_at_best_validation:.2%} (round {best_validation_round})
"""
SIZES = """\
data set         {dataset}: {images[train]} train, {images[validation]} validation, \
{images[test]} test images of {image_size}x{image_size} pixels, {classes} classes
clients          {clients} with {fewest} to {most} training images each
rounds           {rounds} with {clients_per_round} clients each
steps per round  {steps_per_round} on average
model            {model}, {parameters} parameters and buffers, {bytes}
{features}communication    per round {down} to the clients, {up} back{anchors}"""


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv)
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="RUN",
        help="run folder to make (default: runs/<dataset>-<method>-seed<seed>-<time>)",
    )
    parser.add_argument(
        "--resume",
        type=user_path,
        metavar="RUN",
        help="run folder to continue from its last checkpoint, bitwise; with --rounds also beyond "
        "its last round",
    )
    parser.add_argument("--verbose", action="store_true", help="a line on stderr for every round")
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the numbers of metrics.jsonl to RUN/tensorboard too",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, steps, bytes, and the time that diffusion features will take; train "
        "nothing",
    )


def run(arguments) -> int:
    if arguments.resume:
        return _resume(arguments)
    config = settings_of(arguments)
    for name in given(arguments):
        if is_foreign(name, config.federation.method):
            say(f"note: {config.federation.method} does not read {name}")
    if arguments.dry_run:
        _announce(config)
        from semanticfl_ref.run.dry_run import dry_run

        return show(dry_run(config, measure=True), arguments.json, sizes_table)
    out = arguments.out or default_folder(config)
    if rank() == 0:  # which alone writes
        out = arguments.out or reserve(out)
    try:
        if rank() == 0:
            refuse_existing(out)
        _announce(config)
        from semanticfl_ref.run.train import train

        on_round = _teller(arguments, out)
        folder = train(config, out, offline=arguments.offline, say=say, on_round=on_round)
    finally:
        if not arguments.out and rank() == 0:
            with suppress(OSError):  # what was reserved in vain; a run is not empty
                out.rmdir()
                out.parent.rmdir()
    return _show_result(folder, config, arguments.json)


def _resume(arguments) -> int:
    if arguments.out or arguments.dry_run:
        raise UserError("--resume continues in its own folder: leave out --out and --dry-run")
    folder = RunFolder(arguments.resume)
    saved = folder.config()
    config = _resumed_config(arguments, saved)
    if folder.finished and stopping_point(config) == stopping_point(saved):
        folder.verify()
        say(f"the run {folder.path} is finished; nothing is left to do")
        # Where it is now, since it may have been moved.
        return show({**folder.summary(), "folder": str(folder.path)}, arguments.json, summary_table)
    _announce(config)
    from semanticfl_ref.run.train import resume

    on_round = _teller(arguments, folder.path)
    resume(config, folder.path, offline=arguments.offline, say=say, on_round=on_round)
    return _show_result(folder, config, arguments.json)


def _resumed_config(arguments, saved: Config) -> Config:
    """The run's own configuration; flags beside --resume may only change what is no identity."""
    there = to_flat(saved)
    config = settings_of(arguments, preset=there)
    differing = [
        f"{name} = {there[name]!r} there, {value!r} here"
        for name, value in to_flat(config).items()
        if value != there[name] and name not in NOT_IDENTITY
    ]
    if differing:
        raise MismatchError(
            f"{arguments.resume} was started with another configuration: {'; '.join(differing)}. "
            f"Resume without these flags, or start a new run with --out"
        )
    return config


def _teller(arguments, folder: Path) -> Callable[[dict], None]:
    """What is called with a round's line of metrics."""
    write = _tensorboard(RunFolder(folder)) if arguments.tensorboard else lambda line: None

    def tell(line: dict) -> None:
        write(line)
        if arguments.verbose:
            accuracy = format_percent(line["test_accuracy"]) or "not evaluated"
            say(f"round {line['round']}: test accuracy {accuracy}, loss {line['loss']:.3f}")

    return tell


def _tensorboard(folder: RunFolder) -> Callable[[dict], None]:
    """A function that writes a round's numbers for TensorBoard; first those of all rounds before.

    Raises:
        UserError: the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs its package: pip install -e '.[tensorboard]'"
        ) from None
    writers = []

    def write(line: dict) -> None:
        lines = [line]
        try:
            if not writers:
                writers.append(SummaryWriter(folder.path / "tensorboard", purge_step=0))
                lines = folder.rounds()
            for line in lines:
                for name, value in flat(line).items():
                    if isinstance(value, int | float):
                        writers[0].add_scalar(name.replace(".", "/"), value, line["round"])
            writers[0].flush()
        except OSError as error:
            raise DataError(f"--tensorboard: cannot write {error.filename}: {error}") from None

    return write


def _announce(config: Config) -> None:
    held_out = config.anchors.held_out
    note = f", {held_out} images per class held out" if held_out else ""
    say(
        f"{config.data.name}, {config.federation.method}, seed {config.run.seed}{note}: loading "
        f"torch ..."
    )


def _show_result(folder: RunFolder, config: Config, as_json: bool) -> int:
    if rank() > 0:
        return 0

    def to_text(summary: dict) -> str:
        warnings = "".join(f"warning: {text}\n" for text in summary["warnings"])
        return f"{summary_table(summary)}\n{warnings}\n{try_next(config)}"

    return show(folder.summary(), as_json, to_text)


def try_next(config: Config) -> str:
    """Commands to run next, with the settings of this run."""
    method = config.federation.method
    other = "semanticfl" if method == "fedavg" else "fedavg"
    flags = to_flags(resolve({**to_flat(config), "federation.method": other}))
    if "--method" not in flags:  # a default, but a reader wants to see it
        flags += ["--method", other]
    is_pair = method in ("fedavg", "semanticfl")
    reason = "what the anchors add" if is_pair else "for comparison"
    if other == "semanticfl" and config.diffusion.source == STABLE_DIFFUSION:
        reason += "; needs Stable Diffusion, or --sd tiny for a trial"
    lines = [shell_command("train", *flags) + f"    ({reason})"]
    if is_pair and is_embedded(config):
        lines.append(shell_command("train", "--dataset", "cifar10") + "    (the paper's setting)")
    return "try next: " + "\n          ".join(lines)


def summary_table(summary: dict) -> str:
    """The short table at the end of a run."""
    down, up = summary["bytes_down"], summary["bytes_up"]
    validated = summary["best_validation_round"] is not None
    return SUMMARY.format(
        **summary,
        last=min(LAST, summary["rounds"]),
        validated=VALIDATED.format(**summary) if validated else "",
        total=format_bytes(down + up),
        down=format_bytes(down),
        up=format_bytes(up),
    )


def sizes_table(sizes: dict) -> str:
    """The sizes of a dry run."""
    anchors = "; plus each client's anchors, once" if sizes["needs_anchors"] else ""
    features = "".join(map(_features_line, sizes["features"]))
    return SIZES.format(
        **{**sizes, "features": features},
        anchors=anchors,
        fewest=min(sizes["client_images"]),
        most=max(sizes["client_images"]),
        bytes=format_bytes(4 * sizes["parameters"]),
        down=format_bytes(sizes["bytes_down_per_round"]),
        up=format_bytes(sizes["bytes_up_per_round"]),
    )


def _features_line(cache: dict) -> str:
    """A line about a feature cache that is to be made."""
    text = f"time unknown: {cache.get('why')}"
    if "seconds" in cache:
        seconds, size = format_seconds(cache["seconds"]), format_bytes(cache["bytes"])
        text = f"about {seconds} to make on this machine, {size}"
    return f"features         {cache['use']} cache: {text}\n"
