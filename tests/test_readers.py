"""Files of other tools: what is in them comes out, and nothing in them runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import fxsparse
from fxsparse import InputError, MaskError, Masks
from fxsparse.cli.named import set_weights
from fxsparse.formats.n_m import recognize
from tests.test_n_m import n_m_mask


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 2))


def pruned() -> nn.Sequential:
    model = net()
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[3], "weight", 0.25, n=2, dim=0)
    prune.random_unstructured(model[3], "bias", 0.5)
    return model


def loads(checkpoint: fxsparse.Checkpoint, like: nn.Module) -> None:
    """The weights belong to the plain model, and compute what the pruned one does."""
    plain, x = net(), torch.randn(2, 4, 4, 4)
    assert checkpoint.weights is not None
    plain.load_state_dict(dict(checkpoint.weights))
    with torch.no_grad():
        assert torch.equal(plain(x), like(x))
    checkpoint.masks.check(plain)


# ------------------------------------------------------------ masks, prune, zeros, NNI


@pytest.mark.parametrize("name", ["masks.safetensors", "masks.pt"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
def test_masks_by_parameter_name(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    masks = {"0.weight": torch.rand(8, 4, 3, 3) < 0.5, "3.weight": torch.ones(16, 32) > 0}
    write = save_file if name.endswith("safetensors") else torch.save
    write({n: m.to(dtype) for n, m in masks.items()}, tmp_path / name)
    found = fxsparse.read(tmp_path / name)
    assert (found.source, found.weights) == ("masks", None)
    assert found.masks == Masks(masks)


@pytest.mark.parametrize("name", ["state.safetensors", "state.pt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_state_dict_under_torch_prune(tmp_path: Path, name: str, wrapper: str | None) -> None:
    model = pruned()
    state = {k: v.detach() for k, v in model.state_dict().items()}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / name)
    found = fxsparse.read(tmp_path / name)
    assert found.source == "torch.nn.utils.prune"
    assert sorted(found.masks) == ["0.weight", "3.bias", "3.weight"]
    assert torch.equal(found.masks["3.bias"], model[3].bias_mask.bool())
    loads(found, model)
    # the names fit the pruned model as well
    assert found.masks.check(model) == Masks.from_prune(model)


def test_a_dense_checkpoint_with_zeros(tmp_path: Path) -> None:
    model = pruned()
    for layer, parameter in ((model[0], "weight"), (model[3], "weight"), (model[3], "bias")):
        prune.remove(layer, parameter)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    found = fxsparse.read(tmp_path / "dense.pt")
    assert found.source == "zeros of a checkpoint"
    assert found.masks == Masks({n: m for n, m in Masks.from_zeros(model).items() if n != "3.bias"})
    loads(found, model)


def test_statistics_and_counters_are_no_masks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[0].weight[1] = 0
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert list(fxsparse.read(tmp_path / "m.pt").masks) == ["0.weight"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_zeros_of_a_buffer_are_no_mask_and_a_mask_that_is_given_for_one_is_refused(tmp_path: Path, prefix: str) -> None:
    model = net().eval()
    model.register_buffer("table", torch.eye(3))
    with torch.no_grad():
        model[3].weight[:4] = 0
    torch.save({prefix + name: t for name, t in model.state_dict().items()}, path := tmp_path / "table.pt")
    found = fxsparse.read(path).masks
    assert set(found) == {prefix + "3.weight", prefix + "table"}
    assert set(found.check(model)) == {"3.weight"}
    x = torch.randn(2, 4, 4, 4)
    fast = fxsparse.compile(model, str(path), "eager", example_inputs=x, measure=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(MaskError, match="mask for 'table'"):
        fxsparse.compile(model, {"table": torch.eye(3)})
    with pytest.raises(MaskError, match=r"mask for .*table'"):
        found.check(net())


def test_masks_of_nni(tmp_path: Path) -> None:
    weight, bias = torch.rand(8, 4, 3, 3) < 0.5, torch.rand(16) < 0.5
    masks = {"0": {"weight": weight.float(), "bias": None},
             "3": {"weight": torch.ones(16, 32), "bias": bias.float(), "_output_0": torch.ones(16)}}  # fmt: skip
    torch.save(masks, tmp_path / "mask.pth")
    found = fxsparse.read(tmp_path / "mask.pth")
    assert (found.source, found.weights) == ("NNI masks", None)
    assert found.masks == Masks({"0.weight": weight, "3.weight": torch.ones(16, 32), "3.bias": bias})
    found.masks.check(net())


# ------------------------------------------------------------ compressed-tensors


def compressed(name: str, weight: Tensor, mask: Tensor, two_four: bool) -> dict[str, Tensor]:
    """As the format's text has it, bit by bit."""
    rows, columns = weight.shape
    bits = np.zeros((rows, -(-columns // 8)), np.uint8)
    for row, column in mask.nonzero().tolist():
        bits[row, column // 8] |= 1 << column % 8
    values = torch.stack([weight[r, c] for r, c in mask.nonzero().tolist()]) if mask.any() else weight.new_zeros(0)
    counts = mask.sum(1)
    shape = torch.tensor([rows, columns])
    if two_four:
        parts = {"compressed": values.view(rows, -1), "shape": shape.view(-1, 1)}
    else:
        parts = {"compressed": values, "shape": shape, "row_offsets": counts.cumsum(0) - counts}
    parts["bitmask"] = torch.from_numpy(bits)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 21), st.floats(0, 1), st.integers(0, 99))
def test_any_bitmask_is_read_exactly(tmp_path_factory: Any, rows: int, columns: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, mask = torch.randn(rows, columns, generator=g), torch.rand(rows, columns, generator=g) < density
    path = tmp_path_factory.mktemp("m") / "model.safetensors"
    save_file(compressed("fc", weight, mask, two_four=False), path)
    found = fxsparse.read(path)
    assert found.source == "compressed-tensors"
    assert torch.equal(found.masks["fc.weight"], mask)
    assert found.weights is not None
    assert torch.equal(found.weights["fc.weight"], weight * mask)


@pytest.mark.parametrize("name", ["layers.0.fc", "layers.0.fc.weight"])  # compressed-tensors, SparseML
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_two_four_checkpoint(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    mask = n_m_mask((16, 32), 2, 4, seed=3)
    weight, bias = torch.randn(16, 32).to(dtype), torch.randn(16)
    parts = {**compressed(name, weight.view(torch.uint8) if dtype.itemsize == 1 else weight, mask, two_four=True),
             "layers.0.fc.bias": bias}  # fmt: skip
    parts[f"{name}.compressed"] = parts[f"{name}.compressed"].view(dtype)
    save_file(parts, tmp_path / "model.safetensors")
    found = fxsparse.read(tmp_path / "model.safetensors")
    assert found.masks == Masks({"layers.0.fc.weight": mask})
    assert recognize(found.masks["layers.0.fc.weight"]) == (2, 4)
    assert found.weights is not None
    assert found.weights.keys() == {"layers.0.fc.weight", "layers.0.fc.bias"}
    read = found.weights["layers.0.fc.weight"]
    assert read.dtype == dtype
    assert torch.equal(read.float(), weight.float() * mask)


def test_a_folder_of_several_files_is_one_checkpoint(tmp_path: Path) -> None:
    weight, mask = torch.randn(8, 16), n_m_mask((8, 16), 2, 4, seed=0)
    parts = compressed("a", weight, mask, two_four=True)
    save_file({"a.bitmask": parts.pop("a.bitmask")}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({**parts, "b.weight": torch.randn(2, 2)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = fxsparse.read(tmp_path)
    assert torch.equal(found.masks["a.weight"], mask)
    assert found.weights is not None
    assert found.weights.keys() == {"a.weight", "b.weight"}


# ------------------------------------------------------------ refused


class Marks:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_whole_model_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pth")
    with pytest.raises(
        MaskError, match=r"a pickle of torch\.nn.modules.container.Sequential, which could run code"
    ) as e:
        fxsparse.read(tmp_path / "model.pth")
    assert "One of Torch-Pruning has no masks" in e.value.do


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "pruned.pt").touch()
    with pytest.raises(MaskError, match=r"got no such file") as e:
        fxsparse.read(tmp_path / "prunde.pt")
    assert e.value.do == "Did you mean 'pruned.pt'?"


@pytest.mark.parametrize("inside", [lambda masks: masks, lambda masks: {"epoch": 3, "masks": masks}])
def test_pickled_masks_are_to_be_saved_by_their_own_method(tmp_path: Path, inside: Callable[[Masks], object]) -> None:
    torch.save(inside(Masks({"w": torch.eye(3)})), tmp_path / "masks.pt")
    with pytest.raises(MaskError, match=r"a pickle of fxsparse.ir.masks.Masks, which could run code") as e:
        fxsparse.read(tmp_path / "masks.pt")
    assert "masks.save(path)" in e.value.do


@pytest.mark.parametrize("content", [b"junk", b"hello, world", b"{}", bytes(range(256)), b"\x10" + b"\0" * 7 + b"{"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(MaskError, match="got no checkpoint, or a damaged one"):
        fxsparse.read(tmp_path / "junk.pt")


@pytest.mark.parametrize("name", ["masks.pt", "masks", "masks.bin"])
def test_safetensors_are_known_by_what_they_hold(tmp_path: Path, name: str) -> None:
    masks = Masks({"w": torch.eye(3)})
    masks.save(tmp_path / name)
    assert fxsparse.read(tmp_path / name).masks == masks
    assert Masks.load(tmp_path / name) == masks


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_in_a_file_is_not_run(tmp_path: Path, how: str) -> None:
    path, ran = tmp_path / "masks.pt", tmp_path / "ran"
    content = {"w": Marks(ran)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(MaskError, match="could run code"):
        fxsparse.read(path)
    assert not ran.exists()


REFUSED: dict[str, tuple[object, str]] = {
    "channels cut out": ({"conv.weight": torch.ones(3, 3) / 2}, "a weight with a zero; got 1 tensors, none with zeros"),
    "a list": ([torch.ones(3)], "expected tensors by name; got a list without names"),
    "nothing": ({}, "expected tensors by name; got a dict without names"),
    "numbers": ({"lr": 0.1, "epoch": 3}, "a dict with 'lr', 'epoch'"),
    "two state dicts": ({"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}, "e": 1}, "a dict with"),
    "torch-pruning": ({"full_state_dict": {"": 1}, "attributions": {}}, "Torch-Pruning leaves no masks"),
    "half of a prune state": (
        {"a.weight_orig": torch.ones(2), "a.weight_mask": torch.ones(2), "b.weight_orig": torch.ones(2)},
        "'b.weight_orig': expected its mask 'b.weight_mask', of the same shape; got none",
    ),
    "a mask of another shape": (
        {"a.weight_orig": torch.ones(2), "a.weight_mask": torch.ones(3)}, r"got shapes \(2,\) and \(3,\)",
    ),
    "a mask that is no mask": (
        {"a.weight_orig": torch.ones(2), "a.weight_mask": torch.tensor([0.5, 1])}, "expected only 0 and 1",
    ),
    "an activation of NNI": (
        {"conv": {"weight": torch.ones(2), "_output_0": torch.zeros(2)}}, "got one of its activations, '_output_0'",
    ),
    "marlin": ({"fc.weight_packed": torch.ones(2).int(), "fc.meta": torch.ones(1)}, "quantized weights packed"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_holds_no_masks_is_refused(tmp_path: Path, what: str) -> None:
    content, message = REFUSED[what]
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(MaskError, match=message):
        fxsparse.read(tmp_path / "file.pt")


DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no shape": lambda p: p.pop("fc.shape"),
    "no values": lambda p: p.pop("fc.compressed"),
    "a value too few": lambda p: p.update({"fc.compressed": p["fc.compressed"][:-1]}),
    "a bit too many": lambda p: p["fc.bitmask"].fill_(255),
    "bits of another type": lambda p: p.update({"fc.bitmask": p["fc.bitmask"].int()}),
    "another shape": lambda p: p["fc.shape"].copy_(torch.tensor([8, 16])),
    "a huge shape": lambda p: p["fc.shape"].copy_(torch.tensor([2**40, 2**40])),
    "a negative shape": lambda p: p["fc.shape"].neg_(),
    "offsets of another weight": lambda p: p["fc.row_offsets"].add_(1),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_compressed_weight_is_refused(tmp_path: Path, what: str) -> None:
    parts = compressed("fc", torch.randn(8, 24), torch.rand(8, 24) < 0.5, two_four=False)
    DAMAGE[what](parts)
    save_file(parts, tmp_path / "m.safetensors")
    with pytest.raises(MaskError, match="'fc': expected values, bitmask and shape that fit each other; got "):
        fxsparse.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(MaskError, match="got no such file"):
        fxsparse.read(path)
    (save_file if name.endswith("safetensors") else torch.save)({"w": torch.ones(50, 50)}, path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(MaskError, match="expected a readable"):
            fxsparse.read(path)


def test_a_folder_must_hold_each_tensor_once(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"a folder with .safetensors files; got none in it"):
        fxsparse.read(tmp_path)
    for name in "ab":
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MaskError, match="got 'w' in two of them"):
        fxsparse.read(tmp_path)


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(MaskError, match="expected a readable"):
        fxsparse.read(tmp_path / "m.pt")


# ------------------------------------------------------------ used


def test_compile_takes_any_of_these_files(tmp_path: Path) -> None:
    model = pruned()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    plain, x = net(), torch.randn(1, 4, 4, 4)
    plain.load_state_dict(dict(fxsparse.read(tmp_path / "state.pt").weights or {}))
    fast = fxsparse.compile(plain, tmp_path / "state.pt", target="eager", example_inputs=x, measure=False)
    assert {row.name: row.rows_removed for row in fast.report.rows}["3.weight"] == 4
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    torch.save(pruned().state_dict(), tmp_path / "state.pt")
    found = fxsparse.read(tmp_path / "state.pt")
    assert repr(found).startswith("Checkpoint(torch.nn.utils.prune, Masks(3 parameters, sparsity 0.")
    assert repr(found).endswith(", 6 tensors)")


WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
ODD: dict[str, Any] = {
    "a dtype without masked_fill": {"a.weight_orig": WEIGHT.to(torch.float8_e4m3fn), "a.weight_mask": WEIGHT > 0},
    "sparse": {"a.weight": WEIGHT.relu().to_sparse()},
    "CSR": {"a.weight": WEIGHT.relu().to_sparse_csr()},
    "no data": {"a.weight": WEIGHT.to("meta")},
    "a number for a name": {"a": {0: WEIGHT > 0}},
    "a size that is no number": {"a.compressed": WEIGHT[:, :8], "a.bitmask": (WEIGHT[:, :2] > 0).byte(),
                                 "a.shape": torch.tensor([float("nan"), 16.0])},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch's, about sparse tensors
@pytest.mark.parametrize("what", ODD)
def test_tensors_that_torch_cannot_look_into_are_refused_in_four_parts(tmp_path: Path, what: str) -> None:
    torch.save(ODD[what], tmp_path / "odd.pt")
    with pytest.raises(fxsparse.MaskError, match="expected"):
        fxsparse.read(tmp_path / "odd.pt")


class Tied(nn.Module):
    """A table that is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).relu())  # type: ignore[no-any-return]


def test_a_tied_parameter_pruned_under_one_name_is_refused_where_a_mask_would_hold_for_both(tmp_path: Path) -> None:
    model, x = Tied().eval(), torch.arange(6).view(2, 3)
    prune.ln_structured(model.head, "weight", 0.5, 2, 0)
    with torch.no_grad():
        expected = model(x)
    options: Any = {"example_inputs": x, "measure": False}
    torch.testing.assert_close(fxsparse.compile(model, None, "eager", **options)(x), expected)
    mask = {"head.weight": model.head.weight_mask}
    with pytest.raises(MaskError, match=r"'table.weight', the same parameter, reads unmasked"):
        fxsparse.compile(model, mask, "eager", **options)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(MaskError, match=r"'table.weight', the same values unpruned: a tied parameter"):
        fxsparse.read(tmp_path / "m.pt")


def test_zeros_that_are_alike_are_not_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    prune.l1_unstructured(model[0], "weight", 2)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert list(fxsparse.read(tmp_path / "m.pt").masks) == ["0.weight"]


def test_a_spectral_norm_beside_pruning_is_no_mask(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 4))
    prune.l1_unstructured(model[1], "weight", 2)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    found = fxsparse.read(tmp_path / "m.pt")
    assert list(found.masks) == ["1.weight"]
    assert found.weights is not None
    assert {"0.weight_orig", "0.weight_u", "0.weight_v"} <= set(found.weights)


def test_a_file_names_a_tied_parameter_once_or_twice_with_one_value() -> None:
    model, table = Tied(), torch.randn(6, 4)
    for names in (("table.weight",), ("head.weight",), ("table.weight", "head.weight")):
        set_weights(model, {name: table + len(name) - 10 if len(names) == 1 else table for name in names}, "a file")
        assert torch.equal(model.head.weight, table + len(names[0]) - 10 if len(names) == 1 else table)
    with pytest.raises(InputError, match=r"one value for 'table.weight' and 'head.weight'.*got two"):
        set_weights(model, {"table.weight": table, "head.weight": table + 1}, "a file")
