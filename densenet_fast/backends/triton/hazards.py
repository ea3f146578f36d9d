"""What a compiled kernel for sm_90 must not do to the registers of matrix products that are under way.

A warp group's product (wgmma; HGMMA in machine code) runs beside the instructions that follow it. It reads the
registers of its first operand and of its sum. Until it has been waited for, nobody may write these or use the sum.
Compilers have got this wrong (triton issue 9433), and then the result is wrong now and then. So the machine code is
read.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["disassembled", "register_hazards"]

Registers = frozenset[int]

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"([.$\w]+):$")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.(F32|F16)")
REGISTER = re.compile(r"\bR(\d+)\b")
WITHOUT_RESULT = re.compile(
    r"(ST|BAR|BRA|LDGSTS|LDGDEPBAR|DEPBAR|WARP|EXIT|RED\b|NOP|MEMBAR|FENCE|CCTL|BSSY|BSYNC|BREAK|SYNCS|R2P|R2UR|ERRBAR|"
    r"[DFHI]SETP|HSETP2|PLOP3|FCHK|U|S2UR|VOTEU|ELECT|BMOV|NANOSLEEP|YIELD)"
)
"""The names of instructions that write no general register."""
UNFOLLOWED = re.compile(r"(BRX|JMP|JMX|CALL\.ABS)\b")


class Instruction(NamedTuple):
    """One instruction: its text, the registers that it writes, those that it reads, and where it may go on."""

    text: str
    writes: Registers
    reads: Registers
    successors: tuple[int, ...]


def disassembled(cubin: bytes) -> str:
    """The machine code of ``cubin``, by the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-ndf", "-c", file.name], capture_output=True, text=True, check=True).stdout


def register_hazards(code: str) -> list[str]:
    """Every use of a register of an unfinished product in disassembled ``code``, along every path through it. A
    function that is called is taken to wait for no product.

    Raises:
        ValueError: the target of a jump is not a label.
    """
    instructions = parse(code) if "HGMMA" in code else []
    products = {i: product for i, one in enumerate(instructions) if (product := operands(one.text))}
    found: dict[tuple[int, int], str] = {}
    # Where, the products since the last group was closed, the groups that may be under way: the oldest first
    state = tuple[int, Registers, tuple[Registers, ...]]
    todo: list[state] = [(0, frozenset(), ())] if instructions else []
    seen = set(todo)
    while todo:
        at, open_group, groups = todo.pop()
        one = instructions[at]
        if at in products:
            open_group |= {at}
            if "gsb0" in one.text:
                groups, open_group = (*(g for g in groups if g != open_group), open_group), frozenset()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", one.text):
            groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
        else:
            for product in sorted(frozenset().union(open_group, *groups)):
                operand, total = products[product]
                if one.writes & (operand | total) or one.reads & total:
                    found[at, product] = f"{one.text} while {instructions[product].text} may be under way"
        for successor in one.successors:
            following = (successor, open_group, groups)
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return list(found.values())


def operands(text: str) -> tuple[Registers, Registers] | None:
    """The registers of a product's first operand and of its sum; None for other instructions. An operand in shared
    memory has none."""
    match = PRODUCT.match(text)
    if match is None:
        return None
    total, first = (part.strip() for part in text.split(" ", 1)[1].split(",")[:2])
    count = int(match[1]) // (2 if match[2] == "F32" else 4)
    return span(first, 4) if REGISTER.match(first) else frozenset(), span(total, count)


def span(register: str, count: int) -> Registers:
    first = int(REGISTER.match(register)[1])
    return frozenset(range(first, first + count))


def parse(code: str) -> list[Instruction]:
    """The instructions in order."""
    lines, labels = [], {}
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif match := INSTRUCTION.search(line):
            lines.append((match[1], match[2], match[3].strip()))
    return [instruction(i, *line, labels, len(lines)) for i, line in enumerate(lines)]


def instruction(
    at: int, predicate: str | None, name: str, arguments: str, labels: dict[str, int], count: int
) -> Instruction:
    if UNFOLLOWED.match(name):
        raise ValueError(f"expected jumps and calls to labels alone, got {name} {arguments}")
    following = (at + 1,) if at + 1 < count else ()
    always = predicate is None
    kind = name.split(".")[0]
    if kind in ("BRA", "CALL"):
        target = labels[re.search(r"`\((.+)\)", arguments)[1]]
        jumps = kind == "BRA" and always and not re.match(r"!?U?P", arguments)
        following = (target,) if jumps else (target, *following)
    elif kind in ("EXIT", "RET") and always:
        following = ()
    writes = frozenset(written(name, arguments))
    named = [int(r) for r in REGISTER.findall(arguments)]
    if writes and named:
        named = named[1:]
    return Instruction(f"{name} {arguments}".strip(), writes, frozenset(named), following)


def written(name: str, arguments: str) -> Iterator[int]:
    """The general registers that an instruction writes."""
    if WITHOUT_RESULT.match(name):
        return
    result = next((part.strip() for part in arguments.split(",") if not re.match(r"!?U?P(T|\d)$", part.strip())), "")
    if REGISTER.fullmatch(result):
        yield from span(result, width(name))


def width(name: str) -> int:
    """How many registers the result takes."""
    if matrices := re.search(r"\.M88(?:\.(\d))?", name):
        return int(matrices[1] or 1)
    if name.startswith(("HMMA", "IMMA", "QMMA")) or re.search(r"\.128\b", name):
        return 4
    wide = re.search(r"\.(64|WIDE|F64)\b", name) or re.match(r"D(ADD|MUL|FMA)\b", name)
    return 2 if wide or name.startswith("CS2R") and ".32" not in name else 1
