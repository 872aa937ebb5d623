"""The flags for settings that every command with a configuration shares."""

import argparse
from collections.abc import Callable, Collection, Mapping

from semanticfl_ref.config.command_line import FLAGS
from semanticfl_ref.config.resolve import parse_assignment, read_toml, resolve
from semanticfl_ref.config.schema import choices_of
from semanticfl_ref.config.settings import Config, setting_fields, to_flat
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import user_path

METAVARS = {
    int: "N",
    float: "X",
    str: "TEXT",
    bool: "BOOL",
    "data.dir": "FOLDER",
    "diffusion.source": "MODEL",
    "anchors.images": "IMAGES",
}


def add_settings(
    parser: argparse.ArgumentParser,
    argv: list[str],
    preset: Mapping[str, object] | None = None,
    hidden: Collection[str] = (),
) -> None:
    """Add the flags of FLAGS, --config, --set and --offline.

    Args:
        parser: the command's parser.
        argv: the command's arguments: help shows the value that each setting has with them.
        preset: settings whose defaults the command changes.
        hidden: settings that help does not list, since the command has them from elsewhere.
    """
    fields, values = setting_fields(), _values(argv, preset)
    for flag, name in FLAGS.items():
        field, value = fields[name], values[name]
        shown = "empty" if value == "" else value
        text = f"{field.metadata['help']} ({name}; default: {shown})".replace("%", "%%")
        parser.add_argument(
            flag,
            dest=name,
            metavar="|".join(choices_of(field))
            or METAVARS.get(name)
            or METAVARS[type(field.default)],
            help=argparse.SUPPRESS if name in hidden else text,
        )
    _add_sources(parser)
    parser.add_argument(
        "--offline", action="store_true", help="no network access; stop and name any missing file"
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=user_path,
        metavar="FILE",
        help="TOML file with settings; flags override it",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting, see `config list`; overrides flags; repeatable",
    )


def at_least(least: int) -> Callable[[str], int]:
    """A function: the text of a flag -> its value, an integer of at least `least`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, not {text!r}"
            )
        return int(text)

    return convert


positive, natural = at_least(1), at_least(0)


def integers(text: str) -> list[int]:
    """The value of a flag that is a list of integers."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        message = f"expected integers separated by commas, such as 40,80, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def settings_of(
    arguments: argparse.Namespace, preset: Mapping[str, object] | None = None
) -> Config:
    """The configuration that --config, the flags and --set make, in this order."""
    return resolve({**(preset or {}), **from_file(arguments), **given(arguments)})


def from_file(arguments: argparse.Namespace) -> dict[str, object]:
    """Dotted name -> value of every setting in the --config file."""
    return read_toml(arguments.config) if arguments.config else {}


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """Dotted name -> string of every setting that a flag or --set names."""
    values = vars(arguments)
    flags = {name: values[name] for name in FLAGS.values() if values[name] is not None}
    return flags | dict(map(parse_assignment, arguments.set))


def _values(argv: list[str], preset: Mapping[str, object] | None) -> dict[str, object]:
    """The value of every setting with these arguments; of a mistaken one, its default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag, name in FLAGS.items():
        parser.add_argument(flag, dest=name)
    _add_sources(parser)
    try:
        arguments, _ = parser.parse_known_args(argv)
        return to_flat(settings_of(arguments, preset))
    except (UserError, argparse.ArgumentError, SystemExit):
        return to_flat(resolve(preset))
