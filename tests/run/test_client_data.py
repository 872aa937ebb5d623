"""A client with its own folder of images and its anchors file trains as the simulated one does."""

import json

import pytest
import torch
from PIL import Image

from semanticfl_ref import cli
from semanticfl_ref.config.resolve import resolve
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.federated.round import received
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.client_data import (
    OwnData,
    client_context,
    export_anchors,
    introduction,
    with_clients,
)
from semanticfl_ref.run.train import prepare

SETTINGS = {
    "data.name": "digits",
    "federation.method": "semanticfl",
    "federation.local_epochs": 1,
    "federation.clients_per_round": 2,
    "partition.clients": 2,
    "model.width": 2,
    "anchors.width": 32,
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def config():
    return resolve(SETTINGS)


@pytest.fixture(scope="module")
def server(config):
    return prepare(config, offline=True)


@pytest.fixture(scope="module")
def own(config, server, tmp_path_factory):
    """A function: client -> what it has itself."""
    root = tmp_path_factory.mktemp("clients")
    for client, indices in enumerate(server.partition.indices):
        export_anchors(config, client, root / f"{client}.safetensors", offline=True)
        for i in indices.tolist():
            name = server.dataset.class_names[server.dataset.train_labels[i]]
            place = root / str(client) / name
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(server.dataset.train_images[i].numpy())
            image.save(place / f"{i:05d}.png")

    def make(client, **changed):
        data = OwnData(
            client=client,
            folder=str(root / str(client)),
            anchors=str(root / f"{client}.safetensors"),
            class_names=server.dataset.class_names,
            image_size=server.dataset.image_size,
        )
        return data._replace(**changed)

    return make


def in_order_of_folders(run, client):
    """The client's images, by the names of their classes."""
    indices, names = run.partition.indices[client].tolist(), run.dataset.class_names
    ordered = sorted(indices, key=lambda i: (names[run.dataset.train_labels[i]], i))
    return torch.tensor(ordered)


def test_each_image_finds_its_anchor(config, server, own):
    """Whatever the order of the files."""
    alone, order = client_context(config, own(1)), in_order_of_folders(server, 1)
    assert torch.equal(alone.dataset.train_images, server.dataset.train_images[order])
    assert torch.equal(alone.dataset.train_labels, server.dataset.train_labels[order])
    assert torch.equal(alone.anchors.visual, server.anchors.visual[order])
    assert torch.equal(alone.anchors.text, server.anchors.text)


def test_a_local_update_has_the_bits_of_the_simulated_client(config, own):
    run, alone = prepare(config, offline=True), client_context(config, own(1))
    indices = (run.partition.indices[0], in_order_of_folders(run, 1))
    object.__setattr__(run.partition, "indices", indices)
    params = []
    for context in (run, alone):
        context.replicas.train([received(initial_state(context), context, 1)])
        params.append(context.replicas.params_RP[0].clone())
    assert torch.equal(*params)


def test_what_is_told_beside_the_file(config, tmp_path, capsys):
    file = tmp_path / "0.safetensors"
    flags = ["--dataset", "digits", "--clients", "2", "--clients-per-round", "2"]
    flags += ["--set", "anchors.width=32", "--out", str(file)]
    assert cli.main(["anchors", "export", "--client", "0", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    count = prepare(config, offline=True).partition.sizes[0]
    assert f"its {count} training images" in told["client_reveals_for_it"]
    assert f"[{count}, 32]" in told["leaves_the_server"]
    beside = json.loads((tmp_path / "0.safetensors.json").read_text())
    assert told == {"file": str(file), **beside}
    held = ["--anchor-images", "heldout:8"]
    assert cli.main(["anchors", "export", "--client", "0", *flags, *held, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["client_reveals_for_it"].startswith("nothing: ")
    assert "[10, 32]" in told["leaves_the_server"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "2"], "--client 2: expected 0 to 1"),
        (["--client", "0", "--method", "fedavg"], "fedavg has no anchors"),
    ],
)
def test_nothing_to_export(tmp_path, capsys, arguments, message):
    flags = ["--dataset", "digits", "--clients", "2", "--clients-per-round", "2"]
    out = tmp_path / "file.safetensors"
    assert cli.main(["anchors", "export", *flags, *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_mistakes_of_a_client(config, own, tmp_path):
    other = own(0).anchors
    with pytest.raises(
        MismatchError, match=r"client: 0 there, 1 here.*export it again for client 1"
    ):
        client_context(config, own(1, anchors=other))
    with pytest.raises(UserError, match="client 1 has no anchors: start the SuperNode with"):
        client_context(config, own(1, anchors=""))
    with pytest.raises(
        MismatchError, match=r"has no anchor for \d+ of \d+ images: export it again"
    ):
        client_context(config, own(1, folder=own(0).folder))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\0" * 64)
    with pytest.raises(MismatchError, match=r"damaged\.safetensors is damaged"):
        client_context(config, own(1, anchors=str(damaged)))
    with pytest.raises(UserError, match="no classes of this federation"):
        client_context(config, own(1, class_names=("cat", "dog")))
    with pytest.raises(UserError, match="partition-id 5: expected 0 to 1"):
        client_context(
            resolve({**SETTINGS, "federation.method": "fedavg"}), own(5, folder=own(1).folder)
        )
    simulated = resolve({**SETTINGS, "partition.modality": "mixed"})
    with pytest.raises(UserError, match="simulate clients"):
        client_context(simulated, own(1))


def test_the_server_checks_who_joins(server):
    clients = [introduction(server, k, owns=False) for k in range(2)]
    assert with_clients(server, clients[::-1]).partition == server.partition
    with pytest.raises(UserError, match=r"clients \[0, 0\] joined: expected each of 0 to 1 once"):
        with_clients(server, clients[:1] * 2)
    facts = json.loads(clients[1]["facts"]) | {"partition": "another"}
    strange = [clients[0], clients[1] | {"facts": json.dumps(facts)}]
    with pytest.raises(
        MismatchError, match="client 1 belongs to another run: partition: 'another'"
    ):
        with_clients(server, strange)
    owner = introduction(server, 1, owns=True)
    assert not {"data", "partition"} & set(json.loads(owner["facts"]))
    counted = with_clients(server, [clients[0], owner | {"histogram": [3] * 10}])
    assert counted.partition.sizes == (server.partition.sizes[0], 30)
