"""A run from end to end: data set -> partition -> anchors -> rounds -> summary, and the run folder
beside it.

Letters: M clients in all, C classes, N images.
"""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from semanticfl_ref import __version__
from semanticfl_ref.config import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.evaluation import confusion
from semanticfl_ref.federated.flat import load_row
from semanticfl_ref.federated.round import play_round
from semanticfl_ref.federated.state import FederatedState, load_checkpoint, save_checkpoint
from semanticfl_ref.federated.world import World, make_world, new_state
from semanticfl_ref.prepare import build_anchors, identity_of, load_data, provenance_of
from semanticfl_ref.report.folder import RunFolder
from semanticfl_ref.report.metrics import summarise
from semanticfl_ref.report.tables import is_embedded


def train(
    config: Config, *, out: Path, resume: bool, offline: bool, say: Callable[[str], None]
) -> dict:
    """Run, or go on with, a whole training.

    Args:
        out: run folder; made here, or with `resume` the one to go on in.
        offline: open no connection.
        say: takes one line of progress.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: and its kinds, see `errors.py`; before the first round nothing is left on the
            disk.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    dataset, partition, held = load_data(config, offline)
    say(
        f"{len(dataset.train_labels)} images over {len(partition.sizes)} clients, {min(partition.sizes)} to {max(partition.sizes)} each, skew {partition.skew:.2f}"
    )
    anchors = build_anchors(config, dataset, partition, held, offline, say)
    world = make_world(config, dataset, partition, anchors)
    identity = identity_of(config, dataset, partition, anchors)
    environment = environment_of(world)
    if resume:
        folder = RunFolder(out)
        _note_changes(folder.read("environment.json"), environment, say)
        state = (
            _on_device(load_checkpoint(folder.checkpoint, identity), world)
            if folder.checkpoint.exists()
            else new_state(world)
        )
        folder.cut_back(state.round)
        say(f"going on after round {state.round} in {out}")
    else:
        split = {
            **partition.manifest(),
            "dataset_sha256": dataset.sha256,
            "class_names": list(dataset.class_names),
        }
        about = {
            "environment.json": environment,
            "partition.json": split,
            "anchors.json": provenance_of(config, anchors),
        }
        folder, state = RunFolder.create(out, config, about), new_state(world)
    state = play(world, state, folder, identity)
    load_row(world.model, state.row)  # a resume may have had no round left to play
    summary = summarise(
        folder.rows(),
        folder.seconds(),
        {**_about(config, folder, anchors), "confusion": confusion(world.model, world)},
    )
    folder.finish(summary)
    return summary


def play(world: World, state: FederatedState, folder: RunFolder, identity: dict) -> FederatedState:
    """The rounds that are left, each followed by its line of metrics and, as configured, a
    checkpoint.
    """
    rounds, every = world.config.federation.rounds, world.config.run.checkpoint_every
    bar = tqdm(
        total=rounds,
        initial=state.round,
        desc=world.config.federation.method,
        unit="round",
        file=sys.stderr,
    )
    try:
        with bar:
            while state.round < rounds:
                started = time.perf_counter()
                following, metrics = play_round(state, world)
                folder.append(metrics, time.perf_counter() - started)
                state = following
                if state.round % every == 0 or state.round == rounds:
                    save_checkpoint(folder.checkpoint, state, identity)
                bar.set_postfix(
                    accuracy=f"{metrics['test_accuracy']:.1%}",
                    loss=f"{metrics['loss']:.3f}",
                    refresh=False,
                )
                bar.update()
    except KeyboardInterrupt:
        save_checkpoint(folder.checkpoint, state, identity)
        raise KeyboardInterrupt(
            f"interrupted after round {state.round} of {rounds}, saved; go on with: python -m semanticfl_ref train --resume {folder.path}"
        ) from None
    return state


def environment_of(world: World) -> dict:
    """Versions and machine, for environment.json."""
    versions = {
        name: _version(name)
        for name in ("torch", "diffusers", "transformers", "numpy", "safetensors")
    }
    return {
        "semanticfl_ref": __version__,
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else "cpu",
        "precision": world.precision,
    }


def _on_device(state: FederatedState, world: World) -> FederatedState:
    return replace(
        state, row=state.row.to(world.device), batch_norm=state.batch_norm.to(world.device)
    )


def _note_changes(before: dict, now: dict, say: Callable[[str], None]) -> None:
    changed = [
        k
        for k in ("versions", "threads", "device", "precision", "platform")
        if before.get(k) != now[k]
    ]
    if changed:
        say(
            f"note: {', '.join(changed)} changed since the run began, so it may not go on bit for bit"
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _about(config: Config, folder: RunFolder, anchors: Anchors | None) -> dict:
    warnings = []
    if anchors is not None and config.diffusion.source == "tiny" and not is_embedded(config):
        warnings.append(
            f"anchors for {config.data.name} came from the embedded model, which knows digits alone: a stand-in for a dry run, "
            f"not the paper's setting; give --sd a Stable Diffusion"
        )
    about = {
        "dataset": config.data.name,
        "method": config.federation.method,
        "seed": config.run.seed,
        "folder": str(folder.path),
    }
    return {**about, "anchors": provenance_of(config, anchors), "warnings": warnings}
