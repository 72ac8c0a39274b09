"""The report: its table, its JSON and its page."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.errors import InputError
from fxsparse.ir.decision import Decision
from fxsparse.ir.masks import Masks
from fxsparse.picture import picture, png
from fxsparse.report import (
    Report,
    Row,
    Timing,
    count,
    duration,
    percent,
    reasons,
    shape_change,
    stored_as,
)
from fxsparse.report_html import page
from fxsparse.report_text import _in_brief, short_names
from tests.test_storage import Of

BLUE, ORANGE = (37, 106, 210), (226, 106, 46)
DENSE = "The dense build is returned: the rewritten one was measured"


def a_row(name: str = "layer1.0.conv1.weight", **changes: Any) -> Row:
    plain = Row(
        name=name,
        op="conv2d",
        shape=(8, 4, 3, 3),
        new_shape=(8, 4, 3, 3),
        density=0.25,
        rows_removed=0,
        columns_removed=0,
        kept_for=(),
        blocked_by=None,
        params_before=288,
        params_after=288,
        macs_before=28800,
        macs_after=28800,
    )
    return dataclasses.replace(plain, **changes)


def a_shrunk_row(name: str = "layer1.0.conv1.weight", **changes: Any) -> Row:
    shrunk: dict[str, Any] = {
        "new_shape": (6, 3, 3, 3),
        "rows_removed": 2,
        "columns_removed": 1,
        "params_after": 162,
        "macs_after": 16200,
        "kept_rows": (0, 1, 2, 4, 5, 6),
        "kept_columns": (0, 1, 2),
    }
    return a_row(name, **(shrunk | changes))


def a_report(**changes: Any) -> Report:
    plain = Report(
        target="inductor",
        decisions=(),
        rows=(a_shrunk_row(),),
        params_before=288,
        params_after=162,
        macs_before=28800,
        macs_after=16200,
        timings=(
            Timing("inductor, channels_last", 12.0, 11.5, 13.0, 40),
            Timing("sparse: inductor", 8.0, 7.9, 8.5, 40),
        ),
        dense_ms=12.0,
        sparse_ms=8.0,
        speedup_low=1.4,
        speedup_high=1.6,
        verification="largest |difference| 1.2e-07, allowed 3.4e-06",
        environment={"torch": "2.15.0", "threads": "2"},
    )
    return dataclasses.replace(plain, **changes)


def refusal(where: str, why: str) -> Decision:
    return Decision("shrink_channels", where, "remove 3 of 64 rows", why, accepted=False)


# numbers in words


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (11_689_512, "11.7M"), (999_600, "1M"), (999_400, "999k"), (3e12, "3T")],
)
def test_counts_have_three_digits_and_a_unit(n: int, text: str) -> None:
    assert count(n) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.00"), (1.2345, "1.23"), (9.996, "10.0"), (99.96, "100"), (12345.6, "12346")],
)
def test_durations_are_never_written_in_powers_of_ten(value: float | None, text: str) -> None:
    assert duration(value) == text


def test_percent_is_exact_at_its_ends() -> None:
    assert [percent(a, 1000) for a in (0, 1, 450, 999, 1000)] == ["0%", "<1%", "45%", ">99%", "100%"]
    assert percent(5, 0) == ""


def test_a_shape_names_the_kernel_once_unless_it_changed() -> None:
    assert shape_change(a_row()) == "8x4x3x3"
    assert shape_change(a_shrunk_row()) == "8x4x3x3 -> 6x3"
    assert shape_change(a_row(new_shape=(8, 4, 1, 1))) == "8x4x3x3 -> 8x4x1x1"


def test_long_names_are_abbreviated_from_the_left_and_stay_different() -> None:
    names = ["features.denseblock3.denselayer24.conv2.weight", "classifier.weight"]
    assert short_names(names, 24) == ["f.d3.denselayer24.conv2", "classifier"]
    clash = ["encoder.attention.projection.weight", "embedding.attention.projection.weight"]
    assert short_names(clash, 24) == clash
    assert short_names(["a.weight", "a"], 24) == ["a.weight", "a"]


def test_siblings_are_abbreviated_alike() -> None:
    layer = "encoder.layer.{}.{}.weight"
    names = [layer.format(i, part) for i in (0, 11) for part in ("attention.self.query", "attention.self.key",
                                                                 "attention.output.dense", "output.dense")]  # fmt: skip
    assert short_names([*names, "pooler.weight"], 24) == [
        "e.l.0.a.self.query", "e.l.0.a.self.key", "e.l.0.a.output.dense", "e.l.0.output.dense",
        "e.l.11.a.self.query", "e.l.11.a.self.key", "e.l.11.a.output.dense", "e.l.11.output.dense", "pooler",
    ]  # fmt: skip
    assert short_names(["layer4.1.conv2.weight", "layer4.1.conv1.weight"], 24) == ["layer4.1.conv2", "layer4.1.conv1"]


@pytest.mark.parametrize(
    ("stored", "params", "said"),
    [("shuffled_block", 292, "one dense block"), ("unstructured", 288, "one dense block"), ("n_m", 144, "n:m"),
     ("shuffled_block", 0, "nothing"), ("shuffled_block", 287, "shuffled block")],
)  # fmt: skip
def test_a_format_that_keeps_everything_or_nothing_is_called_so(stored: str, params: int, said: str) -> None:
    row = a_row(stored=stored, params_after=params)
    assert said in str(a_report(rows=(row,)))
    assert f">{said}<" in page(a_report(rows=(row,)))
    assert stored_as(a_row()) == "dense"


# what it says


def test_speedup_is_dense_over_sparse_and_none_when_not_measured() -> None:
    assert a_report().speedup == 1.5
    assert a_report(sparse_ms=None).speedup is None
    assert a_report(dense_ms=None).speedup is None


def test_the_headline_is_the_median_that_its_spread_is_of() -> None:
    """Medians of 9.0 and 3.2 ms in a noisy hour say 2.8; within a round it was 1.9."""
    report = a_report(dense_ms=9.0, sparse_ms=3.2, speedup_low=1.2, speedup_median=1.9, speedup_high=2.9)
    assert report.speedup == 1.9
    assert "1.90 times the speed of the best dense build (1.20 to 2.90 in pairs)" in report.verdict
    assert "9.00 ms -> 3.20 ms, medians; the speedup is the median over rounds" in str(report)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def warning_of(model: nn.Module, masks: dict[str, torch.Tensor]) -> str:
    return fxsparse.plan(model.eval(), masks, torch.randn(2, 4)).warning


def test_a_network_without_a_way_through_says_so_first() -> None:
    def none(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.bool)

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    sentence = "The output does not depend on the input: {}. In a mask, True means kept."
    report = fxsparse.plan(net().eval(), {"2.weight": none(6, 6)}, torch.randn(2, 4))
    assert report.warning == sentence.format("2.weight keeps nothing")
    assert str(report).split("\n")[1] == report.warning
    assert f'<p class="verdict warn">{report.warning}</p>' in page(report)
    both = warning_of(net(), {"0.weight": none(6, 4), "2.weight": none(6, 6)})
    assert both == sentence.format("0.weight, 2.weight keep nothing")
    upper, lower = none(6, 4), none(6, 6)
    upper[:3], lower[:, 3:] = True, True  # the second reads the rows that the first does not write
    apart = warning_of(net(), {"0.weight": upper, "2.weight": lower})
    assert apart == sentence.format("the kept weights leave no way from it to the output")
    assert warning_of(net(), {"0.weight": upper}) == warning_of(net(), {}) == ""
    around = Of(lambda m, y: y + m["a"](y), a=nn.Linear(4, 4))
    assert warning_of(around, {"layers.a.weight": none(4, 4)}) == ""


def test_builds_of_other_rounds_have_a_star() -> None:
    early = Timing("eager, contiguous", 5.0, 4.0, 6.0, 3, together=False)
    report = a_report(timings=(*a_report().timings, early))
    for text in (str(report), Reader(page(report)).text):
        assert "eager, contiguous *" in text
        assert "* not timed in all rounds of ours: the machine may have been faster or slower then" in text
        assert "sparse: inductor *" not in text
    assert "* not timed" not in str(a_report()) + page(a_report())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "The rewritten build is returned: 1.50 times the speed of the best dense build (1.40 to 1.60 in pairs).",
        ),
        (
            {"chosen": "dense", "sparse_ms": 15.0, "speedup_low": None},
            f"{DENSE} slower, 0.80 times the speed of the best dense build.",
        ),
        (
            {"chosen": "dense", "sparse_ms": 12.0, "speedup_low": 0.9, "speedup_high": 1.1},
            f"{DENSE} no faster, 1.00 times the speed of the best dense build (0.90 to 1.10 in pairs).",
        ),
        ({"dense_ms": None, "sparse_ms": None}, "The rewritten build is returned."),
        ({"chosen": "not measured"}, "Not measured: a dry run builds nothing and times nothing."),
    ],
)
def test_the_verdict_is_one_plain_sentence_in_all_three_forms(changes: dict[str, Any], sentence: str) -> None:
    report = a_report(**changes)
    assert report.verdict == sentence
    assert sentence in " ".join(str(report).split())
    assert html.escape(sentence) in page(report)
    assert report.to_dict()["verdict"] == sentence


def test_refusals_are_grouped_by_reason_whatever_their_numbers() -> None:
    decisions = [
        refusal("a", "no rule for 'aten.cumsum'"),
        refusal("b", "100 = 6 * 16 + 4"),
        refusal("c", "36 = 2 * 16 + 4"),
        Decision("shrink_channels", "d", "remove 1 of 8 rows", "100 = 6 * 16 + 4"),
    ]
    found = reasons(decisions)
    assert [(r.why, [d.where for d in r.decisions], r.alike) for r in found] == [
        ("100 = 6 * 16 + 4", ["b", "c"], True),
        ("no rule for 'aten.cumsum'", ["a"], False),
    ]


# the table


def lines_of(report: Report) -> list[str]:
    return str(report).split("\n")


def test_the_table_has_one_line_per_weight_with_every_number() -> None:
    row = a_shrunk_row(dense_us=100.4, sparse_us=50.25, blocked_by="softmax", kept_for=("carrier (1 column)",))
    lines = lines_of(a_report(rows=(row,)))
    (line,) = [line for line in lines if line.startswith("layer1.0.conv1 ")]
    numbers = ["layer1.0.conv1", "8x4x3x3", "->", "6x3", "0.250", "2", "1", "162", "56%", "16.2k", "56%", "100", "50.2"]
    assert line.split() == [*numbers, "carrier", "(1", "column)"]
    after = lines[lines.index(line) + 1]
    assert after.split() == ["blocked", "by", "softmax"]
    assert after.index("blocked") == line.index("carrier")


def test_totals_timings_verification_and_environment_are_below_the_table() -> None:
    text = str(a_report())
    for line in (
        "parameters  288 -> 162 (56%)",
        "MACs        28.8k -> 16.2k (56%), one sample",
        "time        12.0 ms -> 8.00 ms",
        "verified    largest |difference| 1.2e-07, allowed 3.4e-06",
        "torch 2.15.0, threads 2",
    ):
        assert line in text.split("\n")
    assert re.search(r"^sparse: inductor +8\.00 +7\.90 +8\.50 +40$", text, re.MULTILINE)


def test_columns_without_a_value_are_left_out() -> None:
    text = str(a_report(rows=(a_row(),), timings=()))
    assert "density" in text
    assert not any(word in text for word in ("dense\n", "kept for", "blocked by", "removed", "median"))


def test_many_untouched_weights_become_one_line_and_few_do_not() -> None:
    few = [a_row(f"block.{i}.weight") for i in range(8)]
    many = [a_row(f"block.{i}.weight", density=i / 10) for i in range(9)]
    assert sum(line.startswith("block.") for line in lines_of(a_report(rows=tuple(few)))) == 8
    text = str(a_report(rows=(a_shrunk_row("stem.weight"), *many)))
    assert "block." not in text
    assert "stem" in text
    assert (
        "and 9 weights with nothing to remove and nothing in the way (density 0.00 to 0.80, 2.59k parameters)" in text
    )


def test_a_table_of_a_hundred_and_sixty_rows_stays_within_its_width_and_height() -> None:
    why = ("coupled with features.denseblock2.denselayer7.conv2 by add (3 rows)", "rounding (5 rows)")
    rows = [
        a_shrunk_row(
            f"features.denseblock{1 + i // 40}.denselayer{i % 40}.conv2.weight",
            shape=(1024, 2048, 3, 3),
            new_shape=(1001, 2001, 3, 3),
            rows_removed=23,
            columns_removed=47,
            dense_us=10234.0,
            sparse_us=8123.0,
            kept_for=why[: i % 3],
            blocked_by="adaptive_avg_pool2d" if i % 5 == 0 else None,
        )
        for i in range(160)
    ]
    refused = [refusal(f"features.denseblock1.denselayer{i}", f"reason {chr(97 + i % 26) * 3}") for i in range(400)]
    lines = lines_of(a_report(rows=tuple(rows), decisions=tuple(refused)))
    assert max(map(len, lines)) <= 140
    assert len(lines) < 160 * 3
    assert sum(line.startswith("f.d") for line in lines[:-30]) == 160
    assert "coupled (3 rows)" in str(lines)
    assert "and 210 more for 14 other reasons; report.decisions has them all" in lines


def test_a_small_table_names_what_a_weight_is_coupled_with() -> None:
    text = str(a_report(rows=(a_shrunk_row(kept_for=("coupled with layer1.0.downsample.0 by add (3 rows)",)),)))
    assert "coupled with layer1.0.downsample.0 by add (3 rows)" in " ".join(text.split())


def test_a_report_of_nothing_is_still_a_table_and_a_page() -> None:
    report = a_report(rows=(), timings=(), params_before=0, params_after=0, macs_before=0, macs_after=0, environment={})
    assert "decisions refused: 0" in str(report)
    assert "fxsparse report" in page(report)


def test_the_table_is_plain_ascii() -> None:
    assert str(a_report(decisions=(refusal("a", "b"),))).isascii()


# JSON


def test_the_dictionary_survives_json_and_holds_every_field_but_the_masks() -> None:
    decision = Decision("fold_batch_norm", "bn1", "fold into conv1", "its only reader", data={"node": object()})
    report = a_report(decisions=(decision,), masks=Masks({"a": torch.ones(2, dtype=torch.bool)}))
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    fields = {f.name for f in dataclasses.fields(Report)}
    assert set(plain) == fields - {"masks"} | {"speedup", "verdict"}
    assert set(plain["rows"][0]) == {f.name for f in dataclasses.fields(Row)}
    assert plain["rows"][0]["kept_rows"] == [0, 1, 2, 4, 5, 6]
    assert plain["timings"][1]["median_ms"] == 8.0
    assert plain["decisions"] == [
        {
            "step": "fold_batch_norm",
            "where": "bn1",
            "what": "fold into conv1",
            "why": "its only reader",
            "accepted": True,
        }
    ]


def test_changing_the_dictionary_does_not_change_the_report() -> None:
    report = a_report()
    report.to_dict()["environment"]["torch"] = "changed"
    assert report.environment["torch"] == "2.15.0"


# the page


class Reader(HTMLParser):
    """Collects tags with their attributes, and visible text; checks that every tag is closed."""

    VOID = frozenset({"meta", "br", "img", "wbr", "rect", "path", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def a_full_report() -> Report:
    torch.manual_seed(0)
    masks = {"layer1.0.conv1.weight": torch.rand(8, 4, 3, 3) < 0.3}
    row = a_shrunk_row(kept_for=("rounding (5 rows)",), blocked_by="softmax", dense_us=10.0, sparse_us=20.0)
    accepted = Decision("fold_batch_norm", "bn1", "fold into conv1", "its only reader")
    return a_report(rows=(row,), decisions=(accepted, refusal("x", "y"), refusal("z", "y")), masks=Masks(masks))


def test_the_page_is_well_formed_and_says_what_the_table_says() -> None:
    text = Reader(page(a_full_report())).text
    for word in ("1.50", "1.40 to 1.60 in pairs", "8.00 ms", "67% of 12.0 ms", "56% of 288", "56% of 28.8k"):
        assert word in text, word
    for word in ("rounding (5 rows)", "softmax", "allowed 3.4e-06", "1 accepted, 2 refused", "2.15.0"):
        assert word in text, word
    assert "10.0 \N{RIGHTWARDS ARROW} 20.0 \N{MICRO SIGN}s  0.50\N{MULTIPLICATION SIGN}" in text


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    reader = Reader(page(a_full_report()))
    assert not {"script", "link", "iframe", "object", "use"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attributes), tag
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "default-src 'none'" in page(a_full_report())
    assert not re.search(r"https?:|url\(|@import", page(a_full_report()))


def test_every_text_on_the_page_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    row = a_shrunk_row(evil, op=evil, kept_for=(evil,), blocked_by=evil, dense_us=1.0, sparse_us=1.0)
    report = a_report(
        target=evil,
        rows=(row,),
        decisions=(
            Decision(evil, evil, evil, evil),
            *(Decision(evil, evil, evil, why, accepted=False) for why in (evil, evil, f"once {evil}")),
        ),
        timings=(Timing(evil, 1.0, 1.0, 1.0, 3),),
        verification=evil,
        environment={evil: evil},
        masks=Masks({evil: torch.rand(8, 4, 3, 3) < 0.5}),
    )
    reader = Reader(page(report))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(evil) >= 28
    assert any(tag == "code" and attributes.get("title") == evil for tag, attributes in reader.tags)
    assert any(attributes.get("alt") == f"mask of {evil}, 8 rows, 4 columns" for _, attributes in reader.tags)


def bars(report: Report, kind: str) -> list[float]:
    reader = Reader(page(report))
    return [float(a["width"] or 0) for tag, a in reader.tags if tag == "rect" and a.get("class") == kind]


def test_bars_are_in_proportion_to_the_times() -> None:
    rows = (a_row("a", dense_us=40.0, sparse_us=10.0), a_row("b", dense_us=20.0), a_row("c"))
    report = a_report(rows=rows, timings=())
    longest, half = bars(report, "dense")
    (quarter,) = bars(report, "sparse")
    assert (half / longest, quarter / longest) == (0.5, 0.25)


def test_a_chart_of_many_layers_keeps_the_slowest_and_says_so() -> None:
    rows = tuple(a_row(f"block.{i}", dense_us=float(1 + i)) for i in range(50))
    text = page(a_report(rows=rows, timings=()))
    assert len(bars(a_report(rows=rows, timings=()), "dense")) == 40
    assert "The 10 fastest layers are left out." in text
    assert ">block.10</text>" in text
    assert ">block.9</text>" not in text


def test_charts_are_images_with_a_text() -> None:
    charts = [attributes for tag, attributes in Reader(page(a_full_report())).tags if tag == "svg"]
    assert [chart["role"] for chart in charts] == ["img", "img"]
    builds, layers = (chart["aria-label"] or "" for chart in charts)
    assert builds.startswith("Time of each build. inductor, channels_last: median of 40 runs: 12.0 ms")
    assert "layer1.0.conv1.weight: 10.0" in layers


def test_a_dry_run_shows_no_times() -> None:
    report = a_report(timings=(), dense_ms=None, sparse_ms=None, chosen="not measured")
    text = Reader(page(report)).text
    assert "Speedup" not in text
    assert "Time of" not in text


# pictures


def decode(data: bytes) -> torch.Tensor:
    """[h, w, 4] from a PNG of 8-bit RGBA with filter 0 only; checks signature, lengths and checksums."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(body),)
        chunks.append((body[:4], body[4:]))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 6, 0, 0, 0]
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[1][1])), dtype=torch.uint8).view(height, 1 + 4 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 4)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (160, 7)])
def test_a_png_decodes_to_the_pixels_it_was_made_of(shape: tuple[int, int]) -> None:
    pixels = torch.randint(256, (*shape, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode(png(pixels)), pixels)


def test_another_program_reads_the_same_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, (9, 13, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "x.png").write_bytes(png(pixels))
    with image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "RGBA"
        assert opened.tobytes() == bytes(pixels.flatten().tolist())


def test_kept_weights_are_blue_removed_rows_and_columns_orange_and_nothing_is_clear() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    pixels = picture(mask, kept_rows=(0, 2), kept_columns=(0, 2)).tolist()
    assert pixels[0][0] == [*BLUE, 255]
    empty, lost = [pixels[0][1], pixels[1][0]], [pixels[1][2], pixels[2][1]]  # each once by column, once by row
    assert all(pixel[:3] == list(ORANGE) for pixel in empty + lost)
    assert [pixel[3] for pixel in empty] == [80, 80]  # 10/32: the levels are thirty-seconds
    assert [pixel[3] for pixel in lost] == [231, 231]  # 29/32: a removed weight is stronger than an empty place
    assert picture(mask)[0, 1, 3] == 0


def test_a_pixel_of_a_convolution_is_the_density_of_its_kernel() -> None:
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    mask[0, 0] = True
    mask[0, 1, 0, 0] = True
    alpha = picture(mask)[..., 3]
    assert alpha.tolist() == [[255, round(255 * 0.25**0.5)], [0, 0]]


def test_a_large_mask_is_drawn_by_block_means_without_losing_the_last_rows_and_columns() -> None:
    mask = torch.zeros(321, 401, dtype=torch.bool)
    mask[-1, -1] = True  # blocks are 3 x 3, the last 3 x 2
    mask[0, 0] = True
    alpha = picture(mask)[..., 3].float() / 255
    assert alpha.shape == (107, 134)
    assert alpha[0, 0] == pytest.approx((1 / 9) ** 0.5, abs=1 / 32)
    assert alpha[-1, -1] == pytest.approx((1 / 6) ** 0.5, abs=1 / 32)
    assert alpha.count_nonzero() == 2


def test_columns_numbered_by_input_channel_do_not_tint_a_grouped_weight() -> None:
    mask = torch.ones(4, 1, 3, 3, dtype=torch.bool)
    assert torch.equal(picture(mask, kept_columns=(0, 3)), picture(mask))


def images(report: Report) -> dict[str, torch.Tensor]:
    found = {}
    for tag, attributes in Reader(page(report)).tags:
        if tag == "img":
            uri = attributes["src"] or ""
            found[attributes["alt"] or ""] = decode(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    return found


def test_the_page_holds_the_picture_of_each_masked_weight() -> None:
    report = a_full_report()
    (drawn,) = images(report).values()
    assert report.masks is not None
    expected = picture(report.masks["layer1.0.conv1.weight"], report.rows[0].kept_rows, report.rows[0].kept_columns)
    assert torch.equal(drawn, expected)


def test_of_many_weights_the_ones_with_the_most_removed_are_drawn_in_order() -> None:
    rows = tuple(a_row(f"block.{i}", params_after=288 - i) for i in range(30))
    masks = Masks({row.name: torch.ones(8, 4, 3, 3, dtype=torch.bool) for row in rows})
    names = [alt.split(",")[0] for alt in images(a_report(rows=rows, masks=masks))]
    assert names == [f"mask of block.{i}" for i in range(6, 30)]


def test_masks_that_do_not_fit_their_row_are_not_drawn() -> None:
    rows = (a_row("a"), a_row("b", shape=(0, 4)), a_row("c", shape=(8,)), a_row("not masked"))
    masks = Masks({"a": torch.zeros(2, 2), "b": torch.zeros(0, 4), "c": torch.zeros(8)})
    assert images(a_report(rows=rows, masks=masks)) == {}


# writing


def test_the_page_is_written_below_folders_that_are_made(tmp_path: Path) -> None:
    report = a_full_report()
    path = tmp_path / "runs" / "1" / "report.html"
    report.to_html(path)
    assert path.read_text(encoding="utf-8") == page(report)
    assert os.listdir(path.parent) == ["report.html"]
    report.to_html(str(path))
    assert os.listdir(path.parent) == ["report.html"]


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def write_half(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        fail()

    if broken == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(InputError, match="No space left"):
        a_report().to_html(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        a_report().to_html(tmp_path)
    assert str(caught.value) == (
        f"output file {str(tmp_path)!r}: expected a file; got a folder.\n  {tmp_path / 'report.html'}, say."
    )


@pytest.mark.parametrize("below", ["x.html", "y/x.html"])
def test_a_path_through_a_file_is_refused_with_the_way_out(below: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    path = tmp_path / "taken" / below
    with pytest.raises(InputError, match="expected a path in a folder that exists or can be made") as caught:
        a_report().to_html(path)
    assert str(path) in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_weight_with_zeros_that_stays_dense_has_a_row_with_the_reason() -> None:
    rows = [a_row(f"block.{i}.weight", density=1.0) for i in range(12)]
    sparse = a_row("late.weight", density=0.2, dense_for="it would store 146% of the weight")
    text = str(a_report(rows=(*rows, sparse)))
    assert "12 weights with nothing to remove and nothing in the way (density 1.00 to 1.00" in text
    (line,) = [line for line in text.split("\n") if line.startswith("late")]
    assert line.endswith("dense: it would store 146% of the weight")
    assert "dense: it would store 146% of the weight" in page(a_report(rows=(sparse,)))


def test_a_model_without_masks_is_told_so() -> None:
    sentence = "No weight of a convolution or linear layer is masked"
    assert sentence in str(a_report(rows=(a_row(density=1.0),)))
    assert sentence not in str(a_report(rows=(a_row(density=1.0), a_row("other.weight", density=0.5))))


def test_brief_reasons_keep_their_words_and_are_added_up() -> None:
    found = _in_brief([
        "coupled with layer1.0.conv2 by add (3 rows)", "coupled with layer1.1.conv2 by add (1 row)",
        "other readers of its input need them (6 columns)", "grouped convolution f.2: a group stays whole (1 row)",
        "blocked by embedding",
    ])  # fmt: skip
    assert found == ["coupled (4 rows)", "other readers of its input need them (6 columns)",
                     "grouped convolution f.2 (1 row)", "blocked by embedding"]  # fmt: skip
