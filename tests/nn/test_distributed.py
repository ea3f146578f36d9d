"""Several processes against one on the joined batch, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import densenet_fast
from helpers import randomise


def run(folder: Path, world_size: int) -> list[dict]:
    """Runs the processes and returns what each wrote."""
    script = Path(__file__).with_name("sync_step.py")
    root = str(Path(densenet_fast.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    subprocess.run([*launch, str(script), str(folder)], env=environment, check=True, timeout=200)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def close(got, expected):
    return (got - expected).norm() <= 1e-10 * expected.norm().clamp_min(1e-2)


@pytest.mark.parametrize(
    "options, shares",
    [(dict(), [3, 3]), (dict(memory_efficient=True), [1, 4]), (dict(bn_size=None), [1, 2, 2])],
    ids=str,
)
def test_sync_batch_norm_equals_one_process_on_the_joined_batch(tmp_path, options, shares):
    arguments = dict(growth_rate=4, block_config=(2, 2), num_init_features=6, num_classes=3, **options)
    model = randomise(densenet_fast.DenseNet(**arguments).double())
    x = torch.randn(sum(shares), 3, 32, 40, dtype=torch.float64)
    cotangent = torch.randn(sum(shares), 3, dtype=torch.float64)
    case = dict(arguments=arguments, state=model.state_dict(), x=x, cotangent=cotangent, shares=shares)
    torch.save({**case, "sync": True, "steps": 2}, tmp_path / "case.pt")
    results = run(tmp_path, len(shares))

    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        output.backward(cotangent)
    assert close(torch.cat([r["output"] for r in results]), output)
    assert close(torch.cat([r["x"] for r in results]), leaf.grad)
    for result in results:
        for name, parameter in model.named_parameters():
            assert close(result["gradients"][name] * len(shares), parameter.grad), name
        for name, buffer in model.named_buffers():
            assert close(result["buffers"][name].double(), buffer.double()), name


def test_without_synchronisation_each_process_normalises_its_own(tmp_path):
    arguments = dict(growth_rate=4, block_config=(2, 2), num_init_features=6, num_classes=3)
    model = randomise(densenet_fast.DenseNet(**arguments).double())
    x, cotangent = torch.randn(4, 3, 32, 40, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    case = dict(arguments=arguments, state=model.state_dict(), x=x, cotangent=cotangent, shares=[2, 2])
    torch.save({**case, "sync": False, "steps": 1}, tmp_path / "case.pt")
    results = run(tmp_path, 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for rank, result in enumerate(results):
        model.load_state_dict(state)
        share = slice(2 * rank, 2 * rank + 2)
        output = model(x[share])
        output.backward(cotangent[share])
        assert close(result["output"], output)
        for name, buffer in model.named_buffers():
            assert close(result["buffers"][name].double(), buffer.double()), name
    for name, parameter in model.named_parameters():
        assert close(results[0]["gradients"][name] * 2, parameter.grad), name
        assert results[0]["gradients"][name].equal(results[1]["gradients"][name]), name


def test_sync_batch_norm_in_one_process_is_batch_norm():
    model = randomise(densenet_fast.DenseNet(4, (2, 2), 6, num_classes=3).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    synchronised = densenet_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synchronised(x).allclose(expected, rtol=1e-12)
    assert type(synchronised.features.norm0) is densenet_fast.nn.SyncBatchNorm
