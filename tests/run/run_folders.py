"""What several tests of run folders need."""

import json
from pathlib import Path

RESULTS = ("checkpoint.safetensors", "metrics.jsonl")


def assert_same_results(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    parts = [p.name for p in other.iterdir() if p.suffix in (".tmp", ".part")]
    assert not parts, f"half-written files are left: {parts}"


def start_or_resume(run: Path, job: list[str]) -> list[str]:
    """Arguments that start the run, or resume it once its folder is there."""
    return ["train", "--resume", str(run)] if run.exists() else ["train", *job, "--out", str(run)]


def lines_in(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
