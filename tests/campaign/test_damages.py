"""Single bytes of every kind of file are changed, and files cut: what becomes of what reads them.

A damage is detected and named, or it is harmless: the result is the same. Silent ones, tracebacks
and hangs fail the campaign.
"""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from campaign.children import SMALL, classified, run, same_files
from data.synthetic_archives import cifar_members, sha256, tar_gz
from PIL import Image

from semanticfl_ref.data import digits
from semanticfl_ref.diffusion import model_files
from semanticfl_ref.run.folder import RESULTS

pytestmark = pytest.mark.heavy

EVERY_FILE = (*RESULTS, "summary.json", "checkpoint.safetensors")


def damages(good: bytes, count: int, chance):
    """(description, content): `count` flips of one bit, half of them in the first kilobyte, and
    five cuts."""
    for k in range(count):
        place = chance.randrange(min(len(good), 1024) if k % 2 else len(good))
        bit = 1 << chance.randrange(8)
        yield f"byte {place} ^ {bit}", good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]
    for length in (0, 1, len(good) // 2, len(good) - 2, len(good) - 1):
        yield f"cut to {length}", good[:length]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_finished_run(whole, tmp_path, tally, scale, chance, name):
    """Report, export and resume; a report may leave out what only the checkpoint has."""
    row, path = tally(f"finished run, `{name}`"), tmp_path / "run"
    shutil.copytree(whole, path)
    readers = {
        "report": (["report", str(path)], path / "report.html"),
        "export": (["export", str(path), "--out", str(tmp_path / "m.safetensors")], None),
        "resume": (["train", "--resume", str(path), "--json"], None),
    }

    def result(command, file) -> tuple:
        done = run(command)
        file = file or (tmp_path / "m.safetensors" if command[0] == "export" else None)
        content = file.read_bytes() if file and file.exists() else done.out
        if file:
            file.unlink(missing_ok=True)
        return done, content

    expected = {reader: result(*how)[1] for reader, how in readers.items()}
    good = (path / name).read_bytes()
    for k, (what, bad) in enumerate(damages(good, int(10 * scale), chance)):
        (path / name).write_bytes(bad)
        reader = list(readers)[k % 3]
        done, found = result(*readers[reader])
        kind = classified(done, found == expected[reader], str(path))
        row.add(kind, f"{reader}, {what}: {done.told[-200:]}")
        if not (path / "summary.json").is_file() or (path / name).read_bytes() != bad:
            shutil.rmtree(path)
            shutil.copytree(whole, path)
    row.check(15)


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if name != "summary.json"])
def test_an_unfinished_run(whole, tmp_path, tally, scale, chance, name):
    """After a resume, the results are those of a whole run; what only informs may differ."""
    row, begun = tally(f"unfinished run, `{name}`"), tmp_path / "begun"
    done = run(["train", *SMALL, "--rounds", "2", "--out", str(begun)])
    assert done.code == 0
    flags = ["--rounds", "3"]
    (begun / "summary.json").unlink()
    documents = ("partition.json", "anchors.json", "identity.json")
    for k, (what, bad) in enumerate(damages((begun / name).read_bytes(), int(8 * scale), chance)):
        path = tmp_path / str(k)
        shutil.copytree(begun, path)
        (path / name).write_bytes(bad)
        done = run(["train", "--resume", str(path), *flags])
        same = same_files(path, whole) and all(
            json.loads((path / n).read_text()) == json.loads((whole / n).read_text())
            for n in documents
        )
        row.add(classified(done, same, str(path)), f"{what}: {done.told[-200:]}")
    row.check(12)


def test_a_feature_cache(tmp_path, tally, scale, chance, monkeypatch):
    """A damaged cache is named, with the command that builds it again."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    row, expected = tally("feature cache"), tmp_path / "expected"
    command = ["train", *SMALL, "--method", "semanticfl", "--rounds", "1"]
    assert run([*command, "--out", str(expected)]).code == 0
    (cache,) = (tmp_path / "cache" / "features").glob("features-*")
    files = [file for file in sorted(cache.iterdir()) if file.name != ".lock"]
    for file in [files[0], *files[-2:], cache.parent / "weights.json"]:
        good = file.read_bytes()
        for k, (what, bad) in enumerate(damages(good, int(5 * scale), chance)):
            file.write_bytes(bad)
            out = tmp_path / f"{file.name}-{k}"
            done = run([*command, "--out", str(out)])
            kind = classified(done, same_files(out, expected), str(cache.parent))
            row.add(kind, f"{file.name}, {what}: {done.told[-200:]}")
        file.write_bytes(good)
    row.check(40)


def embedded(monkeypatch, tmp_path, owner, attribute: str) -> Path:
    """A copy of an embedded file or folder, in its place."""
    original, copy = getattr(owner, attribute), tmp_path / "copy"
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
    monkeypatch.setattr(owner, attribute, copy)
    return copy


def test_the_embedded_digits(tmp_path, tally, scale, chance, monkeypatch):
    row = tally("embedded digits")
    file = embedded(monkeypatch, tmp_path, digits, "FILE")
    for what, bad in damages(file.read_bytes(), int(8 * scale), chance):
        file.write_bytes(bad)
        done = run(["train", *SMALL, "--out", str(tmp_path / "run")])
        row.add(classified(done, False, str(file)), what)
    row.check(13)


def test_the_embedded_model(tmp_path, tally, scale, chance, monkeypatch):
    row = tally("embedded diffusion model")
    folder = embedded(monkeypatch, tmp_path, model_files, "TINY")
    for file in model_files.list_files(folder):
        good = file.read_bytes()
        for what, bad in damages(good, int(2 * scale), chance):
            file.write_bytes(bad)
            flags = ["--method", "semanticfl", "--out", str(tmp_path / "run")]
            done = run(["train", *SMALL, *flags])
            row.add(classified(done, False, str(folder)), f"{file.name}, {what}")
        file.write_bytes(good)
    row.check(40)


def train_on(*flags: str):
    """A function: folder of a run -> a run of one round on these images."""

    def train(out: Path):
        return run(["train", *SMALL, *flags, "--rounds", "1", "--out", str(out)])

    return train


def test_an_archive(tmp_path, tally, scale, chance):
    """Accepted by the digest of its damaged self, as by a user who trusts it."""
    row, good = tally("CIFAR archive under its own digest"), tar_gz(cifar_members())
    file = tmp_path / "cifar-10-python.tar.gz"
    inside = gzip.decompress(good)

    def train(content: bytes, out: Path):
        file.write_bytes(content)
        flags = ("--data-dir", str(tmp_path), "--data-sha256", sha256(content))
        return train_on("--dataset", "cifar10", "--device", "cpu", *flags)(out)

    assert train(good, tmp_path / "whole").code == 0
    for k, (what, bad) in enumerate(damages(good, int(20 * scale), chance)):
        done = train(bad, tmp_path / str(k))
        same = same_files(tmp_path / str(k), tmp_path / "whole", ("metrics.jsonl",))
        row.add(classified(done, same, str(file)), f"{what}: {done.told[-200:]}")
    for k in range(int(20 * scale)):  # in the headers of tar and pickle, under a right checksum
        place = 512 * chance.randrange(4) + chance.randrange(512)
        bad = (
            inside[:place] + bytes([inside[place] ^ 1 << chance.randrange(8)]) + inside[place + 1 :]
        )
        done = train(gzip.compress(bad, 1, mtime=0), tmp_path / f"inside{k}")
        # What it trains on is what the user vouched for by its digest; it must not break.
        kind = classified(done, True, str(file))
        row.add(kind, f"inside, byte {place}: {done.told[-200:]}")
    row.check(45)


def test_images(tmp_path, tally, scale, chance):
    """A pixel may differ, as in any image; a file that cannot be read is named."""
    row, images = tally("images of a folder"), tmp_path / "images"
    for c, name in enumerate(("cat", "dog", "eel")):
        (images / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (40 * c + i, 60, 90)).save(images / name / f"{i}.png")
    train = train_on("--dataset", "image_folder", "--data-dir", str(images), "--alpha", "5")
    assert train(tmp_path / "whole").code == 0
    file = images / "cat" / "3.png"
    good = file.read_bytes()
    for k, (what, bad) in enumerate(damages(good, int(20 * scale), chance)):
        file.write_bytes(bad)
        done = train(tmp_path / str(k))
        row.add(classified(done, True, str(file)), f"{what}: {done.told[-200:]}")
    row.check(25)


def test_a_partition_file(tmp_path, tally, scale, chance):
    """Detected, or it is another partition, whose digest the run's identity has."""
    row, file = tally("partition file"), tmp_path / "partition.json"
    done = run(["partition", "show", *SMALL, "--save", str(file)])
    assert done.code == 0, done.told
    good, train = file.read_bytes(), train_on("--set", f"partition.file={file}")
    assert train(tmp_path / "whole").code == 0
    identity = json.loads((tmp_path / "whole" / "identity.json").read_text())
    for k, (what, bad) in enumerate(damages(good, int(20 * scale), chance)):
        file.write_bytes(bad)
        done = train(tmp_path / str(k))
        same = same_files(tmp_path / str(k), tmp_path / "whole", ("metrics.jsonl",))
        if done.code == 0 and not same:
            found = json.loads((tmp_path / str(k) / "identity.json").read_text())
            same = found["partition"] != identity["partition"]
        row.add(classified(done, same, str(file)), f"{what}: {done.told[-200:]}")
    row.check(25)


def test_a_model_folder(tmp_path, tally, scale, chance, monkeypatch):
    """A user's model: other weights are another model, named by another digest in anchors.json."""
    monkeypatch.setenv("SEMANTICFL_CACHE", str(tmp_path / "cache"))
    row, folder = tally("weights of a model folder"), tmp_path / "model"
    shutil.copytree(model_files.TINY, folder)
    command = ["train", *SMALL, "--method", "semanticfl", "--rounds", "1", "--sd", str(folder)]
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    good = file.read_bytes()
    for k, (what, bad) in enumerate(damages(good, int(2 * scale), chance)):
        file.write_bytes(bad)
        out = tmp_path / str(k)
        done = run([*command, "--out", str(out)])
        row.add(classified(done, True, str(folder)), f"{what}: {done.told[-200:]}")
    row.check(7)


def test_a_zip(tmp_path, tally, scale, chance):
    """Members of a zip under a right or wrong checksum, read as TinyImageNet is."""
    from semanticfl_ref.data.archives import members
    from semanticfl_ref.errors import DataError

    row, file = tally("zip archive"), tmp_path / "a.zip"
    contents = {"x/a.txt": b"one", "x/b.txt": b"two" * 1000}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    for what, bad in damages(file.read_bytes(), int(200 * scale), chance):
        file.write_bytes(bad)
        try:
            found = dict(members(file, lambda name: True)).values()
        except DataError as error:
            row.add("named" if str(file) in str(error) else "unnamed", what)
        except Exception:
            row.add("traceback", what)
        else:
            row.add("harmless" if set(found) <= set(contents.values()) else "silent", what)
    row.check(200)


def test_sealed_tensors_of_any_size(tmp_path, tally, scale, chance):
    """What checkpoints and caches are made of, bit by bit."""
    from semanticfl_ref.storage import Damaged, load_tensors, save_tensors

    row, file = tally("tensor file"), tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(300.0), "b": torch.arange(7, dtype=torch.uint8)}
    save_tensors(file, tensors, {"round": 3})
    for what, bad in damages(file.read_bytes(), int(400 * scale), chance):
        file.write_bytes(bad)
        try:
            found, about, _ = load_tensors(file)
        except Damaged:
            row.add("named", what)
        except Exception:
            row.add("traceback", what)
        else:
            same = all(torch.equal(found[name], tensors[name]) for name in tensors)
            row.add("harmless" if same and about == {"round": 3} else "silent", what)
    row.check(400)
