import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import models
from tools.recipes import (
    RECIPES,
    Recipe,
    coupled_channels,
    coupled_rows,
    dead_columns,
    dead_rows,
    dead_rows_alive_bias,
    randomize_batch_norm,
    refill_like,
    unstructured,
)

Masks = dict[str, Tensor]
ROW_RECIPES = ("dead_rows", "dead_rows_alive_bias", "coupled_rows", "refill_like", "refill_like_coupled")
ZOO = ("resnet18", "resnet50", "vgg11", "vgg16_bn", "mobilenet_v2", "densenet121", "wide_resnet50_2")
SMALL = ("resnet18", "mobilenet_v2", "densenet121")


@cache
def build(name: str) -> nn.Module:
    """A model of torchvision or of models/, with random weights. Shared by the tests: none may change it."""
    import torchvision

    torch.manual_seed(0)
    if name in ("vgg11", "vgg16_bn"):
        return narrow_classifier(getattr(torchvision.models, name)(init_weights=False)).eval()
    model: nn.Module = getattr(models if name in models.__all__ else torchvision.models, name)()
    return model.eval()


def narrow_classifier(vgg: nn.Module) -> nn.Module:
    """The same three linear layers with 64 rather than 4096 hidden features: 15 times fewer weights to mask."""
    wide: dict[str, nn.Module] = dict(vgg.get_submodule("classifier").named_children())
    linear = {"0": nn.Linear(512 * 7 * 7, 64), "3": nn.Linear(64, 64), "6": nn.Linear(64, 1000)}
    vgg.add_module("classifier", nn.Sequential(*(linear.get(name, module) for name, module in wide.items())))
    return vgg


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def dead(mask: Tensor) -> Tensor:
    """Which rows are masked; a row is masked whole or not at all."""
    rows = mask.flatten(1) if mask.dim() > 1 else mask[:, None]
    assert bool((rows.any(1) == rows.all(1)).all())
    return ~rows.any(1)


def same(first: Masks, second: Masks) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def random_norms(name: str) -> nn.Module:
    """A copy of its own, with the batch norms of a trained model rather than of a new one."""
    model = copy.deepcopy(build(name))
    randomize_batch_norm(model, seed=0)
    return model


def output_channels(model: nn.Module, name: str) -> Tensor:
    """What the named module returns for two random images. [C, N * H * W]"""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, out: found.append(out.clone()))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    hook.remove()
    return found[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("name", [*ZOO, *models.__all__])
def test_every_recipe_gives_masks_that_fit_and_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for recipe in RECIPES:
        masks = RECIPES[recipe](model, sparsity=0.5, seed=1)
        assert masks, recipe
        for parameter, mask in masks.items():
            assert (mask.dtype, mask.shape) == (torch.bool, parameters[parameter].shape), (recipe, parameter)
            assert bool(mask.any()), (recipe, parameter)
            assert not bool(mask.all()), (recipe, parameter)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_seed_always_gives_the_same_masks_whatever_the_global_generator_does(recipe: str) -> None:
    model = build("mobilenet_v2")
    torch.manual_seed(1)
    first = RECIPES[recipe](model, sparsity=0.5, seed=3)
    state = torch.get_rng_state()
    torch.rand(7)
    second, other = (RECIPES[recipe](model, sparsity=0.5, seed=seed) for seed in (3, 4))
    assert same(first, second)
    assert same(first, other) == recipe.startswith("refill")
    torch.set_rng_state(state)
    RECIPES[recipe](model, sparsity=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("recipe", ROW_RECIPES)
@pytest.mark.parametrize("name", SMALL)
def test_row_recipes_mask_the_sparsity_asked_for_within_a_row_of_every_layer(
    name: str, recipe: str, sparsity: float
) -> None:
    model = build(name)
    masks = RECIPES[recipe](model, sparsity=sparsity, seed=0)
    classifier, first = list(layers(model))[-1], next(iter(layers(model)))
    for path, layer in layers(model).items():
        if path == classifier or (recipe.startswith("refill") and path == first):
            continue
        rows = dead(masks[f"{path}.weight"])
        assert abs(int(rows.sum()) - sparsity * len(layer.weight)) <= 1, path
    assert f"{classifier}.weight" not in masks
    assert f"{classifier}.bias" not in masks


def test_dead_rows_take_their_bias_and_the_batch_norm_right_after_with_them() -> None:
    masks = dead_rows(build("vgg16_bn"), sparsity=0.5, seed=0)
    for conv, norm in ((0, 1), (3, 4), (40, 41)):
        rows = masks[f"features.{conv}.bias"]
        assert torch.equal(dead(masks[f"features.{conv}.weight"]), ~rows)
        assert torch.equal(masks[f"features.{norm}.weight"], rows)
        assert torch.equal(masks[f"features.{norm}.bias"], rows)
    for hidden in ("classifier.0", "classifier.3"):
        assert torch.equal(dead(masks[f"{hidden}.weight"]), ~masks[f"{hidden}.bias"])
    assert not any(name.startswith("classifier.6") for name in masks)


def test_dead_rows_of_different_layers_are_chosen_apart() -> None:
    masks = dead_rows(build("resnet18"), sparsity=0.5, seed=0)
    assert not torch.equal(masks["layer1.0.bn2.weight"], masks["layer1.1.bn2.weight"])


def test_dead_rows_with_alive_bias_are_the_same_rows_and_nothing_else() -> None:
    whole = dead_rows(build("vgg16_bn"), sparsity=0.5, seed=5)
    alive = dead_rows_alive_bias(build("vgg16_bn"), sparsity=0.5, seed=5)
    assert sorted(alive) == sorted(n for n, mask in whole.items() if mask.dim() > 1)
    assert same(alive, {n: whole[n] for n in alive})


def test_dead_rows_with_alive_bias_leave_constants_other_than_zero_and_dead_rows_leave_zeros() -> None:
    name = "layer3.0.bn1"
    for recipe in (dead_rows, dead_rows_alive_bias):
        model = random_norms("resnet18")
        masks = recipe(model, sparsity=0.5, seed=0)
        rows = dead(masks["layer3.0.conv1.weight"])
        channels = output_channels(masked(model, masks), name)
        assert torch.equal(channels.amax(1) == channels.amin(1), rows)
        assert bool((channels[rows] != 0).all()) == (recipe is dead_rows_alive_bias)


@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v2", "resnet18"])
def test_dead_columns_mask_input_channels_of_every_layer_but_the_first_convolution(name: str) -> None:
    masks = dead_columns(build(name), sparsity=0.8, seed=0)
    first, *others = layers(build(name))
    assert sorted(masks) == sorted(f"{path}.weight" for path in others), first
    for path in others:
        layer, mask = layers(build(name))[path], masks[f"{path}.weight"]
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        inputs = dead(mask if depthwise else mask.transpose(0, 1))
        assert abs(int(inputs.sum()) - 0.8 * len(inputs)) <= 1, path


def test_dead_columns_of_a_grouped_convolution_are_channels_of_its_input() -> None:
    conv = nn.Conv2d(12, 8, 3, groups=4)
    mask = dead_columns(nn.Sequential(nn.Conv2d(3, 12, 3), conv), sparsity=0.5, seed=0)["1.weight"]
    live = mask.view(4, 2, 3, 9)[:, 0, :, 0].flatten()
    assert int((~live).sum()) == 6
    x = torch.randn(1, 12, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = conv(x * live[:, None, None])
    assert not torch.allclose(conv(x), expected)
    assert torch.allclose(masked(conv, {"weight": mask})(x), expected)


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("resnet18", "conv1 bn1 layer1.0.conv2 layer1.0.bn2 layer1.1.conv2 layer1.1.bn2"),
        ("resnet18", "layer2.0.conv2 layer2.0.bn2 layer2.0.downsample.0 layer2.0.downsample.1 layer2.1.conv2"),
        ("mobilenet_v2", "features.2.conv.0.0 features.2.conv.0.1 features.2.conv.1.0 features.2.conv.1.1"),
        ("mobilenet_v2", "features.2.conv.2 features.2.conv.3 features.3.conv.2 features.3.conv.3"),
        ("mobilenet_v1_cifar", "conv1 bn1 stages.0.conv1 stages.0.bn1"),
        ("wrn32_2_cifar", "stages.1.0.conv2 stages.1.0.downsample.0 stages.1.1.conv2 stages.1.4.bn2"),
    ],
)
def test_coupled_rows_are_the_same_channels_in_all_layers_of_a_channel_space(name: str, members: str) -> None:
    masks = coupled_rows(build(name), sparsity=0.5, seed=2)
    first, *others = (dead(masks[f"{member}.weight"]) for member in members.split())
    assert 0 < int(first.sum()) < len(first)
    assert all(torch.equal(first, other) for other in others)


def test_layers_that_are_not_coupled_have_channels_of_their_own() -> None:
    channels = coupled_channels(build("resnet18"))
    assert not set(channels["layer1.0.conv1"].tolist()) & set(channels["layer1.0.conv2"].tolist())
    assert not set(channels["layer2.0.conv2"].tolist()) & set(channels["layer1.0.conv2"].tolist())
    assert len(set(channels["layer1.0.conv2"].tolist())) == 64


def test_a_batch_norm_behind_a_concatenation_is_dead_where_the_concatenated_convolutions_are() -> None:
    masks = coupled_rows(build("densenet121"), sparsity=0.5, seed=0)
    block = "features.denseblock1.denselayer"
    parts = ["features.conv0", f"{block}1.conv2", f"{block}2.conv2"]
    expected = torch.cat([dead(masks[f"{part}.weight"]) for part in parts])
    assert torch.equal(dead(masks[f"{block}3.norm1.weight"]), expected)
    assert torch.equal(dead(masks[f"{block}3.norm1.bias"]), expected)


@pytest.mark.parametrize(
    ("name", "where", "channels"),
    [("resnet18", "layer1", 64), ("resnet18", "layer4", 512), ("mobilenet_v2", "features.6", 32)],
)
def test_half_of_a_residual_stage_is_zero_with_coupled_rows_and_less_with_dead_rows(
    name: str, where: str, channels: int
) -> None:
    zeros = []
    for recipe in (coupled_rows, dead_rows):
        model = random_norms(name)
        masks = recipe(model, sparsity=0.5, seed=0)
        zeros.append(int((output_channels(masked(model, masks), where) == 0).all(1).sum()))
    assert zeros[0] >= channels // 2 > 1.5 * zeros[1]


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_unstructured_masks_spread_the_sparsity_over_every_layer(sparsity: float) -> None:
    model = build("resnet18")
    masks = unstructured(model, sparsity=sparsity, seed=0)
    assert sorted(masks) == sorted(f"{path}.weight" for path in layers(model))
    for name, mask in masks.items():
        deviation = (sparsity * (1 - sparsity) / mask.numel()) ** 0.5
        assert abs(1 - mask.float().mean().item() - sparsity) < 5 * deviation, name


def test_refill_keeps_the_rows_with_the_largest_l1_norm_and_their_batch_norm() -> None:
    model = build("resnet18")
    masks = refill_like(model, sparsity=0.7, seed=0)
    for conv, norm in (("layer1.0.conv2", "layer1.0.bn2"), ("layer4.0.downsample.0", "layer4.0.downsample.1")):
        norms = model.get_parameter(f"{conv}.weight").abs().sum((1, 2, 3))
        rows = dead(masks[f"{conv}.weight"])
        assert norms[rows].max() <= norms[~rows].min()
        assert torch.equal(masks[f"{norm}.weight"], ~rows)
        assert torch.equal(masks[f"{norm}.bias"], ~rows)
    assert not {"conv1.weight", "bn1.weight", "fc.weight"} & masks.keys()


def test_coupled_refill_keeps_the_channels_with_the_largest_sum_of_l1_norms() -> None:
    model = build("resnet18")
    masks = refill_like(model, sparsity=0.7, seed=0, coupled=True)
    members = ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    norms = torch.stack([model.get_parameter(f"{m}.weight").double().abs().sum((1, 2, 3)) for m in members]).sum(0)
    kept = torch.zeros(64, dtype=torch.bool)
    kept[norms.topk(20).indices] = True  # ceil(0.3 * 64)
    assert all(torch.equal(~dead(masks[f"{m}.weight"]), kept) for m in members)
    assert torch.equal(masks["bn1.bias"], kept)


def test_coupled_refill_leaves_a_first_convolution_alone_that_shares_no_channels() -> None:
    masks = refill_like(build("resnet50"), sparsity=0.5, seed=0, coupled=True)
    assert not {"conv1.weight", "bn1.weight"} & masks.keys()


@pytest.mark.parametrize(("rows", "sparsity", "kept"), [(10, 0.7, 3), (10, 0.75, 3), (100, 0.29, 71), (7, 0.99, 1)])
def test_refill_keeps_density_times_rows_rounded_up(rows: int, sparsity: float, kept: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, rows, 1), nn.Flatten(), nn.Linear(rows, 2))
    masks = refill_like(model, sparsity=sparsity, seed=0)
    assert int((~dead(masks["1.weight"])).sum()) == kept


@pytest.mark.parametrize("recipe", ["dead_rows", "dead_columns", "coupled_rows", "refill_like"])
def test_no_recipe_masks_a_whole_layer(recipe: str) -> None:
    masks = RECIPES[recipe](build("resnet_small_cifar"), sparsity=0.999, seed=0)
    assert all(bool(mask.any()) for mask in masks.values())


def test_a_model_without_a_classifier_loses_rows_of_its_last_convolution_too() -> None:
    masks = dead_rows(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), sparsity=0.5, seed=0)
    assert sorted(masks) == ["0.bias", "0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_is_only_a_classifier_is_no_error(recipe: str) -> None:
    touched = {"0.weight"} if recipe in ("dead_columns", "unstructured") else set()
    assert RECIPES[recipe](nn.Sequential(nn.Linear(8, 3)), sparsity=0.5, seed=0).keys() == touched


class Branching(nn.Module):
    """What torch.fx cannot trace: the values decide where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        out: Tensor = self.fc(x if x.sum() > 0 else -x)
        return out


@pytest.mark.parametrize("recipe", [dead_rows, coupled_rows])
def test_a_model_that_cannot_be_traced_is_read_in_module_order(recipe: Recipe) -> None:
    masks = recipe(Branching(), sparsity=0.5, seed=0)
    assert sorted(masks) == ["conv.weight", "norm.bias", "norm.weight"]
    assert torch.equal(dead(masks["conv.weight"]), dead(masks["norm.bias"]))


class Tied(nn.Module):
    """A decoder's head that is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(self.embedding(x)))
        return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tied_weight_is_not_masked_under_its_second_name(recipe: str) -> None:
    assert RECIPES[recipe](Tied(), sparsity=0.5, seed=0).keys() <= {"hidden.weight", "hidden.bias"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", *models.__all__])
def test_random_batch_norms_stay_away_from_zero_and_let_the_input_through(name: str) -> None:
    model, again = random_norms(name), random_norms(name)
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    for path, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                assert tensor is not None
                assert 0.1 <= tensor.abs().min() <= tensor.abs().max() <= 1.5, path
            assert norm.running_var is not None
            assert norm.running_var.min() > 0
    channels = next(model.parameters()).shape[1]
    with torch.no_grad():
        out = model(torch.randn(4, channels, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert 1e-3 < out.std() < 1e3
    assert out.std(0).mean() > 1e-3 * out.std()


def test_batch_norms_without_affine_or_statistics_are_no_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False))
    randomize_batch_norm(model, seed=0)
    assert model.get_buffer("0.running_mean").abs().min() >= 0.1
    assert model.get_parameter("1.weight").abs().min() >= 0.5
