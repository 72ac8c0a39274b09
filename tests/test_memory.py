"""Memory of intermediate results that is kept between calls: never under somebody's tensor, and really used."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend import memory
from fxsparse.backend.memory import OLD, SMALLEST, Memory

ELEMENTS = SMALLEST // 4  # of float32: the smallest tensor that is kept


def _tensor(kept: Memory, elements: int = ELEMENTS) -> Tensor:
    return kept.empty_strided((elements,), (1,), torch.float32)


def test_a_block_is_used_again_once_its_tensor_is_gone() -> None:
    kept = Memory()
    first = _tensor(kept)
    place = first.data_ptr()
    assert _tensor(kept).data_ptr() != place
    del first
    assert _tensor(kept).data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [lambda t: t[3:], lambda t: t.numpy(), lambda t: t.untyped_storage(), lambda t: t.detach().view(torch.int32)],
    ids=["view", "numpy", "storage", "detached"],
)
def test_a_block_is_not_used_again_while_anything_of_its_tensor_is_held(hold: Callable[[Tensor], Any]) -> None:
    kept = Memory()
    first = _tensor(kept)
    place, held = first.data_ptr(), hold(first)
    del first
    assert _tensor(kept).data_ptr() != place
    del held
    assert _tensor(kept).data_ptr() == place


@pytest.mark.parametrize("move", [Tensor.share_memory_, lambda t: t.resize_(3 * ELEMENTS)], ids=["shared", "resized"])
def test_a_block_that_was_moved_is_not_used_again(move: Callable[[Tensor], Any]) -> None:
    """Another process may read it for as long as it likes."""
    kept = Memory()
    first = _tensor(kept)
    move(first)
    place = first.data_ptr()
    del first
    assert _tensor(kept).data_ptr() != place


def test_sizes_strides_and_dtypes_are_those_asked_for() -> None:
    kept = Memory()
    for size, stride, dtype in (
        ((2, 300, 500), (150000, 1, 300), torch.float64),
        ((4, 1 << 20), (1 << 20, 1), torch.bool),
        ((3, 0, 1 << 22), (0, 1 << 22, 1), torch.float32),
        ((), (), torch.bfloat16),
    ):
        made = kept.empty_strided(size, stride, dtype)
        assert (made.shape, made.stride(), made.dtype) == (torch.Size(size), stride, dtype)
        made.zero_()  # all of it lies in the block


def test_a_small_tensor_takes_no_block_of_a_large_one_and_old_blocks_go() -> None:
    kept = Memory()
    for elements in (8 * ELEMENTS, ELEMENTS):
        _tensor(kept, elements)
    assert [b.bytes for b in kept._blocks] == [32 * ELEMENTS, 4 * ELEMENTS]
    for _ in range(OLD):
        _tensor(kept)
    _tensor(kept, 2 * ELEMENTS)
    assert sorted(b.bytes for b in kept._blocks) == [4 * ELEMENTS, 8 * ELEMENTS]


class Wide(nn.Module):
    """Its intermediate result and its output take 3 MB, and oneDNN makes neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(torch.cat([y, y.sin()], 1))
        return torch.cat([z, z.cos()], 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what `Memory` was asked for."""
    asked: list[int] = []
    plain = Memory.empty_strided

    def counting(self: Memory, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        made = plain(self, size, stride, dtype)
        asked.append(made.nbytes)
        return made

    monkeypatch.setattr(memory.Memory, "empty_strided", counting)
    return asked


def test_results_of_earlier_calls_stay_what_they_were(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = Wide().eval()
    xs = [torch.randn(1, 3, 112, 112) for _ in range(4)]
    fast = fxsparse.compile(model, target="inductor", example_inputs=(xs[0],), measure=False)
    with torch.no_grad():
        outputs = [fast(x) for x in xs]
        larger = fast(torch.cat(xs[:2]))
        for x, y in zip([*xs, torch.cat(xs[:2])], [*outputs, larger], strict=True):
            torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)
    assert max(calls) >= SMALLEST, "Inductor's code no longer asks for memory by this name"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float64 is not frozen: its code holds no weights
def test_memory_goes_with_the_module_that_uses_it(dtype: torch.dtype) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(o) is Memory and bool(o._blocks) for o in gc.get_objects())

    before = alive()
    x = torch.randn(1, 3, 112, 112, dtype=dtype)
    fast = fxsparse.compile(Wide().eval().to(dtype), target="inductor", example_inputs=(x,), measure=False)
    with torch.no_grad():
        fast(x)
    assert alive() > before
    del fast
    assert alive() == before


def test_threads_that_call_at_once_do_not_share_memory() -> None:
    torch.manual_seed(0)
    model = Wide().eval()
    xs = [torch.randn(1, 3, 112, 112) for _ in range(4)]
    fast = fxsparse.compile(model, target="inductor", example_inputs=(xs[0],), measure=False)
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wanted = model(xs[i])
            wrong.extend(i for _ in range(20) if not torch.allclose(fast(xs[i]), wanted, atol=1e-4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
