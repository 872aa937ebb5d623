"""`partition show`: who holds what."""

from semanticfl_ref.commands.flags import add_settings, settle
from semanticfl_ref.commands.output import say, show

HELP = "show: how the images are spread over the clients"


def add_flags(parser) -> None:
    parser.add_argument("what", choices=["show"])
    add_settings(parser)


def run(arguments) -> int:
    settings = settle(arguments)
    say(f"{settings.data.name}: loading torch ...")
    from semanticfl_ref import prepare
    from semanticfl_ref.data.partition import describe

    dataset, partition, _ = prepare.load_data(settings, arguments.offline)
    return show(partition.manifest(), arguments.json, lambda manifest: describe(partition, dataset.class_names))
