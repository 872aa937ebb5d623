"""What the embedded model knows of the embedded data set: linear probes on the validation part.  `python -m bench.probe`

A probe is a softmax regression fitted on the training part's pooled features and labels. The criterion for a teacher: its probe must
clearly exceed what FedAvg reaches in the same rounds. Raw pixels stand beside it.
"""

import tempfile
from pathlib import Path

from semanticfl_ref.config import build
from semanticfl_ref.data.sources import load_dataset
from semanticfl_ref.diffusion.anchors import linear_probe
from semanticfl_ref.diffusion.bank import open_or_build

TAPS = ("vae", "down.0", "down.1", "mid", "up.0")


def main() -> None:
    settings = build().diffusion
    data = load_dataset("digit-scenes")
    train, seen, labels, truth = data.train_images, data.validation_images, data.train_labels, data.validation_labels
    raw = linear_probe(train.flatten(1).float(), labels, seen.flatten(1).float(), truth)
    print(f"accuracy on {len(truth)} validation scenes, fitted on {len(labels)}; raw pixels {raw:.1%}")
    print("| t | " + " | ".join(TAPS) + " |\n|" + " --- |" * (len(TAPS) + 1))
    with tempfile.TemporaryDirectory() as folder:
        for timestep in (20, 50, 150, 300):
            made = {"source": settings.source, "taps": TAPS, "timestep": timestep, "precision": settings.precision, "cache_dir": Path(folder)}
            banks = [open_or_build(x, y, data.class_names, data.sha256, **made) for x, y in ((train, labels), (seen, truth))]
            scores = [linear_probe(banks[0].features[tap].float(), labels, banks[1].features[tap].float(), truth) for tap in TAPS]
            print(f"| {timestep} | " + " | ".join(f"{score:.1%}" for score in scores) + " |", flush=True)


if __name__ == "__main__":
    main()
