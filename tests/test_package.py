"""save and load: the same module in another process; and files that are damaged, foreign or made to harm."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import InputError, PackageError, SparseModule, TargetError, coarsen
from fxsparse.formats import FORMATS, Format
from fxsparse.formats.shuffled_block_op import shuffled_block
from fxsparse.package import aoti, container
from fxsparse.package.graph import decode_graph, encode_graph
from tests.test_compile import Net, Wrapped, masks_of
from tests.test_storage import Of, conv

ROOT = Path(__file__).parents[1]
Content = dict[str, Any]
Edit = Callable[[Content, dict[str, Tensor]], None]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, *x: Any, masks: Any = None, target: str = "eager", **options: Any) -> SparseModule:
    return fxsparse.compile(model.eval(), masks, target, example_inputs=x, measure=False, **options)


def packed(*x: Tensor, **options: Any) -> SparseModule:
    """A module with one layer in shuffled blocks."""
    model = Of(lambda m, y: m["b"](m["a"](y).relu()).relu(), a=conv(3, 8), b=conv(8, 32))
    return compiled(model, *(x or (torch.randn(2, 3, 8, 8),)), formats="shuffled_block", **options)


def constant(m: Wrapped, x: Tensor) -> Tensor:
    return m.b.bias.expand(x.shape[0], 3) * 2


def nested(m: Wrapped, x: dict[str, Tensor], rest: list[Any]) -> Any:
    y = m.b(m.a(x["a"]).relu() + rest[0]) * rest[1]
    return {"y": y, "more": [x["a"] + 0, (y.sum(1), None)]}


class Pair(NamedTuple):
    y: Tensor
    x: Tensor


def cases() -> dict[str, tuple[SparseModule, tuple[Any, ...]]]:
    import torchvision

    x, image = torch.randn(2, 5), torch.randn(2, 3, 32, 32)
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5)
    last = torch.randn(2, 2, 8, 8).to(memory_format=torch.channels_last)
    tied = Wrapped(lambda m, x: m.a(x) @ m.a.weight)
    many = ({"a": x}, [torch.randn(2, 8), 3])
    return {
        "shrunk": (compiled(Net(), last, masks=masks_of(Net())), (last,)),
        "packed": (packed(), (torch.randn(2, 3, 8, 8),)),
        "packed bfloat16": (packed_bfloat16(), (torch.randn(2, 3, 8, 8).bfloat16(),)),
        "2:4": (two_of_four(), (torch.randn(2, 64),)),
        "constant": (compiled(Wrapped(constant), x), (x,)),
        "tied": (compiled(tied, x), (x,)),
        "nested": (compiled(Wrapped(nested), *many), many),
        "float64": (compiled(Net().double(), last.double(), masks=masks_of(Net())), (last.double(),)),
        "one batch size": (compiled(Net(), last, dynamic_batch=False), (last,)),
        "resnet18": (compiled(torchvision.models.resnet18(), image), (image,)),
        "vit": (compiled(vit, image), (image,)),
        "inductor": (packed(target="inductor"), (torch.randn(2, 3, 8, 8),)),
    }


def packed_bfloat16() -> SparseModule:
    model = Of(lambda m, y: m["b"](m["a"](y).relu()), a=conv(3, 8), b=conv(8, 32)).bfloat16()
    return compiled(model, torch.randn(2, 3, 8, 8).bfloat16(), formats="shuffled_block")


def two_of_four() -> SparseModule:
    model = nn.Linear(64, 48)
    masks = coarsen.n_m(dict(model.named_parameters()), fxsparse.Masks({"weight": torch.ones(48, 64).bool()})).masks
    return compiled(model, torch.randn(2, 64), masks=masks, formats="n_m")


def more(x: Any) -> Any:
    """Another batch size."""
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, x)


IN_A_NEW_PROCESS = """
import sys, torch, fxsparse
from torch.utils import _pytree as pytree
folder = sys.argv[1]
for name, inputs, outputs, reports in torch.load(f"{folder}/expected.pt", weights_only=False):
    module = fxsparse.load(f"{folder}/{name}.fxsparse")
    assert str(module.report) == reports[0] and module.report.to_dict() == reports[1], name
    for x, y in zip(inputs, outputs):
        got, spec = pytree.tree_flatten(module(*x))
        want, wanted_spec = pytree.tree_flatten(y)
        assert spec == wanted_spec, (name, spec)
        for a, b in zip(got, want):
            assert a is b or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)), name
assert "torchvision" not in sys.modules
print("equal")
"""


def test_a_new_process_computes_the_same_bits_and_prints_the_same_report(tmp_path: Path) -> None:
    expected = []
    for name, (module, x) in cases().items():
        module.save(tmp_path / f"{name}.fxsparse")
        inputs = [x] if name == "one batch size" else [x, more(x)]
        with torch.no_grad():
            outputs = [module(*x) for x in inputs]
        expected.append((name, inputs, outputs, (str(module.report), module.report.to_dict())))
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "equal\n", run.stderr[-2000:]


def test_weights_keep_their_strides_ties_and_names(tmp_path: Path) -> None:
    model = Wrapped(lambda m, x: m.a(x) @ m.a.weight + m.b.weight[:, :5].sum(0))
    model.a.weight = nn.Parameter(torch.randn(5, 8).t())
    module = compiled(model, torch.randn(2, 5))
    module.save(tmp_path / "m")
    before, after = module.graph_module, fxsparse.load(tmp_path / "m").graph_module
    assert after.code == before.code
    kept, read = dict(before.named_buffers()), dict(after.named_buffers())
    assert {n: (t.stride(), t.dtype) for n, t in read.items()} == {n: (t.stride(), t.dtype) for n, t in kept.items()}
    assert all(torch.equal(kept[n], read[n]) for n in kept)


def test_the_report_has_its_decisions_and_masks_again(tmp_path: Path) -> None:
    module = compiled(Net(), torch.randn(1, 2, 8, 8), masks=masks_of(Net()))
    module.save(tmp_path / "m")
    report = fxsparse.load(tmp_path / "m").report
    assert report == module.report
    assert report.decisions
    assert report.masks == module.report.masks


def test_a_loaded_module_saves_the_same_file(tmp_path: Path) -> None:
    packed().save(tmp_path / "a")
    fxsparse.load(tmp_path / "a").save(tmp_path / "b")
    contents = [container.read(tmp_path / name) for name in "ab"]
    assert json.dumps(contents[0][0]) == json.dumps(contents[1][0])
    assert contents[0][2]["members"] == contents[1][2]["members"]


def test_another_target_can_run_it(tmp_path: Path) -> None:
    module = packed(target="inductor")
    module.save(tmp_path / "m")
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(fxsparse.load(tmp_path / "m", target="eager")(x), module(x))
    with pytest.raises(TargetError, match="expected one of"):
        fxsparse.load(tmp_path / "m", target="egaer")
    with pytest.raises(TargetError, match="expected one of"):
        fxsparse.load(tmp_path / "m", target=torch.device("cuda"))  # type: ignore[arg-type]


def test_a_dense_build_that_won_is_lowered_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner may be eager and channels_last, whatever target was asked for."""
    from fxsparse.backend import TARGETS
    from fxsparse.ir.inputs import inputs_channels_last

    module = compiled(Net(), torch.randn(2, 2, 8, 8))
    build = module._built("test")
    build.target, build.prepare, build.lowered_by = TARGETS["inductor"], inputs_channels_last, TARGETS["eager"]
    module.save(tmp_path / "m")
    loaded = fxsparse.load(tmp_path / "m")._built("test")
    assert (loaded.target.name, loaded.lowered_by and loaded.lowered_by.name) == ("inductor", "eager")
    assert loaded.prepare is inputs_channels_last
    assert loaded.prepared[0].is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_written_as_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="called"):
        fxsparse.compile(Net()).save(tmp_path / "m")
    strided = Wrapped(lambda m, x: torch.as_strided(m.a(x), (2, 4), (8, 1)))
    view = compiled(strided, torch.randn(2, 5), dynamic_batch=False)
    with pytest.raises(InputError, match="aten::as_strided"):
        view.save(tmp_path / "m")
    named = compiled(Wrapped(lambda m, x: Pair(m.a(x), x + 1)), torch.randn(2, 5))
    with pytest.raises(InputError, match="inputs or outputs in a namedtuple"):
        named.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="expected a path that can be written"):
        packed().save("/proc/m")


def test_a_file_that_is_replaced_while_it_is_read_is_still_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other, opened = tmp_path / "m", tmp_path / "other", container.safe_open
    compiled(Net(), torch.randn(1, 2, 8, 8), masks=masks_of(Net())).save(path)
    compiled(Net(), torch.randn(1, 2, 8, 8)).save(other)
    first, second = (fxsparse.load(p).report.params_after for p in (path, other))

    def replaced(name: Any, *args: Any) -> Any:
        other.replace(path)
        return opened(name, *args)

    monkeypatch.setattr(container, "safe_open", replaced)
    assert fxsparse.load(path).report.params_after == first != second


def test_threads_that_save_to_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    modules = [compiled(Net(), torch.randn(1, 2, 8, 8), masks=m) for m in (None, masks_of(Net()))]
    path = tmp_path / "m"

    def save_often(module: SparseModule) -> None:
        for _ in range(20):
            module.save(path)

    threads = [threading.Thread(target=save_often, args=(m,)) for m in modules for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert fxsparse.load(path).report.params_before == modules[0].report.params_before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_processes_that_save_to_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    packed().save(tmp_path / "source")
    code = "import sys, fxsparse; m = fxsparse.load(sys.argv[1]); [m.save(sys.argv[2]) for _ in range(50)]"
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "m")]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]:
        assert process.wait() == 0
    fxsparse.load(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "source"]


# damaged and foreign files


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package; from here on no graph can be built, so that whatever gets past the hashes is seen."""
    compiled(Net(), torch.randn(1, 2, 8, 8), masks=masks_of(Net())).save(tmp_path / "m")
    monkeypatch.setattr(fx.GraphModule, "__init__", lambda *_: pytest.fail("a graph was built"))
    return tmp_path / "m"


def refused(path: Path) -> str:
    with pytest.raises(PackageError) as caught:
        fxsparse.load(path)
    text = str(caught.value)
    assert text.startswith(("package '", "graph of a package", "operator in a package", "mask in a package"))
    assert ": expected " in text
    assert "; got " in text
    assert len(text.split("\n  ")) == 2
    return text


def test_every_flipped_bit_is_found(whole: Path) -> None:
    good = whole.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(7)
    places = [(i, bit) for i in range(8) for bit in range(8)]
    places += [(rng.randrange(8, header), rng.randrange(8)) for _ in range(700)]
    places += [(rng.randrange(header, len(good)), rng.randrange(8)) for _ in range(300)] + [(header - 1, 0)]
    for i, bit in places:
        whole.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :])
        refused(whole)


def test_every_other_length_is_found(whole: Path) -> None:
    good = whole.read_bytes()
    for size in [0, 1, 7, 8, 9, *range(10, len(good), 211), len(good) - 1]:
        whole.write_bytes(good[:size])
        refused(whole)
    whole.write_bytes(good + b"\0")
    refused(whole)


class Harm:
    def __reduce__(self) -> Any:
        return open, (Harm.file, "w")

    file = ""


def a_zip(name: str, content: bytes = b"") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, content)
    return data.getvalue()


def header_of(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def saved_by_torch(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def foreign() -> dict[str, tuple[bytes, str]]:
    huge = {"w": {"dtype": "F32", "shape": [10**12, 10**6], "data_offsets": [0, 4 * 10**18]}}
    wrap = {"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}
    return {
        "random": (random.Random(1).randbytes(5000), ""),
        "zip slip": (a_zip("../../etc/harm", b"x"), "a zip archive"),
        "torch.save": (saved_by_torch([Harm()]), "a zip archive"),
        "pickle": (pickle.dumps(Harm()), "a pickle"),
        "long header": ((2**62).to_bytes(8, "little") + b"{}", ""),
        "huge tensor": (header_of(json.dumps(huge)), ""),
        "overflow": (header_of(json.dumps(wrap)), ""),
        "deep": (header_of("[" * 100000), ""),
        "not text": (header_of("{}")[:8] + b"\xff\xfe", ""),
        "empty": (header_of("{}"), "another kind"),
        "library": (b"\x7fELF" + bytes(100), "a compiled library"),
    }


@pytest.mark.parametrize("kind", list(foreign()))
def test_a_foreign_file_is_refused_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    Harm.file = str(tmp_path / "harm")
    content, sentence = foreign()[kind]
    (tmp_path / "m").write_bytes(content)
    assert sentence in refused(tmp_path / "m")
    assert not (tmp_path / "harm").exists()


def test_missing_files_folders_masks_and_other_versions_are_told_apart(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "gone")
    assert "not a regular file" in refused(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert "safetensors file of another kind" in refused(tmp_path / "w.safetensors")
    packed().save(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    assert fxsparse.load(tmp_path / "link").report.rows  # a link to a package is a package
    data = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(data.replace(b'"version":"1"', b'"version":"2"'))
    assert "expected format version 1; got '2', written by fxsparse" in refused(tmp_path / "m")


# files made to harm: the hashes are right


def edited(path: Path, edit: Edit) -> None:
    content, tensors, _ = container.read(path)
    edit(content, tensors)
    container.write(path, content, tensors, "0.1.0")


def tensor_edit(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        (key,) = (k for k in tensors if k.endswith(name))
        tensors[key] = change(tensors[key].clone())

    return edit


def first(content: Content, kind: str, operator: str = "") -> list[Any]:
    nodes = content["graph"]["nodes"]
    return next(n for n in nodes if n[0] == kind and (not operator or n[2] == operator))


def node_edit(kind: str, place: int, value: Any, operator: str = "") -> Edit:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        first(content, kind, operator)[place] = value

    return edit


def argument_edit(place: int, value: Any) -> Edit:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        first(content, "call", "fxsparse::shuffled_block")[3][place] = value

    return edit


def content_edit(key: str, value: Any, inside: str = "graph") -> Edit:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        (content[inside] if inside else content)[key] = value

    return edit


def renamed_weight(name: str) -> Edit:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        node = first(content, "weight")
        content["graph"]["weights"][name] = content["graph"]["weights"].pop(node[2])
        node[2] = name

    return edit


OUT_OF_RANGE = "a row or column outside of the weight"
HARM = "__import__('os').system('touch harm')"
TAMPERED: dict[str, tuple[Edit, str]] = {
    "columns": (tensor_edit("weight_columns", lambda t: t + 100000), OUT_OF_RANGE),
    "negative columns": (tensor_edit("weight_columns", lambda t: t - 100000), OUT_OF_RANGE),
    "rows": (tensor_edit("weight_rows", lambda t: t + 1), OUT_OF_RANGE),
    "row pointers": (tensor_edit("weight_row_ptr", lambda t: t * 2), "pointers that end elsewhere"),
    "value pointers": (tensor_edit("weight_value_ptr", lambda t: t.flip(0)), "do not ascend from 0"),
    "fewer values": (tensor_edit("weight_values", lambda t: t[:-16]), "pointers that end elsewhere"),
    "other dtype": (tensor_edit("weight_columns", lambda t: t.long()), "expected flat arrays"),
    "smaller shape": (argument_edit(9, [32, 8, 1, 1]), OUT_OF_RANGE),
    "no stride": (argument_edit(10, [0, 0]), "pairs of sizes"),
    "negative padding": (argument_edit(11, [-9, 0]), "pairs of sizes"),
    "activation": (argument_edit(13, "eval"), "expected one of none, relu"),
    "computed columns": (argument_edit(3, {"node": 0}), "expected flat arrays"),
    "operator": (node_edit("call", 2, "aten::from_file"), "'aten::from_file', which this"),
    "in-place": (node_edit("call", 2, "aten::relu_"), "aten::relu_"),
    "out variant": (node_edit("call", 2, "aten::add.out"), "aten::add.out"),
    "python": (node_edit("call", 2, "python::eval"), "python::eval"),
    "other namespace": (node_edit("call", 2, "prim::Print"), "prim::Print"),
    "class": (node_edit("call", 2, "aten::__class__"), "aten::__class__"),
    "other fxsparse": (node_edit("call", 2, "fxsparse::gone"), "fxsparse::gone"),
    "node name": (node_edit("call", 1, f"x\n{HARM}"), "the name"),
    "input name": (node_edit("input", 2, f"x={HARM}"), "the name"),
    "keyword": (node_edit("input", 2, "import"), "the name 'import'"),
    "signature": (content_edit("inputs", [f"x={HARM}"]), "the name"),
    "argument name": (node_edit("call", 4, {f"a={HARM}": 1}), "the name"),
    "weight name": (renamed_weight(f'a"), {HARM}, getattr(self, "a'), "a weight called"),
    "method": (renamed_weight("forward"), "a weight called 'forward'"),
    "dunder": (renamed_weight("__class__.x"), "a weight called '__class__.x'"),
    "later node": (node_edit("output", 1, {"tuple": [[{"node": 999}]]}), "a node that is not there"),
    "no output": (lambda c, t: c["graph"]["nodes"].pop(), "another number of inputs or outputs"),
    "module by name": (content_edit("out", {"named": ["os.system", [], []]}), "one that is not imported here"),
    "unknown kind": (content_edit("out", {"set": [[], []]}), "KeyError"),
    "torch function": (argument_edit(0, {"torch": "load"}), "KeyError"),
    "device": (node_edit("call", 3, [{"device": "nonsense"}]), "RuntimeError"),
    "no tensor": (lambda c, t: t.clear(), "KeyError"),
    "huge input": (content_edit("example", [{"shape": [2**40, 2**20], "dtype": {"torch": "float32"}, "device": "cpu",
                                             "order": [0, 1]}], ""), "RuntimeError"),
    "report": (content_edit("report", {"target": 1}, ""), "KeyError"),
    "masks": (content_edit("masks", {"a": [10**9]}, ""), "KeyError"),
    "layout": (content_edit("layout", "upside down", ""), "KeyError"),
}  # fmt: skip


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("genuine") / "m"
    packed().save(path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", list(TAMPERED))
def test_a_tampered_package_with_right_hashes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, genuine: bytes, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, sentence = TAMPERED[kind]
    (tmp_path / "m").write_bytes(genuine)
    edited(tmp_path / "m", edit)
    with pytest.raises(fxsparse.FxSparseError) as caught:
        fxsparse.load(tmp_path / "m")
    assert sentence in str(caught.value)
    assert ": expected " in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", [
    "_reshape_alias", "_sparse_coo_tensor_with_dims_and_tensors", "set.source_Storage_storage_offset", "resize",
    "_jagged_to_padded_dense_forward", "_segment_reduce_backward", "empty.memory_format", "as_strided", "slice_inverse",
    "_native_batch_norm_legit.no_stats", "native_batch_norm", "unfold_backward", "mkldnn_linear", "_fft_c2r",
])  # fmt: skip
def test_operators_that_trust_in_sizes_and_numbers_are_refused_by_name(
    tmp_path: Path, genuine: bytes, name: str
) -> None:
    base, _, overload = name.partition(".")
    assert isinstance(getattr(getattr(torch.ops.aten, base), overload or "default"), torch._ops.OpOverload)
    (tmp_path / "m").write_bytes(genuine)
    edited(tmp_path / "m", node_edit("call", 2, f"aten::{name}"))
    with pytest.raises(PackageError, match=re.escape(f"got 'aten::{name}', which this installation lacks or refuses")):
        fxsparse.load(tmp_path / "m")


def test_operators_with_an_underscore_that_models_really_have_are_saved(tmp_path: Path) -> None:
    def bits(m: Any, x: Tensor) -> Tensor:
        odd = ((x > 0) & (x < 1) | (x > 2) ^ (x > 3)).float() + ((x.int() << 1) >> 1).float()
        return m.a(odd) + F.interpolate(x[:, None], size=(4, 4), mode="bilinear", antialias=True).mean()

    def spectrum(m: Any, x: Tensor) -> Tensor:
        return m.a(torch.fft.irfft2(torch.fft.rfft2(x).conj(), (4, 5)))

    def written(m: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:, ::2], y[:, 1::2] = x[:, 1::2], 1
        return m.a(x.new_empty(x.shape).fill_(2) + y)

    x = torch.randn(2, 4, 5)
    for function in (bits, spectrum, written):
        module = compiled(Wrapped(function), x, dynamic_batch=False)
        module.save(tmp_path / "m")
        assert torch.equal(fxsparse.load(tmp_path / "m")(x), module(x)), function.__name__


def test_loading_runs_no_operator(tmp_path: Path, genuine: bytes) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    ran = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.add(str(func))
            return func(*args, **(kwargs or {}))

    (tmp_path / "m").write_bytes(genuine)
    with Watch():
        module = fxsparse.load(tmp_path / "m")
    assert not any("conv" in name or "shuffled" in name or "relu" in name for name in ran)
    assert any(node.target is shuffled_block for node in module.graph_module.graph.nodes)


def test_every_format_with_an_operator_checks_calls_that_come_from_a_file() -> None:
    for form in FORMATS.values():
        assert form.operator is not None
        assert type(form).check_call is not Format.check_call


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        float("-inf"),
        1e300,
        True,
        (1, [2, (3,)]),
        slice(None, 3),
        2j,
        torch.float16,
        torch.channels_last,
        torch.device("cpu"),
        torch.strided,
        "a\"'\n",
    ],
)
def test_arguments_of_every_kind_come_back(value: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, value)),))
    leaf = pytree.tree_structure(0)
    spec = pytree.tree_structure(((0,), {}))
    graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(["x"], spec, leaf)))
    content, tensors = encode_graph(fx.GraphModule(nn.Module(), graph))
    read = decode_graph(json.loads(json.dumps(content)), tensors)
    assert list(read.graph.nodes)[1].args[1] == value
    assert type(list(read.graph.nodes)[1].args[1]) is type(value)


# native code


def test_native_code_runs_only_when_asked_for_and_only_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = packed(target="inductor"), torch.randn(2, 3, 8, 8)
    module.save(tmp_path / "m", native=True)
    loaded: list[int] = []
    load_native = aoti.load_native
    monkeypatch.setattr("fxsparse.loading.load_native", lambda *a: loaded.append(1) or load_native(*a))
    caplog.clear()  # what compiling said, where another test has left the level at INFO
    with caplog.at_level(logging.WARNING, "fxsparse"):
        assert torch.equal(fxsparse.load(tmp_path / "m")(x), module(x))
        assert not loaded
        fast = fxsparse.load(tmp_path / "m", native=True)
        torch.testing.assert_close(fast(x), module(x))
        torch.testing.assert_close(fast(more(x)), module(more(x)))
        assert loaded == [1]
        assert not [record for record in caplog.records if record.name == "fxsparse"]
        other = {**aoti.machine(torch.device("cpu")), "processor": "sse"}
        monkeypatch.setattr("fxsparse.loading.machine", lambda device: other)
        assert torch.equal(fxsparse.load(tmp_path / "m", native=True)(x), module(x))
    assert loaded == [1]
    assert "native code is for another machine (processor): it is generated anew" in caplog.text


def test_a_package_without_native_code_says_so(
    tmp_path: Path, genuine: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m").write_bytes(genuine)
    with caplog.at_level(logging.WARNING, "fxsparse"):
        module = fxsparse.load(tmp_path / "m", native=True)
        assert "holds no native code" in caplog.text
        module.save(tmp_path / "m", native=True)
    assert "no native code is saved: the build runs on target 'eager'" in caplog.text


@pytest.mark.parametrize("formats", ["shuffled_block", "dense"])
def test_a_module_just_loaded_can_be_exported(tmp_path: Path, formats: str) -> None:
    """Before its first call a loaded graph has no shapes."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    mask = torch.zeros(32, 3, 3, 3, dtype=torch.bool)
    mask[:16, :1] = mask[16:, 1:] = True
    options: Any = {"target": "eager", "measure": False, "formats": formats}
    fast = fxsparse.compile(model.eval(), {"0.weight": mask}, example_inputs=(torch.randn(2, 3, 8, 8),), **options)
    fast.save(tmp_path / "model.fxsparse")
    file = fxsparse.export_onnx(fxsparse.load(tmp_path / "model.fxsparse"), tmp_path / "model.onnx")
    assert set(file.verified) == {1, 2, 5}
