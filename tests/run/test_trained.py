"""The public API: train from Python, rebuild the trained model, export it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from safetensors import safe_open

import semanticfl_ref
from semanticfl_ref import cli
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.errors import DataError, MismatchError, UserError
from semanticfl_ref.run.folder import SEAL
from semanticfl_ref.storage import load_tensors


def test_every_public_name_can_be_imported():
    for name in semanticfl_ref.__all__:
        assert getattr(semanticfl_ref, name) is not None
    assert set(semanticfl_ref.__all__) <= set(dir(semanticfl_ref))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        semanticfl_ref.trian  # noqa: B018


def test_importing_the_package_is_instant():
    code = "import semanticfl_ref, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run from Python: its folder, its data, and the lines that the callback saw."""
    threads, lines = torch.get_num_threads(), []
    config = semanticfl_ref.resolve(
        {
            "data.name": "digits",
            "model.width": 2,
            "federation.rounds": 2,
            "federation.local_epochs": 1,
            "run.threads": 1,
            "run.precision": "fp32",
        }
    )
    data = semanticfl_ref.load_data(config, offline=True)
    anchors = semanticfl_ref.build_anchors(config, data, offline=True)
    out = tmp_path_factory.mktemp("api") / "run"
    folder = semanticfl_ref.train(config, out, data=data, anchors=anchors, on_round=lines.append)
    torch.set_num_threads(threads)
    return folder, data, lines


def test_training_from_python_is_the_command_lines(trained, tmp_path):
    folder, _, lines = trained
    given = "--dataset digits --width 2 --rounds 2 --local-epochs 1 --threads 1 --precision fp32"
    assert cli.main(["train", *given.split(), "--out", str(tmp_path / "run")]) == 0
    for name in ("config.toml", "metrics.jsonl", "checkpoint.safetensors"):
        assert (folder.path / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert lines == folder.rounds()
    assert folder.finished
    assert folder.config().federation.rounds == 2


def test_the_model_is_rebuilt_with_its_preprocessing(trained):
    folder, data, _ = trained
    model = semanticfl_ref.load_model(folder.path)
    predicted = model(data.dataset.test_images).argmax(1)
    accuracy = (predicted == data.dataset.test_labels).double().mean().item()
    assert accuracy == folder.summary()["test_accuracy"]
    assert model.class_names == data.dataset.class_names
    assert model.image_size == 32
    assert not model.training


def test_images_of_another_kind_are_refused(trained):
    folder, data, _ = trained
    model, images = semanticfl_ref.load_model(folder.path), data.dataset.test_images[:2]
    for wrong in (images.float(), images.permute(0, 3, 1, 2), images[0]):
        with pytest.raises(ValueError, match=r"expected images uint8 \[N, H, W, 3\], not torch"):
            model(wrong)


def test_exported_tensors_describe_themselves(trained, tmp_path, capsys):
    folder, data, _ = trained
    file = tmp_path / "model.safetensors"
    assert cli.main(["export", str(folder.path), "--out", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    model = semanticfl_ref.load_model(folder.path)
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["semanticfl_ref"])
        for name, tensor in model.network.state_dict().items():
            assert torch.equal(opened.get_tensor(name), tensor), name
    assert about["class_names"] == list(data.dataset.class_names)
    assert about["image_size"] == 32


PROGRAM = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
torch.save([program(images), program(images[:1])], sys.argv[3])
"""


def test_an_exported_program_needs_torch_alone(trained, tmp_path):
    folder, data, _ = trained
    file = semanticfl_ref.export_model(folder.path, tmp_path / "model.pt2")
    images = data.dataset.test_images[:9]
    torch.save(images, tmp_path / "images.pt")
    paths = [str(file), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    code = [sys.executable, "-I", "-c", PROGRAM, *paths]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = semanticfl_ref.load_model(folder.path)(images).detach()
    several, single = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(several, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single, expected[:1], rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob(".*part*"))


def test_anchors_from_elsewhere(trained, tmp_path):
    """They have no cache: their content is part of the run's identity."""
    folder, data, _ = trained
    config = folder.config()
    widths = {"visual": config.anchors.width, "text": 96}
    identities = []
    for number in (0, 1):
        own = Anchors(
            **{name: torch.full((10, width), float(number)) for name, width in widths.items()},
            per="class",
            provenance={"source": "elsewhere"},
        )
        out = tmp_path / str(number)
        run = semanticfl_ref.train(config, out, data=data, anchors=own)
        assert run.finished
        assert run.read("anchors.json")["source"] == "elsewhere"
        identities.append(load_tensors(run.checkpoint)[1]["identity"]["anchors"])
    assert identities[0]["sha256"] != identities[1]["sha256"]


def test_what_cannot_be_exported(trained, tmp_path):
    folder, _, _ = trained
    with pytest.raises(UserError, match=r"\.safetensors or \.pt2"):
        semanticfl_ref.export_model(folder.path, tmp_path / "model.onnx")
    with pytest.raises(DataError, match="no such run folder"):
        semanticfl_ref.load_model(tmp_path / "absent")
    with pytest.raises(DataError, match="choose another --out"):
        semanticfl_ref.export_model(folder.path, tmp_path / "absent" / "model.safetensors")


def test_a_run_of_an_earlier_version(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained[0].path, copy)
    (copy / "summary.json").unlink()  # it seals the others
    partition = json.loads((copy / "partition.json").read_text())
    del partition["image_size"]
    (copy / "partition.json").write_text(json.dumps(partition))
    with pytest.raises(DataError, match="no 'image_size'"):
        semanticfl_ref.load_model(copy)


def test_a_model_of_another_checkpoint_is_refused(trained, tmp_path):
    folder, _, _ = trained
    copy = tmp_path / "run"
    shutil.copytree(folder.path, copy)
    (copy / "summary.json").unlink()  # it seals the others
    text = (copy / "config.toml").read_text().replace("width = 2", "width = 3")
    (copy / "config.toml").write_text(text)
    with pytest.raises(MismatchError, match=r"config\.toml was changed"):
        semanticfl_ref.load_model(copy)
    (copy / "config.toml").write_text(text.partition(SEAL)[0])
    with pytest.raises(MismatchError, match="another model"):
        semanticfl_ref.load_model(copy)
    (copy / "checkpoint.safetensors").write_bytes(b"damaged")
    with pytest.raises(MismatchError, match="damaged"):
        semanticfl_ref.load_model(copy)
    (copy / "checkpoint.safetensors").unlink()
    with pytest.raises(
        DataError, match=r"has no checkpoint\.safetensors: wait for the first round, or"
    ):
        semanticfl_ref.load_model(copy)


def test_the_model_is_rebuilt_with_its_normalisation_and_image_size(tmp_path):
    """The export's test accuracy is the run's."""
    config = semanticfl_ref.resolve(
        {
            "data.name": "digits",
            "data.image_size": 20,
            "model.name": "cnn",
            "model.norm": "group",
            "model.width": 4,
            "federation.method": "fedavg",
            "federation.rounds": 1,
            "federation.local_epochs": 1,
            "run.precision": "fp32",
        }
    )
    data = semanticfl_ref.load_data(config, offline=True)
    run = semanticfl_ref.train(config, tmp_path / "run", data=data, offline=True)
    model = semanticfl_ref.load_model(run.path)
    assert any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())
    right = model(data.dataset.test_images).argmax(1) == data.dataset.test_labels
    assert right.double().mean().item() == run.summary()["test_accuracy"]
