"""Wide residual networks (Zagoruyko & Komodakis, arXiv:1605.07146), as pruning papers use them."""

from __future__ import annotations

from torch import nn

from models.resnet import BasicBlock, ResNet


def wrn32_2_cifar(num_classes: int = 10) -> nn.Module:
    """WRN-32-2: the CIFAR ResNet-32, twice as wide, stem included; 1.86 M parameters.

    ReLU after the addition, unlike arXiv:1605.07146: so in GraSP (arXiv:2002.07376) and Structure-LTH
    (arXiv:2202.04736), whose count this is.
    """
    return ResNet(BasicBlock, (5, 5, 5), (32, 64, 128), num_classes)
