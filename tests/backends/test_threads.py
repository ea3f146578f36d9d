"""The compiled kernels in data loader workers, in forked processes and from several threads at once."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import densenet_fast


def trained(seed: int) -> torch.Tensor:
    """All gradients of one training step of a small network."""
    torch.manual_seed(0)
    model = densenet_fast.DenseNet(8, (2, 2), 12, num_classes=5)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
    model(images).logsumexp(1).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Steps(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return trained(i)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_data_loader_workers(context, threads):
    threads(1)
    expected = [trained(i) for i in range(4)]
    threads(2)
    trained(0)  # the parent's pool has run when the workers are forked
    loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for got, one_thread in zip(loader, expected):
        assert got.equal(one_thread)


def _send(connection, seed):
    torch.set_num_threads(1)
    connection.send(trained(seed).tolist())


def test_after_fork(threads):
    threads(2)
    trained(0)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, 3))
    process.start()
    assert ours.poll(120), "the forked process hangs"
    got = torch.tensor(ours.recv())
    process.join()
    threads(1)
    assert got.equal(trained(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_several_threads_at_once(dtype):
    expected = [_gradients(i, dtype) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for got, alone in zip(pool.map(lambda i: _gradients(i, dtype), range(6)), expected):
            assert got.equal(alone)


def _gradients(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """As :func:`trained`, of a block alone and without the process-wide generator."""
    generator = torch.Generator().manual_seed(seed)
    block = densenet_fast.nn.DenseBlock(3, 12, growth_rate=8)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    block.to(dtype)
    x = torch.randn(2, 12, 19, 23, generator=generator).to(dtype).requires_grad_()
    y = block(x)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    return torch.cat([t.grad.flatten() for t in (x, *block.parameters())])


def test_the_number_of_threads_changes_rounding_alone(threads):
    threads(1)
    one = trained(1)
    assert one.equal(trained(1))
    for count in (2, 5):
        threads(count)
        several = trained(1)
        assert several.equal(trained(1))
        assert (several - one).norm() < 1e-4 * one.norm()
