"""A full-size archive in CIFAR-10's format, 60 000 images: time and peak memory of reading it."""

import subprocess
import sys

import pytest
from synthetic_archives import cifar_members, sha256, tar_gz

CHILD = """
import re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from semanticfl_ref.data.dataset import load_dataset
def peak():  # MiB; ru_maxrss would count what the parent held when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
began = time.perf_counter()
d = load_dataset("cifar10", data_dir=Path(sys.argv[1]), data_sha256=sys.argv[2], validation_share=float(sys.argv[3]))
seconds = time.perf_counter() - began
assert len(d.train_labels) + len(d.validation_labels) == 50000 and len(d.test_labels) == 10000
print(seconds, before, peak())
"""


@pytest.mark.heavy
def test_sixty_thousand_images(tmp_path):
    content = tar_gz(cifar_members(10_000))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    for share in ("0", "0.1"):
        out = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), sha256(content), share],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        seconds, before, peak = map(float, out.split())
        print(
            f"{len(content) / 1e6:.0f} MB archive, validation share {share}: {seconds:.1f} s, peak {peak:.0f} MiB, of which {before:.0f} MiB before reading"
        )
        assert peak - before < 900 and seconds < 60
