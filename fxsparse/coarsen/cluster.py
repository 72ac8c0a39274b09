"""Rows that keep similar columns, put together: METIS, Mt-KaHyPar, complete linkage, or our own swaps.

Each gives clusters of rows, the largest first, of rows that keep something; sizes are free, or nearly equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsparse.coarsen.swaps import by_energy, improve
from fxsparse.errors import InputError, near

PARTITIONERS = ("metis", "mtkahypar", "hierarchical", "saliency")
_NEIGHBORS = 32  # edges per row of the similarity graph
_IMBALANCE = 0.1  # the released code's UBfactor


def clusters(mask: Tensor, energy: Tensor, parts: int, partitioner: str, sweeps: int = 24) -> list[Tensor]:
    """Clusters of the rows, each int64 ascending; the largest first, of equal sizes the one with the lower label.

    mask    bool [O, n], without empty rows;  energy  float32 [O, n]
    parts   how many: equal with "saliency", within 10 % of it with METIS and Mt-KaHyPar, free with complete linkage
    Raises InputError when the package that `partitioner` needs is not installed.
    """
    parts = min(parts, len(mask))
    if parts <= 1:
        return [torch.arange(len(mask))] if len(mask) else []
    if partitioner == "metis":
        labels = _metis(mask, parts)
    elif partitioner == "mtkahypar":
        labels = _mtkahypar(mask, parts)
    elif partitioner == "hierarchical":
        labels = complete_linkage(1 - cosine(mask), parts)
    else:
        sizes = torch.tensor([len(part) for part in torch.arange(len(mask)).tensor_split(parts)])
        labels = improve(energy, by_energy(energy, sizes), sizes, float(mask.sum()), sweeps)
    found = [(labels == label).nonzero().flatten() for label in range(parts)]
    return sorted((rows for rows in found if len(rows)), key=lambda rows: -len(rows))


def check_partitioner(partitioner: str) -> None:
    """Raises InputError on an unknown one."""
    if partitioner not in PARTITIONERS:
        raise InputError(
            f"partitioner {partitioner!r}",
            expected=f"one of {', '.join(map(repr, PARTITIONERS))}",
            got=repr(partitioner),
            do=near(partitioner, PARTITIONERS) or "'metis' stands in for the paper's hMETIS.",
        )


def cosine(mask: Tensor) -> Tensor:
    """|A and B| / sqrt(|A| |B|) of the columns every two rows keep, float32 [O, O]; 0 for a row that keeps none."""
    bits = mask.float()
    count = bits.sum(1)
    return (bits @ bits.T) / (count[:, None] * count).sqrt().clamp_min(1)


def jaccard(mask: Tensor) -> Tensor:
    """|A and B| / |A or B| of the columns every two rows keep, float32 [O, O]; 0 for two rows that keep none."""
    bits = mask.float()
    both, count = bits @ bits.T, bits.sum(1)
    return both / (count[:, None] + count - both).clamp_min(1)


def complete_linkage(distance: Tensor, parts: int) -> Tensor:
    """Agglomerative clustering with complete linkage: labels int64 [O], 0 to parts - 1 by each cluster's first row.

    distance  float [O, O], symmetric
    The nearest-neighbor chain: O^2 in time and memory (Murtagh 1983). Of equal distances the lower row is nearer.
    """
    d = distance.double().numpy().copy()
    np.fill_diagonal(d, np.inf)
    merges = sorted(_merges(d), key=lambda merge: merge[0])[: len(d) - parts]
    parent = np.arange(len(d))
    for _, a, b in merges:
        parent[_root(parent, max(a, b))] = _root(parent, min(a, b))
    roots = np.array([_root(parent, row) for row in range(len(d))])
    return torch.from_numpy(np.unique(roots, return_inverse=True)[1])


def _merges(d: np.ndarray) -> Iterator[tuple[float, int, int]]:
    """Every merge, as (distance, a row of one cluster, a row of the other), not in order. Overwrites d."""
    alive = np.ones(len(d), dtype=bool)
    chain: list[int] = []
    for _ in range(len(d) - 1):
        chain = chain or [int(alive.argmax())]
        while True:
            row = d[chain[-1]]
            nearest = int(row.argmin())
            if len(chain) > 1 and row[chain[-2]] <= row[nearest]:
                break
            chain.append(nearest)
        a, b = sorted((chain.pop(), chain.pop()))
        yield float(d[a, b]), a, b
        np.maximum(d[a], d[b], out=d[a])
        d[:, a] = d[a]
        d[a, a], alive[b] = np.inf, False
        d[b, :] = d[:, b] = np.inf


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _metis(mask: Tensor, parts: int) -> Tensor:
    """METIS on the graph that joins each row to the rows of the largest Jaccard similarity, weighted by it."""
    try:
        import pymetis
    except ImportError as error:
        raise _missing("metis", "pymetis", "pip install 'fxsparse[metis]'") from error
    neighbors, weights = _graph(jaccard(mask))
    options = pymetis.Options(seed=0, ufactor=int(1000 * _IMBALANCE))
    return torch.tensor(pymetis.part_graph(parts, adjacency=neighbors, eweights=weights, options=options)[1])


def _graph(similarity: Tensor) -> tuple[list[list[int]], list[int]]:
    """The similarity graph as METIS reads it: each row's neighbors, and one integer weight for each of them."""
    weight = (1000 * similarity).round().long().fill_diagonal_(0)
    near = torch.zeros(weight.shape, dtype=torch.bool)
    near.scatter_(1, weight.argsort(dim=1, descending=True, stable=True)[:, :_NEIGHBORS], True)
    joined = (near | near.T) & (weight > 0)
    return [row.nonzero().flatten().tolist() for row in joined], weight[joined].tolist()


def _mtkahypar(mask: Tensor, parts: int) -> Tensor:
    """Mt-KaHyPar, deterministic, on the hypergraph whose vertices are rows and whose hyperedges are columns."""
    library = _mtkahypar_library()
    library.set_seed(0)
    context = _mtkahypar_threads().context_from_preset(library.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(parts, _IMBALANCE, library.Objective.KM1)
    context.logging = False
    edges = [rows.tolist() for column in mask.T if len(rows := column.nonzero().flatten()) > 1]
    found = _mtkahypar_threads().create_hypergraph(context, len(mask), len(edges), edges).partition(context)
    return torch.tensor([found.block_id(row) for row in range(len(mask))])


@cache
def _mtkahypar_threads() -> Any:
    """Its thread pool, which it makes once per process."""
    return _mtkahypar_library().initialize(1)


def _mtkahypar_library() -> Any:
    try:
        import mtkahypar
    except ImportError as error:
        raise _missing("mtkahypar", "mtkahypar", "pip install mtkahypar") from error
    return mtkahypar


def _missing(partitioner: str, package: str, install: str) -> InputError:
    return InputError(
        f"partitioner {partitioner!r}",
        expected=f"the package {package}",
        got="a machine without it",
        do=f"{install}, or choose 'hierarchical' or 'saliency', which need no package.",
    )
