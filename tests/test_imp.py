"""Iterative magnitude pruning and the context that keeps masked weights at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import InputError, MaskError
from fxsparse.ir.masks import Masks
from fxsparse.prune import prunable, random
from fxsparse.train import imp, masked


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    return [
        (torch.randn(16, 1, 5, 5, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(3)
    ]


def one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    for x, y in batches(epoch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


class Trainer:
    """A `train_epochs` that writes down what it was called with and what it found."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.found: list[dict[str, Tensor]] = []
        self.left: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, first: int, last: int) -> None:
        self.calls.append((first, last))
        self.found.append(copy.deepcopy(model.state_dict()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for epoch in range(first, last):
            one_epoch(model, optimizer, epoch)
        self.left.append(copy.deepcopy(model.state_dict()))


def assert_zero_exactly_where_masked(model: nn.Module, masks: Masks) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert bool((parameters[name][~mask] == 0).all()), name
        assert bool((parameters[name][mask] != 0).all()), name


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd, one tensor at a time": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=False),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_are_zero_after_every_step_of_an_optimizer_that_already_has_momentum(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    one_epoch(model, optimizer, 0)
    masks = random(prunable(model), 0.4, seed=1)
    with masked(model, masks):
        assert_zero_exactly_where_masked(model, masks)
        for epoch in range(1, 4):
            one_epoch(model, optimizer, epoch)
            assert_zero_exactly_where_masked(model, masks)
    assert_zero_exactly_where_masked(model, masks)


def test_gradients_of_masked_weights_are_zero_when_they_arrive_even_if_infinite() -> None:
    model = nn.Linear(3, 2, bias=False)
    masks = {"weight": torch.tensor([[1, 0, 1], [0, 1, 1]])}
    with masked(model, masks):
        model(torch.tensor([[1.0, float("inf"), 2.0]])).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad[0].tolist() == [1.0, 0.0, 2.0]
    assert model.weight.grad[1].tolist() == [0.0, float("inf"), 2.0]


def test_weights_written_past_the_optimizer_are_masked_on_exit_even_after_an_error() -> None:
    model = network()
    masks = random(prunable(model), 0.4, seed=1)

    def write_and_fail() -> None:
        with masked(model, masks), torch.no_grad():
            model[0].weight.fill_(1)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_and_fail()
    assert bool((model[0].weight[~masks["0.weight"]] == 0).all())


def test_after_the_block_the_model_trains_freely_again() -> None:
    model = network()
    masks = random(prunable(model), 0.4, seed=1)
    with masked(model, masks):
        pass
    one_epoch(model, OPTIMIZERS["sgd"](model), 0)
    assert bool((model[0].weight[~masks["0.weight"]] != 0).any())
    assert not model[0].weight._backward_hooks


def test_masks_are_looked_at_once_and_not_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, checked = network(), []
    check = Masks.check
    monkeypatch.setattr(Masks, "check", lambda self, model: checked.append(model) or check(self, model))
    with masked(model, random(prunable(model), 0.4, seed=1)):
        one_epoch(model, OPTIMIZERS["sgd"](model), 0)
    assert len(checked) == 1


def test_other_models_train_freely_meanwhile() -> None:
    model, other = network(), network()
    with masked(model, random(prunable(model), 0.4, seed=1)):
        one_epoch(other, OPTIMIZERS["sgd"](other), 0)
    assert not any(bool((p == 0).any()) for p in prunable(other).values())


def test_masks_that_do_not_fit_are_refused_and_leave_nothing_behind() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(MaskError, match=r"mask for '0.weight': expected the parameter's shape"),
        masked(model, {"0.weight": torch.ones(6)}),
    ):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("restart", [True, False])
def test_imp_ends_with_exactly_zero_masked_weights_despite_momentum_and_weight_decay(restart: bool) -> None:
    model = network()
    ticket = imp(model, Trainer(), epochs=4, rounds=3, restart=restart)
    assert_zero_exactly_where_masked(model, ticket.masks)
    assert list(ticket.masks) == ["0.weight", "4.weight"]


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_density_after_r_rounds_is_a_power_to_the_nearest_weight(rate: float) -> None:
    model = network()
    total = sum(w.numel() for w in prunable(model).values())
    ticket = imp(model, Trainer(), epochs=1, rounds=5, rate=rate)
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in ticket.history]
    assert counts == [round((1 - rate) ** r * total) for r in range(1, 6)]
    assert ticket.masks == ticket.history[-1]


def test_every_round_prunes_the_smallest_trained_weights_among_those_left() -> None:
    train = Trainer()
    model = network()
    ticket = imp(model, train, epochs=3, rounds=3)
    before = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model).items()})
    for masks, trained in zip(ticket.history, train.left[1:], strict=False):
        assert not any(bool((masks[name] & ~before[name]).any()) for name in masks)
        kept = torch.cat([trained[name][mask].abs() for name, mask in masks.items()])
        pruned = torch.cat([trained[name][before[name] & ~mask].abs() for name, mask in masks.items()])
        assert float(kept.min()) >= float(pruned.max())
        before = masks


@pytest.mark.parametrize(
    ("epochs", "fraction", "restart", "expected"),
    [
        (4, 0.05, True, [(0, 1), (1, 4), (0, 4), (0, 4)]),
        (4, 0.05, False, [(0, 1), (1, 4), (1, 4), (1, 4)]),
        (4, 0.5, False, [(0, 2), (2, 4), (2, 4), (2, 4)]),
        (4, 0.0, True, [(0, 4), (0, 4), (0, 4)]),
        (1, 0.05, True, [(0, 1), (1, 1), (0, 1), (0, 1)]),
    ],
)
def test_epochs_are_trained_in_this_order(
    epochs: int, fraction: float, restart: bool, expected: list[tuple[int, int]]
) -> None:
    train = Trainer()
    imp(network(), train, epochs=epochs, rounds=2, rewind_fraction=fraction, restart=restart)
    assert train.calls == expected


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_every_round_starts_from_the_early_weights_masked_and_the_early_statistics(fraction: float) -> None:
    train = Trainer()
    ticket = imp(network(), train, epochs=4, rounds=2, rewind_fraction=fraction)
    early = train.left[0] if fraction else network().state_dict()
    assert train.calls[0] == (0, round(4 * fraction) or 4)
    assert all(torch.equal(ticket.rewind_state[name], value) for name, value in early.items())
    for masks, found in zip(ticket.history, train.found[-2:], strict=True):
        for name, value in early.items():
            assert torch.equal(found[name], value * masks[name] if name in masks else value), name


def test_the_rewind_state_is_a_copy() -> None:
    model = network()
    ticket = imp(model, Trainer(), epochs=2, rounds=1)
    before = copy.deepcopy(ticket.rewind_state)
    with torch.no_grad():
        model[0].weight.fill_(3)
    assert torch.equal(ticket.rewind_state["0.weight"], before["0.weight"])


def test_excluded_layers_stay_dense() -> None:
    ticket = imp(network(), Trainer(), epochs=1, rounds=2, exclude=("0",))
    assert list(ticket.masks) == ["4.weight"]
    assert 1 - ticket.masks.sparsity() == pytest.approx(0.64, abs=1e-3)


def test_after_round_sees_the_trained_model_of_every_round() -> None:
    model, seen, train = network(), [], Trainer()

    def after_round(number: int, masks: Masks) -> None:
        seen.append((number, round(1 - masks.sparsity(), 2)))
        assert torch.equal(model[0].weight, train.left[-1]["0.weight"])

    imp(model, train, epochs=2, rounds=2, after_round=after_round)
    assert seen == [(0, 1.0), (1, 0.8), (2, 0.64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs 0: expected at least 1; got 0\.\n  It is the length"),
        ({"rounds": 0}, r"rounds 0: expected at least 1; got 0\.\n  The density"),
        ({"rate": 1.0}, r"rate 1\.0: expected a fraction, 0 < rate < 1; got 1\.0\.\n  0\.2 prunes"),
        ({"rewind_fraction": 1.0}, r"rewind_fraction 1\.0: expected a fraction, .*; got 1\.0\.\n  0\.05 rewinds"),
        ({"exclude": ("nothing",)}, r"exclude 'nothing': expected the name of a module"),
    ],
)
def test_numbers_outside_their_range_are_refused_before_any_training(options: dict[str, object], message: str) -> None:
    train = Trainer()
    with pytest.raises(InputError, match=message):
        imp(network(), train, **{"epochs": 2, "rounds": 1, **options})
    assert train.calls == []


def test_a_pruned_weight_does_not_come_back_for_a_kept_one_that_became_zero() -> None:
    def train_epochs(model: nn.Module, first: int, last: int) -> None:
        if first == 0:  # the dense model is trained from epoch 1 on, the rounds from 0
            nn.init.zeros_(model[0].weight)
            nn.init.zeros_(model[4].weight)
        else:
            nn.init.normal_(model[0].weight)
            nn.init.normal_(model[4].weight)

    first, second = imp(network(), train_epochs, epochs=2, rounds=2).history
    assert not any(bool((second[name] & ~first[name]).any()) for name in second)
