"""``python -m densenet_fast train``: from the command line to a run or a comparison."""

import argparse
import os
import sys
from collections.abc import Sequence

from densenet_fast.training.arguments import add_arguments
from densenet_fast.training.checkpoint import find_checkpoint, read_checkpoint
from densenet_fast.training.compare import compare
from densenet_fast.training.errors import UsageError
from densenet_fast.training.run import Diverged, train
from densenet_fast.training.settings import resolve

__all__ = ["add_arguments", "execute"]


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
