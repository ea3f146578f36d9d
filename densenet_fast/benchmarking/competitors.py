"""Who is measured: the plain DenseNet, torchvision's, timm's and ours, eager and compiled, in two memory layouts; and
inference engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import densenet_fast
from densenet_fast import reference
from densenet_fast.benchmarking.engines import Engine, ONNXRuntime, OpenVINO
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.thirdparty import import_timm, import_torchvision

__all__ = ["COMPETITORS", "LAYOUTS", "Entry", "available", "compiled", "layouts_of"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Arguments = dict[str, Any]


def _torchvision(arguments: Arguments, memory_efficient: bool = False) -> nn.Module:
    small, arguments = _split(arguments)
    model = import_torchvision().models.DenseNet(**arguments, memory_efficient=memory_efficient)
    return _with_small_stem(model, arguments) if small else model


def _timm(arguments: Arguments) -> nn.Module:
    small, arguments = _split(arguments)
    if arguments["num_init_features"] != 2 * arguments["growth_rate"]:
        raise ValueError("timm's stem has 2 * growth_rate features")
    options = {key: value for key, value in arguments.items() if key != "num_init_features"}
    model = import_timm().models.densenet.DenseNet(**options)
    return _with_small_stem(model, arguments) if small else model


def _split(arguments: Arguments) -> tuple[bool, Arguments]:
    return arguments.get("small_inputs", False), {k: v for k, v in arguments.items() if k != "small_inputs"}


def _with_small_stem(model: nn.Module, arguments: Arguments) -> nn.Module:
    """``model`` with the paper's stem for small images, one 3x3 convolution, in place of that for ImageNet."""
    parts = {name: part for name, part in model.features.named_children() if name not in ("norm0", "relu0", "pool0")}
    parts["conv0"] = nn.Conv2d(3, arguments["num_init_features"], 3, padding=1, bias=False)
    for name in [name for name, _ in model.features.named_children()]:
        delattr(model.features, name)
    for name, part in parts.items():
        model.features.add_module(name, part)
    return model


@dataclass(frozen=True)
class Competitor:
    """An implementation.

    Attributes:
        build: makes the network.
        label: what readers call it.
        compiled: whether ``torch.compile`` runs it.
        engine: the inference engine that runs it, if one does.
    """

    build: Callable[[Arguments], nn.Module]
    label: str
    compiled: bool = False
    engine: type[Engine] | None = None

    def obstacle(self, train: bool, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run so, or None."""
        if self.engine is None:
            return None
        if train or device.type != "cpu":
            return "it is for inference on CPUs"
        return self.engine.obstacle(dtype)


def _ours(arguments: Arguments, memory_efficient: bool = False) -> nn.Module:
    return densenet_fast.DenseNet(**arguments, memory_efficient=memory_efficient)


COMPETITORS = {
    "reference": Competitor(lambda arguments: reference.DenseNet(**arguments), "reference"),
    "torchvision": Competitor(_torchvision, "torchvision"),
    "torchvision-me": Competitor(lambda arguments: _torchvision(arguments, True), "torchvision memory_efficient"),
    "timm": Competitor(_timm, "timm"),
    "compile": Competitor(_torchvision, "torchvision torch.compile", compiled=True),
    "openvino": Competitor(lambda arguments: OpenVINO(_torchvision(arguments)), "OpenVINO", engine=OpenVINO),
    "onnxruntime": Competitor(
        lambda arguments: ONNXRuntime(_torchvision(arguments)), "ONNX Runtime", engine=ONNXRuntime
    ),
    "ours": Competitor(_ours, "densenet_fast"),
    "ours-me": Competitor(lambda arguments: _ours(arguments, True), "densenet_fast memory_efficient"),
    "ours-compile": Competitor(_ours, "densenet_fast torch.compile", compiled=True),
}
"""By the name that the command line gives them."""


@dataclass(frozen=True)
class Entry:
    """A competitor in one memory layout, for one network."""

    competitor: str
    layout: str
    network: str

    @property
    def name(self) -> str:
        return f"{self.competitor}, {self.layout}"

    @property
    def compiled(self) -> bool:
        return COMPETITORS[self.competitor].compiled

    @property
    def by_engine(self) -> bool:
        return COMPETITORS[self.competitor].engine is not None

    def model(self, device: torch.device, train: bool) -> nn.Module:
        """Built, not compiled; its weights are those of every other competitor."""
        arguments = architecture(self.network)
        torch.manual_seed(0)
        weights = reference.DenseNet(**arguments).state_dict()
        model = COMPETITORS[self.competitor].build(arguments)
        model.load_state_dict(weights)
        return model.to(device=device, memory_format=LAYOUTS[self.layout]).train(train)

    def images(self, batch: int, size: int, device: torch.device) -> Tensor:
        """[batch, 3, size, size] in the entry's layout; the same for every competitor."""
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
        return images.to(device).to(memory_format=LAYOUTS[self.layout])


def layouts_of(competitor: str) -> list[str]:
    """The layouts in which it is measured.

    What ``torch.compile`` makes is measured in channels_last alone: the compiler takes minutes, and chooses the layouts
    of convolutions itself. Engines choose them too; their images are contiguous.
    """
    if COMPETITORS[competitor].engine is not None:
        return ["contiguous"]
    return ["channels_last"] if COMPETITORS[competitor].compiled else list(LAYOUTS)


def compiled(model: nn.Module) -> nn.Module:
    """Returns the network compiled by ``torch.compile`` for one size of images. All processes share its cache on
    disk."""
    return torch.compile(model, dynamic=False)


def available(
    names: Sequence[str], network: str, train: bool, dtype: torch.dtype, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Those of ``names`` that can be built for ``network`` here and run so, and of the others why not."""
    usable, left_out = [], {}
    for name in names:
        try:
            reason = COMPETITORS[name].obstacle(train, dtype, device)
            if reason is not None:
                left_out[name] = reason
                continue
            COMPETITORS[name].build(architecture(network))
            usable.append(name)
        except (ImportError, AttributeError, ValueError, TypeError, RuntimeError) as error:
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return usable, left_out
