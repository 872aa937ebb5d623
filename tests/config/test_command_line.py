"""A configuration as the flags that make it."""

import pytest

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.command_line import to_flags
from semanticfl_ref.config.resolve import resolve

SETTINGS = [
    {},
    {"data.name": "cifar10"},
    {"data.name": "cifar10", "diffusion.source": "tiny", "diffusion.timestep": 30},
    {"federation.method": "feddifrc", "anchors.text": "clip", "feddifrc.tau": 0.1},
    {"data.name": "image_folder", "data.dir": "my images", "data.image_size": 48},
    {"data.augment": True, "run.seed": 3, "federation.rounds": 7, "moon.mu": 5.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_flags_make_the_configuration_again(settings):
    config = resolve(settings)
    arguments = cli.parse(["train", *to_flags(config)])
    assert settings_of(arguments) == config


def test_no_flag_for_a_default():
    assert to_flags(resolve()) == []
    assert to_flags(resolve({"federation.rounds": 3})) == ["--rounds", "3"]
