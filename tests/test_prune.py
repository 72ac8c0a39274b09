"""Global magnitude and random masks: exact counts, ties, what is prunable, and every refusal's sentence."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxsparse import coarsen
from fxsparse.errors import InputError, MaskError
from fxsparse.ir.masks import Masks
from fxsparse.picture import picture
from fxsparse.prune import magnitude, prunable, random


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)


def kept(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def weights(seed: int = 0, *, levels: int | None = None) -> dict[str, Tensor]:
    """Three weights of different shapes; with few levels most magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3, 3, 3), "b": (5, 7), "c": (6, 4, 1, 1)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: w if levels is None else (w * levels).round() / levels for name, w in drawn.items()}


def largest_first(given: dict[str, Tensor], keep: int, masks: dict[str, Tensor] | None = None) -> Masks:
    """The definition: sort everything by (pruned, -|w|, position), keep the first."""
    order = []
    for i, (name, weight) in enumerate(given.items()):
        mask = masks[name].flatten().tolist() if masks and name in masks else [True] * weight.numel()
        order += [
            (not m, -abs(w), i, j, name) for j, (w, m) in enumerate(zip(weight.flatten().tolist(), mask, strict=True))
        ]
    found = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in given.items()}
    for _, _, _, j, name in sorted(order)[:keep]:
        found[name].view(-1)[j] = True
    return Masks(found)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.filterwarnings("ignore:.*left without weights")
def test_magnitude_keeps_exactly_the_largest_and_of_equal_ones_the_earlier(density: float, levels: int | None) -> None:
    given = weights(levels=levels)
    keep = round(density * sum(w.numel() for w in given.values()))
    masks = magnitude(given, density)
    assert kept(masks) == keep
    assert masks == largest_first(given, keep)


@pytest.mark.parametrize("levels", [None, 1])
def test_magnitude_within_masks_never_brings_a_weight_back(levels: int | None) -> None:
    given = weights(seed=1, levels=levels)
    first = random(given, 0.6, seed=3)
    masks = magnitude(given, 0.3, masks=first)
    assert kept(masks) == round(0.3 * sum(w.numel() for w in given.values()))
    assert not any(bool((masks[name] & ~first[name]).any()) for name in masks)
    assert masks == largest_first(given, kept(masks), dict(first))


def test_magnitude_ranks_weights_without_a_mask_as_kept() -> None:
    given = weights()
    first = torch.zeros(5, 7)
    first[2, 3] = 1
    given["b"][2, 3] = 9
    masks = magnitude(given, 0.5, masks={"b": first})
    assert masks["b"].nonzero().tolist() == [[2, 3]]
    assert kept(masks) == round(0.5 * sum(w.numel() for w in given.values()))


def test_pruned_zeros_lose_against_kept_zeros() -> None:
    masks = magnitude({"w": torch.zeros(1, 4)}, 0.5, masks={"w": torch.tensor([[0, 1, 0, 1]])})
    assert masks["w"].tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_magnitude_ranks_every_float_type(dtype: torch.dtype) -> None:
    given = {name: w.to(dtype) for name, w in weights().items()}
    keep = round(0.4 * sum(w.numel() for w in given.values()))
    assert magnitude(given, 0.4) == largest_first(given, keep)


def test_magnitude_leaves_weights_and_masks_as_they_are() -> None:
    given, first = weights(), {"b": torch.ones(5, 7)}
    before = copy.deepcopy((given, first))
    magnitude(given, 0.5, masks=first)
    assert all(torch.equal(w, before[0][name]) for name, w in given.items())
    assert torch.equal(first["b"], before[1]["b"])


def test_masks_lie_where_the_weights_lie_and_are_not_views_of_one_tensor() -> None:
    masks = magnitude(weights(), 0.5)
    assert len({mask.untyped_storage().data_ptr() for mask in masks.values()}) == 3
    assert {mask.device for mask in masks.values()} == {torch.device("cpu")}


def test_a_layer_left_without_weights_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 2 layers are left without weights, the first is 'small'"):
        magnitude({"small": torch.full((2, 2), 0.1), "large": torch.ones(2, 2)}, 0.5)


def test_random_is_exact_seeded_and_leaves_the_global_generator_alone() -> None:
    given = weights()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    masks = random(given, 0.37, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert kept(masks) == round(0.37 * sum(w.numel() for w in given.values()))
    assert masks == random(given, 0.37, seed=5)
    assert masks != random(given, 0.37, seed=6)


def test_random_is_uniform_over_all_layers() -> None:
    given = {"a": torch.zeros(300, 100), "b": torch.zeros(100, 100)}
    masks = random(given, 0.3, seed=0)
    assert [1 - masks.sparsity(name) for name in given] == pytest.approx([0.3, 0.3], abs=0.015)  # three sigma


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    message = (
        rf"density {density!r}: expected a fraction of weights to keep, 0 < density <= 1; got {density!r}\.\n  .*0\.2"
    )
    with pytest.raises(InputError, match=message):
        magnitude(weights(), density)
    with pytest.raises(InputError, match=message):
        random(weights(), density, seed=0)


def test_a_density_above_that_of_the_masks_is_refused() -> None:
    message = "expected at most 0.25, the density of the given masks; got 8 weights to keep, and the masks keep 4."
    with pytest.raises(InputError, match=re.escape(message)):
        magnitude({"w": torch.ones(4, 4)}, 0.5, masks={"w": torch.eye(4)})


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(
        InputError, match=r"weight 'w': expected numbers that can be ranked; got 2 NaN of 3\.\n  Training"
    ):
        magnitude({"w": torch.tensor([[1.0, float("nan"), float("nan")]])}, 0.5)


def test_no_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"weights: expected at least one tensor with elements; got 0 tensors"):
        magnitude(prunable(nn.Linear(3, 3)), 0.5)


def test_masks_that_fit_no_weight_are_refused() -> None:
    given = {"conv.weight": torch.ones(2, 3)}
    with pytest.raises(
        MaskError, match=r"mask for 'conv.wieght': .*not among the 1 weights\.\n  Did you mean 'conv.weight'"
    ):
        magnitude(given, 0.5, masks={"conv.wieght": torch.ones(2, 3)})
    with pytest.raises(
        MaskError, match=r"mask for 'conv.weight': expected the weight's shape \(2, 3\); got \(3, 2\)\."
    ):
        magnitude(given, 0.5, masks={"conv.weight": torch.ones(3, 2)})


def test_prunable_is_convolutions_and_linear_layers_without_the_head() -> None:
    assert list(prunable(Small())) == ["stem.weight", "body.0.weight", "body.2.weight", "hidden.weight"]
    assert list(prunable(Small(), skip_head=False))[-1] == "head.weight"
    assert "stem.weight" not in prunable(Small(), skip_first_conv=True)


def test_prunable_excludes_by_parameter_or_module_name() -> None:
    assert list(prunable(Small(), exclude=("body", "stem.weight"))) == ["hidden.weight"]
    assert list(prunable(Small(), exclude="body.0")) == ["stem.weight", "body.2.weight", "hidden.weight"]
    with pytest.raises(InputError, match=r"exclude 'boddy': .*holds no parameter\.\n  Did you mean 'body'"):
        prunable(Small(), exclude=("boddy",))


def test_prunable_shows_the_weights_as_they_are_now() -> None:
    model = Small()
    found = prunable(model)["stem.weight"]
    with torch.no_grad():
        model.stem.weight.fill_(2)
    assert bool((found == 2).all())
    assert not found.requires_grad


def test_prunable_names_a_tied_weight_once_and_a_pruned_one_as_torch_does() -> None:
    model = Small()
    model.body[2].weight = nn.Parameter(torch.randn(6, 6, 1, 1))
    model.tied = nn.Conv2d(6, 6, 1)
    model.tied.weight = model.body[2].weight
    prune.random_unstructured(model.stem, "weight", 0.5)
    assert list(prunable(model)) == ["stem.weight_orig", "body.0.weight", "body.2.weight", "hidden.weight"]
    Masks({name: torch.ones_like(w) for name, w in prunable(model).items()}).check(model)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta")], ids=str)
def test_the_caller_s_default_dtype_and_device_are_no_part_of_the_result(dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Flatten()).eval()
    weights, x = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}, torch.randn(2, 3, 8, 8)

    def made() -> list[dict[str, Tensor]]:
        masks = random(weights, 0.3, seed=0)
        ways = (
            coarsen.refill(weights, masks), coarsen.regroup(weights, masks),
            coarsen.partition(weights, masks, group_rows=4), coarsen.shuffled_block(weights, masks, block=4),
        )  # fmt: skip
        return [
            dict(masks), *(dict(found.masks) for found in ways), dict(coarsen.with_batch_norm(model, ways[0].masks)),
            coarsen.channel_features(model, masks, [x], "feature_l1"),
            {"picture": picture(masks["1.weight"], [0, 1], [0])},
            {name: torch.empty(0, device="cpu") for group in coarsen.coupled_weights(model, (x,)) for name in group},
        ]  # fmt: skip

    wanted = made()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = made()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_model_in_the_place_of_its_weights_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for method in (magnitude, lambda weights, density: random(weights, density, seed=0)):
        with pytest.raises(
            InputError, match=r"weights: expected a dict of weights by parameter name; got a Sequential"
        ):
            method(model, 0.5)
