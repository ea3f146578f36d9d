"""The stem's and the head's op: derivatives, opcheck, batch normalisation's modes, what they save."""

import pytest
import torch
import torch.nn.functional as F

from densenet_fast import functional
from densenet_fast.backends.affine import accumulation_dtype
from densenet_fast.functional import BatchNorm
from helpers import error, make_norm, pack

SHAPES = [(2, 3, 5), (2, 3, 4, 7), (3, 3, 1, 2), (2, 3, 2, 3, 4)]
MODES = [dict(), dict(affine=False), dict(training=False), dict(tracked=False, training=False), dict(eps=0.3)]
RUNS = {"maxpool": functional.bn_relu_maxpool, "avgpool": functional.bn_relu_global_avgpool}
OPS = {
    kind: tuple(getattr(torch.ops.densenet_fast, name + end).default for end in ("", "_backward"))
    for kind, name in (("maxpool", "bn_relu_maxpool"), ("avgpool", "bn_relu_global_avgpool"))
}

both = pytest.mark.parametrize("kind", RUNS)


def stock(kind, x, n):
    x = F.relu(F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, not n.frozen, n.momentum or 0.0, n.eps))
    if kind == "avgpool":
        return x.flatten(2).mean(2)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3](x, 3, 2, 1)


def untracked(norm):
    """The normalisation without side effects, for many evaluations."""
    return norm if norm.frozen else norm._replace(running_mean=None, running_var=None, num_batches_tracked=None)


def parameters(norm):
    return [t for t in (norm.weight, norm.bias) if t is not None]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradcheck(kind, options, shape):
    norm = untracked(make_norm(3, **options))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        return RUNS[kind](x, norm)

    assert torch.autograd.gradcheck(run, (x, *parameters(norm)))
    assert torch.autograd.gradgradcheck(run, (x, *parameters(norm)), fast_mode=True)
    assert error(run(x), stock(kind, x, norm)) < 1e-13
    assert run(x).shape == stock(kind, x, norm).shape


@both
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options, dtype",
    [(options, dtype) for options in MODES[:4] for dtype in (torch.float64, torch.bfloat16)] + [({}, torch.float32)],
    ids=str,
)
def test_opcheck(kind, options, dtype, channels_last):
    """Every mode in the dtypes that differ from torch's default or from what sums are in; the value of epsilon makes no
    difference."""
    op, backward = OPS[kind]
    norm = make_norm(3, dtype=dtype, **options)
    x = torch.randn(2, 3, 5, 4).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    tensors, eps = pack([norm.stage()], x)
    options = (False, None) if kind == "maxpool" else (None,)
    known = (torch.zeros(3, dtype=accumulation_dtype(dtype)), torch.ones(3, dtype=accumulation_dtype(dtype)))
    for statistics in ((None, None), known, tuple(t.clone().requires_grad_() for t in known)):
        torch.library.opcheck(op, (x, *statistics, tensors, eps, *options))
    tensors = [t.detach() for t in tensors]
    out, *saved = op(x.detach(), None, None, tensors, eps, *options)
    saved = saved[: 4 if kind == "maxpool" else 3]
    for needs_x, apart in ((True, False), (True, True), (False, False)):
        needs = [needs_x, apart] + [t.numel() > 0 and i < 2 for i, t in enumerate(tensors)]
        arguments = (torch.randn(out.shape).to(dtype), x.detach(), *saved, tensors, eps, *options, needs)
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@both
@pytest.mark.parametrize("asked", range(8))
def test_only_gradients_asked_for_are_computed(kind, asked):
    norm, x = untracked(make_norm(3)), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    leaves = [x.requires_grad_(), *parameters(norm)]
    cotangent = torch.randn(RUNS[kind](x, norm).shape, dtype=torch.float64)
    complete = torch.autograd.grad(RUNS[kind](x, norm), leaves, cotangent)
    for i, t in enumerate(leaves):
        t.requires_grad_(bool(asked >> i & 1))
    chosen = [i for i in range(3) if asked >> i & 1]
    out = RUNS[kind](x, norm)
    assert out.requires_grad == bool(chosen)
    if chosen:
        some = torch.autograd.grad(out, [leaves[i] for i in chosen], cotangent)
        assert all(gradient.equal(complete[i]) for i, gradient in zip(chosen, some, strict=True))


@both
@pytest.mark.parametrize(
    "mode",
    [*MODES, dict(momentum=None), dict(momentum=0.7), dict(affine=False, momentum=None)],
    ids=str,
)
def test_running_statistics_follow_batch_norm(kind, mode):
    """Three steps against torch.nn.BatchNorm2d: values, running statistics, counter."""
    ours, tracked = make_norm(5, **mode), mode.get("tracked", True)
    norm = torch.nn.BatchNorm2d(5, momentum=mode.get("momentum", 0.1), track_running_stats=tracked).double()
    if tracked:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(norm, name).copy_(getattr(ours, name))
    norm.train(mode.get("training", True))
    for _ in range(3):
        x = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 2 + 1
        RUNS[kind](x, ours), norm(x)
    if tracked:
        assert error(ours.running_mean, norm.running_mean) < 1e-13
        assert error(ours.running_var, norm.running_var) < 1e-13
        assert ours.num_batches_tracked == norm.num_batches_tracked == (3 if ours.training else 0)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_ten_thousand_times_the_deviation(kind, dtype):
    """Errors against float64 at most twice stock's, where E[x^2] - E[x]^2 would leave no digit. All is above zero: one
    value that rounding takes to the ReLU's other side would outweigh every other error."""
    norm = make_norm(200, tracked=False)._replace(bias=torch.full((200,), 20.0, dtype=torch.float64))
    x = (torch.randn(4, 200, 9, 9, dtype=torch.float64) + (1e4 if dtype == torch.float32 else 32)).to(dtype)
    cotangent, results = None, []
    for run, working in ((stock, torch.float64), (stock, dtype), (lambda k, *args: RUNS[k](*args), dtype)):
        leaves = [t.detach().to(working).requires_grad_() for t in (x, norm.weight, norm.bias)]
        out = run(kind, leaves[0], BatchNorm(*leaves[1:]))
        cotangent = torch.randn(out.shape).to(dtype) if cotangent is None else cotangent
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(working))])
    for truth, theirs, mine in zip(*results):
        assert error(mine, truth) <= 2 * error(theirs, truth) + 4 * torch.finfo(dtype).eps


@both
def test_saved_are_the_input_and_vectors(kind):
    """And where the maxima were, a byte each."""
    norm = make_norm(16, dtype=torch.float32)
    x = torch.randn(2, 16, 12, 10).to(memory_format=torch.channels_last).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        RUNS[kind](x, norm)
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    others = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert all(t.untyped_storage().nbytes() <= 16 * 8 for t in others if t.dtype != torch.uint8)
    bytes_of_maxima = [t.untyped_storage().nbytes() for t in others if t.dtype == torch.uint8]
    assert bytes_of_maxima == ([2 * 16 * 6 * 5] if kind == "maxpool" else [])


@both
def test_output_may_be_changed_in_place(kind):
    results = []
    for run in (lambda k, *args: RUNS[k](*args), stock):
        norm = make_norm(3)._replace(weight=torch.ones(3).double(), bias=torch.ones(3).double())
        x = torch.linspace(-2, 3, 2 * 3 * 5 * 6, dtype=torch.float64).sin().view(2, 3, 5, 6).requires_grad_()
        run(kind, x, norm).mul_(3).square().sum().backward()
        results.append(x.grad)
    assert error(*results) < 1e-12


@both
def test_bitwise_the_same_from_run_to_run(kind):
    norm, x = untracked(make_norm(37, dtype=torch.float32)), torch.randn(4, 37, 40, 33, requires_grad=True)
    results = []
    for _ in range(2):
        out = RUNS[kind](x, norm)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        results.append([out, *torch.autograd.grad(out, [x, *parameters(norm)], cotangent)])
    assert all(a.equal(b) for a, b in zip(*results))


@both
def test_batched_cotangents(kind):
    norm, x = untracked(make_norm(3)), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs, out = [x, *parameters(norm)], RUNS[kind](x, norm)
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    together = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda c: torch.autograd.grad(out, inputs, c, retain_graph=True))(cotangents)
    for i in range(3):
        alone = torch.autograd.grad(out, inputs, cotangents[i], retain_graph=True)
        for a, b, c in zip(together, mapped, alone):
            assert error(a[i], c) < 1e-12 and error(b[i], c) < 1e-12


@both
def test_derivatives_are_partial_where_inputs_depend_on_each_other(kind):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        weight = x.mean((0, 2, 3)).square() + 1
        return RUNS[kind](x, BatchNorm(weight, weight))

    assert torch.autograd.gradcheck(run, x)
    cotangent = torch.randn(run(x).shape, dtype=torch.float64)
    first = [torch.autograd.grad(run(x), x, cotangent, create_graph=create)[0] for create in (False, True)]
    assert error(first[1], first[0]) < 1e-12


@both
def test_transforms_are_refused_not_answered_with_zeros(kind):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="torch.func transform|forward-mode"):
        torch.func.jvp(lambda z: RUNS[kind](z, BatchNorm()), (x,), (x,))
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda z: RUNS[kind](z, BatchNorm()).sum())(x)


@both
def test_tensors_of_any_strides(kind):
    vectors, x = torch.rand(3, 4), torch.randn(2, 3, 4, 4)
    norm = BatchNorm(vectors[:, 1], vectors[:, 2], vectors[:, 0], vectors[:, 3], training=False)
    same = BatchNorm(*(t.contiguous() for t in norm[:4]), training=False)
    results = []
    for n, strided in ((norm, torch.cat([x, x], 3)[..., ::2]), (same, torch.cat([x, x], 3)[..., ::2].contiguous())):
        leaf = strided.requires_grad_()
        y = RUNS[kind](leaf, n)
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    assert all(a.equal(b) for a, b in zip(*results))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_as_stock_does(kind, dtype):
    x, norm = torch.randn(2, 3, 4, 4).to(dtype), make_norm(3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert RUNS[kind](x, norm).dtype == stock(kind, x, norm).dtype == dtype


@both
def test_meta_tensors_give_the_shape(kind):
    norm, x = untracked(make_norm(3, affine=False)), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    output, real = RUNS[kind](x.to("meta"), norm), RUNS[kind](x, norm)
    assert (output.shape, output.stride(), output.dtype) == (real.shape, real.stride(), real.dtype)


def bad_calls():
    x, norm = torch.randn(2, 3, 4, 4, dtype=torch.float64), make_norm(3)
    yield "channels", x[:, :2], norm, RuntimeError, "norm: expected a normalisation weight of 2 channels"
    yield "dimensions", x[0, 0], norm, ValueError, "x: expected"
    yield "integers", x.long(), norm, RuntimeError, "floating"
    yield "dtype", x.float(), norm, RuntimeError, "a normalisation weight of torch.float32, got torch.float64"
    yield "device", x.to("meta"), norm, RuntimeError, "all tensors on meta, got cpu"
    yield "one value", x[:1, :, :1, :1], norm, ValueError, "more than 1 value"
    yield "empty", x[:0], norm, ValueError, "at least one value"
    yield "half of the statistics", x, norm._replace(running_var=None), ValueError, "running_mean and running_var"
    yield "eps", x, norm._replace(eps=0.0), ValueError, "eps"
    yield "kind", x, torch.nn.BatchNorm2d(3), TypeError, "BatchNorm"


@both
@pytest.mark.parametrize("x, norm, error_type, words", [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_bad_input_is_named(kind, x, norm, error_type, words):
    before = norm.running_mean.clone()
    with pytest.raises(error_type, match=words):
        RUNS[kind](x, norm)
    assert norm.num_batches_tracked == 0 and norm.running_mean.equal(before)
