"""nn.DataParallel: its replicas, whose parameters are plain tensors, compute what the model does."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from integration.support import assert_close, images, pair
from torch import Tensor, nn

import densenet_fast
from densenet_fast.functional import chain


def replicate(model: nn.Module, copies: int) -> list[nn.Module]:
    """What ``torch.nn.parallel.replicate`` makes, on one device: shallow copies of every module, whose parameters are
    differentiable copies of the model's; the first shares the model's buffers, as on the first GPU."""
    replicas = []
    for i in range(copies):
        made = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in made.items():
            for name, child in module._modules.items():
                setattr(replica, name, made[child])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.clone())
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer if i == 0 else buffer.clone()
        replicas.append(made[model])
    return replicas


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    replicas = replicate(model, 2)
    with ThreadPoolExecutor(2) as threads:
        output = torch.cat(list(threads.map(lambda replica, part: replica(part), replicas, x.split([3, 2]))))
    output.square().sum().backward()
    return output, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_replicas_in_threads_equal_stocks(training, memory_efficient, monkeypatch):
    calls = []
    for name in ("TRANSITION", "HEAD"):
        fused = getattr(chain, name)
        monkeypatch.setattr(chain, name, lambda *args, fused=fused: (calls.append(1), fused(*args))[1])
    x = images(5, 3, 40, 36)
    assert_close(*(step(model, x) for model in pair(training=training, memory_efficient=memory_efficient)))
    assert len(calls) == 4


def test_a_replica_keeps_no_parameters_of_its_own():
    model, _ = pair()
    (replica,) = replicate(model, 1)
    assert not list(replica.parameters())
    assert all(row.fused for row in densenet_fast.explain(replica))


def test_without_a_gpu_it_is_the_model():
    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU")
    model, _ = pair(training=False)
    parallel, x = nn.DataParallel(copy.deepcopy(model)), images()
    assert parallel(x).equal(model(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nn.DataParallel over two GPUs: needs two")
@pytest.mark.parametrize("training", [True, False])
def test_on_two_gpus(training, gpu):
    results, x = [], images(6, 3, 40, 36, dtype=torch.float32).cuda()
    for model in pair(torch.float32, training):
        parallel = nn.DataParallel(model.cuda(), [0, 1])
        output = parallel(x)
        output.square().sum().backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_close(*results, tolerance=1e-3)
