"""`train`: a run from end to end, or what is left of one."""

from pathlib import Path

from semanticfl_ref import config
from semanticfl_ref.commands.flags import add_settings, given, settle
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import MismatchError, UserError

HELP = "train, by default on the embedded digit scenes; writes a run folder"


def add_flags(parser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="run folder to make; by default runs/<dataset>-<method>-seed<seed>-<time>",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with a run, bit for bit, from its last checkpoint",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print images, clients, steps and bytes a round; write nothing",
    )


def run(arguments) -> int:
    from semanticfl_ref.report import folder as folders
    from semanticfl_ref.report import tables

    if arguments.resume is not None:
        if arguments.out is not None or arguments.dry_run:
            raise UserError(
                "--resume goes on in its own folder: it takes neither --out nor --dry-run"
            )
        settings, out = _resumed(arguments, folders.read_config(arguments.resume)), arguments.resume
        folder = folders.RunFolder(out)
        if folder.finished:
            say(f"the run {out} is finished; nothing is left to do")
            return show(folder.read("summary.json"), arguments.json, tables.table)
    else:
        settings = settle(arguments)
        out = arguments.out or folders.default_folder(settings)
        if not arguments.dry_run:
            folders.refuse_existing(out)
    held = config.held_out_images(settings)
    say(
        f"{settings.data.name}, {settings.federation.method}, seed {settings.run.seed}{f', {held} images a class held out' if held else ''}: loading torch ..."
    )
    from semanticfl_ref import prepare, train

    if arguments.dry_run:
        return show(prepare.dry_run(settings), arguments.json, tables.sizes_table)
    summary = train.train(
        settings, out=out, resume=arguments.resume is not None, offline=arguments.offline, say=say
    )
    return show(summary, arguments.json, lambda s: tables.closing_words(s, settings))


def _resumed(arguments, saved: config.Config) -> config.Config:
    """The run's own configuration; flags beside --resume may tell where things lie now, and must
    else say what it says.
    """
    written = given(arguments)
    if arguments.config is not None:
        written = {**config.read_toml(arguments.config), **written}
    settings, there = (
        config.build({**config.to_flat(saved), **written}, None, arguments.set),
        config.to_flat(saved),
    )
    here = config.to_flat(settings)
    differing = [
        f"{name} = {there[name]!r} there, {here[name]!r} here"
        for name in there
        if there[name] != here[name] and name not in config.NOT_IDENTITY
    ]
    if differing:
        raise MismatchError(
            f"{arguments.resume} was started with another configuration: {'; '.join(differing)}. Resume without these, or start anew with --out"
        )
    return settings
