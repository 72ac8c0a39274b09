"""ERK, SNIP, GraSP and SynFlow: each against its paper's formula, exact counts, the model untouched, every refusal."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from fxsparse.errors import InputError
from fxsparse.ir.masks import Masks
from fxsparse.prune import erk, erk_densities, grasp, prunable, snip, synflow
from tests.test_errors import refused
from tools import compare_partitioners

Way = Callable[..., Masks]


def net(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Convolutions with batch norms of various statistics, linear layers, and a head; 282 weights are prunable."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.1, 1)
    return model.double()


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 2, 7, 7, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def flow(model: nn.Module, _: Any, given: list[tuple[Tensor, Tensor]], density: float, **options: Any) -> Masks:
    """SynFlow with the arguments of the other two."""
    return synflow(model, given[0][0], density, **{"iterations": 5, **options})


WAYS = {"snip": snip, "grasp": grasp, "synflow": flow}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def kept(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def keeps(scores: dict[str, Tensor], density: float) -> Masks:
    """The definition of global pruning: sort all scores, keep the first."""
    every = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros(every.numel(), dtype=torch.bool)
    chosen[every.argsort(descending=True, stable=True)[: round(density * every.numel())]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return Masks({name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)})


# ---- the formulas, as the papers write them


def snip_scores(model: nn.Module, given: list[Any]) -> dict[str, Tensor]:
    """|dL/dc|, c a mask of ones on every connection, normalized: equations 4 and 5 of the paper."""
    weights = prunable(model)
    c = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    model = copy.deepcopy(model)
    total = sum(F.cross_entropy(functional_call(model, {n: c[n] * weights[n] for n in c}, x), y) for x, y in given)
    grads = [g.abs() for g in torch.autograd.grad(total, list(c.values()))]
    return {name: g / sum(each.sum() for each in grads) for name, g in zip(c, grads, strict=True)}


def grasp_scores(model: nn.Module, given: list[Any]) -> dict[str, Tensor]:
    """-w (H g) with the whole Hessian: equation 8 of the paper, where the highest go."""
    weights = prunable(model)
    model = copy.deepcopy(model)
    sizes = [w.numel() for w in weights.values()]

    def total(flat: Tensor) -> Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        tensors = {name: part.view_as(w) for (name, w), part in parts}
        return torch.stack([F.cross_entropy(functional_call(model, tensors, x), y) for x, y in given]).sum()

    at = torch.cat([w.flatten() for w in weights.values()])
    g, h = torch.autograd.functional.jacobian(total, at), torch.autograd.functional.hessian(total, at)
    scores = (-at * (h @ g)).split(sizes)
    return {name: score.view_as(w) for (name, w), score in zip(weights.items(), scores, strict=True)}


def synflow_masks(model: nn.Module, shape: tuple[int, ...], density: float, iterations: int) -> Masks:
    """Algorithm 1, on a copy whose tensors are written to, as the authors' code does."""
    model = copy.deepcopy(model).double().eval()
    for tensor in model.state_dict().values():
        tensor.abs_()
    parameters = {name: dict(model.named_parameters())[name] for name in prunable(model)}
    masks: dict[str, Tensor] = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for k in range(1, iterations + 1):
        for name, parameter in parameters.items():
            parameter.data.mul_(masks[name])
        model.zero_grad()
        model(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
        scores = {name: p.grad * p.data for name, p in parameters.items()}
        found = keeps({n: s.masked_fill(~masks[n], -1) for n, s in scores.items()}, density ** (k / iterations))
        masks = dict(found)
    return Masks(masks)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("density", [0.03, 0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:.*left without weights")
def test_snip_is_the_gradient_by_a_mask_of_ones(density: float, training: bool) -> None:
    model, given = net().train(training), batches()
    masks = snip(model, loss, given, density)
    assert masks == keeps(snip_scores(model, given), density)
    assert masks == snip(model, lambda m, b: loss(m, b) * 1000, given, density)
    assert kept(masks) == round(density * 282)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*left without weights")
def test_grasp_removes_the_highest_products_with_the_whole_hessian(training: bool) -> None:
    """Not the smallest magnitudes, as Structure-LTH did, and not the other end."""
    model, given = net().train(training), batches()
    score = grasp_scores(model, given)
    for density in (0.03, 0.2, 0.5, 1.0):
        masks = grasp(model, loss, given, density)
        assert masks == keeps({name: -s for name, s in score.items()}, density)
        assert kept(masks) == round(density * 282)
        if density in (0.2, 0.5):
            assert masks != keeps({name: s.abs() for name, s in score.items()}, density)
            assert masks != keeps(score, density)


def test_grasp_takes_the_temperature_from_the_loss() -> None:
    model, given = net(), batches()
    hot = grasp(model, lambda m, b: F.cross_entropy(m(b[0]) / 200, b[1]), given, 0.3)
    assert hot != grasp(model, loss, given, 0.3)


@pytest.mark.parametrize("iterations", [1, 7, 100])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.filterwarnings("ignore:.*left without weights")
def test_synflow_is_the_algorithm_of_the_paper(density: float, iterations: int) -> None:
    model = net().train()
    masks = synflow(model, torch.randn(4, 2, 7, 7), density, iterations=iterations)
    assert masks == synflow_masks(model, (2, 7, 7), density, iterations)
    assert kept(masks) == round(density * 282)


def test_synflow_empties_no_layer_where_one_step_does() -> None:
    torch.manual_seed(0)
    sizes = [8, 16, 256, 256, 16, 8, 4]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers))
    x = torch.ones(1, 8)
    with pytest.warns(UserWarning, match="1 of 5 layers are left without weights, the first is '4.weight'") as said:
        once = synflow(model, x, 0.02, iterations=1)
    assert [each.filename for each in said] == [__file__]
    masks = synflow(model, x, 0.02)  # a warning would be an error
    assert kept(masks) == kept(once) == round(0.02 * sum(mask.numel() for mask in masks.values()))
    assert all(bool(mask.any()) for mask in masks.values())


def test_once_a_layer_is_empty_synflow_brings_no_weight_back_and_warns_once() -> None:
    """All scores are zero then, and the earliest weights would be kept, whether they were pruned or not."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((4, 64, 64, 4, 2)))).double()
    with pytest.warns(UserWarning, match="2 of 3 layers are left without weights") as said:
        masks = synflow(model, torch.ones(1, 4), 20 / 4608, iterations=3)
    assert len(said) == 1
    assert masks == synflow_masks(model, (4,), 20 / 4608, 3)
    assert not bool(masks["0.weight"].flatten()[:20].all())


# ---- what they promise of the model


class Awkward(nn.Module):
    """Everything that a run changes, or that asks how a weight is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(dropout=0.5)[:11]
        prune.random_unstructured(self.net[3], "weight", 0.5)
        self.tied = nn.Linear(6, 6).double()
        self.again = nn.Linear(6, 6).double()
        self.again.weight = self.tied.weight
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6).double())
        self.parametrized = parametrizations.weight_norm(nn.Linear(6, 6).double())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.last: Tensor | None = None
        self.net[0].weight.requires_grad_(False)
        self.net[9].register_forward_hook(lambda *_: None)
        self.head = nn.Linear(6, 3).double()
        self.net[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.shape
        self.last = self.net(x)
        hidden = self.parametrized(self.spectral(torch.tanh(self.again(torch.tanh(self.tied(self.last))))))
        out: Tensor = self.head(hidden)
        return out


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    seen = [(n, id(t), t._version, t.requires_grad, id(t.grad), t.detach().clone()) for n, t in tensors]
    grads = [t.grad.clone() for _, t in tensors if t.grad is not None]
    plain = [(n, {k: id(v) for k, v in vars(m).items()}, m.training) for n, m in model.named_modules()]
    return [seen, grads, plain, torch.get_rng_state(), [id(v) for m in model.modules() for v in m._buffers.values()]]


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


@each_way
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*left without weights")
def test_the_model_and_the_generator_are_left_as_they_were(way: Way, training: bool) -> None:
    model, given = Awkward().train(training), batches()
    loss(model, given[0]).backward()
    model.net[1].eval()
    before = state(model)
    first = way(model, loss, given, 0.4)
    assert same(state(model), before)
    assert list(first) == ["net.0.weight", "net.3.weight_orig", "net.9.weight", "tied.weight"]
    assert way(model, loss, given, 0.4) == first
    assert way(model, loss, iter(given), 0.4) == first if way is not flow else True
    first.check(model)


@each_way
def test_the_model_is_left_as_it_was_by_a_loss_that_fails(way: Way) -> None:
    model, given = Awkward().train(), batches(1)
    before = state(model)
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        way(model, loss, given, 0.4)
    model.head._forward_hooks.clear()
    assert same(state(model)[0], before[0])
    assert same(state(model)[2:], before[2:])


@each_way
def test_a_loader_that_shuffles_leaves_the_generator_alone(way: Way) -> None:
    model = net()

    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches():
            chosen = torch.randperm(8)[:6]
            yield x[chosen], y[chosen]

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = way(model, loss, list(batches()) if way is flow else drawn(), 0.3)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == way(model, loss, list(batches()) if way is flow else drawn(), 0.3)


@each_way
def test_no_grad_inference_mode_default_dtype_and_device_make_no_difference(way: Way) -> None:
    model, given = net(), batches()
    wanted = way(model, loss, given, 0.3)
    assert {mask.device.type for mask in wanted.values()} == {"cpu"}
    with torch.no_grad():
        assert way(model, loss, given, 0.3) == wanted
    with torch.inference_mode():
        assert way(model, loss, given, 0.3) == wanted
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert way(model, loss, given, 0.3) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_float_types_choose_nearly_the_same(way: Way, dtype: torch.dtype) -> None:
    exact = way(net(), loss, batches(), 0.3)
    masks = way(net().to(dtype), lambda m, b: loss(m, b).float(), batches(dtype=dtype), 0.3)
    assert kept(masks) == kept(exact)
    both = sum(int((mask & exact[name]).sum()) for name, mask in masks.items())
    assert both >= (1 if dtype == torch.float32 else 0.9) * kept(exact)


@each_way
def test_excluded_layers_are_not_ranked(way: Way) -> None:
    masks = way(net(), loss, batches(), 0.3, exclude=("0", "9.weight"))
    assert list(masks) == ["3.weight"]
    assert kept(masks) == round(0.3 * 180)


@pytest.mark.parametrize("way", [snip, grasp, functools.partial(flow, iterations=1)])
def test_of_equal_scores_the_earlier_weight_is_kept(way: Way) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    x = torch.ones(1, 3, dtype=torch.float64)
    masks = way(model, lambda m, b: m(b[0]).square().sum(), [(x, None)], 0.5)
    assert masks["0.weight"].tolist() == [[True, True, True], [False, False, False]]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        q, k, v = self.qkv(x).view(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return {"logits": self.head(self.out(mixed)).mean(1) * scale}


def test_attention_has_second_derivatives() -> None:
    x = torch.randn(4, 5, 8)
    masks = grasp(Attentive(), lambda m, b: F.cross_entropy(m(b)["logits"], torch.arange(4) % 3), [x], 0.4)
    assert kept(masks) == round(0.4 * 256)


def test_synflow_takes_inputs_by_name_and_outputs_of_any_form() -> None:
    model, x = Attentive(), torch.randn(4, 5, 8)
    assert synflow(model, {"x": x, "scale": 2.0}, 0.4) == synflow(model, (x,), 0.4) == synflow(model, x, 0.4)


def test_synflow_of_a_network_too_deep_for_float32() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    for layer in model:
        nn.init.normal_(layer.weight)
    assert model(torch.ones(1, 64)).isfinite().all()
    assert kept(synflow(model, torch.ones(1, 64), 0.3, iterations=2)) == round(0.3 * 39 * 4096)


# ---- refusals


@each_way
@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_outside_its_range_is_refused(way: Way, density: float) -> None:
    for run in (lambda: way(net(), loss, batches(), density), lambda: erk(prunable(net()), density, seed=0),
                lambda: erk_densities(prunable(net()), density)):  # fmt: skip
        with refused(InputError, where=f"density {density!r}", expected="0 < density <= 1", got=f"{density!r}",
                     do="density = 1 - sparsity"):  # fmt: skip
            run()


@pytest.mark.parametrize("way", [snip, grasp])
def test_batches_that_are_none_or_one_tensor_are_refused(way: Way) -> None:
    with refused(InputError, where="batches", expected="at least one batch", got="none", do="give a list"):
        way(net(), loss, iter(()), 0.3)
    with refused(InputError, where="batches", expected="a list", got="one tensor of shape (8, 2, 7, 7)",
                 do="[batch]"):  # fmt: skip
        way(net(), loss, batches()[0][0], 0.3)


LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Any], str, str, str]] = {
    "of every sample": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), "a scalar", "shape (8,)",
                        "reduction='mean'"),
    "a number": (lambda m, b: loss(m, b).item(), "a scalar", "float", "reduction='mean'"),
    "infinite": (lambda m, b: loss(m, b) / 0, "finite", "inf", "one of them holds NaN"),
    "NaN": (lambda m, b: loss(m, b) * float("nan"), "finite", "nan", "one of them holds NaN"),
    "detached": (lambda m, b: loss(m, b).detach(), "a function of the model's weights", "without gradient", "detach"),
    "of another model": (lambda m, b: loss(net().requires_grad_(False), b), "a function", "without gradient",
                         "the model that loss is given"),
}  # fmt: skip


@pytest.mark.parametrize("way", [snip, grasp])
@pytest.mark.parametrize(("wrong", "expected", "got", "do"), LOSSES.values(), ids=LOSSES)
def test_a_loss_without_a_finite_gradient_is_refused(
    way: Way, wrong: Callable[[nn.Module, Any], Any], expected: str, got: str, do: str
) -> None:
    given = batches(2)
    with refused(InputError, where="loss of batch 1", expected=expected, got=got, do=do):
        way(net(), lambda m, b: loss(m, b) if b is given[0] else wrong(m, b), given, 0.3)


@pytest.mark.parametrize("way", [snip, grasp])
def test_scores_that_cannot_be_ranked_are_refused(way: Way) -> None:
    def infinitely_steep(model: nn.Module, _: Any) -> Tensor:
        return (model[0].weight - model[0].weight.detach()).abs().sqrt().sum()

    with refused(InputError, where="scores of '0.weight'", expected="ranked", got="72 NaN or infinite of 72",
                 do="Look at the weights"):  # fmt: skip
        way(net(), infinitely_steep, [0], 0.3)


def test_a_loss_without_curvature_is_refused_by_grasp_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    flat = [torch.ones(1, 3)]
    with refused(InputError, where="loss", expected="second derivatives", got="constant", do="snip needs none"):
        grasp(model, lambda m, b: m[0](b).sum(), flat, 0.5)
    assert kept(snip(model, lambda m, b: m[0](b).sum(), flat, 0.5)) == 3


def test_refusals_of_synflow() -> None:
    model, x = net(), torch.ones(1, 2, 7, 7)
    with refused(InputError, where="iterations 0", expected="at least 1", got="0", do="100"):
        synflow(model, x, 0.3, iterations=0)
    with refused(InputError, where="example_inputs", expected="a tuple", got="int", do="For one image"):
        synflow(model, 3, 0.3)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with refused(InputError, where="scores of '0.weight'", expected="ranked", got="NaN or infinite of 72",
                 do="deep networks overflow"):  # fmt: skip
        synflow(model, x, 0.3)
    model.register_forward_hook(lambda _, __, out: out.detach())
    with refused(InputError, where="model", expected="depend on its weights", got="none", do="no_grad"):
        synflow(model, x, 0.3)


# ---- ERK


def rigl(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The released get_sparsities_erdos_renyi: one layer at a time, the largest, is made dense."""
    size = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    dense: list[str] = []
    while sparse := [name for name in shapes if name not in dense]:
        right = sum(density * size[n] for n in sparse) - sum((1 - density) * size[n] for n in dense)
        eps = right / sum(raw[n] * size[n] for n in sparse)
        top = max(sparse, key=lambda n: raw[n])
        if raw[top] * eps <= 1:
            break
        dense.append(top)
    return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}


SHAPES = {"stem": (8, 3, 3, 3), "wide": (64, 32, 3, 3), "point": (64, 64, 1, 1), "depth": (64, 1, 3, 3), "fc": (50, 64)}


def empty(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_erk_densities_by_hand() -> None:
    """52 of 144 weights. At first scale 52 / (4 + 20 + 12) = 1.44 and a would be 1.44 * 4/4; then 48 / 32 = 1.5."""
    weights = empty({"a": (2, 2), "b": (10, 10), "c": (5, 4, 2, 1)})
    assert erk_densities(weights, 52 / 144) == pytest.approx({"a": 1, "b": 1.5 * 20 / 100, "c": 1.5 * 12 / 40})
    assert [int(mask.sum()) for mask in erk(weights, 52 / 144, seed=0).values()] == [4, 30, 18]


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_erk_is_rigl_s_formula_and_its_count_is_exact(density: float) -> None:
    weights = empty(SHAPES)
    densities, masks = erk_densities(weights, density), erk(weights, density, seed=0)
    assert densities == pytest.approx(rigl(SHAPES, density))
    assert kept(masks) == round(density * sum(w.numel() for w in weights.values()))
    for name, mask in masks.items():
        assert mask.shape == weights[name].shape
        assert abs(int(mask.sum()) - densities[name] * mask.numel()) < 1


def test_erk_rounds_the_largest_remainder_up_and_of_equal_ones_the_earlier() -> None:
    assert [int(m.sum()) for m in erk(empty({"a": (2, 5), "b": (2, 5)}), 0.55, seed=0).values()] == [6, 5]
    # 3 of 5 + 9: 5 / (2 * 5 + ...) would be rounded to 2 and 2, one too many
    counts = [int(m.sum()) for m in erk(empty({"a": (3, 5), "b": (3, 5), "c": (3, 5)}), 10 / 45, seed=0).values()]
    assert counts == [4, 3, 3]


def test_erk_is_seeded_uniform_within_a_layer_and_leaves_the_global_generator_alone() -> None:
    weights = empty(SHAPES)
    before = torch.get_rng_state()
    masks = erk(weights, 0.3, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    with torch.device("meta"):
        assert masks == erk(weights, 0.3, seed=5)
    assert masks != erk(weights, 0.3, seed=6)
    often = sum(erk({"w": torch.empty(4, 5)}, 0.4, seed=seed)["w"].float() for seed in range(400)) / 400
    assert float((often - 0.4).abs().max()) < 0.1  # four sigma


def test_erk_of_layers_without_elements_and_of_too_few_weights() -> None:
    assert kept(erk(empty({"none": (0, 5), "some": (4, 5)}), 1.0, seed=0)) == 20
    assert erk_densities(empty({"none": (0, 5), "some": (4, 5)}), 0.5)["some"] == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="2 of 3 layers are left without weights") as said:
        erk(empty({"a": (9, 9), "b": (9, 9), "c": (9, 9)}), 1 / 243, seed=0)
    assert [each.filename for each in said] == [__file__]
    with refused(InputError, where="weights", expected="at least one tensor", got="0 tensors", do="prunable"):
        erk({}, 0.5, seed=0)


@pytest.mark.parametrize("model", compare_partitioners.MODELS)
def test_the_densities_of_the_committed_rows_come_out(model: str) -> None:
    import torchvision.models

    rows = [json.loads(line) for line in compare_partitioners.ROWS.read_text(encoding="utf-8").splitlines()]
    wanted = {r["density_before"] for r in rows
              if (r["model"], r["masks"], r["rule"]) == (model, "erk", "shuffled_block 16")}  # fmt: skip
    with torch.device("meta"):
        shown = prunable(getattr(torchvision.models, model)())
    weights = {name: weight for name, weight in shown.items() if weight.dim() == 4}
    densities = erk_densities(weights, 1 - 0.8)
    counts = {n: round(densities[n] * w.numel()) for n, w in weights.items()}
    sparse = [n for n, w in weights.items() if counts[n] < w.numel()]
    assert {sum(counts[n] for n in sparse) / sum(weights[n].numel() for n in sparse)} == wanted
