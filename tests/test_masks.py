"""Masks: what is read as a mask, which parameter it belongs to, and files that are written whole or not at all."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.nn.utils import prune

from fxsparse import InputError, MaskError, Masks

BITS = torch.tensor([[True, False, True], [False, False, True]])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_zeros_and_ones_of_any_real_dtype_are_the_same_mask(dtype: torch.dtype) -> None:
    masks = Masks({"w": BITS.to(dtype)})
    assert masks["w"].dtype is torch.bool
    assert torch.equal(masks["w"], BITS)
    assert masks == Masks({"w": BITS})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_is_a_copy_that_later_changes_do_not_reach(dtype: torch.dtype) -> None:
    given = BITS.to(dtype, copy=True)
    masks = Masks({"w": given})
    given.zero_()
    assert torch.equal(masks["w"], BITS)


def test_masks_made_from_masks_share_no_memory() -> None:
    first = Masks({"w": BITS})
    second = Masks(first)
    second["w"].zero_()
    assert torch.equal(first["w"], BITS)


def test_a_mask_that_requires_gradients_is_read_without_them() -> None:
    assert not Masks({"w": BITS.float().requires_grad_()})["w"].requires_grad


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.tensor([1.0, float("nan")]), "torch.float32 with 1 other values, the first nan"),
        (torch.tensor([0.0, 0.5, 2.0]), "torch.float32 with 2 other values, the first 0.5"),
        (torch.tensor([0, 1, -1]), "torch.int64 with 1 other values, the first -1"),
        (torch.tensor([0, 255], dtype=torch.uint8), "the first 255"),
        (torch.tensor([1.0, float("inf")]), "the first inf"),
        (torch.tensor([1 + 0j]), "torch.complex64"),
        ([1, 0], "got list"),
        (None, "got NoneType"),
        (BITS.numpy(), "got ndarray"),
        (BITS.to("meta"), "meta device"),
        (BITS.float().to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_what_is_not_zeros_and_ones_is_refused_with_what_it_holds(mask: object, got: str) -> None:
    with pytest.raises(MaskError, match=re.escape(got)) as caught:
        Masks({"conv.weight": mask})
    assert caught.value.where == "mask for 'conv.weight'"
    assert "True = kept" in caught.value.do


@pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")
def test_tensors_of_other_kinds_are_refused() -> None:
    bits = BITS.float()
    kinds = {
        "a nested tensor": torch.nested.nested_tensor([bits[:1], bits]),
        "a MaskedTensor": masked_tensor(bits, BITS),
        "a FakeTensor": FakeTensorMode().from_tensor(BITS),
    }
    for got, mask in kinds.items():
        with pytest.raises(MaskError, match=f"expected a dense tensor; got {got}"):
            Masks({"conv.weight": mask})


def test_weights_given_for_a_mask_are_told_how_to_become_one() -> None:
    with pytest.raises(MaskError, match="use mask = weight != 0"):
        Masks({"w": torch.randn(3)})


def test_a_key_that_is_not_a_name_is_refused() -> None:
    with pytest.raises(MaskError, match=r"mask for 0: expected a parameter name; got int"):
        Masks({0: BITS})


def test_an_unknown_name_suggests_the_near_ones(model: nn.Module) -> None:
    with pytest.raises(MaskError, match=r"expected the name of one of the model's 4 parameters") as caught:
        Masks({"0.wieght": BITS}).check(model)
    assert "Did you mean '0.weight'" in caught.value.do


def test_an_unknown_name_like_no_other_shows_what_names_look_like(model: nn.Module) -> None:
    with pytest.raises(MaskError, match=r"Its names look like '0\.weight'"):
        Masks({"zzzzzzzz": BITS}).check(model)


def test_a_mask_for_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(MaskError, match=r"one of the model's 0 parameters(.|\n)*\(none\)"):
        Masks({"w": BITS}).check(nn.ReLU())


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 1), (1, 3), ()])
def test_a_wrong_shape_is_refused_even_where_it_would_broadcast(model: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(MaskError, match=re.escape(f"expected the parameter's shape (2, 3); got {shape}")) as caught:
        Masks({"0.weight": torch.ones(shape)}).check(model)
    assert "expand_as" in caught.value.do


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_tied_parameter_is_found_under_either_name(name: str) -> None:
    mask = torch.ones(5, 3)
    mask[1] = 0
    tied = Tied()
    assert list(Masks({name: mask}).check(tied)) == ["embedding.weight"]
    Masks({name: mask}).apply_(tied)
    assert tied.head.weight[1].count_nonzero() == 0
    assert tied.head.weight is tied.embedding.weight


def test_two_masks_for_one_tied_parameter_are_refused() -> None:
    mask = torch.ones(5, 3)
    with pytest.raises(MaskError, match=r"one mask per parameter; got a second one: 'head\.weight' is the same"):
        Masks({"head.weight": mask, "embedding.weight": mask}).check(Tied())


def test_the_plain_name_of_a_pruned_weight_is_understood(model: nn.Module) -> None:
    prune.identity(model[0], "weight")
    assert list(Masks({"0.weight": BITS}).check(model)) == ["0.weight_orig"]
    with pytest.raises(MaskError, match="a second one"):
        Masks({"0.weight": BITS, "0.weight_orig": BITS}).check(model)


def test_zeros_in_the_weights_are_found_and_small_numbers_are_not_zeros(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0, 0], model[0].weight[0, 1], model[1 + 1].weight[0, 0] = -0.0, 1e-30, 1e-38
        model[2].bias[1] = 0.0
    found = Masks.from_zeros(model)
    assert set(found) == {"0.weight", "2.bias"}
    assert found["0.weight"].tolist() == [[False, True, True], [True, True, True]]
    assert found["2.bias"].tolist() == [True, False, True, True]


def test_nan_is_not_a_zero(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([float("nan"), 0.0, 1.0])
    assert Masks.from_zeros(model)["0.weight"][0].tolist() == [True, False, True]


def test_masks_of_torch_prune_are_what_it_multiplies_by(model: nn.Module) -> None:
    prune.ln_structured(model[0], "weight", amount=1, n=2, dim=0)
    prune.random_unstructured(model[2], "weight", amount=3)
    prune.l1_unstructured(model[2], "weight", amount=2)  # a second time: torch combines the two
    prune.l1_unstructured(model[2], "bias", amount=1)
    masks = Masks.from_prune(model)
    assert set(masks) == {"0.weight_orig", "2.weight_orig", "2.bias_orig"}
    for name, mask in masks.items():
        index, kind = name.removesuffix("_orig").split(".")
        original = model.get_parameter(name)
        assert torch.equal(original * mask, getattr(model[int(index)], kind))
    assert masks.sparsity("2.weight_orig") == 5 / 8
    assert masks.sparsity("0.weight_orig") == 0.5


def test_a_buffer_that_only_looks_like_a_mask_is_not_one(model: nn.Module) -> None:
    model.register_buffer("attention_mask", torch.full((3,), 0.5))
    assert len(Masks.from_prune(model)) == 0


@pytest.mark.parametrize("as_text", [True, False])
def test_masks_come_back_from_a_file_as_they_were(tmp_path: Path, as_text: bool) -> None:
    masks = Masks({"a.weight": BITS, "scalar": torch.tensor(True), "turned": BITS.t(), "empty": torch.ones(0, 3)})
    path = tmp_path / "new" / "folder" / "m.safetensors"
    masks.save(str(path) if as_text else path)
    assert Masks.load(str(path) if as_text else path) == masks
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    old = Masks({"w": BITS})
    old.save(path)

    def half(tensors: object, name: str) -> None:
        Path(name).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxsparse.ir.masks.save_file", half)
    with pytest.raises(InputError, match="No space left"):
        Masks({"w": ~BITS}).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert Masks.load(path) == old


def test_whoever_reads_new_files_reads_saved_masks(tmp_path: Path) -> None:
    Masks({"w": BITS}).save(tmp_path / "m.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_an_interrupted_rename_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxsparse.ir.masks.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Masks({"w": BITS}).save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "pickle", "torch.save"])
def test_a_file_that_is_not_masks_is_refused_and_nothing_in_it_runs(tmp_path: Path, kind: str) -> None:
    path, ran = tmp_path / "m.safetensors", tmp_path / "ran"
    Masks({"w": BITS}).save(path)
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "torch.save":
        torch.save({"w": Bomb(ran)}, path)
    elif kind != "missing":
        contents = {"empty": b"", "text": b"w = 1", "cut": whole[:-3], "pickle": pickle.dumps(Bomb(ran))}
        path.write_bytes(contents[kind])
    with pytest.raises(MaskError, match=r"expected a readable \.safetensors file") as caught:
        Masks.load(path)
    assert "m.safetensors" in caught.value.where
    assert "can run code" in caught.value.do
    assert not ran.exists()


@pytest.mark.parametrize("path", ["masks.safetensors", Path("masks.pt")])
def test_a_path_is_to_be_loaded(path: Any) -> None:
    with pytest.raises(InputError, match=r"got the path 'masks\.") as caught:
        Masks(path)
    assert "Masks.load(path)" in caught.value.do
    assert "fxsparse.read(path)" in caught.value.do


def test_a_pickled_file_is_for_another_function(tmp_path: Path) -> None:
    torch.save({"w": BITS}, tmp_path / "m.pt")
    with pytest.raises(MaskError, match=r"fxsparse\.read\(path\)\.masks reads"):
        Masks.load(tmp_path / "m.pt")


def test_numpy_s_masks_are_to_be_made_tensors() -> None:
    with pytest.raises(MaskError, match=r"expected a tensor; got ndarray") as caught:
        Masks({"w": BITS.numpy()})
    assert "torch.from_numpy(mask)" in caught.value.do


def test_masks_of_another_model_are_asked_about(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    one = {"0.weight": torch.ones(7, 7), "2.weight": torch.ones_like(parameters["2.weight"])}
    with pytest.raises(MaskError) as caught:
        Masks(one).check(model)
    assert "another model" not in caught.value.do
    with pytest.raises(MaskError) as caught:
        Masks({name: torch.ones(7, 7) for name in one}).check(model)
    assert caught.value.do.endswith("So it is with 2 masks of 2: are they of another model?")


def test_a_bomb_would_have_run() -> None:
    """The test above is not empty: the same bytes, unpickled, do act."""
    here = Path("no such folder") / "file"
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Bomb(here)))


def test_a_safetensors_file_of_weights_is_not_a_file_of_masks(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([0.3, 1.0])}, tmp_path / "weights.safetensors")
    with pytest.raises(MaskError, match="mask for 'w': expected only 0 and 1"):
        Masks.load(tmp_path / "weights.safetensors")


def test_sparsity_is_the_fraction_of_zeros_of_one_and_of_all() -> None:
    masks = Masks({"a": BITS, "b": torch.zeros(4), "c": torch.ones(2)})
    assert masks.sparsity("a") == 0.5
    assert masks.sparsity("b") == 1.0
    assert masks.sparsity("c") == 0.0
    assert masks.sparsity() == pytest.approx(7 / 12)
    assert Masks().sparsity() == Masks({"e": torch.ones(0)}).sparsity() == 0.0
    assert repr(masks) == "Masks(3 parameters, sparsity 0.583)"


def test_equal_masks_are_equal_bit_by_bit_and_name_by_name() -> None:
    masks = Masks({"a": BITS})
    assert masks == Masks({"a": BITS.float()})
    assert masks != Masks({"a": ~BITS})
    assert masks != Masks({"b": BITS})
    assert masks != Masks({"a": BITS.flatten()})
    assert masks != {"a": BITS}
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_applying_masks_zeroes_exactly_the_masked_weights_in_place(model: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["0.weight"][0, 1] = float("nan")  # a masked weight is zero whatever it was
    Masks({"0.weight": BITS}).apply_(model)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert torch.equal(after["0.weight"], before["0.weight"].masked_fill(~BITS, 0))
    assert all(torch.equal(after[n], before[n]) for n in before if n != "0.weight")
    assert after["0.weight"].requires_grad


def test_masks_that_do_not_fit_change_nothing(model: nn.Module) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(MaskError):
        Masks({"0.weight": torch.zeros(2, 3), "2.weight": torch.zeros(1)}).apply_(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.ModuleDict({"model": m})])
@pytest.mark.filterwarnings("ignore")
def test_masks_fit_whichever_side_a_wrapper_named(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
    masks = Masks({"0.weight": BITS})
    wrapped = wrap(model)
    (name,) = (name for name, p in wrapped.named_parameters() if p is model[0].weight)
    assert name != "0.weight"
    assert masks.check(wrapped) == Masks({name: BITS})
    assert Masks({name: BITS}).check(model) == masks


@pytest.mark.parametrize(
    "names",
    [
        ("0.weight", "module.2.weight"),  # one of them fits as it is
        ("module.0.weight", "0.bias"),
        ("net.0.weight",),
        ("module.0.wieght",),
    ],
)
def test_other_prefixes_are_not_guessed(model: nn.Module, names: tuple[str, ...]) -> None:
    parameters = dict(model.named_parameters())
    masks = {n: parameters.get(n.removeprefix("module."), model[0].weight) != 0 for n in names}
    with pytest.raises(MaskError, match="a name the model does not have"):
        Masks(masks).check(model)
