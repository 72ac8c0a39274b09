"""What errors say to someone who writes Python, said to someone at the command line."""

from __future__ import annotations

from fxsparse.errors import FxSparseError

_INSTEAD = (
    ("dynamic_batch=False", "--fixed-batch"),
    ("a tuple for model(*example_inputs), or a dict for model(**example_inputs).",
     "an --input for each argument, with names where it is called by them: --input input_ids=1,128:50257."),
    ("example_inputs", "--input"),
    ("is chosen by model.cuda(), with inputs that are there too.", "is chosen by model.cuda(), in Python."),
)  # fmt: skip
_NO_IDS = "argument #1 'indices' to have one of the following scalar types: Long, Int; but got"


def said(error: FxSparseError) -> str:
    """The error's text, with its advice in words of the command line."""
    text = str(error)
    for python, flag in _INSTEAD:
        text = text.replace(python, flag)
    return text + " Of ids, say how many there are: --input 1,16:VOCAB." * (_NO_IDS in text)
