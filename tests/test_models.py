import pytest
import torch
from torch import nn

import models
from models.resnet import BasicBlock

CIFAR = [name for name in models.__all__ if name != "resnet_small_cifar"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "published_millions", "exact"),
    [
        ("resnet18_cifar", 100, 11.22, 11_220_132),
        ("wrn32_2_cifar", 10, 1.86, 1_860_522),
        ("vgg16_cifar", 10, 14.72, 14_728_266),
        ("mobilenet_v1_cifar", 10, 3.21, 3_217_226),
    ],
)
def test_a_model_has_the_published_number_of_parameters(
    name: str, num_classes: int, published_millions: float, exact: int
) -> None:
    """Table 1 of arXiv:2202.04736, whose two decimals are cut, not rounded (14.728 is 14.72)."""
    count = parameters(getattr(models, name)(num_classes))
    assert count == exact
    assert count // 10_000 == round(published_millions * 100)


def test_resnet50_has_the_published_25_56_million_parameters_on_imagenet_and_23_5_on_cifar() -> None:
    import torchvision

    with torch.device("meta"):
        imagenet, cifar = torchvision.models.resnet50(), models.resnet50_cifar()
    assert (parameters(imagenet), round(parameters(imagenet) / 1e6, 2)) == (25_557_032, 25.56)
    assert (parameters(cifar), round(parameters(cifar) / 1e6, 1)) == (23_520_842, 23.5)


def test_the_cifar_resnet50_is_torchvisions_but_for_stem_and_classifier() -> None:
    import torchvision

    with torch.device("meta"):
        theirs = torchvision.models.resnet50(num_classes=10).state_dict()
        ours = models.resnet50_cifar(10).state_dict()
    assert sorted(t.shape for n, t in ours.items() if n != "conv1.weight") == sorted(
        t.shape for n, t in theirs.items() if n != "conv1.weight"
    )
    assert (ours["conv1.weight"].shape, theirs["conv1.weight"].shape) == ((64, 3, 3, 3), (64, 3, 7, 7))


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_model_turns_images_into_one_score_per_class(name: str, num_classes: int) -> None:
    model = getattr(models, name)(num_classes).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)


@pytest.mark.parametrize(
    ("name", "spatial"),
    [("resnet18_cifar", 4), ("resnet50_cifar", 4), ("wrn32_2_cifar", 8), ("vgg16_cifar", 2), ("mobilenet_v1_cifar", 2)],
)
def test_a_cifar_model_halves_its_images_only_where_the_papers_do(name: str, spatial: int) -> None:
    model, seen = getattr(models, name)().eval(), []
    pool = next(m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [(spatial, spatial)]


def test_the_small_resnet_reads_digits_and_has_the_channels_and_width_asked_for() -> None:
    assert models.resnet_small_cifar().eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    wide = models.resnet_small_cifar(num_classes=7, in_channels=3, width=8).eval()
    assert wide(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert wide.get_parameter("conv1.weight").shape == (8, 3, 3, 3)
    assert parameters(models.resnet_small_cifar()) < 200_000


def test_the_small_resnet_learns_to_tell_two_patterns_apart() -> None:
    torch.manual_seed(0)
    model = models.resnet_small_cifar(num_classes=2, width=4)
    labels = torch.arange(32) % 2
    images = torch.randn(32, 1, 8, 8) + labels[:, None, None, None] * torch.linspace(-1, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


def test_all_residual_networks_share_one_basic_block() -> None:
    for name, blocks in (("resnet18_cifar", 8), ("wrn32_2_cifar", 15), ("resnet_small_cifar", 6)):
        model = getattr(models, name)()
        assert sum(type(m) is BasicBlock for m in model.modules()) == blocks, name


@pytest.mark.parametrize("name", models.__all__)
def test_convolutions_start_with_the_kaiming_deviation(name: str) -> None:
    """sqrt(2 / fan): fan-out k * k * O, but for depthwise convolutions fan-in k * k."""
    torch.manual_seed(0)
    for path, conv in getattr(models, name)().named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 5000:
            kernel = conv.weight[0, 0].numel()
            fan = kernel * (conv.out_channels if conv.groups == 1 else 1)
            assert conv.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), path
