"""Which weights of a model are pruned: convolutions and linear layers, usually without the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fxsparse.errors import InputError, near

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable(
    model: nn.Module, *, exclude: Iterable[str] = (), skip_head: bool = True, skip_first_conv: bool = False
) -> dict[str, Tensor]:
    """The weights of the model's convolutions and linear layers, by parameter name, in module order.

    exclude          modules or parameters to leave dense, by name: "layer1" or "layer1.0.conv1.weight"
    skip_head        leave out the last linear layer in module order: its rows are classes, not features
    skip_first_conv  leave out the first convolution in module order

    The tensors are detached and share the parameters' memory: they show the weights as they are now. Biases, norms,
    embeddings, transposed convolutions and recurrent cells are not included. Raises InputError on an unknown name.
    Source of the exclusions: Chen et al., Coarsening the Granularity (ICML 2022): the head is never pruned.
    """
    found = list(_weights(model))
    linear = [name for name, _, module in found if isinstance(module, nn.Linear)]
    convolutions = [name for name, _, module in found if isinstance(module, _CONVOLUTIONS)]
    skipped = _named(model, exclude)
    skipped.update(linear[-1:] if skip_head else (), convolutions[:1] if skip_first_conv else ())
    return {name: weight for name, weight, _ in found if name not in skipped}


def refuse_model(weights: object) -> None:
    """Raises InputError for a model in the place of its weights."""
    if isinstance(weights, nn.Module):
        raise InputError("weights", expected="a dict of weights by parameter name", got=f"a {type(weights).__name__}",
                         do="Pass fxsparse.prune.prunable(model), or dict(model.named_parameters()).")  # fmt: skip


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    own_name = {id(p): n for n, p in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            # weight_orig is where torch.nn.utils.prune keeps the weight
            if key in ("weight", "weight_orig"):
                yield own_name[id(parameter)], parameter.detach(), module


def _named(model: nn.Module, exclude: Iterable[str]) -> set[str]:
    """The parameters that `exclude` names: itself, or everything inside the module of that name."""
    if isinstance(exclude, str):
        exclude = (exclude,)
    own_name = {id(p): n for n, p in model.named_parameters()}
    every = {name: own_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    named: set[str] = set()
    for given in exclude:
        inside = {own for name, own in every.items() if name == given or name.startswith(f"{given}.")}
        if not inside:
            raise InputError(
                f"exclude {given!r}",
                expected="the name of a module or parameter of the model",
                got="a name that holds no parameter",
                do=_suggestion(model, given, every),
            )
        named |= inside
    return named


def _suggestion(model: nn.Module, given: str, every: Iterable[str]) -> str:
    names = [*every, *(name for name, _ in model.named_modules() if name)]
    return near(given, names) or f"Its names look like {next(iter(names), '(none)')!r}."
