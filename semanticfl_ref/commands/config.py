"""`config`: every setting, and the configuration that the flags make."""

import textwrap

from semanticfl_ref.commands.output import show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.config.resolve import to_toml
from semanticfl_ref.config.schema import choices_of
from semanticfl_ref.config.settings import Config, setting_fields, to_flat

HELP = "list: every setting with its value, range and source; show: the configuration as TOML"
LIMITS = {"low": "at least", "above": "above", "high": "at most"}


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["list", "show"], metavar="list|show")
    add_settings(parser, argv)


def run(arguments) -> int:
    config = settings_of(arguments)
    text = listing(config) if arguments.what == "list" else to_toml(config).rstrip()
    return show(to_flat(config), arguments.json, lambda _: text)


def listing(config: Config) -> str:
    """Every setting with the value that will be used, its help, range, unit and source."""
    lines, values = [], to_flat(config)
    for name, field in setting_fields().items():
        about, choices = field.metadata, ", ".join(choices_of(field))
        notes = [about["help"], choices and f"one of {choices}"]
        notes += [f"{word} {about[key]}" for key, word in LIMITS.items() if about[key] is not None]
        notes += [about["unit"], about["source"] and f"source: {about['source']}"]
        text = textwrap.fill("; ".join(filter(None, notes)), 92)
        lines += [f"{name} = {values[name]}", textwrap.indent(text, "    ")]
    return "\n".join(lines)
