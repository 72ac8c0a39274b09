"""What is allowed, but seldom meant, is said once; what is meant is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import fxsparse
from fxsparse import InputError, Masks

ROWS = torch.tensor([True, False] * 4)[:, None].expand(8, 5)


def net(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Linear(8, 3))


def build(model: nn.Module, masks: Any = None) -> fxsparse.SparseModule:
    """Warnings are errors in these tests: what says nothing passes."""
    return fxsparse.compile(model, masks, "eager", example_inputs=torch.ones(2, 5), measure=False)


# ------------------------------------------------------------ training mode


@pytest.mark.parametrize("middle", [nn.BatchNorm1d(8), nn.Dropout(0.1), nn.AlphaDropout(0.1)])
def test_a_model_in_training_mode_is_said_to_be_compiled_in_evaluation_mode(middle: nn.Module) -> None:
    model = net(middle).train()
    with pytest.warns(UserWarning, match=rf"in training mode \({type(middle).__name__} '1'\)") as told:
        fast = build(model)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert "model.eval()" in str(told[0].message)
    assert model.training
    x = torch.randn(4, 5)
    torch.testing.assert_close(fast(x), model.eval()(x))


def test_what_is_compiled_later_is_doubted_at_once() -> None:
    with pytest.warns(UserWarning, match=r"in training mode \(InstanceNorm1d\)"):
        fxsparse.compile(nn.InstanceNorm1d(8, track_running_stats=True), target="eager")


@pytest.mark.parametrize(
    "middle", [nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm1d(8, track_running_stats=False), nn.BatchNorm1d(8).eval()]
)
def test_a_training_mode_that_changes_nothing_is_not_mentioned(middle: nn.Module) -> None:
    build(net(nn.Sequential(middle)))


def test_nothing_is_said_of_a_model_in_evaluation_mode() -> None:
    build(net(nn.BatchNorm1d(8), nn.Dropout(0.1)).eval())


@pytest.mark.filterwarnings("ignore:.*fxsparse compiles for inference.*:UserWarning")
def test_torch_compile_says_it_in_its_own_words(recwarn: pytest.WarningsRecorder) -> None:
    torch.compile(net(nn.Dropout(0.1)), backend="fxsparse", options={"target": "eager", "measure": False})(
        torch.ones(2, 5)
    )
    assert not [w for w in recwarn if "in training mode (" in str(w.message)]


# ------------------------------------------------------------ the model's own pruning


def test_a_mask_that_keeps_what_the_models_own_pruning_zeroed_is_said_to() -> None:
    model = net()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    zeroed = int((ROWS & (model[0].weight_mask == 0)).sum())
    with pytest.warns(UserWarning, match=f"the masks keep {zeroed} weights that torch.nn.utils.prune's own") as told:
        build(model, {"0.weight": ROWS})
    assert len(told) == 1
    assert "prune.remove(module, name) first" in str(told[0].message)
    build(model)
    build(model, Masks.from_prune(model))
    build(model, {"0.weight": ROWS & model[0].weight_mask.bool()})
    prune.remove(model[0], "weight")
    build(model, {"0.weight": ROWS})


# ------------------------------------------------------------ weights of a checkpoint


def trained(save: Callable[[dict[str, torch.Tensor], Path], None], path: Path) -> dict[str, torch.Tensor]:
    """Another model's weights, with zeros in rows."""
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[0].weight.mul_(ROWS)
    save(model.state_dict(), path)
    return model.state_dict()


@pytest.mark.parametrize(("save", "name"), [(torch.save, "pruned.pt"), (save_file, "pruned.safetensors")])
def test_weights_of_a_checkpoint_that_the_model_does_not_have_are_mentioned(
    tmp_path: Path, save: Callable[..., None], name: str
) -> None:
    model, path = net(), tmp_path / name
    state = trained(save, path)
    with pytest.warns(UserWarning, match=r"masks are taken from .*its weights are not, and the model has oth") as told:
        build(model, path)
    assert len(told) == 1
    assert f"model.load_state_dict(fxsparse.read({str(path)!r}).weights)" in str(told[0].message)
    model.load_state_dict(state)
    build(model, path)


def test_weights_of_a_checkpoint_are_compared_where_its_masks_keep_them(tmp_path: Path) -> None:
    """A pruned state dict of the model itself, which is dense, pruned or in another dtype."""
    model = net()
    pruned = net()
    prune.random_unstructured(pruned[0], "weight", amount=0.5)
    torch.save({f"module.{name}": value for name, value in pruned.state_dict().items()}, tmp_path / "m.pt")
    for same in (model, pruned):
        build(same, tmp_path / "m.pt")
    fxsparse.compile(model.double(), tmp_path / "m.pt", "eager")
    with torch.no_grad():
        model[1].bias[0] += 1
    with pytest.warns(UserWarning, match="its weights are not"):
        fxsparse.compile(model, tmp_path / "m.pt", "eager")


def test_a_file_of_masks_has_no_weights_to_mention(tmp_path: Path) -> None:
    Masks({"0.weight": ROWS}).save(tmp_path / "masks.pt")
    build(net(), tmp_path / "masks.pt")


# ------------------------------------------------------------ a target in the place of masks


def test_a_target_in_the_place_of_masks_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="got 'eager', the name of a target and of no file") as caught:
        fxsparse.compile(net(), "eager")
    assert "target='eager'" in caught.value.do
    Masks({"0.weight": ROWS}).save(tmp_path / "eager")  # a file of this name is one
    build(net(), "eager")
