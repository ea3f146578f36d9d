"""Graphs that torch.fx or torch.export made of a network: what of it they took apart cannot be converted any more."""

import torch
from torch import nn

from densenet_fast.conversion import layout

TRACED = (
    "it is a graph that calls the layers of dense blocks one by one: densenet_fast.convert() the model before it is "
    "traced, with its blocks and transitions as leaf modules (is_leaf_module of a torch.fx.Tracer, or "
    'tracer_kwargs={"leaf_modules": [their classes]} of create_feature_extractor), or use hooks or '
    "IntermediateLayerGetter"
)
EXPORTED = (
    "it is an exported program, which holds stock operations alone, also that of a converted model: "
    "densenet_fast.convert() the model itself, and call that"
)


def taken_apart(module: nn.Module) -> str | None:
    """Why nothing of a graph module can be converted but the modules that it calls, if it has dense layers: a batch
    normalisation of what was concatenated; else None."""
    if not isinstance(module, torch.fx.GraphModule):
        return None
    for node in module.graph.nodes:
        if _is_norm(module, node) and node.args and isinstance(node.args[0], torch.fx.Node) and _is_cat(node.args[0]):
            return EXPORTED if str(node.target).startswith("aten.") else TRACED
    return None


def called(module: "torch.fx.GraphModule") -> dict[str, nn.Module]:
    """The modules that a graph module calls, by path."""
    paths = {node.target for node in module.graph.nodes if node.op == "call_module"}
    return {path: child for path, child in module.named_modules() if path in paths}


def _is_norm(module: nn.Module, node: "torch.fx.Node") -> bool:
    if node.op == "call_module":
        return layout.is_norm(module.get_submodule(node.target))
    return node.op == "call_function" and "batch_norm" in str(node.target)


def _is_cat(node: "torch.fx.Node") -> bool:
    return node.op == "call_function" and "cat" in getattr(node.target, "__name__", "")
