"""Streams that fail, disks that are full: what is lost is what could not be told or kept."""

import errno
import os
from itertools import product

import pytest
from campaign.children import SMALL, classified, count_writes, fail_at, full, run, same_files

pytestmark = pytest.mark.heavy


def broken(descriptor: int, how: str) -> None:
    """In a child: a stream whose reader is gone, that is closed, or that is on a full disk."""
    if how == "closed":
        os.close(descriptor)
        return
    if how == "full":
        other = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, other = os.pipe()
        os.close(reading)
    os.dup2(other, descriptor)
    os.close(other)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_streams(tmp_path, whole, tally):
    """Training, checkpoint and exit code are what they would have been."""
    row, ways = tally("failing stdout and stderr"), ("whole", "gone", "closed", "full")
    cases = [case for case in product(ways, ways) if case != ("whole", "whole")]
    for k, (out, told) in enumerate(cases):

        def prepare(out=out, told=told) -> None:
            for descriptor, how in ((1, out), (2, told)):
                if how != "whole":
                    broken(descriptor, how)

        path = tmp_path / f"run{k}"
        done = run(["train", *SMALL, "--json", "--out", str(path)], prepare)
        same = done.code == 0 and same_files(path, whole) and (path / "summary.json").exists()
        row.add("equal" if same else "differs", f"{out}, {told}: {done}")
    row.check(15)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_write_fails(tmp_path, whole, tally, number):
    """Exit 3 names a file of the run; what was saved survives, and a resume ends equal."""
    row = tally("a write that fails, then a resume")
    for k in range(count_writes(["train", *SMALL, "--out", str(tmp_path / "counted")])):
        path = tmp_path / str(k) / "run"
        path.parent.mkdir()
        done = run(["train", *SMALL, "--out", str(path)], fail_at(k, full(number)))
        kind = classified(done, False, str(path))
        if kind == "named":
            again = ["--resume", str(path)] if path.exists() else [*SMALL, "--out", str(path)]
            resumed = run(["train", *again])
            kind = "equal" if resumed.code == 0 and same_files(path, whole) else "differs"
        row.add(kind, f"write {k}, {os.strerror(number)}: {done.told[-300:]}")
    row.check(20)
