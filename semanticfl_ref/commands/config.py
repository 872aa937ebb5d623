"""`config show`: the configuration that the flags make."""

from semanticfl_ref import config
from semanticfl_ref.commands.flags import add_settings, settle
from semanticfl_ref.commands.output import show

HELP = "show: the configuration that the flags make, as TOML"


def add_flags(parser) -> None:
    parser.add_argument("what", choices=["show"])
    add_settings(parser)


def run(arguments) -> int:
    settings = settle(arguments)
    return show(
        config.to_flat(settings), arguments.json, lambda flat: config.to_toml(settings).rstrip()
    )
