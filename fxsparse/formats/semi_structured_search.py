"""Which of cuSPARSELt's algorithms is fastest for one product, asked of a process of its own.

Its default had 0.2 to 0.9 times a dense product's speed on an H200, what its search found up to 1.6. But there (torch
2.11) the search ended in an illegal instruction for some small matrices, after which a process can do nothing more on
its GPU. So another process searches, multiplies with what it found, and answers; if it dies, the answer is the default.

This file is also that process's program, and imports nothing but torch.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F

DEFAULT = 0
TIMEOUT_S = 120.0
WRONG = 0.05  # relative error of a product that is none; rounding to 16 bits makes 0.002
log = logging.getLogger("fxsparse")


def search(rows: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """The algorithm's number, for a weight [rows, columns] and x [tokens, columns]. Takes some seconds."""
    if not sys.executable or getattr(sys, "frozen", False):  # no Python that could be started
        return DEFAULT
    sizes = [str(size) for size in (rows, columns, tokens)]
    # -P: else this folder is searched for modules first, and one of its files is called operator
    words = [sys.executable, "-P", __file__, *sizes, str(dtype).removeprefix("torch."), str(device)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.debug("no search for the 2:4 product %s: %s", " ".join(words[3:]), error)
        return DEFAULT


def answer(rows: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """The same, here. Raises RuntimeError, or ends this process, where the library fails."""
    with torch.cuda.device(device):  # the library takes the current one's stream
        weight, x = (torch.randn(n, columns, device=device, dtype=dtype) for n in (rows, tokens))
        weight.view(rows, -1, 4)[..., :2] = 0
        bias = torch.randn(rows, device=device, dtype=dtype)
        compressed = torch._cslt_compress(weight)
        mm_search: Any = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        algorithm = int(mm_search(compressed, x.t(), None, None, None, True)[0])
        for b in (None, bias):
            y = torch._cslt_sparse_mm(compressed, x.t(), bias=b, transpose_result=True, alg_id=algorithm)
            exact = F.linear(x.float(), weight.float(), None if b is None else b.float())
            error = float((y.float() - exact).norm() / exact.norm())
            if not error < WRONG:
                raise RuntimeError(f"algorithm {algorithm} is off by {error}")
    return algorithm


if __name__ == "__main__":
    shape, (kind, where) = [int(size) for size in sys.argv[1:4]], sys.argv[4:]
    found = answer(shape[0], shape[1], shape[2], getattr(torch, kind), torch.device(where))
    sys.stdout.write(f"{found}\n")
