"""Plans: a planned training step makes bitwise what a walked one makes, and the kernels in CUDA C++ that the driver
launches make what those make that the runtime launches."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import cuda_kernels as backend
from densenet_fast.backends import plan
from densenet_fast.backends.affine import Affine, Job, ThroughStatistics, empty_statistics
from densenet_fast.backends.layout import to_image
from densenet_fast.backends.recording import tensors_in
from densenet_fast.benchmarking.steps import enqueue
from on_gpu.checks import Check, LeftOut, Record, Wrong
from on_gpu.cuda_kernels import Matrices
from on_gpu.kernels import numerics
from on_gpu.network import Parts, entry, parts_of
from on_gpu.planning import watched, without_plans
from on_gpu.settings import Layer, Settings

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""


def checks(settings: Settings) -> list[Check]:
    """Kernels of each part of the network, then whole steps, with and without recomputation."""
    parts = {"a block's columns": settings.layers[0], "the stem": settings.stem, "the head": settings.head}
    dtype = settings.planned
    found = [
        Check(f"launched by the driver, {dtype}, {part}", partial(by_the_driver, settings, layer))
        for part, layer in parts.items()
    ]
    for ours in ("ours", "ours-me"):
        found.append(Check(f"planned as walked, {dtype}, {ours}", partial(as_walked, settings, ours), 60))
    return found


def needed() -> None:
    """Raises:
    LeftOut: nothing can be planned here.
    """
    for why in (backend.unavailable(), plan.unavailable()):
        if why is not None:
            raise LeftOut(why)


def every_kernel(
    x: Tensor,
    appended: Tensor,
    mask: Tensor,
    grad: Tensor,
    of_images: Tensor,
    vectors: list[Tensor],
    grid: tuple[int, ...],
) -> tuple[Any, ...]:
    """What each kernel in CUDA C++ makes of x [M, C], in the order of the launches."""
    mean, rstd, bias, weight, p, q = vectors
    rows, affine = x.shape[0], Affine(mean, rstd, bias, weight)
    own, new, pooled = (empty_statistics(x, n, 1e-3) for n in (x.shape[1], appended.shape[1], x.shape[1]))
    backend.channel_statistics(x, own)
    dropped, completed = torch.empty_like(appended), torch.empty_like(grad)
    backend.append_features(to_image(appended, grid), dropped, new, mask, 2.0)
    backend.finalise_gradient(grad, ThroughStatistics(x, mean, p, q, rows), completed)
    maxima, argmax = backend.bn_relu_maxpool(x, affine, grid, pooled)
    by_maxima, sums = backend.bn_relu_maxpool_backward(maxima, argmax, x, affine, grid)
    means = backend.bn_relu_global_avgpool(x, affine, grid)
    by_means, more_sums = backend.bn_relu_global_avgpool_backward(of_images, x, affine, grid)
    half, inverse, zero = torch.empty_like(weight, dtype=x.dtype), *(torch.empty_like(mean) for _ in range(2))
    copies = [Job("copy", half, weight)]
    backend.prepare([*copies, Job("rstd", inverse, own.var, 1e-3), Job("zero", zero)])
    vectors = [half, inverse, zero, *own[:3], *new[:3], *pooled[:3], *sums, *more_sums]
    return [dropped, completed, maxima, argmax, by_maxima, means, by_means], vectors


def by_the_driver(settings: Settings, layer: Layer) -> Record:
    """Every kernel, planned and as it is launched else.

    Raises:
        Wrong: a result differs in a bit.
    """
    needed()
    with numerics(settings.planned) as dtype:
        matrices = Matrices(layer, dtype, settings.device)
        x = matrices.buffer[:, : matrices.columns]
        mean, bias, weight, p, q = matrices.vectors
        vectors = [mean, bias.square(), bias, weight, p, q]
        given = (x, matrices.appended, matrices.mask, matrices.grad, matrices.of_images, vectors, matrices.grid)
        made = plan.make(every_kernel, given, x.device)
        expected, got = every_kernel(*given), made.run(given)
        if got is None:
            raise Wrong("the plan does not know the inputs it was made with")
        raise_if_other(numbered(expected), numbered(got), "the driver's result")
        return {"launches": len(made.calls)}


def numbered(result: Any) -> Parts:
    return {str(i): t for i, t in enumerate(tensors_in(result))}


def as_walked(settings: Settings, ours: str) -> Record:
    """A planned training step, after two that are walked.

    Raises:
        Wrong: it differs from them in a bit, they differ, or it was not planned.
    """
    needed()
    with numerics(settings.planned) as dtype, settings.planning():
        device, contestant = torch.device(settings.device), entry(settings, ours)
        model = contestant.model(device, True)
        images = contestant.images(settings.planned_images, settings.planned_size, device)
        before = copy.deepcopy(model.state_dict())

        def step() -> Parts:
            model.load_state_dict(before)
            logits = enqueue(model, images, dtype, True, list(model.parameters()))
            return {name: value.clone() for name, value in parts_of(model, logits, True).items()}

        with without_plans():
            walked, again = step(), step()
        raise_if_other(walked, again, "another walk's")
        step()  # the first of its kind is walked
        with watched() as bodies:
            got = step()
        raise_if_other(walked, got, "the planned step's")
        return bodies.all_planned(settings)


def raise_if_other(expected: Parts, got: Parts, whose: str) -> None:
    """Raises:
    Wrong: a result differs in a bit.
    """
    for name, value in expected.items():
        bits = BITS[value.element_size()]
        differ = got[name].contiguous().view(bits) != value.contiguous().view(bits)
        if differ.any():
            message = f"{whose} {name}: {int(differ.sum())} of {differ.numel()} elements are others"
            raise Wrong(message, elements=int(differ.sum()))
