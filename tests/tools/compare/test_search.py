"""The search: equal budgets, the validation part, and what a comparison makes of the result."""

import json
import re

import pytest

from semanticfl_ref import cli
from semanticfl_ref.errors import UserError
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.tools.compare import experiment
from semanticfl_ref.tools.compare.grid import method_settings
from semanticfl_ref.tools.compare.search import candidates

ENVIRONMENT = {
    **dict.fromkeys(
        ("processor", "device", "precision", "threads", "python", "semanticfl_ref"), ""
    ),
    "versions": {},
}
DOCUMENTS = {
    "environment.json": ENVIRONMENT,
    "identity.json": {"data": "the same", "partition": "the same"},
}
RATES = {"federation.learning_rate": ["0.05", "0.1", "0.2", "0.4"]}


def test_every_method_has_as_many_configurations_of_its_own_settings():
    varied = {**RATES, "moon.mu": ["1", "5"]}
    fedavg, moon = candidates("fedavg", varied, 4), candidates("moon", varied, 4)
    assert fedavg == [f"fedavg[federation.learning_rate={rate}]" for rate in (0.05, 0.1, 0.2, 0.4)]
    assert len(set(moon)) == 4
    assert all(method_settings(entry).keys() > {"moon.mu", *RATES} for entry in moon)
    assert moon == candidates("moon", varied, 4), "drawn alike every time"
    rates = [method_settings(entry)["federation.learning_rate"] for entry in moon]
    assert rates == RATES["federation.learning_rate"], "each of four once"
    assert sorted(method_settings(entry)["moon.mu"] for entry in moon) == ["1", "1", "5", "5"]
    assert len(set(candidates("moon", varied, 8))) == 8, "all of them"
    shuffled = candidates("semanticfl[anchors.control=shuffled]", RATES, 2)
    assert all("[anchors.control=shuffled;federation.learning_rate=" in entry for entry in shuffled)


def test_a_smaller_budget_is_refused():
    with pytest.raises(
        UserError, match="has 4 combinations of the values of --vary, fewer than the 5 "
    ):
        candidates("fedavg", {**RATES, "moon.mu": ["1", "5"]}, 5)


@pytest.fixture
def trained_by_formula(monkeypatch):
    """Runs are made of numbers: on validation a rate of 0.2 is best, on test 0.05."""

    def train_all(runs, grid):
        for run in runs:
            if run.folder.exists():
                continue
            rate = run.config.federation.learning_rate
            folder = RunFolder.create(run.folder, run.config, DOCUMENTS)
            folder.append(line_of(rate, run.seed), 1.0)
            folder.finish({"warnings": []})

    monkeypatch.setattr(experiment, "train_all", train_all)


def line_of(rate: float, seed: int) -> dict:
    return {
        "round": 1,
        "validation_accuracy": 0.9 - abs(rate - 0.2) + seed / 1e6,
        "test_accuracy": 0.9 - abs(rate - 0.05),
        "client_accuracy": [0.5],
        "bytes_down": 1,
        "bytes_up": 1,
    }


def run_json(capsys, *argv) -> dict:
    assert cli.main([*argv, "--dataset", "digits", "--rounds", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_chosen_by_validation_and_used_by_compare(tmp_path, capsys, trained_by_formula):
    rates = ["--vary", "federation.learning_rate=0.05,0.2,0.4", "--configurations", "3"]
    searched = ["search", "--methods", "fedavg,moon", *rates, "--out", str(tmp_path / "search")]
    found = run_json(capsys, *searched)
    assert found["seeds"] == [100, 101]
    assert found["chosen"]["moon"] == "moon[federation.learning_rate=0.2]"
    assert found["accuracy"]["moon"]["moon[federation.learning_rate=0.4]"] == pytest.approx(
        [70.01, 70.0101]
    )
    table = (tmp_path / "search/search.md").read_text()
    assert "| moon | `moon[federation.learning_rate=0.2]` | 90.0 ± 0.0 | yes |" in table
    assert "every method: 3 configurations, 1 rounds, seeds 100, 101" in table

    file = tmp_path / "search/search.json"
    compared = ["compare", "--methods", "moon,fedavg", "--baseline", "fedavg", "--tuned", str(file)]
    result = run_json(capsys, *compared, "--out", str(tmp_path / "compare"))
    assert result["baseline"] == "fedavg=fedavg[federation.learning_rate=0.2]"
    assert [r["last"] for r in result["results"]] == [pytest.approx([75.0] * 3)] * 2
    text = " ".join((tmp_path / "compare/compare.md").read_text().split())
    compared[2] = "still=moon[moon.mu=2],fedavg,moon[federation.learning_rate=0.1]"
    entries = run_json(capsys, *compared, "--out", str(tmp_path / "variants"))["results"]
    assert [entry["method"] for entry in entries] == [
        "still=moon[federation.learning_rate=0.2;moon.mu=2]",
        "fedavg=fedavg[federation.learning_rate=0.2]",
        "moon[federation.learning_rate=0.1]",
    ]
    assert "same budget for every method: 3 configurations, seeds 100, 101, 1 rounds." in text


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to search"),
        (["--vary", "run.seed=1,2"], "--first-seed"),
        (["--vary", "moon.mu=1,5"], "moon.mu: its method is not among --methods"),
        (["--vary", "federation.learning_rate=0.1"], "1 combinations"),
    ],
)
def test_a_search_that_cannot_be_fair_trains_nothing(tmp_path, capsys, flags, words):
    out = tmp_path / "search"
    assert cli.main(["search", "--methods", "fedavg", *flags, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_seeds_of_a_search_are_not_compared(tmp_path, capsys, trained_by_formula):
    rates = ["--vary", "federation.learning_rate=0.05,0.2", "--configurations", "2"]
    run_json(capsys, "search", "--methods", "fedavg", *rates, "--out", str(tmp_path))
    file = tmp_path / "search.json"
    tuned = ["compare", "--tuned", str(file), "--out", str(tmp_path / "compare")]
    for flags, words in (
        (["--methods", "fedavg", "--first-seed", "101"], "choose others with --first-seed 102"),
        (["--methods", "moon"], "it has no moon; it has fedavg"),
    ):
        assert cli.main([*tuned, *flags]) == 2
        assert re.search(words, capsys.readouterr().err)
    file.write_text("[1]")
    assert cli.main([*tuned, "--methods", "fedavg"]) == 3
    assert "is not the search.json of a search" in capsys.readouterr().err
