"""The flags that stand for settings, shared by every command that runs on a configuration."""

import argparse
from pathlib import Path

from semanticfl_ref import config

FLAGS = {
    "--dataset": "data.name",
    "--data-dir": "data.dir",
    "--data-sha256": "data.sha256",
    "--sd": "diffusion.source",
    "--method": "federation.method",
    "--scenario": "partition.scenario",
    "--alpha": "partition.alpha",
    "--clients": "partition.clients",
    "--clients-per-round": "federation.clients_per_round",
    "--rounds": "federation.rounds",
    "--local-epochs": "federation.local_epochs",
    "--anchors": "anchors.control",
    "--anchor-images": "anchors.images",
    "--condition": "diffusion.condition",
    "--precision": "run.precision",
    "--seed": "run.seed",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags of FLAGS, --config, --set and --offline, and every setting in its
    epilogue.
    """
    about = config.settings()
    parser.formatter_class, parser.epilog = (
        argparse.RawDescriptionHelpFormatter,
        _settings_help(about),
    )
    for flag, setting in FLAGS.items():
        parser.add_argument(
            flag,
            metavar=_metavar(about[setting]),
            help=f"{about[setting].metadata['help']} ({setting})".replace("%", "%%"),
        )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of settings; flags win over it"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="any setting below; wins over flags; repeatable",
    )
    parser.add_argument(
        "--offline", action="store_true", help="open no connection; what is missing is named"
    )


def settle(arguments: argparse.Namespace) -> config.Config:
    """The configuration that the flags, the TOML file and --set make."""
    return config.build(given(arguments), arguments.config, arguments.set)


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """Dotted name -> text of every flag that was written; config.py converts and checks the texts."""
    values = {name: getattr(arguments, flag[2:].replace("-", "_")) for flag, name in FLAGS.items()}
    return {name: value for name, value in values.items() if value is not None}


def _settings_help(about) -> str:
    lines = [
        "settings for --set and --config, with their defaults (a data set's preset may differ: see `config show`):"
    ]
    for name, field in about.items():
        unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
        lines.append(f"  {name} = {field.default}{unit}\n      {field.metadata['help']}")
    return "\n".join(lines)


def _metavar(field) -> str:
    choices = field.metadata["choices"]
    return "|".join(choices) if choices else {int: "N", float: "X", str: "TEXT"}[field.type]
