"""`config`: every setting, and the configuration that the flags make."""

import textwrap

from semanticfl_ref.commands.output import show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.config.schema import choices_of
from semanticfl_ref.config.settings import Config, setting_fields, to_flat, to_toml

HELP = "list: every setting with its value, range and source; show: the configuration as TOML"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["list", "show"])
    add_settings(parser, argv)


def run(arguments) -> int:
    config = settings_of(arguments)
    to_text = listing if arguments.what == "list" else lambda config: to_toml(config).rstrip()
    return show(to_flat(config), arguments.json, lambda _: to_text(config))


def listing(config: Config) -> str:
    """Every setting with the value that will be used, its help, range, unit and source."""
    lines = []
    fields = setting_fields()
    for name, value in to_flat(config).items():
        about = fields[name].metadata
        limits = [
            f"{word} {about[key]}"
            for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
            if about[key] is not None
        ]
        notes = [*limits, about["unit"], about["source"] and f"source: {about['source']}"]
        if choices_of(fields[name]):
            notes.insert(0, "one of " + ", ".join(choices_of(fields[name])))
        text = about["help"] + "".join(f"; {note}" for note in notes if note)
        lines += [f"{name} = {value}", textwrap.indent(textwrap.fill(text, 92), "    ")]
    return "\n".join(lines)
