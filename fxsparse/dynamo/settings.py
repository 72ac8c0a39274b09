"""The options of torch.compile, and whose names its masks use."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxsparse.compiler import Options, as_checkpoint, checked_options
from fxsparse.doubts import of_weights
from fxsparse.errors import InputError, near
from fxsparse.ir.masks import Masks
from fxsparse.readers import Checkpoint
from fxsparse.report import Report

DEFAULTS: dict[str, Any] = {
    "target": "inductor", "formats": "auto", "verify": "end", "measure": True, "cache_dir": None,
}  # fmt: skip
KNOWN = ("masks", "model", "on_report", *DEFAULTS)


class Given(Masks):
    """Masks of one call of torch.compile. Equal to itself alone: torch compares options whenever it looks up code."""

    def __init__(self, given: Checkpoint, source: object) -> None:
        """`source` is the path that they are from, if there is one."""
        super().__init__(given.masks)
        self._given, self._source = given.masks, source
        self._untold: Checkpoint | None = given

    def check(self, model: nn.Module) -> Masks:
        """As the masks that were given: those of a checkpoint's zeros let a model's buffers be.

        Warns, once, of weights that are left in the file.
        """
        for doubt in of_weights(model, self._untold, self._source) if self._untold else ():
            warnings.warn(doubt, UserWarning, stacklevel=2)
        self._untold = None
        return self._given.check(model)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked options of one call of torch.compile."""

    options: Options
    masks: Given | None
    model: nn.Module | None
    on_report: Callable[[Report], object]

    def root(self) -> nn.Module | None:
        """The module whose names count."""
        return self.model if self.model is not None else compiled_module()

    def names(self) -> dict[int, str]:
        """The names of the model's parameters and buffers, by id."""
        root = self.root()
        if root is None:
            return {}
        return {id(tensor): name for name, tensor in [*root.named_buffers(), *root.named_parameters()]}

    def masks_of(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """For each weight of a graph its mask.

        Raises MaskError, and InputError when no model says which name is which tensor, or masks are out of reach.
        """
        if self.masks is None:
            return [None] * len(weights)
        root = self.root()
        if root is None:
            raise InputError("options['masks']", expected="torch.compile called on a module", got="a function",
                             do="Say whose names they are: options={'masks': masks, 'model': model}.")  # fmt: skip
        parameters = dict(root.named_parameters())
        masks = self.masks.check(root)
        of = {id(parameters[name]): mask for name, mask in masks.items()}
        found = [of.get(id(w)) for w in weights]
        if any(isinstance(w, nn.Parameter) for w in weights):
            here = {id(w) for w in weights}
            self._refuse_unmasked({n: parameters[n] for n in masks if id(parameters[n]) not in here}, masks)
        return found

    def _refuse_unmasked(self, elsewhere: Mapping[str, Tensor], masks: Masks) -> None:
        """What dynamo leaves to Python reads the model's own weights: there, a mask has to be in them already."""
        for name, weight in elsewhere.items():
            if bool(((weight.detach() != 0) & ~masks[name].to(weight.device)).any()):
                raise InputError(
                    f"options['masks'], {name!r}",
                    expected="a weight that is zero where it is masked, as it is not in this graph: torch.compile "
                             "splits the model or runs it partly as Python, which no mask reaches",
                    got="other values there",
                    do="Masks(masks).apply_(model) zeroes them; or compile with fullgraph=True, from the model's root.",
                )  # fmt: skip


def read_options(options: dict[str, Any], mode: str | None) -> Settings:
    """Checked options. Raises InputError, MaskError or TargetError; masks are replaced in place by ones of our own."""
    if mode is not None:
        raise InputError(f"mode={mode!r} of torch.compile", expected="none with backend='fxsparse'", got=repr(mode),
                         do=f"Pass options instead: {', '.join(KNOWN)}.")  # fmt: skip
    for key in options:
        if key not in KNOWN:
            raise InputError(f"options[{key!r}] of torch.compile", expected=f"one of {', '.join(KNOWN)}",
                             got="an unknown name", do=near(str(key), KNOWN) or "Leave it out.")  # fmt: skip
    if options.get("masks") is not None and not isinstance(options["masks"], Given):
        # In place, since torch keeps this dict and compares it: two dicts of tensors would raise there.
        with unset_fake_temporarily(), tracing(None):  # else torch.load leaves the tensors of a file without data
            options["masks"] = Given(as_checkpoint(options["masks"]), options["masks"])
    model, on_report = options.get("model"), options.get("on_report", lambda report: None)
    if model is not None and not isinstance(model, nn.Module):
        raise InputError("options['model']", expected="a torch.nn.Module", got=type(model).__name__,
                         do="It is the module whose parameter names the masks use.")  # fmt: skip
    if not callable(on_report):
        raise InputError("options['on_report']", expected="a function of one Report", got=type(on_report).__name__,
                         do="To collect them: reports = []; options={'on_report': reports.append}.")  # fmt: skip
    values = {**DEFAULTS, **{key: options[key] for key in DEFAULTS if key in options}}
    return Settings(checked_options(dynamic_batch=False, **values), options.get("masks"), model, on_report)


def compiled_module() -> nn.Module | None:
    """The module that the running code was compiled for by torch.compile; None for a function.

    A back end is not told. Names in dynamo's sources are those of the frame, which after a graph break is the frame of
    some inner module; the wrapper that torch.compile made is on the stack, and knows its module.
    """
    from torch._dynamo import eval_frame

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__ and "fn" in frame.f_locals:
            fn, args = frame.f_locals["fn"], frame.f_locals.get("args", ())
            # a bound method; a wrapper around one of torch's own modules; self, of a decorated forward
            for owner in (getattr(fn, "__self__", None), getattr(fn, "__wrapped__", None), *args[:1]):
                if isinstance(owner, nn.Module):
                    return owner
            if frame.f_code.co_name == "compile_wrapper":  # else torch._dynamo.disable, around this back end
                return None
        frame = frame.f_back
    return None
