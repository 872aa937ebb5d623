"""`partition show`: who holds what; drawn, or saved for `partition.file`, if asked."""

from pathlib import Path

from semanticfl_ref.commands.flags import add_settings, settle
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.report.drawing import need_matplotlib

HELP = "show: how the images are spread over the clients"


def add_flags(parser) -> None:
    parser.add_argument("what", choices=["show"])
    add_settings(parser)
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="PNG",
        help="draw a bar of classes for each client; needs matplotlib",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write each client's image indices as JSON; --set partition.file=FILE takes them",
    )


def run(arguments) -> int:
    settings = settle(arguments)
    if arguments.figure is not None:
        need_matplotlib("--figure", arguments.figure)
    say(f"{settings.data.name}: loading torch ...")
    from semanticfl_ref import prepare
    from semanticfl_ref.data import partition_file
    from semanticfl_ref.data.partition import describe
    from semanticfl_ref.report.drawing import save_figure
    from semanticfl_ref.report.figures import partition_figure

    dataset, _ = prepare.load_images(settings, arguments.offline)
    partition = prepare.split(settings, dataset)
    if arguments.save is not None:
        partition_file.save(partition, dataset, arguments.save)
        say(f"saved: {arguments.save}")
    if arguments.figure is not None:
        save_figure(
            partition_figure(partition.manifest(), list(dataset.class_names)), arguments.figure
        )
        say(f"figure: {arguments.figure}")
    return show(
        partition.manifest(),
        arguments.json,
        lambda manifest: describe(partition, dataset.class_names),
    )
