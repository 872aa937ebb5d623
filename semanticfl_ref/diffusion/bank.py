"""Images and class names -> a `FeatureBank` on disk: named by the hash of everything that makes it,
written as it is extracted, verified when read.

A bank is a folder `bank-<id>` of safetensors: `shard-00000.safetensors` and so on, `SHARD` images
each, `text.safetensors`, and `bank.json`, which is written last with the digest of every file. A
folder without it is a bank that is still being made: `extract.py` goes on with it. Reading one
imports neither diffusers nor transformers.

Letters: N images, C classes, D width of a vector.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from semanticfl_ref.diffusion.weights import fingerprint, locate
from semanticfl_ref.errors import DataError, MismatchError, unknown
from semanticfl_ref.storage import Damaged, canonical, digest, load_tensors

CODE_VERSION = 1  # raise it whenever the same inputs would give other features
SHARD = 64  # images; a multiple of every pass, so that where a shard ends changes nothing
CONDITIONS = ("null", "own-class")
MANIFEST, TEXT = "bank.json", "text.safetensors"


@dataclass(frozen=True)
class FeatureBank:
    """What the diffusion model says of N images, read in pieces.

    Attributes:
        text: float32 [C, D], one vector a class from the model's text encoder.
        id: names the bank; sha256 of `meta`.
        meta: everything that made it, plain JSON values.
        shards: functions from a tap's name to float16 [n, D], in the images' order; each reads when
            it is called.
        widths: tap -> D, in the order of the taps.
    """

    text: torch.Tensor
    id: str
    meta: dict
    shards: Sequence[Callable[[str], torch.Tensor]]
    widths: dict[str, int]

    def chunks(self, tap: str, rows: int = 4096) -> Iterator[torch.Tensor]:
        """The tap's vectors, float16 [rows, D] at a time: never more than that in memory."""
        held: list[torch.Tensor] = []
        for shard in self.shards:
            held.append(shard(tap))
            while (have := sum(map(len, held))) >= rows:
                joined = torch.cat(held)
                yield joined[:rows]
                held = [joined[rows:]] if have > rows else []
        if held:
            yield torch.cat(held)

    def read(self, tap: str) -> torch.Tensor:
        """All of a tap's vectors, float16 [N, D]."""
        return torch.cat(list(self.chunks(tap)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a bank is made; the options are those of `Backbone.features` and `Backbone.load`.

    Attributes:
        source: "tiny", a folder in diffusers' layout, or a hub id.
        taps: layers; ("all",) = the latent and every block.
        prompt: the caption of a class, `{}` where its name goes.
        condition: "null": each image passes the U-Net under the empty caption; "own-class": under
            its own class's, which writes its label into its features.
        latent: "mean" or "sample" of the VAE's distribution.
        seed: of the noise.
        precision: fp32, bf16, fp16 or auto, see `backbone.settled_precision`.
    """

    taps: tuple[str, ...]
    source: str = "tiny"
    timestep: int = 150
    pool: int = 1
    prompt: str = "a photo of a {}"
    condition: str = "null"
    input_size: int | None = None
    latent: str = "mean"
    seed: int = 0
    precision: str = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A bank that is wanted: where it is or will be, what makes it, of which images, and what to do
    when it is damaged.
    """

    path: Path
    id: str
    meta: dict
    model: Path
    images: torch.Tensor
    labels: torch.Tensor
    device: torch.device
    remedy: str


def plan(
    images: torch.Tensor,
    labels: torch.Tensor,
    class_names,
    dataset_sha256: str,
    recipe: Recipe,
    *,
    cache_dir: Path,
    offline: bool = False,
    device: str | None = None,
    remedy: str = "delete its folder and make it again",
) -> Plan:
    """Settle which bank is wanted; reads the model's files only where their digests are not
    remembered.

    Args:
        images, labels: uint8 [N, H, W, 3] and int64 [N]: the images to describe, all of a data
            set's or some.
        class_names, dataset_sha256: of the data set.
        cache_dir: where banks live.
        offline: open no connection.
        device: None = CUDA when there is one.
        remedy: told when it is damaged.

    Raises:
        UserError: an unknown name. DataError, DownloadError: see `weights.locate`.
    """
    from semanticfl_ref.diffusion.backbone import LATENTS, settled_precision, vae_dtype

    for what, name, known in (
        ("condition", recipe.condition, CONDITIONS),
        ("latent", recipe.latent, LATENTS),
    ):
        if name not in known:
            raise unknown(what, name, known)
    settled = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = settled_precision(recipe.precision, settled)
    folder = locate(recipe.source, offline=offline)
    meta = {
        **asdict(recipe),
        "source": str(recipe.source),
        "taps": list(recipe.taps),
        "precision": precision,
        "vae_precision": str(vae_dtype(precision, settled))[6:],
        "weights_sha256": fingerprint(folder, Path(cache_dir) / "weights.json"),
        "dataset_sha256": dataset_sha256,
        "images": len(images),
        "images_sha256": digest(
            "images", {"images": images}
        ),  # a part of a data set is not the data set
        "labels_sha256": digest("labels", {"labels": labels})
        if recipe.condition == "own-class"
        else None,
        "class_names": list(class_names),
        "shard": SHARD,
        "code_version": CODE_VERSION,
    }
    bank_id = digest(
        {key: value for key, value in meta.items() if key != "source"}
    )  # a folder may move
    return Plan(
        path=Path(cache_dir) / f"bank-{bank_id}",
        id=bank_id,
        meta=meta,
        model=folder,
        images=images,
        labels=labels,
        device=settled,
        remedy=remedy,
    )


def finished(wanted: Plan) -> bool:
    """Whether the bank is there and complete, as its manifest says; its bytes are checked by
    `open_bank`.
    """
    return (wanted.path / MANIFEST).is_file()


def shard_files(wanted: Plan) -> list[Path]:
    """The files that hold, or will hold, the images' features."""
    return [
        wanted.path / f"shard-{number:05d}.safetensors"
        for number in range(-(-wanted.meta["images"] // SHARD))
    ]


def open_or_build(
    wanted: Plan,
    say: Callable[[str], None] = lambda _text: None,
    progress: bool = False,
    anew: bool = False,
) -> FeatureBank:
    """Read the bank, or make it first.

    Args:
        say: takes one line about sizes. progress: a bar with speed and time to go on stderr.
        anew: throw away what is there.

    Raises:
        MismatchError: the bank on disk is damaged or is another one. DataError: it cannot be
            written. NonFiniteError: names image and layer.
    """
    if anew or not finished(wanted):
        from semanticfl_ref.diffusion.extract import build

        build(wanted, say, progress, anew)
    return open_bank(wanted)


def open_bank(wanted: Plan) -> FeatureBank:
    """Read a finished bank after checking every byte of it.

    Raises:
        MismatchError: damaged, or made by something else than its name says. DataError: it is not
            there.
    """
    remedy = wanted.remedy
    manifest = _manifest(wanted.path, remedy)
    if manifest["id"] != wanted.id or canonical(_without_source(manifest["meta"])) != canonical(
        _without_source(wanted.meta)
    ):
        raise MismatchError(
            f"the feature bank {wanted.path} was made from other images, weights or options than its name says; {remedy}"
        )
    files = {
        path.name: _checked(path, manifest["files"].get(path.name), remedy)
        for path in (*shard_files(wanted), wanted.path / TEXT)
    }
    shards = [partial(_read, path) for path in shard_files(wanted)]
    return FeatureBank(
        files[TEXT]["text"], wanted.id, manifest["meta"], shards, dict(manifest["widths"])
    )


def in_memory(
    features: dict[str, torch.Tensor], text: torch.Tensor, id: str, meta: dict
) -> FeatureBank:
    """A bank of tensors: tap -> [N, D]."""
    return FeatureBank(
        text,
        id,
        meta,
        [features.__getitem__],
        {tap: values.shape[1] for tap, values in features.items()},
    )


def _read(path: Path, tap: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(
            tap
        ).clone()  # a copy: else a page of the file, which somebody may delete


def _manifest(path: Path, remedy: str) -> dict:
    """bank.json, its own digest checked."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        recorded = manifest.pop("sha256")
        intact = recorded == digest(manifest) and set(manifest) == {"id", "meta", "widths", "files"}
    except FileNotFoundError:
        raise DataError(f"there is no finished feature bank at {path}; {remedy}") from None
    except OSError as error:
        raise DataError(f"cannot read {path / MANIFEST}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise MismatchError(f"the feature bank {path} is damaged ({MANIFEST}); {remedy}")
    return manifest


def _checked(path: Path, expected: str | None, remedy: str) -> dict[str, torch.Tensor] | None:
    """Every byte of a file of the bank against the manifest; the text's tensors, which are small,
    are returned.
    """
    try:
        tensors, _, recorded = load_tensors(path)
    except Damaged as error:
        raise MismatchError(f"the feature bank's {path} is damaged: {error}; {remedy}") from None
    except DataError as error:
        raise MismatchError(f"the feature bank is damaged: {error}; {remedy}") from None
    if recorded != expected:
        raise MismatchError(
            f"the feature bank's {path} is not the file that was written there; {remedy}"
        )
    return tensors if path.name == TEXT else None


def _without_source(meta: dict) -> dict:
    return {key: value for key, value in meta.items() if key != "source"}
