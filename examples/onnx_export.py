"""Export DenseNet-121 to ONNX with any batch size, and run it with ONNX Runtime.

python examples/onnx_export.py [FILE]
"""

import sys

import onnxruntime
import torch

import densenet_fast


def main(path: str = "densenet121.onnx", model: torch.nn.Module | None = None, size: int = 224) -> float:
    """The largest difference between the logits of PyTorch and of ONNX Runtime, relative to the largest logit."""
    model = model or densenet_fast.densenet121()
    model.eval()
    example = torch.randn(2, 3, size, size)
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, size, size)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        expected = model(images)
    return ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    print(f"largest relative difference {main(*sys.argv[1:]):.1e}")
