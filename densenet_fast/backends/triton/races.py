"""Shared memory that a warp group writes while another's matrix product may still read it (sm_90).

A warp group waits for its own products alone (wgmma.wait_group). Before anyone writes to memory that they read, the
block has to meet at a barrier behind that wait (triton issue 11047). Before they read what others wrote, it has to meet
at one behind the write.

This runs a kernel's PTX for one block, all threads at once. It computes the integers, which say where shared memory is
read and written. What depends on floating-point values stays unknown.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from densenet_fast.backends.triton.launch import Launch

__all__ = ["races_of", "shared_memory_races"]

WARP_GROUP = 128
WORD = 4
WORDS = 256 * 1024 // WORD
NEVER, PENDING = -1, 1 << 60
SCRATCH = (0, 0)
"""The two pointers that Triton adds to a kernel's parameters."""

Value = np.ndarray | None
"""One number a thread, as unsigned 64-bit; None where it is not known."""


class Statement(NamedTuple):
    """``@predicate name operands``."""

    predicate: str | None
    name: str
    operands: tuple[str, ...]
    text: str


def races_of(item: Launch, ptx: str) -> list[str]:
    """The races of a launch whose kernel was compiled to ``ptx``. Without asynchronous products there are none."""
    if "wgmma" not in ptx:
        return []
    numbers = [argument if isinstance(argument, int) else 0 for argument in item.arguments]
    return shared_memory_races(ptx, [*numbers, *SCRATCH], 32 * item.tile.warps)


def shared_memory_races(ptx: str, arguments: Sequence[int], threads: int) -> list[str]:
    """The races of block 0 of the kernel in ``ptx``, launched with ``threads`` threads.

    Args:
        ptx: of one kernel.
        arguments: numbers in the order of its parameters; any number for a pointer.
        threads: of a block.

    Raises:
        ValueError: an address or a jump depends on what is not known, some threads take a jump that others leave, or an
            operand is not swizzled.
    """
    statements, labels, parameters = parse(ptx)
    if len(parameters) != len(arguments):
        raise ValueError(f"expected {len(parameters)} arguments, got {len(arguments)}")
    block = Block(threads, dict(zip(parameters, arguments)))
    at = 0
    while at < len(statements):
        statement = statements[at]
        if statement.name.startswith("ret"):
            break
        target = block.run(statement)
        at = at + 1 if target is None else labels[target]
    return block.memory.races


def parse(ptx: str) -> tuple[list[Statement], dict[str, int], list[str]]:
    """The statements of the kernel's body, where its labels point, and the names of its parameters."""
    head, body = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*)", ptx, re.DOTALL).groups()
    statements, labels = [], {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label[1]] = len(statements)
        elif match := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;", line):
            operands = tuple(part.strip() for part in re.split(r",\s*(?![^{\[]*[}\]])", match[3]) if part)
            statements.append(Statement(match[1], match[2], operands, line))
    return statements, labels, re.findall(r"(\w+_param_\d+)", head)


class Memory:
    """Who writes and who may still read which word of shared memory. Time is counted in epochs: the barriers passed."""

    def __init__(self, groups: int) -> None:
        self.epoch = 0
        self.written = np.full((groups, WORDS), NEVER)
        self.read = np.full((groups, WORDS), NEVER)
        self.open_reads: list[tuple[int, np.ndarray]] = []
        self.open_copies: list[tuple[int, np.ndarray]] = []
        self.reads: list[list[tuple[int, np.ndarray]]] = []
        self.copies: list[list[tuple[int, np.ndarray]]] = []
        self.races: list[str] = []

    def write(self, group: int, words: np.ndarray, text: str, copies: bool) -> None:
        """A warp group writes: at once or, if it ``copies`` in the background, until it is waited for."""
        others = np.delete(self.read[:, words], group, axis=0)
        if (others >= self.epoch).any() or (self.read[group, words] == PENDING).any():
            self.races.append(f"written while a product may read it: {text}")
        self.written[group, words] = PENDING if copies else self.epoch
        if copies:
            self.open_copies.append((group, words))

    def product(self, group: int, words: np.ndarray, text: str) -> None:
        """A warp group's product reads, until it is waited for."""
        others = np.delete(self.written[:, words], group, axis=0)
        if (others >= self.epoch).any() or (self.written[group, words] == PENDING).any():
            self.races.append(f"read before it is sure to be written: {text}")
        if (self.written[:, words] == NEVER).all(0).any():
            self.races.append(f"read and never written: {text}")
        self.read[group, words] = PENDING
        self.open_reads.append((group, words))

    def wait(self, which: str, left: int) -> None:
        """All but the last ``left`` groups of ``which``, "reads" or "copies", are done."""
        groups, table = getattr(self, which), self.read if which == "reads" else self.written
        done, kept = groups[: max(0, len(groups) - left)], groups[max(0, len(groups) - left) :]
        for group, words in (access for accesses in done for access in accesses):
            table[group, words] = self.epoch
        for group, words in (access for accesses in kept for access in accesses):
            table[group, words] = PENDING
        setattr(self, which, kept)

    def commit(self, which: str) -> None:
        """Closes a group of ``which``."""
        getattr(self, which).append(getattr(self, f"open_{which}"))
        setattr(self, f"open_{which}", [])


class Block:
    """The threads' registers, and what they do to shared memory."""

    def __init__(self, threads: int, parameters: dict[str, int]) -> None:
        self.threads, self.parameters = threads, parameters
        self.groups = max(1, threads // WARP_GROUP)
        self.group_of = np.arange(threads) // WARP_GROUP
        self.registers: dict[str, Value] = {"%tid.x": np.arange(threads, dtype=np.uint64)}
        self.memory = Memory(self.groups)

    def run(self, statement: Statement) -> str | None:
        """Runs a statement. Returns the label that it jumps to, or None."""
        name, operands, text = statement.name, statement.operands, statement.text
        kind = name.split(".")[0]
        if kind == "bra":
            return operands[0] if self.jumps(statement) else None
        if name.startswith("bar.sync") or name.startswith("barrier"):
            self.memory.epoch += 1
        elif name.startswith("wgmma.mma_async"):
            for group, words in self.product(name, operands):
                self.memory.product(group, words, text)
        elif name.startswith(("wgmma.commit_group", "cp.async.commit_group")):
            self.memory.commit("reads" if kind == "wgmma" else "copies")
        elif name.startswith(("wgmma.wait_group", "cp.async.wait_group")):
            self.memory.wait("reads" if kind == "wgmma" else "copies", int(operands[0]))
        elif name.startswith(("st.shared", "stmatrix", "cp.async.c")):
            self.store(statement)
        elif kind in ("mbarrier", "atom", "call") or name.startswith("cp.async.bulk"):
            raise ValueError(f"expected no such statement, got {text}")
        elif operands and kind not in ("st", "red", "fence", "wgmma", "prefetch", "membar"):
            self.assign(statement)
        return None

    def jumps(self, statement: Statement) -> bool:
        if statement.predicate is None:
            return True
        found = self.mask(statement.predicate)
        if found is None or found.any() != found.all():
            raise ValueError(f"expected a jump that all threads take or leave, got {statement.text}")
        return bool(found.all())

    def mask(self, predicate: str | None) -> Value:
        """The threads for which the predicate holds; None where that is not known."""
        if predicate is None:
            return np.ones(self.threads, bool)
        value = self.registers.get(predicate.lstrip("!"))
        return None if value is None else (value == 0) if predicate[0] == "!" else (value != 0)

    def store(self, statement: Statement) -> None:
        name = statement.name
        address = self.address(statement.operands[0], statement.text)
        if name.startswith("stmatrix"):
            size = 16
            rows = 8 * int(re.search(r"\.x(\d)", name)[1])
            active = np.arange(self.threads) % 32 < rows
        else:
            elements = int((re.search(r"\.v(\d)", name) or (0, 1))[1])
            bits = re.search(r"\.[bfus](\d+)$", name)
            size = int(statement.operands[2], 0) if name.startswith("cp") else elements * int(bits[1]) // 8
            found = self.mask(statement.predicate)
            active = np.ones(self.threads, bool) if found is None else found
        count = max(1, size // WORD)
        for group in range(self.groups):
            first = address[active & (self.group_of == group)].astype(np.int64) // WORD
            if first.size:
                words = np.unique((first[:, None] + np.arange(count)[None, :]).ravel())
                self.memory.write(group, words, statement.text, copies=name.startswith("cp"))

    def product(self, name: str, operands: tuple[str, ...]) -> list[tuple[int, np.ndarray]]:
        """The words of shared memory that each warp group's product reads."""
        shape = re.search(r"\.m(\d+)n(\d+)k(\d+)\.\w+\.(\w+)\.", name + ".")
        rows, columns, bits = int(shape[1]), int(shape[2]), 32 if shape[4] == "tf32" else 16
        transposed = [int(operand) for operand in operands[6:]] if bits == 16 else []
        descriptors = [(operands[2], columns, transposed[-1:])]
        if not operands[1].startswith("{"):
            descriptors.append((operands[1], rows, transposed[:1]))
        found = []
        for group in range(self.groups):
            parts = [
                tile(
                    int(self.number(register, name)[self.group_of == group][0]),
                    side,
                    int(shape[3]),
                    bits,
                    turned == [1],
                )
                for register, side, turned in descriptors
            ]
            found.append((group, np.unique(np.concatenate(parts))))
        return found

    def address(self, operand: str, text: str) -> np.ndarray:
        """The value of "[ register + offset ]" in every thread."""
        register, _, offset = operand.strip("[] ").partition("+")
        return self.number(register.strip(), text) + np.uint64(int(offset.strip() or "0", 0))

    def number(self, operand: str, text: str) -> np.ndarray:
        value = self.value(operand)
        if value is None:
            raise ValueError(f"expected a known {operand}, got a floating-point value's: {text}")
        return value

    def value(self, operand: str) -> Value:
        if operand.startswith("%"):
            if operand.startswith(("%ctaid", "%clusterid", "%cluster_ctarank")):
                return np.zeros(self.threads, np.uint64)
            return self.registers.get(operand)
        if operand == "global_smem":
            return np.zeros(self.threads, np.uint64)
        try:
            return np.full(self.threads, int(operand, 0) % (1 << 64), np.uint64)
        except ValueError:
            return None

    def assign(self, statement: Statement) -> None:
        name, (target, *sources) = statement.name, statement.operands
        if target.startswith("{"):
            for register in target.strip("{}").split(","):
                self.registers[register.strip()] = None
            return
        if name.startswith("ld.param"):
            new = np.full(self.threads, self.parameters[sources[0].strip("[] ")] % (1 << 64), np.uint64)
        elif name.startswith("shfl.sync.idx") and (lane := self.value(sources[1])) is not None:
            source = self.value(sources[0])
            new = source if source is None else source[np.arange(self.threads) // 32 * 32 + lane[0].astype(int) % 32]
        elif "{" in "".join(sources) or "[" in "".join(sources):
            new = None
        else:
            new = evaluate(name, [self.value(source) for source in sources])
        found = self.mask(statement.predicate)
        if new is not None and found is not None and not found.all():
            old = self.registers.get(target)
            new = None if old is None else np.where(found, new, old)
        self.registers[target] = None if found is None else new


def tile(descriptor: int, side: int, k: int, bits: int, turned: bool) -> np.ndarray:
    """The words that a product reads of an operand of ``side`` rows (or columns) and ``k`` terms. They are the atoms of
    the operand's layout, eight rows of the swizzle's width each (PTX ISA, matrix descriptor)."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if width is None:
        raise ValueError(f"expected a swizzled layout, got the descriptor {descriptor:#x}")
    start -= start % width
    if turned:  # rows of the atom are terms, its width runs along the side
        atoms = [
            start + i * leading + j * stride
            for i in range(max(1, side * bits // 8 // width))
            for j in range(max(1, k // 8))
        ]
    else:
        atoms = [start + i * stride for i in range(max(1, side // 8))]
    return np.concatenate([np.arange(atom // WORD, (atom + 8 * width) // WORD) for atom in atoms])


def wrap(value: np.ndarray, bits: int) -> np.ndarray:
    return value & np.uint64((1 << bits) - 1)


def signed(value: np.ndarray, bits: int) -> np.ndarray:
    shift = np.int64(64 - bits)
    return value.astype(np.int64) << shift >> shift


COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def evaluate(name: str, given: list[Value]) -> Value:
    """The result of an instruction on integers or predicates. None for other instructions, and where an operand is not
    known."""
    parts = name.split(".")
    kind, type_ = parts[0], parts[-1]
    if any(value is None for value in given):
        return None
    if kind == "selp":
        return np.where(given[2] != 0, given[0], given[1])
    if type_ == "pred":
        operation = {
            "mov": lambda a: a,
            "not": lambda a: a == 0,
            "and": np.minimum,
            "or": np.maximum,
            "xor": np.not_equal,
        }
        truth = [(value != 0).astype(np.uint64) for value in given]
        return operation[kind](*truth).astype(np.uint64)
    if not re.fullmatch(r"[busn]\d+", type_):
        return None
    bits, is_signed = int(type_[1:]), type_[0] == "s"
    if kind == "cvt":
        if len(parts) != 3 or not re.fullmatch(r"[bus]\d+", parts[1]):
            return None
        return wrap(signed(given[0], bits).astype(np.uint64) if is_signed else wrap(given[0], bits), int(parts[1][1:]))
    x = [signed(value, bits) if is_signed else wrap(value, bits) for value in given]
    if kind == "setp":
        return COMPARISONS[parts[1]](x[0], x[1]).astype(np.uint64)
    if kind in ("mul", "mad") and parts[1] == "wide":
        added = given[2] if kind == "mad" else np.uint64(0)
        return (x[0] * x[1]).astype(np.uint64) + added
    if kind == "mul" and parts[1] == "hi":
        return wrap(((x[0] * x[1]).astype(np.int64) >> np.int64(bits)).astype(np.uint64), bits) if bits == 32 else None
    if kind in ("div", "rem"):
        quotient = np.abs(x[0]) // np.maximum(np.abs(x[1]), 1) * (np.sign(x[0]) * np.sign(x[1]) if is_signed else 1)
        return wrap((quotient if kind == "div" else x[0] - quotient * x[1]).astype(np.uint64), bits)
    if kind == "bfe":
        position, length = (int(v[0]) & 0xFF for v in given[1:])
        field = wrap(given[0], bits) >> np.uint64(position)
        return wrap(signed(field, length).astype(np.uint64) if is_signed else wrap(field, length), bits)
    if kind in ("shl", "shr"):
        amount = wrap(given[1], 32).astype(x[0].dtype)
        shifted = x[0] << np.minimum(amount, 63) if kind == "shl" else x[0] >> np.minimum(amount, 63)
        return wrap(shifted.astype(np.uint64), bits)
    operation = ARITHMETIC.get(kind)
    return None if operation is None else wrap(operation(*x).astype(np.uint64), bits)


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: np.zeros_like(a) - a,
    "min": np.minimum,
    "max": np.maximum,
}
