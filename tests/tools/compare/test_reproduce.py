"""Published cells: their presets are whole, and what cannot be had is named."""

import json
import tomllib

import pytest

from semanticfl_ref import cli
from semanticfl_ref.commands import reproduce
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.tools.compare import grid

CELLS = tomllib.loads((reproduce.PRESETS / "published.toml").read_text())


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_makes_its_configurations(name, tmp_path):
    cell = CELLS[name]
    jobs = grid.plan(
        list(cell["accuracy"]),
        cell["scenarios"],
        1,
        lambda settings: config.build(settings, reproduce.PRESETS / cell["config"]),
        tmp_path,
    )
    for job in jobs:
        assert (
            job.config.federation.batch_size,
            job.config.semantic.tau,
            job.config.diffusion.timestep,
            job.config.diffusion.source,
        ) == (64, 0.05, 150, config.STABLE_DIFFUSION)
        assert (
            job.config.data.name in cell["config"] and job.config.federation.clients_per_round == 5
        )


def test_the_list(capsys):
    assert cli.main(["reproduce"]) == 0
    assert "cifar10-nid1" in capsys.readouterr().out


def test_without_data_and_weights_both_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cli.main(["reproduce", "cifar10-nid1", "--offline", "--out", str(tmp_path / "out")]) == 5
    words = capsys.readouterr().err.splitlines()[-1]
    assert (
        "cifar10 cannot be had" in words
        and f"{config.STABLE_DIFFUSION} cannot be had" in words
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "moon"], "federation.method"),
        (["--set", "partition.alpha=1"], "partition.alpha"),
        (["--seeds", "0"], "--seeds 0"),
    ],
)
def test_what_the_cell_is_of_cannot_be_changed(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(
        reproduce, "need_all", lambda *_: pytest.fail("something was fetched first")
    )
    assert cli.main(["reproduce", "cifar10-nid1", *flags]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_cell(capsys):
    assert cli.main(["reproduce", "cifar10-nid3"]) == 2
    assert "cifar10-nid1" in capsys.readouterr().err


def test_published_beside_ours(finished_grid):
    from semanticfl_ref.tools.compare.statistics import compare

    result = compare(finished_grid({"fedavg": {"iid": [[0.8] * 5, [0.9] * 5]}}), "fedavg", "test")
    cell = {"title": "T", "accuracy": {"fedavg": 84.65}, "unknown": ["rounds"]}
    words = reproduce.beside(
        {
            **cell,
            "ours": reproduce.ours(result),
            "seeds": 2,
            "rounds": 5,
            "changed": ["federation.rounds"],
        }
    )
    assert (
        "| fedavg | 84.65 | 85.0 ± 7.1 | 85.0 ± 7.1 | +0.35 |" in words
        and "federation.rounds" in words
        and "rounds." in words
    )
    json.dumps(reproduce.ours(result))
