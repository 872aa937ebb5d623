"""Feature skew: what a client's camera makes of its images. `Choice:` the five cameras and their
strengths; nothing is published for this method.

After NIID-Bench (Li et al., ICDE 2022), whose parties differ by noise, and Hendrycks and
Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations. ICLR
2019."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from semanticfl_ref.data.partition import Partition
from semanticfl_ref.data.sources import Dataset, content_sha256
from semanticfl_ref.errors import unknown
from semanticfl_ref.randomness import generator

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
CAST = (1.0, 0.75, 0.5)  # gains of the colours, in an order of the client's own
NOISE = 25.0  # standard deviation, of 255
CHUNK = 1000  # images at a time


def as_held(dataset: Dataset, partition: Partition, seed: int) -> tuple[Dataset, Partition]:
    """The data set as its clients hold it, and the partition of that: images of nobody are left
    out, a client's have passed its camera, once.

    The server sees the same where anchors are made of training images: these are the images that
    exist. Validation and test part stay as they are. With neither, the very data set and partition
    come back."""
    if not partition.dropped and not partition.cameras:
        return dataset, partition
    owned, partition = partition.owned, partition.among_owned()
    images, labels = dataset.train_images[owned], dataset.train_labels[owned]
    for client, camera in enumerate(partition.cameras):
        mine = torch.cat([partition.indices[client], partition.held_out[client]])
        images[mine] = through(camera, images[mine], generator(seed, "camera", client=client))
    tensors = {
        name: value for name, value in vars(dataset).items() if isinstance(value, torch.Tensor)
    } | {"train_images": images, "train_labels": labels}
    return replace(
        dataset, **tensors, sha256=content_sha256(dataset.class_names, tensors)
    ), partition


def through(camera: str, images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Images uint8 [n, H, W, 3] as a camera sees them, same shape.

    Args:
        camera: "grey" (luma); "blur" (mean of 3x3 pixels); "noise" (Gaussian, 25 of 255); "colour
            cast" (gains 1, 3/4, 1/2 of the colours, in random order); "low resolution" (half of it,
            drawn up again).
        source: of the noise, and of the cast.

    Raises:
        UserError: another name.
    """
    gain = torch.tensor(CAST)[torch.randperm(3, generator=source)].view(3, 1, 1)
    luma = torch.tensor(LUMA).view(3, 1, 1)
    size = tuple(images.shape[1:3])
    see = {
        "grey": lambda x: (x * luma).sum(1, keepdim=True).expand_as(x),
        "blur": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
        "noise": lambda x: x + NOISE * torch.randn(x.shape, generator=source),
        "colour cast": lambda x: x * gain,
        "low resolution": lambda x: F.interpolate(
            F.interpolate(x, scale_factor=0.5, mode="area"), size=size, mode="bilinear"
        ),
    }
    if camera not in see:
        raise unknown("camera", camera, see)
    seen = [
        see[camera](part.permute(0, 3, 1, 2).float())
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        for part in images.split(CHUNK)
    ]
    return torch.cat(seen) if seen else images
