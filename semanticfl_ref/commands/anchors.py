"""`anchors export`: the file of anchors that a client of a real federation gets once."""

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.storage import user_path

HELP = "export: the anchors of one client as a file, for a federation of several machines"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["export"], metavar="export")
    add_settings(parser, argv)
    parser.add_argument("--client", type=int, required=True, metavar="K", help="client's number")
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        metavar="FILE",
        help="file to write; FILE.json beside it says what the client reveals for it",
    )


def run(arguments) -> int:
    config = settings_of(arguments)
    say(f"{config.data.name}, {config.diffusion.source}: loading torch ...")
    from semanticfl_ref.run.client_data import export_anchors

    document = export_anchors(
        config, arguments.client, arguments.out, offline=arguments.offline, say=say
    )
    return show(document, arguments.json, as_text)


def as_text(document: dict) -> str:
    """The document in lines."""
    return "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in document.items())
