"""What is timed: models by name, inputs for them, masks by recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxsparse.errors import near
from tools.block_recipes import BLOCK_RECIPES
from tools.decoder import DecodeStep, Prefill
from tools.recipes import RECIPES, randomize_batch_norm
from tools.transformer_recipes import heads_and_neurons

Inputs = tuple[Tensor, ...]
OWN_MODELS: dict[str, Callable[[], DecodeStep | Prefill]] = {
    "decode_step": DecodeStep,
    "decode_wide": lambda: DecodeStep(2, 4096, 14336, 128, 4),  # as wide as an 8-billion-parameter LLaMA
    "prefill": Prefill,
}


def build_model(name: str) -> nn.Module:
    """A model of `models`, torchvision or `OWN_MODELS`: seeded, in evaluation mode, batch norms that matter.

    Raises SystemExit for a name that none of them has.
    """
    torch.manual_seed(0)
    model = _maker(name)().eval()
    for layer in model.modules():  # torchvision's ViT starts with a head of zeros: all that is before it would be dead
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    randomize_batch_norm(model, 1)
    return model


def _maker(name: str) -> Callable[[], nn.Module]:
    import torchvision.models as vision

    import models

    if name in OWN_MODELS:
        return OWN_MODELS[name]
    if name in models.__all__:
        return cast("Callable[[], nn.Module]", getattr(models, name))
    known = vision.list_models()
    if name not in known:
        hint = near(name, [*known, *models.__all__, *OWN_MODELS]) or "python -m tools.bench --help says where from."
        raise SystemExit(f"no model {name!r} in models, torchvision.models or {', '.join(OWN_MODELS)}. {hint}")
    return cast("Callable[[], nn.Module]", vision.get_model_builder(name))


def example_inputs(model: nn.Module, arguments: argparse.Namespace) -> Inputs:
    """Images, but for a model that has inputs of its own."""
    if isinstance(model, (DecodeStep, Prefill)):
        return model.example_inputs(arguments.batch)
    side = arguments.side or (32 if arguments.model.endswith("_cifar") else 224)
    return (torch.randn(arguments.batch, 3, side, side, generator=torch.Generator().manual_seed(0)),)


def make_masks(recipe: str, model: nn.Module, sparsity: float, rows: int = 32) -> Mapping[str, Tensor]:
    """`refill_coupled` is refill_like with the channels of residual groups chosen together."""
    if recipe == "refill_coupled":
        return RECIPES["refill_like"](model, sparsity=sparsity, seed=0, coupled=True)  # type: ignore[call-arg]
    if recipe in BLOCK_RECIPES:
        return BLOCK_RECIPES[recipe](model, sparsity=sparsity, seed=0, rows=rows)
    every = {**RECIPES, "heads_and_neurons": heads_and_neurons}
    if recipe not in every:
        known = [*every, *BLOCK_RECIPES, "refill_coupled"]
        raise SystemExit(f"no recipe {recipe!r}. {near(recipe, known) or 'There are ' + ', '.join(known)}")
    return every[recipe](model, sparsity=sparsity, seed=0)


def without_grad(run: Callable[..., object], inputs: Sequence[Any]) -> Callable[[], object]:
    """A call to time."""

    def call() -> object:
        with torch.no_grad():
            return run(*inputs)

    return call
