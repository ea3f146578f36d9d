"""What the tests share."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from densenet_fast.backends.affine import Statistics, accumulation_dtype
from densenet_fast.functional import BatchNorm
from densenet_fast.ops.stage import Stage, Stages, none_as_empty

EPS = 1e-3
"""Of statistics that kernels are asked for."""


def error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected|| in float64; infinite where ``got`` holds a value that is not finite."""
    got, expected = got.detach().double(), expected.detach().double()
    if not got.isfinite().all():
        return float("inf")
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_statistics(statistics: Statistics, stored: Tensor) -> None:
    """Those of the columns of ``stored``, in the accumulation dtype."""
    var, mean = torch.var_mean(stored.double(), 0, correction=0)
    tolerance = 1e-12 if stored.dtype == torch.float64 else 1e-5
    assert error(statistics.mean, mean) < tolerance
    assert (statistics.var.double() - var).norm() <= tolerance * stored.double().square().mean(0).norm()
    rstd = torch.rsqrt(statistics.var.double() + statistics.eps)
    assert error(statistics.rstd, rstd) < 2 * torch.finfo(statistics.rstd.dtype).eps
    assert {t.dtype for t in statistics[:3]} == {accumulation_dtype(stored.dtype)}


def randomise(model: nn.Module) -> nn.Module:
    """Gives normalisations weights of both signs and zeros, biases, and running statistics off their defaults."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_mean" in module._buffers:
                if module.weight is not None:
                    module.weight.normal_(1, 0.5)
                    module.weight[::7] = 0
                    module.bias.normal_(0, 0.5)
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_()
    return model


def make_norm(channels, *, affine=True, tracked=True, training=True, momentum=0.1, eps=1e-5, dtype=torch.float64):
    """A batch normalisation for the functional ops, its parameters and running statistics random."""

    def parameter(shift):
        return (torch.randn(channels, dtype=dtype) + shift).requires_grad_() if affine else None

    running = (torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5) if tracked else (None, None)
    counter = torch.tensor(0) if tracked else None
    return BatchNorm(parameter(1), parameter(0), *running, counter, training, momentum, eps)


def pack(stages: Sequence[Stage], like: Tensor) -> tuple[list[Tensor], list[float]]:
    """Stages as ``torch.ops.densenet_fast`` takes them: an empty tensor for each that is absent, no two the same."""
    flat = Stages(stages)
    return [none_as_empty([t], like)[0] for t in flat.tensors], flat.eps


def twin(model: nn.Module, other: nn.Module) -> nn.Module:
    """``other`` with the state, dtype and mode of ``model``."""
    other.to(next(model.parameters()).dtype).load_state_dict(copy.deepcopy(model.state_dict()))
    return other.train(model.training)


def step(model: nn.Module, x: Tensor, seed: int = 7) -> Iterator[tuple[str, Tensor | None]]:
    """Names and values of what one forward and backward pass of ``model`` on ``x`` makes: the output, the gradients of
    x and of every parameter under a random cotangent (None for one that was not used), and the buffers."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    cotangent = torch.randn(
        output.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed), dtype=torch.float64
    )
    output.backward(cotangent.to(output))
    yield "output", output
    yield "grad x", x.grad
    for name, parameter in model.named_parameters():
        yield f"grad {name}", parameter.grad
    yield from model.named_buffers()


def assert_same(got: nn.Module, expected: nn.Module, x: Tensor, tolerance: float) -> None:
    """One step of both modules makes the same, tensor by tensor, to a relative error of ``tolerance``; a gradient that
    is zero but for rounding (of a convolution's bias before a normalisation) to ``tolerance * 1e-3``."""
    for (name, value), (_, reference) in zip(step(got, x), step(expected, x), strict=True):
        if value is None or reference is None:
            assert value is reference, name
            continue
        allowed = tolerance * max(reference.double().norm().item(), 1e-3)
        assert (value.double() - reference.double()).norm().item() <= allowed, (name, error(value, reference))
