"""What the documents say is run: code blocks, commands, and the table that is made from the committed rows."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import fxsparse
from fxsparse import cli
from fxsparse.measure import Runs
from tools import bench, layers, tables, train
from tools.cases import HEADLINES, MATRIX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_s_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    fast = names["fast"]
    assert isinstance(fast, fxsparse.SparseModule)
    removed = {row.name: row.rows_removed for row in fast.report.rows}
    assert removed["layer1.0.conv1.weight"] >= 16
    assert "layer1.0.conv1" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["saving.md", "aotinductor.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL):
        exec(block, names)
    assert list(tmp_path.iterdir())


def test_the_readme_s_commands_exist() -> None:
    lines = re.findall(r"^fxsparse +(\w+)", README, flags=re.MULTILINE)
    assert set(lines) == {"plan", "compile", "coarsen"}
    for command in lines:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", make, flags=re.MULTILINE)


@pytest.mark.parametrize(("page", "made"), [
    ("README.md", tables.headlines), ("docs/benchmarks.md", tables.table),
])  # fmt: skip
def test_the_tables_of_models_are_the_committed_rows(page: str, made: Callable[..., str]) -> None:
    shown = (ROOT / page).read_text(encoding="utf-8").split(tables.MARKS[0])[1].split(tables.MARKS[1])[0].strip()
    assert shown == made(tables.load_rows()).strip()


def test_every_headline_is_a_row_of_some_machine_and_every_machine_has_a_short_name() -> None:
    rows = tables.load_rows()
    assert [case for case in HEADLINES if not any(case.items() <= row.items() for row in rows)] == []
    assert {row["machine"] for row in rows} == set(tables.LABELS)
    fast = {**rows[0], **HEADLINES[0], "machine": "another", "speedup": 9.0, "mac_ratio": 10.0}
    assert "**9.00** of 10.00" in tables.headlines([*rows, fast])
    assert tables.table([fast]).startswith("### another: channels")


def test_the_architecture_s_table_of_layers_is_the_committed_rows() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = text.split("<!-- layers: begin -->")[1].split("<!-- layers: end -->")[0].strip()
    assert shown == layers.table(tables.load_rows("layers")).strip()


def test_a_row_s_command_has_every_argument_that_is_not_the_default() -> None:
    flags = ["--model", "m", "--side", "64", "--seconds", "3.0", "--no-slim", "--entrance"]
    arguments = bench._parser().parse_args([*flags, "--out", "rows.jsonl"])
    assert bench.command(arguments) == " ".join(["python -m tools.bench", *flags])


def test_rows_of_another_side_are_other_cases_and_old_rows_have_the_default() -> None:
    case = dict.fromkeys(("machine", *tables.CASE), 0)
    old = {key: value for key, value in case.items() if key != "side"}
    assert tables.newest([old, case, {**case, "side": 64}]) == [case, {**case, "side": 64}]


def test_the_matrix_names_every_case_that_is_slower_than_dense() -> None:
    rows = tables.load_rows("matrix")
    slower = [r for r in rows if r["speedup"] < 0.98]
    assert slower
    shown = tables.matrix(rows)
    assert f"{len(rows)} cases, {len(slower)} below 0.98 times the best dense build" in shown
    assert all(f"{r['model']} {r['recipe']} {r['sparsity']}: {r['speedup']}" in shown for r in slower)


def test_a_suite_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, started = tmp_path / "rows.jsonl", []
    others: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"target": "auto"}]
    had = [
        {**case, "dtype": "float32", "target": "inductor", **other} for case, other in zip(MATRIX, others, strict=False)
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in had))

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", start)
    assert bench.main(["--suite", "matrix", "--out", str(out)]) == 0
    assert all(command[-1] == "--no-slim" for command in started)
    pairs = [zip(command[3:-1:2], command[4:-1:2], strict=True) for command in started]
    cases = [{name.removeprefix("--"): value for name, value in found} for found in pairs]
    sparsities = [(c["model"], c["recipe"], float(c["sparsity"])) for c in cases]
    assert sparsities == [(c["model"], c["recipe"], c["sparsity"]) for c in MATRIX[1:]]


def test_every_row_says_where_it_comes_from() -> None:
    rows = tables.load_rows()
    assert rows
    for row in rows:
        for key in ("machine", "versions", "commit", "date", "command", "best_dense", "builds_ms", "rounds"):
            assert row[key], (row["command"], key)
        assert row["best_dense"].startswith("dense")
        low, _, high = row["builds_ms"][row["best_dense"]]
        assert low <= row["dense_ms"] <= high
        onnx = row["dtype"] == "float32" and "NVIDIA" not in row["machine"]  # its CPU kernels have no bfloat16
        rivals = 4 + onnx
        rivals += 2 * any("inductor_cpp" in name for name in row["builds_ms"])  # a rival since 2026-11-25
        assert len([name for name in row["builds_ms"] if name.startswith("dense")]) == rivals


def test_the_table_of_training_methods_is_the_committed_rows() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = text.split("<!-- train: begin -->")[1].split("<!-- train: end -->")[0].strip()
    rows = tables.load_rows("train")
    assert shown == train.table(rows).strip()
    assert {row["method"] for row in rows} == set(train.METHODS)
    assert all(row["commit"] and row["command"] for row in rows)


@pytest.mark.parametrize("page", ["n_m", "readers", "training"])
def test_a_page_s_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    assert isinstance(names["fast"], fxsparse.SparseModule)


def test_the_table_of_two_four_layers_is_the_committed_rows() -> None:
    text = (ROOT / "docs" / "n_m.md").read_text(encoding="utf-8")
    shown = text.split("<!-- n_m: begin -->")[1].split("<!-- n_m: end -->")[0].strip()
    assert shown == layers.n_m_table(tables.load_rows("n_m")).strip()


def test_a_row_compares_with_the_slim_model_in_the_rounds_that_timed_both() -> None:
    """A near tie is timed longer, without the rest: rounds of another minute are no comparison."""
    common = Runs({"dense: a": [2.0] * 3, "fxsparse": [1.9] * 3, "slim: a": [1.0] * 3, "torch.compile": [3.8] * 3,
                   "torch.compile alone": [2.85] * 3})  # fmt: skip
    longer = common.and_then(Runs({"dense: a": [2.0] * 9, "fxsparse": [1.0] * 9}))
    arguments = bench._parser().parse_args(["--model", "m"])
    report = SimpleNamespace(params_before=4, params_after=2, macs_before=8, macs_after=4, chosen="sparse",
                             verification="", decisions=[])  # fmt: skip
    row = bench._row(arguments, cast(fxsparse.Report, report), longer, common, {})
    assert (row["speedup"], row["rounds"], row["eta"]) == (2.0, 12, 1.0)
    assert (row["over_slim"], row["torch_compile"], row["torch_compile_alone"]) == (1.9, 2.0, 1.5)


@pytest.mark.parametrize(("flags", "said"), [
    (["--model", "resnet19"], "no model 'resnet19' .* Did you mean 'resnet18'"),
    (["--recipe", "shuffled_block"], "no recipe 'shuffled_block'. Did you mean 'shuffled_blocks'"),
])  # fmt: skip
def test_the_benchmark_refuses_names_it_does_not_know(flags: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        bench.main(flags)
