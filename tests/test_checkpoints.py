"""Pretrained weights: names, enum members, paths, legacy keys, and what is refused."""

import re

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


def test_pretrained_is_still_understood(hosted):
    for arguments in (dict(pretrained=True), dict(weights=True)):
        with pytest.warns(FutureWarning, match="pretrained"):
            model = densenet_fast.densenet121(**arguments)
        assert model.classifier.weight.equal(hosted.classifier.weight)
    with pytest.warns(FutureWarning):
        assert densenet_fast.densenet121(False).classifier.weight.shape == (1000, 1024)


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
        ("densenet121", "IMAGENET1K_V2", {}, ValueError, "weights: expected one of .* got 'IMAGENET1K_V2'"),
        ("densenet121", "missing.pth", {}, ValueError, "path of a file that exists, got 'missing.pth'"),
        ("densenet121", 3, {}, TypeError, "weights: expected .* got int"),
        ("densenet121", "DenseNet161_Weights.DEFAULT", {}, ValueError, "weights"),
        ("densenet161", torchvision.models.DenseNet121_Weights.DEFAULT, {}, ValueError, "DenseNet161_Weights"),
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
