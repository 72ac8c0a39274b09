"""The command line: what it passes on, what it prints, and what it says to input that does not fit."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import fxsparse
import fxsparse.coarsen
from fxsparse import cli
from fxsparse.cli import named
from fxsparse.errors import TargetError, VerificationError
from fxsparse.progress import progress
from fxsparse.report import Report, Timing

REPORT = Report(
    target="inductor",
    decisions=(),
    rows=(),
    params_before=10,
    params_after=5,
    macs_before=100,
    macs_after=50,
    timings=(Timing("inductor", 2.0, 1.9, 2.1, 30), Timing("sparse", 1.0, 0.9, 1.1, 30)),
    dense_ms=2.0,
    sparse_ms=1.0,
    environment={"torch": "2.15"},
)
NETS = """
from torch import nn

def tiny(): return nn.Linear(4, 2, bias=False)
def wide(width): return nn.Linear(width, width)
def number(): return 7
def broken(): raise ValueError("no weights here.")
MADE = nn.Linear(4, 2, bias=False)
SIZES = [1, 2]
def two(): return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
def pruned():
    from torch.nn.utils import prune
    return prune.l1_unstructured(tiny(), "weight", 0.5)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a module of small models, `nets_here`."""
    (tmp_path / "nets_here.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_here", raising=False)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command line hands to `plan` and `compile`, which do nothing here but log a step."""
    seen: list[dict[str, Any]] = []

    def plan(model: nn.Module, masks: Any, inputs: Any, **options: Any) -> Report:
        logging.getLogger("fxsparse").info("analyze")
        seen.append({"model": model, "masks": masks, "inputs": inputs, **options})
        return REPORT

    def compile(model: nn.Module, masks: Any, target: str, *, example_inputs: Any, **options: Any) -> SimpleNamespace:
        plan(model, masks, example_inputs, target=target, **options)
        return SimpleNamespace(report=REPORT)

    monkeypatch.setattr(fxsparse, "plan", plan)
    monkeypatch.setattr(fxsparse, "compile", compile)
    return seen


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line on what it must refuse: status 2, nothing on stdout, four parts on stderr."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        first, second = err.rstrip("\n").split("\n")
        assert out == ""
        assert ": expected " in first
        assert "; got " in first
        assert first.endswith(".")
        assert second.startswith("  ")
        assert second.strip()
        return err

    return run


def test_plan_hands_over_the_model_in_eval_mode_and_prints_the_report(
    nets: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "nets_here:tiny", "--input", "3,4", "--target", "eager", "--dtype", "float64"]) == 0
    (call,) = calls
    assert not call["model"].training
    assert call["model"].weight.dtype == torch.float64
    assert [(x.shape, x.dtype) for x in call["inputs"]] == [((3, 4), torch.float64)]
    assert (call["masks"], call["target"]) == (None, "eager")
    assert capsys.readouterr().out == f"{REPORT}\n"


def test_compile_hands_over_masks_weights_and_options(nets: Path, calls: list[dict[str, Any]]) -> None:
    weight = torch.arange(8.0).reshape(2, 4)
    save_file({"weight": weight}, nets / "weights.safetensors")
    torch.save({"weight": weight}, nets / "weights.pt")
    fxsparse.Masks({"weight": weight > 3}).save(nets / "masks.safetensors")
    common = ["compile", "nets_here:tiny", "--input", "1,4", "--input", "2,4", "--masks", "masks.safetensors"]
    for weights in ("weights.safetensors", "weights.pt"):
        assert cli.main([*common, "--weights", weights, "--verify", "each", "--no-measure"]) == 0
        call = calls[-1]
        assert torch.equal(call["model"].weight, weight)
        assert torch.equal(call["masks"]["weight"], weight > 3)
        assert [tuple(x.shape) for x in call["inputs"]] == [(1, 4), (2, 4)]
        assert (call["verify"], call["measure"], call["target"]) == ("each", False, "inductor")


def test_token_ids_are_whole_numbers_below_a_bound(nets: Path, calls: list[dict[str, Any]]) -> None:
    assert cli.main(["plan", "nets_here:tiny", "--input", "2,500:7", "--input", "3,4", "--dtype", "bfloat16"]) == 0
    ids, numbers = calls[0]["inputs"]
    assert (ids.dtype, numbers.dtype) == (torch.int64, torch.bfloat16)
    assert ids.shape == (2, 500)
    assert ids.unique().tolist() == list(range(7))


def test_inputs_have_names_where_the_model_is_called_by_them(nets: Path, calls: list[dict[str, Any]]) -> None:
    named = ["--input", "ids=2,500:7", "--input", "numbers = 3,4"]
    assert cli.main(["plan", "nets_here:tiny", *named]) == 0
    assert {name: (x.dtype, tuple(x.shape)) for name, x in calls[0]["inputs"].items()} == {
        "ids": (torch.int64, (2, 500)), "numbers": (torch.float32, (3, 4)),
    }  # fmt: skip


def test_a_model_has_the_same_weights_and_inputs_in_every_run(nets: Path, calls: list[dict[str, Any]]) -> None:
    for _ in range(2):
        assert cli.main(["plan", "nets_here:tiny", "--input", "3,4"]) == 0
    assert torch.equal(calls[0]["model"].weight, calls[1]["model"].weight)
    assert torch.equal(calls[0]["inputs"][0], calls[1]["inputs"][0])


def test_the_report_is_written_as_json_and_as_a_page(
    nets: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", "new/report.json", "--html", "new/report.html"]
    assert cli.main(["compile", "nets_here:tiny", "--input", "3,4", *files]) == 0
    assert json.loads((nets / "new/report.json").read_text())["params_after"] == 5
    assert "<html" in (nets / "new/report.html").read_text()
    assert capsys.readouterr().err.endswith("wrote new/report.json\nwrote new/report.html\n")


def test_bench_prints_a_json_row_for_each_build(
    nets: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "nets_here:tiny", "--input", "3,4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["build"], row["median_ms"]) for row in rows] == [("inductor", 2.0), ("sparse", 1.0)]
    assert {row["speedup"] for row in rows} == {2.0}
    assert rows[0] | {"model": "nets_here:tiny", "inputs": [[3, 4]], "dtype": "float32"} == rows[0]
    assert calls[0]["measure"] is True


class Saves(SimpleNamespace):
    """A module that says what it is asked to write."""

    def save(self, path: Path, native: bool) -> None:
        path.write_text(f"package, native {native}")

    def save_aoti(self, path: Path) -> None:
        path.write_text("library")


def test_compile_saves_a_package_and_a_library(
    nets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fxsparse, "compile", lambda *a, **k: Saves(report=REPORT))
    common = ["compile", "nets_here:tiny", "--input", "3,4"]
    assert cli.main([*common, "--out", "new/m.fxsparse", "--native", "--aoti", "new/m.pt2"]) == 0
    assert (nets / "new/m.fxsparse").read_text() == "package, native True"
    assert (nets / "new/m.pt2").read_text() == "library"
    assert capsys.readouterr().err.endswith("wrote new/m.fxsparse\nwrote new/m.pt2\n")
    assert cli.main([*common, "--out", "m.fxsparse"]) == 0
    assert (nets / "m.fxsparse").read_text() == "package, native False"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--native"], "InputError: --native: expected --out FILE with it; got no package"),
        (["--out", "."], "output file '.': expected a file; got a folder.\n  fast.fxsparse, say."),
        (["--aoti", "m.so"], "InputError: --aoti: expected a name that ends in .pt2"),
        (["--out", "nets_here.py/m"], "output file 'nets_here.py/m': expected a path in a folder"),
    ],
)
def test_compile_refuses_files_before_the_work(
    nets: Path, refused: Callable[..., str], options: list[str], sentence: str
) -> None:
    assert sentence in refused("compile", "nets_here:tiny", "--input", "3,4", *options)


def test_bench_times_a_package(nets: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    inputs = (torch.randn(3, 4),)
    fxsparse.compile(nn.Linear(4, 2).eval(), target="eager", example_inputs=inputs, measure=False).save(nets / "m")
    assert cli.main(["bench", "m"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["inputs"] == "(3, 4) float32"
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert "PackageError: package 'nets_here.py'" in refused("bench", "nets_here.py")


def test_threads_are_set(nets: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert cli.main(["plan", "nets_here:tiny", "--input", "3,4", "--threads", "3"]) == 0
    assert set_to == [3]


def test_demo_needs_a_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("rich")
    (tmp_path / "file").touch()
    assert "expected a path in a folder" in refused("demo", "--quick", "--out", str(tmp_path / "file"))


def test_demo_is_run_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Any, ...]] = []
    demo = SimpleNamespace(run=lambda *arguments: ran.append(arguments))
    monkeypatch.setitem(sys.modules, "fxsparse.demo", demo)
    monkeypatch.setattr(fxsparse, "demo", demo, raising=False)
    assert cli.main(["demo", "--out", "here", "--seed", "3", "--quick"]) == 0
    assert ran == [("here", 3, True)]


def test_a_module_made_already_is_a_model_too(nets: Path, calls: list[dict[str, Any]]) -> None:
    assert cli.main(["plan", "nets_here:MADE", "--input", "3,4"]) == 0
    assert isinstance(calls[0]["model"], nn.Linear)


def test_the_models_of_the_checkout_are_found_from_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert isinstance(named.load_model("models:vgg16_cifar"), nn.Module)


def test_models_of_torchvision_are_built_without_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads"))
    for name in ("squeezenet1_1", "lraspp_mobilenet_v3_large"):
        assert not named.load_model(f"torchvision:{name}").training


def test_unknown_model_of_torchvision_names_its_neighbors(refused: Callable[..., str]) -> None:
    pytest.importorskip("torchvision")
    err = refused("plan", "torchvision:resnet19", "--input", "1,3,8,8")
    assert "model 'torchvision:resnet19': expected one of torchvision's" in err
    assert "Did you mean 'resnet1" in err


def test_without_torchvision_the_error_says_what_to_install(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install 'fxsparse[demo]'" in refused("plan", "torchvision:resnet18", "--input", "1,3,8,8")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("resnet18", "got a name without a source.\n  For a model of torchvision: torchvision:resnet18"),
        ("torchvision:", "got a name with an empty part"),
        ("nets_gone:tiny", "expected a module nets_gone, installed or below the current directory; got no such module"),
        ("nets_here.py:tiny", "Leave out .py: nets_here\n"),
        ("nets_here:tyni", "got no such name.\n  Did you mean 'tiny'?"),
        ("nets_here:SIZES", "expected a model, or a callable that makes one, in nets_here; got a list"),
        ("nets_here:wide", "expected a callable that needs no arguments; got one that needs width"),
        ("nets_here:number", "expected a torch.nn.Module; got a callable that returned a int"),
        ("nets_here:broken", "got ValueError: no weights here (nets_here.py:7).\n"),
        ("nets_lacking:tiny", "got one that imports gone_too, which is not installed"),
        ("nets_typo:tiny", "expected a module nets_typo that can be imported; got SyntaxError"),
    ],
)
def test_what_is_not_a_model_is_refused(nets: Path, refused: Callable[..., str], model: str, sentence: str) -> None:
    (nets / "nets_lacking.py").write_text("import gone_too.deeply\n")
    (nets / "nets_typo.py").write_text("def tiny(:\n")
    err = refused("plan", model, "--input", "3,4")
    assert err.startswith(f"InputError: model {model!r}: expected ")
    assert sentence in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--input", "3,x"], "InputError: --input 3,x: expected positive whole numbers with commas between; got 'x'"),
        (["--input", "3,0"], "got '0' for one of them.\n  For one picture: --input 1,3,224,224"),
        (["--input", ""], "got '' for one of them"),
        (["--input", "1,8:"], "got '' for one of them"),
        (["--input", "1,8:-5"], "got '-5' for one of them.\n  For one picture"),
        (
            ["--input", "x=1,8", "--input", "3,4"],
            "--input: expected a name for every input, each another, or none at all",
        ),
        (["--input", "x=1,8", "--input", "x=3,4"], "got 1 different names for 2 inputs.\n"),
        (["--input", "=1,8"], "--input =1,8: expected a name of the model's parameter before =; got ''.\n"),
        (["--input", "a b=1,8"], "got 'a b'.\n"),
        (["--input", "x=y=1,8"], "got 'y=1' for one of them"),
        (["--input", "1,8:50,7"], "got '50,7' for one of them"),
        (["--input", f"1,8:{2**70}"], "--input: expected shapes that fit into memory and ids into int64; got "),
        ([], "InputError: --input: expected the shape of each input of the model; got none.\n"),
        (["--input", "3,4", "--dtype", "int8"], "--dtype: expected float32, float64, bfloat16, float16; got 'int8'.\n"),
        (["--input", "3,4", "--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        (["--input", "3,4", "--threads", "0"], "--threads: expected a whole number from 1 on; got '0'.\n"),
        (["--input", "3,4", "--masks", "gone.safetensors"], "MaskError: masks file 'gone.safetensors': expected "),
        (["--input", "3,4", "--weights", "gone.pt"], "weights file 'gone.pt': expected a readable state dict"),
        (["--input", "3,4", "--html", "nets_here.py/x"], "output file 'nets_here.py/x': expected a path in a folder"),
        (["--input", "3,4", "--json", "."], "output file '.': expected a file; got a folder.\n  report.json, say."),
        (["--input", "3,4", "--html", "/tmp"], "expected a file; got a folder.\n  /tmp/report.html, say."),
        (["--input", "3,4", "--target", "cuda"], "A GPU is no target: it is chosen by model.cuda(), in Python.\n"),
        (["--input", "3,4", "--target", "GPU"], "A GPU is no target"),
        (["--input", "3,4", "--json", "/proc/x"], "output file '/proc/x': expected a path in a folder"),
        (["--input", "99999999999,99999999"], "--input: expected shapes that fit into memory and ids"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    nets: Path, refused: Callable[..., str], options: list[str], sentence: str
) -> None:
    assert sentence in refused("plan", "nets_here:tiny", *options)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            {"wieght": torch.ones(2, 4)},
            "got 1 of them missing and 1 unknown ones; the first is 'wieght'.\n  Did you mean",
        ),
        ({"weight": torch.ones(4, 2)}, "'weight': expected shape (2, 4); got (4, 2)"),
        ({"epoch": 3, "net": {"weight": torch.ones(2, 4)}}, "Save that part alone: torch.save(checkpoint['net']"),
        ([1, 2], "expected a state dict, tensors by name; got a list"),
        (nn.Linear(4, 2), "got a pickle of torch.nn.modules.linear.Linear, which could run code"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    nets: Path, refused: Callable[..., str], state: object, sentence: str
) -> None:
    torch.save(state, nets / "weights.pt")
    assert sentence in refused("plan", "nets_here:tiny", "--input", "3,4", "--weights", "weights.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_weights_and_masks_saved_from_a_wrapped_model_fit(
    nets: Path,
    calls: list[dict[str, Any]],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    prefix: str,
) -> None:
    weight = torch.arange(8.0).reshape(2, 4)
    save_file({f"{prefix}weight": weight}, nets / "pruned.safetensors")
    assert cli.main(["plan", "nets_here:tiny", "--input", "3,4", "--masks", "pruned.safetensors"]) == 0
    assert calls[0]["model"].weight.equal(weight)
    assert calls[0]["masks"].check(calls[0]["model"])["weight"].equal(weight > 0)
    capsys.readouterr()
    save_file({f"{prefix}weight": weight, f"{prefix}bias": weight[0].clone()}, nets / "other.safetensors")
    assert "1 unknown ones; the first is 'bias'" in refused(
        "plan", "nets_here:tiny", "--input", "3,4", "--weights", "other.safetensors"
    )


@pytest.mark.parametrize("flag", ["--masks", "--weights"])
def test_safetensors_under_another_suffix_are_read(nets: Path, calls: list[dict[str, Any]], flag: str) -> None:
    save_file({"weight": torch.eye(2, 4)}, nets / "eye.pt")
    assert cli.main(["plan", "nets_here:tiny", "--input", "3,4", flag, "eye.pt"]) == 0
    found = calls[0]["masks"]["weight"] if flag == "--masks" else calls[0]["model"].weight
    assert found.equal(torch.eye(2, 4, dtype=found.dtype))


@pytest.mark.parametrize("flag", ["--masks", "--weights"])
@pytest.mark.parametrize(("name", "got"), [("gone.pt", "no such file"), ("junk.pt", "no checkpoint, or a damaged one")])
def test_a_file_that_is_none_is_said_to_be_none(
    nets: Path, refused: Callable[..., str], flag: str, name: str, got: str
) -> None:
    (nets / "junk.pt").write_bytes(b"hello")
    assert f"; got {got}.\n" in refused("plan", "nets_here:tiny", "--input", "3,4", flag, name)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off", bytes(range(256)) * 4])
def test_damaged_weights_are_refused(nets: Path, refused: Callable[..., str], name: str, content: bytes) -> None:
    (nets / name).write_bytes(content)
    assert f"weights file '{name}': expected a readable" in refused(
        "plan", "nets_here:tiny", "--input", "3,4", "--weights", name
    )


def test_the_librarys_own_errors_are_printed_without_a_traceback(
    nets: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: object, **__: object) -> Report:
        raise TargetError("target 'abacus'", expected="eager or inductor", got="'abacus'", do="Choose one of them.")

    monkeypatch.setattr(fxsparse, "plan", plan)
    assert "TargetError: target 'abacus'" in refused("plan", "nets_here:tiny", "--input", "3,4", "--target", "abacus")


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (VerificationError("output 0", expected="equal", got="0.1 apart", do="Report it."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status_tells_a_wrong_result_and_an_interruption_apart(
    nets: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int
) -> None:
    def compile(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(fxsparse, "compile", compile)
    assert cli.main(["compile", "nets_here:tiny", "--input", "3,4"]) == status


def test_progress_is_a_line_for_each_step_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fxsparse")
    before = (logger.level, list(logger.handlers))
    with progress():
        logger.info("capture")
        logger.info("lower (%s)", "inductor")
        logger.debug("not shown")
    assert [line.split(" s  ")[1] for line in capsys.readouterr().err.splitlines()] == ["capture", "lower (inductor)"]
    assert (logger.level, logger.handlers) == before


def test_progress_rests_while_measuring_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    logger = logging.getLogger("fxsparse")
    with progress():
        (handler,) = logger.handlers
        logger.info("capture [1, 3]")
        assert handler.status._live.is_started  # type: ignore[attr-defined]
        logger.warning("falling back")
        logger.info("measure")
        assert not handler.status._live.is_started  # type: ignore[attr-defined]
    err = capsys.readouterr().err
    assert "falling back" in err
    assert "measure" in err


@pytest.mark.parametrize("command", ["plan", "compile", "bench", "demo"])
def test_help_tells_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fxsparse {command}")
    assert ("--out" in out) == (command in ("compile", "demo"))


def test_version_names_torchs_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fxsparse {fxsparse.__version__}, torch {torch.__version__}\n"


def test_the_package_is_the_command_too() -> None:
    run = subprocess.run([sys.executable, "-m", "fxsparse", "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.split()[0], run.stderr) == (0, "fxsparse", "")


def test_the_smallest_model_end_to_end(
    nets: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No part replaced: plan and compile, and what the library itself refuses."""
    fxsparse.Masks({"weight": torch.tensor([[True] * 4, [False] * 4])}).save(nets / "masks.safetensors")
    model = ["nets_here:tiny", "--input", "3,4", "--masks", "masks.safetensors"]
    assert cli.main(["plan", *model]) == 0
    assert cli.main(["compile", *model, "--target", "eager", "--no-measure"]) == 0
    assert "fxsparse report, target eager" in capsys.readouterr().out
    assert "'abacus'" in refused("plan", *model, "--target", "abacus")
    assert "Did you mean 'each'?" in refused("compile", *model, "--verify", "eahc")
    wrong = fxsparse.Masks({"wieght": torch.ones(2, 4)})
    wrong.save(nets / "masks.safetensors")
    assert "Did you mean 'weight'?" in refused("compile", *model)


@pytest.mark.parametrize("method", ["refill", "refill_plus", "regroup", "shuffled_block", "partition"])
def test_coarsen_writes_new_masks_and_a_page_and_prints_what_changed(
    nets: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    weight = torch.arange(64.0).reshape(8, 8).sin()
    (nets / "nets_more.py").write_text("from torch import nn\ndef net(): return nn.Linear(8, 8, bias=False)\n")
    save_file({"weight": weight}, nets / "weights.safetensors")
    fxsparse.Masks({"weight": weight > 0.2}).save(nets / "masks.safetensors")
    files = ["--masks", "masks.safetensors", "--weights", "weights.safetensors", "--out", "new/out.safetensors"]
    assert cli.main(["coarsen", "nets_more:net", *files, "--method", method, "--html", "new/page.html"]) == 0
    masks = fxsparse.Masks.load(nets / "new/out.safetensors")
    found = getattr(fxsparse.coarsen, method)({"weight": weight}, {"weight": weight > 0.2})
    assert masks == found.masks
    out, err = capsys.readouterr()
    assert out == f"{found}\n"
    assert "coarsen weight" in err
    assert err.endswith("wrote new/out.safetensors\nwrote new/page.html\n")
    assert (nets / "new/page.html").read_text().count("data:image/png;base64,") == 3


def test_coarsen_passes_on_the_rows_of_a_group(nets: Path) -> None:
    save_file({"weight": torch.eye(2, 4)}, nets / "weights.safetensors")
    common = ["coarsen", "nets_here:tiny", "--weights", "weights.safetensors", "--out", "out.safetensors"]
    assert cli.main([*common, "--method", "partition", "--group-rows", "1"]) == 0
    assert fxsparse.Masks.load(nets / "out.safetensors")["weight"].equal(torch.eye(2, 4).bool())


def pruned_state() -> dict[str, torch.Tensor]:
    """Of `nets_here:tiny` under torch.nn.utils.prune."""
    layer = nn.Linear(4, 2, bias=False)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer.state_dict()


@pytest.mark.parametrize("flags", [["--masks", "pruned.pt"], ["--weights", "pruned.pt"], ["--weights", "run.pt"]])
def test_the_weights_of_a_checkpoint_are_those_that_are_compiled(nets: Path, flags: list[str]) -> None:
    """Random weights in their place would be compiled, verified and saved without a word."""
    state = pruned_state()
    torch.save(state, nets / "pruned.pt")
    torch.save({"epoch": 3, "state_dict": state}, nets / "run.pt")
    common = ["--input", "3,4", "--target", "eager", "--no-measure", "--out", "fast.fxsparse"]
    assert cli.main(["compile", "nets_here:tiny", *flags, *common]) == 0
    x = torch.randn(3, 4)
    weight = state["weight_orig"] * state["weight_mask"]
    torch.testing.assert_close(fxsparse.load(nets / "fast.fxsparse")(x), x @ weight.T)


def test_random_weights_are_mentioned(capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]) -> None:
    assert cli.main(["plan", "models:wrn32_2_cifar", "--input", "1,3,32,32"]) == 0
    assert "the weights of models:wrn32_2_cifar are random" in capsys.readouterr().err
    assert calls


def test_coarsen_takes_the_masks_of_the_model(nets: Path) -> None:
    common = ["coarsen", "nets_here:pruned", "--method", "partition", "--group-rows", "1", "--out", "out.safetensors"]
    assert cli.main(common) == 0
    (mask,) = fxsparse.Masks.load(nets / "out.safetensors").values()
    assert mask.sum() == 4


def test_coarsen_without_masks_is_refused(nets: Path, refused: Callable[..., str]) -> None:
    assert "expected masks, or zeros in the model's weights; got neither" in refused(
        *["coarsen", "nets_here:tiny", "--method", "partition", "--out", "none.safetensors"]
    )
    assert not (nets / "none.safetensors").exists()


def test_coarsen_refuses_what_does_not_fit(nets: Path, refused: Callable[..., str]) -> None:
    common = ["coarsen", "nets_here:tiny", "--out", "out.safetensors", "--method"]
    assert "Did you mean 'regroup'?" in refused(*common, "regrup")
    assert "--group-rows: expected it with partition, regroup, shuffled_block" in refused(
        *common, "refill", "--group-rows", "4"
    )
    assert "--group-rows: expected a whole number" in refused(*common, "partition", "--group-rows", "0")
    assert "\n  masks.safetensors, say." in refused(*common, "partition", "--out", ".")
    assert not (nets / "out.safetensors").exists()


def test_options_that_a_package_cannot_take_are_refused(nets: Path, refused: Callable[..., str]) -> None:
    model = nn.Linear(4, 2, bias=False).eval()
    fast = fxsparse.compile(model, target="eager", measure=False, example_inputs=(torch.randn(3, 4),))
    fast.save(nets / "fast.fxsparse")
    for flags in (
        ["--input", "8,4"], ["--dtype", "bfloat16"], ["--masks", "m.pt"], ["--target", "onnx"], ["--verify", "each"],
        ["--fixed-batch"], ["--formats", "dense"], ["--cache-dir", "times"],
    ):  # fmt: skip
        assert f"{flags[0]} of bench: expected none with a package" in refused("bench", "fast.fxsparse", *flags)
    assert "no such file" in refused("bench", "missing.fxsparse")


def test_bench_of_a_model_has_no_native_code(nets: Path, refused: Callable[..., str]) -> None:
    sentence = "--native of bench: expected a package with it; got the model 'nets_here:tiny'"
    assert sentence in refused("bench", "nets_here:tiny", "--input", "3,4", "--native")


def test_advice_names_the_flag(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (nets / "nets_here.py").open("a") as module:
        module.write("class Picky(nn.Module):\n    def forward(self, x): return x if x.shape[0] == 3 else -x\n")
    assert cli.main(["plan", "nets_here:Picky", "--input", "3,4"]) == 2
    assert "It can at one batch size: pass --fixed-batch." in capsys.readouterr().err


def test_inputs_that_do_not_fit_are_said_to_be_of_the_flag(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "nets_here:tiny", "--input", "3,5"]) == 2
    err = capsys.readouterr().err
    assert "InputError: --input for Linear: expected inputs the model itself accepts" in err
    assert "Pass what the model is called with: an --input for each argument" in err
    assert "example_inputs" not in err
    assert "VOCAB" not in err


def test_numbers_where_ids_are_expected_are_told_how_to_be_ids(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nets / "words.py").write_text("from torch import nn\ndef net(): return nn.Embedding(9, 4)\n")
    assert cli.main(["plan", "words:net", "--input", "1,16"]) == 2
    assert "Of ids, say how many there are: --input 1,16:VOCAB." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_folder_is_no_model(refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    given = ["--input", "3,4"] if command == "plan" else []
    assert f"model {str(tmp_path)!r}: expected torchvision:" in (err := refused(command, str(tmp_path), *given))
    assert "got a folder.\n" in err


@pytest.mark.parametrize("command", ["plan", "compile", "bench"])
def test_what_errors_advise_can_be_said_on_the_command_line(
    nets: Path, calls: list[dict[str, Any]], command: str
) -> None:
    given = [command, "nets_here:tiny", "--input", "3,4"]
    assert cli.main([*given, "--dtype", "float16"]) == 0
    build = [] if command == "plan" else ["--formats", "dense", "--cache-dir", "times"]
    assert cli.main([*given, "--fixed-batch", *build]) == 0
    plain, told = calls
    assert plain["inputs"][0].dtype == torch.float16
    assert (plain["dynamic_batch"], told["dynamic_batch"]) == (True, False)
    if build:
        assert (plain["formats"], told["formats"]) == ("auto", "dense")
        assert (plain["cache_dir"], told["cache_dir"]) == (None, "times")


def test_a_reader_that_leaves_is_no_error(nets: Path) -> None:
    command = [sys.executable, "-c", "import sys; from fxsparse import cli; sys.exit(cli.main())"]
    command += ["plan", "nets_here:tiny", "--input", "3,4", "--target", "eager"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 0


def test_coarsen_leaves_an_excluded_mask_as_it_is(nets: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.rand(16, 16, generator=generator) < 0.3 for name in ("0.weight", "2.weight")}
    fxsparse.Masks(given).save(nets / "in.safetensors")
    common = ["--masks", "in.safetensors", "--method", "partition", "--group-rows", "4", "--out", "out.safetensors"]
    assert cli.main(["coarsen", "nets_here:two", *common, "--exclude", "2"]) == 0
    found = fxsparse.Masks.load(nets / "out.safetensors")
    assert found["2.weight"].equal(given["2.weight"])
    assert not found["0.weight"].equal(given["0.weight"])


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_report_is_not_written_over_what_is_no_file(nets: Path, refused: Callable[..., str], flag: str) -> None:
    os.mkfifo(nets / "pipe")
    assert "output file 'pipe': expected a file; got something that is no file" in refused(
        "plan", "nets_here:tiny", "--input", "3,4", flag, "pipe"
    )
    assert (nets / "pipe").is_fifo()
