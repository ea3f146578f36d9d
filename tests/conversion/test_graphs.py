"""Graphs that were made of a network before it was converted, and after."""

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_fast
from conversion import twins
from conversion import twins_sequential as seq
from densenet_fast.conversion.fused import Fused
from helpers import assert_same, error, randomise


def images():
    return torch.randn(2, 3, 26, 21, dtype=torch.float64)


def network():
    return randomise(seq.StagedNet().double()).eval()


GRAPHS = {
    "symbolic trace": (torch.fx.symbolic_trace, "before it is traced, with its blocks and transitions as leaf modules"),
    "feature extractor": (lambda m: create_feature_extractor(m, ["features.stage2"]), "before it is traced"),
    "export": (lambda m: torch.export.export(m, (images(),)).module(), "it is an exported program"),
}


@pytest.mark.parametrize("make, reason", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("inside", [False, True])
def test_what_was_taken_apart_says_that_convert_comes_first(make, reason, inside):
    graph = make(network())
    model = nn.ModuleDict(dict(graph=graph)) if inside else graph
    with pytest.raises(ValueError, match="was left alone: it is") as caught:
        densenet_fast.convert(model)
    (row,) = densenet_fast.explain(model)
    assert row.name == ("graph" if inside else "") and reason in row.reason and reason in str(caught.value)


def test_a_graph_without_dense_layers_is_not_mentioned():
    assert not densenet_fast.explain(torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))


class Tracer(torch.fx.Tracer):
    """Takes converted parts, and Sequentials of layers, for leaves."""

    def is_leaf_module(self, m, name):
        return isinstance(m, Fused) or name.startswith("features.stage") or super().is_leaf_module(m, name)


def test_a_converted_model_traced_with_its_parts_as_leaves():
    stock = network()
    model = densenet_fast.convert(stock, inplace=False)
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    names = [row.name for row in densenet_fast.explain(model)]
    for training in (True, False):
        assert_same(graph.train(training), stock.train(training), images(), 1e-9)
    assert [(row.name, row.last_call) for row in densenet_fast.explain(graph)] == [(name, "fused") for name in names]
    whole = torch.fx.symbolic_trace(model)
    assert error(whole(images()), stock(images())) > 0 and not any(row.fused for row in densenet_fast.explain(whole))


NETWORKS = {
    "stages": (network, images),
    "one Sequential": (
        lambda: randomise(seq.flat().double()).eval(),
        lambda: torch.randn(2, 2, 21, 18, dtype=torch.float64),
    ),
    "no ReLU": (lambda: randomise(seq.Linear(6, 4).double()), lambda: torch.randn(2, 6, 5, 7, dtype=torch.float64)),
    "dropout": (lambda: randomise(seq.Dropping(6, 4).double()), lambda: torch.randn(2, 6, 5, 7, dtype=torch.float64)),
}


@pytest.mark.parametrize("make, inputs", NETWORKS.values(), ids=NETWORKS)
def test_a_converted_model_exported_traced_and_compiled(make, inputs):
    torch.compiler.reset()
    stock, x = make().eval(), inputs()
    model = densenet_fast.convert(stock, inplace=False)
    exported = torch.export.export(model, (x,))
    assert "densenet_fast" not in str(exported.graph) and error(exported.module()(x), stock(x)) < 1e-12
    traced = torch.jit.trace(model, x)
    assert "densenet_fast::" not in str(traced.inlined_graph) and error(traced(x), stock(x)) < 1e-12
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert error(compiled(x), stock(x)) < 1e-9
    assert_same(compiled.train(), densenet_fast.convert(stock, inplace=False).train(), x, 1e-9)
    torch.compiler.reset()


def test_no_forward():
    with pytest.raises(ValueError, match="has no forward: give it one that loops over its layers"):
        densenet_fast.convert(nn.ModuleList(twins.OwnBlock(2, 12, 8).units))
