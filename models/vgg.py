"""VGG for small images (Simonyan & Zisserman, arXiv:1409.1556), with batch norm and one linear layer as its head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.resnet import init_kaiming_

_POOL = 0
_VGG16 = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL, 512, 512, 512, _POOL, 512, 512, 512)


class VGG(nn.Module):
    """3x3 convolutions with bias, batch norm and ReLU; max-pool where `widths` says 0."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features(widths))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        out: Tensor = self.classifier(torch.flatten(x, 1))
        return out


def _features(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if width == _POOL:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return layers


def vgg16_cifar(num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm; 14,728,266 parameters, which Structure-LTH (arXiv:2202.04736) prints as 14.72 M."""
    return VGG(_VGG16, num_classes)
