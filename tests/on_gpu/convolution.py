"""A layer with its 3x3 convolution in CUDA C++, at the shapes of DenseNet-121: results, and the same again when
repeated."""

from functools import partial

from on_gpu.checks import Check, Record
from on_gpu.cuda_kernels import needed
from on_gpu.settings import Layer, Settings
from on_gpu.triton_kernels import against_aten, repeats, title


def checks(settings: Settings) -> list[Check]:
    """One a layer and dtype of 16 bits, then what is repeated."""
    dtypes = [name for name in settings.dtypes if name in ("bf16", "fp16")]
    found = []
    for what, run in (("a layer", a_layer), ("the same bitwise", again)):
        for name in dtypes:
            for layer in settings.layers:
                found.append(Check(f"{what}, {name}, {title(layer)}", partial(run, settings, layer, name), 40))
    return found


def a_layer(settings: Settings, layer: Layer, name: str) -> Record:
    """Every kernel."""
    needed()
    return against_aten(settings, layer, name, native=True)


def again(settings: Settings, layer: Layer, name: str) -> Record:
    """Every kernel, many times."""
    needed()
    return repeats(settings, layer, name, native=True)
