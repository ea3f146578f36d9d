"""``python -m densenet_fast train``: from the command line to a run or a comparison."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from densenet_fast.training.checkpoint import find_checkpoint, read_checkpoint
from densenet_fast.training.compare import compare
from densenet_fast.training.run import Diverged, train
from densenet_fast.training.settings import DATA_SETS, MODELS, PRESETS, UsageError, resolve

__all__ = ["add_arguments", "execute"]

EPILOG = """\
defaults:
  digits             DenseNet-BC (L = 52, k = 12), 20 epochs, one thread
  fashion-mnist      DenseNet-BC (L = 40, k = 12), 40 epochs
  cifar10, cifar100  the paper's DenseNet-BC (L = 100, k = 12), 300 epochs
  imagefolder        DenseNet-121, images of 224 x 224 pixels, batches of 256, 90 epochs
  all                batches of 64 augmented images; SGD with Nesterov momentum 0.9, weight decay 1e-4, and learning
                     rate 0.1, divided by 10 after 1/2 and 3/4 of the epochs (imagefolder: 1/3 and 2/3)

examples:
  python -m densenet_fast train --data digits --compare reference
  python -m densenet_fast train --preset d2l --root data --download
  python -m densenet_fast train --preset cifar-bc-100 --root data --amp bf16 --channels-last
  python -m densenet_fast train --data imagefolder --root imagenet --model densenet201 --workers 8
  python -m densenet_fast train --resume runs/digits
  torchrun --nproc_per_node 2 -m densenet_fast train --preset cifar-bc-100 --root data --sync-bn
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the training command. Only those that are given appear in the parsed namespace."""
    parser.description = "Trains a DenseNet; defaults depend on the data set and the preset, flags override both."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS
    _add_data(parser.add_argument_group("data"))
    _add_network(parser.add_argument_group("network"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_execution(parser.add_argument_group("execution"))
    _add_files(parser.add_argument_group("files"))


def execute(parser: argparse.ArgumentParser, given: dict[str, object], arguments: Sequence[str]) -> int:
    """Runs the training command.

    Args:
        parser: reports bad input and exits with code 2.
        given: the flags that were given, parsed.
        arguments: the same as they were typed.

    Returns:
        The exit code.
    """
    try:
        state = read_checkpoint(find_checkpoint(str(given["resume"]))) if "resume" in given else None
        settings = resolve(given, state and state["settings"])
        if settings.compare:
            return compare(settings, arguments)
        train(settings, state)
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            return 2
        parser.error(str(error))
    except Diverged as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume with the run directory continues after its last whole epoch", file=sys.stderr)
        return 130
    return 0


Group = argparse._ArgumentGroup
SWITCH = argparse.BooleanOptionalAction


def _add_data(group: Group) -> None:
    group.add_argument(
        "--preset", choices=PRESETS, help="a published training: the d2l.ai chapter's, the paper's on CIFAR"
    )
    group.add_argument("--data", choices=DATA_SETS, help="digits needs no files: they come with scikit-learn")
    group.add_argument("--root", metavar="DIR", help="where the data set is; for imagefolder, DIR/train and DIR/val")
    group.add_argument("--download", action=SWITCH, help="fetch the data set into --root first")
    group.add_argument("--image-size", type=_integer(1), metavar="N", help="resize the images to N x N pixels")
    group.add_argument("--augment", action=SWITCH, help="random crops and flips while training (digits: shifts)")
    group.add_argument("--normalize", action=SWITCH, help="subtract the training set's mean, divide by its deviation")


def _add_network(group: Group) -> None:
    group.add_argument(
        "--model",
        choices=MODELS,
        metavar="NAME",
        help="densenet (the data set's default, changed by the flags below), densenet121, 161, 169, 201 or 264; with "
        "reference or reference-densenet121 ... the same network in stock PyTorch",
    )
    group.add_argument("--growth-rate", type=_integer(1), metavar="K", help="channels that each layer adds")
    group.add_argument(
        "--block-config", type=_layers, metavar="N,N,...", help="layers of each dense block, as 16,16,16"
    )
    group.add_argument("--num-init-features", type=_integer(1), metavar="N", help="channels of the stem")
    group.add_argument("--bn-size", type=_bottleneck, metavar="N", help="bottleneck of N * K channels; 0 for none")
    group.add_argument("--compression", type=_number(0, 1, above=True), metavar="X", help="a transition keeps X of C")
    group.add_argument("--small-inputs", action=SWITCH, help="the 3x3 CIFAR stem")
    group.add_argument("--drop-rate", type=_number(0, 1), metavar="P", help="dropout of each layer's new features")
    group.add_argument("--bias", action=SWITCH, help="convolutions with biases")
    group.add_argument("--initial-weights", metavar="FILE", help="start from this state dict or checkpoint")


def _add_optimisation(group: Group) -> None:
    group.add_argument("--epochs", type=_integer(1), metavar="N")
    group.add_argument("--batch-size", type=_integer(2), metavar="N", help="images per step, over all processes")
    group.add_argument("--max-steps", type=_integer(1), metavar="N", help="at most N steps per epoch")
    group.add_argument("--lr", type=_number(0, above=True), metavar="X", help="initial learning rate")
    group.add_argument(
        "--milestones",
        type=_milestones,
        metavar="X,X,...",
        help="fractions of the epochs after which the learning rate is divided by 10, as 0.5,0.75; none for never",
    )
    group.add_argument("--momentum", type=_number(0), metavar="X")
    group.add_argument("--nesterov", action=SWITCH)
    group.add_argument("--weight-decay", type=_number(0), metavar="X")
    group.add_argument("--seed", type=_integer(0), metavar="N", help="of weights, data order, augmentation and dropout")


def _add_execution(group: Group) -> None:
    group.add_argument("--device", type=_device, metavar="NAME", help="cpu, cuda or cuda:1; a GPU where there is one")
    group.add_argument("--amp", choices=("bf16", "fp16", "off"), help="mixed precision")
    group.add_argument("--memory-efficient", action=SWITCH, help="recompute the bottlenecks in the backward pass")
    group.add_argument("--channels-last", action=SWITCH, help="images in channels_last memory")
    group.add_argument("--compile", action=SWITCH, help="through torch.compile")
    group.add_argument("--sync-bn", action=SWITCH, help="batch statistics over all processes of torchrun")
    group.add_argument("--workers", type=_integer(0), metavar="N", help="processes that prepare the data")
    group.add_argument("--threads", type=_integer(1), metavar="N", help="CPU threads of each process")


def _add_files(group: Group) -> None:
    group.add_argument("--out", metavar="DIR", help="run directory; a new one below runs/ by default")
    group.add_argument("--resume", metavar="PATH", help="continue this run directory or checkpoint, with its settings")
    group.add_argument(
        "--compare",
        choices=("reference", "none"),
        help="train the stock implementation too, from the same weights and batches, and end with a table of both",
    )


def _integer(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {low}, got {text!r}")
        return value

    return parse


def _number(low: float, high: float | None = None, *, above: bool = False) -> Callable[[str], float]:
    expected = f"a number {'above' if above else 'of at least'} {low}" + ("" if high is None else f", at most {high}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        too_low = value <= low if above else value < low
        if not math.isfinite(value) or too_low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _layers(text: str) -> tuple[int, ...]:
    return _tuple(text, _integer(1), "layers per block as 16,16,16")


def _milestones(text: str) -> tuple[float, ...]:
    return () if text == "none" else _tuple(text, _number(0, 1), "fractions of the epochs as 0.5,0.75, or none")


def _tuple(text: str, parse: Callable[[str], Any], expected: str) -> tuple[Any, ...]:
    try:
        return tuple(parse(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from error


def _bottleneck(text: str) -> int | None:
    return _integer(0)(text) or None


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"expected a device torch can use ({torch.cuda.device_count()} GPUs), got {text!r}"
        )
    return text
