"""MobileNet-v1 (Howard et al., arXiv:1704.04861) for small images: the stem and the second block keep stride 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.resnet import conv1x1, conv3x3, init_kaiming_

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class SeparableBlock(nn.Module):
    """Depthwise 3x3, then pointwise 1x1, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(x)))
        return out


class MobileNetV1(nn.Module):
    """Stem, thirteen separable blocks, global average pool, linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = [32, *(width for width, _ in _BLOCKS)]
        self.conv1, self.bn1 = conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        blocks = (SeparableBlock(i, o, stride) for i, (o, stride) in zip(widths, _BLOCKS, strict=False))
        self.stages = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return out


def mobilenet_v1_cifar(num_classes: int = 10) -> nn.Module:
    """MobileNet-v1; 3,217,226 parameters, which Structure-LTH (arXiv:2202.04736) prints as 3.21 M."""
    return MobileNetV1(num_classes)
