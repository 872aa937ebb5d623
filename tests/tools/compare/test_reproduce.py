"""Published results: their configurations are whole, and what is not available is named."""

import json
from dataclasses import asdict

import pytest

from semanticfl_ref import cli
from semanticfl_ref.config.resolve import read_toml
from semanticfl_ref.config.settings import STABLE_DIFFUSION
from semanticfl_ref.tools import reproduce
from semanticfl_ref.tools.compare import experiment
from semanticfl_ref.tools.compare.grid import Grid, plan
from semanticfl_ref.tools.compare.statistics import compare

RESULTS = reproduce.published()


@pytest.mark.parametrize("name", RESULTS)
def test_every_published_result_makes_its_configurations(name, tmp_path):
    result = RESULTS[name]
    methods = list(result.accuracy)
    runs = plan(
        Grid(
            methods=methods,
            scenarios=result.scenarios,
            seeds=1,
            settings=read_toml(result.file),
            out=tmp_path,
            baseline=methods[0],
        )
    )
    assert len(runs) == len(methods) * len(result.scenarios)
    for run in runs:
        config = run.config
        assert config.federation.batch_size == 64
        assert config.methods["semanticfl"].tau == 0.05
        assert config.diffusion.timestep == 150
        assert config.diffusion.source == STABLE_DIFFUSION
        assert config.data.name in result.config
        assert config.methods["semanticfl"].lambda_con == 0.01  # as published
        sampled = 6 if config.partition.scenario == "nid2" else 5
        assert config.federation.clients_per_round == sampled
        assert config.federation.rounds == 50
        assert config.diffusion.layers == "vae,up.1,up.2,up.3"
        if config.data.name == "cifar10":
            assert config.partition.equal_sizes
            assert config.methods["moon"].mu == 5


def test_the_table_of_feddifrc():
    """Four splits of CIFAR-10; both of its terms, each alone, and baselines where it has them."""
    columns = ("cifar10-nid1-005", "cifar10-nid1", "cifar10-nid1-05", "cifar10-nid2")
    table = {
        "fedavg": (78.27, 84.65, 86.11, 72.60),
        "fedprox": (78.42, 84.59, None, 72.81),
        "moon": (80.79, 86.10, None, 73.35),
        "feddifrc": (83.14, 88.27, 89.31, 76.45),
        "feddifrc[feddifrc.lambda_noise=0]": (81.39, 86.03, 88.16, 75.67),
        "feddifrc[feddifrc.lambda_text=0]": (80.35, 86.40, 87.54, 75.33),
    }
    for method, values in table.items():
        assert tuple(RESULTS[name].accuracy.get(method) for name in columns) == values
    assert all("FedDifRC's own table" in RESULTS[name].source for name in columns)
    assert [RESULTS[name].scenarios[0][:9] for name in columns[:3]] == [
        "nid1:0.05",
        "nid1:0.2",
        "nid1:0.5",
    ]
    assert RESULTS["cifar10-nid1"].accuracy["semanticfl"] == 88.94


def test_the_list(capsys):
    assert cli.main(["reproduce"]) == 0
    assert "cifar10-nid1" in capsys.readouterr().out
    assert cli.main(["reproduce", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cifar100-nid2"]["accuracy"] == {"feddifrc": 53.87, "semanticfl": 54.58}


def test_help_shows_the_configuration_of_the_published_result(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "cifar100-nid2", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(data.name; default: cifar100)" in words
    assert "(partition.clients; default: 6)" in words


def test_without_data_and_weights_both_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cli.main(["reproduce", "cifar10-nid1", "--offline", "--out", str(tmp_path / "out")]) == 5
    words = capsys.readouterr().err.splitlines()[-1]
    assert "cifar10 is not available" in words
    assert f"{STABLE_DIFFUSION} is not available" in words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "moon"], "federation.method"),
        (["--set", "partition.alpha=1"], "partition.alpha"),
        (["--set", "run.seed=1"], "run.seed"),
        (["--scenario", "iid"], "partition.scenario"),
        (["--seeds", "0"], "--seeds: expected an integer of at least 1"),
        (["--config", "own.toml"], "--config"),
    ],
)
def test_what_the_result_is_of_cannot_be_changed(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "fetch", lambda *_: pytest.fail("something was fetched first"))
    assert cli.main(["reproduce", "cifar10-nid1", *flags]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_result(capsys):
    assert cli.main(["reproduce", "cifar10-nid3"]) == 2
    assert "did you mean 'cifar10-nid" in capsys.readouterr().err


def test_published_beside_ours(finished_grid, monkeypatch):
    """Over all scenarios, averaged within each seed, and with the settings that were changed."""
    accuracies = {"fedavg": {"iid": [[0.8] * 5, [0.9] * 5], "nid2": [[0.6] * 5, [0.7] * 5]}}
    runs, grid = finished_grid(accuracies)
    monkeypatch.setattr(reproduce, "fetch", lambda *_: None)
    monkeypatch.setattr(experiment, "run_grid", lambda grid, _: compare(runs, grid))
    published = reproduce.Published(
        title="T",
        source="a note",
        config="cifar10-nid1.toml",
        scenarios=["iid", "nid2"],
        accuracy={"fedavg": 74.65},
        unknown=["seeds", "rounds"],
    )
    document = reproduce.reproduce(published, grid, print)
    assert document["ours"]["fedavg"]["last"] == pytest.approx([70, 80])
    text = reproduce.side_by_side({**document, "seeds": 2, "changed": ["federation.rounds"]})
    assert "| fedavg | 74.65 | 75.0 ± 7.1 | 75.0 ± 7.1 | +0.35 | 75.0 ± 7.1 |" in text
    assert "ours, mean of the last 5 |" in text
    assert "seeds 2, rounds 5; ± is the sample standard deviation over seeds" in text
    assert "Changed settings: federation.rounds." in text
    assert "seeds; rounds." in text
    assert "Source of the published numbers: a note." in text
    json.dumps({**document, **asdict(published)})
