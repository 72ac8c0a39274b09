"""Refill against a plain transcription of the paper's Algorithm 2, and the batch norm masks that go with it."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from fxsparse.coarsen import channel_features, coupled_weights, refill, refill_plus, with_batch_norm
from fxsparse.errors import InputError, MaskError
from fxsparse.ir.masks import Masks

SHAPES = {"conv": (10, 3, 3, 3), "wide": (32, 5), "one": (1, 4), "depthwise": (7, 1, 3, 3), "tall": (3, 100)}


def given(seed: int, density: float, *, levels: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if levels is not None:
        weights = {name: (w * levels).round() / levels for name, w in weights.items()}
    return weights, {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def algorithm_2(weight: Tensor, mask: Tensor, criterion: str, extra: str, round_to: int) -> Tensor:
    """One element at a time, in exact arithmetic."""
    rows = [
        [(Fraction(w), m) for w, m in zip(row_w.flatten().tolist(), row_m.flatten().tolist(), strict=True)]
        for row_w, row_m in zip(weight, mask, strict=True)
    ]
    importance = [sum((abs(w) if criterion == "l1" else Fraction(1)) for w, m in row if m) for row in rows]
    ones, size, c_out = sum(m for row in rows for _, m in row), mask.numel(), len(rows)
    k = max(1, math.ceil(Fraction(ones, size) * c_out))
    k += math.floor((c_out - k) * Fraction(extra))
    while k % round_to and k < c_out:
        k += 1
    best = sorted(range(c_out), key=lambda i: (-importance[i], i))[:k]
    return torch.stack([torch.full(mask.shape[1:], i in best) for i in range(c_out)])


@pytest.mark.parametrize("criterion", ["l1", "count"])
@pytest.mark.parametrize(("extra", "round_to"), [("0", 1), ("0.2", 1), ("0.3", 8), ("1", 1), ("0", 4)])
@pytest.mark.parametrize("levels", [None, 1])
def test_refill_is_algorithm_2(criterion: str, extra: str, round_to: int, levels: int | None) -> None:
    for seed, density in enumerate((0.0, 0.03, 0.3, 0.5, 0.9, 1.0)):
        weights, masks = given(seed, density, levels=levels)
        found = refill(weights, masks, criterion=criterion, extra=float(extra), round_to=round_to)
        assert list(found.masks) == list(SHAPES)
        for name, mask in masks.items():
            expected = algorithm_2(weights[name], mask, criterion, extra, round_to)
            assert torch.equal(found.masks[name], expected), (name, seed)


@pytest.mark.parametrize(
    ("ones", "rows", "columns", "keep"),
    [
        (3, 10, 1, 3),
        (30, 100, 10, 3),
        (31, 100, 10, 4),
        (0, 8, 4, 1),
        (1, 8, 4, 1),
        (32, 8, 4, 8),
        (29, 8, 4, 8),
        (28, 8, 4, 7),
    ],
)
def test_the_number_of_rows_is_exact(ones: int, rows: int, columns: int, keep: int) -> None:
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[:ones] = True
    found = refill({"w": torch.ones(rows, columns)}, {"w": mask.view(rows, columns)})
    assert found.layers[0].rows_kept == keep
    assert int(found.masks["w"].sum()) == keep * columns


def test_the_extra_share_is_exact() -> None:
    mask = torch.zeros(101, 1)
    mask[0] = 1
    found = refill({"w": torch.ones(101, 1)}, {"w": mask}, extra=0.29)  # 0.29 * 100 in floats is below 29
    assert found.layers[0].rows_kept == 1 + 29


def test_of_equally_important_rows_the_lower_is_kept() -> None:
    found = refill({"w": torch.ones(6, 4)}, {"w": torch.eye(4).repeat(2, 1)[:6]}, criterion="count")
    assert found.masks["w"].any(1).tolist() == [True, True, False, False, False, False]
    found = refill({"w": torch.tensor([[1.0], [2.0], [-2.0], [2.0]])}, {"w": torch.tensor([[0], [1], [1], [0]])})
    assert found.masks["w"].flatten().tolist() == [False, True, True, False]


def test_l1_counts_only_what_the_mask_keeps_and_count_not_the_weights() -> None:
    weights = {"w": torch.tensor([[9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0], [5.0, 0.1, 0.1, 0.1]])}
    masks = {"w": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])}
    assert refill(weights, masks).layers[0].rows_kept == 1
    assert refill(weights, masks).masks["w"].any(1).tolist() == [False, False, True]
    assert refill(weights, masks, criterion="count").masks["w"].any(1).tolist() == [False, True, False]


def test_refill_leaves_its_arguments_as_they_are() -> None:
    weights, masks = given(0, 0.4)
    before = [{n: t.clone() for n, t in each.items()} for each in (weights, masks)]
    found = refill(weights, masks)
    for each, copied in zip((weights, masks), before, strict=True):
        assert all(torch.equal(t, copied[n]) for n, t in each.items())
    found.masks["conv"].logical_not_()
    assert torch.equal(masks["conv"], before[1]["conv"])


def test_refilling_twice_changes_nothing() -> None:
    weights, masks = given(2, 0.4)
    once = refill(weights, masks)
    twice = refill(weights, once.masks)
    assert twice.masks == once.masks
    assert all(layer.added == layer.removed == 0 and layer.l1_kept == layer.l2_kept == 1 for layer in twice.layers)


def test_weights_without_a_mask_stay_dense_and_masks_of_biases_pass_through() -> None:
    weights = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    found = refill(weights, {"a.weight": torch.eye(4), "a.bias": torch.tensor([1, 0, 1, 1])})
    assert list(found.masks) == ["a.weight", "a.bias"]
    assert found.masks["a.bias"].tolist() == [True, False, True, True]
    assert [layer.name for layer in found.layers] == ["a.weight"]


def test_the_report_counts_what_changed() -> None:
    weights = {"w": torch.tensor([[3.0, -4.0], [1.0, 2.0], [1.0, 0.0], [0.5, 0.5]])}
    found = refill(weights, {"w": torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]])})
    (layer,) = found.layers
    assert found.masks["w"].any(1).tolist() == [True, True, False, False]
    assert (layer.rows, layer.rows_kept, layer.added, layer.removed) == (4, 2, 1, 1)
    assert (layer.density_before, layer.density_after) == (0.5, 0.5)
    assert layer.l1_kept == pytest.approx(6 / 6.5)
    assert layer.l2_kept == pytest.approx(14 / 14.25)
    assert re.search(r"w\s+2 of 4\s+1\s+0\.500\s+0\.500\s+92\.3%\s+98\.2%\s+1\s+1$", str(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l2"}, r"criterion 'l2': expected one of 'l1', 'count', .*; got 'l2'\.\n  Did you mean 'l1'"),
        ({"criterion": "taylor"}, r"got 'taylor'\.\n  'l1' is the paper's default"),
        (
            {"extra": 1.5},
            r"extra 1\.5: expected a share of the dropped rows to bring back, 0 <= extra <= 1; got 1\.5\.\n  0 is",
        ),
        ({"extra": float("nan")}, r"extra nan: expected a share"),
        ({"round_to": 0}, r"round_to 0: expected a positive number of rows; got 0\.\n  1 does not round"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        refill({"w": torch.ones(2, 2)}, {"w": torch.eye(2)}, **options)


def test_masks_that_fit_no_weight_are_refused() -> None:
    with pytest.raises(MaskError, match=r"mask for 'conv.wieght': .*\n  Did you mean 'conv.weight'"):
        refill({"conv.weight": torch.ones(2, 2)}, {"conv.wieght": torch.eye(2)})
    with pytest.raises(MaskError, match=r"mask for 'w': expected the weight's shape \(2, 3\); got \(2, 2\)\."):
        refill({"w": torch.ones(2, 3)}, {"w": torch.eye(2)})


def test_weights_that_cannot_be_ranked_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"weight 'w': expected finite numbers; got 1 NaN or infinite of 4\.\n  Training"
    ):
        refill({"w": torch.tensor([[1.0, float("inf")], [0.0, 0.0]])}, {"w": torch.eye(2)})


# features


class Scored(nn.Module):
    """A convolution, a linear layer over tokens, and one over what is left of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tokens, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))).mean(1))


def outputs_of(model: Scored, x: Tensor) -> dict[str, Tensor]:
    """Each layer's output as [N, O, P], computed step by step."""
    conv = model.conv(x)
    tokens = model.tokens(torch.relu(conv).flatten(2).transpose(1, 2))
    return {"conv.weight": conv.flatten(2), "tokens.weight": tokens.transpose(1, 2)}


@pytest.mark.parametrize("kind", ["feature_l1", "feature_l2"])
def test_features_are_means_over_samples_and_positions_of_each_layer_s_own_channels(kind: str) -> None:
    torch.manual_seed(0)
    model, batches = Scored(), [torch.randn(4, 2, 3, 3), torch.randn(2, 2, 3, 3)]
    found = channel_features(model, ["conv.weight", "tokens.weight"], batches, kind)
    with torch.no_grad():
        for name, output in outputs_of(model, torch.cat(batches)).items():
            flat = output.transpose(0, 1).flatten(1).double()
            want = flat.abs().mean(1) if kind == "feature_l1" else flat.square().mean(1).sqrt()
            assert torch.allclose(found[name], want, rtol=1e-5)


def test_saliency_is_how_much_the_loss_changes_to_first_order_when_a_channel_goes() -> None:
    torch.manual_seed(0)
    model, x, y = Scored(), torch.randn(6, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, target, reduction="sum")

    found = channel_features(model, ["conv.weight"], [(x[:4], y[:4]), (x[4:], y[4:])], "saliency", loss=loss)
    for channel in range(4):
        changes = []
        for sample in range(6):  # a gate on one channel of one sample, moved by finite differences
            values = []
            for gate in (1 - 1e-4, 1 + 1e-4):
                scaled = Scored().double()
                scaled.load_state_dict(model.state_dict())
                scaled.conv.weight.data[channel] *= gate
                scaled.conv.bias.data[channel] *= gate
                values.append(loss(scaled(x[sample : sample + 1].double()), y[sample : sample + 1]).item())
            changes.append(abs(values[1] - values[0]) / 2e-4)
        assert found["conv.weight"][channel] == pytest.approx(sum(changes) / 6, rel=1e-3)


def test_channel_features_leaves_the_model_as_it_was() -> None:
    model = Scored().train()
    model.conv.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(torch.randn(2, 2, 3, 3), torch.tensor([0, 1]))]
    channel_features(model, ["conv.weight"], data, "saliency", loss=nn.functional.cross_entropy)
    assert (model.training, model.conv.training, model.tokens.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("criterion", ["feature_l1", "feature_l2", "saliency"])
def test_rows_are_chosen_by_their_features(criterion: str) -> None:
    mask = torch.tensor([[1, 0], [1, 0], [1, 0], [1, 0]])
    score = {"w": torch.tensor([0.1, 3.0, 0.2, 3.0])}
    found = refill({"w": torch.eye(4)[:, :2] + 9}, {"w": mask}, criterion=criterion, features=score)
    assert found.masks["w"].any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"features of 'w': expected a score per row, .*; got none\.\n  features=channel_features"),
        ({"w": torch.ones(3)}, r"features of 'w': expected 2 finite numbers, one per row; got shape \(3,\)\."),
        (
            {"w": torch.tensor([1.0, torch.nan])},
            r"features of 'w': .*; got NaN or infinity among them\.\n  channel_feat",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(features: dict[str, Tensor] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        refill({"w": torch.ones(2, 2)}, {"w": torch.eye(2)}, criterion="feature_l1", features=features)


@pytest.mark.parametrize(
    ("names", "batches", "kind", "message"),
    [
        (
            ["conv.wieght"],
            [torch.ones(1, 2, 3, 3)],
            "feature_l1",
            r"name 'conv.wieght': .*\n  Did you mean 'conv.weight'",
        ),
        (["conv.bias"], [torch.ones(1, 2, 3, 3)], "feature_l1", r"name 'conv.bias': expected the weight of a conv"),
        (["conv.weight"], [], "feature_l1", r"batches: expected batches that run .*; got none that runs 'conv.weight'"),
        (["conv.weight"], [], "l1", r"kind 'l1': expected one of 'feature_l1', .*; got 'l1'\.\n  "),
        (["conv.weight"], [], "saliency", r"loss: expected a function .*; got None\.\n  For a classifier"),
    ],
)
def test_features_that_cannot_be_computed_are_refused(
    names: list[str], batches: list[Tensor], kind: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        channel_features(Scored(), names, batches, kind)


# channels chosen together


class Stage(nn.Module):
    """A residual stage: what `stem` and `last` write is added up; `deep` is depthwise over what `up` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.up, self.deep, self.last = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.bn(self.stem(x))))
        return self.head((x + self.last(torch.relu(self.deep(self.up(x))))).mean((2, 3)))


def test_weights_that_write_the_same_channels_are_found() -> None:
    model = Stage()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = coupled_weights(model, (torch.randn(1, 3, 5, 5),))
    assert found == [["stem.weight", "last.weight"], ["up.weight", "deep.weight"]]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_that_move_to_another_place_are_not_coupled() -> None:
    class Moved(Stage):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.last(self.up(x)).roll(1, 1)).mean((2, 3)))

    assert coupled_weights(Moved(), (torch.randn(1, 3, 5, 5),)) == []


def test_coupled_rows_are_chosen_by_their_sum_with_one_budget() -> None:
    weights = {"a": torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "b": torch.tensor([[5.0, 5], [0, 0], [0.1, 0], [0, 0]])}
    masks = {"a": torch.ones(4, 1), "b": torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]]), "c": torch.eye(4)}
    weights["c"] = torch.ones(4, 4)
    found = refill(weights, masks, groups=[["a", "b", "dense"]])
    assert found.masks["a"].any(1).tolist() == found.masks["b"].any(1).tolist() == [True, False, False, True]
    assert found.masks["c"].any(1).tolist() == [True, False, False, False]
    apart = refill(weights, masks).masks
    assert apart["a"].any(1).tolist() == [True, True, True, True]


def test_refill_plus_brings_back_a_fifth_of_the_dropped_rows() -> None:
    weights, masks = given(0, 0.4)
    found = refill_plus(weights, masks, criterion="count", round_to=2)
    assert found.masks == refill(weights, masks, criterion="count", round_to=2, extra=0.2).masks
    assert found.masks != refill(weights, masks, criterion="count", round_to=2).masks


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["a", "b"]], r"groups, 'b': expected as many rows as 'a' has, 4; got 3\.\n  Only weights that write"),
        (
            [["a", "c"], ["c"]],
            r"groups, 'c': expected each parameter in one group; got it in two of them\.\n  Make one",
        ),
    ],
)
def test_weights_that_cannot_choose_together_are_refused(groups: list[list[str]], message: str) -> None:
    weights = {"a": torch.ones(4, 2), "b": torch.ones(3, 2), "c": torch.ones(4, 2)}
    with pytest.raises(MaskError, match=message):
        refill(weights, weights, groups=groups)


# batch norms


class Residual(nn.Module):
    """Two convolutions with batch norms, the first with a bias and dropout between, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.drop, self.bn1 = nn.Conv2d(2, 6, 3, padding=1), nn.Dropout2d(0.5), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.drop(self.conv1(x))))
        return self.fc((self.bn2(self.conv2(out)) + x).mean((2, 3)))


def rows(model: nn.Module, name: str, kept: list[int]) -> dict[str, Tensor]:
    mask = torch.zeros_like(dict(model.named_parameters())[name], dtype=torch.bool)
    mask[kept] = True
    return {name: mask}


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms as after training: no statistic, scale or shift is 0 or 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def test_a_dropped_row_takes_its_bias_and_its_batch_norm_along() -> None:
    model = randomized(Residual())
    given = rows(model, "conv1.weight", [0, 2, 5])
    given["conv1.weight"][0, 1] = False  # a row is dropped only when nothing of it is left
    found = with_batch_norm(model, given)
    assert sorted(found) == ["bn1.bias", "bn1.weight", "conv1.bias", "conv1.weight"]
    assert torch.equal(found["conv1.weight"], given["conv1.weight"])
    for name in ("bn1.bias", "bn1.weight", "conv1.bias"):
        assert found[name].nonzero().flatten().tolist() == [0, 2, 5]


def test_with_these_masks_a_dropped_channel_is_zero_after_its_batch_norm_and_without_them_a_constant() -> None:
    model, seen = randomized(Residual()), []
    model.bn1.register_forward_hook(lambda module, args, output: seen.append(output))
    given, x = rows(model, "conv1.weight", [0, 2, 5]), torch.randn(4, 2, 5, 5)
    Masks(given).apply_(model)
    model(x)
    assert bool((seen[0][:, [1, 3, 4]] != 0).all())
    with_batch_norm(model, given).apply_(model)
    model(x)
    assert bool((seen[1][:, [1, 3, 4]] == 0).all())
    assert torch.equal(seen[1][:, [0, 2, 5]], seen[0][:, [0, 2, 5]])


def test_rows_with_a_single_weight_left_keep_their_batch_norm() -> None:
    model = Residual()
    mask = torch.zeros(6, 2, 3, 3)
    mask[:, 0, 1, 2] = 1
    assert list(with_batch_norm(model, {"conv1.weight": mask})) == ["conv1.weight"]


def test_masks_that_are_there_already_are_kept() -> None:
    model = Residual()
    given = {**rows(model, "conv1.weight", [0, 1, 2]), "bn1.weight": torch.tensor([0, 1, 1, 1, 1, 1])}
    found = with_batch_norm(model, given)
    assert found["bn1.weight"].tolist() == [False, True, True, False, False, False]
    assert given["bn1.weight"].tolist() == [0, 1, 1, 1, 1, 1]


def test_the_model_is_not_changed() -> None:
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_batch_norm(model, rows(model, "conv1.weight", [0]))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x))


def test_a_batch_norm_used_twice_keeps_what_either_input_keeps() -> None:
    model = Shared()
    found = with_batch_norm(model, {**rows(model, "a.weight", [0, 1]), **rows(model, "b.weight", [1, 2])})
    assert found["bn.weight"].tolist() == found["bn.bias"].tolist() == [True, True, True, False]
    assert found["a.bias"].tolist() == [True, True, False, False]
    assert "bn.weight" not in with_batch_norm(model, rows(model, "a.weight", [0, 1]))


class Norms(nn.Module):
    """Batch norms that are not a convolution's own: after an addition, without parameters, after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after_add = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.plain_conv, self.plain = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)
        self.linear, self.after_linear = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.plain_conv(self.after_add(self.conv(x) + x)))
        return self.after_linear(self.linear(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("weight", "added"),
    [
        ("conv.weight", []),
        ("plain_conv.weight", []),
        ("linear.weight", ["linear.bias", "after_linear.weight", "after_linear.bias"]),
    ],
)
def test_only_a_batch_norm_that_reads_the_rows_themselves_is_masked(weight: str, added: list[str]) -> None:
    model = Norms()
    assert sorted(with_batch_norm(model, rows(model, weight, [0, 3]))) == sorted([weight, *added])


class Tokens(nn.Module):
    """A batch norm over the second of three dimensions: not over the channels of the linear layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))  # [N, 5, 3] -> [N, 5, 4]


def test_a_batch_norm_over_another_dimension_is_left_alone() -> None:
    model = Tokens()
    assert list(with_batch_norm(model, rows(model, "linear.weight", [0]))) == ["linear.weight", "linear.bias"]


class Branching(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_refused_only_when_it_matters() -> None:
    model = Branching()
    message = r"model Branching: .*symbolic_trace can trace.*; got TraceError: .*\.\n  Add the masks of its batch norms"
    with pytest.raises(InputError, match=message):
        with_batch_norm(model, rows(model, "conv1.weight", [0]))
    assert list(with_batch_norm(model, {"conv1.weight": torch.ones(6, 2, 3, 3)})) == ["conv1.weight"]


def test_a_mask_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(MaskError, match=r"mask for 'conv9.weight'"):
        with_batch_norm(Residual(), {"conv9.weight": torch.ones(2, 2)})
