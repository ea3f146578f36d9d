"""torch.compile: one graph without a break, in training and eval mode, for any batch size, equal to eager."""

import copy

import pytest
import torch
from integration.support import assert_close, images, ours, pair
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import assert_same, error

FUSED = ("bn_relu_maxpool", "dense_block", "bn_relu_conv1x1", "bn_relu_global_avgpool")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before, and nothing left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tiny(training, dtype=torch.float64, **options):
    return pair(dtype, training, block_config=(1, 1), **options)[0]


def results(model, x, run=None):
    """Output, gradients and buffers of one step of ``model``, run by ``run``."""
    torch.manual_seed(3)
    model.zero_grad()
    output = (model if run is None else run)(x)
    output.float().square().sum().backward()
    return (
        output,
        {n: p.grad.clone() for n, p in model.named_parameters()},
        {n: b.clone() for n, b in model.named_buffers()},
    )


@pytest.mark.parametrize(
    "training, options",
    [(True, dict(drop_rate=0.2)), (True, dict(memory_efficient=True)), (False, dict())],
    ids=["training", "memory_efficient", "eval"],
)
def test_one_graph_for_one_batch_size_and_one_more_for_all_others(training, options):
    model = tiny(training, **options)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, graphs in ((2, 1), (2, 1), (3, 2), (5, 2), (4, 2)):
        x = images(batch, 3, 40, 36)
        assert_close(results(model, x, compiled), results(eager, x))
        assert counter.frame_count == graphs, batch
    for graph in counter.graphs:
        assert all(f"densenet_fast.{name}" in graph.code for name in FUSED)


def test_a_batch_size_marked_as_dynamic_compiles_once():
    model = tiny(False)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 2, 7):
        x = images(batch, 3, 40, 36)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    """Its gradients are no further from the exact ones than eager's, by a half."""
    model = tiny(True, torch.float32)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    def step(x):
        with torch.autocast("cpu", dtype):
            return model(x)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    x = images(4, 3, 40, 36, dtype=torch.float32)
    got = results(model, x, compiled)
    with torch.autocast("cpu", dtype):
        expected = results(eager, x)
    assert got[0].dtype == dtype and counter.frame_count == 1
    assert_close(got[0], expected[0], 2e-2)
    truth = results(exact, x.double())[1]

    def distance(values):
        return sum(min(error(values[1][name], value), 1) for name, value in truth.items())

    assert distance(got) <= 1.5 * distance(expected)


def test_a_training_loop_compiled_with_its_loss_and_optimizer():
    losses = []
    model = tiny(True)
    for run in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

        def step(x, y, net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss

        step, generator = run(step), torch.Generator().manual_seed(0)
        losses.append(
            [step(torch.randn(5, 3, 40, 36, generator=generator).double(), torch.arange(5)).item() for _ in range(3)]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and losses[0][0] != losses[0][2]


@pytest.mark.library
def test_inductor():
    model = ours(block_config=(1,), small_inputs=True).double()
    eager = copy.deepcopy(model)
    assert_same(torch.compile(model, fullgraph=True), eager, images(2, 3, 9, 8), 1e-9)


def test_modules_compiled_one_by_one():
    """``module.compile()`` on blocks, as frameworks do that compile repeated parts."""
    got, expected = pair()
    for child in (got.features.denseblock1, got.features.transition1, got.features.denseblock2):
        child.compile(backend="aot_eager", fullgraph=True)
    assert_same(got, expected, images(), 1e-9)
