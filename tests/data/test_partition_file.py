"""A partition as a file: what is saved comes back, and whatever is wrong with a file is named."""

import json
from types import SimpleNamespace

import pytest
import splitting
import torch

from semanticfl_ref.data.partition_file import read_assignment, save_partition
from semanticfl_ref.errors import DataError, MismatchError

LABELS = torch.arange(40) % 4
DATASET = SimpleNamespace(name="digits", sha256="a" * 64)


def split(scenario="nid1", *, clients=3, file="", **options):
    given = {"classes": 4, "alpha": 0.5, "seed": 1, "data_sha256": DATASET.sha256, **options}
    return splitting.split(LABELS, scenario, clients=clients, file=str(file), **given)


@pytest.mark.parametrize(
    "options", [{}, {"held_out_share": 0.3}, {"imbalance": 4.0, "held_out_share": 0.3}]
)
def test_what_is_saved_comes_back(tmp_path, options):
    file = tmp_path / "p.json"
    drawn = split(**options)
    save_partition(drawn, DATASET, file)
    again = split("nid2", file=file, held_out_share=options.get("held_out_share", 0.0))
    assert again.scenario == "file"
    for name in ("sha256", "histograms", "dropped"):
        assert getattr(again, name) == getattr(drawn, name)
    assert again.manifest()["alpha"] is None


def test_lists_alone_and_a_tail_over_them(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps([list(range(0, 20)), list(range(20, 36))]))
    p = split(clients=2, file=file)
    assert p.sizes == (20, 16)
    assert p.dropped == (1, 1, 1, 1)
    tail = split(clients=2, file=file, imbalance=2.0)
    assert set(tail.used.tolist()) < set(p.used.tolist())
    assert sum(tail.histograms[m][0] for m in (0, 1)) == 9
    file.write_text(json.dumps([[0, 4, 8], [1, 3]]))
    words = "client 1 has 0 images, of those that partition.imbalance leaves; at least 2 are needed"
    with pytest.raises(DataError, match=words):
        split(clients=2, file=file, imbalance=1e4)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("[[0, 1], [2", DataError, "is not JSON"),
        ("[" * 100_000, DataError, "is not JSON"),
        ('{"lists": []}', DataError, "expected .*a list of integers for every client"),
        ("[[0, 1], [2, 3.0], [4, 5]]", DataError, "a list of integers"),
        ("[[0, 1], [2, true], [4, 5]]", DataError, "a list of integers"),
        ("[[0, 1], 7, [4, 5]]", DataError, "a list of integers"),
        ("3", DataError, "a list of integers"),
        (
            "[[0, 1], [2, 40], [4, 5]]",
            DataError,
            "client 1 holds image 40; there are 40 training images, counted from 0",
        ),
        ("[[0, 1], [2, -1], [4, 5]]", DataError, "client 1 holds image -1"),
        (f"[[0, 1], [2, {10**30}], [4, 5]]", DataError, "client 1 holds image 1000"),
        (
            "[[0, 1], [2, 1], [4, 5]]",
            DataError,
            "image 1 is listed twice, for clients 0 and 1; the lists must be disjoint",
        ),
        ("[[0, 1], [2, 3], [4, 4]]", DataError, "image 4 is listed twice, for clients 2 and 2"),
        ("[[0, 1], [2, 3], [4]]", DataError, "client 2 has 1 images; at least 2 are needed"),
        ("[[], [], []]", DataError, "client 0 has 0 images"),
        (
            "[[0, 1], [2, 3]]",
            MismatchError,
            "has 2 clients, partition.clients = 3: use --clients 2",
        ),
        (
            '{"indices": [[0, 1], [2, 3], [4, 5]], "dataset_sha256": "bbb"}',
            MismatchError,
            "belongs to other training images: it records bbb, these are aaa",
        ),
    ],
)
def test_a_file_that_is_wrong(tmp_path, content, kind, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(kind, match=words) as caught:
        split(file=tmp_path / "p.json")
    assert type(caught.value) is kind
    assert str(tmp_path / "p.json") in str(caught.value)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"cannot read partition.file = .*absent\.json: No such"):
        split(file=tmp_path / "absent.json")
    with pytest.raises(DataError, match="choose another --save"):
        save_partition(split(), DATASET, tmp_path / "absent" / "p.json")


def test_files_of_other_tools(tmp_path):
    """A map from client to indices, and a byte-order mark."""
    lists = [[0, 3], [1], [2, 4]]
    (tmp_path / "map.json").write_text(json.dumps({str(k): own for k, own in enumerate(lists)}))
    (tmp_path / "bom.json").write_text(json.dumps(lists), encoding="utf-8-sig")
    for name in ("map.json", "bom.json"):
        clients = read_assignment(tmp_path / name, 5, 3, "")
        assert clients.tolist() == [0, 1, 2, 0, 2]
