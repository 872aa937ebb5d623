"""When a run is evaluated, when it stops, and what it starts from; each resumes bitwise."""

import shutil

import pytest
import torch
from run_folders import assert_same_results, read_json
from safetensors.torch import load_file

from semanticfl_ref import cli, load_model
from semanticfl_ref.config.registry import DATASETS, register_dataset
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.data.dataset import Labelled, Parts
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.federated.evaluate import EVALUATED
from semanticfl_ref.run import train as train_module
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.setup import load_data
from semanticfl_ref.run.summary import best_round, evaluated, out_of_patience
from semanticfl_ref.tools.report.runs import read_run

# A rate at which nothing moves, without running statistics: the first round stays the best one.
STILL = ["--set", "model.norm=group", "--lr", "1e-30", "--patience", "2"]


def lines_with(*validation) -> list[dict]:
    """Lines of rounds with these validation accuracies; None: not evaluated."""
    totals = {"steps": 2, "bytes_down": 3, "bytes_up": 5}
    return [
        {"round": number, "test_accuracy": value, "validation_accuracy": value, **totals}
        for number, value in enumerate(validation, start=1)
    ]


@pytest.fixture
def interrupted(monkeypatch):
    """A function: start a run that Ctrl-C ends as a round starts."""

    def start(arguments: list[str], number: int) -> None:
        honest = train_module.run_round

        def run_round(state, context):
            if state.round + 1 == number:
                raise KeyboardInterrupt
            return honest(state, context)

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "run_round", run_round)
            assert cli.main(["train", *arguments]) == 130

    return start


def test_patience_counts_evaluations():
    lines = lines_with(0.1, None, 0.3, None, 0.3, None, 0.2)
    assert best_round(lines)["round"] == 3
    assert [line["round"] for line in evaluated(lines)] == [1, 3, 5, 7]
    assert [line["bytes_up"] for line in evaluated(lines)] == [5, 10, 10, 10]
    assert out_of_patience(lines, 2)
    assert not out_of_patience(lines, 3)
    assert not out_of_patience(lines, 0)
    assert not out_of_patience([], 1)


def test_evaluation_every_two_rounds(tmp_path, job, unbroken_run):
    """What is evaluated, and the model, is that of a run that evaluates every round."""
    run = tmp_path / "run"
    command = ["train", *job, "--set", "run.evaluate_every=2", "--out", str(run)]
    assert cli.main(command) == 0
    whole, lines = RunFolder(unbroken_run).rounds(), RunFolder(run).rounds()
    assert lines[1::2] == whole[1::2]
    assert lines[::2] == [line | dict.fromkeys(EVALUATED) for line in whole[::2]]
    params = [load_file(r / "checkpoint.safetensors")["params"] for r in (run, unbroken_run)]
    assert torch.equal(*params)
    summary, other = read_json(run / "summary.json"), read_json(unbroken_run / "summary.json")
    for name in ("rounds", "test_accuracy", "bytes_down", "steps", "gradient_norm", "loss"):
        assert summary[name] == other[name], name
    mean = (whole[1]["test_accuracy"] + whole[3]["test_accuracy"]) / 2
    assert summary["test_accuracy_last_five"] == pytest.approx(mean)
    assert read_run(run).rounds == [2, 4]
    assert read_run(run).sent == read_run(unbroken_run).sent[1::2]
    assert cli.main(["report", str(run)]) == 0


def test_rounds_that_would_end_without_an_evaluation_are_refused():
    settings = {"federation.rounds": 10, "run.evaluate_every": 4}
    with pytest.raises(
        UserError, match=r"no multiple of run\.evaluate_every = 4: .* use 12 rounds"
    ):
        resolve(settings)


def test_a_run_stops_and_goes_on(tmp_path, job, interrupted, capsys):
    """It stops two evaluations after the best; its stopping point is not its identity."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [*job, *STILL, "--set", "run.checkpoint_every=2", "--out"]
    interrupted([*command, str(run)], 2)
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "stopped after round 3: no better validation" in capsys.readouterr().err
    assert cli.main(["train", *command, str(whole)]) == 0
    assert_same_results(run, whole)
    assert (run / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    assert read_json(run / "summary.json")["rounds"] == 3
    assert read_json(run / "summary.json")["best_validation_round"] == 1
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(run), "--patience", "0"]) == 0
    assert len(RunFolder(run).rounds()) == 4
    unbroken = [*job, *STILL, "--patience", "0", "--set", "run.checkpoint_every=2"]
    assert cli.main(["train", *unbroken, "--out", str(tmp_path / "four")]) == 0
    assert_same_results(run, tmp_path / "four")


def test_the_best_model_is_kept_and_exported(tmp_path, job, monkeypatch, interrupted):
    """The second of four rounds is the best: its model is that of a run of two rounds."""
    run, honest = tmp_path / "run", train_module.run_round

    def run_round(state, context):
        state, line = honest(state, context)
        return state, line | {"validation_accuracy": [0.2, 0.5, 0.1, 0.5][state.round - 1]}

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "run_round", run_round)
        assert cli.main(["train", *job, "--patience", "4", "--out", str(run)]) == 0
    interrupted([*job, "--out", str(tmp_path / "two")], 3)
    expected = load_model(tmp_path / "two").network.state_dict()
    out = tmp_path / "best.safetensors"
    assert cli.main(["export", str(run), "--best", "--out", str(out)]) == 0
    kept, last = load_file(out), load_model(run).network.state_dict()
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    assert not torch.equal(kept["stem.weight"], last["stem.weight"])
    (run / "summary.json").unlink()  # as if killed between the best model and its checkpoint
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    RunFolder(run).checkpoint.unlink()
    with pytest.raises(MismatchError, match="ahead of the run's metrics: continue with --resume"):
        load_model(run, best=True)
    RunFolder(run).best.unlink()
    with pytest.raises(DataError, match=r"no best\.safetensors: only a run with run\.patience"):
        load_model(run, best=True)


def test_patience_without_validation_images_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(DATASETS, "entries", dict(DATASETS.entries))
    part = Labelled(
        torch.arange(40 * 432).to(torch.uint8).view(40, 12, 12, 3), torch.arange(40) % 2
    )
    register_dataset("plain", lambda options: Parts(class_names=("a", "b"), train=part, test=part))
    settings = {"data.name": "plain", "run.patience": 3, "federation.method": "fedavg"}
    with pytest.raises(UserError, match=r"run\.patience needs validation images"):
        load_data(resolve(settings))
    load_data(resolve(settings | {"data.validation_share": 0.1}))


def test_a_run_starts_from_another_runs_model(tmp_path, job, unbroken_run, interrupted):
    """From its folder, its export, or a state dict; once started, it does not need them."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(unbroken_run, source)
    one_round = [*job, "--rounds", "1"]
    interrupted([*one_round, "--init", str(source), "--out", str(run)], 1)
    trained = load_file(source / "checkpoint.safetensors")["params"]
    assert torch.equal(load_file(run / "checkpoint.safetensors")["params"], trained)
    export = tmp_path / "model.safetensors"
    assert cli.main(["export", str(source), "--out", str(export)]) == 0
    state_dict = tmp_path / "model.pt"
    torch.save(load_model(source).network.state_dict(), state_dict)
    shutil.rmtree(source)
    assert cli.main(["train", "--resume", str(run)]) == 0
    for file in (export, state_dict):
        again = tmp_path / file.suffix
        assert cli.main(["train", *one_round, "--init", str(file), "--out", str(again)]) == 0
        assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
        identity = read_json(again / "identity.json")
        assert identity["init"] == read_json(run / "identity.json")["init"]
    plain = RunFolder(unbroken_run).rounds()[0]
    assert RunFolder(run).rounds()[0]["test_accuracy"] != plain["test_accuracy"]
    assert cli.main(["train", "--resume", str(run), "--init", str(export)]) == 4


def test_what_a_run_cannot_start_from(tmp_path, job, unbroken_run, capsys):
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    refused = [
        ("--init", str(unbroken_run), "--width", "3", 4, "stem.weight: [2, 3, 3, 3] there, [3, 3,"),
        ("--init", str(unbroken_run), "--model", "cnn", 4, "conv1.weight: missing there"),
        ("--init", str(tmp_path / "other.pt"), 4, "stem.weight: missing there"),
        ("--init", str(tmp_path / "list.pt"), 3, "expected a state dict"),
        ("--init", str(tmp_path / "text.pt"), 3, "not a file of tensors"),
        ("--init", str(tmp_path / "absent"), 3, "there is no such run folder or file"),
        ("--init", str(tmp_path), 3, "no config.toml in it"),
    ]
    for *flags, code, message in refused:
        for extra in ([], ["--dry-run"]):
            assert cli.main(["train", *job, *flags, *extra]) == code, flags
            assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_compare_refuses_what_it_cannot_align(tmp_path, capsys):
    for setting in ("run.patience=2", "run.evaluate_every=2"):
        flags = ["--methods", "fedavg", "--dataset", "digits", "--set", setting]
        assert cli.main(["compare", *flags, "--out", str(tmp_path / "c")]) == 2
        assert "compare needs every round of every run" in capsys.readouterr().err
