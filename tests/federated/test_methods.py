"""What holds for every method: no strength is FedAvg bit for bit, rounds are pure, state survives a
checkpoint, the command line knows it.
"""

import json
from dataclasses import fields

import pytest
import torch
from documents import blocks
from processes import ROOT, run_cli
from quadratic import play

from semanticfl_ref import cli
from semanticfl_ref.config.settings import methods as method_settings
from semanticfl_ref.config.settings import settings as config
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated import round as story
from semanticfl_ref.federated.context import new_state
from semanticfl_ref.federated.methods import METHODS, add_method
from semanticfl_ref.federated.methods.method import Method
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import load_checkpoint, save_checkpoint

IDLE = {
    "fedprox": {"fedprox__mu": 0.0},
    "scaffold": {"scaffold__control_scale": 0.0},
    "moon": {"moon__mu": 0.0},
    "fedrcl": {"fedrcl__contrast": 0.0, "fedrcl__beta": 0.0},
    "feddisco": {"feddisco__a": 0.0, "feddisco__b": 0.0},
    "fedcda": {"fedcda__memory": 1, "fedcda__warm_up": 0},
    "feddifrc": {"feddifrc__lambda_noise": 0.0, "feddifrc__lambda_text": 0.0},
    "semanticfl": {"semantic__lambda_kd": 0.0, "semantic__lambda_con": 0.0},
}
ACTIVE = {
    "fedcda": {"fedcda__warm_up": 0},
    "fedprox": {"fedprox__mu": 1.0},
    "fedrcl": {"fedrcl__threshold": 0.0},
}
KEEPS = {  # of 3 clients: name -> rows
    "scaffold": {"scaffold.clients": (3, "P"), "scaffold.server": ("P",)},
    "moon": {"moon.last": (3, "P")},
    "fedcda": {
        "fedcda.rows": (3, 3, "P"),
        "fedcda.losses": (3, 3),
        "fedcda.valid": (3,),
        "fedcda.chosen": (3,),
    },
}
STATEFUL = [("scaffold", "none"), ("moon", "fedavgm"), ("fedcda", "fedadam")]


def test_one_list_of_names():
    assert list(METHODS) == config.METHODS and set(IDLE) == set(METHODS) - {"fedavg"}


@pytest.fixture
def fedavg(small_context):
    """FedAvg's row after three rounds."""
    return play(small_context(federation__method="fedavg"), 3)[0].row


@pytest.mark.parametrize("name", IDLE)
def test_zero_strength_is_fedavg_bit_for_bit(small_context, fedavg, name):
    """Over the entries both have: heads come last in a row. And not because the method does
    nothing: at its strength it differs.
    """
    idle, lines = play(small_context(federation__method=name, **IDLE[name]), 3)
    assert torch.equal(idle.row[: len(fedavg)], fedavg)
    assert idle.memory == {} and set(lines[0]["terms"]) == {"cross_entropy"}, (
        "nothing is kept or computed for nothing"
    )
    active, _ = play(small_context(federation__method=name, **ACTIVE.get(name, {})), 3)
    assert not torch.equal(active.row[: len(fedavg)], fedavg)


@pytest.mark.parametrize(
    ("name", "settings"), [("scaffold", {}), ("moon", {}), ("fedcda", {"fedcda__warm_up": 1})]
)
def test_the_first_round_is_fedavg(small_context, name, settings):
    """Controls are zero; the model received is the last one, so that the contrast's gradient
    cancels, within rounding; warm-up.
    """
    plain, _ = play(small_context(federation__method="fedavg"), 1)
    first, _ = play(small_context(federation__method=name, **settings), 1)
    torch.testing.assert_close(
        first.row[: len(plain.row)], plain.row, rtol=0, atol=1e-6 if name == "moon" else 0
    )


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_allocated_where_it_is_needed(small_context, name):
    context = small_context(federation__method=name)
    shapes = {
        key: tuple(context.layout.entries if n == "P" else n for n in shape)
        for key, shape in KEEPS.get(name, {}).items()
    }
    assert {key: tuple(rows.shape) for key, rows in new_state(context).memory.items()} == shapes


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_a_round_leaves_the_state_before_it_whole(small_context, name, server):
    """So that an interrupted round can be played again: twice from one state, the same comes out."""
    context = small_context(
        federation__method=name, federation__server_optimizer=server, **ACTIVE.get(name, {})
    )
    state, _ = play(context, 2)
    before = {key: rows.clone() for key, rows in state.memory.items()}
    (one, line), (two, again) = run_round(state, context), run_round(state, context)
    assert torch.equal(one.row, two.row) and line == again
    assert all(torch.equal(state.memory[key], rows) for key, rows in before.items())
    assert all(torch.equal(one.memory[key], two.memory[key]) for key in before)


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_what_is_kept_survives_a_checkpoint(small_context, tmp_path, name, server):
    context = small_context(federation__method=name, federation__server_optimizer=server)
    state, _ = play(context, 1)
    save_checkpoint(tmp_path / "c", state, {})
    loaded = load_checkpoint(tmp_path / "c", {})
    assert set(loaded.memory) == set(state.memory) and all(
        torch.equal(loaded.memory[key], rows) for key, rows in state.memory.items()
    )
    assert torch.equal(run_round(loaded, context)[0].row, run_round(state, context)[0].row)


def test_a_dropped_client_is_not_remembered(small_context, monkeypatch):
    honest = story.train_client

    def train(update):
        report = honest(update)
        report.loss = report.loss * (float("nan") if update.client == 2 else 1)
        return report

    monkeypatch.setattr(story, "train_client", train)
    state, lines = play(
        small_context(
            federation__method="scaffold",
            federation__clients_per_round=3,
            federation__non_finite="drop",
        ),
        1,
    )
    controls = state.memory["scaffold.clients"]
    assert lines[0]["dropped"] == [2] and not controls[2].any() and controls[:2].any(1).all()
    torch.testing.assert_close(state.memory["scaffold.server"], controls.sum(0) / 3)


def test_scaffold_corrects_no_running_average(small_context):
    context = small_context(federation__method="scaffold")
    state, lines = play(context, 1)
    assert not state.memory["scaffold.clients"][:, context.layout.buffers].any()
    parameters = sum(p.numel() for p in context.model.parameters())
    assert lines[0]["bytes_up"] == 2 * 4 * (context.layout.entries + parameters), (
        "two clients' models and controls"
    )


def test_levels_change_no_bit(small_context):
    model, images = (
        small_context().model.eval(),
        torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    logits, features = model(images)
    again, same, levels = model.forward_with_levels(images)
    assert torch.equal(logits, again) and torch.equal(features, same)
    assert [level.shape[1] for level in levels] == [2, 2, 4, 8, 16]
    assert (levels[-1] < features).any() and (levels[-1] <= features + 1e-6).all(), (
        "before the ReLU, which only adds"
    )


def test_every_setting_says_where_its_default_is_from():
    sections = [
        getattr(method_settings, name)
        for name in (
            "FedProx",
            "Scaffold",
            "Moon",
            "FedRCL",
            "FedDisco",
            "FedCDA",
            "FedDifRC",
            "Server",
        )
    ]
    assert all(
        field.metadata["source"] and field.metadata["help"]
        for section in sections
        for field in fields(section)
    )


def test_a_methods_own_defaults_yield_to_what_is_written():
    """FedDifRC's keys come from the U-Net unless asked otherwise; other methods' from the text
    encoder.
    """
    texts = [
        config.build(given).anchors.text
        for given in (
            {"federation.method": "feddifrc"},
            {"federation.method": "feddifrc", "anchors.text": "clip"},
            {},
        )
    ]
    assert texts == ["unet", "clip", "clip"]


def cli_job(name, *more):
    return [
        "train",
        "--method",
        name,
        "--set",
        "model.width=2",
        "--set",
        "run.threads=1",
        "--clients",
        "3",
        "--clients-per-round",
        "2",
        "--local-epochs",
        "1",
        *more,
    ]


@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_from_the_command_line(job, tmp_path, capsys, name):
    """On the embedded digit scenes, as `train --method NAME` does; past FedCDA's warm-up."""
    run = tmp_path / "run"
    assert (
        cli.main(
            cli_job(name, "--rounds", "2", "--set", "fedcda.warm_up=1", "--out", str(run), "--json")
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        summary["method"] == name
        and [line["round"] for line in lines] == [1, 2]
        and summary["loss"] > 0
    )
    terms = {
        "fedprox": {"proximal"},
        "moon": {"model_contrast"},
        "fedrcl": {"supervised_contrast", "divergence_penalty"},
        "feddifrc": {"noise_consistency", "text_contrast"},
        "semanticfl": {"consistency", "contrast"},
    }.get(name, set())
    assert all(set(line["terms"]) == {"cross_entropy", *terms} for line in lines)


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_resumed_bit_for_bit(job, tmp_path, monkeypatch, capsys, name, server):
    """Ctrl-C in the third round, then --resume: the same checkpoint and metrics as without a break."""
    from semanticfl_ref.run import train

    real = train.run_round
    arguments = cli_job(
        name,
        "--dataset",
        "digits",
        "--rounds",
        "4",
        "--set",
        f"federation.server_optimizer={server}",
        "--set",
        "fedcda.warm_up=1",
    )

    def interrupting(state, context):
        if state.round == 2:
            raise KeyboardInterrupt
        return real(state, context)

    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train, "run_round", interrupting)
    assert cli.main([*arguments, "--out", str(tmp_path / "broken")]) == 130
    monkeypatch.setattr(train, "run_round", real)
    assert cli.main(["train", "--resume", str(tmp_path / "broken")]) == 0
    for file in ("checkpoint.safetensors", "metrics.jsonl"):
        assert (tmp_path / "broken" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes(), file


def test_a_tenth_method_is_one_file(tmp_path):
    """CONTRIBUTING's example: the package stays as it is; the method has its settings, its flag,
    its term in the metrics, and a run that resumes.
    """
    (tmp_path / "fedhalf.py").write_text(
        dict(block for block in blocks(ROOT / "CONTRIBUTING.md") if isinstance(block, tuple))[
            "fedhalf.py"
        ]
    )
    ours, run = ["--import", str(tmp_path / "fedhalf.py")], str(tmp_path / "run")
    done = run_cli(
        *cli_job(
            "fedhalf",
            *ours,
            "--dataset",
            "digits",
            "--rounds",
            "1",
            "--set",
            "fedhalf.nu=2",
            "--out",
            run,
        )
    )
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (
        line["terms"]["distance"] > 0
        and "[fedhalf]\nnu = 2.0" in (tmp_path / "run" / "config.toml").read_text()
    )
    again = run_cli("train", *ours, "--resume", run)
    assert again.returncode == 0 and "finished" in again.stderr


@pytest.mark.parametrize(
    "text, code, words",
    [
        (None, 3, "no such file"),
        ("1 / 0", 2, "ZeroDivisionError"),
        (
            "from semanticfl_ref.federated.methods import *\nadd_method('fedavg', METHODS['moon'])",
            2,
            "take another",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, capsys, text, code, words):
    if text is not None:
        (tmp_path / "method.py").write_text(text)
    assert (
        cli.main(["train", "--import", str(tmp_path / "method.py"), "--method", "fedhalf"]) == code
    )
    assert words in capsys.readouterr().err


def test_a_taken_name_is_refused():
    with pytest.raises(UserError, match="'fedavg'.*take another"):
        add_method("fedavg", Method())
