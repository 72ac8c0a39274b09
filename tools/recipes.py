"""Mask recipes: the patterns that pruning methods leave behind, made to order for tests and benchmarks.

`recipe(model, *, sparsity, seed)` returns bool masks, True = kept, by the name of each parameter it touches. It draws
from a generator of its own, so a seed always gives the same masks, and it never changes the model.

Channels are numbered across the whole model. A `Numbering` says which channel each row of each layer and each element
of each batch norm is; rows of the same channel live and die together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.ir.union_find import UnionFind

Numbering = dict[str, Tensor]  # module name -> [rows] int64
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Modules and functions whose output has the channels of their first input.
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
KEEPING_MODULES = (*POOLINGS, *ACTIVATIONS, nn.Dropout, nn.Dropout2d, nn.Identity)
KEEPING_NAMES = {
    *("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"),
    *("relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
    *("dropout", "stochastic_depth", "contiguous", "clone"),
}
# Functions that pair the channels of their inputs.
COUPLING_NAMES = {"add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul"}


class Recipe(Protocol):
    """What every recipe can be called as."""

    def __call__(self, model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]: ...


def dead_rows(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Random rows of every convolution and hidden linear layer, with their biases and the batch norm right after.

    Each layer chooses for itself, so where layers are added few sums are dead. The classifier is left alone.
    """
    numbering = separate_channels(model)
    return _mask_channels(model, numbering, _random_channels(numbering, masked_layers(model), sparsity, seed))


def dead_rows_alive_bias(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """The weights of `dead_rows` alone: biases and batch norms stay, so dead channels are constants other than zero."""
    weights = {f"{name}.weight" for name in masked_layers(model)}
    masks = dead_rows(model, sparsity=sparsity, seed=seed)
    return {name: mask for name, mask in masks.items() if name in weights}


def dead_columns(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Random input channels of every convolution but the first, and of every linear layer.

    After a flatten they are single columns of the linear layer; of a depthwise convolution they are its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    first, masks = first_convolution(model), {}
    for name, layer in _layers(model).items():
        if name != first:
            masks[f"{name}.weight"] = _columns(layer, sparsity, generator)
    return _of_parameters(model, masks)


def coupled_rows(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """`dead_rows` with the same channels in all layers that are coupled: see `coupled_channels`."""
    numbering = coupled_channels(model)
    return _mask_channels(model, numbering, _random_channels(numbering, masked_layers(model), sparsity, seed))


def unstructured(model: nn.Module, *, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Every weight of every convolution and linear layer is masked with probability `sparsity`."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, layer in _layers(model).items():
        kept = torch.rand(layer.weight.shape, generator=generator) >= sparsity
        masks[f"{name}.weight"] = kept.to(layer.weight.device)
    return _of_parameters(model, masks)


def refill_like(model: nn.Module, *, sparsity: float, seed: int, coupled: bool = False) -> dict[str, Tensor]:
    """Refill: of every convolution only the ceil(density * O) rows with the largest l1 norm, chosen by weight alone.

    The batch norm right after is masked with them; the first convolution and linear layers are left alone.
    coupled  choose per channel space by the sum of l1 norms, so that residual channels can really go;
             the first convolution then loses the channels it shares with others, if any
    `seed` changes nothing. Source: Chen et al., "Coarsening the granularity", arXiv:2202.04736.
    """
    del seed
    numbering = coupled_channels(model) if coupled else separate_channels(model)
    first = first_convolution(model)
    names = [n for n, layer in masked_layers(model).items() if n != first and not isinstance(layer, nn.Linear)]
    scores = _l1_norms(model, numbering)
    dead = [_weakest(channels, scores, sparsity) for channels in _spaces(numbering, names)]
    return _mask_channels(model, numbering, dead)


RECIPES: dict[str, Recipe] = {
    "dead_rows": dead_rows,
    "dead_rows_alive_bias": dead_rows_alive_bias,
    "dead_columns": dead_columns,
    "coupled_rows": coupled_rows,
    "unstructured": unstructured,
    "refill_like": refill_like,
    "refill_like_coupled": partial(refill_like, coupled=True),
}


def randomize_batch_norm(model: nn.Module, seed: int) -> None:
    """Give every batch norm of `model` random statistics, weights and biases, in place, none of them near 0.

    The variance is 0.5 to 2 times that of a convolution behind a ReLU, so that deep models stay in range and their
    output still depends on their input: with variances twice as large MobileNet-v1's moves by 1e-5 of its size, with
    these by 3e-2.
    """
    generator = torch.Generator().manual_seed(seed)
    before = {norm: layer for layer, norm in _norms_after(model)}
    layers = _layers(model)
    for name, norm in _batch_norms(model).items():
        gain = _gain(layers[before[name]]) if name in before else 1.0
        for tensor, low, high, signed in (
            (norm.running_mean, 0.1, 0.5, True),
            (norm.running_var, 0.5 * gain, 2.0 * gain, False),
            (norm.weight, 0.5, 1.5, True),
            (norm.bias, 0.1, 0.5, True),
        ):
            _fill(tensor, low, high, signed, generator)


def separate_channels(model: nn.Module) -> Numbering:
    """Channels of their own for every convolution and hidden linear layer; the batch norm right after has the same."""
    numbering, start = {}, 0
    for name, layer in masked_layers(model).items():
        rows = layer.weight.shape[0]
        numbering[name] = torch.arange(start, start + rows)
        start += rows
    for layer_name, norm in _norms_after(model):
        if layer_name in numbering:
            numbering[norm] = numbering[layer_name]
    return numbering


def coupled_channels(model: nn.Module) -> Numbering:
    """One number for rows that are forced to share a channel: residual stages, depthwise chains, gates.

    Union-find over the traced model: additions, products and depthwise convolutions unite the channels they pair;
    elementwise operators, batch norm and pooling pass them on, concatenation appends them. Any other operator ends
    the trail (its output couples nothing), as does a model that torch.fx cannot trace: see `separate_channels`.
    """
    graph = _trace(model)
    if graph is None:
        return separate_channels(model)
    return _Coupling(model, graph).numbering()


class _Coupling(fx.Interpreter):
    """Runs the traced model on channel numbers: a value is its channels, [C] int64, or None where they are unknown."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self.own = separate_channels(model)
        self.found = {name: self.own[name] for name in masked_layers(model)}
        self.same: UnionFind[int] = UnionFind()

    def numbering(self) -> Numbering:
        """The channels of every layer and batch norm after one run, each by its root."""
        self.run()
        return {name: torch.tensor([self.same.root(i) for i in c.tolist()]) for name, c in self.found.items()}

    def unite(self, first: Tensor, second: Tensor) -> Tensor:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self.same.unite(a, b)
        return first

    def placeholder(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> None:
        return None

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> None:
        return None

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return self.operator(str(target), args, kwargs)

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return self.operator(getattr(target, "__name__", str(target)), args, kwargs)

    def operator(self, name: str, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if name in ("cat", "concat"):
            return _concatenated(*args, **kwargs)
        known = [a for a in args if isinstance(a, Tensor)]
        if name in COUPLING_NAMES and known:
            return self.paired(known)
        return known[0] if name in KEEPING_NAMES and known else None

    def paired(self, values: list[Tensor]) -> Tensor:
        widest = max(values, key=len)
        for value in values:
            if len(value) == len(widest):
                self.unite(widest, value)
        return widest

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Tensor | None:
        name, x = str(target), args[0] if args else None
        module = self.module.get_submodule(name)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return self.layer(name, module, x)
        if isinstance(module, _BatchNorm) and isinstance(x, Tensor) and len(x) == module.num_features:
            return self.unite(x, self.found.setdefault(name, x))
        if isinstance(module, KEEPING_MODULES) and isinstance(x, Tensor):
            return x
        return None

    def layer(self, name: str, layer: Layer, x: Argument) -> Tensor | None:
        own = self.found.get(name)
        depthwise = not isinstance(layer, nn.Linear) and layer.groups == layer.in_channels > 1
        if own is not None and depthwise and isinstance(x, Tensor) and len(own) % len(x) == 0:
            self.unite(x.repeat_interleave(len(own) // len(x)), own)
        return own


def _concatenated(tensors: Any, dim: Any = 0) -> Tensor | None:
    """The channels of a concatenation along them; None when those of any part are unknown."""
    known = [t for t in tensors if isinstance(t, Tensor)]
    return torch.cat(known) if dim in (1, -3) and len(known) == len(tensors) else None


def _layers(model: nn.Module) -> dict[str, Layer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}


def masked_layers(model: nn.Module) -> dict[str, Layer]:
    """Every convolution and linear layer but the classifier: the last of them, if it is linear."""
    layers = _layers(model)
    last = next(reversed(layers), None)
    return {name: m for name, m in layers.items() if name != last or not isinstance(m, nn.Linear)}


def first_convolution(model: nn.Module) -> str | None:
    """Its name; None when there is none."""
    return next((n for n, layer in _layers(model).items() if not isinstance(layer, nn.Linear)), None)


def _trace(model: nn.Module) -> fx.Graph | None:
    """The graph of the model's own forward, or None when it has control flow that torch.fx does not see through."""
    try:
        return fx.Tracer().trace(model)
    except (TraceError, TypeError):
        return None


def _norms_after(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of a layer and a batch norm that reads its output; by module order when the model cannot be traced."""
    layers, norms, graph = _layers(model), _batch_norms(model), _trace(model)
    if graph is None:
        leaves = [n for n, m in model.named_modules() if not any(True for _ in m.children())]
        pairs = list(pairwise(leaves))
    else:
        calls = [n for n in graph.nodes if n.op == "call_module"]
        pairs = [(node.target, user.target) for node in calls for user in node.users if user.op == "call_module"]
    return [(a, b) for a, b in pairs if a in layers and b in norms and norms[b].num_features == len(layers[a].weight)]


def _spaces(numbering: Numbering, names: Iterable[str]) -> list[Tensor]:
    """The channel spaces of the named layers: layers that have a channel in common are in the same one, sorted."""
    spaces: list[set[int]] = []
    for name in names:
        channels = set(numbering[name].tolist())
        touching = [s for s in spaces if not s.isdisjoint(channels)]
        spaces = [s for s in spaces if s.isdisjoint(channels)] + [channels.union(*touching)]
    return [torch.tensor(sorted(s)) for s in spaces]


def _random_channels(numbering: Numbering, names: Iterable[str], sparsity: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [space[_draw(len(space), sparsity, generator)] for space in _spaces(numbering, names)]


def _draw(n: int, sparsity: float, generator: torch.Generator) -> Tensor:
    """round(sparsity * n) of the numbers below n, but never all of them."""
    return torch.randperm(n, generator=generator)[: min(round(sparsity * n), n - 1)]


def _highest(numbering: Numbering) -> int:
    return max((int(channels.max()) for channels in numbering.values()), default=-1)


def _l1_norms(model: nn.Module, numbering: Numbering) -> Tensor:
    """For each channel, the sum of l1 norms of the rows that are this channel. [highest number + 1] float64."""
    layers = masked_layers(model)
    norms = torch.zeros(_highest(numbering) + 1, dtype=torch.float64)
    for name, layer in layers.items():
        rows = layer.weight.detach().flatten(1).abs().sum(1, dtype=torch.float64)
        norms.index_add_(0, numbering[name], rows.cpu())
    return norms


def _weakest(channels: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    # rounded first: (1 - 0.7) * 10 is 3.0000000000000004 and would keep 4
    kept = max(1, math.ceil(round((1 - sparsity) * len(channels), 6)))
    return channels[norms[channels].argsort(descending=True, stable=True)[kept:]]


def _mask_channels(model: nn.Module, numbering: Numbering, dead: list[Tensor]) -> dict[str, Tensor]:
    """Masks of the weight rows, biases and batch norm elements that are a dead channel."""
    every_dead = torch.cat([torch.empty(0, dtype=torch.int64), *dead])
    parameters, masks = dict(model.named_parameters()), {}
    for name, channels in numbering.items():
        rows = torch.isin(channels, every_dead)
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in parameters and bool(rows.any()):
                masks[parameter] = _whole_rows(~rows, parameters[parameter])
    return masks


def _whole_rows(kept: Tensor, parameter: Tensor) -> Tensor:
    """Mask of the parameter's shape. kept [rows] bool"""
    kept = kept.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
    return kept.expand_as(parameter).contiguous()


def _columns(layer: Layer, sparsity: float, generator: torch.Generator) -> Tensor:
    """Mask of a weight with random input channels dead. [O, I / groups, ...] bool."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    rows, columns = mask.shape[0] // groups, mask.shape[1]
    dead = _draw(groups * columns, sparsity, generator)
    mask.view(groups, rows, columns, -1)[dead // columns, :, dead % columns] = False
    return mask


def _of_parameters(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the masks of weights that are computed (parametrized, pruned) or have another name already (tied)."""
    names = {name for name, _ in model.named_parameters()}
    return {name: mask for name, mask in masks.items() if name in names}


def _gain(layer: Layer) -> float:
    """Mean variance of the layer's outputs when its inputs are relu(N(0, 1)), whose mean square is 1/2."""
    return 0.5 * layer.weight.detach().flatten(1).square().sum(1).mean().item()


@torch.no_grad()
def _fill(tensor: Tensor | None, low: float, high: float, signed: bool, generator: torch.Generator) -> None:
    """Uniform in [low, high], of either sign when `signed`. A batch norm without affine or statistics has None."""
    if tensor is None:
        return
    values = low + (high - low) * torch.rand(tensor.shape, generator=generator)
    if signed:
        values *= 1 - 2 * torch.randint(2, tensor.shape, generator=generator)
    tensor.copy_(values)
