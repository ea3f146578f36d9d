"""Pretrained weights: names, enum members, paths, legacy keys, and what is refused."""

import inspect
import re
import subprocess
import sys
import typing
import warnings

import pytest
import torch
import torchvision

import densenet_fast
from densenet_fast import checkpoints


def legacy(state_dict):
    """The state dict in the key names of torchvision's hosted checkpoints, without the counters they lack."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)")
    return {pattern.sub(r"\1.\2", key): value for key, value in state_dict.items() if "num_batches" not in key}


@pytest.fixture
def hosted(tmp_path, monkeypatch):
    """A hub directory that holds, under the hosted file's name, a legacy checkpoint of random weights."""
    model = torchvision.models.densenet121()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(legacy(model.state_dict()), folder / "densenet121-a639ec97.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return model


@pytest.mark.parametrize(
    "weights",
    [
        "IMAGENET1K_V1",
        "DEFAULT",
        "DenseNet121_Weights.IMAGENET1K_V1",
        torchvision.models.DenseNet121_Weights.IMAGENET1K_V1,
        torchvision.models.DenseNet121_Weights.DEFAULT,
    ],
    ids=str,
)
def test_hosted_weights_with_legacy_keys(hosted, weights):
    model = densenet_fast.densenet121(weights=weights, progress=False)
    for (key, value), expected in zip(model.state_dict().items(), hosted.state_dict().values()):
        assert value.equal(expected), key


@pytest.mark.parametrize("arguments", [dict(pretrained=True), dict(weights=False)])
def test_pretrained_warns_as_torchvision_does(hosted, arguments):
    """The same warnings in the same order, and the model that they promise."""
    warned = []
    for library in (densenet_fast, torchvision.models):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = library.densenet121(progress=False, **arguments)
        caught = [w for w in caught if issubclass(w.category, UserWarning)]
        warned.append([(w.category, re.sub(r"\s+", " ", str(w.message))) for w in caught])
        assert model.classifier.weight.equal(hosted.classifier.weight) == next(iter(arguments.values()))
    assert warned[0] == warned[1] and len(warned[0]) == 1 + ("pretrained" in arguments)


def test_the_warning_points_to_the_caller():
    with pytest.warns(UserWarning, match="Arguments other than a weight enum or `None`") as caught:
        densenet_fast.densenet121(False)
    assert {w.filename for w in caught} == {__file__}


def test_pretrained_and_weights_exclude_each_other(hosted):
    with pytest.raises(TypeError, match="pretrained: expected no weights beside it, got 'DEFAULT'"):
        densenet_fast.densenet121("DEFAULT", pretrained=False)


def test_download_is_hash_checked_and_loads_weights_only(monkeypatch):
    seen = {}

    def load(url, **options):
        seen.update(options, url=url)
        return densenet_fast.densenet121().state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    densenet_fast.densenet121("DEFAULT", progress=False)
    assert seen["url"] == torchvision.models.DenseNet121_Weights.DEFAULT.url
    assert seen["check_hash"] and seen["weights_only"] and seen["progress"] is False


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_urls_are_torchvisions(name):
    assert checkpoints.URLS[name] == torchvision.models.get_model_weights(name).DEFAULT.url


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_local_checkpoints(tmp_path, wrap, prefix):
    expected = densenet_fast.densenet121(num_classes=7)
    state = {prefix + key: value for key, value in legacy(expected.state_dict()).items()}
    path = tmp_path / "model.pth"
    torch.save(wrap(state), path)
    for weights in (path, str(path)):
        model = densenet_fast.densenet121(weights=weights)
        assert all(a.equal(b) for a, b in zip(model.parameters(), expected.parameters()))


def test_densenet264_takes_a_path(tmp_path):
    expected = densenet_fast.densenet264(num_classes=2)
    torch.save(expected.state_dict(), tmp_path / "model.pth")
    model = densenet_fast.densenet264(weights=tmp_path / "model.pth")
    assert model.classifier.weight.equal(expected.classifier.weight)


@pytest.mark.parametrize(
    "name, weights, options, error, words",
    [
        ("densenet121", "IMAGENET1K_V2", {}, KeyError, "weights: expected one of .* got 'IMAGENET1K_V2'"),
        ("densenet121", "missing.pth", {}, ValueError, "path of a file that exists, got 'missing.pth'"),
        ("densenet121", 3, {}, TypeError, "weights: expected .* got int"),
        ("densenet121", "DenseNet161_Weights.DEFAULT", {}, KeyError, "got 'DenseNet161_Weights.DEFAULT'"),
        ("densenet161", torchvision.models.DenseNet121_Weights.DEFAULT, {}, TypeError, "DenseNet161_Weights"),
        ("densenet121", torchvision.models.ResNet18_Weights.DEFAULT, {}, TypeError, "got ResNet18_Weights"),
        ("densenet264", "DEFAULT", {}, ValueError, "none are hosted for densenet264"),
        ("densenet121", "DEFAULT", dict(num_classes=10), ValueError, "num_classes: expected 1000.* got 10"),
    ],
)
def test_what_is_refused(hosted, name, weights, options, error, words):
    with pytest.raises(error, match=words):
        getattr(densenet_fast, name)(weights=weights, **options)


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "classifier, got none"),
        ({"backbone.conv0.weight": torch.zeros(1)}, r"got \['backbone.conv0.weight'\]"),
        ([torch.zeros(1)], "expected a state dict, got a list"),
        (b"no checkpoint", "expected a checkpoint of tensors, got .*model.pth"),
        (b"", "expected a checkpoint of tensors, got .*model.pth"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, words):
    path = tmp_path / "model.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        densenet_fast.densenet121(weights=path)


HOSTED = ["densenet121", "densenet161", "densenet169", "densenet201"]


@pytest.mark.parametrize("name", HOSTED)
def test_torchvision_finds_the_weights_of_our_functions(name):
    function = getattr(densenet_fast, name)
    enum = torchvision.models.get_model_weights(name)
    assert torchvision.models.get_model_weights(function) is enum
    assert getattr(densenet_fast, enum.__name__) is enum and enum.__name__ in dir(densenet_fast)
    assert enum in typing.get_args(typing.get_type_hints(function)["weights"])
    assert f"{enum.__name__}', str" in str(inspect.signature(function))


WITHOUT_TORCHVISION = """
import sys, typing
sys.modules["torchvision"] = None
import densenet_fast
hints = typing.get_type_hints(densenet_fast.densenet121)["weights"]
assert str in typing.get_args(hints), hints
assert not hasattr(densenet_fast, "DenseNet264_Weights")
try:
    from densenet_fast import DenseNet121_Weights
except ModuleNotFoundError as error:
    print(error)
"""


def test_the_enums_without_torchvision():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION], capture_output=True, text=True)
    assert run.stdout.startswith("DenseNet121_Weights: expected torchvision"), run.stderr
