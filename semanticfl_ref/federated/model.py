"""ResNet-10: the clients' light model, with projection heads towards the anchors' spaces.

Letters: B batch, C classes, D width of a feature (8 times the first stage's channels: 512 at the
paper's width).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from semanticfl_ref.randomness import generator

HEADS = ("visual_head", "text_head", "projection_head")
GROUPS = 2  # of GroupNorm; as in Hsieh et al. 2020 and Reddi et al. 2021


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of two groups, or of one where the number of channels is odd."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm}


class ResNet10(nn.Module):
    """Four stages of one basic block each, for small images: a 3x3 stem without pooling.

    Args:
        width: channels of the first stage.
        classes: C.
        visual_width, text_width: width of the anchors' spaces, to which `visual_head` and
            `text_head` map features; 0: no head towards that space, and the map is the identity.
        projection_width: output width of `projection_head`, two layers for a contrast between
            models; 0: the identity.
        seed: the initial weights come from (seed, "model"), those of the heads from (seed,
            "heads"): a method with heads and one without start from the same backbone, bitwise.
        norm: "batch" (BatchNorm) or "group" (GroupNorm).

    Source: He et al. 2016 (basic blocks); ten layers and 512-d features as in FedDifRC (arXiv
    2507.06482).
    """

    def __init__(
        self,
        width: int,
        classes: int,
        visual_width: int = 0,
        text_width: int = 0,
        projection_width: int = 0,
        seed: int = 0,
        norm: str = "batch",
    ):
        super().__init__()
        features = 8 * width
        # Layers draw from torch's global generator when they are made: it must not move.
        with torch.random.fork_rng(devices=[]):
            self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.stem_norm = NORMS[norm](width)
            self.stages = nn.Sequential(
                BasicBlock(width, width, stride=1, norm=NORMS[norm]),
                BasicBlock(width, 2 * width, stride=2, norm=NORMS[norm]),
                BasicBlock(2 * width, 4 * width, stride=2, norm=NORMS[norm]),
                BasicBlock(4 * width, features, stride=2, norm=NORMS[norm]),
            )
            self.classifier = nn.Linear(features, classes)
            self.visual_head = nn.Linear(features, visual_width) if visual_width else nn.Identity()
            self.text_head = nn.Linear(features, text_width) if text_width else nn.Identity()
            self.projection_head = nn.Identity()
            if projection_width:
                self.projection_head = nn.Sequential(
                    nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projection_width)
                )
        backbone, heads = generator(seed, "model"), generator(seed, "heads")
        for name, module in self.named_modules():
            _initialise(module, heads if name.startswith(HEADS) else backbone)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float [B, 3, H, W] -> logits float32 [B, C], features float32 [B, D]."""
        return self._classify(self.stages(F.relu(self.stem_norm(self.stem(images)))))

    def forward_with_levels(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same logits and features, then the outputs of the stem and of every stage.

        Each of these is float32 [B, width]: before the last ReLU, averaged over the image.
        """
        before = self.stem_norm(self.stem(images))
        levels = [before.float().mean((2, 3))]
        for stage in self.stages:
            before = stage.before_relu(F.relu(before))
            levels.append(before.float().mean((2, 3)))
        return *self._classify(F.relu(before)), *levels

    def _classify(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BD = maps.float().mean((2, 3))
        with torch.autocast(maps.device.type, enabled=False):
            return self.classifier(features_BD), features_BD


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.stride = stride
        self.shortcut = nn.Identity()
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(projection, norm(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.before_relu(x))

    def before_relu(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output before its last ReLU."""
        y = F.relu(self.norm1(self.conv1(x)))
        # The stride is taken by slicing: with two threads, the backward pass of a strided 1x1
        # convolution, channels-last with fewer than 16 inputs and an odd batch, writes out of
        # bounds in torch 2.13's CPU kernels.
        skipped = self.shortcut(x[:, :, :: self.stride, :: self.stride])
        return self.norm2(self.conv2(y)) + skipped


def _initialise(module: nn.Module, source: torch.Generator) -> None:
    """Kaiming normal for a convolution, uniform in 1 / sqrt(D) for a linear layer."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(
            module.weight, mode="fan_out", nonlinearity="relu", generator=source
        )
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        nn.init.uniform_(module.weight, -bound, bound, generator=source)
        nn.init.uniform_(module.bias, -bound, bound, generator=source)
