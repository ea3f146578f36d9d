"""Plans of kernels in Triton and CUDA C++, launch by launch on CPUs. ``test_plan.py`` runs this file in Triton's
interpreter and with the emulated library."""

import itertools
import threading

import pytest
import torch

from backends.plan.bodies import equal, inputs_of, layer, native
from backends.triton.cases import LAYERS
from densenet_fast.backends import cuda_kernels, plan
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine
from densenet_fast.backends.recording import Native, tensors_in
from densenet_fast.backends.symbolic import Unplannable

CPU = torch.device("cpu")


def test_the_emulated_library_is_loaded():
    assert cuda_kernels.emulated() and backend.interpreted()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [LAYERS[0], LAYERS[3]], ids=str)
def test_a_plan_makes_what_its_body_makes(sizes, dtype):
    """Also where nothing but what a launch needs is in the arena, and on other tensors than those it was made with."""
    made = plan.make(layer, inputs_of(*sizes, dtype), CPU)
    assert sum(isinstance(step, Native) for step in made.steps) >= 4 and len(made.steps) >= 12
    inputs = inputs_of(*sizes, dtype)
    expected = layer(*inputs)
    assert equal(made.interpret(inputs), expected)
    assert equal(made.interpret(inputs, poison=True), expected)


def test_the_arena_is_smaller_than_what_it_holds():
    made = plan.make(layer, inputs_of(*LAYERS[0], torch.float32), CPU)
    assert 0 < made.arena_bytes < sum(lifetime.size for lifetime in made.lifetimes)


def test_a_shortened_lifetime_is_found(monkeypatch):
    """By poison: whatever temporary is taken for dead one launch too early."""
    inputs = inputs_of(*LAYERS[2], torch.float32)
    expected = layer(*inputs)
    made = plan.make(layer, inputs, CPU)
    long = [i for i, lifetime in enumerate(made.lifetimes) if lifetime.end > lifetime.first + 1]
    assert len(long) > 5
    for i in long:
        lifetimes = list(made.lifetimes)
        lifetimes[i] = lifetimes[i]._replace(end=lifetimes[i].end - 1)
        monkeypatch.setattr(made, "lifetimes", lifetimes)
        assert not equal(made.interpret(inputs, poison=True), expected), lifetimes[i]
        monkeypatch.undo()


def test_results_that_share_memory_share_it():
    made = plan.make(layer, inputs_of(*LAYERS[0], torch.float32), CPU)
    *_, (sum_d, sum_dz, *_), _ = made.interpret(inputs_of(*LAYERS[0], torch.float32))
    assert sum_d.untyped_storage().data_ptr() == sum_dz.untyped_storage().data_ptr()
    assert len(made.outputs) < len(list(tensors_in(made.interpret(inputs_of(*LAYERS[0], torch.float32)))))


@pytest.mark.parametrize("form", [list, tuple, lambda made: made[0], lambda made: (made[0], [None, *made[1:]], None)])
def test_results_keep_their_form(form):
    def body(x):
        return form(native(x, None))

    x = torch.randn(6, 5)
    made = plan.make(body, [x], CPU)
    assert equal(made.interpret([x]), body(x)) and equal(made.run([x]), body(x))


def test_a_repeated_input_may_be_two():
    def body(x, y):
        return [*native(x, None), *native(y, None)]

    x, y = torch.randn(6, 5), torch.randn(6, 5)
    for given, used in itertools.product([[x, x], [x, y]], repeat=2):
        assert equal(plan.make(body, given, CPU).interpret(used), body(*used))
    assert plan.cached("repeated", body, [x, x]) is plan.cached("repeated", body, [x, y])


def test_kinds_of_calls_by_turns():
    def body(x):
        return native(x, None)

    for rows, is_first in [(6, True), (6, False), (9, True), (6, False), (9, False), (9, False), (6, False)]:
        x = torch.randn(rows, 5)
        made = plan.run("by turns", body, [x])
        assert made is plan.FIRST if is_first else equal(made, body(x))


X = torch.randn(6, 5)


@pytest.mark.parametrize(
    "body, reason",
    [
        (lambda x: x + 1, "aten.add.Tensor"),
        (lambda x: torch.empty_like(x).zero_(), "aten.zero_"),
        (lambda x: x.t().contiguous(), "aten.clone"),
        (lambda x: native(x, None)[0].sum(), "aten.sum"),
        (lambda x: x.view(-1), "a result is an input or a view of one"),
        (lambda x: native(X, None), "cuda_append_features.default takes a tensor that was made elsewhere"),
        (lambda x: backend.bn_relu_conv1x1(x, Affine(*X[:3]), x, None, torch.empty(6, 6), None), "made elsewhere"),
        (lambda x: native(x.to(torch.int64), None), "aten._to_copy"),
        (lambda x: native(x.view(6, 5, 1), torch.empty(6, 5, 2, dtype=torch.bool)), "expected .6, 5, 1"),
    ],
)
def test_what_cannot_be_planned_is_told(body, reason):
    with pytest.raises(Unplannable, match=reason):
        plan.make(body, [X], CPU)


def test_nothing_is_launched_while_a_plan_is_made():
    """Nor read: a stand-in has no memory."""
    out = X.new_full(X.shape, 3.0)
    made = plan.make(lambda x, out: cuda_kernels.append_features(x, out, None), [X, out], CPU)
    assert torch.equal(out, torch.full_like(out, 3.0))
    made.run([X, out])
    assert torch.equal(out, X)


def test_replays_of_one_plan_at_the_same_time():
    """From several threads, on inputs of their own."""
    inputs = [[torch.randn(70, 33), torch.rand(70, 33) > 0.5] for _ in range(4)]
    made = plan.make(native, inputs[0], CPU)
    expected, wrong = [native(*each) for each in inputs], []

    def replay(given, result):
        for _ in range(30):
            if not equal(made.run(given), result):
                wrong.append(given)

    threads = [threading.Thread(target=replay, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_inputs_are_refused():
    x, mask = torch.randn(70, 33), torch.rand(70, 33) > 0.5
    made = plan.make(native, [x, mask], CPU)
    assert equal(made.run([x, mask]), native(x, mask))
    shifted = torch.empty(70 * 33 + 1)[1:].view(70, 33)
    others = [x[:69], x.double(), torch.randn(33, 70).t(), shifted]
    for other in others:
        assert made.run([other, mask]) is None
    assert made.run([x]) is None


def test_what_is_kept():
    x, calls = torch.randn(6, 5), []

    def body(x, scale):
        calls.append(scale)
        return native(x, None) if scale is not None else x + 1

    def cached(x, scale):
        return plan.cached("kept", body, [x, scale])

    first = cached(x, 1.0)
    assert isinstance(first, plan.Plan) and cached(torch.randn(6, 5), 1.0) is first and len(calls) == 1
    for other in (cached(x, 1), cached(x, True), cached(x[:5], 1.0), cached(x.half(), 1.0)):
        assert isinstance(other, plan.Plan) and other is not first
    assert len(calls) == 5
    refused = cached(x, None)
    assert isinstance(refused, Unplannable) and "aten.add" in str(refused) and cached(x, None) is refused
    assert len(calls) == 6
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if before != "tf32" else "ieee"
    try:
        assert cached(x, 1.0) is not first
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_the_oldest_go(monkeypatch):
    monkeypatch.setattr(plan, "LIMIT", 3)
    first = [plan.cached("old", native, [torch.randn(rows, 5), None]) for rows in range(1, 6)]
    again = [plan.cached("old", native, [torch.randn(rows, 5), None]) for rows in (5, 4, 3, 2)]
    assert [one is other for one, other in zip(first[:0:-1], again)] == [True, True, True, False]
