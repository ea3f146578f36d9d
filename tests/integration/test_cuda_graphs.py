"""CUDA graphs, by hand and by torch.compile: no operation waits for the host."""

import copy

import pytest
import torch
from integration.support import assert_close, images, pair

pytestmark = pytest.mark.usefixtures("gpu")

TOLERANCE = 1e-3


def case(memory_efficient):
    model = pair(torch.float32, memory_efficient=memory_efficient)[0].cuda().to(memory_format=torch.channels_last)
    batches = [images(4, 3, 40, 36, dtype=torch.float32).cuda() for _ in range(3)]
    return model, batches


def eager(model, x):
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return output.detach().clone(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_make_graphed_callables(memory_efficient):
    model, batches = case(memory_efficient)
    plain = copy.deepcopy(model).eval()
    graphed = torch.cuda.make_graphed_callables(model.eval(), (batches[0].clone(),))
    for x in batches:
        assert_close(eager(graphed, x), eager(plain, x), TOLERANCE)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_captured_training_step(memory_efficient):
    """Forward, backward and running statistics; replayed on other images."""
    model, batches = case(memory_efficient)
    plain = copy.deepcopy(model)
    x = batches[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    state = copy.deepcopy(model.state_dict())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(x)
        output.square().sum().backward()
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        got = output.clone(), {name: p.grad.clone() for name, p in model.named_parameters()}
        assert_close(got, eager(plain, batch), TOLERANCE)
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), TOLERANCE)


def test_no_host_synchronisation():
    """A training step, with torch set to refuse every wait for the device."""
    model, batches = case(False)
    eager(model, batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batches[1]).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("training", [True, False])
def test_reduce_overhead(training):
    torch.compiler.reset()
    model, batches = case(False)
    plain = copy.deepcopy(model.train(training))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for x in [*batches, *batches]:
        torch.compiler.cudagraph_mark_step_begin()
        assert_close(eager(compiled, x)[0], eager(plain, x)[0], TOLERANCE)
    torch.compiler.reset()
