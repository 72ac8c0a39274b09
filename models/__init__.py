"""Reference models of the papers: CIFAR versions, 32 x 32 inputs, Kaiming initialization."""

from models.mobilenet import mobilenet_v1_cifar
from models.resnet import resnet18_cifar, resnet50_cifar, resnet_small_cifar
from models.vgg import vgg16_cifar
from models.wide_resnet import wrn32_2_cifar

__all__ = [
    "mobilenet_v1_cifar",
    "resnet18_cifar",
    "resnet50_cifar",
    "resnet_small_cifar",
    "vgg16_cifar",
    "wrn32_2_cifar",
]
