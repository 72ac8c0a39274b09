"""Masks: which weights exist. One bool per weight, True = kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor

from fxsparse.errors import InputError, MaskError, near
from fxsparse.ir.files import as_path, whole_file

_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel and DDP, torch.compile, Lightning
_SUGGEST_FLOAT = "A mask is one bool per weight, True = kept; 0/1 in uint8 or float is also read."


class Masks(Mapping[str, Tensor]):
    """Mapping from parameter name to a bool tensor of the parameter's shape, True = kept.

    Values may be given as bool, any integer dtype or floating 0/1; they are stored as bool and copied, so later
    changes to the caller's tensors do not reach in here. Raises MaskError on anything that is not 0 or 1, InputError
    for a path: `Masks.load` reads one.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        _refuse_path(masks)
        self._masks = {name: _as_bool(name, mask) for name, mask in (masks or {}).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, sparsity {self.sparsity():.3f})"

    def __eq__(self, other: object) -> bool:
        """Equal names and equal bits. (Comparing dicts of tensors would raise.)"""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(m, other[n]) for n, m in self.items())

    __hash__ = None  # type: ignore[assignment]

    def sparsity(self, name: str | None = None) -> float:
        """Fraction of zeros, of one mask or of all of them together. 0.0 when there are no masks."""
        chosen = [self[name]] if name is not None else list(self._masks.values())
        total = sum(m.numel() for m in chosen)
        return 1.0 - sum(int(m.sum()) for m in chosen) / total if total else 0.0

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read a .safetensors file of masks. Raises MaskError when it is missing, damaged or not safetensors."""
        try:
            return cls(load_file(as_path(path, "masks")))
        except (OSError, ValueError, SafetensorError) as error:
            raise MaskError(
                f"masks file {os.fspath(path)!r}",
                expected="a readable .safetensors file, one mask per parameter name",
                got="no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}",
                do="Write one with fxsparse.Masks(...).save(path). Pickled files are not read here, they can run code: "
                "fxsparse.read(path).masks reads those that hold tensors alone.",
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file (uint8, 1 = kept), whole or not at all. Raises InputError where it cannot be."""
        with whole_file(path) as name:
            try:
                save_file({n: m.to(torch.uint8).contiguous() for n, m in self.items()}, name)
            except SafetensorError as error:  # a full disk, say
                raise OSError(errno.EIO, str(error)) from None

    @classmethod
    def from_zeros(cls, model: nn.Module) -> Masks:
        """Masks from the zeros already in the weights: every parameter that holds at least one zero.

        -0.0 is a zero (multiplying a negative weight by a mask leaves one); 1e-30 is not.
        """
        return cls({n: p.detach() != 0 for n, p in model.named_parameters() if bool((p == 0).any())})

    @classmethod
    def from_prune(cls, model: nn.Module) -> Masks:
        """Masks that torch.nn.utils.prune left: the buffers `<name>_mask` beside parameters `<name>_orig`.

        They are keyed by the parameter the model really has: `conv.weight_orig`.
        """
        parameters = dict(model.named_parameters())
        masks = {}
        for name, buffer in model.named_buffers():
            original = name.removesuffix("_mask") + "_orig"
            if name.endswith("_mask") and original in parameters:
                masks[original] = buffer
        return cls(masks)

    def check(self, model: nn.Module) -> Masks:
        """These masks, keyed by the names `model.named_parameters()` uses; MaskError when one does not fit.

        Other names of a tied parameter, `conv.weight` for a pruned `conv.weight_orig`, and names that only a wrapper
        tells apart (`fit_names`) are accepted.
        """
        return Masks(dict(_matched(self._masks, model)))

    def apply_(self, model: nn.Module) -> None:
        """Zero the masked weights of `model` in place. Raises MaskError when a mask does not fit."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in self.check(model).items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def fit_names(given: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """`given` under names of `known`, where only a wrapper's prefix on all of them keeps the two from having any alike.

    DataParallel and DDP put `module.` before every name, torch.compile `_orig_mod.`, Lightning modules often `model.`;
    either side may have them. Other names stay, for the caller to refuse.
    """
    off, on = _prefix(given, known), _prefix(known, given)
    return {on + name.removeprefix(off): tensor for name, tensor in given.items()}


def _prefix(names: Collection[str], known: Collection[str]) -> str:
    """What wrappers put before all `names`, without which some are `known`; "" where some are, or none would be."""
    prefix = ""
    while names and not any(name.removeprefix(prefix) in known for name in names):
        more = next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
        if more is None:
            return ""
        prefix += more
    return prefix


def weight_of_mask(name: str, mask: Tensor, weights: Mapping[str, Tensor], otherwise: str) -> Tensor:
    """`weights[name]`. Raises MaskError when there is none, or none of the mask's shape.

    otherwise  the advice when no name is near
    """
    if name not in weights:
        raise MaskError(
            f"mask for {name!r}",
            expected="the name of one of the weights",
            got=f"a name that is not among the {len(weights)} weights",
            do=near(name, weights) or otherwise,
        )
    weight = weights[name]
    if weight.shape != mask.shape:
        raise MaskError(
            f"mask for {name!r}",
            expected=f"the weight's shape {tuple(weight.shape)}",
            got=str(tuple(mask.shape)),
            do="A mask is one bool per weight, True = kept.",
        )
    return weight


def _refuse_path(masks: object) -> None:
    if isinstance(masks, (str, os.PathLike)):
        raise InputError("masks", expected="a dict of masks by parameter name", got=f"the path {os.fspath(masks)!r}",
                         do="Masks.load(path) reads what masks.save(path) wrote, fxsparse.read(path).masks the files "
                         "of other tools too.")  # fmt: skip


def _no_tensor(name: str, mask: object) -> MaskError:
    array = type(mask).__module__.partition(".")[0] == "numpy"
    do = f"{_SUGGEST_FLOAT} NumPy's: torch.from_numpy(mask)." if array else _SUGGEST_FLOAT
    return MaskError(f"mask for {name!r}", expected="a tensor", got=type(mask).__name__, do=do)


def _as_bool(name: str, mask: Tensor) -> Tensor:
    if not isinstance(name, str):
        raise MaskError(f"mask for {name!r}", expected="a parameter name", got=type(name).__name__,
                        do="Use the names of model.named_parameters().")  # fmt: skip
    if not isinstance(mask, Tensor):
        raise _no_tensor(name, mask)
    kinds = {
        "a tensor without data (meta device)": mask.is_meta,
        "a nested tensor": mask.is_nested,
        f"a {type(mask).__name__}": isinstance(mask, (FakeTensor, MaskedTensor)),
        f"layout {mask.layout}": mask.layout is not torch.strided,
    }
    if got := next((kind for kind, found in kinds.items() if found), ""):
        raise MaskError(f"mask for {name!r}", expected="a dense tensor", got=got, do=_SUGGEST_FLOAT)
    if mask.dtype == torch.bool:
        return mask.detach().clone()
    if mask.is_complex():
        raise MaskError(f"mask for {name!r}", expected="bool, integer or float", got=str(mask.dtype), do=_SUGGEST_FLOAT)
    wrong = (mask != 0) & (mask != 1)
    if bool(wrong.any()):
        raise MaskError(
            f"mask for {name!r}",
            expected="only 0 and 1",
            got=f"{mask.dtype} with {int(wrong.sum())} other values, the first {mask[wrong][0].item():g}",
            do=_SUGGEST_FLOAT + " Weights are not a mask: use mask = weight != 0.",
        )
    return mask.detach() != 0


def _matched(masks: Mapping[str, Tensor], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    own_name = {id(p): n for n, p in parameters.items()}
    every = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[str, str] = {}
    fitted = fit_names(masks, every.keys() | {name.removesuffix("_orig") for name in every})
    for given, mask in fitted.items():
        parameter = _parameter(given, every)
        if parameter is None:
            raise MaskError(
                f"mask for {given!r}",
                expected=f"the name of one of the model's {len(parameters)} parameters",
                got="a name the model does not have",
                do=near(given, every) or f"Its names look like {next(iter(every), '(none)')!r}.",
            )
        if mask.shape != parameter.shape:
            raise MaskError(
                f"mask for {given!r}",
                expected=f"the parameter's shape {tuple(parameter.shape)}",
                got=str(tuple(mask.shape)),
                do=f"A mask is one bool per weight. To keep whole rows: {_rows(parameter)}.{_another(fitted, every)}",
            )
        name = own_name[id(parameter)]
        if given not in every and (other := _unpruned_name(parameter, every)):
            raise MaskError(
                f"mask for {given!r}",
                expected="a weight that is pruned wherever it is read",
                got=f"one that torch.nn.utils.prune masks there, and {other!r}, the same parameter, reads unmasked",
                do="Leave masks out: the model's own pruning is found. A mask would hold for both.",
            )
        if name in seen:
            raise MaskError(
                f"mask for {given!r}",
                expected="one mask per parameter",
                got=f"a second one: {seen[name]!r} is the same tensor",
                do="Give the mask of a tied parameter once.",
            )
        seen[name] = given
        yield name, mask


def _parameter(name: str, every: Mapping[str, Tensor]) -> Tensor | None:
    return every.get(name, every.get(f"{name}_orig"))


def _another(masks: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> str:
    """A question, where several masks have the shapes of other weights."""
    wrong = sum((p := _parameter(name, every)) is not None and p.shape != m.shape for name, m in masks.items())
    return f" So it is with {wrong} masks of {len(masks)}: are they of another model?" if wrong > 1 else ""


def _rows(weight: Tensor) -> str:
    """How a mask of rows [O] becomes one of `weight`."""
    return f"mask[:{', None' * (weight.dim() - 1)}].expand_as(weight)"


def _unpruned_name(parameter: Tensor, every: Mapping[str, Tensor]) -> str:
    """A name of a parameter, pruned under another one, by which it is not."""
    return next((name for name, p in every.items() if p is parameter and not name.endswith("_orig")), "")
