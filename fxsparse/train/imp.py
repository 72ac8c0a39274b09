"""Iterative magnitude pruning with rewinding: find a sparse network that trains as well as the dense one.

train to epoch i -> w_i;  train on to epoch t -> w_t                  # t epochs in all, i = rewind_fraction * t
repeat: prune `rate` of the remaining weights, the smallest |m * w_t| over all layers together -> m
        rewind to m * w_i;  train to epoch t -> w_t
after r rounds the density is (1 - rate)^r
Source: Frankle & Carbin (2019), Renda et al. (2020); rates and rewinding point from Chen et al., Coarsening the
Granularity (ICML 2022), Algorithm 1: rate 0.2, i = 5 % of the epochs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxsparse.ir.masks import Masks
from fxsparse.prune.magnitude import magnitude
from fxsparse.prune.prunable import prunable
from fxsparse.train.masked import masked
from fxsparse.train.ranges import check_ranges


@dataclass(frozen=True)
class Ticket:
    """What iterative magnitude pruning found.

    masks         the masks of the last round
    rewind_state  the dense model's state_dict at the rewinding epoch, copied: where training with masks starts from
    history       the masks of every round, the densest first
    """

    masks: Masks
    rewind_state: dict[str, Any] = field(repr=False)
    history: tuple[Masks, ...]


def imp(
    model: nn.Module,
    train_epochs: Callable[[nn.Module, int, int], None],
    *,
    epochs: int,
    rounds: int,
    rate: float = 0.2,
    rewind_fraction: float = 0.05,
    restart: bool = True,
    exclude: Iterable[str] = (),
    after_round: Callable[[int, Masks], None] | None = None,
) -> Ticket:
    """Prune `model` in rounds, rewinding its weights after each. The model ends trained, with the last masks applied.

    train_epochs     train_epochs(model, first, last) trains in place for epochs first, ..., last - 1 of the schedule;
                     it makes its own optimizer and sets the learning rate from the epoch. Masks need not concern it
    epochs           length of the schedule
    rounds           how often to prune; the density after r rounds is (1 - rate)^r, to the nearest weight
    rewind_fraction  where the rewinding point lies in the schedule; at least one epoch unless it is 0, the start
    restart          train every round on the whole schedule again, as the published results did; False continues from
                     the rewinding epoch, as the paper's algorithm is written
    exclude          modules or parameters to leave dense; the head always is, see `prunable`
    after_round      called with the round, 0 for the dense model, and its masks, while the trained weights are in place

    The dense model is trained in two calls, up to the rewinding epoch and from it on. Everything in the state_dict is
    rewound, running statistics too. Raises InputError on numbers outside their range.
    """
    _check_numbers(epochs, rounds, rate, rewind_fraction)
    masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model, exclude=exclude).items()})
    rewind_epoch = max(1, round(rewind_fraction * epochs)) if rewind_fraction else 0
    if rewind_epoch:
        train_epochs(model, 0, rewind_epoch)
    rewind_state = copy.deepcopy(model.state_dict())
    train_epochs(model, rewind_epoch, epochs)
    history: list[Masks] = []
    _report(after_round, 0, masks)
    for number in range(1, rounds + 1):
        masks = magnitude(prunable(model, exclude=exclude), (1 - rate) ** number, masks=masks)
        history.append(masks)
        model.load_state_dict(rewind_state)
        with masked(model, masks):
            train_epochs(model, 0 if restart else rewind_epoch, epochs)
        _report(after_round, number, masks)
    return Ticket(masks, rewind_state, tuple(history))


def _report(after_round: Callable[[int, Masks], None] | None, number: int, masks: Masks) -> None:
    if after_round is not None:
        after_round(number, masks)


def _check_numbers(epochs: int, rounds: int, rate: float, rewind_fraction: float) -> None:
    checks = (
        ("epochs", epochs, epochs >= 1, "at least 1", "It is the length of the schedule that every round trains on."),
        ("rounds", rounds, rounds >= 1, "at least 1", "The density after r rounds is (1 - rate)^r."),
        ("rate", rate, 0 < rate < 1, "a fraction, 0 < rate < 1", "0.2 prunes a fifth of what is left in every round."),
        (
            "rewind_fraction",
            rewind_fraction,
            0 <= rewind_fraction < 1,
            "a fraction, 0 <= rewind_fraction < 1",
            "0.05 rewinds to epoch 8 of 160; 0 rewinds to the weights as they were given.",
        ),
    )
    check_ranges(*((f"{name} {value!r}", value, fits, expected, do) for name, value, fits, expected, do in checks))
