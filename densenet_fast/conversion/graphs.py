"""Graphs that torch.fx or torch.export made of a network. The parts that they traced cannot be converted any more."""

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


def graph_obstacle(module: nn.Module) -> str | None:
    """Why a graph module cannot be converted, or None if it has no dense layers.

    A batch normalisation of a concatenation counts as a dense layer. Modules that the graph calls may be converted.
    """
    if not isinstance(module, torch.fx.GraphModule):
        return None
    for node in module.graph.nodes:
        if _is_norm(module, node) and node.args and isinstance(node.args[0], torch.fx.Node) and _is_cat(node.args[0]):
            return EXPORTED if str(node.target).startswith("aten.") else TRACED
    return None


def called_modules(module: "torch.fx.GraphModule") -> dict[str, nn.Module]:
    """The modules that a graph module calls, by path."""
    paths = {node.target for node in module.graph.nodes if node.op == "call_module"}
    return {path: child for path, child in module.named_modules() if path in paths}


def _is_norm(module: nn.Module, node: "torch.fx.Node") -> bool:
    if node.op == "call_module":
        return layout.is_norm(module.get_submodule(node.target))
    return node.op == "call_function" and "batch_norm" in str(node.target)


def _is_cat(node: "torch.fx.Node") -> bool:
    return node.op == "call_function" and "cat" in getattr(node.target, "__name__", "")
