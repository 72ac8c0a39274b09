"""Models with unusual ranks: no batch, a batch that is lost or merged, operators that only some ranks have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import InputError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, masks: dict[str, Tensor], *inputs: Tensor, **options: Any) -> fxsparse.SparseModule:
    """In float64 where the inputs are, without the verification that would hide what an error is."""
    options = {"target": "eager", "measure": False, "verify": "off"} | options
    return fxsparse.compile(model.eval(), masks, example_inputs=inputs, **options)


def agree(model: nn.Module, masks: dict[str, Tensor], fast: nn.Module, *inputs: Tensor) -> None:
    reference = copy.deepcopy(model)
    fxsparse.Masks(masks).apply_(reference)
    torch.testing.assert_close(fast(*inputs), reference(*inputs), rtol=1e-9, atol=1e-9)


class Then(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.layers)


@pytest.mark.parametrize("squeeze", [torch.squeeze, lambda y: y.squeeze(0), lambda y: y.squeeze((0, 1))])
@pytest.mark.parametrize("example", [1, 2])
def test_a_squeeze_that_takes_the_batch_of_one_sample(squeeze: Callable[[Tensor], Tensor], example: int) -> None:
    model = Then(lambda x, a, o: squeeze(o(torch.relu(a(x)))), a=nn.Linear(3, 8), o=nn.Linear(8, 1)).double()
    masks = {"layers.a.weight": torch.ones(8, 3, dtype=torch.bool)}
    masks["layers.a.weight"][:2] = False
    fast = compiled(model, masks, torch.randn(example, 3).double())
    for batch in (1, 2, 3):
        agree(model, masks, fast, torch.randn(batch, 3).double())
    fxsparse.plan(model, masks, (torch.randn(example, 3).double(),))


@pytest.mark.parametrize(("convolution", "size"), [(nn.Conv1d(4, 6, 1), (4, 6)), (nn.Conv2d(4, 6, 1), (4, 6, 3))])
def test_a_norm_of_another_dimension_is_not_folded(convolution: nn.Module, size: tuple[int, ...]) -> None:
    """Without a batch the convolution's rows are the norm's batch."""
    norm = nn.BatchNorm1d(6)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    model = nn.Sequential(convolution, norm).double()
    fast = compiled(model, {}, x := torch.randn(size).double(), dynamic_batch=False)
    agree(model, {}, fast, x)
    mean = Then(lambda x, m: m(x.mean(0)), m=model)
    agree(mean, {}, compiled(mean, {}, x := torch.randn(2, *size).double()), x)


def test_channels_that_are_shuffled_with_the_batch() -> None:
    shuffled = Then(
        lambda x, a, o: o(F.channel_shuffle(a(x).reshape(1, -1, 1, 1), 4).reshape(x.shape[0], 4)),
        a=nn.Linear(3, 4), o=nn.Linear(4, 2),
    ).double()  # fmt: skip
    masks = {"layers.a.weight": torch.ones(4, 3, dtype=torch.bool)}
    masks["layers.a.weight"][::2] = False
    fast = compiled(shuffled, masks, torch.randn(3, 3).double())
    for batch in (1, 2, 3):
        agree(shuffled, masks, fast, torch.randn(batch, 3).double())


def test_a_report_of_a_graph_with_nodes_that_a_later_pass_put_in() -> None:
    model = Then(lambda x, a, o: o((y := a(x)) * y.mean(-1, keepdim=True)), a=nn.Linear(4, 8), o=nn.Linear(8, 3))
    masks = {"layers.a.weight": torch.ones(8, 4, dtype=torch.bool), "layers.a.bias": torch.ones(8, dtype=torch.bool)}
    masks["layers.a.weight"][:3] = masks["layers.a.bias"][:2] = False  # two channels are 0, one a constant
    model, x = model.double(), torch.randn(2, 5, 4).double()
    assert fxsparse.plan(model, masks, (x,)).rows
    agree(model, masks, compiled(model, masks, x), x)


def test_prelu_with_a_number_and_of_a_vector() -> None:
    model = Then(lambda x, a, p: F.prelu(a(x), p.weight.sum()), a=nn.Linear(3, 6), p=nn.PReLU()).double()
    agree(model, {}, compiled(model, {}, x := torch.randn(2, 3).double()), x)
    model = Then(lambda x, a, p: p(a(x).mean(0)), a=nn.Linear(3, 6), p=nn.PReLU()).double()
    agree(model, {}, compiled(model, {}, x := torch.randn(2, 3).double()), x)


@pytest.mark.parametrize("formats", ["auto", "shuffled_block", "unstructured"])
def test_an_image_without_a_batch_stays_dense(formats: str) -> None:
    mask = torch.zeros(64, 64, 3, 3, dtype=torch.bool)
    for rows in torch.randperm(64).split(16):
        mask[rows] = torch.rand(64, 3, 3) > 0.8
    model, x = nn.Conv2d(64, 64, 3), torch.randn(64, 5, 5)
    fast = compiled(model, {"weight": mask}, x, dynamic_batch=False, formats=formats)
    torch.testing.assert_close(fast(x), F.conv2d(x, model.weight * mask, model.bias), rtol=1e-4, atol=1e-4)
    assert [row.stored for row in fast.report.rows] == ["dense"]


@torch.library.custom_op("fxsparse_tests::only32", mutates_args=())
def only32(x: Tensor) -> Tensor:
    """An operator that refuses float64 in its own way."""
    if x.dtype != torch.float32:
        raise ValueError("float32 only")
    return x * 2


only32.register_fake(torch.empty_like)


def test_an_operator_of_the_user_s_own_may_raise_what_it_likes() -> None:
    model = Then(lambda x, a: torch.ops.fxsparse_tests.only32(a(x)), a=nn.Linear(3, 8))
    fast = compiled(model, {}, x := torch.randn(2, 3))
    torch.testing.assert_close(fast(x), model(x))


def test_a_constant_of_one_number_can_be_saved(tmp_path: Any) -> None:
    """Its strides are those of the tensor it stood for."""
    gated = Then(
        lambda x, a, g, o: o(a(x) * torch.sigmoid(g(x))), a=nn.Linear(6, 8), g=nn.Linear(6, 8), o=nn.Linear(8, 2)
    )
    masks = {"layers.g.weight": torch.zeros(8, 6), "layers.g.bias": torch.zeros(8)}
    fast = compiled(gated, masks, x := torch.randn(2, 5, 6))
    fast.save(tmp_path / "gated.fxsparse")
    assert fxsparse.load(tmp_path / "gated.fxsparse")(x).equal(fast(x))


def test_what_safetensors_cannot_hold_is_refused(tmp_path: Any) -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 8)
            self.register_buffer("turn", torch.polar(torch.ones(4).double(), torch.arange(4.0).double()))

        def forward(self, x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(self.a(x).unflatten(-1, (4, 2)))
            return torch.view_as_real(pairs * self.turn).flatten(-2)

    fast = compiled(Rotated().double(), {}, torch.randn(2, 5, 3).double())
    with pytest.raises(InputError, match=r"save of a SparseModule: .* got 'turn' of torch.complex128"):
        fast.save(tmp_path / "rotated.fxsparse")
    assert not list(tmp_path.iterdir())


def test_volumes_are_interpolated_exactly_with_channels_gone(tmp_path: Any) -> None:
    model = Then(lambda x, a, o: o(F.interpolate(a(x), scale_factor=2.0, mode="nearest-exact")),
                 a=nn.Conv3d(2, 6, 1, bias=False), o=nn.Conv3d(6, 2, 1)).double()  # fmt: skip
    masks = {"layers.a.weight": torch.ones(6, 2, 1, 1, 1, dtype=torch.bool)}
    masks["layers.a.weight"][:3] = False
    fast = compiled(model, masks, x := torch.randn(2, 2, 3, 4, 2).double())
    agree(model, masks, fast, x)
    assert {row.name: row.rows_removed for row in fast.report.rows}["layers.a.weight"] == 3
    fast.save(tmp_path / "volumes.fxsparse")
