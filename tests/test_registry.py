"""Where users look for models: by name, as torchvision has it, in timm's registry, in torch.hub, in folders and
repositories."""

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import densenet_fast
from helpers import randomise

ROOT = Path(densenet_fast.__file__).parents[1]
SMALL = dict(growth_rate=4, block_config=(1, 2), num_init_features=6, num_classes=3)


def test_models_by_name():
    model = densenet_fast.get_model("DenseNet121", num_classes=3, memory_efficient=True)
    assert type(model) is densenet_fast.DenseNet and model.classifier.out_features == 3
    assert densenet_fast.list_models() == ["densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]
    assert densenet_fast.list_models("*1", exclude=["*161"]) == ["densenet121", "densenet201"]


@pytest.mark.parametrize("name", ["resnet18", 121])
def test_unknown_models_are_named(name):
    with pytest.raises(ValueError, match=rf"name: expected one of \['densenet121', .* got {name!r}"):
        densenet_fast.get_model(name)


def test_timm():
    timm = pytest.importorskip("timm")
    names = densenet_fast.register_timm()
    assert names == densenet_fast.register_timm() and "densenet121_fast" in names
    assert timm.list_models("densenet121_fast", pretrained=True) == [
        name.replace("densenet121", "densenet121_fast") for name in timm.list_models("densenet121", pretrained=True)
    ]
    config = timm.get_pretrained_cfg("densenet121_fast.ra_in1k")
    assert config.hf_hub_id == "timm/densenet121.ra_in1k" and config.input_size == (3, 224, 224)
    arguments = dict(num_classes=3, in_chans=1)
    ours, theirs = (timm.create_model(name, **arguments) for name in ("densenet121_fast.ra_in1k", "densenet121"))
    assert isinstance(ours, type(theirs))
    assert ours.pretrained_cfg["tag"] == "ra_in1k" and {row.fused for row in densenet_fast.explain(ours)} == {True}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)
    features = timm.create_model("densenet121_fast", features_only=True, out_indices=(1, 3))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == features.feature_info.channels()


def test_timm_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="register_timm needs timm, .* pip install timm"):
        densenet_fast.register_timm()


def test_hub():
    model = torch.hub.load(str(ROOT), "densenet121", source="local", num_classes=3)
    assert type(model) is densenet_fast.DenseNet and model.classifier.out_features == 3


@pytest.fixture
def saved(tmp_path):
    pytest.importorskip("safetensors")
    model = randomise(densenet_fast.DenseNet(**SMALL, in_channels=1, memory_efficient=True)).to(
        memory_format=torch.channels_last
    )
    model.save_pretrained(tmp_path / "new" / "model")
    return model, tmp_path / "new" / "model"


def assert_equal(model, expected):
    state_dict = expected.state_dict()
    assert model.state_dict().keys() == state_dict.keys()
    assert all(value.equal(state_dict[key]) for key, value in model.state_dict().items())


def test_a_folder(saved):
    model, folder = saved
    made = densenet_fast.DenseNet.from_pretrained(folder)
    assert_equal(made, model)
    assert not made.training and made.features.denseblock1.memory_efficient
    again = densenet_fast.DenseNet.from_pretrained(str(folder), drop_rate=0.5, memory_efficient=False)
    assert again.features.denseblock1.denselayer1.drop_rate == 0.5 and not again.features.denseblock1.memory_efficient


def test_a_new_classifier(saved, tmp_path):
    model, _ = saved
    model.classifier = torch.nn.Linear(model.classifier.in_features, 7)
    model.save_pretrained(tmp_path)
    assert_equal(densenet_fast.DenseNet.from_pretrained(tmp_path), model)


def test_a_replaced_part_is_named(saved, tmp_path):
    model, _ = saved
    model.features.conv0 = torch.nn.Conv2d(1, 6, 3)
    with pytest.raises(ValueError, match=r"model: expected .*conv0.weight \(6, 1, 7, 7\), got \(6, 1, 3, 3\)"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("*.json")]


def test_a_repository(saved, monkeypatch):
    model, folder = saved
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(folder / name)

    hub = types.ModuleType("huggingface_hub")
    hub.__spec__, hub.hf_hub_download = importlib.machinery.ModuleSpec("huggingface_hub", None), download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_equal(densenet_fast.DenseNet.from_pretrained("someone/model", revision="v2", token="secret"), model)
    options = dict(revision="v2", token="secret", cache_dir=None, force_download=False, local_files_only=False)
    assert asked == [("someone/model", name, options) for name in ("config.json", "model.safetensors")]


def test_a_repository_of_timms(tmp_path):
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    theirs = randomise(timm.create_model("densenet121", num_classes=5, in_chans=1)).eval()
    safetensors.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "densenet121", "num_classes": 5}))
    ours, x = densenet_fast.DenseNet.from_pretrained(tmp_path), torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-4)


@pytest.mark.parametrize("package, source", [("safetensors", "."), ("huggingface_hub", "someone/model")])
def test_what_is_missing_is_named(package, source, monkeypatch):
    if package != "safetensors":
        pytest.importorskip("safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"from_pretrained.* needs {package}.* pip install {package}"):
        densenet_fast.DenseNet.from_pretrained(source)


def configured(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    "change, words",
    [
        (shutil.rmtree, "source: expected a folder that exists or the name of a repository, owner/name, got '/"),
        (lambda folder: (folder / "config.json").unlink(), r"source: expected .* got none of \['config.json'\]"),
        (configured("{"), "source: expected JSON in .*config.json"),
        (configured("[]"), "source: expected arguments by name .* got a list"),
        (configured('{"depth": 3}'), "source: expected arguments of DenseNet .* got {'depth': 3}"),
        (configured("{}"), r"source: expected in .*conv0.weight \(64, 3, 7, 7\), got \(6, 1, 7, 7\)"),
        (configured('{"architecture": "densenet264d"}'), "source: expected one of .* got 'densenet264d'"),
    ],
)
def test_bad_folders_are_named(saved, change, words):
    _, folder = saved
    change(folder)
    with pytest.raises(ValueError, match=words):
        densenet_fast.DenseNet.from_pretrained(folder)


def test_a_file_is_no_folder(saved):
    model, folder = saved
    with pytest.raises(ValueError, match="folder: expected a folder, got the file .*config.json"):
        model.save_pretrained(folder / "config.json")
