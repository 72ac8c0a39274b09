"""Masks and pruned checkpoints that other tools left. Nothing in a file is ever run.

A source is one file with `NAME`, `recognizes(found)` and `read(found, where)`, and a place in SOURCES: the first that
recognizes what a file holds reads it.
"""

from __future__ import annotations

import os
from types import ModuleType

from fxsparse.errors import FxSparseError, MaskError, first_line
from fxsparse.readers import compressed_tensors, nni, plain, torch_prune
from fxsparse.readers.checkpoint import Checkpoint
from fxsparse.readers.files import load

__all__ = ["SOURCES", "Checkpoint", "read"]

SOURCES: tuple[ModuleType, ...] = (torch_prune, compressed_tensors, nni, plain)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The masks in a file, and the weights where it holds them, whichever tool wrote it.

    path  a .safetensors file, a file saved by torch.save, or a folder of .safetensors files. It may hold masks by
          parameter name, a state dict under torch.nn.utils.prune, a compressed-tensors or SparseML checkpoint, masks
          of NNI, or a dense checkpoint with zeros
    Raises MaskError when it is missing, damaged, none of these, or a pickle that could run code; InputError for what is
    no path.
    """
    found, where = load(path), f"masks file {os.fspath(path)!r}"
    try:
        for source in SOURCES:
            if source.recognizes(found):
                checkpoint: Checkpoint = source.read(found, where)
                return checkpoint
    except FxSparseError:
        raise
    except Exception as error:  # noqa: BLE001 - of a sparse, quantized or nested tensor torch says what it likes
        raise MaskError(
            where, expected="dense tensors with data", got=first_line(error),
            do="Convert what is sparse, quantized or nested, and save it again.",
        ) from None  # fmt: skip
    cut_out = {"full_state_dict", "attributions"} <= found.keys()  # as tp.state_dict(model) gives it
    raise MaskError(
        where, expected=f"what one of {', '.join(s.NAME for s in SOURCES)} writes",
        got="a dict with " + ", ".join(map(repr, list(found)[:3])),
        do="Torch-Pruning leaves no masks, it cuts channels out: load its model, and compile that without masks."
        if cut_out else "Save the part with the masks or the state dict alone.",
    )  # fmt: skip
