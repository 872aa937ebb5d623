"""What holds for every method: zero strength is FedAvg bitwise, rounds are pure, state survives a
checkpoint, the command line knows it."""

import json
from dataclasses import dataclass, fields

import pytest
import torch
from processes import run_cli
from quadratic import run_rounds

from semanticfl_ref import cli
from semanticfl_ref.config.registry import METHODS, register_method
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.config.schema import Section, option
from semanticfl_ref.config.settings import ServerSettings, setting_fields
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.methods.method import Method
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state, load_checkpoint, save_checkpoint
from semanticfl_ref.run import train as train_module

IDLE = {
    "fedprox": {"fedprox__mu": 0.0},
    "scaffold": {"scaffold__control_scale": 0.0},
    "moon": {"moon__mu": 0.0},
    "fedrcl": {"fedrcl__contrast": 0.0, "fedrcl__beta": 0.0},
    "feddisco": {"feddisco__a": 0.0, "feddisco__b": 0.0},
    "fedcda": {"fedcda__memory": 1, "fedcda__warm_up": 0},
    "feddifrc": {"feddifrc__lambda_noise": 0.0, "feddifrc__lambda_text": 0.0},
    "semanticfl": {"semanticfl__lambda_kd": 0.0, "semanticfl__lambda_con": 0.0},
}
ACTIVE = {
    "fedcda": {"fedcda__warm_up": 0},
    "fedprox": {"fedprox__mu": 1.0},
    "fedrcl": {"fedrcl__threshold": 0.0},
}
STATE_SHAPES = {  # with 3 clients
    "scaffold": {"scaffold.clients": (3, "P"), "scaffold.server": ("P",)},
    "moon": {"moon.previous": (3, "P")},
    "fedcda": {
        "fedcda.models": (3, 3, "P"),
        "fedcda.losses": (3, 3),
        "fedcda.valid": (3,),
        "fedcda.selected": (3,),
    },
}
STATEFUL = [("scaffold", "none"), ("moon", "fedavgm"), ("fedcda", "fedadam")]
TERMS = {
    "fedprox": {"proximal"},
    "moon": {"model_contrast"},
    "fedrcl": {"supervised_contrast", "divergence_penalty"},
    "feddifrc": {"noise_consistency", "text_contrast"},
    "semanticfl": {"consistency", "contrast"},
}


def test_every_method_is_tested():
    assert set(IDLE) == set(METHODS) - {"fedavg"}
    assert all(isinstance(METHODS[name], Method) for name in METHODS)


@pytest.fixture
def fedavg(small_context):
    """FedAvg's parameters after three rounds."""
    return run_rounds(small_context(federation__method="fedavg"), 3)[0].params


@pytest.mark.parametrize("name", IDLE)
def test_zero_strength_is_fedavg_bitwise(small_context, fedavg, name):
    """Over the entries that both have: heads come last. And not because the method does nothing: at
    its usual strength it differs."""
    idle, lines = run_rounds(small_context(federation__method=name, **IDLE[name]), 3)
    assert torch.equal(idle.params[: len(fedavg)], fedavg)
    assert idle.method_state == {}, "nothing is kept for nothing"
    assert set(lines[0]["terms"]) == {"cross_entropy"}, "nothing is computed for nothing"
    active, _ = run_rounds(small_context(federation__method=name, **ACTIVE.get(name, {})), 3)
    assert not torch.equal(active.params[: len(fedavg)], fedavg)


@pytest.mark.parametrize(
    ("name", "settings"), [("scaffold", {}), ("moon", {}), ("fedcda", {"fedcda__warm_up": 1})]
)
def test_the_first_round_is_fedavg(small_context, name, settings):
    """Control variates are zero; the model received is the previous one, so that the contrast's
    gradient cancels within rounding; warm-up."""
    plain, _ = run_rounds(small_context(federation__method="fedavg"), 1)
    first, _ = run_rounds(small_context(federation__method=name, **settings), 1)
    tolerance = 1e-6 if name == "moon" else 0
    torch.testing.assert_close(
        first.params[: len(plain.params)], plain.params, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("name", METHODS)
def test_state_is_allocated_where_it_is_needed(small_context, name):
    context = small_context(federation__method=name)
    expected = {
        key: tuple(context.layout.size if n == "P" else n for n in shape)
        for key, shape in STATE_SHAPES.get(name, {}).items()
    }
    state = initial_state(context).method_state
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_a_round_leaves_the_state_before_it_intact(small_context, name, server):
    """So an interrupted round can run again: twice from one state gives the same."""
    context = small_context(
        federation__method=name, federation__server_optimizer=server, **ACTIVE.get(name, {})
    )
    state, _ = run_rounds(context, 2)
    before = {key: value.clone() for key, value in state.method_state.items()}
    one, line = run_round(state, context)
    two, again = run_round(state, context)
    assert torch.equal(one.params, two.params)
    assert line == again
    for key, value in before.items():
        assert torch.equal(state.method_state[key], value), key
        assert torch.equal(one.method_state[key], two.method_state[key]), key


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_state_survives_a_checkpoint(small_context, tmp_path, name, server):
    context = small_context(federation__method=name, federation__server_optimizer=server)
    state, _ = run_rounds(context, 1)
    save_checkpoint(tmp_path / "c", state, {})
    loaded = load_checkpoint(tmp_path / "c", {})
    assert set(loaded.method_state) == set(state.method_state)
    for key, value in state.method_state.items():
        assert torch.equal(loaded.method_state[key], value), key
    resumed, continued = run_round(loaded, context)[0], run_round(state, context)[0]
    assert torch.equal(resumed.params, continued.params)


def test_a_dropped_client_changes_no_state(small_context, tamper):
    def diverge(update, replica, report):
        report.loss = report.loss * (float("nan") if update.client == 2 else 1)

    tamper(diverge)
    context = small_context(
        federation__method="scaffold",
        federation__clients_per_round=3,
        federation__non_finite="drop",
    )
    state, lines = run_rounds(context, 1)
    controls = state.method_state["scaffold.clients"]
    assert lines[0]["dropped"] == [2]
    assert not controls[2].any()
    assert controls[:2].any(1).all()
    torch.testing.assert_close(state.method_state["scaffold.server"], controls.sum(0) / 3)


def test_scaffold_corrects_no_running_statistics(small_context):
    context = small_context(federation__method="scaffold")
    state, lines = run_rounds(context, 1)
    assert not state.method_state["scaffold.clients"][:, context.layout.buffers].any()
    parameters = sum(p.numel() for p in context.model.parameters())
    assert lines[0]["bytes_up"] == 2 * 4 * (context.layout.size + parameters), (
        "two clients' models and control variates"
    )


def test_every_setting_of_a_method_names_its_source():
    sections = [entry.settings for entry in METHODS.entries.values() if entry.settings]
    # visual_head and the like are our own reading, which is a source too.
    for section in [*sections, ServerSettings]:
        for field in fields(section):
            assert field.metadata["source"], f"{section.__name__}.{field.name}"
            assert field.metadata["help"], f"{section.__name__}.{field.name}"


def test_a_methods_preset_yields_to_what_is_given():
    """FedDifRC's keys come from the U-Net unless asked otherwise; other methods' from the text
    encoder."""

    def text_anchors(**given):
        return resolve({name.replace("__", "."): v for name, v in given.items()}).anchors.text

    assert text_anchors(federation__method="feddifrc") == "unet"
    assert text_anchors(federation__method="feddifrc", anchors__text="clip") == "clip"
    assert text_anchors() == "clip"


def cli_job(name, *more):
    """A small training of a method with the command line."""
    fixed = "--clients 3 --clients-per-round 2 --local-epochs 1 --width 2 --threads 1"
    return ["train", "--method", name, *fixed.split(), *more]


@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_from_the_command_line(job, tmp_path, capsys, name):
    """On the embedded digit scenes, as `train --method NAME` does; past FedCDA's warm-up."""
    run = tmp_path / "run"
    more = ["--rounds", "2", "--set", "fedcda.warm_up=1", "--out", str(run), "--json"]
    assert cli.main(cli_job(name, *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert summary["method"] == name
    assert [line["round"] for line in lines] == [1, 2]
    assert summary["loss"] > 0
    for line in lines:
        assert set(line["terms"]) == {"cross_entropy"} | TERMS.get(name, set())


@pytest.mark.parametrize(("name", "server"), STATEFUL)
def test_resumed_bitwise(job, tmp_path, monkeypatch, capsys, name, server):
    """Ctrl-C in the third round, then --resume: the same checkpoint and metrics as without."""
    real = train_module.run_round
    more = ["--dataset", "digits", "--rounds", "4", "--set", "fedcda.warm_up=1"]
    arguments = cli_job(name, *more, "--set", f"federation.server_optimizer={server}")

    def interrupting(state, context):
        if state.round == 2:
            raise KeyboardInterrupt
        return real(state, context)

    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train_module, "run_round", interrupting)
    assert cli.main([*arguments, "--out", str(tmp_path / "broken")]) == 130
    monkeypatch.setattr(train_module, "run_round", real)
    assert cli.main(["train", "--resume", str(tmp_path / "broken")]) == 0
    for file in ("checkpoint.safetensors", "metrics.jsonl"):
        resumed, whole = (tmp_path / run / file for run in ("broken", "whole"))
        assert resumed.read_bytes() == whole.read_bytes(), file


OUTSIDE = '''
"""FedHalf, registered from outside the package."""

from dataclasses import dataclass

from semanticfl_ref import Method, Section, option, register_method
from semanticfl_ref.federated.methods.fedprox import proximal


@dataclass(frozen=True, kw_only=True)
class FedHalfSettings(Section):
    nu: float = option(0.5, "weight of the distance", low=0.0)


def distance(batch):
    return {"distance": (batch.settings.nu, proximal(batch.parameters))}


register_method("fedhalf", Method(local_terms=distance), FedHalfSettings)
'''


def test_a_tenth_method_is_one_file(tmp_path):
    """The package stays as it is; the method has its settings, its flag, its term in the metrics,
    and a run that resumes."""
    (tmp_path / "fedhalf.py").write_text(OUTSIDE)
    imported, run = ["--import", str(tmp_path / "fedhalf.py")], str(tmp_path / "run")
    more = ["--dataset", "digits", "--rounds", "1", "--set", "fedhalf.nu=2", "--out", run]
    done = run_cli(*cli_job("fedhalf", *imported, *more))
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["terms"]["distance"] > 0
    assert "[fedhalf]\nnu = 2.0" in (tmp_path / "run" / "config.toml").read_text()
    again = run_cli("train", *imported, "--resume", run)
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stderr
    without = run_cli("train", "--resume", run)
    assert without.returncode == 3
    assert "--import" in without.stderr


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 3, "no such file"),
        ("1 / 0", 2, "ZeroDivisionError"),
        (
            "from semanticfl_ref import Method, register_method\n"
            "register_method('fedavg', Method())",
            2,
            "already registered",
        ),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, capsys, text, code, message):
    if text is not None:
        (tmp_path / "method.py").write_text(text)
    arguments = ["train", "--import", str(tmp_path / "method.py"), "--method", "fedhalf"]
    assert cli.main(arguments) == code
    assert message in capsys.readouterr().err


def test_a_taken_name_is_refused():
    with pytest.raises(UserError, match="'fedavg' is already registered"):
        register_method("fedavg", Method())


def test_a_registered_method_is_known_everywhere(monkeypatch):
    """Its settings are part of every configuration; nothing else changes."""

    @dataclass(frozen=True, kw_only=True)
    class FedNewSettings(Section):
        rho: float = option(1.0, "strength", low=0.0)

    before = resolve()
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    register_method("fednew", Method(), FedNewSettings, preset={"model.width": 3})
    config = resolve({"federation.method": "fednew", "fednew.rho": "2"})
    assert config.method.rho == 2.0
    assert config.model.width == 3
    assert "fednew.rho" in setting_fields()
    assert "fednew" not in before.methods
    with pytest.raises(UserError, match=r"fednew\.rho = -1\.0: must be at least 0"):
        resolve({"fednew.rho": "-1"})
