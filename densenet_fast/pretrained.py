"""Saves a model to a folder, and loads it from a folder or from a repository of the Hugging Face Hub.

``config.json`` contains the model's arguments, ``model.safetensors`` its tensors. Repositories of timm's DenseNets work
too.
"""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import checkpoints, thirdparty
from densenet_fast.reference import ARCHITECTURES

CONFIGURATION, TENSORS = "config.json", "model.safetensors"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save(model: nn.Module, arguments: Mapping[str, Any], folder: str | PathLike[str]) -> None:
    """Writes ``model`` and the ``arguments`` of its class to ``folder``. Creates the folder if it does not exist.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: the folder is a file, or a part of the model was replaced, so that its arguments no longer
            rebuild it.
    """
    thirdparty.needed("safetensors", "save_pretrained")
    from safetensors.torch import save_file

    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {path}")
    state_dict = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        check("model: expected", arguments, type(model)(**arguments), state_dict)
    path.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, path / TENSORS, metadata={"format": "pt"})
    (path / CONFIGURATION).write_text(json.dumps(dict(arguments), indent=2) + "\n")


def read(
    source: str | PathLike[str], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the arguments and the tensors of a model.

    Args:
        source: a folder, or the name of a repository.
        arguments: replace saved ones of the same name.
        options: for ``huggingface_hub.hf_hub_download``.

    Raises:
        ModuleNotFoundError: safetensors is not installed, or, for a repository, huggingface_hub.
        ValueError: the folder does not exist, or does not contain a model.
    """
    thirdparty.needed("safetensors", "from_pretrained")
    from safetensors.torch import load_file

    folder = Path(source).expanduser()
    if folder.is_dir():
        configuration, tensors = folder / CONFIGURATION, folder / TENSORS
        missing = [path.name for path in (configuration, tensors) if not path.is_file()]
        if missing:
            raise ValueError(f"source: expected {CONFIGURATION} and {TENSORS} in {folder}, got none of {missing}")
    elif isinstance(source, str) and _REPOSITORY.fullmatch(source):
        thirdparty.needed("huggingface_hub", f"from_pretrained({source!r}), which is no folder,")
        from huggingface_hub import hf_hub_download

        configuration, tensors = (Path(hf_hub_download(source, name, **options)) for name in (CONFIGURATION, TENSORS))
    else:
        expected = "a folder that exists or the name of a repository, owner/name"
        raise ValueError(f"source: expected {expected}, got {str(source)!r}")
    state_dict = checkpoints.normalised(load_file(tensors))
    return {**_arguments(source, configuration, state_dict), **arguments}, state_dict


def _arguments(source: Any, path: Path, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The model's arguments in the configuration file at ``path``. timm's configurations name the architecture."""
    try:
        configuration = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"source: expected JSON in {path}: {error}") from error
    if not isinstance(configuration, dict):
        raise ValueError(f"source: expected arguments by name in {path}, got a {type(configuration).__name__}")
    if "architecture" not in configuration:
        return configuration
    name = configuration["architecture"]
    if name not in ARCHITECTURES or "features.conv0.weight" not in state_dict:
        raise ValueError(f"source: expected one of {[*ARCHITECTURES]}, got {name!r} in {source}")
    channels = state_dict["features.conv0.weight"].shape[1]
    classes = checkpoints.num_classes(state_dict)
    return {**ARCHITECTURES[name]._asdict(), "in_channels": channels, "num_classes": classes}


def check(what: str, arguments: Mapping[str, Any], model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Checks that ``state_dict`` has the tensors of ``model``, which was built with ``arguments``.

    Raises:
        ValueError: a tensor is missing, has another shape, or does not belong to the model. The message begins with
            ``what``.
    """
    expected = model.state_dict()
    for name in {**expected, **state_dict}:
        if not name.endswith("num_batches_tracked"):  # old checkpoints do not have it
            shape, got = (f"{tuple(t[name].shape)}" if name in t else "none" for t in (expected, state_dict))
            if shape != got:
                call = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
                call = f"{type(model).__name__}({call})"
                raise ValueError(f"{what} the tensors of {call}, with {name} {shape}, got {got}")
