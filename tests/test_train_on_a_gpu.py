"""Training under masks and first masks on a real GPU: the same as on a CPU. `test_train.py` has what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import prune
from fxsparse.ir.masks import Masks
from tests.test_train import METHODS, STEPS, batch, network, sgd

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
]  # fmt: skip


def trained(name: str, device: str) -> tuple[dict[str, Tensor], Masks]:
    model = network().double().to(device)
    model[1] = nn.Identity()  # gradients that a batch norm makes 0 are noise, of which dsb would grow the largest
    optimizer = sgd(model)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x.double().to(device)), y.to(device)).backward()
            optimizer.step()
    return {n: t.cpu() for n, t in model.state_dict().items()}, training.masks


@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_a_cpu(name: str) -> None:
    state, masks = trained(name, "cuda")
    wanted, wanted_masks = trained(name, "cpu")
    for n, mask in wanted_masks.items():
        assert torch.equal(masks[n].cpu(), mask), n
    for n, t in wanted.items():
        torch.testing.assert_close(state[n], t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_training_in_float16_with_a_scaler_stays_sparse_and_compiles(name: str, fused: bool) -> None:
    model = network().cuda()
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cuda")
    with METHODS[name](model) as training:
        for i in range(STEPS):
            x, y = (t.cuda() for t in batch(i))
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            for n, mask in training.masks.items():
                assert bool((model.get_parameter(n).detach().cpu()[~mask.cpu()] == 0).all()), (i, n)
    x = batch(0)[0].cuda()
    fast = fxsparse.compile(model.eval(), training.masks, "eager", example_inputs=x, measure=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)  # tf32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_a_scaler_skips_is_no_step_on_a_gpu(name: str, fused: bool) -> None:
    model = network().cuda()
    optimizer, scaler = sgd(model, fused=fused), torch.amp.GradScaler("cuda", init_scale=1024.0)
    with METHODS[name](model) as training:
        for i in range(STEPS):
            x, y = (t.cuda() for t in batch(i))
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if i == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert int(training.state_dict()["3.weight/steps"]) == STEPS - 1


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "erk", "magnitude"])
def test_first_masks_are_those_of_a_cpu(name: str) -> None:
    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def found(device: str) -> Masks:
        model = network().double().to(device)
        pairs = [(x.double().to(device), y.to(device)) for x, y in (batch(0), batch(1))]
        ways: dict[str, Any] = {
            "snip": lambda: prune.snip(model, loss, pairs, 0.3),
            "grasp": lambda: prune.grasp(model, loss, pairs, 0.3),
            "synflow": lambda: prune.synflow(model, pairs[0][0], 0.3),
            "erk": lambda: prune.erk(prune.prunable(model), 0.3, seed=1),
            "magnitude": lambda: prune.magnitude(prune.prunable(model), 0.3),
        }
        return Masks({n: m.cpu() for n, m in ways[name]().items()})

    on_gpu, on_cpu = found("cuda"), found("cpu")
    for n, mask in on_cpu.items():
        assert torch.equal(on_gpu[n], mask), n
