"""ResNet-10: the clients' light model, with projection heads towards the anchors' spaces.

Letters: B batch, C classes, D width of a feature (8x the first stage's channels: 512 at the paper's
    width).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from semanticfl_ref.randomness import generator

HEADS = ("visual_head", "text_head", "projection_head")


class ResNet10(nn.Module):
    """One basic block a stage, four stages, for small images (3x3 stem, no pooling before the
    stages).

    Args:
        width: channels of the first stage.
        classes: C.
        visual_width, text_width: entries of the anchors' spaces; 0 = no head towards that space.
        projection_width: entries behind a projection head of two layers, for a contrast between
            models; 0 = none.
        seed: initial weights come from (seed, "model"), the heads' from (seed, "heads"): a method
            with heads and one without start from the same backbone, bit for bit.

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
    ):
        super().__init__()
        with torch.random.fork_rng(
            devices=[]
        ):  # torch's layers draw from the global generator when made; it must not move
            self._make_layers(width, classes, visual_width, text_width, projection_width)
        self._initialise(
            [m for name, m in self.named_modules() if name.split(".")[0] not in HEADS],
            seed,
            "model",
        )
        self._initialise(
            [m for name, m in self.named_modules() if name.split(".")[0] in HEADS], seed, "heads"
        )

    def _make_layers(
        self, width: int, classes: int, visual_width: int, text_width: int, projection_width: int
    ) -> None:
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                BasicBlock(i, o, 1 if i == o else 2)
                for i, o in zip(widths[:-1], widths[1:], strict=True)
            )
        )
        self.classifier = nn.Linear(8 * width, classes)
        self.visual_head = nn.Linear(8 * width, visual_width) if visual_width else None
        self.text_head = nn.Linear(8 * width, text_width) if text_width else None
        projection = (
            (nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, projection_width))
            if projection_width
            else None
        )
        self.projection_head = nn.Sequential(*projection) if projection else None

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images float [B, 3, H, W] -> logits float32 [B, C], features float32 [B, D] (after the
        global average).
        """
        return self._classify(self.stages(F.relu(self.stem_norm(self.stem(images)))))

    def forward_with_levels(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """The same logits and features, and float32 [B, width] of the stem and every stage: before
        the last ReLU, averaged over the image.
        """
        before = self.stem_norm(self.stem(images))
        levels = [before.float().mean((2, 3))]
        for stage in self.stages:
            before = stage.before_relu(F.relu(before))
            levels.append(before.float().mean((2, 3)))
        return *self._classify(F.relu(before)), tuple(levels)

    def _classify(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BD = maps.float().mean((2, 3))
        with torch.autocast(maps.device.type, enabled=False):
            return self.classifier(features_BD), features_BD

    @staticmethod
    def _initialise(modules, seed: int, purpose: str) -> None:
        """Kaiming normal for convolutions, uniform in 1/sqrt(D) for linear maps, from one
        generator.
        """
        source = generator(seed, purpose)
        for module in modules:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu", generator=source
                )
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=source)
                nn.init.uniform_(module.bias, -bound, bound, generator=source)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution on the shortcut where the shape
    changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.stride = stride
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.before_relu(x))

    def before_relu(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output before its last ReLU."""
        y = F.relu(self.norm1(self.conv1(x)))
        # The stride is taken by slicing: with two threads, the backward pass of a strided 1x1
        # convolution, channels-last with fewer than
        # 16 inputs and an odd batch, writes out of bounds in torch 2.13's CPU kernels.
        return self.norm2(self.conv2(y)) + self.shortcut(x[:, :, :: self.stride, :: self.stride])
