"""Full-size archives in CIFAR-10's format, 60 000 images: time and peak memory of reading them."""

import pickle
import subprocess
import sys

import pytest
from synthetic_archives import cifar_members, python_2_pickle, sha256, tar_gz

CHILD = """
import re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from semanticfl_ref.config.settings import DataSettings
from semanticfl_ref.data.dataset import load_dataset

def peak():  # MiB; ru_maxrss would count what the parent held when it forked
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

folder, digest, share = sys.argv[1:]
settings = DataSettings(
    name="cifar10", dir=folder, sha256=digest, validation_share=float(share)
)
before = peak()
began = time.perf_counter()
d = load_dataset(settings)
seconds = time.perf_counter() - began
assert len(d.train_labels) + len(d.validation_labels) == 50000 and len(d.test_labels) == 10000
print(seconds, before, peak())
"""


def python_3_pickle(rows, labels) -> bytes:
    """Protocol 2, the largest: every byte above 127 takes two."""
    filenames = [b"image_s_%06d.png" % i for i in range(len(rows))]
    values = {b"data": rows, b"labels": labels, b"filenames": filenames}
    return pickle.dumps(values, protocol=2)


@pytest.mark.heavy
@pytest.mark.parametrize("dump", [python_2_pickle, python_3_pickle])
def test_sixty_thousand_images(tmp_path, dump):
    content = tar_gz(cifar_members(10_000, dump=dump))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    for share in ("0", "0.1"):
        command = [sys.executable, "-c", CHILD, str(tmp_path), sha256(content), share]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, before, peak = map(float, done.stdout.split())
        print(
            f"{len(content) / 1e6:.0f} MB archive, validation share {share}: {seconds:.1f} s, "
            f"peak {peak:.0f} MiB, of which {before:.0f} MiB before reading"
        )
        assert peak - before < 900
        assert seconds < 60
