"""The reference against the paper."""

import pytest
import torch

from densenet_fast import reference
from densenet_fast.reference import DenseNet
from helpers import error


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, depth, published",
    [
        ("densenet121", 121, 7978856),
        ("densenet161", 161, 28681000),
        ("densenet169", 169, 14149480),
        ("densenet201", 201, 20013928),
        ("densenet264", 265, None),
    ],
)
def test_depth_and_parameters(name, depth, published):
    """Depth as the paper counts it (convolutions and the classifier); parameters as torchvision publishes them. The
    paper's Table 1 gives its DenseNet-264 the layers of a DenseNet-265."""
    model = getattr(reference, name)()
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert convolutions + 1 == depth
    assert published is None or parameters(model) == published


@pytest.mark.parametrize(
    "arguments, options, depth, millions",
    [
        ((12, (12,) * 3, 16, None), dict(compression=1), 40, 1.0),
        ((12, (32,) * 3, 16, None), dict(compression=1), 100, 7.0),
        ((24, (32,) * 3, 16, None), dict(compression=1), 100, 27.2),
        ((12, (16,) * 3, 24), dict(), 100, 0.8),
        ((24, (41,) * 3, 48), dict(), 250, 15.3),
        ((40, (31,) * 3, 80), dict(), 190, 25.6),
    ],
)
def test_cifar_networks_of_the_paper(arguments, options, depth, millions):
    """Depth and parameters of the paper's Table 2."""
    model = DenseNet(*arguments, num_classes=10, small_inputs=True, **options)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) + 1 == depth
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


def test_d2l_network():
    """The shapes that the chapter prints for a 96x96 image with one channel."""
    model = DenseNet(32, (4, 4, 4, 4), 64, None, num_classes=10, in_channels=1, bias=True)
    shapes, x = [], torch.randn(2, 1, 96, 96)
    for name, module in model.features.named_children():
        x = module(x)
        if not name.startswith(("conv0", "norm0", "relu0")):
            shapes.append(tuple(x.shape[1:]))
    assert shapes[:3] == [(64, 24, 24), (192, 24, 24), (96, 12, 12)]
    assert shapes[3:] == [(224, 12, 12), (112, 6, 6), (240, 6, 6), (120, 3, 3), (248, 3, 3), (248, 3, 3)]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_is_torchs(dtype):
    """Mask and values of F.dropout on contiguous memory, whatever the memory format here."""
    x = torch.randn(3, 5, 7, 6, dtype=dtype)
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout(x, 0.3)
    for format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        assert error(reference.dropout(x.to(memory_format=format), 0.3, True), expected) < 1e-7
    assert reference.dropout(x, 1.0, True).eq(0).all() and reference.dropout(x, 0.3, False).equal(x)
