"""Residual networks for small images: a 3x3 stem with stride 1, no max-pool.

He et al., "Deep residual learning for image recognition", arXiv:1512.03385.
Inside a block, modules are named as in torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps H and W when the stride is 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def init_kaiming_(model: nn.Module) -> None:
    """Kaiming normal for convolutions, N(0, 0.01) for linear layers, zero biases (He et al., arXiv:1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # torch counts the rows of every group as fan-out, which leaves depthwise weights sqrt(C) too small
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Block(nn.Module):
    """relu(residual(x) + shortcut(x)); subclasses say what the residual branch is.

    The shortcut is a 1x1 convolution and batch norm where the shape changes, and x itself elsewhere.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def residual(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, width * expansion, H / stride, W / stride]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.downsample(x))
        return out


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride)
        self.conv1, self.bn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class Bottleneck(Block):
    """1x1, 3x3 (with the stride, as in torchvision), 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride)
        out_channels = width * self.expansion
        self.conv1, self.bn1 = conv1x1(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, out_channels), nn.BatchNorm2d(out_channels)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out


class ResNet(nn.Module):
    """Stem, one stage of blocks per width, global average pool, linear classifier.

    depths  blocks per stage; every stage but the first halves H and W
    widths  of the stages; the stem has the first one
    """

    def __init__(
        self, block: type[Block], depths: Sequence[int], widths: Sequence[int], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        channels = widths[0]
        for depth, width in zip(depths, widths, strict=True):
            stages.append(_stage(block, depth, channels, width, stride=2 if stages else 1))
            channels = width * block.expansion
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def _stage(block: type[Block], depth: int, in_channels: int, width: int, *, stride: int) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(depth - 1)))


def resnet18_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-18; 11.17 M parameters for 10 classes, the published 11.22 M for 100 (Structure-LTH, arXiv:2202.04736)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes)


def resnet50_cifar(num_classes: int = 10) -> nn.Module:
    """ResNet-50; 23.5 M parameters for 10 classes. (The published 25.56 M are the ImageNet model's.)"""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), num_classes)


def resnet_small_cifar(num_classes: int = 10, in_channels: int = 1, width: int = 16) -> nn.Module:
    """ResNet of three stages, small enough to train on 8x8 digits in seconds; 0.18 M parameters at width 16."""
    return ResNet(BasicBlock, (2, 2, 2), (width, 2 * width, 4 * width), num_classes, in_channels)
