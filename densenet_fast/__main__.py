"""The command line: ``python -m densenet_fast info | train | bench``."""

import argparse
import json
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from densenet_fast.benchmarking import command as bench
    from densenet_fast.training.command import add_arguments, execute

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m densenet_fast", description="DenseNets that train faster.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    info = commands.add_parser("info", help="what runs where on this machine, and why", allow_abbrev=False)
    info.add_argument("--json", action="store_true", help="for programs")
    train = commands.add_parser("train", help="train on real images, also side by side with stock", allow_abbrev=False)
    add_arguments(train)
    compare = commands.add_parser("bench", help="time and memory beside stock", allow_abbrev=False)
    bench.add_arguments(compare)

    options = parser.parse_args(arguments)
    if options.command == "bench":
        return bench.execute(compare, options, arguments[arguments.index("bench") + 1 :])
    given = vars(options)
    command = given.pop("command")
    if command == "train":
        return execute(train, given, arguments[arguments.index("train") + 1 :])
    if command == "info":
        from densenet_fast.info import facts, report

        print(json.dumps(facts(), indent=2) if given["json"] else report())
        return 0
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
