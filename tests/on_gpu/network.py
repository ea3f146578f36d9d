"""DenseNet-121 as a whole: a training step, no wait for the device, a CUDA graph, inference."""

import copy
import itertools
from functools import partial

import torch
from torch import Tensor, nn

from backends.comparison import Comparison
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.steps import DTYPES, enqueue, without_tf32
from helpers import error
from on_gpu.checks import Check, Record, Wrong
from on_gpu.kernels import verdict
from on_gpu.planning import Bodies, watched
from on_gpu.settings import Settings

REPLAYED = 1e-3
"""Relative error that a replayed step may have against an eager one: torch's own convolutions may choose others."""

WARM_UPS = 2
"""Steps until all is compiled and planned: the first of its kind is walked, the second makes the plans."""

Parts = dict[str, Tensor]


def checks(settings: Settings) -> list[Check]:
    """Each with and without recomputation, in each precision."""
    found = []
    for name, ours in itertools.product(settings.autocast, ("ours", "ours-me")):
        found.append(Check(f"training step against float64, {name}, {ours}", partial(step, settings, ours, name), 45))
    half = settings.autocast[0]
    for ours in ("ours", "ours-me"):
        found.append(Check(f"no wait for the device, {half}, {ours}", partial(without_waiting, settings, ours)))
        found.append(Check(f"captured in a CUDA graph, {half}, {ours}", partial(captured, settings, ours)))
    for name in settings.autocast:
        found.append(Check(f"inference against float64, {name}", partial(step, settings, "ours", name, False)))
    return found


def entry(settings: Settings, competitor: str) -> Entry:
    return Entry(competitor, "channels_last", settings.network)


def made(
    settings: Settings, competitor: str, dtype: torch.dtype, train: bool, exact: bool = False
) -> tuple[Parts, Bodies]:
    """What one step makes, the second of its kind: the logits and, in training, all gradients and the running
    statistics; and the bodies of ops that ran in it."""
    device, contestant = torch.device(settings.device), entry(settings, competitor)
    model = contestant.model(device, train)
    images = contestant.images(settings.batch, settings.size, device)
    if exact:
        model, images = model.double(), images.double()
    before = copy.deepcopy(model.state_dict())
    enqueue(model, images, dtype, train, list(model.parameters()))  # the first of its kind is not planned
    model.load_state_dict(before)
    with watched() as bodies:
        logits = enqueue(model, images, dtype, train, list(model.parameters()))
    return {name: value.double() for name, value in parts_of(model, logits, train).items()}, bodies


def parts_of(model: nn.Module, logits: Tensor, train: bool) -> Parts:
    """What is to be compared of a step that made ``logits``."""
    parts = {"logits": logits.detach()}
    if train:
        parts["gradients"] = gradients(model)
        for part in ("running_mean", "running_var"):
            buffers = (b.flatten() for name, b in sorted(model.named_buffers()) if name.endswith(part))
            parts[part] = torch.cat(list(buffers))
    return parts


def gradients(model: nn.Module) -> Tensor:
    """All of them in one vector, in the order of their names."""
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters(), key=lambda item: item[0])])


def step(settings: Settings, ours: str, name: str, train: bool = True) -> Record:
    """Against float64, beside stock's error."""
    dtype, stock = DTYPES[name], settings.speed_against[1]
    with without_tf32():
        truth, _ = made(settings, stock, torch.float32, train, exact=True)
        (theirs, _), (got, bodies) = (made(settings, who, dtype, train) for who in (stock, ours))
    results = []
    for part, exact in truth.items():
        off, their = error(got[part], exact), error(theirs[part], exact)
        results.append(Comparison(part, off, their, 2 * their + 8 * torch.finfo(dtype).eps))
    planned = bodies.all_planned(settings) if name == settings.autocast[0] else bodies.record()
    return verdict(results) | {"errors": {r.name: (r.ours, r.stock) for r in results}} | planned


def without_waiting(settings: Settings, ours: str) -> Record:
    """A planned training step while torch refuses every wait for the device."""
    device, contestant = torch.device(settings.device), entry(settings, ours)
    model = contestant.model(device, True)
    images = contestant.images(settings.batch, settings.size, device)
    parameters = list(model.parameters())
    dtype = DTYPES[settings.autocast[0]]
    for _ in range(WARM_UPS):
        enqueue(model, images, dtype, True, parameters)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with watched() as bodies:
            enqueue(model, images, dtype, True, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return bodies.all_planned(settings)


def captured(settings: Settings, ours: str) -> Record:
    """A planned training step, replayed from a CUDA graph, makes what an eager one makes."""
    device, contestant = torch.device(settings.device), entry(settings, ours)
    model = contestant.model(device, True)
    images = contestant.images(settings.batch, settings.size, device)
    parameters, dtype = list(model.parameters()), DTYPES[settings.autocast[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            logits = enqueue(model, images, dtype, True, parameters)
    torch.cuda.current_stream().wait_stream(stream)
    eager = {"logits": logits.detach().clone(), "gradients": gradients(model)}
    for parameter in parameters:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with watched() as bodies, torch.cuda.graph(graph):
        logits = enqueue(model, images, dtype, True)
    graph.replay()
    torch.cuda.synchronize()
    replayed = {"logits": logits.detach(), "gradients": gradients(model)}
    errors = {part: error(replayed[part], value) for part, value in eager.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= REPLAYED:
        raise Wrong(f"replayed {worst} are off by {errors[worst]:.2e} from the eager step's", **errors)
    return {"errors": errors} | bodies.all_planned(settings)
