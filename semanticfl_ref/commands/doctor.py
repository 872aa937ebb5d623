"""`doctor`: whether everything that a run with these settings needs is here and intact. Opens no
connection, writes nothing but remembered digests.

Each check stands alone, so that a broken part of the installation is a line of the table, not its
end."""

import ast
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.config.settings import Config
from semanticfl_ref.errors import DataError, DownloadError, MismatchError, UserError
from semanticfl_ref.config.resolve import is_embedded
from semanticfl_ref.formatting import format_bytes as size

HELP = "whether all that a run needs is here: versions, device, kernels, data, weights, disk; takes train's settings"
ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "triton",
    "matplotlib",
)  # without them torch's own kernels run, and reports have no pictures
TOLERANCE = 1e-5  # of a kernel in fp32 against fp64, relative to the largest entry
WIDEST = 1280  # channels of Stable Diffusion's widest block
PATIENCE = 300  # seconds for the kernels' self-test


class Finding(NamedTuple):
    """One line of the table. state: "ok", "warn" or "FAIL"; exit_code is 0 unless it failed."""

    item: str
    state: str
    found: str
    exit_code: int = 0


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv)


def run(arguments) -> int:
    settings = settings_of(arguments)
    say("looking; this takes some seconds ...")
    findings = list(examine(settings, arguments.offline))
    code = next((finding.exit_code for finding in findings if finding.state == "FAIL"), 0)
    show(
        {
            "ready": code == 0,
            "exit_code": code,
            "checks": [finding._asdict() for finding in findings],
        },
        arguments.json,
        words,
    )
    return code


def words(document: dict) -> str:
    """The table, and what it comes to."""
    failed = [check["item"] for check in document["checks"] if check["state"] == "FAIL"]
    lines = [
        f"{check['state']:<4}  {check['item']:<15}  {' '.join(check['found'].split())}"
        for check in document["checks"]
    ]
    return "\n".join([*lines, "", f"not ready: {', '.join(failed)}" if failed else "ready"])


def examine(config: Config, offline: bool) -> Iterator[Finding]:
    """Every finding, in the order in which a remedy makes sense. Without --offline, what a run can
    fetch by itself is no failure.
    """
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for line in [*requirements(), "matplotlib"]:
        name = re.match(r"[\w-]+", line)[0]
        yield _look(name, lambda line=line: _package(line), name not in OPTIONAL)
    torch = _look("torch imports", lambda: f"{importlib.import_module('torch').__file__}")
    yield torch
    if torch.state != "ok":
        return  # everything below needs it
    from semanticfl_ref.data.dataset import load_dataset
    from semanticfl_ref.federated.methods import METHODS

    anchored, sizes = METHODS[config.federation.method].needs_anchors, {}
    yield _look("device", lambda: _device(config))
    yield _look("kernels", _kernels)
    yield _look(
        "embedded data",
        lambda: f"intact, {len(load_dataset('digits').train_labels)} digits to train on",
        is_embedded(config),
    )
    yield _look("embedded model", _tiny, anchored and config.diffusion.source == "tiny")
    fetched = [_look("data set", lambda: _data(config, sizes), True, offline)] + [
        _look("weights", lambda: _weights(config), True, offline)
    ] * anchored
    yield from fetched
    yield _look("disk", lambda: _disk(config, sizes, anchored))
    missing = [finding.item for finding in fetched if finding.state != "ok"]
    yield Finding(
        "offline",
        "warn" if missing else "ok",
        f"not ready, for want of: {', '.join(missing)}"
        if missing
        else "ready: a run needs no network",
    )


def requirements() -> list[str]:
    """What the package needs: by setup.py in a checkout, by the installation's metadata elsewhere."""
    from importlib import metadata

    if not (ROOT / "setup.py").is_file():
        return [
            line for line in metadata.requires("semanticfl_ref") or [] if "extra ==" not in line
        ]
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )


def self_test() -> None:
    """Both kernels on small ragged shapes against fp64; prints the largest error of each, relative
    to the largest entry. On CUDA natively, else interpreted.
    """
    import warnings

    import torch

    from semanticfl_ref.kernels.info_nce import info_nce
    from semanticfl_ref.kernels.weighted_average import weighted_average
    from semanticfl_ref.randomness import generator

    def contrast(queries, keys, impl):
        loss = info_nce(queries.requires_grad_(), keys, impl=impl)
        return torch.cat(
            [loss.detach().reshape(1), torch.autograd.grad(loss, queries)[0].flatten()]
        )

    warnings.filterwarnings("error", "Triton is not used")  # torch would be compared with itself
    device, source, errors = (
        "cuda" if torch.cuda.is_available() else "cpu",
        generator(0, "doctor"),
        {},
    )
    for name, kernel, shapes in (
        ("info_nce", contrast, ((33, 40), (33, 40))),
        ("weighted_average", weighted_average, ((3, 1001), (3,))),
    ):
        inputs = [torch.rand(shape, generator=source) for shape in shapes]
        truth = kernel(*(values.double() for values in inputs), impl="torch")
        errors[name] = float(
            (
                kernel(*(values.to(device) for values in inputs), impl="triton").double().cpu()
                - truth
            )
            .abs()
            .max()
            / truth.abs().max()
        )
    print(json.dumps(errors))


def _look(item: str, look: Callable[[], str], needed: bool = True, offline: bool = True) -> Finding:
    """What `look` returns, or what it raises as a failure; a warning where this run does without,
    or may still fetch what is missing.
    """
    try:
        return Finding(item, "ok", look())
    except RuntimeWarning as warning:
        return Finding(item, "warn", str(warning))
    except UserError as error:
        found, code = str(error), error.exit_code
        needed = needed and (offline or not isinstance(error, DownloadError))
    except Exception as error:  # a broken installation raises anything; the table goes on
        found, code = f"{type(error).__name__}: {error}", UserError.exit_code
    return Finding(item, "FAIL", found, code) if needed else Finding(item, "warn", found)


def _package(line: str) -> str:
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        return "not needed on this platform"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        raise UserError(f'not installed: pip install "{wanted.name}{wanted.specifier}"') from None
    if not wanted.specifier.contains(version, prereleases=True):
        raise RuntimeWarning(f"{version}: tested is {wanted.specifier}")
    return version


def _device(config: Config) -> str:
    import torch

    from semanticfl_ref.federated.context import device_for, precision_for

    device = device_for(config.run.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {config.run.threads or torch.get_num_threads()} threads"
    )
    return f"{name}; clients train in {precision_for(config.run.precision, device)}"


def _kernels() -> str:
    """The self-test in a process of its own: Triton's interpreter is settled when it is imported,
    and a bad driver may take the process along.
    """
    import subprocess

    import torch

    native = torch.cuda.is_available()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-c",
        "from semanticfl_ref.commands.doctor import self_test; self_test()",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": str(int(not native)), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        raise RuntimeWarning(
            f"Triton cannot be used, torch's implementation runs instead: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
    errors = json.loads(done.stdout)
    told = f"{'on the GPU' if native else 'interpreted'}, off fp64 by {', '.join(f'{error:.1e} ({name})' for name, error in errors.items())}"
    if not max(errors.values()) <= TOLERANCE:  # NaN fails too
        raise MismatchError(
            f"{told}: more than {TOLERANCE:g}; set SEMANTICFL_KERNELS=torch and report it"
        )
    return told


def _tiny() -> str:
    from semanticfl_ref.diffusion import model_files as weights

    if weights.fingerprint(weights.locate("tiny")) != weights.TINY_SHA256:
        raise DataError(
            f"the small model at {weights.TINY} is damaged, or was made rebuild: install the package again"
        )
    return "intact, every byte"


def _data(config: Config, sizes: dict) -> str:
    """Reads the data set; puts the run's sizes into `sizes`."""
    from semanticfl_ref.run import setup as prepare

    try:
        sizes |= prepare.dry_run(config)
    except DownloadError:
        raise DownloadError(
            f"{config.data.name} is not here, or damaged; fetch it: python -m semanticfl_ref partition show --dataset {config.data.name}"
        ) from None
    return f"{config.data.name}: {', '.join(f'{count} {part}' for part, count in sizes['images'].items())} images in {sizes['classes']} classes"


def _weights(config: Config) -> str:
    from semanticfl_ref.data.download import cache_folder
    from semanticfl_ref.diffusion import model_files as weights

    source = config.diffusion.source
    try:
        folder = weights.locate(source, offline=True)
    except DownloadError:
        raise DownloadError(
            f"{source} is not here, or a part of it; fetch it: {weights.fetch_command(source)}"
        ) from None
    return f"{source}, sha256 {weights.fingerprint(folder, cache_folder() / 'caches' / 'weights.json')[:16]}"


def _disk(config: Config, sizes: dict, anchored: bool) -> str:
    """What the run folder and the cache will take at most, against what is free where they go."""
    from semanticfl_ref.data.download import cache_folder

    if not sizes:
        raise RuntimeWarning("what a run takes is not known without its data set")
    line = 2_000 + 24 * (sizes["clients"] + sizes["classes"])
    needs = {
        Path("runs"): 2 * sizes["checkpoint_bytes"] + sizes["rounds"] * line
    }  # a checkpoint stands beside the next one for a moment
    if anchored:
        layers = 20 if "all" in config.diffusion.layers else config.diffusion.layers.count(",") + 1
        needs[cache_folder()] = (
            2 * sizes["images"]["train"] * layers * WIDEST * config.diffusion.pool**2
        )
    free = {
        place: shutil.disk_usage(
            next(above for above in (place.absolute(), *place.absolute().parents) if above.is_dir())
        ).free
        for place in needs
    }
    told = "; ".join(
        f"{place}: at most {size(needs[place])} of {size(free[place])} free" for place in needs
    )
    if any(needs[place] > free[place] for place in needs):
        raise DataError(f"{told}: free some space, or set SEMANTICFL_CACHE to another place")
    return told
