"""The whole way on real data, in minutes: train, prune, coarsen, fine-tune, compile, measure.

scikit-learn's handwritten digits (1797 images of 8x8) -> a small residual network -> iterative magnitude pruning with
rewinding -> Refill -> training with the refilled masks -> `fxsparse.compile` -> report.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fxsparse
from fxsparse.coarsen import Coarsened, refill, with_batch_norm
from fxsparse.errors import InputError, VerificationError
from fxsparse.ir.files import writable
from fxsparse.ir.masks import Masks
from fxsparse.progress import progress
from fxsparse.prune import prunable
from fxsparse.train import Ticket, imp, masked

BATCH = 64
TEST_IMAGES = 7 * BATCH
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


@dataclass(frozen=True)
class Setup:
    """How large a network is trained for how long: width of its first stage, epochs, pruning rounds."""

    width: int = 64
    epochs: int = 5
    rounds: int = 4

    @property
    def epochs_in_all(self) -> int:
        """The dense network, the rounds, and the training after Refill."""
        return self.epochs * (self.rounds + 2)


QUICK = Setup(width=32, epochs=4, rounds=2)


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] float32, standardized; labels [N] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run(out_dir: str | os.PathLike[str], seed: int = 0, quick: bool = False) -> int:
    """Run the demo, print what it finds, and write report.html and masks.safetensors into `out_dir`. Returns 0.

    The same seed gives the same accuracies on the same machine; torch's own generator is left as it was. `quick`
    trains a smaller network for fewer epochs. Raises InputError when scikit-learn or the checkout's `models` is
    missing, VerificationError when the compiled network does not answer as the masked one does.
    """
    out = Path(out_dir)
    writable(out / "report.html", "report.html")
    setup, console = QUICK if quick else Setup(), Console()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        digits = load_digits(seed)
        model = _network(setup.width)
        accuracies, masks = _prune(model, digits, setup, seed, console)
    masks.save(out / "masks.safetensors")
    report = _compile(model, masks, digits, accuracies, console)
    report.to_html(out / "report.html")
    console.print(
        f"masks   {out / 'masks.safetensors'}\nreport  {out / 'report.html'}", highlight=False, soft_wrap=True
    )
    return 0


def load_digits(seed: int) -> Digits:
    """The 1797 digits, standardized and split: 448 for testing, drawn with `seed`."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise InputError(
            "fxsparse demo",
            expected="scikit-learn, whose handwritten digits it trains on",
            got="no module named 'sklearn'",
            do="pip install scikit-learn, or install fxsparse[demo].",
        ) from None
    found: Any = datasets.load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.from_numpy(found.target).long()[order]
    train = images[:-TEST_IMAGES]
    images = (images - train.mean()) / train.std()
    return Digits(images[:-TEST_IMAGES], labels[:-TEST_IMAGES], images[-TEST_IMAGES:], labels[-TEST_IMAGES:])


def _network(width: int) -> nn.Module:
    """The small residual network of the checkout's `models`, which is not part of the installed package."""
    checkout = Path(__file__).resolve().parents[1]
    try:
        with _first_on_path(checkout):
            build: Callable[..., nn.Module] = importlib.import_module("models").resnet_small_cifar
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(
            "fxsparse demo",
            expected="models.resnet_small_cifar, the network it trains",
            got=str(error),
            do="The models are not in the installed package: clone the repository and pip install -e . from there.",
        ) from None
    return build(num_classes=10, in_channels=1, width=width)


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Inside, modules are looked for in `folder` first. (A console script does not look into a checkout.)"""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _prune(
    model: nn.Module, digits: Digits, setup: Setup, seed: int, console: Console
) -> tuple[list[tuple[str, float, float]], Masks]:
    """Find the masks and train with them. Returns (what, density, accuracy) of every step, and the masks."""
    accuracies: list[tuple[str, float, float]] = []

    def note(what: str, masks: Masks) -> None:
        accuracies.append((what, 1 - masks.sparsity(), accuracy(model, digits)))

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("dense", total=setup.epochs_in_all)
        train_epochs = trainer(digits, setup.epochs, seed, lambda: _advance(bar))

        def after_round(number: int, masks: Masks) -> None:
            bar.update(task, description=f"round {number + 1}" if number < setup.rounds else "refilled")
            if number in (0, setup.rounds):
                note("magnitude pruning (IMP)" if number else "dense", masks)

        ticket = imp(model, train_epochs, epochs=setup.epochs, rounds=setup.rounds, after_round=after_round)
        coarsened = refill(prunable(model), ticket.masks)
        masks = with_batch_norm(model, coarsened.masks)
        _train_refilled(model, ticket, masks, train_epochs, setup.epochs)
        note("Refill, trained again", coarsened.masks)
    _show_pruning(coarsened, console)
    return accuracies, masks


def _advance(bar: Progress) -> None:
    """One epoch further. A bar that is not on a terminal shows nothing until it ends: there, a line an epoch."""
    (task,) = bar.tasks
    bar.advance(task.id)
    if not bar.console.is_terminal:
        epoch = f"{task.elapsed:6.1f} s  train {task.description}: epoch {task.completed:.0f} of {task.total:.0f}"
        bar.console.print(epoch, highlight=False, soft_wrap=True)


def _train_refilled(
    model: nn.Module, ticket: Ticket, masks: Masks, train_epochs: Callable[[nn.Module, int, int], None], epochs: int
) -> None:
    """From the rewound weights through the whole schedule, as every round of pruning was."""
    model.load_state_dict(ticket.rewind_state)
    with masked(model, masks):
        train_epochs(model, 0, epochs)


def trainer(
    digits: Digits, epochs: int, seed: int, after_epoch: Callable[[], None], *, weight_decay: float = WEIGHT_DECAY
) -> Callable[[nn.Module, int, int], None]:
    """A `train_epochs` for `imp`: SGD on the training images, learning rate up for an epoch, then down on a cosine."""

    def train_epochs(model: nn.Module, first: int, last: int) -> None:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=weight_decay, nesterov=True
        )
        model.train()
        for epoch in range(first, last):
            order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed + epoch))
            batches = order.split(BATCH)
            for i, batch in enumerate(batches):
                _set_learning_rate(optimizer, epoch + i / len(batches), epochs)
                loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            after_epoch()

    return train_epochs


def _set_learning_rate(optimizer: torch.optim.Optimizer, at: float, epochs: int) -> None:
    warm = min(1.0, at + 0.05)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * at / epochs))


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Fraction of the test images that are recognized."""
    return float((logits(model, digits.test_images).argmax(1) == digits.test_labels).double().mean())


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [N, classes] of the model in eval mode, in batches of 64."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def _compile(
    model: nn.Module, masks: Masks, digits: Digits, accuracies: list[tuple[str, float, float]], console: Console
) -> fxsparse.Report:
    """Plan, compile and check; print the plan, the accuracies and the times."""
    example = (digits.test_images[:BATCH],)
    model.eval()
    console.print(str(fxsparse.plan(model, masks, example)), markup=False, highlight=False, soft_wrap=True)
    started_s = time.perf_counter()
    with progress():
        compiled = fxsparse.compile(model, masks, target="inductor", example_inputs=example)
    took_s = time.perf_counter() - started_s
    difference, allowed = _check(model, compiled, digits.test_images)
    density = accuracies[-1][1]
    _show_accuracies([*accuracies, ("the same, compiled", density, accuracy(compiled, digits))], console)
    report: fxsparse.Report = compiled.report
    checked = (
        f"all {TEST_IMAGES} test images get the masked model's label, largest difference of a logit {difference:.1e}"
    )
    lines = [f"compiled in {took_s:.0f} s; {checked} (allowed {allowed:.1e})"]
    if report.dense_ms is not None and report.sparse_ms is not None:
        lines.append(
            f"batch of {BATCH}: best dense build {report.dense_ms:.2f} ms, compiled {report.sparse_ms:.2f} ms, "
            f"speedup {report.speedup:.2f} (this machine, {torch.get_num_threads()} threads)"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return report


def _check(model: nn.Module, compiled: nn.Module, images: Tensor) -> tuple[float, float]:
    """The largest difference of a logit, and the largest allowed: what `fxsparse.compile` itself allows.

    That is four times float32's own error on this model, and 16 units in the last place of the largest logit.
    Raises VerificationError when it is larger, or when one image gets another label.
    """
    wanted, got = logits(model, images), logits(compiled, images)
    exact = logits(copy.deepcopy(model).double(), images.double())
    difference = float((got - wanted).abs().max())
    rounding = 16 * torch.finfo(wanted.dtype).eps * float(exact.abs().max())
    allowed = 4 * float((wanted - exact).abs().max()) + rounding
    relabeled = int((got.argmax(1) != wanted.argmax(1)).sum())
    if not difference <= allowed or relabeled:
        raise VerificationError(
            "fxsparse demo",
            expected=f"the masked model's answers, to {allowed:.1e}",
            got=f"a largest difference of {difference:.1e}; {relabeled} of {len(images)} images get another label",
            do="This is a defect of fxsparse: please report it with the seed and this message.",
        )
    return difference, allowed


def _show_pruning(coarsened: Coarsened, console: Console) -> None:
    console.print("Refill, per weight", style="bold")
    console.print(str(coarsened), markup=False, highlight=False, soft_wrap=True)


def _show_accuracies(accuracies: list[tuple[str, float, float]], console: Console) -> None:
    table = Table("network", "density", f"accuracy on {TEST_IMAGES} test images")
    for what, density, value in accuracies:
        table.add_row(what, f"{density:.3f}", f"{value:.2%}")
    console.print(table)
