"""What a kernel's loop has on its way into shared memory while its products run, read off its PTX."""

import re

from torch import Tensor

from densenet_fast.backends.triton.races import parse

PRODUCTS = ("mma.sync", "wgmma.mma_async")


def in_flight(item, ptx):
    """The arguments of a launch whose next tile is being copied, all of it, while the products of one tile run.

    In the loop that makes the products, they are read by asynchronous copies alone. The loop waits ahead of its
    products, and leaves as many groups of copies unfinished as it begins. Empty where there is no such loop.
    """
    statements, labels, parameters = parse(ptx)
    arguments = zip(parameters, item.kernel.arg_names, item.arguments)
    pointers = {parameter: name for parameter, name, argument in arguments if isinstance(argument, Tensor)}
    sources = sources_of(statements)
    found = set()
    for loop in loops(statements, labels):
        products = [i for i, statement in enumerate(loop) if statement.name.startswith(PRODUCTS)]
        waits = [(i, int(s.operands[0])) for i, s in enumerate(loop) if s.name.startswith("cp.async.wait_group")]
        begun = sum(statement.name.startswith("cp.async.commit_group") for statement in loop)
        if products and waits and all(i < products[0] and left >= begun for i, left in waits):
            read = {how: set() for how in ("cp.async.c", "ld.global")}
            for how, addresses in read.items():
                for statement in loop:
                    if statement.name.startswith(how) and len(statement.operands) > 1:
                        addresses |= origins(statement.operands[1], sources)
            found |= read["cp.async.c"] & pointers.keys() - read["ld.global"]
    return {pointers[name] for name in found}


def loops(statements, labels):
    """The bodies of the innermost loops."""
    jumps = [(labels[s.operands[0]], i) for i, s in enumerate(statements) if s.name.split(".")[0] == "bra"]
    backward = [(first, last) for first, last in jumps if first <= last]
    for first, last in backward:
        if not any(first <= inner and end <= last and (inner, end) != (first, last) for inner, end in backward):
            yield statements[first : last + 1]


def sources_of(statements):
    """What each register is computed from, in any statement: registers and parameters."""
    sources = {}
    for statement in statements:
        if statement.operands and not statement.name.startswith(("ld.global", "ld.shared", "st.", "cp.")):
            target, *operands = statement.operands
            for register in re.findall(r"%\w+", target):
                sources.setdefault(register, set()).update(re.findall(r"%\w+|\w+_param_\d+", " ".join(operands)))
    return sources


def origins(address, sources):
    """The registers and parameters that an address is computed from."""
    found, ahead = set(), re.findall(r"%\w+", address)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += sources.get(name, ())
    return found
