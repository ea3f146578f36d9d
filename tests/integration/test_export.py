"""Export, tracing and scripting: what leaves this process holds stock ops alone, and computes the same."""

import io
import warnings

import pytest
import torch
from integration.support import assert_close, images, ours, pair
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_fast
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, DenseLayer, Transition
from helpers import error

TOLERANCE = 1e-5


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).split(".")[0] for node in graph.nodes if node.op == "call_function"}


@pytest.fixture
def model():
    return pair(torch.float32, training=False)[0]


@pytest.fixture
def x():
    return images(dtype=torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_torch_export_with_a_dynamic_batch(model, x, training):
    model.train(training)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert operators(program.graph) and not any("densenet_fast" in name for name in operators(program.graph))
    more = images(5, 3, 40, 36, dtype=torch.float32)
    exported = program.module()(more)
    assert error(exported, model(more)) < TOLERANCE


def test_torch_export_with_dynamic_sizes_saved_and_loaded(model, x):
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = images(1, 3, 48, 44, dtype=torch.float32)  # torch before 2.13 keeps odd sizes odd and even ones even
    assert error(torch.export.load(file).module()(other), model(other)) < TOLERANCE


def test_torch_export_of_channels_last_and_memory_efficient(x):
    model = pair(torch.float32, False, memory_efficient=True)[0].to(memory_format=torch.channels_last)
    program = torch.export.export(model, (x.to(memory_format=torch.channels_last),))
    assert error(program.module()(x.to(memory_format=torch.channels_last)), model(x)) < TOLERANCE


def test_a_program_exported_in_float64_trains_as_the_model():
    got, _ = pair()
    x = images()
    program = torch.export.export(got, (x,))
    results = []
    for module in (program.module(), got):
        module.zero_grad()
        output = module(x)
        output.square().sum().backward()
        results.append((output, {name: p.grad.clone() for name, p in module.named_parameters()}))
    assert_close(*results)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(model, x, dynamic, tmp_path):
    """Checked by ONNX itself, and by what ONNX Runtime computes."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")
    assert {node.domain for node in onnx.load(tmp_path / "model.onnx").graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = images(5, 3, 40, 36, dtype=torch.float32) if dynamic else x
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    assert error(torch.from_numpy(output), model(inputs)) < TOLERANCE


def test_torch_jit_trace(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    assert "densenet_fast::" not in str(traced.inlined_graph)
    more = images(3, 3, 40, 36, dtype=torch.float32)
    assert error(loaded(more), model(more)) < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [dict(), dict(bn_size=None, drop_rate=0.3, small_inputs=True)], ids=str)
def test_torch_jit_script(x, options):
    """It runs stock layers, shares the parameters, and leaves the model, and what holds it, as they are."""
    model = ours(memory_efficient=True, **options)
    holder = nn.Sequential(model)
    scripted = torch.jit.script(holder)
    assert "densenet_fast::" not in str(scripted.inlined_graph)
    assert holder[0] is model and all(row.fused for row in densenet_fast.explain(holder))
    assert scripted.state_dict().keys() == holder.state_dict().keys()
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    models = holder, torch.jit.load(file)
    for training in (True, False):
        outputs = []
        for module in models:
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
        assert error(outputs[1], outputs[0]) < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make", [lambda: BNReLUConv1x1(6, 4), lambda: Transition(6, 4), lambda: DenseLayer(6, 4), lambda: DenseBlock(2, 6)]
)
def test_torch_jit_script_of_a_part(make):
    part, x = make().eval(), images(2, 6, 7, 8, dtype=torch.float32)
    scripted = torch.jit.script(part)
    assert error(scripted(x), part(x)) < TOLERANCE


def test_fx_symbolic_trace(model, x):
    traced = torch.fx.symbolic_trace(model)
    assert error(traced(x), model(x)) < TOLERANCE
    assert any(node.target == "features.denseblock2.denselayer3.conv2" for node in traced.graph.nodes)


@pytest.mark.parametrize("training", [True, False])
def test_torchvision_create_feature_extractor(training):
    names = ["features.denseblock1", "features.transition1", "features.norm5"]
    x, results = images(), []
    for model in pair(training=training):
        extractor = create_feature_extractor(model, names)
        values = extractor(x)
        values["features.norm5"].square().sum().backward()
        results.append((values, {n: p.grad for n, p in extractor.named_parameters() if p.grad is not None}))
    assert_close(*results)
    assert results[0][0]["features.denseblock1"].shape == (2, 14, 10, 9)


@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_of_a_program_exported_in_training_mode_can_be_switched_off(channels_last):
    """As torchao's ``move_exported_model_to_eval`` does, which looks for these two operators."""
    model, switched = ours(drop_rate=0.4), {}
    x = images(dtype=torch.float32).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    exported = torch.export.export(model, (x,)).module()
    for node in exported.graph.nodes:
        switch = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}.get(node.target)
        if switch is not None:
            node.update_arg(switch, False)
            switched[node.target] = switched.get(node.target, 0) + 1
    exported.recompile()
    assert list(switched.values()) == [13, 5]
    assert exported(x).equal(exported(x)) and error(exported(x), model.eval()(x)) < TOLERANCE
