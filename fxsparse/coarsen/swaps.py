"""Which rows to put together: swaps between groups of fixed sizes, each weighed by what it keeps once columns follow.

E [O, n] energies (w^2 of kept weights), groups g of R_g rows, c_gj = sum of E_ij over its rows, t the price of keeping
one weight. What a grouping keeps, less what it costs, with the best columns:
    f = sum_g sum_j max(c_gj - t R_g, 0)
The gain of row i in group h, once an average row of h has left to make place:
    B_ih = sum_j max(b_hj + E_ij, 0) - max(b_hj, 0),    b_hj = c_hj (R_h - 1) / R_h - t R_h
and of its own group g exactly what it brings: sum_j max(c_gj - t R_g, 0) - max(c_gj - E_ij - t R_g, 0).
Swapping i in g with k in h gains about (B_ih - B_ig) + (B_kg - B_kh). The best pairs of every two groups are swapped
together; if what is really kept falls, fewer are. Lloyd's iteration (rows to the group whose columns hold most of
them) stops at once here, since a row's own large weights have chosen its group's columns: leaving the row out of its
own group is what Hartigan's method does for k-means (Hartigan & Wong 1979).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsparse.coarsen.cost import price

_BUFFER = 1 << 18  # elements that stay in a core's second cache
_WORK = 1 << 29  # elements of [O, G, n] in one sweep; beyond it a sample of the columns decides
_LEAST = 2e-4  # a round that keeps less than this share more swaps fewer rows the next time


def by_energy(energy: Tensor, sizes: Tensor) -> Tensor:
    """Labels int64 [O]: rows by falling energy, cut into groups of these sizes."""
    labels = torch.empty(len(energy), dtype=torch.int64)
    labels[energy.sum(1, dtype=torch.float64).argsort(descending=True, stable=True)] = torch.repeat_interleave(sizes)
    return labels


def group_energy(energy: Tensor, labels: Tensor, groups: int) -> Tensor:
    """Energy of each column in each group, [G, n]."""
    return energy.new_zeros(groups, energy.shape[1]).index_add_(0, labels, energy)


def improve(energy: Tensor, labels: Tensor, sizes: Tensor, budget: float, sweeps: int) -> Tensor:
    """Labels int64 [O] after at most `sweeps` rounds of swaps, no worse than the given ones.

    energy  float32 [O, n]
    labels  int64 [O], group of each row;  sizes  int64 [G], rows of each group, unchanged by swaps
    budget  kept weights
    """
    groups = len(sizes)
    if groups < 2 or not sweeps:
        return labels
    energy, share = _sample(energy, groups)
    kept, sums, worth = _state(energy, labels, sizes, budget * share)
    at_once = max(1, int(sizes.max()) // 2)
    for _ in range(sweeps):
        swapped = _swap(_gains(energy, sums, labels, sizes, worth), labels, groups, at_once)
        new_kept, new_sums, new_worth = _state(energy, swapped, sizes, budget * share)
        if new_kept < kept * (1 + _LEAST):
            at_once //= 2
        if new_kept > kept:
            kept, sums, worth, labels = new_kept, new_sums, new_worth, swapped
        if not at_once:
            break
    return labels


def _sample(energy: Tensor, groups: int) -> tuple[Tensor, float]:
    """Evenly spaced columns of a layer that is too large to look at whole, and which share of them that is."""
    rows, columns = energy.shape
    fit = max(1, min(columns, _WORK // (rows * groups)))
    chosen = torch.arange(fit) * columns // fit
    return (energy if fit == columns else energy[:, chosen].contiguous()), fit / columns


def _state(energy: Tensor, labels: Tensor, sizes: Tensor, budget: float) -> tuple[float, Tensor, float]:
    """What is kept with the best columns, each group's energies [G, n], and the price of keeping a weight."""
    sums = group_energy(energy, labels, len(sizes))
    worth = price(sums, sizes, budget)
    over = (sums - worth * sizes.to(sums)[:, None]).clamp_min_(0).sum(dtype=torch.float64)
    return float(over) + worth * budget, sums, worth


def _gains(energy: Tensor, sums: Tensor, labels: Tensor, sizes: Tensor, worth: float) -> Tensor:
    """B [O, G] of the module's text."""
    sizes = sizes.to(sums)  # a quotient of integers has the caller's default dtype
    threshold = (worth * sizes)[:, None]
    base = sums * ((sizes - 1) / sizes)[:, None] - threshold
    gains = energy.new_empty(len(energy), len(sizes))
    step = max(1, _BUFFER // energy.shape[1])
    for rows, out, own in zip(energy.split(step), gains.split(step), labels.split(step), strict=True):
        buffer = torch.empty_like(rows)
        for h, below in enumerate(base):
            torch.add(rows, below, out=buffer)
            out[:, h] = buffer.clamp_min_(0).sum(1)
        without = base.clamp_min(0).sum(1)
        out -= without
        over = sums[own] - threshold[own]
        out[torch.arange(len(own)), own] = over.clamp_min(0).sum(1) - (over - rows).clamp_min_(0).sum(1)
    return gains


def _swap(gains: Tensor, labels: Tensor, groups: int, at_once: int) -> Tensor:
    """Labels after the best swaps, at most `at_once` per group and none of a row twice."""
    gain = gains - gains.gather(1, labels[:, None])
    best, rows = _best_leavers(gain, labels, groups, at_once)
    pair = best + best.transpose(0, 1)  # [G, G, at_once]: the k-th best of g to h with the k-th best of h to g
    pair = torch.where(torch.ones(groups, groups).triu(1).bool()[..., None], pair, -torch.inf).flatten()
    few = min(int((pair > 0).sum()), 8 * groups * at_once)  # the others hardly ever get their turn
    order = pair.argsort(descending=True, stable=True)[:few]
    swapped, left, moved = labels.clone(), [at_once] * groups, set()
    for at in order.tolist():
        g, h, k = at // (groups * at_once), at // at_once % groups, at % at_once
        i, j = int(rows[g, h, k]), int(rows[h, g, k])
        if left[g] and left[h] and i not in moved and j not in moved:
            swapped[i], swapped[j] = h, g
            left[g], left[h] = left[g] - 1, left[h] - 1
            moved |= {i, j}
    return swapped


def _best_leavers(gain: Tensor, labels: Tensor, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """For every two groups g, h the rows of g that gain most in h: gains and rows, both [G, G, count]."""
    best = gain.new_full((groups, groups, count), -torch.inf)
    rows = torch.zeros((groups, groups, count), dtype=torch.int64)
    for g in range(groups):
        members = (labels == g).nonzero().flatten()
        top = gain[members].sort(dim=0, descending=True, stable=True)
        found = min(count, len(members))
        best[g, :, :found] = top.values[:found].T
        rows[g, :, :found] = members[top.indices[:found]].T
    return best, rows
