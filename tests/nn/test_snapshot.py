"""Parts are examined again where something has changed, at the very next call, and only there."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import densenet_fast
from conversion import twins
from densenet_fast.nn import DenseBlock, Transition, calls, snapshot
from densenet_fast.nn.features import Features
from helpers import randomise, step

SMALL = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)


def small(**options):
    return randomise(densenet_fast.DenseNet(**{**SMALL, **options}).double())


def images(*size):
    return torch.randn(*(size or (2, 3, 20, 20)), dtype=torch.float64)


@pytest.fixture
def examined(monkeypatch):
    """The parts that are examined, in turn."""
    seen = []
    parts = (DenseBlock, "obstacle"), (Transition, "obstacle"), (Features, "stem_obstacle")
    for kind, name in (*parts, (densenet_fast.DenseNet, "head_obstacle")):
        monkeypatch.setattr(kind, name, noting(getattr(kind, name), seen))
    return seen


def noting(method, seen):
    return lambda self: (seen.append(self), method(self))[1]


def layer(model):
    return model.features.denseblock2.denselayer1


def normalisation(model):
    return layer(model).norm2


def parameter(shape):
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape))


def reordered(model):
    """The transition pools before it convolves."""
    children = model.features.transition1._modules
    children["conv"] = children.pop("conv")


def renamed(model):
    children = model.features.transition1._modules
    children["average"] = children.pop("pool")


def in_another_table(model):
    """The same tensors in another table, of which one is exchanged later."""
    norm = normalisation(model)
    norm._buffers = dict(norm._buffers)


def of_another_class(model):
    kind = type(layer(model).relu2)
    layer(model).relu2.__class__ = type("Twice", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


CHANGES = {
    "a hook": lambda m: layer(m).norm2.register_forward_hook(lambda m, i, o: 2 * o),
    "a pre-hook": lambda m: layer(m).conv1.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "a backward hook": lambda m: layer(m).conv1.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "a hook on a layer": lambda m: layer(m).register_forward_hook(lambda m, i, o: 2 * o),
    "a hook on a block": lambda m: m.features.denseblock1.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook on the features": lambda m: m.features.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook on the stem": lambda m: m.features.norm0.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook on the head": lambda m: m.features.norm5.register_forward_hook(lambda m, i, o: 2 * o),
    "another activation": lambda m: setattr(layer(m), "relu1", nn.ELU()),
    "another stem": lambda m: setattr(m.features, "pool0", nn.AvgPool2d(3, 2, 1)),
    "another head": lambda m: setattr(m.features, "norm5", nn.InstanceNorm2d(m.features.norm5.num_features)),
    "another normalisation": lambda m: setattr(layer(m), "norm2", nn.BatchNorm2d(16, eps=0.1).double()),
    "no normalisation": lambda m: setattr(layer(m), "norm2", nn.Identity()),
    "a part more": lambda m: m.features.transition1.append(nn.Tanh()),
    "a layer less": lambda m: m.features.denseblock2._modules.pop("denselayer2") and swap_head(m),
    "children in another order": reordered,
    "a child of another name": renamed,
    "a class": of_another_class,
    "a forward": lambda m: setattr(layer(m), "forward", lambda x: torch.cat(list(x), 1)[:, :4] * 2),
    "eps": lambda m: setattr(normalisation(m), "eps", 0.1),
    "momentum": lambda m: setattr(normalisation(m), "momentum", 0.5),
    "cumulative momentum": lambda m: setattr(m.features.norm0, "momentum", None),
    "a frozen normalisation": lambda m: normalisation(m).eval(),
    "a frozen head": lambda m: m.features.norm5.eval(),
    "inference": lambda m: m.eval(),
    "statistics that are not tracked": lambda m: setattr(normalisation(m), "track_running_stats", False),
    "no running statistics": lambda m: no_running_statistics(normalisation(m)),
    "dropout": lambda m: setattr(layer(m), "drop_rate", 0.5),
    "recomputation": lambda m: setattr(m.features.denseblock1, "memory_efficient", True),
    "dilation": lambda m: (setattr(layer(m).conv2, "dilation", (2, 2)), setattr(layer(m).conv2, "padding", (2, 2))),
    "circular padding": lambda m: circular(layer(m).conv2),
    "a parameter": lambda m: setattr(layer(m).conv1, "weight", parameter((16, *layer(m).conv1.weight.shape[1:]))),
    "a parameter of the stem": lambda m: setattr(m.features.norm0, "weight", parameter((8,))),
    "a bias": lambda m: layer(m).conv1.register_parameter("bias", parameter((16,))),
    "no weight": lambda m: setattr(normalisation(m), "weight", None),
    "a buffer": lambda m: normalisation(m).register_buffer("running_mean", torch.full((16,), 3.0).double()),
    "a counter": lambda m: setattr(m.features.norm0, "num_batches_tracked", torch.tensor(0)),
    "another table": in_another_table,
    "data": lambda m: setattr(layer(m).conv1.weight, "data", layer(m).conv1.weight.data * 2),
    "a frozen parameter": lambda m: layer(m).conv1.weight.requires_grad_(False),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(layer(m).conv2),
    "pruning": lambda m: prune.l1_unstructured(layer(m).conv2, "weight", 0.5),
    "a shared normalisation": lambda m: setattr(m.features.denseblock1.denselayer2, "norm2", shared(m)),
}


def shared(model):
    return model.features.denseblock1.denselayer1.norm2


def circular(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def no_running_statistics(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def swap_head(model):
    features = model.features
    features.norm5 = nn.BatchNorm2d(features.norm5.num_features - 4).double()
    model.classifier = nn.Linear(features.norm5.num_features, 3).double()


def same(got, expected):
    for (name, value), (_, reference) in zip(got, expected, strict=True):
        assert (value is None) == (reference is None), name
        assert value is None or value.equal(reference), name


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_calls_counts(change):
    """The numbers are those of a model that is called for the first time, bit by bit."""
    torch.manual_seed(1)
    model, x = small(), images()
    for _ in range(2):
        list(step(model, x))
    fresh, before = copy.deepcopy(model), dict(step(copy.deepcopy(model), x))
    for changed in (model, fresh):
        torch.manual_seed(2)
        change(changed)
    got = list(step(model, x))
    same(got, list(step(fresh, x)))
    unlike = [name for name, value in got if name not in before or not equal(value, before[name])]
    assert unlike or len(got) < len(before) or change in (CHANGES["recomputation"], CHANGES["another table"])


def equal(value, other):
    return value is other if value is None or other is None else value.equal(other)


def test_what_takes_its_place_is_looked_at_too():
    """A table in another one's place, equal at first, in which a counter is exchanged for an equal one after a call."""
    model, x = small(), images()
    model(x)
    in_another_table(model)
    model(x)
    normalisation(model)._buffers["num_batches_tracked"] = counter = normalisation(model).num_batches_tracked.clone()
    model(x)
    assert counter == 3


def test_an_unchanged_model_is_not_examined_again(examined):
    model, x = small(), images()
    model(x)
    assert {id(part) for part in examined} >= {id(model), id(model.features), id(model.features.transition1)}
    examined.clear()
    for size in ((2, 3, 32, 32), (1, 3, 64, 48), (5, 3, 32, 32)):
        list(step(model, images(*size)))
    with torch.no_grad():
        model(x)
    assert not examined
    normalisation(model).eps = 0.2
    model(x)
    assert set(examined) == {model.features.denseblock2}


@pytest.mark.parametrize("training", [True, False])
def test_modes_change_back_and_forth(training, examined):
    model, other, x = small(), small(), images()
    other.load_state_dict(model.state_dict())
    model.train(training)(x)
    for mode in (True, False, True):
        model.train(mode)
    other.train(True)
    other.load_state_dict(model.state_dict())
    examined.clear()
    assert model(x).equal(other(x))
    assert (model.features in examined) == (not training)


def test_tensors_of_other_dtypes():
    """What changes the tensors of a module in place."""
    model, x = small(), images()
    model(x)
    other = copy.deepcopy(model)
    assert model.float()(x.float()).equal(other.float()(x.float()))
    assert model.bfloat16()(x.bfloat16()).equal(other.bfloat16()(x.bfloat16()))
    layer(model).conv1.weight.data = layer(model).conv1.weight.data.double()
    with pytest.raises(RuntimeError, match=r"layers\[0\]: expected a convolution weight of the input's dtype"):
        model(x.bfloat16())
    layer(model).conv1.weight.data = layer(model).conv1.weight.data.bfloat16()
    model(x.bfloat16())
    layer(model).conv1.weight.data = layer(model).conv1.weight.data.transpose(0, 1)  # of the same size
    with pytest.raises(RuntimeError, match="as the first weight has"):
        model(x.bfloat16())


def test_inputs_of_every_kind_are_checked():
    block = DenseBlock(2, 6, 4, 4)
    block(torch.randn(2, 6, 4, 4))
    with pytest.raises(RuntimeError, match="x: expected 6 channels"):
        block(torch.randn(2, 5, 4, 4))
    with pytest.raises(RuntimeError, match="the input's dtype torch.float64"):
        block(torch.randn(2, 6, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 6, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 6, 4, 4)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="the input's dtype torch.bfloat16"):
        block(torch.randn(2, 6, 4, 4, dtype=torch.bfloat16))


def test_a_part_that_changes_a_later_one_in_the_same_call():
    """After code of the user's has run, what follows is looked at again."""

    class Freezing(nn.Module):
        def forward(self, x):
            layer(model).conv1.weight = parameter(layer(model).conv1.weight.shape)
            normalisation(model).eval()
            layer(model).relu1 = nn.ELU()
            return x

    model, x = small(), images()
    fresh = copy.deepcopy(model)
    model(x)
    assert calls.last(model.features.denseblock2).reason is None
    fresh(x)
    changer = Freezing()
    changer(x)
    fresh.features.denseblock2 = copy.deepcopy(model.features.denseblock2)
    model.features.denseblock2 = copy.deepcopy(model.features.denseblock2)
    layer(model).relu1 = nn.ReLU()
    model.features.relu0 = nn.Sequential(nn.ReLU(), changer)
    fresh.features.relu0 = nn.Sequential(nn.ReLU())
    assert model(x).equal(fresh(x))
    assert "relu1 is a ELU" in calls.last(model.features.denseblock2).reason


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_deleted_model_is_freed(cyclic):
    model, x = small(), images()
    if cyclic:
        layer(model).conv1.weight.register_hook(lambda gradient, model=model: gradient)
    for _ in range(2):
        model(x)
    alive = [weakref.ref(m) for m in (model, model.features, layer(model))]
    alive.append(weakref.ref(layer(model).conv1.weight))
    del model
    if cyclic:
        gc.collect()
    assert not any(ref() for ref in alive)


def test_two_threads_call_and_one_changes():
    model, x = small().eval(), images(1, 3, 32, 32)
    activations = nn.ReLU(), nn.ELU()
    expected = []
    for activation in activations:
        layer(model).relu1 = activation
        expected.append(copy.deepcopy(model)(x))
    stop = []

    def call(_):
        results = []
        while not stop:
            results.append(model(x))
        return results

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(call, i) for i in range(2)]
        for i in range(40):
            layer(model).relu1 = activations[i % 2]
        stop.append(True)
        results = [result for thread in running for result in thread.result()]
    assert results and all(any((result - value).abs().max() < 1e-9 for value in expected) for result in results)
    assert model(x).equal(expected[1])


def test_copies_and_pickles():
    model, x = small().eval(), images()
    expected, attributes = model(x), {name: set(vars(m)) for name, m in model.named_modules()}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert other(x).equal(expected)
        normalisation(other).eps = 0.3
        assert not other(x).equal(expected) and model(x).equal(expected)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}


def with_a_list(model):
    """Which may change in place."""
    layer(model).notes = ["changes"]
    return model.features.denseblock2


def with_a_history(model):
    norm = model.features.transition1.norm
    del norm.weight
    norm.weight = torch.ones(norm.num_features, dtype=torch.float64, requires_grad=True) * 2
    return model.features.transition1


def of_a_subclass(model):
    """Which may redefine anything."""
    model.features.denseblock1.__class__ = type("Own", (DenseBlock,), {})
    return model.features.denseblock1


@pytest.mark.parametrize("change", [with_a_list, with_a_history, of_a_subclass], ids=lambda change: change.__name__)
def test_what_cannot_be_held_is_examined_every_time(change, examined):
    model, x = small(), images()
    part = change(model)
    model(x)
    for _ in range(2):
        examined.clear()
        model(x)
        assert set(examined) == {part}
    assert calls.last(part).reason is None


@pytest.mark.parametrize("make", [lambda: twins.XrayBlock(3, 12, 8, 0.0), lambda: twins.Transition(12, 6)])
def test_converted_modules(make, monkeypatch):
    """They are remembered too, and what is changed counts."""
    module, x = densenet_fast.convert(randomise(make().double())), images(2, 12, 8, 8)
    for _ in range(2):
        list(step(module, x))
    found, examine = [], snapshot.Snapshot.of.__func__
    monkeypatch.setattr(
        snapshot.Snapshot, "of", classmethod(lambda cls, *args: (found.append(args[0]), examine(cls, *args))[1])
    )
    list(step(module, x))
    assert not found
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    for change in (
        lambda m: setattr(m, "eps", 0.2),
        lambda m: m.eval(),
        lambda m: setattr(m, "weight", parameter(m.weight.shape)),
        lambda m: m.register_forward_hook(lambda m, i, o: o * 2),
    ):
        change(norm)
        fresh = copy.deepcopy(module)
        same(list(step(module, x)), list(step(fresh, x)))
        assert (calls.last(module).reason is None) != bool(norm._forward_hooks)
    assert {id(m) for m in found} >= {id(module)}
