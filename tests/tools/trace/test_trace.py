"""A round watched on the embedded default: it is the real one, in order, and follows the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from renaming import PREFIX, with_renamed_locals
from rounds import made, parsed, steps_of, watched

from semanticfl_ref.diffusion.feature_cache import open_cache
from semanticfl_ref.federated.context import make_context
from semanticfl_ref.federated.round import run_round
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.setup import anchor_images, build_anchors, cache_plans, load_data
from semanticfl_ref.tools.trace import trace
from semanticfl_ref.tools.trace.text import blocks
from semanticfl_ref.tools.trace.values import describe

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "semanticfl_ref"
STORY = (PACKAGE / "federated" / "round.py").read_text(encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """A copy of the package."""
    for folder in ("semanticfl_ref", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    return tmp_path


def traced_in(copy: Path) -> dict:
    """The document of `trace` in a copy of the package."""
    done = subprocess.run(
        [sys.executable, "-m", "semanticfl_ref", "trace", "--json", "--offline"],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def test_all_four_turns_in_order_as_the_source_numbers_them(default):
    turns = default.document["turns"]
    titles = [(int(n), title) for n, title in re.findall(r"^ +# (\d)\. (.*)$", STORY, re.MULTILINE)]
    assert [(turn["number"], turn["title"]) for turn in turns] == titles
    assert [turn["number"] for turn in turns] == [1, 2, 3, 4]
    own = [
        [step["line"] for step in turn["steps"] if step["function"] == "run_round"]
        for turn in turns
    ]
    lines = [line for part in own for line in part]
    assert all(own)
    assert lines == sorted(lines), "the round's own statements, from its first line to its last"
    inside = [{step["function"] for step in turn["steps"]} for turn in turns]
    assert "by_sample_count" in inside[0]
    assert {"train_client", "objective", "semantic_terms", "contrast"} <= inside[1]
    assert {"Drift.add", "server_step"} <= inside[2]
    assert "Drift.summary" in inside[3]
    before = {step["function"] for step in default.document["before"]}
    assert {"Backbone.features", "build_anchors", "make_anchors", "pca"} <= before


def test_every_statement_stands_where_it_says(default):
    for step in default.document["before"] + steps_of(default.document):
        lines = (PACKAGE / step["file"]).read_text(encoding="utf-8").splitlines()
        source = step["source"].splitlines()
        found = lines[step["line"] - 1 : step["line"] - 1 + len(source)]
        assert [line.strip() for line in found] == [line.strip() for line in source]


def test_a_loop_shows_its_first_iteration_and_counts_the_rest(default):
    loops = {step["source"]: step for step in steps_of(default.document)}
    shown = blocks(default.document, everything=True)

    def last_line(loop: dict) -> str:
        """What the terminal says last of it; the page says the same."""
        (block,) = [text for text in shown if f"{loop['file']}:{loop['line']}\n" in text]
        return block.splitlines()[-1].strip()

    loop = loops["for s in finite_S.nonzero().flatten().tolist():"]
    assert loop["iterations"] == 2
    assert [value["value"] for value in loop["values"]] == [0]
    assert last_line(loop) == "... and 1 more in this call"
    loop = loops["for epoch in range(settings.local_epochs):"]
    assert loop["iterations"] == 1 and loop["values"][0]["value"] == 0
    assert last_line(loop).split() == ["epoch", "0"]
    loop = loops["for parameter, correction in replica.corrections:"]
    assert (loop["iterations"], loop["values"]) == (0, [])
    assert last_line(loop) == "not entered"
    page = default.page.read_text(encoding="utf-8")
    for words in ("not entered", "... and 1 more in this call"):
        assert page.count(f"<span>{words}</span>") == sum(words in block for block in shown) > 0
    sources = [step["source"] for step in steps_of(default.document)]
    assert sources.count("replica.optimizer.step()") == 1


def test_equations_stand_beside_the_statements_that_call_for_them(default):
    steps = default.document["before"] + steps_of(default.document)
    tags = [tag for step in steps for tag in step["equations"]]
    assert len(set(tags)) == len(tags), "once each"
    beside = {tag: step["source"] for step in steps for tag in step["equations"]}
    assert beside["local-step"].startswith("return local_step(update, self,")
    assert "objective(" in beside["objective"] and "consistency(" in beside["consistency"]
    assert beside["info-nce"] == "return info_nce(features_BD, text_CD, labels_B, tau)"
    assert "weighted_average(params_SP" in beside["weighted-average"]
    assert "server_step(" in beside["server-step"]
    assert "self.pass_once(" in beside["noised-latent"]
    assert beside["visual-anchor"].startswith("anchors = make_anchors(")
    assert set(beside) == set(default.document["equations"])


@pytest.mark.parametrize(
    "method", ["semanticfl", "feddifrc", "fedprox", "moon", "fedrcl", "fedavg"]
)
def test_the_weighted_terms_sum_to_the_loss(method):
    """And the weights are the settings'; in the first round MOON's contrast of equal models is
    log 2 and FedProx' distance zero.
    """
    config, seen = watched(method)
    terms, own = {term["name"]: term for term in seen.document["terms"]}, config.method
    weights = {
        "semanticfl": lambda: {"consistency": own.lambda_kd, "contrast": own.lambda_con},
        "feddifrc": lambda: {
            "noise_consistency": own.lambda_noise,
            "text_contrast": own.lambda_text,
        },
        "fedprox": lambda: {"proximal": own.mu},
        "moon": lambda: {"model_contrast": own.mu},
        "fedrcl": lambda: {
            "supervised_contrast": own.contrast,
            "divergence_penalty": own.beta,
        },
        "fedavg": lambda: {},
    }[method]()
    found = {name: term["weight"] for name, term in terms.items()}
    assert found == {"cross_entropy": 1.0, **weights}
    total = sum(term["weight"] * term["value"] for term in terms.values())
    assert seen.document["loss"] == pytest.approx(total, rel=1e-6)
    assert terms["cross_entropy"]["gradient_norm"] > 0
    assert sum(term.get("gradient_share", 0) for term in terms.values()) == pytest.approx(1)
    assert ("gradient_norm" in terms.get("proximal", {})) is False, "not a function of the features"
    expected = {"moon": ("model_contrast", 0.6931472), "fedprox": ("proximal", 0.0)}.get(method)
    assert expected is None or terms[expected[0]]["value"] == pytest.approx(expected[1], abs=1e-6)


def test_watching_changes_nothing_and_communication_is_that_of_the_metrics():
    config, seen = watched("semanticfl", round=2)
    document, data = seen.document, load_data(config, offline=True)
    anchors = build_anchors(config, data, offline=True)
    again = make_context(config, data.dataset, seen.context.partition, anchors)
    first, _ = run_round(initial_state(again), again)
    second, line = run_round(first, again)
    assert document["metrics"] == line and sys.gettrace() is None
    before, average, after = document["parameters"]
    assert [before, after] == describe({"before": first.params, "after": second.params})
    assert average == {**after, "name": "average"}, "server_optimizer = none"
    sent = document["communication"]
    assert (sent["down"], sent["up"]) == (line["bytes_down"], line["bytes_up"])
    assert sent["anchors"] == 0, "the anchors went out in round one"
    assert [client["client"] for client in document["clients"]] == line["clients"]
    loss = sum(client["loss"] for client in document["clients"]) / len(document["clients"])
    assert loss == pytest.approx(line["loss"], rel=1e-6)


def test_the_average_is_what_the_server_optimizer_receives():
    _, seen = watched("fedavg", **{"federation.server_optimizer": "fedavgm"})
    before, average, after = seen.document["parameters"]
    change = seen.document["metrics"]["drift"]["mean_update_norm"]
    assert average["name"] == "average" and average["norm"] != before["norm"] and change > 0
    _, seen = watched("fedavg", **{"federation.aggregation": "median"})
    _, average, after = seen.document["parameters"]
    assert average == {**after, "name": "average"}, "the median, not the mean"


def test_anchors_cross_the_network_in_the_first_round(default):
    sent = default.document["communication"]
    assert sent["anchors"] == 2 * 4 * (8 * 96 + 10 * 64)
    (parameters,) = default.document["parameters"][0]["shape"]
    assert sent["down"] - sent["anchors"] == sent["up"] == 2 * 4 * parameters


def test_the_state_of_a_method_is_seen_in_the_second_round():
    for round, still in ((1, True), (2, False)):
        _, seen = watched("scaffold", round)
        norm = made(seen.document, "Replica.receive", "correction_P")["norm"]
        assert (norm == 0) is still
    _, seen = watched("moon", 2)
    names = {
        value["name"].split("'")[1]
        for step in steps_of(seen.document)
        if step["source"].startswith("references =")
        for value in step["values"]
    }
    assert names == {"received", "previous"}


def test_the_diffusion_pass_is_the_one_that_made_the_features(default):
    """Also where the features come from the cache; the anchor is a map of what is pooled."""
    config, seen = watched("semanticfl")
    stages, data = seen.stages, load_data(config, offline=True)
    timestep = config.diffusion.timestep
    noised = f"noised latent, t = {timestep}"
    names = ["image", "VAE latent", noised, "U-Net mid", "pooled mid", "anchor"]
    assert list(stages) == names
    assert [stage["name"] for stage in default.document["diffusion_pass"]] == names
    images = data.dataset.train_images[seen.shown_B]
    assert torch.equal(stages["image"], images) and len(images) == 4
    features = open_cache(cache_plans(config, anchor_images(config, data))["visual"])
    cached = torch.cat(list(features.chunks("mid")))[seen.shown_B].float()
    torch.testing.assert_close(stages["pooled mid"], cached, rtol=2e-3, atol=2e-3)
    pooled = stages["U-Net mid"].mean((2, 3))
    torch.testing.assert_close(stages["pooled mid"], pooled, rtol=1e-5, atol=1e-5)
    assert stages["VAE latent"].shape == stages[noised].shape
    assert not torch.equal(stages["VAE latent"], stages[noised])
    assert torch.equal(stages["anchor"], seen.context.anchors.visual[seen.shown_B])
    inside = [step for step in seen.document["before"] if step["file"] == "diffusion/backbone.py"]
    sources = " ".join(step["source"] for step in inside)
    calls = ("self.vae.encode(", "self.scheduler.add_noise(", "self._hooks(", "self.unet(")
    places = [sources.index(call) for call in (*calls, "return found")]
    assert places == sorted(places)


def test_captions_that_leak_the_label_are_those_of_the_pass():
    config, seen = watched("semanticfl", **{"diffusion.condition": "own-class"})
    plan = cache_plans(config, anchor_images(config, load_data(config, offline=True)))["visual"]
    cached = torch.cat(list(open_cache(plan).chunks("mid")))[seen.shown_B].float()
    torch.testing.assert_close(seen.stages["pooled mid"], cached, rtol=2e-3, atol=2e-3)
    tags = [tag for step in seen.document["before"] for tag in step["equations"]]
    assert sorted(tags) == ["noised-latent", "pca", "visual-anchor"], "also after an extraction"


@pytest.mark.heavy
def test_it_follows_the_code(default, copy):
    """A line is put above a loss and above the first turn; a statement and a turn are reworded."""
    edits = {
        "losses.py": [
            ('    if kind == "cosine":', '    # moved\n    if kind == "cosine":'),
            (", dim=1)).mean()", ", dim=1)).mean(dim=0)"),
        ],
        "round.py": [("    # 1. Server: sample", "\n    # 1. Server: draw")],
    }
    for name, changes in edits.items():
        path = copy / "semanticfl_ref" / "federated" / name
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    moved = traced_in(copy)
    lines = [
        {(Path(step["file"]).name, step["source"]): step["line"] for step in steps_of(document)}
        for document in (default.document, moved)
    ]
    condition = ("losses.py", 'if kind == "cosine":')
    sampling = next(key for key in lines[0] if key[1].startswith("order_M ="))
    for statement in (condition, sampling):
        assert lines[1][statement] == lines[0][statement] + 1
    assert any("mean(dim=0)" in source for _, source in lines[1])
    assert moved["turns"][0]["title"].startswith("Server: draw")
    assert moved["loss"] == pytest.approx(default.document["loss"], rel=1e-5)


@pytest.mark.heavy
def test_it_does_not_depend_on_the_names_of_local_variables(default, copy):
    """In a copy in which all are renamed, the document is the same but for the names shown."""
    files = [*trace.FILES, "diffusion/backbone.py", "federated/methods/semanticfl.py"]
    renamed = {}
    for file in files:
        path = copy / "semanticfl_ref" / file
        text = path.read_text(encoding="utf-8")
        whole = file in ("federated/client.py", "federated/round.py")
        renamed[file] = with_renamed_locals(text, parameters=whole)
        assert len(renamed[file].splitlines()) == len(text.splitlines())
        path.write_text(renamed[file], encoding="utf-8")
    for name in ("update", "loss", "terms", "model", "index_B", "params_P", "average"):
        assert PREFIX + name in renamed["federated/client.py"] + renamed["federated/round.py"]
    text = json.dumps(traced_in(copy))
    assert text.count(PREFIX) > 500
    assert json.loads(text.replace(PREFIX, "")) == default.document


def test_values_that_are_no_numbers_are_words_in_json():
    nan, empty = describe({"x": torch.tensor([1.0, float("nan")]), "y": torch.empty(0, 3)})
    assert (nan["mean"], nan["first"]) == ("nan", [1.0, "nan"])
    assert empty == {
        "name": "y",
        "shape": [0, 3],
        "dtype": "float32",
        "first": [],
        "text": "float32 [0, 3]  ",
    }
    json.dumps([nan, empty], allow_nan=False)
