"""One training step or inference of a competitor, and the proof that all compute the same."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_fast.benchmarking.competitors import Entry

__all__ = ["DTYPES", "Disagreement", "agree", "compiled_agrees", "enqueue", "step", "without_tf32"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = (4, 5, 6, 7)
"""Of images, on which implementations are compared until they agree."""
MARGIN = 1e-3
"""Relative error in float32 that any implementation may have. The last block's normalisations are over few pixels. They
magnify rounding, so all err more."""
TOLERANCE = 1e-2
"""The same for compiled networks, in any dtype."""

Run = Callable[[Tensor], Tensor]


class Disagreement(RuntimeError):
    """A competitor computes something else."""


def step(run: Run, images: Tensor, dtype: torch.dtype, train: bool, parameters: Sequence[Tensor] = ()) -> Tensor:
    """Does what :func:`enqueue` does, and returns the logits when the device is done."""
    logits = enqueue(run, images, dtype, train, parameters)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return logits


def enqueue(run: Run, images: Tensor, dtype: torch.dtype, train: bool, parameters: Sequence[Tensor] = ()) -> Tensor:
    """Runs a training step without the optimizer, or inference. Returns the logits, which the device may still compute.

    Args:
        run: the model, or what ``torch.compile`` made of it.
        images: [N, 3, H, W].
        dtype: autocast's, float32 for none.
        train: whether to run the backward pass.
        parameters: the gradients of these are dropped before the backward pass.
    """
    with torch.set_grad_enabled(train), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = run(images)
    if train:
        for parameter in parameters:
            parameter.grad = None
        labels = torch.arange(len(images), device=images.device) % logits.shape[1]
        F.cross_entropy(logits.float(), labels).backward()
    return logits


@contextmanager
def without_tf32() -> Iterator[None]:
    """A context in which products and convolutions are in full float32. TF32 makes errors that look like
    disagreement."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def agree(entries: Sequence[Entry], train: bool, device: torch.device, size: int = 64) -> None:
    """Compares logits and gradients of the eager ``entries`` in float32 with those of the first one in float64.

    The batches are small. To agree on one of them is enough: where a ReLU's input is next to zero, rounding decides on
    a gradient.

    Raises:
        Disagreement: on each batch, the error of one of them is above twice the first one's, plus ``MARGIN``.
    """
    if not entries:
        return
    for batch in BATCHES:
        errors = {entry: _float32_errors(entry, entries[0], batch, size, train, device) for entry in entries}
        own = errors[entries[0]]
        wrong = [
            f"{entry.name}: its {what} are off by {error:.1e}, {entries[0].name}'s by {own[what]:.1e}"
            for entry in entries
            for what, error in errors[entry].items()
            if not error <= 2 * own[what] + MARGIN
        ]
        if not wrong:
            return
    raise Disagreement(wrong[0])


def _float32_errors(
    entry: Entry, first: Entry, batch: int, size: int, train: bool, device: torch.device
) -> dict[str, float]:
    """Relative errors of ``entry`` in float32 against ``first`` in float64."""
    with without_tf32():
        exact, model = first.model(device, train).double(), entry.model(device, train)
        truth = _results(exact, exact, first.images(batch, size, device).double(), torch.float32, train)
        return _errors(_results(model, model, entry.images(batch, size, device), torch.float32, train), truth)


def compiled_agrees(entry: Entry, model: nn.Module, run: Run, images: Tensor, dtype: torch.dtype, train: bool) -> None:
    """Compares ``run``, made of ``model`` by ``torch.compile``, with ``model`` on the batch that will be timed.

    Raises:
        Disagreement: its error against float32 is above twice the error of ``model`` in ``dtype``, plus ``TOLERANCE``.
    """
    with without_tf32():
        truth = _results(model, model, images, torch.float32, train)
    eager = _errors(_results(model, model, images, dtype, train), truth)
    compiled = _errors(_results(run, model, images, dtype, train), truth)
    for what, error in compiled.items():
        if not error < 2 * eager[what] + TOLERANCE:
            raise Disagreement(
                f"{entry.name}: its {what} are off by {error:.1e}, the eager model's by {eager[what]:.1e}"
            )


def _results(run: Run, model: nn.Module, images: Tensor, dtype: torch.dtype, train: bool) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    results = [step(run, images, dtype, train, list(parameters.values())).detach()]
    if train:
        results.append(torch.cat([parameters[name].grad.flatten() for name in sorted(parameters)]))
    for parameter in parameters.values():
        parameter.grad = None
    return results


def _errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    return {
        what: ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        for what, a, b in zip(("logits", "gradients"), got, expected)
    }
