"""Make the embedded digits again from scikit-learn's copy of the UCI digits.

    python scripts/make_digits.py [FILE]

Needs scikit-learn. Prints the file's SHA-256, which `semanticfl_ref.data.digits.SHA256` must equal.
"""

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "semanticfl_ref" / "data" / "assets" / "digits.safetensors"
ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning "
    "Repository, 1998, doi 10.24432/C50P49, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). The 1797 images of the test file as "
    "scikit-learn ships them; changed only in how they are stored."
)


def main(path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    masks = torch.from_numpy(digits.images).to(torch.uint8)
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    assert masks.shape == (1797, 8, 8) and int(masks.max()) == 16
    assert labels.shape == (1797,)
    content = save({"masks": masks, "labels": labels}, metadata={"attribution": ATTRIBUTION})
    path.write_bytes(content)
    print(f"{path}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
