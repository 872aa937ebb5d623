"""Runs that are killed or interrupted at every write and between, then resumed."""

import signal
import time

import pytest
from campaign.children import (
    RESULTS,
    SMALL,
    Child,
    Done,
    count_writes,
    die,
    die_torn,
    fail_at,
    run,
    same_files,
    start_or_resume,
)

pytestmark = pytest.mark.heavy


def ends_equal(path, whole) -> str:
    """Resume to the end, and compare."""
    done = run(start_or_resume(path))
    if done.code != 0:
        return "hang" if done.code is None else "traceback"
    names = (*RESULTS, "config.toml", "partition.json", "anchors.json", "identity.json")
    same = same_files(path, whole, names)
    parts = [p.name for p in path.iterdir() if p.suffix == ".part"]
    return "equal" if same and not parts else "differs"


@pytest.mark.parametrize("way", [die, die_torn])
def test_killed_at_every_write(tmp_path, whole, tally, way):
    """At each flush and each rename of a run in turn: before it, or with half of it on disk."""
    row = tally(f"kill at a write, {'torn' if way is die_torn else 'not made'}")
    writes = count_writes(["train", *SMALL, "--out", str(tmp_path / "counted")])
    for number in range(writes):
        path = tmp_path / str(number) / "run"
        path.parent.mkdir()
        done = run(start_or_resume(path), fail_at(number, way))
        assert done.code == -signal.SIGKILL, done
        row.add(ends_equal(path, whole), f"write {number}: {done.told[-300:]}")
    row.check(20)


def test_killed_at_every_write_of_a_resumed_run(tmp_path, whole, tally):
    """The run is killed again and again, each time one write later than before."""
    row, path = tally("a run killed at forty writes in turn"), tmp_path / "run"
    number, kills = 9, 0
    while True:
        done = run(start_or_resume(path), fail_at(number, die_torn))
        if done.code == 0:
            break
        number = 1 + number % 13  # six writes come before the first round
        assert done.code == -signal.SIGKILL, done
        kills += 1
    row.add(ends_equal(path, whole), f"after {kills} kills")
    assert kills >= 40
    row.check(1)


def length_of_a_run(tmp_path) -> float:
    began = time.monotonic()
    assert run(["train", *SMALL, "--out", str(tmp_path / "timed")]).code == 0
    return time.monotonic() - began


def test_killed_at_random_moments(tmp_path, whole, tally, scale, chance):
    row, length = tally("kill at a random moment"), length_of_a_run(tmp_path)
    for trial in range(int(40 * scale)):
        path = tmp_path / str(trial) / "run"
        path.parent.mkdir()
        moment = chance.random() * length
        Child(start_or_resume(path)).end(moment)
        row.add(ends_equal(path, whole), f"after {moment:.3f} s")
    row.check(20)


def interrupted(done: Done, code: int) -> bool:
    """The signal came before the command handles it, or while it ran, or after its end."""
    return done.code in (0, code) and "Traceback" not in done.told


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_random_moments(tmp_path, whole, tally, scale, chance, sent, code):
    """And then a second time, in the message or the saving."""
    row, length = (
        tally(f"{signal.Signals(sent).name} at a random moment"),
        length_of_a_run(tmp_path),
    )
    for trial in range(int(20 * scale)):
        path = tmp_path / str(trial) / "run"
        path.parent.mkdir()
        child, moment = Child(start_or_resume(path)), 0.02 + chance.random() * length
        done = child.end(moment, sent)
        good = interrupted(done, code)
        row.add(ends_equal(path, whole) if good else "traceback", f"{moment:.3f}: {done}")
    row.check(20)
