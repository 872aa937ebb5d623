"""The plan of a grid, and the flags that describe it."""

import pytest

from semanticfl_ref import cli
from semanticfl_ref.errors import UserError
from semanticfl_ref.tools.compare import experiment
from semanticfl_ref.tools.compare.grid import (
    Grid,
    method_settings,
    plan,
    scenario_settings,
    short_name,
    split_entries,
)


def grid_of(folder, methods, scenarios, seeds=1, settings=None):
    return Grid(
        methods=methods,
        scenarios=scenarios,
        seeds=seeds,
        settings=settings or {},
        out=folder,
        baseline=methods[0],
    )


def test_methods_and_scenarios_as_they_are_written():
    text = "fedavg, semanticfl[semanticfl.tau=0.1;anchors.control=random],moon"
    assert split_entries("--methods", text, []) == [
        "fedavg",
        "semanticfl[semanticfl.tau=0.1;anchors.control=random]",
        "moon",
    ]
    layers = "semanticfl[diffusion.layers=mid,up.1; anchors.width=4]"
    assert split_entries("--methods", f"{layers},moon", []) == [layers, "moon"]
    assert method_settings(layers)["diffusion.layers"] == "mid,up.1"
    assert method_settings("moon[moon.mu=5; moon.tau=1]") == {
        "federation.method": "moon",
        "moon.mu": "5",
        "moon.tau": "1",
    }
    assert method_settings("moon[ moon.mu = 5 ;]")["moon.mu"] == "5"
    assert method_settings("moon[data.dir=]")["data.dir"] == ""
    assert method_settings("moon[diffusion.prompt=a = b]")["diffusion.prompt"] == "a = b"
    assert scenario_settings("nid1:0.1") == {
        "partition.scenario": "nid1",
        "partition.alpha": "0.1",
    }
    assert scenario_settings("nid2") == {"partition.scenario": "nid2", "partition.clients": 6}
    assert scenario_settings("nid2[partition.clients=7]")["partition.clients"] == "7"


def test_plan_is_seed_by_seed_and_names_each_run_once(tmp_path):
    runs = plan(
        grid_of(tmp_path, ["fedavg", "moon", "moon[moon.mu=5]"], ["iid", "nid1:0.1"], seeds=2)
    )
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6
    assert len({run.folder for run in runs}) == 12
    assert runs[5].config.method.mu == 5
    assert runs[5].config.partition.alpha == 0.1
    assert runs[5].config.run.seed == 0


def test_without_scenarios_the_configured_one_is_taken_as_it_is(tmp_path):
    settings = {"partition.scenario": "quantity", "partition.alpha": 7}
    (run,) = plan(grid_of(tmp_path, ["fedavg"], [], settings=settings))
    assert (run.scenario, run.config.partition.alpha) == ("quantity", 7)


@pytest.mark.parametrize(
    "methods, scenarios, words",
    [
        (["fedavg", "fedavg"], ["iid"], "duplicate run"),
        (["fedavgg"], ["iid"], "did you mean 'fedavg'"),
        (["fedavg"], ["nid3"], "did you mean 'nid"),
        (["fedavg"], ["iid:3"], "take a number"),
        (["moon[fedprox.mu=1]"], ["iid"], "moon does not read fedprox.mu"),
        (["moon[moon.mu]"], ["iid"], "expected NAME"),
        (["moon[moon.mue=1]"], ["iid"], "'moon.mu'"),
        (["moon[moon.mu=1"], ["iid"], "expected NAME"),
        (["moon[=1]"], ["iid"], "expected NAME"),
        (["fedavg"], ["nid1:x"], "a number"),
        (["moon[moon.mu=5]", "moon[moon.mu=5;]"], ["iid"], "duplicate run"),
    ],
)
def test_refusals(methods, scenarios, words, tmp_path):
    with pytest.raises(UserError, match=words):
        plan(grid_of(tmp_path, methods, scenarios))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seeds", "0"], "--seeds: expected an integer of at least 1"),
        (["--seeds", ""], "--seeds"),
        (["--workers", "0"], "--workers: expected an integer of at least 1"),
        (["--baseline", "moon"], "--baseline 'moon'"),
        (["--method", "fedavg"], "--methods"),
        (["--seed", "3"], "--seeds"),
        (["--scenario", "iid"], "--scenarios"),
        (["--methods", ""], "--methods '' is empty: give at least one of fedavg, semanticfl"),
        (["--methods", " ,"], "--methods ' ,' is empty"),
        (["--methods", "fedavgg"], "did you mean 'fedavg'"),
        (["--scenarios", ""], "--scenarios '' is empty: give at least one of iid, nid1"),
        (["--scenarios", "nid3"], "did you mean 'nid"),
        (["--set", "run.seed=3"], "--seeds"),
        (["--set", "federation.method=moon"], "--methods"),
        (["--dataset", "cifar10", "--part", "validation"], "data.validation_share"),
        (["--at", "40;80"], "--at"),
        (["--at", ""], "--at"),
        (["--at", "0,40"], "--at 0: choose 1 to 40"),
        (["--at", "40,80"], "--at 80: choose 1 to 40"),
    ],
)
def test_bad_flags(capsys, arguments, words, tmp_path):
    assert cli.main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_only_settings_that_the_grid_leaves_free(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    words = capsys.readouterr().out.split()
    assert "--alpha" in words
    assert not {"--method", "--scenario", "--seed"} & set(words)


def test_the_settings_of_an_entry_win_over_flags_and_set(tmp_path, monkeypatch):
    """And what the file says of threads is kept."""
    planned = []

    def stop(runs, grid):
        planned.extend(runs)
        raise UserError("planned")

    monkeypatch.setattr(experiment, "train_all", stop)
    own = tmp_path / "own.toml"
    own.write_text("[run]\nthreads = 1\n")
    arguments = [
        *("compare", "--methods", "semanticfl,semanticfl[semanticfl.tau=0.5]"),
        *("--scenarios", "nid2", "--seeds", "2", "--out", str(tmp_path), "--config", str(own)),
        *("--set", "semanticfl.tau=0.1", "--set", "partition.clients=10", "--workers", "2"),
    ]
    assert cli.main(arguments) == 2
    assert [run.config.method.tau for run in planned] == [0.1, 0.5] * 2
    assert [run.config.run.seed for run in planned] == [0, 0, 1, 1]
    assert {(run.config.partition.clients, run.config.run.threads) for run in planned} == {(6, 1)}


def test_workers_share_the_cores(tmp_path, monkeypatch):
    """By the number of replicas, on which results do not depend."""
    monkeypatch.setattr("semanticfl_ref.tools.compare.grid.cores", lambda: 8)
    for workers, replicas in ((1, 0), (3, 2), (9, 1)):
        fields = {"methods": ["fedavg"], "seeds": 1, "settings": {}, "baseline": "fedavg"}
        (run,) = plan(Grid(**fields, workers=workers, out=tmp_path))
        assert run.config.run.replicas == replicas
        assert run.config.run.threads == 1


def test_a_short_name_is_the_runs_name(tmp_path):
    entry = "tuned=moon[moon.mu=5;federation.learning_rate=0.02]"
    assert (short_name(entry), short_name("moon[moon.mu=5]")) == ("tuned", "moon[moon.mu=5]")
    settings = method_settings(entry)
    assert settings == method_settings(entry.removeprefix("tuned="))
    assert settings["federation.method"] == "moon"
    grid = Grid(methods=[entry], seeds=1, settings={}, out=tmp_path, baseline=entry)
    assert plan(grid)[0].folder.name == "tuned-nid1-40-seed0"
    long = "moon[" + ";".join(["federation.learning_rate=0.02"] * 9) + "]"
    with pytest.raises(UserError, match="give it a short one"):
        plan(Grid(methods=[long], seeds=1, settings={}, out=tmp_path, baseline=long))
