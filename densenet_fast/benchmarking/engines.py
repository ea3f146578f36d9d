"""Inference engines for CPUs. They run torchvision's network, exported to ONNX for one size of images."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.ops.stage import autocast_dtype

Run = Callable[[Any], Any]


class Engine(nn.Module):
    """A network that an engine runs, in the dtype of autocast, with as many threads as torch has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._made: tuple[tuple[Any, ...], Run] | None = None

    @staticmethod
    def obstacle(dtype: torch.dtype) -> str | None:
        """Why the engine does not run in ``dtype`` here, or None."""
        raise NotImplementedError

    def open(self, network: bytes, dtype: torch.dtype) -> Run:
        """A function of arrays that runs the exported ``network``."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.network.load_state_dict(state_dict, *args, **kwargs)

    def prepare(self, images: Tensor) -> Run:
        """What runs ``images``. It is made anew for another size than before."""
        dtype = autocast_dtype(images.device) or torch.float32
        kind = tuple(images.shape), dtype, torch.get_num_threads()
        if self._made is None or self._made[0] != kind:
            self._made = None  # before there are two
            self._made = kind, self.open(exported(self.network, images), dtype)
        return self._made[1]

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.prepare(images)(images.contiguous().numpy()))


class OpenVINO(Engine):
    """By OpenVINO's plugin for CPUs, asked for low latency."""

    @staticmethod
    def obstacle(dtype: torch.dtype) -> str | None:
        import openvino

        names = {torch.float32: "FP32", torch.bfloat16: "BF16"}
        capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if names.get(dtype) in capable else f"it has no {dtype} on this processor"

    def open(self, network: bytes, dtype: torch.dtype) -> Run:
        import openvino

        core = openvino.Core()
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        request = core.compile_model(core.read_model(network), "CPU", hints).create_infer_request()
        return lambda images: request.infer([images])[0]


class ONNXRuntime(Engine):
    """By ONNX Runtime's provider for CPUs."""

    @staticmethod
    def obstacle(dtype: torch.dtype) -> str | None:
        import onnxruntime  # noqa: F401

        return None if dtype == torch.float32 else f"it has no {dtype} on CPUs"

    def open(self, network: bytes, dtype: torch.dtype) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]


def exported(network: nn.Module, images: Tensor) -> bytes:
    """``network`` in float32 as ONNX, for images of this size."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.autocast(images.device.type, enabled=False):
        warnings.simplefilter("ignore")  # this exporter is deprecated, the other needs more packages
        torch.onnx.export(network, (images,), file, dynamo=False, opset_version=17)
    return file.getvalue()
