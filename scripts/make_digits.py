"""Re-make `assets/digits.safetensors` from scikit-learn's copy of the UCI digits: `python -m
semanticfl_ref.data.make_digits [FILE]`.

Needs scikit-learn, which nothing else here does. Prints the file's SHA-256, which
`sources.DIGITS_SHA256` must equal."""

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from semanticfl_ref.data.dataset import DIGITS_FILE

ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi 10.24432/C50P49, "
    "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). The 1797 images of the test file as scikit-learn ships them; "
    "changed only in how they are stored."
)


def main(path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    masks, labels = (
        torch.from_numpy(digits.images).to(torch.uint8),
        torch.from_numpy(digits.target).to(torch.uint8),
    )
    assert masks.shape == (1797, 8, 8) and int(masks.max()) == 16 and labels.shape == (1797,)
    content = save({"masks": masks, "labels": labels}, metadata={"attribution": ATTRIBUTION})
    path.write_bytes(content)
    print(f"{path}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DIGITS_FILE)
