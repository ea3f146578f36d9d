"""The drop-in models against torchvision's."""

import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision.models.feature_extraction
from torch import nn

import densenet_fast
from densenet_fast import reference
from helpers import assert_same, error, randomise, step, twin

NAMES = ["densenet121", "densenet161", "densenet169", "densenet201"]
SMALL = dict(growth_rate=8, block_config=(2, 3, 2), num_init_features=12, num_classes=5)


def small(**options):
    return densenet_fast.DenseNet(**{**SMALL, **options})


def small_stock(**options):
    return torchvision.models.DenseNet(**{**SMALL, **options})


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights(name):
    torch.manual_seed(3)
    expected = getattr(torchvision.models, name)().state_dict()
    torch.manual_seed(3)
    got = getattr(densenet_fast, name)().state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training_step_equals_torchvision_in_float64(name, memory_efficient):
    expected = randomise(getattr(torchvision.models, name)(num_classes=10).double())
    got = twin(expected, getattr(densenet_fast, name)(num_classes=10, memory_efficient=memory_efficient))
    assert_same(got, expected, torch.randn(2, 3, 45, 67, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_eval_equals_torchvision_in_float64(name):
    expected = randomise(getattr(torchvision.models, name)(num_classes=10).double()).eval()
    got = twin(expected, getattr(densenet_fast, name)(num_classes=10))
    assert_same(got, expected, torch.randn(1, 3, 64, 33, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_five_sgd_steps_equal_torchvision(memory_efficient, channels_last):
    expected = small_stock(drop_rate=0.1).double()
    got = twin(expected, small(drop_rate=0.1, memory_efficient=memory_efficient))
    format = torch.channels_last if channels_last else torch.contiguous_format
    losses = {}
    for model in (got, expected):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        losses[model] = []
        for _ in range(5):
            x = torch.randn(4, 3, 39, 50, dtype=torch.float64)
            x = x.to(memory_format=format) if model is got else x
            loss = nn.functional.cross_entropy(model(x), torch.randint(5, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[model].append(loss.item())
    assert losses[got] == pytest.approx(losses[expected], rel=1e-9)
    assert losses[got][0] != pytest.approx(losses[got][-1], rel=1e-2)
    for (key, value), reference_value in zip(got.state_dict().items(), expected.state_dict().values()):
        assert error(value, reference_value) < 1e-9, key


def test_float32_is_no_less_accurate_than_torchvision():
    stock = randomise(torchvision.models.densenet121(num_classes=10))
    ours = twin(stock, densenet_fast.densenet121(num_classes=10))
    exact = twin(stock, torchvision.models.densenet121(num_classes=10)).double()
    x = torch.randn(4, 3, 64, 64)
    truth, theirs, mine = dict(step(exact, x.double())), dict(step(stock, x)), dict(step(ours, x))
    weights = [name for name in truth if name.startswith("grad ") and name != "grad x"]

    def total(values):
        return torch.cat([values[name].flatten().double() / truth[name].norm().clamp_min(1e-30) for name in weights])

    for name in ("output", "grad x"):
        assert error(mine[name], truth[name]) <= 2 * error(theirs[name], truth[name]), name
    assert error(total(mine), total(truth)) <= 2 * error(total(theirs), total(truth))
    buffers = [name for name, _ in stock.named_buffers() if "num_batches" not in name]
    for name in buffers:
        assert error(mine[name], truth[name]) <= 2 * error(theirs[name], truth[name]) + 1e-6, name


def test_running_statistics_are_updated_once_per_step():
    model = densenet_fast.DenseNet(8, (2, 2), 12, memory_efficient=True)
    model(torch.randn(2, 3, 40, 40)).sum().backward()
    counters = {name: b.item() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counters.values()) == {1}
    model.eval()(torch.randn(2, 3, 40, 40)).sum().backward()
    assert {b.item() for name, b in model.named_buffers() if name in counters} == {1}


def test_dropout_is_reproduced_by_the_seed():
    model = small(drop_rate=0.3)
    x = torch.randn(2, 3, 40, 40)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert outputs[0].equal(outputs[1]) and not outputs[0].equal(outputs[2])
    model.eval()
    assert model(x).equal(model(x))


def test_output_has_the_memory_format_of_the_input():
    model = small()
    x = torch.randn(2, 3, 128, 128)
    assert model.features(x).is_contiguous()
    last = model.features(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert model.features[:4](x).shape == (2, 12, 32, 32)
    grey = torch.randn(2, 1, 128, 128).expand(-1, 3, -1, -1)
    assert model.features(grey).view(2, -1).shape[0] == 2


def test_output_of_the_last_block_may_be_rectified_by_the_model():
    model = small()
    model.features.norm5 = nn.Identity()
    model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)).sum().backward()
    assert model.features.conv0.weight.grad.isfinite().all()


def test_adversarial_training_equals_torchvision():
    """A gradient with respect to the input, through which the weights' gradients pass too."""
    expected = randomise(small_stock().double()).eval()
    got = twin(expected, small())
    z, results = torch.randn(2, 3, 40, 40, dtype=torch.float64), []
    for model in (got, expected):
        x = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        loss = model(x + 0.1 * g).square().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
    assert all(error(a, b) < 1e-9 for a, b in zip(*results))


def test_meta_device():
    with torch.device("meta"):
        assert densenet_fast.densenet121()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("training", [True, False])
def test_feature_extraction(training):
    model = small(drop_rate=0.2).train(training)
    extract = torchvision.models.feature_extraction.create_feature_extractor(model, ["features.norm5"])
    x = torch.randn(2, 3, 40, 40)
    torch.manual_seed(1)
    features = extract(x)["features.norm5"]
    torch.manual_seed(1)
    assert features.allclose(copy.deepcopy(model).features(x), atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_copies_pickles_and_state_dicts_give_the_same_output(fused):
    model = randomise(small()).eval()
    x = torch.randn(2, 3, 40, 40)
    with densenet_fast.set_fused(fused), torch.no_grad():
        expected = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = small().eval()
        loaded.load_state_dict(model.state_dict())
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            loaded,
        ):
            assert other(x).equal(expected)


def test_inference_mode_and_no_grad():
    model = randomise(small())
    x = torch.randn(2, 3, 40, 40)
    expected = copy.deepcopy(model)(x)
    with torch.inference_mode():
        assert copy.deepcopy(model)(x).equal(expected)
    with torch.no_grad():
        output = copy.deepcopy(model)(x)
    assert output.equal(expected) and not output.requires_grad


def test_two_forwards_before_one_backward():
    got, expected = small().double(), None
    expected = twin(got, small_stock())
    x, y = torch.randn(2, 2, 3, 40, 40, dtype=torch.float64)
    for model in (got, expected):
        first, second = model(x), model(y)
        (first * second).sum().backward()
    for (name, a), b in zip(got.named_parameters(), expected.parameters()):
        assert error(a.grad, b.grad) < 1e-9, name


def test_retain_graph_gives_the_same_gradients_twice():
    model = small(memory_efficient=True)
    output = model(torch.randn(2, 3, 40, 40))
    cotangent = torch.randn_like(output)
    first = torch.autograd.grad(output, list(model.parameters()), cotangent, retain_graph=True)
    second = torch.autograd.grad(output, list(model.parameters()), cotangent)
    assert all(a.equal(b) for a, b in zip(first, second))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_autocast_is_no_less_accurate_than_torchvision(memory_efficient):
    stock = randomise(small_stock())
    ours = twin(stock, small(memory_efficient=memory_efficient))
    exact = twin(stock, small_stock()).double()
    x = torch.randn(8, 3, 64, 64)

    class Autocast(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    truth = {
        f"grad model.{n[5:]}" if n.startswith("grad ") and n != "grad x" else n: v for n, v in step(exact, x.double())
    }
    theirs, mine = dict(step(Autocast(stock), x)), dict(step(Autocast(ours), x))
    assert mine["output"].dtype == torch.bfloat16
    gradients = [name for name in truth if name.startswith("grad ")]
    for name in ("output", "grad x"):
        assert error(mine[name], truth[name]) <= 2 * error(theirs[name], truth[name]), name
    mean = {k: sum(error(v[n], truth[n]) for n in gradients) / len(gradients) for k, v in (("o", mine), ("s", theirs))}
    assert mean["o"] <= 2 * mean["s"]
    assert all(mine[name].dtype == torch.float32 for name in gradients)


def test_several_threads_at_once():
    model = randomise(small()).eval()
    batches = torch.randn(8, 2, 3, 40, 40)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    expected = [gradient(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(gradient, batches))
    assert all(error(a, b) < 1e-5 for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    stock = randomise(small_stock()).to(dtype)
    ours = twin(stock, small())
    exact = twin(stock, small_stock()).double()
    x = torch.randn(8, 3, 64, 64).to(dtype)
    truth, theirs, mine = exact.eval()(x.double()), stock.eval()(x), ours.eval()(x)
    assert mine.dtype == dtype
    assert error(mine, truth) <= 2 * error(theirs, truth)
    output = ours.train()(x)
    output.backward(torch.randn_like(output))
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in ours.parameters())


def test_frozen_parts_get_no_gradient_and_the_rest_the_same():
    expected = randomise(small_stock().double())
    got = twin(expected, small())
    for model in (got, expected):
        model.features.conv0.requires_grad_(False)
        model.features.denseblock1.requires_grad_(False)
        model.features.denseblock2.denselayer2.conv1.requires_grad_(False)
        model.features.denseblock2.denselayer1.norm1.eval().requires_grad_(False)
        model.features.transition2.norm.eval()
    x = torch.randn(3, 3, 50, 40, dtype=torch.float64)
    for model in (got, expected):
        output = model(x)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for (name, a), b in zip(got.named_parameters(), expected.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert error(a.grad, b.grad) < 1e-9, name
    for (name, a), b in zip(got.named_buffers(), expected.buffers()):
        assert error(a, b) < 1e-12 or a.equal(b), name


@pytest.mark.parametrize(
    "options",
    [
        dict(bn_size=None, compression=1, small_inputs=True),
        dict(compression=1, small_inputs=True),
        dict(bn_size=None, small_inputs=True, drop_rate=0.2),
        dict(small_inputs=True, compression=0.37),
        dict(bn_size=None, in_channels=1, bias=True),
        dict(block_config=(3,), bias=True),
        dict(block_config=(1, 1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_variants_equal_the_reference(options, training):
    expected = randomise(reference.DenseNet(**{**SMALL, **options}).double())
    got = twin(expected, small(**options))
    assert all(row.fused for row in densenet_fast.explain(got))
    got.train(training), expected.train(training)
    x = torch.randn(2, options.get("in_channels", 3), 70, 66, dtype=torch.float64)
    if options.get("small_inputs"):
        x = x[..., :17, :22]
    assert_same(got, expected, x, 1e-9)


def test_signature_starts_as_torchvisions():
    theirs = list(inspect.signature(torchvision.models.DenseNet.__init__).parameters)
    assert list(inspect.signature(densenet_fast.DenseNet.__init__).parameters)[: len(theirs)] == theirs


@pytest.mark.parametrize(
    "argument, value",
    [
        ("block_config", ()),
        ("drop_rate", 1.5),
        ("compression", 0),
        ("compression", 1.5),
        ("compression", 0.01),
        ("growth_rate", 0),
        ("bn_size", 0),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        small(**{argument: value})


def test_bad_inputs_raise_what_stock_raises():
    got, expected = small(), small_stock()
    cases = [
        torch.randn(2, 4, 40, 40),
        torch.randn(3, 40, 40, 40),
        torch.randint(9, (2, 3, 40, 40)),
        torch.randn(2, 3, 40, 40, dtype=torch.float16),
        torch.randn(1, 3, 16, 16),
        torch.randn(2, 3),
    ]
    for x in cases:
        raised = []
        for model in (got, expected):
            with pytest.raises(Exception) as caught:
                model(x)
            raised.append(caught.type)
        assert issubclass(raised[0], raised[1]), x.shape
    empty = torch.randn(0, 3, 40, 40)
    assert got(empty).shape == expected(empty).shape == (0, 5)
