"""Flags that stand for settings, a configuration as the flags that make it, and whole commands."""

import shlex

from semanticfl_ref.config.registry import IMPORTED
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.settings import Config, to_flat

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
    "--batch-size": "federation.batch_size",
    "--optimizer": "federation.optimizer",
    "--lr": "federation.learning_rate",
    "--schedule": "federation.schedule",
    "--model": "model.name",
    "--width": "model.width",
    "--anchors": "anchors.control",
    "--anchor-images": "anchors.images",
    "--condition": "diffusion.condition",
    "--device": "run.device",
    "--precision": "run.precision",
    "--threads": "run.threads",
    "--replicas": "run.replicas",
    "--seed": "run.seed",
    "--patience": "run.patience",
    "--init": "run.init",
}


def shell_command(*words: str) -> str:
    """The line to type for a command of the package."""
    imports = (f"--import={file}" for file in IMPORTED)
    return shlex.join(["python", "-m", "semanticfl_ref", *words, *imports])


def to_flags(config: Config) -> list[str]:
    """The shortest list of flags that makes a configuration."""
    values, given, words = to_flat(config), {}, []
    flag_of = {name: flag for flag, name in FLAGS.items()}
    # First what presets depend on, then what differs from the presets.
    for name in ("data.name", "diffusion.source", "federation.optimizer", "federation.method"):
        if values[name] != to_flat(resolve(given))[name]:
            words += [flag_of[name], str(values[name])]
            given[name] = values[name]
    preset = to_flat(resolve(given))
    for name, value in values.items():
        if value == preset[name]:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += [flag_of[name], text] if name in flag_of else ["--set", f"{name}={text}"]
    return words
