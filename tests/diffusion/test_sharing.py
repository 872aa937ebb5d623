"""Several processes at one cache: they share its shards, one is killed, one rebuilds while others
read. Real processes, forked.
"""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from cache_files import contents, same

from semanticfl_ref.diffusion import extract
from semanticfl_ref.diffusion.backbone import Backbone
from semanticfl_ref.diffusion.extract import build_cache, complete_files
from semanticfl_ref.diffusion.feature_cache import open_cache

FORK = multiprocessing.get_context("fork")
SECONDS = 60  # after which a process that hangs fails the test


def forked(target, *arguments):
    """A process that calls a function, on one thread."""

    def call():
        torch.set_num_threads(1)
        target(*arguments)

    process = FORK.Process(target=call, daemon=True)
    process.start()
    return process


def ended(process) -> int:
    process.join(SECONDS)
    return process.exitcode


@pytest.fixture
def by_one(plan_for, tmp_path):
    """The plan of a cache that one process has built, on one thread."""
    plan = plan_for(tmp_path / "one")
    assert ended(forked(build_cache, plan, print)) == 0
    return plan


def build_at_once(plan, barrier, written, rebuild):
    """Build; the first shard is started when all processes have claimed one."""
    real, write = Backbone.start, extract._Shards._write
    waited = []

    def start(self, *arguments, **options):
        if not waited:
            waited.append(barrier.wait(SECONDS))
        return real(self, *arguments, **options)

    def count(self, file, *arguments):
        written.put((os.getpid(), file.name))
        write(self, file, *arguments)

    Backbone.start, extract._Shards._write = start, count
    build_cache(plan, lambda text: None, rebuild=rebuild)


@pytest.mark.parametrize(("processes", "rebuild"), [(2, False), (3, False), (2, True)])
def test_processes_share_the_shards(by_one, plan_for, tmp_path, processes, rebuild):
    """Each shard is made once, each process makes some, and the bytes are those of one process."""
    plan, written = plan_for(tmp_path / "many"), FORK.Queue()
    barrier = FORK.Barrier(processes)
    if rebuild:
        shutil.copytree(by_one.path, plan.path)
    everyone = [forked(build_at_once, plan, barrier, written, rebuild) for _ in range(processes)]
    assert [ended(process) for process in everyone] == [0] * processes
    made = [written.get(timeout=SECONDS) for _ in plan.shards]
    assert written.empty() and len({name for _, name in made}) == len(plan.shards)
    assert {pid for pid, _ in made} == {process.pid for process in everyone}
    assert contents(plan.path) == contents(by_one.path)
    assert [folder.name for folder in plan.path.parent.glob("features-*")] == [plan.path.name]


def stop_at_the_first_shard(plan, claimed):
    def start(*_arguments, **_options):
        claimed.set()
        time.sleep(SECONDS)

    Backbone.start = start
    build_cache(plan, lambda text: None)


def build_and_tell(plan, said):
    build_cache(plan, said.put)


def test_the_shard_of_a_killed_process_is_made_by_another(by_one, plan_for, tmp_path):
    plan, claimed, said = plan_for(tmp_path / "killed"), FORK.Event(), FORK.Queue()
    first = forked(stop_at_the_first_shard, plan, claimed)
    assert claimed.wait(SECONDS)
    second = forked(build_and_tell, plan, said)
    while "waiting for other processes that make 1 of the shards" not in said.get(timeout=SECONDS):
        pass
    assert len(complete_files(plan)) == len(plan.files) - 1 and not plan.complete
    os.kill(first.pid, signal.SIGKILL)
    assert ended(second) == 0 and ended(first) == -signal.SIGKILL
    assert contents(plan.path) == contents(by_one.path)


def read_on_and_on(plan, expected, stop, results):
    count = 0
    try:
        while not stop.is_set():
            assert same(open_cache(plan), expected)
            count += 1
    except BaseException as error:
        results.put(repr(error))
        raise
    results.put(count)


def test_readers_beside_a_rebuild_notice_nothing(by_one):
    stop, results = FORK.Event(), FORK.Queue()
    expected = open_cache(by_one)
    readers = [forked(read_on_and_on, by_one, expected, stop, results) for _ in range(2)]
    before = (by_one.path / "manifest.json").stat().st_ino
    for _ in range(2):
        assert ended(forked(build_rebuilt, by_one)) == 0
    stop.set()
    counts = [results.get(timeout=SECONDS) for _ in readers]
    assert all(isinstance(count, int) and count > 5 for count in counts), counts
    assert (by_one.path / "manifest.json").stat().st_ino != before
    assert same(open_cache(by_one), expected)


def build_rebuilt(plan):
    build_cache(plan, lambda text: None, rebuild=True)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("rebuild", [False, True])
def test_killed_while_files_are_exchanged(built, copied, monkeypatch, rebuild):
    """At each rename in turn; what is built after it has the same bytes."""
    real, left = os.replace, []

    def replace(source, target):
        if Path(target).parent == copied.path:
            left.append(left.pop() - 1)
            if left[0] < 0:
                raise Killed
        return real(source, target)

    for place in range(len(copied.files) + 1):
        left[:] = [place]
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                build_cache(copied, lambda text: None, rebuild=True)
        assert not copied.complete
        build_cache(copied, lambda text: None, rebuild=rebuild)
        assert contents(copied.path) == contents(built.path)
