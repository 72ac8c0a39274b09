"""coarsen.n_m: the largest of every group, nothing else, and what it passes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse import Masks, cli, coarsen
from fxsparse.errors import FxSparseError, InputError, MaskError
from fxsparse.formats.n_m import misfits, recognize
from tests.coarsening import layers


def ones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 4)]))
def test_any_masks_become_n_m_and_keep_the_largest(
    case: tuple[dict[str, Tensor], dict[str, Tensor]], pattern: tuple[int, int]
) -> None:
    weights, masks = case
    n, m = pattern
    found = coarsen.n_m(weights, masks, n=n, m=m)
    assert found == coarsen.n_m(weights, masks, n=n, m=m)
    for layer in found.layers:
        w, given_mask, coarse = weights[layer.name].abs(), masks[layer.name], found.masks[layer.name]
        if layer.fallback:
            assert torch.equal(coarse, given_mask)
            assert given_mask.shape[1] % m
            continue
        assert misfits(coarse, n, m) == 0
        assert not (coarse & ~given_mask).any()
        assert (layer.added, layer.removed) == (0, int(given_mask.sum() - coarse.sum()))
        groups = [t.unflatten(1, (-1, m)).movedim(2, -1).flatten(0, -2) for t in (w, given_mask, coarse)]
        for sizes, before, after in zip(*groups, strict=True):
            assert int(after.sum()) == min(n, int(before.sum()))
            if after.any() and (before & ~after).any():
                assert sizes[after].min() >= sizes[before & ~after].max()


def test_the_same_comes_out_again_and_nothing_given_is_changed() -> None:
    weights = {"a": torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))}
    masks = {"a": torch.rand(6, 8, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.7}
    before = {n: t.clone() for n, t in weights.items()}
    first, again = coarsen.n_m(weights, masks), coarsen.n_m(weights, masks)
    assert first.masks == again.masks
    assert str(first) == str(again)
    assert torch.equal(weights["a"], before["a"])


def test_a_convolution_is_cut_along_its_input_channels_tap_by_tap() -> None:
    w = torch.zeros(1, 4, 1, 2)
    w[0, :, 0, 0], w[0, :, 0, 1] = torch.tensor([4.0, 3, 2, 1]), torch.tensor([1.0, 2, 3, -4])
    mask = coarsen.n_m({"w": w}, ones({"w": w})).masks["w"]
    assert mask[0, :, 0].int().t().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_of_equal_weights_the_earlier_is_kept() -> None:
    w = {"w": torch.full((2, 8), -0.5)}
    assert coarsen.n_m(w, ones(w)).masks["w"].int().tolist() == [[1, 1, 0, 0] * 2] * 2


def test_a_kept_zero_comes_before_a_pruned_weight() -> None:
    w, mask = torch.tensor([[9.0, 0.0, 9.0, 1.0]]), torch.tensor([[0, 1, 0, 1]])
    assert coarsen.n_m({"w": w}, {"w": mask}).masks["w"].int().tolist() == [[0, 1, 0, 1]]


def test_what_is_excluded_or_does_not_divide_is_passed_on_and_said() -> None:
    weights = {"net.a.weight": torch.randn(4, 8), "net.b.weight": torch.randn(4, 6), "head.weight": torch.randn(4, 8),
               "depthwise": torch.randn(8, 1, 3, 3), "bias": torch.randn(8)}  # fmt: skip
    found = coarsen.n_m(weights, ones(weights), exclude=["head"])
    assert {layer.name: layer.fallback for layer in found.layers} == {
        "net.a.weight": "",
        "net.b.weight": "kept as it was: 6 input channels are no multiple of 4",
        "head.weight": "kept as it was: excluded",
        "depthwise": "kept as it was: 1 input channels are no multiple of 4",
    }
    assert found.masks["head.weight"].all()
    assert found.masks["bias"].all()
    assert "head.weight: kept as it was: excluded" in str(found)
    assert recognize(found.masks["net.a.weight"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 4}, InputError, "pattern 4:4: expected N:M with 0 < N < M"),
        ({"m": 6}, InputError, "M one of 2, 4, 8, 16"),
        ({"exclude": "fa"}, MaskError, "exclude 'fa': expected the name of a mask.*\n.*Did you mean 'fc'"),
    ],
)
def test_options_outside_their_range_are_refused(
    options: dict[str, object], error: type[FxSparseError], message: str
) -> None:
    w = {"fc": torch.randn(4, 8)}
    with pytest.raises(error, match=message):
        coarsen.n_m(w, ones(w), **options)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    w = {"fc": torch.full((4, 8), torch.nan)}
    with pytest.raises(InputError, match="finite numbers"):
        coarsen.n_m(w, ones(w))


# ------------------------------------------------------------ the command


def test_the_command_makes_a_dense_model_two_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "masks.safetensors", tmp_path / "page.html"
    arguments = ["coarsen", "models:vgg16_cifar", "--method", "n_m", "--exclude", "features.3", "--out", str(out)]
    assert cli.main([*arguments, "--html", str(page)]) == 0
    masks = {name: mask for name, mask in Masks.load(out).items() if mask.dim() > 1}
    assert "features.3.weight: kept as it was: excluded" in capsys.readouterr().out
    dense = {name for name, mask in masks.items() if mask.all()}
    assert dense == {"features.0.weight", "features.3.weight"}
    assert {recognize(masks[name]) for name in masks.keys() - dense} == {(2, 4)}
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "n_m", "--pattern", "24"], "--pattern: expected N:M; got '24'"),
        (["--method", "n_m", "--pattern", "2:x"], "--pattern: expected a whole number from 2 on; got 'x'"),
        (["--method", "n_m", "--pattern", "4:2"], "pattern 4:2: expected"),
        (["--method", "refill", "--pattern", "2:4"], "--pattern: expected it with n_m; got it with refill"),
        (["--method", "n_m", "--group-rows", "4"], "--group-rows: expected it with"),
    ],
)
def test_the_command_refuses_what_does_not_fit(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks.safetensors"
    assert cli.main(["coarsen", "torchvision:squeezenet1_1", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
