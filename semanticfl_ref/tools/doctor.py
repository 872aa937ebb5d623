"""Checks that dependencies, data and weights are available and intact for a configuration.

There is no network access, and nothing is written but remembered hashes. Each check stands alone:
a broken part of the installation is a line of the table, not its end.

Letters: B batch, N keys, D feature width, S clients, P size of a flat vector.
"""

import ast
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from semanticfl_ref.config.command_line import shell_command, to_flags
from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.config.resolve import is_embedded
from semanticfl_ref.config.settings import Config, DataSettings
from semanticfl_ref.cores import cores
from semanticfl_ref.errors import DataError, DownloadError, MismatchError, UserError
from semanticfl_ref.formatting import format_bytes
from semanticfl_ref.storage import (
    LOCKS,
    cache_folder,
)

if TYPE_CHECKING:
    from semanticfl_ref.run.setup import RunData

ROOT = Path(__file__).parents[2]
# Without: torch instead of kernels, reports without figures, comparisons without intervals.
OPTIONAL = ("triton", "matplotlib", "scipy")
TOLERANCE = 1e-5  # error of a kernel in fp32 against fp64, relative to the largest entry
WIDEST = 1280  # channels of Stable Diffusion's widest block
MOST_LAYERS = 20  # of diffusion.layers = all
NO_FALLBACK = ("-W", "error:Triton is not used")  # torch would be compared with itself
SELF_TEST = f"from {__name__} import self_test; self_test()"
TIMEOUT = 300  # seconds, of the kernels' self-test


class Finding(NamedTuple):
    """The result of a check. state: "ok", "warn" or "FAIL"; exit_code: 0 unless it failed."""

    item: str
    state: str
    found: str
    exit_code: int = 0


def examine(config: Config, offline: bool) -> Iterator[Finding]:
    """The findings, in the order in which to act on them.

    Args:
        config: configuration of the run to be started.
        offline: whether what a run can download by itself counts as missing.
    """
    without = "" if LOCKS else "; no file locks: one process at a time per run folder and cache"
    found = f"{platform.python_version()} on {platform.platform()}{without}"
    yield Finding("python", "warn" if without else "ok", found)
    for line in [*requirements(), "matplotlib", "scipy"]:
        name = re.match(r"[\w-]+", line)[0]
        yield _check(name, partial(_package, line), needed=name not in OPTIONAL)
    torch = _check("torch imports", lambda: importlib.import_module("torch").__file__)
    yield torch
    if torch.state != "ok":
        return  # the checks below import it

    from semanticfl_ref.diffusion.model_files import fetch_command
    from semanticfl_ref.run.setup import load_data

    source = config.diffusion.source
    data = cache(partial(load_data, config, offline=True))
    sizes = cache(partial(_sizes, config, data))
    anchored = METHODS[config.federation.method].needs_anchors
    yield _check("device", partial(_device, config))
    yield _check("kernels", _kernels)
    yield _check("embedded data", _digits, needed=is_embedded(config))
    yield _check("embedded model", _tiny, needed=anchored and source == "tiny")
    show = shell_command("partition", "show", *to_flags(config))
    downloads = [("data set", partial(_data, data), show)]
    if anchored:
        downloads.append(("weights", partial(_weights, source), fetch_command(source)))
    found = [_check(*each, offline=offline) for each in downloads]
    yield from found
    yield _check("run", partial(_run, sizes))
    yield _check("disk", partial(_disk, config, sizes, anchored))
    missing = ", ".join(finding.item for finding in found if finding.state != "ok")
    told = f"not ready, missing or damaged: {missing}" if missing else "ready: no network needed"
    yield Finding("offline", "warn" if missing else "ok", told)


def requirements() -> list[str]:
    """What the package requires: by setup.py in a checkout, else by the installation's metadata."""
    if not (ROOT / "setup.py").is_file():
        lines = metadata.requires("semanticfl_ref") or []
        return [line for line in lines if "extra ==" not in line]
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(r"install_requires=(\[.*?\])", text, re.DOTALL)[1])


def self_test() -> None:
    """Print the largest error of each kernel in fp32 against fp64, relative to the largest entry.

    On small ragged shapes; on CUDA natively, else interpreted.
    """
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Read when a kernel's module is imported.
    os.environ["TRITON_INTERPRET"] = str(int(device == "cpu"))
    from semanticfl_ref.kernels.group_norm_silu import group_norm_silu
    from semanticfl_ref.kernels.info_nce import info_nce
    from semanticfl_ref.kernels.weighted_average import weighted_average

    inputs = [torch.randn(shape) for shape in ((33, 40), (21, 40), (3, 1001))]

    def results(impl: str, **place) -> dict[str, torch.Tensor]:
        queries_BD, keys_ND, params_SP = (values.to(**place) for values in inputs)
        labels_B = torch.arange(33, device=queries_BD.device) % 21
        loss = info_nce(queries_BD.requires_grad_(), keys_ND, labels_B, impl=impl)
        (gradient_BD,) = torch.autograd.grad(loss, queries_BD)
        average = weighted_average(params_SP, params_SP[:, 0].abs(), impl=impl)
        return {
            "info_nce": loss.detach(),
            "its gradient": gradient_BD,
            "weighted_average": average.values_P,
            "group_norm_silu": group_norm_silu(keys_ND, 4, impl=impl),
        }

    found = results("triton", device=device)
    truth = results("torch", dtype=torch.float64)
    errors = {
        name: float((found[name].cpu() - exact).abs().max() / exact.abs().max())
        for name, exact in truth.items()
    }
    print(json.dumps(errors))


def _check(
    item: str,
    check: Callable[[], str],
    download: str = "",
    *,
    needed: bool = True,
    offline: bool = True,
) -> Finding:
    """What `check` returns, or what it raises: a failure, or a warning if a run does without or may
    download what is missing.
    """
    try:
        return Finding(item, "ok", check())
    except Exception as error:  # a broken installation raises anything
        known = isinstance(error, (UserError, RuntimeWarning))
        found = str(error) if known else f"{type(error).__name__}: {error}"
        if isinstance(error, DownloadError):
            found, needed = f"missing or damaged; download with: {download}", offline
        if not needed or isinstance(error, RuntimeWarning):
            return Finding(item, "warn", found)
        return Finding(item, "FAIL", found, getattr(error, "exit_code", UserError.exit_code))


def _package(line: str) -> str:
    from packaging.requirements import Requirement

    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        return "not needed on this platform"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        raise UserError(f'not installed: pip install "{wanted.name}{wanted.specifier}"') from None
    if not wanted.specifier.contains(version, prereleases=True):
        raise RuntimeWarning(f"{version}: not tested; tested with {wanted.specifier}")
    return version


def _device(config: Config) -> str:
    import torch

    from semanticfl_ref.device import resolve_device, resolve_precision

    device = resolve_device(config.run.device)
    name = f"cpu, cores: {cores()}, threads per client: {config.run.threads or 'default'}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}; clients train in {resolve_precision(config.run.precision, device)}"


def _kernels() -> str:
    """The self-test in a process of its own: whether Triton interprets is decided when it is
    imported, and a broken driver may end the process.
    """
    import torch

    done = subprocess.run(
        [sys.executable, *NO_FALLBACK, "-c", SELF_TEST],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeWarning(f"Triton cannot be used, torch runs instead: {reason}")
    errors = json.loads(done.stdout)
    how = "on the GPU" if torch.cuda.is_available() else "interpreted"
    listed = ", ".join(f"{error:.1e} ({name})" for name, error in errors.items())
    found = f"{how}, relative errors {listed}"
    if not all(error <= TOLERANCE for error in errors.values()):  # NaN is not
        raise MismatchError(
            f"{found}: above {TOLERANCE:g}, the kernels are wrong on this machine; set "
            f"SEMANTICFL_KERNELS=torch and report it"
        )
    return found


def _digits() -> str:
    from semanticfl_ref.data.dataset import load_dataset

    digits = load_dataset(DataSettings(name="digits"))
    return f"intact, {len(digits.train_labels)} training images of digits"


def _tiny() -> str:
    from semanticfl_ref.diffusion.model_files import locate

    locate("tiny")
    return "intact"


def _data(data: "Callable[[], RunData]") -> str:
    dataset = data().dataset
    labels = {"train": dataset.train_labels, "validation": dataset.validation_labels}
    labels["test"] = dataset.test_labels
    images = ", ".join(f"{len(values)} {part}" for part, values in labels.items())
    return f"{dataset.name}: {images} images in {dataset.classes} classes"


def _sizes(config: Config, data: "Callable[[], RunData]") -> dict:
    """The sizes of the run, if its data can be read; the item "data set" tells why not."""
    from semanticfl_ref.run.dry_run import dry_run

    try:
        read = data()
    except UserError:
        raise RuntimeWarning("unknown, since it depends on the data set") from None
    return dry_run(config, read)


def _run(sizes: Callable[[], dict]) -> str:
    return (
        "{clients} clients, {rounds} rounds of {clients_per_round}, steps per round: "
        "{steps_per_round}".format(**sizes())
    )


def _weights(source: str) -> str:
    from semanticfl_ref.diffusion.model_files import fingerprint, locate

    known = cache_folder() / "features" / "weights.json"
    return f"{source}, SHA-256 {fingerprint(locate(source, offline=True), known)[:16]}"


def _disk(config: Config, sizes: Callable[[], dict], anchored: bool) -> str:
    """What the run folder and the cache take at most, against the free space."""
    try:
        run = sizes()
    except UserError:
        raise RuntimeWarning("unknown, since the run cannot start") from None
    line = 2_000 + 24 * (run["clients"] + run["classes"])
    # A checkpoint is complete before the last one goes.
    found = [_space(Path("runs"), 2 * run["checkpoint_bytes"] + run["rounds"] * line)]
    if anchored:
        layers = config.diffusion.layer_names
        width = WIDEST * (MOST_LAYERS if "all" in layers else len(layers))
        need = 2 * run["images"]["train"] * width * config.diffusion.pool**2
        found.append(_space(cache_folder(), need))
    return "; ".join(found)


def _space(place: Path, need: int) -> str:
    parents = (place.absolute() / "new").parents
    free = shutil.disk_usage(next(folder for folder in parents if folder.is_dir())).free
    found = f"{place}: at most {format_bytes(need)} of {format_bytes(free)} free"
    if need > free:
        raise DataError(f"{found}: free some space, or set SEMANTICFL_CACHE to another folder")
    return found
