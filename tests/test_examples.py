"""The examples do what they say, each in small."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import densenet_fast
from densenet_fast.thirdparty import import_torchvision

EXAMPLES = Path(densenet_fast.__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    import_torchvision()
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_tested():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in text and len(path.read_text().splitlines()) < 60, path.name


def test_finetuning_on_a_folder(tmp_path):
    module = example("finetune_folder")
    module.write_digits(tmp_path, 300)
    assert module.main(tmp_path, epochs=4) > 0.5  # by chance 0.1


def test_monai_volumes():
    difference, loss = example("monai_volumes").main(steps=6, size=32)
    assert difference < 1e-4 and loss < 0.5  # by chance 0.69


def test_segmentation():
    pytest.importorskip("segmentation_models_pytorch")
    assert example("segmentation").main(steps=20) > 0.5


def test_onnx_export(tmp_path):
    model = densenet_fast.DenseNet(8, (2, 3), 16, num_classes=5)
    assert example("onnx_export").main(str(tmp_path / "model.onnx"), model, size=64) < 1e-4


def test_grad_cam(tmp_path):
    """The heat is that of stock's network, and the picture is written."""
    module = example("grad_cam")
    torch.manual_seed(0)
    model = densenet_fast.DenseNet(8, (2, 3), 16, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    heat = module.grad_cam(model, model.features.denseblock2, images)
    with densenet_fast.set_fused(False):
        expected = module.grad_cam(model, model.features.denseblock2, images)
    assert heat.shape == (2, 64, 64) and heat.min() >= 0 and torch.allclose(heat, expected, atol=1e-4)
    from PIL import Image

    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "image.png")
    module.main(str(tmp_path / "image.png"), None, str(tmp_path / "heat.png"))
    assert Image.open(tmp_path / "heat.png").size == (224, 224)


def test_compiled_step():
    module = example("compiled_step")
    losses = module.main(steps=4, backend="aot_eager")
    assert losses[-1] < losses[0] and losses == pytest.approx(module.main(steps=4, backend="eager"), rel=1e-3)
