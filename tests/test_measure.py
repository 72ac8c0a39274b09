"""Who is timed how often, and who wins; the clock is made up."""

from collections.abc import Callable

import pytest
import torch

from fxsparse import machine, measure
from fxsparse.backend import onednn
from fxsparse.measure import Runs, play_off


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Milliseconds by name of the build; the last one repeats."""
    script: dict[str, list[float]] = {}

    def time_ms(run: Callable[[], object]) -> float:
        left = script[str(run())]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(measure, "_time_ms", time_ms)
    return script


def builds(*names: str) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: name for name in names}


def test_a_rival_that_is_far_behind_is_not_timed_to_the_end(clock: dict[str, list[float]]) -> None:
    clock.update({"ours": [1.0], "near": [2.1], "best": [2.0], "far": [9.0]})
    runs = play_off(builds("ours"), builds("near", "best", "far"), seconds=0)
    assert len(runs.ms["ours"]) == len(runs.ms["near"]) == len(runs.ms["best"]) == measure.ROUNDS[0]
    assert len(runs.ms["far"]) < measure.ROUNDS[0]
    assert runs.fastest(["near", "best", "far"]) == "best"
    assert runs.ratios("best", "ours") == [2.0] * measure.ROUNDS[0]


def test_a_rival_that_was_dropped_cannot_win_with_its_few_rounds() -> None:
    runs = Runs({"ours": [1.0] * 6, "dropped": [1.0] * 3, "best": [2.0] * 6})
    assert runs.fastest(["dropped", "best"]) == "best"


def test_bfloat16_without_its_vectors_is_not_timed_in_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """There oneDNN raises where it is to pack a convolution's weight."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x, w = torch.ones(1, 4, 5, 5), torch.ones(8, 4, 3, 3)
    for dtype, packs in ((torch.bfloat16, False), (torch.float32, True), (torch.float64, False)):
        convolution = onednn.onednn_convolution(x.to(dtype), w.to(dtype), [[1, 1], [0, 0], [1, 1]], 1)
        linear = onednn.onednn_linear(x.to(dtype), torch.ones(8, 5, dtype=dtype))
        assert [convolution is not None, linear is not None] == [packs, packs]


def test_builds_take_turns_and_none_always_follows_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "_time_ms", lambda run: order.append(str(run())) or 1000.0)
    measure.interleave(builds("a", "b", "c"), 0.0, (4, 4))
    warm, rounds = order[:6], order[6:]
    assert sorted(warm) == ["a", "a", "b", "b", "c", "c"]
    assert rounds == ["a", "b", "c", "c", "b", "a", "a", "b", "c", "c", "b", "a"]


def test_processors_of_one_name_and_two_generations_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for family in ("25", "26"):
        facts = {"model name": "AMD EPYC", "cpu family": family, "model": "1"}
        monkeypatch.setattr(machine, "_cpu_facts", lambda facts=facts: facts)
        names.append(machine.cpu_name.__wrapped__())
    assert names[0] != names[1]
    assert names[0].startswith("AMD EPYC (family 25, model 1), ")
