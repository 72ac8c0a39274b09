"""Training under masks that change: each method against its formulas written out, and what all of them promise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fxsparse.coarsen import n_m
from fxsparse.coarsen.report import RowGroup
from fxsparse.errors import InputError, MaskError
from fxsparse.ir.masks import Masks
from fxsparse.prune import prunable, random
from fxsparse.train import Training, dsb, masked, rigl, sr_ste, top_kast
from fxsparse.train.dsb import block_aware, numbered

Method = Callable[[nn.Module], AbstractContextManager[Training]]
STEPS, EVERY = 12, 3
METHODS: dict[str, Method] = {
    "rigl": lambda m: rigl(m, start(m), steps=STEPS, every=EVERY),
    "set": lambda m: rigl(m, start(m), steps=STEPS, every=EVERY, grow="random", seed=3),
    "dsb": lambda m: dsb(m, start(m), steps=STEPS, every=EVERY, block=4),
    "top_kast": lambda m: top_kast(m, 0.3, extra=0.2, every=2, decay=0.01),
    "sr_ste": lambda m: sr_ste(m, decay=0.01),
}
MOVES = ["rigl", "set", "dsb"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip


def start(model: nn.Module) -> Masks:
    return random(prunable(model), 0.3, seed=1)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 100)
    return torch.randn(size, 2, 5, 5, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.filterwarnings("ignore:the optimizer's weight decay also acts")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optimizer", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1)])
def test_the_model_is_sparse_at_any_time_and_its_masks_move(
    name: str, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    model = network()
    found, opt = [], optimizer(model)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            step(model, opt, i)
            found.append(training.masks)
            for key, mask in training.masks.items():
                assert not model.get_parameter(key)[~mask].any()
    assert any(not a.equal(b) for key in found[0] for a, b in [(found[0][key], found[-1][key])])
    for key, mask in found[-1].items():
        assert not model.get_parameter(key)[~mask].any()
        assert not model.get_parameter(key)._backward_hooks


@pytest.mark.parametrize("name", [*MOVES, "top_kast"])
def test_every_layer_keeps_its_number_of_weights(name: str) -> None:
    model = network()
    with METHODS[name](model) as training:
        before = {key: int(mask.sum()) for key, mask in training.masks.items()}
        for i in range(STEPS):
            step(model, opt := sgd(model), i)
            del opt
            for key, mask in training.masks.items():
                assert 0 <= abs(int(mask.sum()) - before[key]) <= (16 if name == "dsb" else 0), key


@pytest.mark.parametrize("name", MOVES)
def test_a_change_of_the_masks_takes_the_place_of_the_step(name: str) -> None:
    model = network()
    opt = sgd(model)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            masks, before = training.masks, state(model)
            step(model, opt, i)
            changed = any(not mask.equal(masks[key]) for key, mask in training.masks.items())
            assert changed == (i > 0 and i % EVERY == 0 and i < 0.75 * STEPS)
            moved = {key for key, p in model.named_parameters() if not p.equal(before[key])}
            assert moved <= training.masks.keys() if changed else "8.bias" in moved


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    """A transcription, layer by layer."""
    model = network()
    opt = sgd(model)
    for i in range(-2, 0):
        step(model, opt, i)  # momentum everywhere
    with rigl(model, start(model), steps=STEPS, every=EVERY) as training:
        for i in range(EVERY):
            step(model, opt, i)
        masks, before = training.masks, state(model)
        momentum = {key: opt.state[p]["momentum_buffer"].clone() for key, p in model.named_parameters()}
        free = copy.deepcopy(model)
        x, y = batch(EVERY)
        F.cross_entropy(free(x), y).backward()
        step(model, opt, EVERY)
        for key, mask in masks.items():
            k = int(mask.sum())
            n = int(0.15 * (1 + math.cos(math.pi * EVERY / (0.75 * STEPS))) * k)
            assert n > 0
            kept = set(sorted(mask.flatten().nonzero().flatten().tolist(),
                              key=lambda j: -abs(before[key].flatten()[j].item()))[: k - n])  # fmt: skip
            gradient = free.get_parameter(key).grad
            assert gradient is not None
            rank = sorted(set(range(mask.numel())) - kept, key=lambda j: -abs(gradient.flatten()[j].item()))
            expected = torch.zeros(mask.numel(), dtype=torch.bool)
            expected[[*kept, *rank[:n]]] = True
            new = training.masks[key]
            assert new.flatten().equal(expected), key
            grown = new & ~mask
            assert momentum[key][grown].any()
            weight, buffer = model.get_parameter(key), opt.state[model.get_parameter(key)]["momentum_buffer"]
            assert not weight[grown].any()
            assert not buffer[grown].any()
            assert weight[new & mask].equal(before[key][new & mask])
            assert buffer[new & mask].equal(momentum[key][new & mask])


def test_set_grows_by_chance_and_its_seed_says_which() -> None:
    def masks_of(seed: int) -> Masks:
        model = network()
        with rigl(model, start(model), steps=STEPS, every=EVERY, grow="random", seed=seed) as training:
            for i in range(EVERY + 1):
                step(model, sgd(model), i)
            return training.masks

    first, again, other = masks_of(0), masks_of(0), masks_of(1)
    assert all(first[key].equal(again[key]) for key in first)
    assert not all(first[key].equal(other[key]) for key in first)


def test_gradients_are_dense_only_before_a_change() -> None:
    model = network()
    opt = sgd(model)
    with rigl(model, start(model), steps=STEPS, every=EVERY) as training:
        for i in range(EVERY + 1):
            x, y = batch(i)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            outside = [model.get_parameter(key).grad[~mask] for key, mask in training.masks.items()]
            assert all(bool(g.any()) == (i == EVERY) for g in outside)
            opt.step()


def test_dsb_keeps_shuffled_blocks_at_the_density_from_the_start() -> None:
    """Of sides that the block does not divide: a density taken from the last masks would creep up."""
    model = network()
    model[6], model[8] = nn.Linear(108, 22), nn.Linear(22, 4)
    given = start(model)
    with dsb(model, given, steps=80, every=1, block=4) as training:
        for i in range(60):
            step(model, sgd(model), i)
            for key, mask in training.masks.items():
                rows = mask.flatten(1)
                groups = len(rows.unique(dim=0))
                assert groups <= -(-len(rows) // 4), key
                assert int(given[key].sum()) <= int(mask.sum()) < int(given[key].sum()) + 16, key


def test_a_candidate_is_dropped_with_half_of_its_row_or_column_of_the_block() -> None:
    """Blocks as they were cut, smaller ones at the edges with half of their own sides."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(10, 15, generator=generator)
    groups = [([0, 2, 4, 6], [0, 2, 3, 5, 7, 8, 9]), ([1, 3, 5, 7], [1, 2, 4, 14]), ([8, 9], [3, 4, 5, 6, 7, 8])]
    mask, cut = torch.zeros(10, 15, dtype=torch.bool), []
    for rows, columns in groups:
        mask[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
        columns = sorted(columns, key=lambda j: -weight[rows, j].square().sum().item())
        cut += [(rows, columns[i : i + 4]) for i in range(0, len(columns), 4)]
    candidates = (torch.rand(10, 15, generator=generator) < 0.4) & mask
    expected = torch.zeros_like(candidates)
    for rows, columns in cut:
        for i in rows:
            for j in columns:
                row, column = (candidates[i, c] for c in columns), (candidates[r, j] for r in rows)
                many = sum(row) >= len(columns) / 2 or sum(column) >= len(rows) / 2
                expected[i, j] = bool(candidates[i, j]) and bool(many)
    assert 0 < int(expected.sum()) < int(candidates.sum())
    found = numbered(tuple(RowGroup(torch.tensor(r), torch.tensor(c)) for r, c in groups), weight.abs(), 4)
    assert (found >= 0).equal(mask)
    assert len(found.unique()) == 1 + len(cut)
    assert block_aware(candidates, found).equal(expected)


def test_blocks_are_those_of_the_last_cut_whatever_the_weights_became() -> None:
    model = network()
    with dsb(model, start(model), steps=STEPS, every=EVERY, block=4) as training:
        before = training.state_dict()["3.weight/numbers"]
        for i in range(EVERY):
            step(model, sgd(model), i)
        assert training.state_dict()["3.weight/numbers"].equal(before)
        step(model, sgd(model), EVERY)
        assert not training.state_dict()["3.weight/numbers"].equal(before)


def test_what_has_no_blocks_changes_as_in_rigl() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    masks = random(prunable(model), 0.5, seed=1)
    opt = sgd(model)
    with dsb(model, masks, steps=8, every=2, block=4) as training:
        for _ in range(5):
            opt.zero_grad()
            model(torch.randn(4, 8, 5, 5)).square().sum().backward()
            opt.step()
        now = training.masks
    assert not now["0.weight"].equal(masks["0.weight"])
    assert int(now["0.weight"].sum()) == int(masks["0.weight"].sum())


def test_top_kast_is_its_formulas() -> None:
    """The dense weight, A and B written out, with momentum, over some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    w = model[0].weight.detach().clone()
    buffer = torch.zeros_like(w)
    opt = sgd(model, weight_decay=0.0)

    def most(count: int) -> Tensor:
        return torch.zeros(60, dtype=torch.bool).index_fill_(0, w.abs().flatten().argsort(descending=True)[:count],
                                                             True).view(w.shape)  # fmt: skip

    a, b = most(18), most(30)
    with top_kast(model, 0.3, extra=0.2, decay=0.05, every=2) as training:
        for i in range(6):
            assert training.masks["0.weight"].equal(a)
            assert model[0].weight.equal(torch.where(a, w, 0))
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(i))
            opt.zero_grad()
            model(x).square().sum().backward()
            gradient = model[0].weight.grad.clone()
            assert not gradient[~b].any()
            assert gradient[b & ~a].any()
            opt.step()
            gradient += torch.where(a, 0.05 * w, torch.where(b, 0.05 / 0.3 * w, 0))
            buffer = gradient if i == 0 else 0.9 * buffer + gradient
            w = torch.where(b, w - 0.1 * buffer, w)
            if (i + 1) % 2 == 0:
                a, b = most(18), most(30)
            torch.testing.assert_close(model[0].weight, torch.where(a, w, 0))
            w = torch.where(a, model[0].weight.detach(), w)  # the same bits, so that both rank alike


@pytest.mark.parametrize("name", ["top_kast", "sr_ste"])
def test_what_is_written_to_the_model_between_steps_counts(name: str) -> None:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with METHODS[name](model):
        step(model, opt, 0)
        with torch.no_grad():
            model[0].weight.mul_(3)
        written = model[0].weight.detach().clone()
        step(model, opt, 1)
        kept = written != 0
        assert model[0].weight[kept].equal(written[kept])


def test_sr_ste_is_a_straight_through_estimator() -> None:
    """Against autograd, with the dense weight as the parameter."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            mask = n_m({"w": weight}, {"w": torch.ones_like(weight, dtype=torch.bool)}).masks["w"]
            ctx.save_for_backward(weight, mask)
            return weight * mask

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            weight, mask = ctx.saved_tensors
            return gradient + 0.05 * (~mask) * weight

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    dense = copy.deepcopy(model)
    ours, theirs = sgd(model, weight_decay=0.01), sgd(dense, weight_decay=0.01)
    with sr_ste(model, decay=0.05) as training:
        for i in range(6):
            x = torch.randn(7, 8, generator=torch.Generator().manual_seed(i))
            ours.zero_grad()
            theirs.zero_grad()
            model(x).square().sum().backward()
            weight: Any = Through.apply(dense[0].weight)
            dense[2](torch.tanh(F.linear(x, weight, dense[0].bias))).square().sum().backward()
            ours.step()
            theirs.step()
            expected: Any = Through.apply(dense[0].weight)
            torch.testing.assert_close(model[0].weight, expected)
    assert set(training.masks) == {"0.weight"}  # the other is the head
    assert training.masks["0.weight"].sum(1).eq(4).all()


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_a_saved_state(name: str) -> None:
    model = network()
    opt = sgd(model)
    with METHODS[name](model) as training:
        for i in range(5):
            step(model, opt, i)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict(), training.state_dict()))
        for i in range(5, STEPS):
            step(model, opt, i)
        expected, masks = state(model), training.masks

    model = network()
    opt = sgd(model)
    with METHODS[name](model) as training:
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        training.load_state_dict(saved[2])
        for i in range(5, STEPS):
            step(model, opt, i)
    assert all(training.masks[key].equal(mask) for key, mask in masks.items())
    assert all(value.equal(expected[key]) for key, value in state(model).items())


def test_a_state_of_another_training_is_refused() -> None:
    model = network()
    with rigl(model, start(model), steps=8, every=2) as training:
        saved = training.state_dict()
    expected = r"state_dict of training: expected the \d+ tensors .* got another '0.weight/backward_mask'"
    with top_kast(model, 0.3) as training, pytest.raises(InputError, match=expected):
        training.load_state_dict(saved)


def test_a_step_that_a_scaler_skips_is_no_step() -> None:
    model = network()
    opt, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1.0)
    with rigl(model, start(model), steps=STEPS, every=1) as training:
        for i in range(3):
            before = training.masks
            x, y = batch(i)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (float("inf") if i == 1 else 1)).backward()
            scaler.step(opt)
            scaler.update()
            changed = any(not m.equal(before[key]) for key, m in training.masks.items())
            assert changed == (i == 2)
        assert training.state_dict()["0.weight/steps"] == 2


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = network()
    opt = sgd(model)
    with rigl(model, start(model), steps=STEPS, every=1):
        step(model, opt, 0)
        opt.zero_grad()
        (model(batch(1)[0]).sum() * float("nan")).backward()
        with pytest.raises(InputError, match=r"gradient of '0.weight': expected finite numbers"):
            opt.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    opt = sgd(model)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            x, y = batch(i)
            opt.zero_grad()
            F.cross_entropy(model(x.to(dtype)).double(), y).backward()
            opt.step()
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(not model.get_parameter(key)[~mask].any() for key, mask in training.masks.items())


def test_two_optimizers_share_a_model_and_another_model_is_left_alone() -> None:
    model, other = network(), network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    rest = torch.optim.SGD([p for layer in model[1:] for p in layer.parameters()], lr=0.1)
    theirs = sgd(other)
    with rigl(model, start(model), steps=STEPS, every=EVERY) as training:
        for i in range(EVERY + 1):
            step(other, theirs, i)
            x, y = batch(i)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first.step()
            if i < EVERY:
                rest.step()
        steps = training.state_dict()
    assert (int(steps["0.weight/steps"]), int(steps["3.weight/steps"])) == (EVERY + 1, EVERY)
    assert all(bool(p.all()) for p in prunable(other).values())


def run(
    name: str, step_with: Callable[[nn.Module, torch.optim.Optimizer, int], None], **options: Any
) -> dict[str, Tensor]:
    """What a network is after training by a method, with steps made in some way; its masks too."""
    model = network()
    opt = sgd(model, **options)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            step_with(model, opt, i)
        return state(model) | {f"mask of {key}": mask for key, mask in training.masks.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_with_a_closure_is_a_step(name: str) -> None:
    def closed(model: nn.Module, opt: torch.optim.Optimizer, number: int) -> None:
        def closure() -> Tensor:
            x, y = batch(number)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss: Any = opt.step(closure)
        assert loss.requires_grad

    assert same(run(name, step), run(name, closed))


class Around(torch.optim.Optimizer):
    """An optimizer that steps another, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("name", METHODS)
def test_an_optimizer_inside_another_makes_one_step(name: str) -> None:
    assert same(run(name, step), run(name, lambda model, opt, i: step(model, Around(opt), i)))


@pytest.mark.parametrize("name", METHODS)
def test_what_calls_a_closure_again_is_refused(name: str) -> None:
    model = network()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(batch(0)[0]).square().mean()
        loss.backward()
        return loss

    with METHODS[name](model), pytest.raises(InputError, match=r"closure of LBFGS.step: expected an optimizer that"):
        opt.step(closure)
    with masked(model, start(model)):
        opt.step(closure)
    assert not model[0].weight[~start(network())["0.weight"]].any()


def test_two_blocks_on_different_layers_both_change_and_one_weight_has_one_block() -> None:
    model = network()
    masks, opt = start(model), sgd(model)
    first, other = ({key: masks[key]} for key in ("0.weight", "3.weight"))
    with rigl(model, first, steps=STEPS, every=EVERY) as a, rigl(model, other, steps=STEPS, every=EVERY) as b:
        for i in range(EVERY + 1):
            step(model, opt, i)
        assert not a.masks["0.weight"].equal(masks["0.weight"])
        assert not b.masks["3.weight"].equal(masks["3.weight"])
        again = r"weight '0.weight': expected one block of fxsparse.train at a time"
        with pytest.raises(InputError, match=again), masked(model, masks):
            pass
    with masked(model, masks):
        pass


@pytest.mark.parametrize("name", METHODS)
def test_a_fused_optimizer_s_scaler_is_heeded(name: str) -> None:
    def scaled(fused: bool) -> tuple[dict[str, Tensor], int]:
        model = network()
        opt, scaler = sgd(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=1024.0)
        with METHODS[name](model) as training:
            for i in range(STEPS):
                x, y = batch(i)
                opt.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if i == 1 else 1)).backward()
                scaler.step(opt)
                scaler.update()
            return state(model), int(training.state_dict()["3.weight/steps"])

    (plain, steps), (fused, same_steps) = scaled(False), scaled(True)
    assert steps == same_steps == STEPS - 1
    for key in plain:
        torch.testing.assert_close(plain[key], fused[key])


def test_gradients_are_there_after_a_change() -> None:
    model = network()
    opt = sgd(model)
    with rigl(model, start(model), steps=STEPS, every=EVERY):
        for i in range(EVERY + 1):
            step(model, opt, i)
            assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) > 0
            assert all(p.grad is not None for p in model.parameters())


def test_a_schedule_without_a_change_and_a_model_without_a_fitting_layer_are_refused() -> None:
    model = network()
    with pytest.raises(InputError, match=r"every=100: expected less than until \* steps = 75"):
        rigl(model, start(model), steps=100)
    for nothing in (rigl(model, {}, steps=4, every=1), sr_ste(nn.Linear(3, 3))):
        with pytest.raises(InputError, match=r"weights to train: expected at least one; got none"), nothing:
            pass


def test_top_kast_keeps_a_weight_of_the_smallest_layers_and_names_what_diverged() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    opt = sgd(model)
    with top_kast(model, 0.01) as training:
        assert int(training.masks["0.weight"].sum()) == 1
        (model(torch.randn(3, 4)).sum() * float("nan")).backward()
        with pytest.raises(InputError, match=r"weight '0.weight': expected finite numbers"):
            opt.step()


def test_top_kast_warns_of_the_optimizer_s_own_weight_decay() -> None:
    model = network()
    opt = sgd(model, weight_decay=1e-4)
    expected = pytest.warns(UserWarning, match="weight decay also acts on weights of top_kast")
    with top_kast(model, 0.5), expected as told:
        opt.step()
        step(model, opt, 0)
    assert [warning.filename for warning in told] == [__file__]
    others = [p for p in model.parameters() if p is not model[0].weight]
    opt = torch.optim.SGD(
        [{"params": others}, {"params": [model[0].weight], "weight_decay": 0.0}], 0.1, weight_decay=1e-4
    )
    with top_kast(model, {"0.weight": 0.5}):
        step(model, opt, 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_looks_at_the_model_when_its_block_begins(name: str) -> None:
    model, other = network(), network()
    with torch.no_grad():
        other[0].weight.copy_(torch.randn_like(other[0].weight))
    block = METHODS[name](model)
    model.load_state_dict(other.state_dict())
    with block as late, METHODS[name](other) as early:
        assert all(late.masks[key].equal(mask) for key, mask in early.masks.items())


def test_a_parameter_that_is_replaced_is_found_out() -> None:
    model = network()
    masks = start(model)
    with (
        pytest.raises(InputError, match=r"weight '0.weight' after training: .* got another tensor"),
        masked(model, masks),
    ):
        model.load_state_dict(network().state_dict(), assign=True)


def test_a_weight_may_be_frozen_at_first() -> None:
    model = network()
    masks = start(model)
    model[0].weight.requires_grad_(False)
    with masked(model, masks):
        assert not model[0].weight.requires_grad
        model[0].weight.requires_grad_(True)
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_a_step_that_failed_stops_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    masks, broken, opt = start(model), sgd(model), sgd(model)
    with masked(model, masks):
        step(model, broken, 0)
        monkeypatch.setattr(type(broken), "_init_group", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, broken, 1)
        monkeypatch.undo()
        step(model, opt, 2)
        for key, mask in masks.items():
            assert not model.get_parameter(key)[~mask].any()


def _one_of_two(rank: int, folder: str) -> None:
    """A process of DistributedDataParallel, with batches of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, method in METHODS.items():
        model = nn.parallel.DistributedDataParallel(network()[3:])
        opt = sgd(model)
        with method(model.module) as training:
            for i in range(EVERY + 2):
                x = torch.randn(16, 8, 5, 5, generator=torch.Generator().manual_seed(2 * i + rank))
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
            torch.save((training.masks["3.weight"], model.module[0].weight.detach()), f"{folder}/{name}{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_share_gradients_share_masks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for name in METHODS:
        masks, weights = zip(*(torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1)), strict=True)
        assert masks[0].equal(masks[1]), name
        assert weights[0].equal(weights[1]), name
        assert not masks[0].all(), name


@pytest.mark.parametrize(("call", "said"), [
    (lambda m: rigl(m, start(m), steps=0), r"steps=0: expected a positive whole number; got 0"),
    (lambda m: rigl(m, start(m), steps=9, every=0), r"every=0: expected a positive whole number"),
    (lambda m: rigl(m, start(m), steps=9, every=3, alpha=1.5), r"alpha=1.5: expected a fraction"),
    (lambda m: dsb(m, start(m), steps=9, until=0), r"until=0: expected a fraction"),
    (lambda m: rigl(m, start(m), steps=9, every=3, grow="fast"), r"grow='fast': expected 'gradient' or 'random'"),
    (lambda m: dsb(m, start(m), steps=9, every=3, block=0), r"block 0: expected a positive number of rows"),
    (lambda m: top_kast(m, 0.0), r"density of '0.weight': expected a fraction, 0 < density <= 1; got 0.0"),
    (lambda m: top_kast(m, {"9.weight": 0.5}), r"density of '9.weight': expected the name of a parameter"),
    (lambda m: top_kast(m, 0.5, extra=-1), r"extra: expected a fraction, .* got -1"),
    (lambda m: top_kast(m, 0.5, decay=-1), r"decay: expected a number that is not negative; got -1"),
    (lambda m: top_kast(m, 0.5, every=0), r"every: expected a positive whole number; got 0"),
    (lambda m: sr_ste(m, decay=-1), r"decay=-1: expected a number that is not negative"),
    (lambda m: sr_ste(m, n=4, m=2), r"pattern 4:2: expected N:M with 0 < N < M"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_before_anything_is_touched(call: Method, said: str) -> None:
    model = network()
    before = state(model)
    with pytest.raises(InputError, match=said), call(model):
        pass
    assert all(value.equal(before[key]) for key, value in state(model).items())


def test_masks_that_fit_no_parameter_are_refused() -> None:
    model = network()
    for method in (rigl, dsb):
        with (
            pytest.raises(MaskError, match=r"mask for '0.weight'"),
            method(model, {"0.weight": torch.ones(3)}, steps=4, every=1),
        ):
            pass
