"""The memory of large tensors on CPUs, which is kept for the next ones."""

import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from densenet_fast.backends import extension
from densenet_fast.backends.cpu import LARGE, cpu

pytestmark = [
    pytest.mark.library,
    pytest.mark.skipif(sys.platform != "linux" or extension.unavailable() is not None, reason="not Linux's library"),
]

LIKE = torch.empty(0, device="cpu")


def large(size=LARGE // 4):
    return cpu.empty(LIKE, (size,), (1,))


def test_a_tensor_gets_the_smallest_gap_that_is_large_enough():
    first, second, third = large(), large(3 * LARGE // 4), large()
    below, between = first.data_ptr(), second.data_ptr()
    del first, second
    assert large(2 * LARGE // 4).data_ptr() == below
    kept = large()
    assert kept.data_ptr() == below and third.data_ptr() > between
    assert large(3 * LARGE // 4).data_ptr() == between


def test_dtype_size_and_strides_are_as_asked():
    for dtype in (torch.float32, torch.bfloat16):
        made = cpu.empty(LIKE.to(dtype), (2, LARGE, 1, 3), (3 * LARGE, 1, LARGE, LARGE))
        assert (made.dtype, made.shape) == (dtype, (2, LARGE, 1, 3)) and not made._is_view()
        assert made.stride() == (3 * LARGE, 1, LARGE, LARGE) and made.data_ptr() % 64 == 0


def work(seed):
    """Keeps some tensors at a time, each full of its own number. Returns whether all kept theirs."""
    at_random, held = random.Random(seed), []
    for number in range(60):
        held.append((number, large(at_random.randint(LARGE // 4, LARGE)).fill_(number)))
        if len(held) > 6:
            of, tensor = held.pop(at_random.randrange(len(held)))
            if not torch.equal(tensor, torch.full_like(tensor, of)):
                return False
    return True


def test_tensors_of_several_threads_do_not_overlap():
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_tensor_may_outlive_the_one_that_made_it():
    tensor = large().fill_(3)
    view, shared = tensor[5:7], tensor.clone().share_memory_()
    del tensor
    assert view.tolist() == [3, 3] and large().fill_(4).sum() == LARGE and view.tolist() == [3, 3]
    assert shared[0] == 3


def in_a_process(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_kernels_work_in_the_gaps():
    code = """if True:
        import torch
        from densenet_fast.backends.cpu import LARGE, cpu
        from densenet_fast.backends import extension
        from densenet_fast.backends.affine import Affine
        from densenet_fast.memory import PeakMemory
        assert extension.unavailable() is None
        torch.set_num_threads(2)
        x, grad, weight = torch.randn(1152, 128), torch.randn(1152, 32), torch.randn(32, 128, 3, 3, 3)
        arguments = (grad, x, Affine(*torch.rand(3, 128)), weight, (2, 4, 12, 12), None)
        made = [cpu.empty(x, (LARGE,), (1,)).fill_(1) for _ in range(9)]
        cpu.bn_relu_conv3x3_backward(*arguments, need_weight=True)
        for gaps in (0, 8):
            del made[:gaps]
            memory = PeakMemory(x.device)
            cpu.bn_relu_conv3x3_backward(*arguments, need_weight=True)
            print(memory.read().added)
    """
    without, within = map(int, in_a_process(code, MALLOC_MMAP_THRESHOLD_="65536").split())
    assert within < without / 2


def test_the_system_may_take_what_no_tensor_needs():
    code = f"""if True:
        import torch
        from densenet_fast.backends.cpu import cpu
        from densenet_fast.backends import extension
        assert extension.unavailable() is None
        made = cpu.empty(torch.empty(0), ({16 * LARGE},), (1,)).fill_(1)
        del made
        print(open("/proc/self/smaps_rollup").read())
    """
    assert int(re.search(r"LazyFree: +(\d+) kB", in_a_process(code))[1]) * 1024 >= 48 * LARGE


def test_between_layers_of_torch_the_system_gets_what_is_free():
    code = f"""if True:
        import os, torch
        from densenet_fast.backends.cpu import cpu
        from densenet_fast.backends import extension
        assert extension.unavailable() is None

        nothing, torchs = torch.empty(0), torch.empty({LARGE})

        def made(bytes, like=nothing, kept=True):
            return cpu.empty(like, (bytes // 4,), (1,), kept=kept).fill_(1)

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

        first, gap, other, second = made({LARGE}, torchs), made({64 * LARGE}), made({LARGE}), made({64 * LARGE}, torchs)
        used = [resident()]
        del gap
        used.append(resident())
        del second
        used.append(resident())
        gap = made({64 * LARGE}, first), made({64 * LARGE}, torchs, kept=False)
        del gap
        used.append(resident())
        del first
        print(*used, resident(), other.sum().item() * 4)
    """
    *used, other = map(float, in_a_process(code).split())
    one_freed, both_freed, used_again, last_freed = (n - used[0] for n in used[1:])
    assert one_freed > -8 * LARGE and both_freed < -100 * LARGE and other == LARGE
    assert used_again > both_freed + 100 * LARGE and last_freed > used_again - 8 * LARGE


def test_so_a_block_between_layers_of_torch_ends():
    code = """if True:
        import os, torch
        from densenet_fast import nn
        from densenet_fast.backends import extension
        assert extension.unavailable() is None

        def resident(grad):
            used.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE"))

        used, first, second = [], nn.DenseBlock(2, 16, growth_rate=16), nn.DenseBlock(4, 48, growth_rate=32)
        x = torch.nn.functional.avg_pool2d(first(torch.randn(4, 16, 128, 128)), 2)
        made = second(x)
        made.register_hook(resident), x.register_hook(resident)
        made.sum().backward()
        print(*used)
    """
    before, behind = map(int, in_a_process(code).split())
    assert behind < before


def test_where_addresses_are_limited_torch_serves():
    code = f"""if True:
        import resource, torch
        from densenet_fast.backends.cpu import cpu
        from densenet_fast.backends import extension
        assert extension.unavailable() is None
        resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY))
        print(cpu.empty(torch.empty(0), ({LARGE},), (1,)).fill_(1).sum().item())
    """
    assert float(in_a_process(code)) == LARGE
