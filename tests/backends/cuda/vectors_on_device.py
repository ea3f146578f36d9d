"""What the CUDA kernels do on vectors and weights: on a GPU if there is one, else emulated on CPU tensors.

Run as ``on_device.py`` is; the truth is ``aten``'s.
"""

import itertools
import math

import pytest
import torch

from backends.cuda.on_device import (
    DTYPES,
    EPS,
    Case,
    by_dtype,
    close,
    column_range,
    default_device,  # noqa: F401
    empty_statistics,
    rounding,
)
from backends.cuda.running_on_device import MOMENTA, normalisations, wide_of
from densenet_fast.backends import aten
from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Affine, Job, Reader, Update, accumulation_dtype

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))

GRID = (2, 5, 7)
COLUMNS = [(24, 8, 40), (33, 8, 41), (5, 1, 7), (1, 2, 5)]
by_columns = pytest.mark.parametrize("columns", COLUMNS, ids=str)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def passes(case):
    """Every kernel that takes an affine, on one case, as functions of the affine."""
    out, argmax = kernels.bn_relu_maxpool(case.x, case.affine, case.grid, None)
    by_maxima = column_range(out.shape[0], (case.cols, 0, case.cols), case.dtype)[0]
    by_image = column_range(case.grid[0], (case.cols, 0, case.cols), case.dtype)[0]
    return {
        "maxpool": lambda affine: kernels.bn_relu_maxpool(case.x, affine, case.grid, None),
        "maxpool_backward": lambda affine, reader=None: kernels.bn_relu_maxpool_backward(
            by_maxima, argmax, case.x, affine, case.grid, reader
        ),
        "avgpool": lambda affine: (kernels.bn_relu_global_avgpool(case.x, affine, case.grid),),
        "avgpool_backward": lambda affine, reader=None: kernels.bn_relu_global_avgpool_backward(
            by_image, case.x, affine, case.grid, reader
        ),
    }


def flat(result):
    return [t for part in result for t in (part if isinstance(part, tuple) else (part,))]


def affine_of(case, narrow_bias, narrow_weight):
    """With a weight; narrow vectors are of the matrix's dtype."""
    weight, bias = torch.randn(2, case.cols).to(case.dtype).unbind()
    wide = accumulation_dtype(case.dtype)
    bias, weight = bias if narrow_bias else bias.to(wide), weight if narrow_weight else weight.to(wide)
    return Affine(case.affine.mean, case.affine.rstd.abs() + 0.5, bias, weight)


@pytest.mark.parametrize("narrow_weight", [False, True])
@pytest.mark.parametrize("narrow_bias", [False, True])
@by_columns
@by_dtype
def test_weight_and_bias_of_either_dtype_are_those_of_the_scale(dtype, columns, narrow_bias, narrow_weight):
    case = Case(GRID, columns, dtype)
    affine = affine_of(case, narrow_bias, narrow_weight)
    folded = Affine(affine.mean, affine.scale, affine.bias.to(affine.mean.dtype))
    for name, run in passes(case).items():
        assert all(a.equal(b) for a, b in zip(flat(run(affine)), flat(run(folded)), strict=True)), name
    assert not passes(case)["avgpool"](affine)[0].equal(passes(case)["avgpool"](affine._replace(weight=None))[0])


def reader_of(case, before, grad_dtype):
    """One that asks for everything, what is around its vectors NaN, and the memory they are columns of."""
    wide = accumulation_dtype(case.dtype)
    memory = [torch.full((4, case.cols + 6), torch.nan, dtype=d) for d in (wide, grad_dtype)]
    p, q, weight, bias = (memory[i // 2][i, 3 : 3 + case.cols] for i in range(4))
    given = tuple(torch.randn(2, case.cols).to(wide).unbind())
    if before == "after":
        p.copy_(given[0]), q.copy_(given[1])
    reader = Reader({"given": given, "after": (p, q), "none": None}[before], (p, q), weight, bias)
    return reader, (torch.zeros_like(given[0]),) * 2 if before == "none" else given, memory


@pytest.mark.parametrize("kernel", ["maxpool_backward", "avgpool_backward"])
@pytest.mark.parametrize("before", ["given", "after", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@by_columns
@by_dtype
def test_a_reader_gets_what_it_asks_for(dtype, columns, weighted, before, kernel):
    case = Case(GRID, columns, dtype)
    affine = affine_of(case, True, True) if weighted else case.affine
    run = passes(case)[kernel]
    scaled, (sum_d, sum_dx) = run(affine)
    for grad_dtype in (accumulation_dtype(dtype), dtype):
        reader, (p, q), memory = reader_of(case, before, grad_dtype)
        again, sums = run(affine, reader)
        assert sums is None and again.equal(scaled)
        scale, rstd = affine.scale.double(), affine.rstd.double()
        part_p, part_q = scale * sum_d.double(), scale * rstd**2 * sum_dx.double() / 2
        wide, narrow = rounding(sum_d.dtype), rounding(grad_dtype)
        assert close(reader.after[0], p - part_p, 2 * wide, p.abs() + part_p.abs())
        assert close(reader.after[1], q - part_q, 2 * wide, q.abs() + part_q.abs())
        assert close(reader.weight, rstd * sum_dx.double(), narrow + wide)
        assert reader.bias.equal(sum_d.to(grad_dtype))
        written = memory[0][:2].isnan().sum() + memory[1][2:].isnan().sum()
        assert written == 24 and memory[0][2:].isnan().all()


@pytest.mark.parametrize("kernel", ["maxpool_backward", "avgpool_backward"])
@by_dtype
def test_a_reader_writes_nothing_that_it_does_not_ask_for(dtype, kernel):
    case = Case(GRID, COLUMNS[1], dtype)
    run = passes(case)[kernel]
    scaled, (sum_d, _) = run(case.affine)
    full, _, _ = reader_of(case, "none", dtype)
    run(case.affine, full)
    for kept in itertools.product([False, True], repeat=3):
        reader, _, memory = reader_of(case, "none", dtype)
        asked = [v if keep else None for v, keep in zip(reader[1:], kept)]
        assert run(case.affine, Reader(None, *asked))[0].equal(scaled)
        for field, vector, keep in zip(Reader._fields[1:], reader[1:], kept):
            expected = getattr(full, field)
            for got, value in zip(vector, expected) if field == "after" else [(vector, expected)]:
                assert got.equal(value) if keep else got.isnan().all(), field


@pytest.mark.parametrize("kernel", ["maxpool_backward", "avgpool_backward"])
def test_nan_reaches_what_a_reader_asks_for(kernel):
    case = Case(GRID, COLUMNS[0], torch.float32)
    case.x[3, 5] = torch.nan
    reader, _, _ = reader_of(case, "given", torch.float32)
    passes(case)[kernel](case.affine, reader)
    for vector in (reader.after[1], reader.weight):
        assert vector.isnan().nonzero().flatten().tolist() == [5]
    assert not reader.after[0].isnan().any() and not reader.bias.isnan().any()


def test_wrong_readers_raise():
    case = Case(GRID, COLUMNS[0], torch.bfloat16)
    run, vector = passes(case)["maxpool_backward"], torch.zeros(24)
    none = Reader(None, None, None, None)
    for field, value, message in [
        ("after", (vector, vector[:3]), "bn_relu_maxpool_backward: q: expected 24 contiguous float32"),
        ("after", (vector.bfloat16(), vector), "p: expected 24 contiguous float32"),
        ("before", (vector[:3], vector), "p_before: expected 24"),
        ("before", (vector, vector.double()), "q_before: expected 24"),
        ("after", (vector, None), "p and q: expected both or neither"),
        ("weight", vector.long(), "grad_weight: expected float32, float64, float16 or bfloat16"),
        ("bias", torch.zeros(48)[::2], "grad_bias: expected 24 contiguous values"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(case.affine, none._replace(**{field: value}))


def numbers(*sizes, dtype):
    return torch.randn(*sizes).mul(1e3).to(dtype)


def permuted(*order):
    """A weight whose memory has its dimensions in this order."""

    def make(sizes, dtype):
        order_of = [d for d in order if d < len(sizes)]
        made = numbers([sizes[d] for d in order_of], dtype=dtype)
        return made.permute([order_of.index(d) for d in range(len(sizes))])

    return make


def part_of_a_larger_one(sizes, dtype):
    return numbers([n + 3 for n in sizes], dtype=dtype)[tuple(slice(1, n + 1) for n in sizes)]


LAYOUTS = {
    "contiguous": permuted(0, 1, 2, 3, 4),
    "channels last": permuted(0, 2, 3, 4, 1),
    "taps first": permuted(4, 2, 3, 0, 1),
    "transposed taps": permuted(0, 1, 4, 3, 2),
    "part of a larger one": part_of_a_larger_one,
    "one value": lambda sizes, dtype: numbers((), dtype=dtype).expand(sizes),
}
SIZES = [
    (),
    (7,),
    (300,),
    (5, 33),
    (33, 24, 1, 1),
    (5, 24, 3),
    (7, 5, 3, 3),
    (3, 2, 3, 5, 4),
    (1, 3, 3, 3),
    (4, 1, 3, 3),
]


def targets(sizes, dtype):
    """Dense ones, all NaN."""
    yield torch.full(sizes, torch.nan, dtype=dtype)
    if len(sizes) > 2:
        yield torch.full((sizes[0], *sizes[2:], sizes[1]), torch.nan, dtype=dtype).movedim(-1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_copies_of_every_layout_and_dtype_are_torchs(sizes, layout):
    """All in one call: more jobs than one launch takes."""
    jobs = []
    for source_dtype, target_dtype in itertools.product(DTYPES, DTYPES):
        source = LAYOUTS[layout](sizes, source_dtype)
        jobs += [Job("copy", target, source) for target in targets(sizes, target_dtype)]
    assert len(jobs) == 16 * (2 if len(sizes) > 2 else 1)
    jobs = jobs * 3
    kernels.prepare(jobs)
    for job in jobs:
        assert same(job.target, job.source.to(job.target.dtype)), (job.source.dtype, job.target.dtype)


def test_copies_of_every_size_of_number_are_torchs():
    values = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-310, 1e-42, 6e-8, 65519.9, 65520.0, 3.4e38, 1e300]
    )
    values = torch.cat([values.double(), torch.randn(500, dtype=torch.float64) * 2.0 ** torch.randint(-30, 20, (500,))])
    pairs = itertools.product(DTYPES, DTYPES)
    jobs = [Job("copy", torch.empty(len(values), dtype=to), values.to(of)) for of, to in pairs]
    kernels.prepare(jobs)
    for job in jobs:
        expected = job.source.to(job.target.dtype)
        assert same(job.target, expected) and job.target.signbit()[1:].equal(expected.signbit()[1:])


@by_dtype
def test_rstd_is_that_of_the_statistics(dtype):
    """Bit by bit, from a variance of any dtype, which aten's is but for rounding."""
    case = Case(GRID, (300, 4, 308), dtype)
    _, statistics = empty_statistics(300, dtype)
    kernels.channel_statistics(case.x, statistics)
    wide = accumulation_dtype(dtype)
    variances = [statistics.var, statistics.var.to(dtype), statistics.var.double(), statistics.var.half()]
    jobs = [Job("rstd", torch.empty(300, dtype=wide), var, EPS) for var in variances]
    jobs.append(Job("rstd", torch.empty(300, dtype=wide), statistics.var, 0.5))
    kernels.prepare(jobs)
    assert jobs[0].target.equal(statistics.rstd)
    for job in jobs:
        truth = (job.source.to(wide).double() + job.eps).rsqrt()
        assert torch.allclose(job.target.double(), truth, rtol=rounding(wide), atol=0)
    by_aten = [job._replace(target=torch.empty_like(job.target)) for job in jobs]
    aten.prepare(by_aten)
    assert all(close(a.target, b.target, rounding(wide)) for a, b in zip(jobs, by_aten))


def test_jobs_of_all_kinds_and_their_surroundings():
    """Hundreds at once; nothing but the targets is written, and aten does the same."""

    def made(module):
        torch.manual_seed(0)
        memory = torch.full((200, 3, 70), torch.nan)
        jobs = []
        for i in range(200):
            n = 1 + 7 * i % 61
            copied, rstd, zero = memory[i, :, 2 : 2 + n]
            jobs.append(Job("copy", copied, torch.randn(n).bfloat16()))
            jobs.append(Job("rstd", rstd, torch.rand(n), 10.0 ** -(i % 5)))
            jobs.append(Job("zero", zero))
        module.prepare(jobs)
        return memory, sum(job.target.numel() for job in jobs)

    got, written = made(kernels)
    expected, _ = made(aten)
    assert got.isnan().equal(expected.isnan()) and (~got.isnan()).sum() == written
    assert close(got.nan_to_num(), expected.nan_to_num(), rounding(torch.float32)) and got[:, 2, 2].eq(0).all()


@by_dtype
def test_zeros_of_every_layout(dtype):
    dense = [t for sizes in [(5,), (2, 300), (7, 5, 3, 3), (3, 2, 3, 5, 4)] for t in targets(sizes, dtype)]
    kernels.prepare([Job("zero", t) for t in dense])
    assert all(t.eq(0).all() for t in dense) and len(dense) == 6


@pytest.mark.parametrize("module", [kernels, aten], ids=["cuda", "aten"])
def test_nothing_to_do(module):
    module.prepare([])
    module.prepare([Job("copy", torch.empty(0), torch.empty(0)), Job("zero", torch.empty(3, 0))])
    module.update_running_statistics([Update([], torch.zeros(3), torch.zeros(3), 5)])
    with pytest.raises(ValueError, match=r"kind: expected copy, rstd or zero, got \['sqrt'\]"):
        module.prepare([Job("sqrt", torch.zeros(3), torch.zeros(3))])


def test_wrong_jobs_raise():
    vector, weight = torch.zeros(4), torch.zeros(4, 3, 2, 2)
    bad = [
        (Job("copy", vector, vector[:3]), r"source: expected \[4\] of up to 5 dimensions, got \[3\]"),
        (Job("copy", vector, vector.long()), "source: expected float32, float64, float16 or bfloat16"),
        (Job("copy", vector.bool(), vector), "expected float32, float64, float16 or bfloat16"),
        (Job("copy", torch.zeros(8)[::2], vector), r"target: expected contiguous or channels last memory, got \[4\]"),
        (Job("copy", weight.mT, weight.mT), "target: expected contiguous or channels last memory"),
        (Job("copy", torch.zeros([1] * 6), torch.zeros([1] * 6)), "source: expected .* of up to 5 dimensions"),
        (Job("copy", torch.zeros(1, 1, 256), torch.zeros(1, 1, 256)), "source: expected up to 255 taps"),
        (Job("rstd", vector.half(), vector), "target: expected float32 or float64 for an rstd"),
        (Job("zero", torch.zeros(8)[::2]), "target: expected contiguous or channels last memory"),
    ]
    for job, message in bad:
        with pytest.raises(RuntimeError, match=message):
            kernels.prepare([job])


def test_equal_inputs_give_equal_bits():
    results = []
    for _ in range(10):
        torch.manual_seed(0)
        running = normalisations(DTYPES, MOMENTA, 90)
        kernels.update_running_statistics([Update(running, torch.randn(90), torch.rand(90), 35)])
        case = Case(GRID, COLUMNS[1], torch.bfloat16)
        reader, _, _ = reader_of(case, "after", torch.bfloat16)
        passes(case)["maxpool_backward"](affine_of(case, True, False), reader)
        results.append([*wide_of(running), *reader.after, reader.weight, reader.bias])
    assert all(a.equal(b) for result in results[1:] for a, b in zip(result, results[0]))


def test_schemas_name_what_is_changed():
    vectors = torch.rand(5, 8).unbind()
    arguments = ([vectors[0]], [vectors[1]], [vectors[2]], [vectors[3]], [EPS], [vectors[4]], 0)
    torch.library.opcheck(torch.ops.densenet_fast.cuda_prepare, arguments, test_utils="test_schema")
