"""Everything that torch.autograd offers, beside torchvision's network in float64."""

import threading

import pytest
import torch
from integration.support import assert_close, images, ours, pair
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def retain_graph(model, x):
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    once = {name: g.clone() for name, g in gradients(model).items()}
    loss.backward()
    return once, gradients(model)


def two_forwards_before_one_backward(model, x):
    (loss_of(model(x)) * loss_of(model(x + 1))).backward()
    return gradients(model)


def two_losses_backward_in_the_other_order(model, x):
    first, second = loss_of(model(x)), loss_of(model(x + 1))
    second.backward()
    first.square().backward()
    return gradients(model)


def accumulation(model, x):
    for part in x.split(2):
        loss_of(model(part)).backward()
    return gradients(model)


def inputs_only(model, x):
    (gradient,) = torch.autograd.grad(loss_of(model(x)), x)
    assert all(p.grad is None for p in model.parameters())
    return gradient


def some_parameters_only(model, x):
    wanted = [model.features.denseblock2.denselayer2.conv1.weight, model.features.denseblock1.denselayer1.norm2.bias]
    return torch.autograd.grad(loss_of(model(x)), wanted)


def double_backward(model, x):
    (first,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    loss_of(first).backward()
    return first, {name: g for name, g in gradients(model).items() if g is not None}


def anomaly_mode(model, x):
    with torch.autograd.set_detect_anomaly(True):
        loss_of(model(x)).backward()
    return gradients(model)


def backward_in_another_thread(model, x):
    loss = loss_of(model(x))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return gradients(model)


def saved_on_cpu(model, x):
    with save_on_cpu():
        loss = loss_of(model(x))
    loss.backward()
    return gradients(model)


def packed_and_unpacked(model, x):
    """What was unpacked counts, not what the parameters are by then."""
    packed = []
    with saved_tensors_hooks(lambda t: (packed.append(t.detach().clone()), len(packed) - 1)[1], packed.__getitem__):
        loss = loss_of(model(x))
    assert packed
    for p in model.features.parameters():
        p.data.mul_(2)
    loss.backward()
    return gradients(model)


def checkpointed(use_reentrant):
    def run(model, x):
        for name, child in model.features.named_children():
            x = checkpoint(child, x, use_reentrant=use_reentrant) if "block" in name else child(x)
        x = model.classifier(torch.relu(x).mean((2, 3)))
        loss_of(x).backward()
        return gradients(model)

    return run


def checkpointed_whole(model, x):
    loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    return gradients(model)


CHECKPOINTS = {
    "reentrant": checkpointed(True),
    "not reentrant": checkpointed(False),
    "around the model": checkpointed_whole,
}
ROWS = [
    retain_graph,
    two_forwards_before_one_backward,
    two_losses_backward_in_the_other_order,
    accumulation,
    inputs_only,
    some_parameters_only,
    double_backward,
    anomaly_mode,
    backward_in_another_thread,
    saved_on_cpu,
    packed_and_unpacked,
]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("run", ROWS, ids=lambda run: run.__name__)
def test_equals_torchvision(run, memory_efficient):
    got, expected = pair(memory_efficient=memory_efficient)
    x = images(4, 3, 40, 36)
    results = []
    for model in (got, expected):
        value = run(model, x.clone().requires_grad_())
        results.append((value, dict(model.named_buffers())))
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint(run, memory_efficient, training):
    """Gradients alone: the recomputed forward pass updates running statistics again, in stock always, in ours unless
    torch ends it with the block's op."""
    got, expected = pair(memory_efficient=memory_efficient, training=training)
    x = images()
    assert_close(*(run(model, x.clone().requires_grad_()) for model in (got, expected)))


def test_a_freed_graph_raises_stocks_error():
    got, expected = pair()
    x, messages = images(), []
    for model in (got, expected):
        loss = loss_of(model(x))
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
            loss.backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_saved_tensors_that_cannot_be_saved_raise():
    model = ours().double()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        with pytest.raises(RuntimeError, match="not here"), save_on_cpu():
            model(images())


def test_weights_changed_between_forward_and_backward_are_noticed():
    """As in stock, for every convolution and normalisation."""
    for name in (
        "denseblock1.denselayer2.conv2.weight",
        "denseblock2.denselayer1.norm1.weight",
        "transition1.conv.weight",
    ):
        for model in pair():
            loss = loss_of(model(images()))
            with torch.no_grad():
                model.features.get_parameter(name).mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
