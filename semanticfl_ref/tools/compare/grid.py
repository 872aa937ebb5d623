"""The runs of a comparison: arms x scenarios x seeds, each a `train` of its own; finished ones are
reused, killed ones go on.

All runs of one seed share the split, the clients of every round, the initial weights and the order
of batches, since each is drawn from (seed, purpose, round, client, epoch): an arm's numbers do not
depend on which others stand beside it."""

import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from semanticfl_ref.config.settings import Config
from semanticfl_ref.config.settings import settings as configuration
from semanticfl_ref.errors import MismatchError, UserError
from semanticfl_ref.run.folder import RunFolder, read_config

SHORT = {
    "nid1": "partition.alpha",
    "quantity": "partition.alpha",
    "pathological": "partition.classes_per_client",
}  # what x is in `nid1:x`


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the grid: which cell it belongs to, its configuration and its folder."""

    scenario: str
    arm: str
    seed: int
    config: Config
    folder: Path


def split(text: str) -> list[str]:
    """The items of a list that is separated by commas; commas in brackets separate nothing."""
    return [item.strip() for item in re.split(r",(?![^\[]*\])", text) if item.strip()]


def arm_settings(text: str) -> dict[str, str]:
    """The settings of an arm, `method` or `method[section.field=value;...]`."""
    name, assignments = _bracketed(text)
    return {"federation.method": name, **assignments}


def scenario_settings(text: str) -> dict[str, object]:
    """The settings of a scenario, `name`, `name:x` (nid1:0.1 is alpha 0.1) or
    `name[section.field=value;...]`.
    """
    name, assignments = _bracketed(text)
    name, colon, value = name.partition(":")
    if colon and name not in SHORT:
        raise UserError(
            f"scenario {text!r}: {name!r} takes no number; write one of {', '.join(f'{n}:x' for n in SHORT)}, or {name}[partition.field=value]"
        )
    return {
        "partition.scenario": name,
        **({"partition.clients": 6} if name == "nid2" else {}),
        **({SHORT[name]: value} if colon else {}),
        **assignments,
    }


def plan(
    arms: list[str],
    scenarios: list[str],
    seeds: int,
    settle: Callable[[dict[str, object]], Config],
    out: Path,
) -> list[Job]:
    """The jobs of a grid, seed by seed, so that an interrupted grid has whole seeds.

    Args:
        settle: makes a Config of settings that a cell adds to the user's own.
        out: folder of the comparison; runs lie in its `runs/`.

    Raises:
        UserError: one run twice or two whose folders have one name, or whatever a configuration is
            refused for.
    """
    jobs = [
        Job(
            scenario=scenario,
            arm=arm,
            seed=seed,
            config=made,
            folder=out
            / "runs"
            / f"{_slug(arm)}-{_slug(scenario)}-{made.federation.rounds}-seed{seed}",
        )
        for seed in range(seeds)
        for scenario in scenarios
        for arm in arms
        for made in [settle({**scenario_settings(scenario), **arm_settings(arm), "run.seed": seed})]
    ]
    for folder, count in Counter(job.folder for job in jobs).items():
        if count > 1:
            raise UserError(
                f"the run {folder} stands twice: {' and '.join(f'{job.arm}, {job.scenario}' for job in jobs if job.folder == folder)}"
            )
    return jobs


def run(jobs: list[Job], *, workers: int, offline: bool, methods: list[Path]) -> None:
    """Train what is not finished, `workers` runs at a time.

    Args:
        methods: files of methods from outside the package, see `--import`.

    Raises:
        MismatchError: a finished or begun run was made with other settings. UserError: runs failed;
            it has the first one's exit code and their last words.
        KeyboardInterrupt: when the runs have saved what they have.
    """
    left = [job for job in jobs if not _finished(job)]
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(left), desc="runs", unit="run", file=sys.stderr
    )
    failed, children = [], []

    def one(job: Job) -> None:
        if not failed:
            try:
                _train(job, offline, methods, started)
                bar.update()
            except UserError as error:
                failed.append(error)

    def started(child: subprocess.Popen) -> None:
        children.append(child)
        if failed:  # meanwhile
            child.send_signal(signal.SIGINT)

    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(one, left))
        except KeyboardInterrupt:
            failed.append(UserError("interrupted"))  # nothing more is started
            for child in children[:]:
                child.send_signal(signal.SIGINT)  # it saves, and ends
            raise KeyboardInterrupt(
                "interrupted; finished runs are kept and begun ones go on: give the same command again"
            ) from None
    if failed:
        failed[0].args = ("; and ".join(map(str, failed)),)
        raise failed[0]


def _finished(job: Job) -> bool:
    """Whether a job's run is there and done; raises MismatchError where it is another run."""
    if not job.folder.exists():
        return False
    there, here = (
        configuration.to_flat(read_config(job.folder, "--out")),
        configuration.to_flat(job.config),
    )
    differing = [
        f"{name} = {there.get(name)!r} there, {here[name]!r} here"
        for name in here
        if there.get(name) != here[name]
    ]
    if differing:
        raise MismatchError(
            f"{job.folder} was made with other settings: {'; '.join(differing[:4])}. Choose another --out, or delete it"
        )
    return RunFolder(job.folder).finished


def _train(
    job: Job, offline: bool, methods: list[Path], started: Callable[[subprocess.Popen], None]
) -> None:
    command = [
        sys.executable,
        "-m",
        "semanticfl_ref",
        "train",
        *(f"--import={file}" for file in methods),
        *(["--offline"] if offline else []),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "config.toml"
        settings.write_text(configuration.to_toml(job.config), encoding="utf-8")
        place = (
            ["--resume", str(job.folder)]
            if job.folder.exists()
            else ["--config", str(settings), "--out", str(job.folder)]
        )
        # A process group of its own: Ctrl-C at a terminal reaches it once, through `run`.
        child = subprocess.Popen(
            [*command, *place],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        started(child)
        words = (child.communicate()[1].strip().splitlines() or ["no message"])[-1].removeprefix(
            "semanticfl_ref: error: "
        )
    if child.returncode:
        words = (
            f"killed by signal {-child.returncode}" if child.returncode < 0 else words
        )  # whose last words are a progress bar
        error = UserError(f"the run {job.arm}, {job.scenario}, seed {job.seed} failed: {words}")
        error.exit_code = max(child.returncode, 1)
        raise error


def _bracketed(text: str) -> tuple[str, dict[str, str]]:
    whole = re.fullmatch(r"([^\[\]]+?)(?:\[([^\[\]]*)\])?", text)
    if not whole:
        raise UserError(f"{text!r}: expected name or name[section.field=value;section.field=value]")
    assignments = {}
    for item in filter(None, (whole[2] or "").split(";")):
        name, sign, value = item.partition("=")
        if not sign:
            raise UserError(f"{text!r}: {item!r} is no assignment; write name[section.field=value]")
        assignments[name.strip()] = value.strip()
    return whole[1].strip(), assignments


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
