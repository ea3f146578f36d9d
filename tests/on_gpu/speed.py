"""Seconds until a training step is enqueued and until it is done, and its peak of memory, of ours and of stock."""

import time
from functools import partial
from statistics import median

import torch

from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.steps import DTYPES, enqueue
from on_gpu.checks import Check, Record
from on_gpu.planning import watched
from on_gpu.settings import Settings

WARM_UPS = 3


def checks(settings: Settings) -> list[Check]:
    """One a competitor and batch; stock, for which cuDNN measures its algorithms at each, comes last."""
    ours_first = sorted(settings.speed_against, key=lambda who: not who.startswith("ours"))
    return [
        Check(f"{who}, batch {batch}", partial(timed, settings, who, batch))
        for who in ours_first
        for batch in settings.speed_batches
    ]


def timed(settings: Settings, competitor: str, batch: int) -> Record:
    """Medians over the rounds, the peak of one of them, and what of ours is planned."""
    device, entry = torch.device(settings.device), Entry(competitor, "channels_last", settings.network)
    dtype = DTYPES[settings.autocast[0]]
    torch.backends.cudnn.benchmark = True
    model, images = entry.model(device, True), entry.images(batch, settings.size, device)
    parameters = list(model.parameters())
    for _ in range(WARM_UPS):
        with watched() as bodies:
            enqueue(model, images, dtype, True, parameters)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    enqueued, finished = [], []
    for _ in range(settings.speed_rounds):
        start = time.perf_counter()
        enqueue(model, images, dtype, True, parameters)
        enqueued.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        finished.append(time.perf_counter() - start)
    return (bodies.all_planned(settings) if competitor.startswith("ours") else {}) | {
        "competitor": competitor,
        "batch": batch,
        "enqueue_s": median(enqueued),
        "finish_s": median(finished),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
