"""The plan of a grid, and running it: reuse, resume, failures with the run's own words."""

import json

import pytest
from processes import JOB, run_cli

from semanticfl_ref import cli, config
from semanticfl_ref.comparison import grid
from semanticfl_ref.errors import MismatchError, UserError


def settle(cell):
    return config.build(cell)


def test_arms_and_scenarios_as_they_are_written():
    assert grid.split("fedavg, semanticfl[semantic.tau=0.1;anchors.control=random],moon") == ["fedavg", "semanticfl[semantic.tau=0.1;anchors.control=random]", "moon"]
    assert grid.arm_settings("moon[moon.mu=5; moon.tau=1]") == {"federation.method": "moon", "moon.mu": "5", "moon.tau": "1"}
    assert grid.scenario_settings("nid1:0.1") == {"partition.scenario": "nid1", "partition.alpha": "0.1"}
    assert grid.scenario_settings("nid2") == {"partition.scenario": "nid2", "partition.clients": 6}
    assert grid.scenario_settings("nid2[partition.clients=7]")["partition.clients"] == "7"


def test_plan_is_seed_by_seed_and_names_each_run_once(tmp_path):
    jobs = grid.plan(["fedavg", "moon", "moon[moon.mu=5]"], ["iid", "nid1:0.1"], 2, settle, tmp_path)
    assert [job.seed for job in jobs] == [0] * 6 + [1] * 6 and len({job.folder for job in jobs}) == 12
    assert jobs[5].config.moon.mu == 5 and jobs[5].config.partition.alpha == 0.1 and jobs[5].config.run.seed == 0


@pytest.mark.parametrize(
    "arms, scenarios, words",
    [
        (["fedavg", "fedavg"], ["iid"], "stands twice"), (["fedavgg"], ["iid"], "'fedavg'"), (["fedavg"], ["nid3"], "'nid"), (["fedavg"], ["iid:3"], "takes no number"),
        (["moon[moon.mu]"], ["iid"], "no assignment"), (["moon[moon.mue=1]"], ["iid"], "'moon.mu'"), (["moon[moon.mu=1"], ["iid"], "expected name"), ([], ["iid"], "no method"),
        (["fedavg"], ["nid1:x"], "a number"),
    ],
)  # fmt: skip
def test_refusals(arms, scenarios, words, tmp_path):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        grid.plan(arms, scenarios, 1, settle, tmp_path)


def test_a_folder_of_other_settings_is_refused(finished_grid, tmp_path):
    jobs = finished_grid({"fedavg": {"iid": [[0.5]]}})
    other = grid.plan(["fedavg"], ["iid"], 1, lambda cell: config.build({"federation.rounds": 1, "data.name": "digits", "federation.learning_rate": 0.5, **cell}), tmp_path)
    grid.run(jobs, workers=1, offline=True, methods=[])  # finished: nothing to do
    with pytest.raises(MismatchError, match="federation.learning_rate = 0.1 there, 0.5 here"):
        grid.run(other, workers=1, offline=True, methods=[])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seeds", "0"], "--seeds 0"), (["--workers", "0"], "--workers 0"), (["--baseline", "moon"], "--baseline 'moon'"), (["--method", "fedavg"], "--methods"),
        (["--seed", "3"], "--seeds"), (["--scenario", "iid"], "--scenarios"), (["--methods", ""], "--baseline"),
    ],
)  # fmt: skip
def test_bad_flags(capsys, arguments, words, tmp_path):
    assert cli.main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_compare_from_end_to_end(tmp_path):
    """Two arms of a small job: tables and numbers; the second call trains nothing; a run that fails gives its words and its code."""
    job = [flag for flag in JOB if flag not in ("--method", "fedavg")] + ["--rounds", "2", "--seeds", "1", "--json", "--out", str(tmp_path)]
    first = run_cli("compare", "--methods", "fedavg,fedprox[fedprox.mu=0]", *job)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert [cell["gain"] and cell["gain"]["values"] for cell in result["cells"]] == [None, [0.0]], "FedProx without its term is FedAvg"
    assert {"compare.md", "compare.csv", "compare.json"} <= {file.name for file in tmp_path.iterdir()}
    assert "python -m semanticfl_ref compare" in (tmp_path / "compare.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    again = run_cli("compare", "--methods", "fedavg,fedprox[fedprox.mu=0]", *job)
    assert json.loads(again.stdout) == result and {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")} == before
    failing = run_cli("compare", "--methods", "fedavg[federation.learning_rate=1e30]", *job)
    assert failing.returncode == 6 and "federation.learning_rate=1e30" in failing.stderr.splitlines()[-1] and "NaN" in failing.stderr.splitlines()[-1]
