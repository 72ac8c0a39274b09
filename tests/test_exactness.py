"""The whole promise, in float64: real models, five mask recipes, two batch sizes, two image sizes, random statistics.

The reference is the user's own module with its weights zeroed, not anything fxsparse captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import fxsparse
import models
from fxsparse import Masks
from fxsparse.ir.capture import _export as export
from fxsparse.ir.inputs import Call
from tools.recipes import RECIPES, coupled_channels, randomize_batch_norm

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{n: getattr(tv, n) for n in ("resnet18", "resnet50", "vgg11", "vgg16_bn", "mobilenet_v2", "densenet121",
                                   "wide_resnet50_2")},
    **{n: getattr(models, n) for n in ("resnet18_cifar", "resnet50_cifar", "wrn32_2_cifar", "vgg16_cifar",
                                       "mobilenet_v1_cifar")},
}  # fmt: skip
SPARSITY = {"unstructured": 0.95}
REMOVED = {"resnet50": 0.348, "mobilenet_v2": 0.468, "densenet121": 0.267}  # at least, of all parameters
FIVE = ("dead_rows", "dead_rows_alive_bias", "dead_columns", "coupled_rows", "unstructured")


@lru_cache(maxsize=1)
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if name.startswith("vgg1") and not name.endswith("_cifar"):  # 4096 wide, the classifier alone would take 1 GB
        model.classifier[0], model.classifier[3], model.classifier[6] = (
            nn.Linear(25088, 96), nn.Linear(96, 80), nn.Linear(80, 50),
        )  # fmt: skip
    randomize_batch_norm(model, 1)
    return model.double()


@lru_cache(maxsize=2)  # both sizes of a model
def program(model: nn.Module, image: torch.Size) -> torch.export.ExportedProgram:
    return export(model, Call((torch.randn(2, *image, dtype=torch.float64),), {}), dynamic_batch=True)


@pytest.fixture(autouse=True)
def each_model_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes more than half of the time, and masks come after it."""

    def exported(model: nn.Module, call: Call, dynamic_batch: bool) -> torch.export.ExportedProgram:
        assert dynamic_batch
        return program(model, call.args[0].shape[1:])

    monkeypatch.setattr("fxsparse.ir.capture._export", exported)


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    copied = copy.deepcopy(model)
    masks.apply_(copied)
    return copied


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("recipe", FIVE)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_compute_the_masked_model(name: str, recipe: str) -> None:
    model = model_of(name)
    masks = Masks(RECIPES[recipe](model, sparsity=SPARSITY.get(recipe, 0.5), seed=0))
    reference = masked(model, masks)
    for side in (32, 47) if name.endswith("_cifar") else (64, 75):
        example = torch.randn(2, 3, side, side, dtype=torch.float64)
        fast = fxsparse.compile(model, masks, target="eager", example_inputs=(example,), verify="off", measure=False)
        for batch in (1, 3):
            x = torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
            with torch.no_grad():
                expected = reference(x)
            assert expected.std() > 0
            if batch > 1 and recipe != "unstructured":  # 95 % of all weights gone: the output hardly sees the input
                assert (expected[0] - expected[1]).abs().max() > 1e-6 * expected.abs().max()
            assert difference(fast(x), expected) <= 1e-10
    assert fast.report.params_after < fast.report.params_before


@pytest.mark.parametrize("recipe", ["dead_rows", "coupled_rows"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121"])
def test_at_least_what_removing_coupled_channels_reaches_is_removed(name: str, recipe: str) -> None:
    """The bound of group removal: a channel can go when it is dead in every layer it is coupled with."""
    model = model_of(name)
    masks = RECIPES[recipe](model, sparsity=0.5, seed=0)
    report = fxsparse.plan(model, masks, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    numbering = coupled_channels(model)
    removed = {row.name: row.rows_removed for row in report.rows}
    layers = {n: ids for n, ids in numbering.items() if f"{n}.weight" in removed}
    needed: set[int] = set()
    for layer, ids in layers.items():
        mask = masks.get(f"{layer}.weight", torch.ones(len(ids), 1, dtype=torch.bool))
        needed |= set(ids[mask.flatten(1).any(1)].tolist())
    assert report.params_after <= (1 - REMOVED.get(name, 0)) * report.params_before
    total = 0
    for layer, ids in layers.items():
        reachable = sum(int(i) not in needed for i in ids)
        assert removed[f"{layer}.weight"] >= reachable, layer
        total += reachable
    assert total > 0
