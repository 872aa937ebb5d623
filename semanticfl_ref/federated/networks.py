"""Backbones beside ResNet-10: ResNet-18, FedAvg's convolutional network, and a MobileNetV2.

Letters: B batch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from semanticfl_ref.federated.model import ClientModel, ResNet10

# Per stage of MobileNetV2: expansion, channels at width 64, blocks, stride of the first. The second
# stage has stride 1, as usual for images of 32 pixels.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ResNet18(ResNet10):
    """Two blocks per stage: the ResNet-18 of small images, with FedRCL's levels."""

    blocks = 2


class ConvNet(ClientModel):
    """Two 5x5 convolutions, each with 2x2 max pooling, and a fully connected layer.

    The levels are these three. At width 64 they have 32, 64 and 512 channels. FedAvg's network has
    no normalisation layers: `model.norm = none`.

    Source: McMahan et al. 2017, Section 3 (the CNN for MNIST).
    """

    def layers(self, width, norm, image_size):
        first = max(width // 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(3, first, 5, padding=2), norm(first)
        self.conv2, self.norm2 = nn.Conv2d(first, width, 5, padding=2), norm(width)
        self.full = nn.Linear((image_size // 4) ** 2 * width, self.feature_width(width))

    def levels(self, images):
        first = self.norm1(self.conv1(images))
        yield first
        second = self.norm2(self.conv2(F.max_pool2d(F.relu(first), 2)))
        yield second
        yield self.full(F.max_pool2d(F.relu(second), 2).flatten(1))


class MobileNetV2(ClientModel):
    """Inverted residuals with linear bottlenecks, for small images.

    The levels are the stem, the stages and the last convolution. At width 64 it is the published
    network with 512 features instead of 1280, and without the first two strides.

    Source: Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks. CVPR 2018,
    Table 2.
    """

    activation = staticmethod(F.relu6)

    def layers(self, width, norm, image_size):
        inputs, stages = max(width // 2, 1), []
        self.stem = nn.Sequential(nn.Conv2d(3, inputs, 3, padding=1, bias=False), norm(inputs))
        for expansion, channels, count, stride in STAGES:
            outputs, blocks = max(round(channels * width / 64), 1), []
            for number in range(count):
                first = number == 0
                blocks.append(
                    InvertedResidual(inputs, outputs, stride if first else 1, expansion, norm)
                )
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        features = self.feature_width(width)
        self.last = nn.Sequential(nn.Conv2d(inputs, features, 1, bias=False), norm(features))

    def levels(self, images):
        x = self.stem(images)
        yield x
        x = F.relu6(x)
        for stage in self.stages:
            x = stage(x)
            yield x
        yield self.last(x)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection without activation, shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm):
        super().__init__()
        inner, layers = inputs * expansion, []
        if expansion > 1:
            layers = [nn.Conv2d(inputs, inner, 1, bias=False), norm(inner), nn.ReLU6()]
        self.body = nn.Sequential(
            *layers,
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            norm(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            norm(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.has_shortcut else self.body(x)
