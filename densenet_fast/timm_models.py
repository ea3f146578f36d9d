"""timm's DenseNets, converted. Importing this module registers them in timm; ``_fast`` is appended to their names."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import densenet, list_models, register_model

from densenet_fast.conversion import convert

SUFFIX = "_fast"

__all__: list[str] = []


def _with_repository(name: str, tag: str, weights: Any) -> Any:
    """``weights`` with the repository of timm's model ``name``. By default timm derives it from the registered name."""
    return replace(weights, hf_hub_id=f"timm/{name}.{tag}") if weights.hf_hub_id == "timm/" else weights


default_cfgs = {
    name + SUFFIX: replace(config, cfgs={tag: _with_repository(name, tag, w) for tag, w in config.cfgs.items()})
    for name, config in densenet.default_cfgs.items()
    if name in list_models(module="densenet")
}
"""timm's configurations of the weights: those of its own models."""


def _converted(name: str) -> Callable[..., Any]:
    make = getattr(densenet, name.removesuffix(SUFFIX))

    def model(pretrained: bool = False, **arguments: Any) -> Any:
        return convert(make(pretrained, **arguments))

    model.__name__ = model.__qualname__ = name
    model.__doc__ = f"timm's {make.__name__}, converted."
    return model


for _name in default_cfgs:
    globals()[_name] = register_model(_converted(_name))
