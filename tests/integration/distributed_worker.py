"""One process of the distributed tests: ``distributed_worker.py FOLDER``, with the environment variables RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

Reads ``FOLDER/case.pt`` (arguments of the network, its state, the joined batch, the cotangent, each process's share,
names of scenarios, all by default),
runs the scenarios on its share and writes their results to ``FOLDER/RANK.pt``.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import densenet_fast
from densenet_fast.nn import DenseBlock, DenseLayer, SyncBatchNorm, Transition

TIMEOUT = datetime.timedelta(seconds=60)


class Case:
    """The network and this process's share of the batch."""

    def __init__(self, folder: Path) -> None:
        self.case = torch.load(folder / "case.pt", weights_only=True)
        shares = self.case["shares"]
        start = sum(shares[: dist.get_rank()])
        share = slice(start, start + shares[dist.get_rank()])
        self.x, self.cotangent = self.case["x"][share], self.case["cotangent"][share]

    def model(self, **options: Any) -> densenet_fast.DenseNet:
        model = densenet_fast.DenseNet(**{**self.case["arguments"], **options}).double()
        if not options:
            model.load_state_dict(self.case["state"])
        return model

    def step(self, run: nn.Module, module: nn.Module, steps: int = 1) -> dict[str, Any]:
        """Takes steps of ``run``, which wraps ``module``, and returns what they made."""
        for _ in range(steps):
            x = self.x.clone().requires_grad_()
            module.zero_grad()
            output = run(x)
            output.backward(self.cotangent)
        return {"output": output.detach(), "x": x.grad, **of(module)}


def of(module: nn.Module) -> dict[str, Any]:
    """Gradients and buffers; of sharded parameters the whole gradient."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return {"gradients": gradients, "buffers": dict(module.named_buffers())}


def fused(model: nn.Module) -> bool:
    return all(row.fused for row in densenet_fast.explain(model))


def plain(case: Case) -> dict[str, Any]:
    model = case.model()
    return case.step(DistributedDataParallel(model), model)


def static_graph(case: Case) -> dict[str, Any]:
    model = case.model()
    return case.step(DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True), model)


def no_sync(case: Case) -> dict[str, Any]:
    """Gradients of the same images accumulated three times; averaged over the processes the third time alone."""
    model = case.model()
    parallel = DistributedDataParallel(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.no_sync())
        for _ in range(2):
            parallel(case.x).backward(case.cotangent)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    parallel(case.x).backward(case.cotangent)
    return {"before": before, **of(model)}


def compiled(case: Case) -> dict[str, Any]:
    model = case.model()
    return case.step(torch.compile(DistributedDataParallel(model), backend="aot_eager"), model)


def sync_batch_norm(case: Case) -> dict[str, Any]:
    model = SyncBatchNorm.convert_sync_batchnorm(case.model())
    assert fused(model)
    return case.step(DistributedDataParallel(model), model, steps=2)


def sync_batch_norm_of_torch(case: Case) -> dict[str, Any]:
    """``torch.nn.SyncBatchNorm``, whose own forward refuses CPUs; DistributedDataParallel refuses it there too."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model())
    result = case.step(model, model, steps=2)
    for gradient in result["gradients"].values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return result


def sync_batch_norm_unfused(case: Case) -> dict[str, Any]:
    model = SyncBatchNorm.convert_sync_batchnorm(case.model())
    with densenet_fast.set_fused(False):
        return case.step(DistributedDataParallel(model), model, steps=2)


def sync_batch_norm_compiled(case: Case) -> dict[str, Any]:
    model = SyncBatchNorm.convert_sync_batchnorm(case.model())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    return case.step(DistributedDataParallel(run), model, steps=2)


def options(name: str, **values: Any) -> Any:
    def scenario(case: Case) -> dict[str, Any]:
        torch.manual_seed(1)
        model = case.model(**values)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model = SyncBatchNorm.convert_sync_batchnorm(model)
        return {"state": state, **case.step(DistributedDataParallel(model), model, steps=2)}

    scenario.__name__ = name
    return scenario


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Names and numbers of values of the collectives of the ``with`` block."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[-1].numel()))
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def collectives(case: Case) -> dict[str, Any]:
    """Of a block of three layers alone: forward and backward."""
    block = SyncBatchNorm.convert_sync_batchnorm(DenseBlock(3, 6, 4, 5).double())
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    with counted() as forward:
        output = block(x)
    with counted() as backward:
        output.square().sum().backward()
    return {"forward": forward, "backward": backward}


def sharded(name: str, kinds: tuple[type, ...], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    def scenario(case: Case) -> dict[str, Any]:
        model = case.model().to(dtype)
        for module in list(model.modules()):
            if isinstance(module, kinds):
                fully_shard(module, **settings)
        fully_shard(model, **settings)
        rows = {row.kind: row.fused for row in densenet_fast.explain(model)}
        return {"fused": rows, **case.step(model, model, steps=2)}

    scenario.__name__ = name
    return scenario


SCENARIOS = [
    plain,
    static_graph,
    no_sync,
    compiled,
    sync_batch_norm,
    sync_batch_norm_of_torch,
    sync_batch_norm_unfused,
    sync_batch_norm_compiled,
    options("sync_batch_norm_memory_efficient", memory_efficient=True),
    options("sync_batch_norm_without_bottleneck", bn_size=None),
    collectives,
    sharded("fully_shard_model", ()),
    sharded("fully_shard_blocks", (DenseBlock, Transition)),
    sharded("fully_shard_layers", (DenseLayer,)),
    sharded("fully_shard_bfloat16", (DenseBlock,), torch.float32, mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
]


def die(case: Case) -> None:
    """The last process ends within its second forward pass, while the others wait for its statistics."""
    block = SyncBatchNorm.convert_sync_batchnorm(case.model())
    block(case.x).sum().backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        block.features.conv0.register_forward_hook(lambda *_: os._exit(3))
    block(case.x).sum().backward()


def main(folder: Path, name: str | None = None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    case = Case(folder)
    if name == "die":
        die(case)
    results: dict[str, dict[str, Any] | Tensor] = {}
    for scenario in SCENARIOS:
        if case.case["scenarios"] and scenario.__name__ not in case.case["scenarios"]:
            continue
        torch.manual_seed(0)
        results[scenario.__name__] = scenario(case)
        torch.compiler.reset()
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
