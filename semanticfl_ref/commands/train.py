"""`train`: train from end to end, or continue a run."""

import shlex
from dataclasses import replace
from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, from_file, given, settings_of
from semanticfl_ref.config.command_line import to_flags
from semanticfl_ref.config.resolve import is_embedded, resolve
from semanticfl_ref.config.settings import NOT_IDENTITY, Config, to_flat
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.formatting import format_bytes

HELP = "train, by default on the embedded digit scenes; writes a run folder"


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="run folder to make (default: runs/<dataset>-<method>-seed<seed>-<time>)",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="run folder to continue from its last checkpoint, bitwise",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, steps and bytes; write nothing"
    )


def run(arguments) -> int:
    from semanticfl_ref.run import folder as folders

    if arguments.resume is not None:
        return _resume(arguments)
    config = settings_of(arguments)
    out = arguments.out or folders.default_folder(config)
    if not arguments.dry_run:
        folders.refuse_existing(out)
    _announce(config)
    if arguments.dry_run:
        from semanticfl_ref.run.dry_run import dry_run

        return show(dry_run(config), arguments.json, sizes_table)
    from semanticfl_ref.run.train import train

    folder = train(config, out, offline=arguments.offline, say=say)
    return _show_result(folder, config, arguments.json)


def _resume(arguments) -> int:
    from semanticfl_ref.run.folder import RunFolder

    if arguments.out is not None or arguments.dry_run:
        raise UserError("--resume continues in its own folder: leave out --out and --dry-run")
    folder = RunFolder(arguments.resume)
    config = _resumed_config(arguments, folder.config())
    if folder.finished:
        say(f"the run {folder.path} is finished; nothing is left to do")
        return show(folder.summary(), arguments.json, summary_table)
    _announce(config)
    from semanticfl_ref.run.train import resume

    resume(config, folder.path, offline=arguments.offline, say=say)
    return _show_result(folder, config, arguments.json)


def _resumed_config(arguments, saved: Config) -> Config:
    """The run's own configuration; flags beside --resume may only change where things are."""
    written = {**from_file(arguments), **given(arguments)}
    config = resolve({**to_flat(saved), **written}, None, arguments.set)
    there, here = to_flat(saved), to_flat(config)
    differing = [
        f"{name} = {there[name]!r} there, {here[name]!r} here"
        for name in there
        if there[name] != here[name] and name not in NOT_IDENTITY
    ]
    if differing:
        raise MismatchError(
            f"{arguments.resume} was started with another configuration: {'; '.join(differing)}. "
            f"Resume without these flags, or start a new run with --out"
        )
    return config


def _announce(config: Config) -> None:
    held_out = config.anchors.held_out
    note = f", {held_out} images per class held out" if held_out else ""
    say(
        f"{config.data.name}, {config.federation.method}, seed {config.run.seed}{note}: loading "
        f"torch ..."
    )


def _show_result(folder, config: Config, as_json: bool) -> int:
    def to_text(summary: dict) -> str:
        warnings = [f"warning: {text}" for text in summary["warnings"]]
        return "\n".join([summary_table(summary), *warnings, "", try_next(config)])

    return show(folder.summary(), as_json, to_text)


def try_next(config: Config) -> str:
    """Commands to run next, with the settings of this run."""
    method = config.federation.method
    other = "semanticfl" if method == "fedavg" else "fedavg"
    federation = replace(config.federation, method=other)
    flags = to_flags(replace(config, federation=federation))
    if "--method" not in flags:
        flags += ["--method", other]
    reason = "what the anchors add" if method in ("fedavg", "semanticfl") else "for comparison"
    command = "python -m semanticfl_ref train"
    lines = [f"try next: {command} {shlex.join(flags)}    ({reason})"]
    if is_embedded(config):
        lines.append(f"          {command} --dataset cifar10    (the paper's setting)")
    return "\n".join(lines)


def summary_table(summary: dict) -> str:
    """The short table at the end of a run."""
    sent = summary["bytes_down"] + summary["bytes_up"]
    best = summary["test_accuracy_at_best_validation"]
    last = min(5, summary["rounds"])
    rows = [
        ("last round", f"{summary['test_accuracy']:.2%} test accuracy"),
        (f"mean of the last {last}", f"{summary['test_accuracy_last_five']:.2%}"),
        (
            "worst 10 % of clients",
            f"{summary['client_accuracy']['worst_tenth']:.2%} (worst client: "
            f"{summary['worst_client']}, {summary['worst_client_accuracy']:.2%})",
        ),
        ("time", f"{summary['seconds']:.0f} s for {summary['rounds']} rounds"),
        (
            "communication",
            f"{format_bytes(sent)} ({format_bytes(summary['bytes_down'])} to the clients, "
            f"{format_bytes(summary['bytes_up'])} back)",
        ),
        ("run folder", summary["folder"]),
    ]
    if best is not None:
        round = summary["best_validation_round"]
        rows.insert(2, ("best validation round", f"{best:.2%} (round {round})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def sizes_table(sizes: dict) -> str:
    """The sizes of a dry run."""
    images = ", ".join(f"{count} {part}" for part, count in sizes["images"].items())
    low, high = min(sizes["client_images"]), max(sizes["client_images"])
    parameters = sizes["parameters"]
    down, up = sizes["bytes_down_per_round"], sizes["bytes_up_per_round"]
    side = sizes["image_size"]
    rows = (
        (
            "data set",
            f"{sizes['dataset']}: {images} images of {side}x{side} pixels, {sizes['classes']} "
            f"classes",
        ),
        ("clients", f"{sizes['clients']} with {low} to {high} training images each"),
        ("rounds", f"{sizes['rounds']} with {sizes['clients_per_round']} clients each"),
        ("steps per round", f"{sizes['steps_per_round']} on average"),
        ("model", f"{parameters} parameters and buffers, {format_bytes(4 * parameters)}"),
        (
            "communication",
            f"per round {format_bytes(down)} to the clients, {format_bytes(up)} back; plus each "
            f"client's anchors, once",
        ),
    )
    return "\n".join(f"{name:<16} {value}" for name, value in rows)
