"""What people write, and what becomes of it: every form of a layer loses its dead rows, and computes the same."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fxsparse
from fxsparse import Masks, Report
from fxsparse.ir.capture import capture
from fxsparse.passes import Context, canonicalize, run
from tools.transformer_recipes import heads_and_neurons

WIDTH, HEADS, SIZE = 24, 6, 4


def compiled(model: nn.Module, masks: Mapping[str, Tensor], *inputs: Tensor, **options: Any) -> Report:
    """Compiled for one batch size, compared with the masked model at another."""
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    Masks(masks).apply_(plain)
    fast = fxsparse.compile(model, masks, "eager", example_inputs=inputs, measure=False, **options)
    more = tuple(torch.cat([x, x.flip(0), x]) for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(fast(*more), plain(*more), rtol=1e-10, atol=1e-12)
    return fast.report


def every_second(weight: Tensor, dim: int = 0) -> Tensor:
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask.transpose(0, dim)[::2] = False
    return mask


def rows(report: Report) -> dict[str, int]:
    return {r.name: r.rows_removed for r in report.rows if r.rows_removed}


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Images(nn.Module):
    """A convolution, something, a convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(channels, 5, 3, padding=1)
        self.between = between
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "the first channels": lambda x: torch.cat([x[:, :6], x[:, 6:]], 1),
    "more dimensions": lambda x: x * x.mean((2, 3))[:, :, None, None],
    "every second pixel": lambda x: x[:, :, ::2, ::2],
    "padded": lambda x: F.pad(x, (0, 1, 2, 1)),
    "reflected": lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect"),
    "repeated at the border": lambda x: F.pad(x, (1, 1, 2, 0), mode="replicate"),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "from one": lambda x: (1 - torch.exp2(x)) - torch.square(x),
    "selected": lambda x: torch.where(x > 0, x, torch.atan(x)),
    "prelu": nn.PReLU(8).double(),
    "instance norm": nn.InstanceNorm2d(8, affine=True).double(),
    "group norm, a channel each": nn.GroupNorm(8, 8).double(),
    "pooled": lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), 2),
    "bicubic": lambda x: F.interpolate(x, size=(9, 7), mode="bicubic"),
    "written to": lambda x: x.slice_scatter(x.amax((2, 3), keepdim=True).expand(-1, -1, 6, 2), 3, 1, 3),
    "by its deviation": lambda x: x / (1 + x.std((2, 3), keepdim=True)),
    "by the brightest pixel": lambda x: x * F.adaptive_max_pool2d(x, 1),
    "by the brightest of nine parts": lambda x: F.adaptive_max_pool2d(x, 3),
    "by the brightest of a few": lambda x: F.adaptive_max_pool1d(x.flatten(2), 4).unsqueeze(2),
    "by the brightest of a volume": lambda x: F.adaptive_max_pool3d(x.unsqueeze(2), (1, 2, 3)).squeeze(2),
    "by extremes of lines": lambda x: x.max(2, keepdim=True)[0] - torch.min(x, -1).values.unsqueeze(-1),
    "beside nothing": lambda x: torch.cat([x[:, :0], x, x[:, 8:]], 1),
    "in a row": lambda x: F.max_pool1d(x.flatten(2), 2).unsqueeze(2),
}


@pytest.mark.parametrize("name", IMAGES)
def test_what_lies_between_convolutions_holds_nothing(name: str) -> None:
    model = Images(IMAGES[name])
    report = compiled(model, {"a.weight": every_second(model.a.weight)}, torch.randn(2, 3, 8, 8).double())
    assert rows(report) == {"a.weight": 4}


SQUEEZED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "normalized": (lambda x: F.batch_norm(x.squeeze(), torch.zeros(8).double(), torch.ones(8).double()), 8),
    "a slice": (lambda x: x.squeeze()[:, 1:], 7),
    "named with the batch": (lambda x: x.squeeze((0, 2, 3))[:, 1:], 7),
    "the batch alone": (lambda x: x.squeeze(0).amax((2, 3)), 8),
    "turned": (lambda x: x.flatten(1)[:, None, :, None].expand(-1, 1, 8, 2).squeeze().transpose(1, 2).amax(1), 8),
}


@pytest.mark.parametrize("name", SQUEEZED)
def test_a_squeeze_that_names_no_dimension_or_the_batch_leaves_the_batch(name: str) -> None:
    between, width = SQUEEZED[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.AdaptiveAvgPool2d(1), Called(between),
                          nn.Linear(width, 3)).double().eval()  # fmt: skip
    mask = torch.arange(8) >= 3
    report = compiled(model, {"0.weight": mask.view(-1, 1, 1, 1).expand(-1, 3, 3, 3)}, torch.randn(2, 3, 8, 8).double())
    assert rows(report) == {"0.weight": 3}


def test_one_sample_loses_its_batch_where_the_model_allows_that() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Called(torch.squeeze), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    for batch in (1, 2):
        x = torch.randn(batch, 1, 4).double()
        fast = fxsparse.compile(model, {}, "eager", example_inputs=x, measure=False)
        for each in (x, torch.randn(1, 1, 4).double(), torch.randn(3, 1, 4).double()):
            torch.testing.assert_close(fast(each), model(each))


def test_what_is_turned_and_taken_apart_is_not_always_heads() -> None:
    model = Called(lambda x: x.view(12, 2, 2).transpose(0, 1).view(2, 3, 4, 2))
    x = torch.randn(4, 2, 6)
    fast = fxsparse.compile(model, {}, "eager", example_inputs=x, measure=False, dynamic_batch=False)
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("size", [1, 5])
def test_a_product_with_a_vector_added(size: int) -> None:
    matrix, vector = torch.randn(4, 5).double(), torch.randn(size).double()
    product = Called(lambda x: torch.relu(torch.addmm(vector, x, matrix)))
    model = nn.Sequential(nn.Linear(3, 4), product, nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(1)
    mask = (torch.arange(4) > 0)[:, None].expand(4, 3)
    report = compiled(model.eval(), {"0.weight": mask}, torch.randn(2, 3).double())
    assert rows(report) == ({"0.weight": 1} if size == 5 else {})


def test_a_bias_that_all_rows_share() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(nn.Linear(3, 4), Shared(), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    with torch.no_grad():
        model[0].bias.fill_(1)
    masks = {"0.weight": every_second(model[0].weight), "1.weight": every_second(model[1].weight)}
    report = compiled(model, masks, torch.randn(2, 3).double())
    assert rows(report) == {"0.weight": 2, "1.weight": 3}


def test_whole_groups_of_a_norm_go() -> None:
    model = Images(nn.GroupNorm(4, 8).double())
    mask = torch.ones_like(model.a.weight, dtype=torch.bool)
    mask[[0, 1, 2, 6, 7]] = False  # the first group, half of the second, the last
    with torch.no_grad():
        model.between.bias.zero_()
    report = compiled(model, {"a.weight": mask}, torch.randn(2, 3, 8, 8).double())
    assert rows(report) == {"a.weight": 4}


def test_a_gate_loses_its_halves_together() -> None:
    model = Images(lambda x: F.glu(x, 1), channels=4)
    mask = torch.ones_like(model.a.weight, dtype=torch.bool)
    mask[[1, 3, 5, 7]] = False
    report = compiled(model, {"a.weight": mask}, torch.randn(2, 3, 8, 8).double())
    assert rows(report) == {"a.weight": 4}


def test_a_transposed_convolution_is_cut_on_both_sides() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.ReLU(),
                          nn.Conv2d(6, 4, 1)).double().eval()  # fmt: skip
    masks = {"0.weight": every_second(model[0].weight), "1.weight": every_second(model[1].weight, 1)}
    report = compiled(model, masks, torch.randn(2, 3, 6, 5).double())
    assert rows(report)["0.weight"] == 4
    assert {r.name: r.columns_removed for r in report.rows}["3.weight"] == 3


class Einsums(nn.Module):
    """Attention as equations: projections [width, heads, size], scores, values, and back."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(4, WIDTH, HEADS, SIZE, generator=torch.Generator().manual_seed(0))
        self.q, self.k, self.v, self.o = (nn.Parameter(w) for w in weights)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("b l e, e h d -> b l h d", x, w) for w in (self.q, self.k, self.v))
        p = torch.einsum("blhd,bshd->bhls", q, k).softmax(-1)
        return torch.einsum("blhd,ehd->ble", torch.einsum("bhls,bshd->blhd", p, v), self.o)


def test_heads_written_as_equations_go() -> None:
    model = Einsums()
    mask = torch.ones_like(model.v, dtype=torch.bool)
    mask[:, [1, 4]] = False
    report = compiled(model, {"v": mask}, torch.randn(2, 5, WIDTH).double())
    assert rows(report) == dict.fromkeys("qkv", 2 * SIZE)
    assert {r.name: r.columns_removed for r in report.rows}["o"] == 2 * SIZE


EQUATIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "bij,bjk": ((3, 2, 4), (3, 4, 5)),
    "bij,bkj->bki": ((3, 2, 4), (3, 5, 4)),
    "bqc, bchw -> bqhw": ((3, 2, 4), (3, 4, 2, 5)),
    "bhwc,hkc->bhwk": ((3, 2, 2, 4), (2, 5, 4)),
    "bsj,j->bs": ((3, 2, 4), (4,)),
    "j,bsj->bs": ((4,), (3, 2, 4)),
    "ihd,bid->hb": ((4, 2, 5), (3, 4, 5)),
    "bdi,bdi->b": ((3, 2, 4), (3, 2, 4)),
    "bid,bjd->bij": ((3, 2, 4), (3, 5, 4)),
    "bid,bjd->bijd": ((3, 2, 4), (3, 5, 4)),  # contracts nothing
    "bii,bij->bj": ((3, 4, 4), (3, 4, 2)),  # a diagonal
    "bik,bjl->bij": ((3, 2, 4), (3, 5, 2)),  # sums of one tensor alone
    "...i,ij->...j": ((3, 2, 4), (4, 5)),
    "bi,ij->bj": ((3, 4), (1, 5)),  # broadcast
}  # fmt: skip
LEFT = {"bid,bjd->bijd", "bii,bij->bj", "bik,bjl->bij", "...i,ij->...j", "bi,ij->bj"}


class Equation(nn.Module):
    def __init__(self, equation: str, second: Tensor | None) -> None:
        super().__init__()
        self.equation = equation
        self.second = nn.Parameter(second) if second is not None else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.einsum(self.equation, x, self.second if y is None else y) * 2


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("stored", [False, True])
def test_an_equation_is_its_product(equation: str, stored: bool) -> None:
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in EQUATIONS[equation])
    model = Equation(equation, b if stored else None).eval()
    inputs = (a,) if stored else (a, b)
    gm = capture(model, inputs, Masks(), dynamic_batch=False)
    run(gm, [canonicalize], Context())
    assert list(canonicalize.plan(gm, Context())) == []
    assert any(n.target is torch.ops.aten.einsum.default for n in gm.graph.nodes) == (equation in LEFT)
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), model(*inputs), rtol=1e-12, atol=1e-12)


class Standardized(nn.Conv2d):
    """The weight has mean 0 and variance 1 in every row, as in BiT and NFNets; computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_standardized_weights_are_weights() -> None:
    model = nn.Sequential(Standardized(3, 8, 3, bias=False), nn.ReLU(), Standardized(8, 8, 3)).double().eval()
    report = compiled(model, {"0.weight": every_second(model[0].weight)}, torch.randn(2, 3, 8, 8).double())
    assert rows(report) == {"0.weight": 4}
    assert [r.name for r in report.rows] == ["0.weight", "2.weight"]


class Matrices(nn.Module):
    """Weights [in, out], as in GPT-2, used in one of the ways to write a product."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.randn(6, WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.b, self.product = nn.Linear(WIDTH, 5), product
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.product(x, self.a, self.bias)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], WIDTH),
    "matmul": lambda x, w, b: x @ w + b,
    "matmul with a transposed one": lambda x, w, b: x @ w.t().contiguous().T,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_stored_matrix_is_a_layer(name: str) -> None:
    model = Matrices(PRODUCTS[name])
    report = compiled(model, {"a": every_second(model.a, 1)}, torch.randn(2, 3, 6).double())
    assert rows(report) == {"a": WIDTH // 2}
    assert [(r.name, r.shape) for r in report.rows] == [("a", (WIDTH, 6)), ("b.weight", (5, WIDTH))]


def test_a_product_of_two_activations_is_none() -> None:
    model = Matrices(lambda x, w, b: (x @ x.transpose(1, 2)) @ (x @ w))
    assert [r.name for r in compiled(model, {}, torch.randn(2, 3, 6).double()).rows] == ["a", "b.weight"]


# attention


class Attention(nn.Module):
    """Projections, heads, attention in one of its forms, and a projection."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * SIZE), nn.Linear(WIDTH, kv_heads * SIZE)
        self.attend = attend
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


sdpa = F.scaled_dot_product_attention
ATTENTION: dict[str, Callable[..., Tensor]] = {
    "plain": sdpa,
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "masked": lambda q, k, v: sdpa(q, k, v, attn_mask=q.mean(-1, keepdim=True) < k.mean(-1).unsqueeze(-2)),
    "biased": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(1, HEADS, 1, 1, dtype=q.dtype), scale=0.3),
    "by hand": lambda q, k, v: (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1) @ v,
}


def dead_heads(model: nn.Module, names: str, heads: tuple[int, ...], bias: bool = True) -> dict[str, Tensor]:
    masks = {}
    for name in names.split():
        for kind in ("weight", "bias") if bias else ("weight",):
            mask = torch.ones_like(getattr(model.get_submodule(name), kind), dtype=torch.bool)
            for head in heads:
                mask[head * SIZE : (head + 1) * SIZE] = False
            masks[f"{name}.{kind}"] = mask
    return masks


@pytest.mark.parametrize("bias", [True, False], ids=["zeros", "constants"])
@pytest.mark.parametrize("name", ATTENTION)
def test_dead_heads_go_whole(name: str, bias: bool) -> None:
    model = Attention(ATTENTION[name])
    masks = dead_heads(model, "v", (0, 3, 4), bias)  # nobody looks at what q and k say of them
    report = compiled(model, masks, torch.randn(2, 7, WIDTH).double())
    gone = 0 if not bias and name in ("masked", "biased", "by hand") else 3 * SIZE
    assert rows(report) == ({f"{n}.weight": gone for n in "qkv"} if gone else {})


def test_heads_that_nobody_reads_go_whole() -> None:
    model = Attention(sdpa)
    mask = torch.ones_like(model.o.weight, dtype=torch.bool)
    mask[:, SIZE : 3 * SIZE] = False
    report = compiled(model, {"o.weight": mask}, torch.randn(2, 7, WIDTH).double())
    assert rows(report) == {f"{n}.weight": 2 * SIZE for n in "qkv"}


def test_all_heads_can_be_made_smaller_and_keep_their_scale() -> None:
    model = Attention(sdpa)
    masks = {f"{n}.{kind}": torch.arange(HEADS * SIZE) % SIZE != 1 for n in "qkv" for kind in ("weight", "bias")}
    masks = {n: m if n.endswith("bias") else m[:, None].expand(-1, WIDTH) for n, m in masks.items()}
    report = compiled(model, masks, torch.randn(2, 7, WIDTH).double())
    assert rows(report) == {f"{n}.weight": HEADS for n in "qkv"}


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_queries_that_share_a_head_go_together(kv_heads: int) -> None:
    model = Attention(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), kv_heads)
    mask = torch.ones_like(model.o.weight, dtype=torch.bool)
    mask[:, : 3 * SIZE] = False  # the first three of six
    report = compiled(model, {"o.weight": mask}, torch.randn(2, 7, WIDTH).double())
    queries, keys = {1: (3, 0), 2: (3, 1), 3: (2, 1)}[kv_heads]
    wanted = {"q.weight": queries * SIZE, "k.weight": keys * SIZE, "v.weight": keys * SIZE}
    assert rows(report) == {name: gone for name, gone in wanted.items() if gone}


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_pytorchs_own_attention_go(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first).double().eval()
    model = nn.Sequential(layer) if batch_first else Turned(layer)
    name = "0.self_attn.in_proj" if batch_first else "layer.self_attn.in_proj"
    masks = {}
    for kind in ("weight", "bias"):
        mask = torch.ones_like(model.get_parameter(f"{name}_{kind}"), dtype=torch.bool)
        mask.view(3, HEADS, SIZE, -1)[:, [1, 2]] = False
        masks[f"{name}_{kind}"] = mask
    report = compiled(model, masks, torch.randn(2, 7, WIDTH).double())
    assert rows(report) == {f"{name}_weight": 3 * 2 * SIZE}


@pytest.mark.parametrize("part", range(3), ids=["q", "k", "v"])
def test_some_rows_of_one_projection_of_pytorchs_own_attention(part: int) -> None:
    """Too few for a head to go: they stay, and the report says what for."""
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).double().eval()
    mask = torch.ones_like(model.self_attn.in_proj_weight, dtype=torch.bool)
    mask[part * WIDTH + 1 : part * WIDTH + 3] = False
    report = compiled(model, {"self_attn.in_proj_weight": mask}, torch.randn(2, 5, WIDTH, dtype=torch.float64))
    (row,) = (r for r in report.rows if r.name == "self_attn.in_proj_weight")
    assert row.rows_removed == 0
    assert row.kept_for


def test_a_reader_beside_another_is_named() -> None:
    """Squeeze and excitation: the mean of the dead rows is folded into the gate; the product needs them."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))  # type: ignore[no-any-return]

    model = Gate().double().eval()
    report = compiled(model, {"a.weight": every_second(model.a.weight)}, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    (row,) = (r for r in report.rows if r.name == "a.weight")
    assert row.kept_for == ("coupled with sigmoid by mul (4 rows)",)


def test_half_of_a_vision_transformer_goes() -> None:
    model = (
        VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5).double().eval()
    )
    nn.init.normal_(model.heads.head.weight)  # zeros at the beginning, and all before it would be dead
    masks = heads_and_neurons(model, sparsity=0.5, seed=0)
    report = compiled(model, masks, torch.randn(2, 3, 32, 32).double())
    layers = [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)]
    gone = [(f"{n}.self_attention.in_proj_weight", 48) for n in layers] + [(f"{n}.mlp.0.weight", 32) for n in layers]
    assert rows(report) == dict(gone)
    halves = [f"{n}.{part}.weight" for n in layers for part in ("self_attention.out_proj", "mlp.3")]
    assert [r.columns_removed for r in report.rows if r.name in halves] == [16, 32, 16, 32]


class Turned(nn.Module):
    """A layer that takes [length, batch, features]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


# what is computed from weights, and what the model keeps to itself


def test_constants_with_many_readers_are_computed_once() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.l = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            w = self.w
            for _ in range(60):  # 2 ** 60 ways from the end to the beginning
                w = w * torch.sin(w)
            return self.l(x) * w

    compiled(Doubling().double().eval(), {}, torch.randn(2, 8).double())


def test_the_models_own_containers_stay_as_they_were() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.cache, self.calls = nn.Linear(8, 8), {}, [[0]]

        def forward(self, x: Tensor) -> Tensor:
            if "positions" not in self.cache:
                self.cache["positions"] = torch.arange(8.0, dtype=x.dtype)
                self.calls[0].append(len(self.calls[0]))
                self.register_forward_hook(lambda module, inputs, output: output + 1)
            return self.l(x) + self.cache["positions"]

    model = Caching().double().eval()
    report = fxsparse.plan(model, {}, (x := torch.randn(2, 8).double(),))
    assert len(report.rows) == 1
    assert (model.cache, model.calls, dict(model._forward_hooks)) == ({}, [[0]], {})
    assert type(model(x)) is Tensor


def test_rounding_is_no_error_in_float64_either() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).eval().double()
    with torch.no_grad():
        model[0].bias.fill_(1e3)  # cancelled by the mean; folding the norm rounds elsewhere
        model[1].running_mean.fill_(1e3)
    compiled(model, {"0.weight": every_second(model[0].weight)}, torch.randn(2, 64).double())
