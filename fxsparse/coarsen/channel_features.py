"""How much each output channel does on calibration data.

a [N, O, P] a layer's output, one value per sample, channel and position; averages run over all samples of all batches
    feature_l1   mean |a|
    feature_l2   sqrt(mean a^2)
    saliency     mean over samples of |sum over positions of a * dL/da|: to first order how the loss changes when the
                 channel is taken from a sample (Molchanov et al., Importance Estimation, CVPR 2019)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import InputError, near

FEATURES = ("feature_l1", "feature_l2", "saliency")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Loss = Callable[[Any, Any], Tensor]


def channel_features(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], kind: str, *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """A score per output channel of each named weight, float64 [O] on the CPU: `refill(features=...)` takes it.

    names    parameter names of convolution and linear weights, such as the names of a mask
    batches  inputs of the model: a tensor, or a tuple that begins with one; for "saliency" pairs of input and target
    kind     "feature_l1", "feature_l2" or "saliency"
    loss     for "saliency": loss(model(input), target) -> scalar

    The model runs in evaluation mode and is left as it was; apply the masks first, the paper scores the masked network.
    Raises InputError on a name that is no convolution or linear weight, no batches, a missing loss, an unknown kind.
    """
    _check(kind, loss)
    modules = {name: _module_of(name, model) for name in names}
    sums = {
        name: torch.zeros(module.weight.shape[0], dtype=torch.float64, device="cpu") for name, module in modules.items()
    }
    counts = dict.fromkeys(modules, 0)
    with _evaluating(model), torch.set_grad_enabled(kind == "saliency"):
        for batch in batches:
            for name, score, count in _scores(model, modules, batch, kind, loss):
                sums[name] += score.double().cpu()
                counts[name] += count
    _check_ran(counts)
    means = {name: total / counts[name] for name, total in sums.items()}
    return {name: mean.sqrt() if kind == "feature_l2" else mean for name, mean in means.items()}


def _scores(
    model: nn.Module, modules: dict[str, nn.Module], batch: Any, kind: str, loss: Loss | None
) -> Iterator[tuple[str, Tensor, int]]:
    """For every call of a layer: its name, the sum of what `kind` averages, [O], and over how many."""
    x, target = (batch[0], batch[-1]) if isinstance(batch, (tuple, list)) else (batch, None)
    with _recorded(modules) as outputs:
        result = model(x)
    if loss is None or kind != "saliency":
        for name, output in outputs:
            a = _by_channel(modules[name], output.detach())
            yield name, (a.abs() if kind == "feature_l1" else a.square()).sum((0, 2)), a.shape[0] * a.shape[2]
        return
    grads = torch.autograd.grad(loss(result, target), [output for _, output in outputs], allow_unused=True)
    for (name, output), grad in zip(outputs, grads, strict=True):
        change = _by_channel(modules[name], output.detach() * (0 if grad is None else grad)).sum(2)
        yield name, change.abs().sum(0), change.shape[0]


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    outputs: list[tuple[str, Tensor]] = []

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.append((name, output))

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _by_channel(module: nn.Module, output: Tensor) -> Tensor:
    """[N, O, P]: samples, channels, positions."""
    if isinstance(module, nn.Linear):
        return output.reshape(output.shape[0], -1, output.shape[-1]).transpose(1, 2)
    return output.flatten(2)


def _module_of(name: str, model: nn.Module) -> Any:
    found = dict(model.named_modules(remove_duplicate=False)).get(name.rpartition(".")[0])
    if isinstance(found, (*_CONVOLUTIONS, nn.Linear)) and name.rpartition(".")[2] in ("weight", "weight_orig"):
        return found
    layers = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))]
    raise InputError(
        f"name {name!r}",
        expected="the weight of a convolution or linear layer of the model",
        got="another name",
        do=near(name, layers) or f"They look like {next(iter(layers), '(none)')!r}.",
    )


def _check(kind: str, loss: Loss | None) -> None:
    if kind not in FEATURES:
        raise InputError(
            f"kind {kind!r}",
            expected=f"one of {', '.join(map(repr, FEATURES))}",
            got=repr(kind),
            do=near(kind, FEATURES) or "'feature_l1' is the mean magnitude of a channel.",
        )
    if kind == "saliency" and loss is None:
        raise InputError(
            "loss",
            expected="a function of the model's output and the target, for saliency",
            got="None",
            do="For a classifier: loss=torch.nn.functional.cross_entropy",
        )


def _check_ran(counts: dict[str, int]) -> None:
    idle = [name for name, count in counts.items() if not count]
    if idle:
        raise InputError(
            "batches",
            expected="batches that run every named layer",
            got=f"none that runs {idle[0]!r}",
            do="Give at least one batch, and leave out layers that the model's forward does not call.",
        )
