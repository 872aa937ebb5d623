"""Where a model's files come from: folders complete and damaged, variants, the hub and its absence;
and the SHA-256 that identifies them.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from semanticfl_ref.diffusion import model_files
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.model_files import WEIGHTS, fingerprint, locate
from semanticfl_ref.diffusion.modules import RENAMED
from semanticfl_ref.errors import DataError, DownloadError, UserError

OPTIONS = {"timestep": 150, "seed": 3}


@pytest.fixture
def folder(model_folder, tmp_path):
    """The model in a folder of the test's own, an hour old."""
    shutil.copytree(model_folder, tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.*"):
        os.utime(file, ns=(10**18, 10**18))
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "runwayml/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-1-base",
    ],
)
def test_withdrawn_ids_name_their_successor(name):
    message = r"withdrawn.*--sd (stable-diffusion-v1-5|sd2-community)/"
    with pytest.raises(UserError, match=message) as caught:
        Backbone(name, layers=["mid"])
    assert caught.value.exit_code == 2


def forbid_sockets(monkeypatch):
    def forbidden(*_arguments, **_options):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(f"socket.{name}", forbidden)


def test_missing_weights_offline_name_the_command_and_open_no_socket(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    forbid_sockets(monkeypatch)
    message = r"hf download somebody/model .*--include .unet/diffusion_pytorch_model.fp16"
    with pytest.raises(DownloadError, match=message) as caught:
        Backbone("somebody/model", layers=["mid"], offline=True)
    assert "--sd tiny" in str(caught.value) and caught.value.exit_code == 5


def test_a_local_folder_opens_no_socket(model_folder, images, monkeypatch):
    forbid_sockets(monkeypatch)
    Backbone(model_folder, layers=["mid"]).features(images[:1], **OPTIONS)


def test_no_network_is_a_download_error(monkeypatch, tmp_path):
    def unreachable(*_arguments, local_files_only=False, **_options):
        if local_files_only:
            raise FileNotFoundError("not cached")
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = r"could not be downloaded .Name or service not known.*: hf download somebody/model"
    with pytest.raises(DownloadError, match=message):
        Backbone("somebody/model", layers=["mid"])


@pytest.mark.parametrize(
    "part",
    [
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer",
        "scheduler",
    ],
)
def test_a_folder_without_a_part_is_named(folder, part):
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(DataError, match=f"lacks {part}"):
        Backbone(folder, layers=["mid"], offline=True)


def test_a_pickled_weight_is_not_read(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(DataError, match="only safetensors are read"):
        Backbone(folder, layers=["mid"], offline=True)


def test_damaged_or_partial_weights_are_refused(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    stored.pop("conv_in.weight")
    save_file(stored, file, metadata={"format": "pt"})
    message = r"unet of the model folder .* lacks 1 of its weights, such as conv_in\.weight"
    with pytest.raises(DataError, match=message):
        Backbone(folder, layers=["mid"], offline=True)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"unet of the model folder .* cannot be read"):
        Backbone(folder, layers=["mid"], offline=True)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"vae of the model folder .* cannot be read"):
        Backbone(folder, layers=["mid"], offline=True)


def test_another_kind_of_unet_is_refused(folder):
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    with pytest.raises(DataError, match="not a text-to-image Stable Diffusion"):
        Backbone(folder, layers=["mid"], offline=True)


def features_of(folder, images):
    backbone = Backbone(folder, layers=["vae", "up.0"], offline=True)
    return backbone.features(images[:3], **OPTIONS)


@pytest.fixture(scope="module")
def expected(model_folder, images):
    return features_of(model_folder, images)


def same(one, other) -> bool:
    return all(torch.equal(one[layer], other[layer]) for layer in one)


def test_the_fp16_variant_is_read_and_preferred(folder, images, expected):
    before = fingerprint(folder)
    for part, stem in WEIGHTS.items():
        file = folder / part / f"{stem}.safetensors"
        file.rename(folder / part / f"{stem}.fp16.safetensors")
        file.write_bytes(b"the full file, which nothing may read")
    assert same(features_of(folder, images), expected)
    assert fingerprint(folder) != before, "file names count"


def test_weights_in_several_files(folder, images, expected):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = list(load_file(file).items())
    shards = [file.with_stem(f"{file.stem}-0000{i}-of-00002") for i in (1, 2)]
    for i, shard in enumerate(shards):
        save_file(dict(stored[i::2]), shard, metadata={"format": "pt"})
    file.unlink()
    index = file.with_name(f"{file.name}.index.json")
    names = {name: shards[i % 2].name for i, (name, _) in enumerate(stored)}
    index.write_text(json.dumps({"weight_map": names}))
    shutil.copy(shards[1], file.with_stem(f"{file.stem}-00002-of-00009"))  # a stale one
    assert same(features_of(folder, images), expected)
    shards[0].unlink()
    with pytest.raises(DataError, match=rf"lacks unet/{shards[0].name}, which its index names"):
        features_of(folder, images)
    for content in ("", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}'):
        index.write_text(content)
        with pytest.raises(DataError, match=r"index .*index\.json cannot be read"):
            features_of(folder, images)


def test_the_vaes_old_names_are_known(folder, images, expected):
    """Stable Diffusion 1.5's VAE file names its attention as diffusers did before 2023."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {new: name for name, new in RENAMED.items()}
    new_name = re.compile(r"(to_q|to_k|to_v|to_out\.0)(?=\.(weight|bias)$)")
    renamed = {
        new_name.sub(lambda found: old[found[0]], name): value
        for name, value in load_file(file).items()
    }
    assert any(".query.weight" in name for name in renamed)
    assert not any("to_q" in name for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    assert same(features_of(folder, images), expected)


def test_nothing_of_the_decoder_or_behind_the_last_layer_is_read(folder, images):
    """With those weights gone from the files, loading succeeds all the same."""
    for part, cut in (
        ("vae", ("decoder.", "post_quant_conv.")),
        ("unet", ("mid_block.", "up_blocks.", "conv_out.", "conv_norm_out.")),
    ):
        file = folder / part / "diffusion_pytorch_model.safetensors"
        stored = load_file(file).items()
        kept = {name: value for name, value in stored if not name.startswith(cut)}
        save_file(kept, file, metadata={"format": "pt"})
    backbone = Backbone(folder, layers=["down.1"], offline=True)
    assert backbone.features(images[:1], **OPTIONS)["down.1"].shape == (1, 112)
    with pytest.raises(DataError, match=r"lacks .* of its weights, such as mid_block\."):
        Backbone(folder, layers=["mid"], offline=True)


def test_a_remembered_fingerprint_reads_no_weights(folder, tmp_path, monkeypatch):
    known = tmp_path / "cache" / "weights.json"
    full = fingerprint(folder)
    assert fingerprint(folder, known) == full and known.is_file()
    reads = []
    file_digest = hashlib.file_digest

    def counted(file, kind):
        reads.append(file.name)
        return file_digest(file, kind)

    monkeypatch.setattr(model_files.hashlib, "file_digest", counted)
    assert fingerprint(folder, known) == full and reads == []
    assert fingerprint(folder) == full and len(reads) >= 7, "without a memory every byte is read"
    reads.clear()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    assert fingerprint(folder, known) != full and reads == [str(file)]
    reads.clear()
    fingerprint(folder, known)
    assert reads == [str(file)], (
        "a file changed just now is not remembered: it may change again within the same time stamp"
    )


def test_a_memory_of_fingerprints_that_is_damaged_or_cannot_be_written_is_harmless(
    folder, tmp_path
):
    full = fingerprint(folder)
    for content in ("", "[]", "[1]", '{"a": 1}', '{"x|1|2": "abc"}', '{"x|1|2": 3}', "\x00"):
        (tmp_path / "weights.json").write_text(content)
        assert fingerprint(folder, tmp_path / "weights.json") == full
    assert fingerprint(folder, tmp_path / "weights.json" / "below a file") == full


def test_the_hubs_own_hash_of_a_file_is_checked(folder):
    """Its cache keeps contents under their sha256, and links to them."""
    file, blobs = folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "blobs"
    blobs.mkdir()
    content = file.read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    fingerprint(folder)
    blob.write_bytes(content[:-1] + b"\x07")
    with pytest.raises(DataError, match=rf"is damaged.*delete {blob}"):
        fingerprint(folder)


def test_a_hub_model_is_fetched_in_fp16_where_it_has_that(folder, tmp_path, monkeypatch):
    """A stand-in for the hub that hands out the files that match; the second model has no fp16
    files.
    """
    for with_half in (True, False):
        served, cache = tmp_path / f"served{with_half}", tmp_path / f"cache{with_half}"
        shutil.copytree(folder, served)
        for part, stem in WEIGHTS.items():
            (served / part / f"{stem}.bin").write_bytes(b"pickled")
            if with_half:
                full = served / part / f"{stem}.safetensors"
                shutil.copy(full, full.with_name(f"{stem}.fp16.safetensors"))
        (served / "safety_checker").mkdir()
        (served / "safety_checker" / "model.safetensors").write_bytes(b"not used")

        def snapshot(_name, allow_patterns, local_files_only=False, served=served, cache=cache):
            if local_files_only and not cache.exists():
                raise FileNotFoundError("not cached")
            files = [] if local_files_only else [f for f in served.rglob("*") if f.is_file()]
            for file in files:
                name = file.relative_to(served).as_posix()
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (cache / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, cache / name)
            return str(cache)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        found = locate("somebody/model")
        got = sorted(
            file.relative_to(found).as_posix()
            for file in found.rglob("*.*")
            if file.is_file() and file.suffix not in (".json", ".txt")
        )
        ending = ".fp16.safetensors" if with_half else ".safetensors"
        assert got == sorted(f"{part}/{stem}{ending}" for part, stem in WEIGHTS.items())
        assert locate("somebody/model", offline=True) == found, "the second time nothing is fetched"


def hub_cache(tmp_path, monkeypatch, folder, listed: list[str]):
    """huggingface_hub's own cache as it lies on the disk: the folder's files, and the list of what
    the hub has.
    """
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    kept = cache / "models--somebody--model"
    shutil.copytree(folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    (kept / "trees").mkdir()
    here = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    entries = {
        name: {"size": 1, "blob_id": "b", "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
        for name in [*here, *listed]
    }
    return kept, commit, entries


def test_full_files_that_another_program_fetched_are_found_offline(folder, tmp_path, monkeypatch):
    """The hub lists fp16 files too, and its library knows that they are not here."""
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache")
    half = [f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items()]
    kept, commit, entries = hub_cache(tmp_path, monkeypatch, folder, half)
    tree_cache.write_tree_cache(
        str(kept),
        commit,
        {name: tree_cache.TreeCacheEntry(**entry) for name, entry in entries.items()},
    )
    forbid_sockets(monkeypatch)
    assert locate("somebody/model", offline=True) == kept / "snapshots" / commit
    (kept / "snapshots" / commit / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DownloadError, match="--offline forbids"):
        locate("somebody/model", offline=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Backbone(tmp_path / "none", layers=["mid"])


def test_a_flipped_bit_of_the_embedded_model_is_refused(folder, monkeypatch):
    shutil.rmtree(folder)
    shutil.copytree(model_files.TINY, folder)
    monkeypatch.setattr(model_files, "TINY", folder)
    assert locate("tiny") == folder
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"missing or damaged: reinstall"):
        locate("tiny")
