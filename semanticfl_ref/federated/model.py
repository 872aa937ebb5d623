"""The clients' model: a backbone, a classifier, and projection heads towards the anchors' spaces.

ResNet-10 is here, other backbones are in networks.py.

Letters: B batch, C classes, D width of a feature (8 times the first stage's channels: 512 at the
paper's width).
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from semanticfl_ref.randomness import generator

HEADS = ("visual_head", "text_head", "projection_head")
GROUPS = 2  # of GroupNorm; as in Hsieh et al. 2020 and Reddi et al. 2021


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of two groups, or of one where the number of channels is odd."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm, "none": lambda channels: nn.Identity()}


class ClientModel(nn.Module):
    """A classifier of a backbone's features, with projection heads.

    A backbone derives from this class and has two functions: `layers` and `levels`.

    Args:
        width: scales the backbone; features have `feature_width(width)` entries.
        classes: C.
        visual_width, text_width: width of the anchors' spaces, to which `visual_head` and
            `text_head` map features; 0: no head towards that space, and the map is the identity.
        projection_width: output width of `projection_head`, two layers for a contrast between
            models; 0: the identity.
        seed: the initial weights come from (seed, "model"), those of the heads from (seed,
            "heads"): a method with heads and one without start from the same backbone, bitwise.
        norm: a name of NORMS.
        image_size: pixels per side.
    """

    activation = staticmethod(F.relu)  # between the last level and the features

    def __init__(
        self,
        width: int,
        classes: int,
        visual_width: int = 0,
        text_width: int = 0,
        projection_width: int = 0,
        seed: int = 0,
        norm: str = "batch",
        image_size: int = 32,
    ):
        super().__init__()
        features = self.feature_width(width)
        # Layers draw from torch's global generator when they are made: it must not move.
        with torch.random.fork_rng(devices=[]):
            self.layers(width, NORMS[norm], image_size)
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

    @staticmethod
    def feature_width(width: int) -> int:
        """D."""
        return 8 * width

    def layers(self, width: int, norm: Callable[[int], nn.Module], image_size: int) -> None:
        """Make the backbone's layers, as attributes; `norm` makes one for a number of channels."""
        raise NotImplementedError

    def levels(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Images float [B, 3, H, W] -> the output of every level, before its activation.

        Each is [B, channels, height, width] or [B, channels]. The features are the last one after
        `activation`, averaged over the image.
        """
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float [B, 3, H, W] -> logits float32 [B, C], features float32 [B, D]."""
        *_, last = self.levels(images)
        return self._classify(last)

    def forward_with_levels(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same logits and features, then every level averaged over the image, float32."""
        levels = list(self.levels(images))
        return *self._classify(levels[-1]), *map(_averaged, levels)

    def _classify(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BD = _averaged(self.activation(last))
        with torch.autocast(last.device.type, enabled=False):
            return self.classifier(features_BD), features_BD


class ResNet10(ClientModel):
    """Four stages of basic blocks, for small images: a 3x3 stem without pooling.

    The levels are the stem and the stages, each before its last ReLU.

    Source: He et al. 2016 (basic blocks); ten layers and 512-d features as in FedDifRC (arXiv
    2507.06482).
    """

    blocks = 1  # per stage

    def layers(self, width, norm, image_size):
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_norm = norm(width)
        stages, inputs = [], width
        for stage in range(4):
            outputs = 2**stage * width
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(inputs, outputs, stride, norm))
                inputs = outputs
        self.stages = nn.Sequential(*stages)

    def levels(self, images):
        before = self.stem_norm(self.stem(images))
        yield before
        for number, block in enumerate(self.stages, start=1):
            before = block.before_relu(F.relu(before))
            if number % self.blocks == 0:
                yield before


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


def _averaged(maps: torch.Tensor) -> torch.Tensor:
    """Maps [B, channels, height, width] averaged over the image; [B, channels] stays; float32."""
    return maps.float().mean((2, 3)) if maps.ndim == 4 else maps.float()


def _initialise(module: nn.Module, source: torch.Generator) -> None:
    """Kaiming normal for a convolution, uniform in 1 / sqrt(D) for a linear layer."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(
            module.weight, mode="fan_out", nonlinearity="relu", generator=source
        )
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        nn.init.uniform_(module.weight, -bound, bound, generator=source)
        nn.init.uniform_(module.bias, -bound, bound, generator=source)
