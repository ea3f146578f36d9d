"""timm's densenets, converted. Imported, it registers them with timm, under their names and ``_fast``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import densenet, list_models, register_model

from densenet_fast.conversion import convert

SUFFIX = "_fast"

__all__: list[str] = []


def _of_timms(name: str, tag: str, weights: Any) -> Any:
    """With the repository of timm's model, which timm would look for under the name of ours."""
    return replace(weights, hf_hub_id=f"timm/{name}.{tag}") if weights.hf_hub_id == "timm/" else weights


default_cfgs = {
    name + SUFFIX: replace(known, cfgs={tag: _of_timms(name, tag, weights) for tag, weights in known.cfgs.items()})
    for name, known in densenet.default_cfgs.items()
    if name in list_models(module="densenet")
}
"""What timm knows of their weights, which are those of its own models."""


def _converted(name: str) -> Callable[..., Any]:
    make = getattr(densenet, name.removesuffix(SUFFIX))

    def model(pretrained: bool = False, **arguments: Any) -> Any:
        return convert(make(pretrained, **arguments))

    model.__name__ = model.__qualname__ = name
    model.__doc__ = f"timm's {make.__name__}, converted."
    return model


for _name in default_cfgs:
    globals()[_name] = register_model(_converted(_name))
