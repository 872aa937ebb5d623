"""A deployment on loopback: a SuperLink and two SuperNodes, each with a folder of images and an
anchors file of its own, give the bits of `train` on all images together."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flower_processes import flwr_run, free_port, started, superlink
from PIL import Image

from semanticfl_ref import cli
from semanticfl_ref.commands.settings_flags import settings_of
from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.data.dataset import load_dataset
from semanticfl_ref.run.setup import load_data
from semanticfl_ref.storage import load_tensors

pytestmark = pytest.mark.heavy

FLAGS = [
    *("--dataset", "image_folder", "--method", "semanticfl", "--sd", "tiny"),
    *("--anchor-images", "heldout:8", "--clients", "2", "--clients-per-round", "2"),
    *("--alpha", "0.5", "--rounds", "2", "--local-epochs", "1", "--width", "2"),
    *("--set", "anchors.width=32", "--threads", "1"),
]


def write_images(folder: Path, images, labels, names) -> None:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(place / f"{number:05d}.png")


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> dict:
    """All images in one folder for the server; each client's in another, with its anchors."""
    root = tmp_path_factory.mktemp("federation")
    digits = load_dataset(DataSettings(name="digits"))
    names = [f"digit {c}" for c in range(digits.classes)]
    for part, count in (("train", 300), ("test", 60)):
        images, labels = (digits.tensors[f"{part}_{kind}"] for kind in ("images", "labels"))
        write_images(root / "server" / part, images[:count], labels[:count], names)
    flags = [*FLAGS, "--data-dir", str(root / "server")]
    config = settings_of(cli.parse(["train", *flags]))
    data = load_data(config)
    for client, own in enumerate(data.partition.indices):
        images, labels = data.dataset.train_images[own], data.dataset.train_labels[own]
        write_images(root / f"client{client}", images, labels, data.dataset.class_names)
        file = root / f"client{client}.safetensors"
        export = ["anchors", "export", *flags, "--client", str(client), "--out", str(file)]
        assert cli.main(export) == 0
    assert cli.main(["train", *flags, "--out", str(root / "train")]) == 0
    return {"root": root, "flags": flags, "data": data}


def node(home: Path, address: str, client: int, root: Path, anchors: int):
    settings = (
        f'partition-id={client} data="{root}/client{client}" '
        f'anchors="{root}/client{anchors}.safetensors"'
    )
    port = str(free_port())
    flags = ["--insecure", "--superlink", address, "--port", port, "--node-config", settings]
    return started(home, "flower-supernode", *flags)


def test_what_the_anchors_cost_a_client(federation):
    beside = json.loads((federation["root"] / "client1.safetensors.json").read_text())
    assert beside["client_reveals_for_it"].startswith(
        "nothing: the anchors were made from separate"
    )
    assert beside["leaves_the_server"].startswith("visual anchors [10, 32], text anchors [10, ")


def test_two_nodes_with_their_own_images(federation, tmp_path):
    root, out = federation["root"], tmp_path / "out"
    with (
        superlink(tmp_path) as address,
        node(tmp_path, address, 0, root, 0),
        node(tmp_path, address, 1, root, 1),
    ):
        log = flwr_run(tmp_path, federation["flags"], out)
    assert (out / "summary.json").exists(), log
    params, expected = (
        load_tensors(folder / "checkpoint.safetensors")[0]["params"]
        for folder in (out, root / "train")
    )
    assert (params == expected).all()
    partition = json.loads((out / "partition.json").read_text())
    assert partition["sizes"] == list(federation["data"].partition.sizes)


def test_the_anchors_of_another_client(federation, tmp_path):
    root, out = federation["root"], tmp_path / "out"
    with (
        superlink(tmp_path) as address,
        node(tmp_path, address, 0, root, 0),
        node(tmp_path, address, 1, root, 0),
    ):
        log = flwr_run(tmp_path, federation["flags"], out)
    assert "client0.safetensors belongs to another run: client: 0 there, 1 here" in log
    assert "export it again for client 1" in log
    assert not out.exists()
