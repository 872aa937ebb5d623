"""Scripts that make data sets or draw results, on small inputs."""

import importlib
import io
import json
import tarfile

import emoji_folders
import gain_by_teacher
import pytest
import results_tables
from data.loading import load
from PIL import Image

from semanticfl_ref.config.registry import DATASETS


def test_emoji_of_vendors(tmp_path):
    """As many of each group, in no part what the other has, and vendors as clients."""
    groups = {"Food & Drink": 5, "Objects": 7, "Flags": 9}
    listed = [
        {
            "category": group,
            "image": f"{group[:2].lower()}{i}.png",
            "has_img_red": True,
            "has_img_blue": True,
        }
        for group, count in groups.items()
        for i in range(count)
    ]
    listed.append(listed[0] | {"image": "red-only.png", "has_img_blue": False})
    packages = []
    for vendor in ("red", "blue"):
        packages.append(tmp_path / f"emoji-datasource-{vendor}-1.0.0.tgz")
        with tarfile.open(packages[-1], "w:gz") as archive:
            content = {"package/emoji.json": json.dumps(listed).encode()}
            for i, emoji in enumerate(listed):
                png = io.BytesIO()
                image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
                image.paste(vendor, (16, 16, 48 - i % 8, 48))
                image.save(png, "PNG")
                content[f"package/img/{vendor}/64/{emoji['image']}"] = png.getvalue()
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    out = tmp_path / "out"
    emoji_folders.main(out, packages)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    trained = {f.split("/", 2)[2] for f in files if f.startswith("train/")}
    tested = {"{}/{}".format(f.split("/")[1], f.split("-")[-1]) for f in files if "test/" in f}
    assert len(trained) == 8 and len(tested) == 2 and not trained & tested
    data = load("image_folder", dir=out, clients_from="folder")
    assert data.class_names == ("Food-and-Drink", "Objects")
    assert data.train_clients.tolist() == [0] * 8 + [1] * 8
    blue = data.train_images[0]
    assert blue[15, 15].tolist() == [0, 0, 255] and blue[0, 0].tolist() == [255] * 3


def test_more_labels(monkeypatch):
    """The test images stay; 450 are the embedded ones; 900 have no image twice."""
    monkeypatch.setattr(DATASETS, "entries", dict(DATASETS.entries))
    more_labels = importlib.import_module("more_labels")
    embedded = load("digit-scenes")
    found = {count: load(f"digit-scenes-{count}") for count in more_labels.COUNTS}
    for count, data in found.items():
        assert abs(len(data.train_labels) - count) <= 10
        assert data.test_images.equal(embedded.test_images)
        images = data.train_images.flatten(1)
        assert len(images.unique(dim=0)) == len(images)
    assert found[450].train_images.equal(embedded.train_images)


def test_gain_by_teacher():
    entries = {"t20=semanticfl": [11, 9], "t900=semanticfl": [0, -2]}
    results = [{"method": m, "gain": {"values": values}} for m, values in entries.items()]
    results.append({"method": "fedavg=fedavg", "gain": None})
    rows = [{"timestep": 20, "linear_probe": 0.9}, {"timestep": 900, "linear_probe": 0.125}]
    assert gain_by_teacher.points({"results": results}, {"rows": rows}) == [
        {"timestep": 20, "probe": 90.0, "gains": [11, 9]},
        {"timestep": 900, "probe": 12.5, "gains": [0, -2]},
    ]


@pytest.mark.parametrize("page", results_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert results_tables.renewed(text) == text
