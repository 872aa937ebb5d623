"""Feature shift: a fixed image corruption per client.

Choice: the five corruptions and their strengths; nothing is published for SemanticFL. They follow
NIID-Bench (Li et al., ICDE 2022), whose clients differ by noise, and Hendrycks and Dietterich:
Benchmarking Neural Network Robustness to Common Corruptions and Perturbations. ICLR 2019.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from semanticfl_ref.data.dataset import Dataset, content_sha256, transformed
from semanticfl_ref.data.partition import Partition
from semanticfl_ref.errors import unknown
from semanticfl_ref.randomness import generator

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
CAST = (1.0, 0.75, 0.5)  # gains of the three colours, in a random order
NOISE = 25.0  # standard deviation, of 255


def apply_partition(dataset: Dataset, partition: Partition, seed: int) -> tuple[Dataset, Partition]:
    """The training images as the clients hold them: unused ones left out, corruptions applied.

    Anchors that are made from training images are made from these. Validation and test images stay
    as they are.

    Returns:
        The data set and the partition of its training images; the arguments if nothing changes.
    """
    if not partition.dropped and not partition.corruptions:
        return dataset, partition
    used, partition = partition.used, partition.among_used()
    images, labels = dataset.train_images[used], dataset.train_labels[used]
    for client, corruption in enumerate(partition.corruptions):
        own = torch.cat([partition.indices[client], partition.held_out[client]])
        # "camera" is an earlier name: another one would change published results.
        source = generator(seed, "camera", client=client)
        images[own] = corrupted(corruption, images[own], source)
    changed = {"train_images": images, "train_labels": labels}
    if dataset.train_clients is not None:
        changed["train_clients"] = dataset.train_clients[used]
    sha256 = content_sha256(dataset.class_names, dataset.tensors | changed)
    return replace(dataset, **changed, sha256=sha256), partition


def corrupted(corruption: str, images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Apply a corruption to images.

    Args:
        corruption: "grey" (luma), "blur" (mean of 3x3 pixels), "noise" (Gaussian, 25 of 255),
            "colour cast" (gains 1, 3/4, 1/2 of the colours, in random order), "low resolution"
            (halved and enlarged again).
        images: uint8 [n, H, W, 3].
        source: generator of the noise and of the order of the gains.

    Returns:
        uint8 [n, H, W, 3].

    Raises:
        UserError: an unknown name.
    """
    gain = torch.tensor(CAST)[torch.randperm(3, generator=source)].view(3, 1, 1)
    luma = torch.tensor(LUMA).view(3, 1, 1)

    def low_resolution(x: torch.Tensor) -> torch.Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="area")
        return F.interpolate(half, size=x.shape[2:], mode="bilinear")

    apply = {
        "grey": lambda x: (x * luma).sum(1, keepdim=True).expand_as(x),
        "blur": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
        "noise": lambda x: x + NOISE * torch.randn(x.shape, generator=source),
        "colour cast": lambda x: x * gain,
        "low resolution": low_resolution,
    }
    if corruption not in apply:
        raise unknown("corruption", corruption, apply)
    return transformed(images, apply[corruption], torch.empty_like(images))
