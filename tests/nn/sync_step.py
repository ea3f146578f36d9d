"""One process of a distributed training step: ``sync_step.py FOLDER``, with torchrun's environment variables.

Reads ``FOLDER/case.pt`` (arguments of the network, its state, the joined batch, the cotangent, each process's share),
takes its steps on its share under DistributedDataParallel and writes gradients and buffers to ``FOLDER/RANK.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import densenet_fast


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = torch.load(folder / "case.pt", weights_only=True)
    model = densenet_fast.DenseNet(**case["arguments"]).double()
    model.load_state_dict(case["state"])
    if case["sync"]:
        model = densenet_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert all(row.fused for row in densenet_fast.explain(model))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    start = sum(case["shares"][:rank])
    share = slice(start, start + case["shares"][rank])
    outputs = []
    for _ in range(case["steps"]):
        x = case["x"][share].clone().requires_grad_()
        model.zero_grad()
        output = parallel(x)
        output.backward(case["cotangent"][share])
        outputs.append(output.detach())
    result = {
        "output": outputs[-1],
        "x": x.grad,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }
    torch.save(result, folder / f"{rank}.pt")
    del parallel  # as the group's last owner it would destroy it while holding the lock that gloo's threads wait for
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
