"""The width of a transformer: channels that are 0 all along a residual stream go, normalization or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import Masks, Report
from fxsparse.ir.capture import capture
from fxsparse.ir.graph import aten
from fxsparse.passes import PIPELINE, STRUCTURE, Context, run, write_means, write_sums

WIDTH, HIDDEN, WORDS = 12, 20, 7
DEAD = torch.tensor([0, 3, 4, 7, 10])
ALIVE = WIDTH - len(DEAD)


class HandWritten(nn.Module):
    """RMS norm in single operators, statistics in float32 at least, as in transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Flat(HandWritten):
    """The mean without its dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.abs().mean(-1)[..., None] + 0.1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm, "no shift": lambda n: nn.LayerNorm(n, bias=False),
    "rms_norm": lambda n: nn.RMSNorm(n, 1e-5), "no eps": nn.RMSNorm, "hand written": HandWritten, "flat": Flat,
}  # fmt: skip


class Net(nn.Module):
    """Words, two residual layers with a norm before or after each, a norm, a head."""

    def __init__(self, norm: Callable[[int], nn.Module], post: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.empty(4, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))
        self.head, self.post = nn.Linear(WIDTH, 3), post
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            inner = down(torch.relu(up(y if self.post else norm(y))))
            y = norm(y + inner) if self.post else y + inner
        return self.head(self.norms[2](y).mean(1))


def width_masks(model: nn.Module, dead: Tensor = DEAD) -> dict[str, Tensor]:
    """Everything that writes the residual stream, and every gamma and beta, without the dead channels."""
    masks = {}
    for name, p in model.named_parameters():
        mask = torch.ones_like(p, dtype=torch.bool)
        if name.startswith(("words", "places")):
            mask[:, dead] = False
        elif name.startswith(("norms", "downs")):
            mask[dead] = False
        masks[name] = mask
    return masks


def words(batch: int = 2) -> Tensor:
    return torch.randint(0, WORDS, (batch, 4))


def compiled(model: nn.Module, masks: dict[str, Tensor], **tolerance: float) -> Report:
    """Compiled for one batch size, compared with the masked model at others."""
    plain = copy.deepcopy(model)
    Masks(masks).apply_(plain)
    fast = fxsparse.compile(
        model, masks, "eager", example_inputs=words(), measure=False, verify="each", formats="dense"
    )
    for batch in (1, 2, 5):
        x = words(batch)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), **(tolerance or {"rtol": 1e-10, "atol": 1e-10}))
    return fast.report


def widths(report: Report) -> set[int]:
    """Of all that reads or writes the residual stream, as sizes after cutting."""
    rows = {r.name: r for r in report.rows}
    reads = [rows[n] for n in rows if n.startswith(("ups", "head"))]
    writes = [rows[n] for n in rows if n.startswith("downs")]
    return {r.shape[1] - r.columns_removed for r in reads} | {r.shape[0] - r.rows_removed for r in writes}


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_the_width_is_cut(norm: str, post: bool) -> None:
    model = Net(NORMS[norm], post).double()
    report = compiled(model, width_masks(model))
    assert widths(report) == {ALIVE}
    cut = {d.where: d.what for d in report.decisions if d.step == "shrink_channels" and d.accepted}
    assert cut["words.weight"] == f"remove {len(DEAD)} of {WIDTH} columns"
    assert not any("words" in d.where for d in report.decisions if not d.accepted)  # it was cut: no word against it


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "hand written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_width_is_cut_in_every_dtype(norm: str, dtype: torch.dtype) -> None:
    model = Net(NORMS[norm]).to(dtype)
    limit = 1e-4 if dtype == torch.float32 else 0.1
    assert widths(compiled(model, width_masks(model), rtol=limit, atol=limit)) == {ALIVE}


def test_half_precision_takes_its_statistics_in_float32() -> None:
    """As PyTorch's own norms do: in bfloat16, squares of 4096 channels would lose all small ones."""
    x = torch.randn(3, 16).bfloat16()
    model = nn.Sequential(nn.Linear(16, 4096), nn.LayerNorm(4096), nn.Linear(4096, 2)).eval()
    with torch.no_grad():
        model[0].bias += 20
    model, alive = model.bfloat16(), torch.arange(4096) >= 8
    masks = {"0.weight": alive[:, None].expand(-1, 16), **dict.fromkeys(("0.bias", "1.weight", "1.bias"), alive)}
    fast = fxsparse.compile(model, masks, "eager", example_inputs=x, measure=False, formats="dense")
    assert any(n.target is aten.sum.dim_IntList for n in fast.graph_module.graph.nodes)
    plain = copy.deepcopy(model)
    Masks(masks).apply_(plain)
    with torch.no_grad():
        true, theirs = plain.double()(x.double()), plain.bfloat16()(x)
        own, other = ((y.double() - true).abs().max() for y in (fast(x), theirs))
    assert own <= 2 * other + 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_is_left_out_is_pytorchs(dtype: torch.dtype) -> None:
    """That of float32 in half precision too: for small values it decides."""
    model = Net(nn.RMSNorm)
    with torch.no_grad():
        for p in (model.words.weight, model.places, *(p for d in model.downs for p in d.parameters())):
            p.mul_(1e-3)
    model = model.to(dtype)
    compiled(model, width_masks(model), rtol=0.1, atol=0.1)


def test_channels_of_a_norm_that_are_not_zero_stay() -> None:
    """Their gamma is alive, so that c = -mean(x) is wanted; or beta alone is, and what reads them gets a bias."""
    model = Net(nn.LayerNorm).double()
    masks = width_masks(model)
    masks["norms.1.weight"] = torch.ones(WIDTH, dtype=torch.bool)
    assert widths(compiled(model, masks)) == {WIDTH}
    masks = width_masks(model)
    for i in range(3):
        masks[f"norms.{i}.bias"] = torch.ones(WIDTH, dtype=torch.bool)
    assert widths(compiled(model, masks)) == {ALIVE}


def test_constant_channels_are_in_the_mean_of_an_rms_norm() -> None:
    model = Net(HandWritten).double()
    masks = width_masks(model)
    masks["downs.0.bias"] = torch.ones(WIDTH, dtype=torch.bool)  # channels that are one constant from there on
    assert widths(compiled(model, masks)) == {ALIVE}


def test_what_the_outputs_need_stays_and_nothing_is_rewritten() -> None:
    class Open(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.words(x)
            return self.norms[0](y + self.downs[0](torch.relu(self.ups[0](self.norms[1](y)))))  # type: ignore[no-any-return]

    model = Open(nn.LayerNorm).double()
    masks = {n: m for n, m in width_masks(model).items() if not n.startswith(("places", "head")) and "2" not in n}
    report = compiled(model, masks)
    refused = [d for d in report.decisions if d.step == "write_means"]
    assert refused
    assert not any(d.accepted for d in refused)
    assert {d.why for d in refused} == {"something else needs all channels"}
    assert not any(d.step == "write_sums" for d in report.decisions)


def test_norms_without_dead_channels_are_left_alone() -> None:
    report = compiled(Net(nn.LayerNorm).double(), {"ups.0.weight": torch.arange(HIDDEN)[:, None].expand(-1, WIDTH) > 3})
    assert not any(d.step in ("write_means", "write_sums") for d in report.decisions)


def test_a_second_run_of_the_passes_accepts_nothing() -> None:
    model = Net(nn.LayerNorm).double()
    Masks(width_masks(model)).apply_(model)
    gm = capture(model, (words(),), Masks(), dynamic_batch=True)
    run(gm, PIPELINE, Context())
    assert run(gm, STRUCTURE, Context()).accepted == ()


def test_no_products_are_left() -> None:
    model = Net(nn.LayerNorm).double()
    Masks(width_masks(model)).apply_(model)
    gm = capture(model, (words(),), Masks(), dynamic_batch=True)
    run(gm, PIPELINE, Context())
    assert not any(write_means.MEAN in n.meta for n in gm.graph.nodes)
    sums = [n for n in gm.graph.nodes if n.target is aten.sum.dim_IntList]
    assert len(sums) == 2 * 3
    assert {n.args[0].meta["val"].shape[-1] for n in sums} == {ALIVE}
    assert not write_sums.plan(gm, Context())


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_features_that_all_rows_of_a_table_share_are_constants(padding_idx: int | None) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WORDS, WIDTH, padding_idx)
            self.layer = nn.Linear(WIDTH, 3)
            nn.init.normal_(self.table.weight)
            with torch.no_grad():
                self.table.weight[:, :2] = torch.tensor([0.5, -2.0])
                self.table.weight[1:, 2] = 3.0  # not the first row

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.table(x)))  # type: ignore[no-any-return]

    report = compiled(Words().double().eval(), {})
    assert {r.name: r.columns_removed for r in report.rows} == {"layer.weight": 2}


def test_a_single_word_is_looked_up() -> None:
    """An index without dimensions gives a row without a batch."""

    class One(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x) + self.words(x.max()))  # type: ignore[no-any-return]

    model = One(nn.LayerNorm).double()
    compiled(model, {"words.weight": width_masks(model)["words.weight"]})


def test_width_and_neurons_together_through_inductor() -> None:
    model = Net(nn.RMSNorm)
    masks = width_masks(model)
    masks["ups.0.weight"] = (torch.arange(HIDDEN) % 2 == 0)[:, None].expand(-1, WIDTH).clone()
    masks["ups.0.bias"] = torch.arange(HIDDEN) % 2 == 0
    plain = copy.deepcopy(model)
    Masks(masks).apply_(plain)
    options: dict[str, Any] = {"example_inputs": words(), "measure": False, "formats": "dense"}
    fast = fxsparse.compile(model, masks, **options)
    rows = {r.name: (r.shape[0] - r.rows_removed, r.shape[1] - r.columns_removed) for r in fast.report.rows}
    assert rows["ups.0.weight"] == (HIDDEN // 2, ALIVE)
    for batch in (2, 3):
        x = words(batch)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_block_that_is_dead_as_a_whole_goes_with_its_norm() -> None:
    class Dead(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.words(x)
            y = y + self.downs[0](torch.relu(self.ups[0](self.norms[0](y))))
            return self.head(self.norms[1](y))  # type: ignore[no-any-return]

    model = Dead(nn.RMSNorm).double()
    masks = {n: m for n, m in width_masks(model).items() if n.startswith(("words", "norms.0", "norms.1"))}
    masks |= {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n.startswith("downs.0")}
    report = compiled(model, masks)
    written = {d.where: (d.accepted, d.why) for d in report.decisions if d.step == "write_means"}
    assert written["norms.0"] == (False, "nothing that depends on the input reads it")
    assert written["norms.1"][0]
    assert {r.name: r.columns_removed for r in report.rows}["head.weight"] == len(DEAD)
