"""The page at the end: what is wrong first, then what was measured, in so many characters."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from on_gpu.checks import FAILURES, LEFT_OUT, NOT_RUN, PASSED, WRONG, Record

LIMIT = 11_000
WIDTH = 150
MESSAGE = 400
"""Characters of a failure's message."""
FRAMES, FRAME = 4, 140
"""Of a failure, the last ones, and characters of each."""
IN_FULL = 8
"""Failures that are told with their frames, each message once; of the others the first line."""
LEAST = 4
"""Lines of a section that are kept as long as something longer can be cut."""
FAILED = "FAILURES"


class Section(NamedTuple):
    """A heading and its lines; where the page gets too long the longest lose their last."""

    title: str
    lines: list[str]


def verdict(records: Sequence[Record]) -> str:
    """One sentence."""
    done = [r for r in records if r["state"] in (PASSED, *FAILURES)]
    failed = [r for r in done if r["state"] in FAILURES]
    rest = [r for r in records if r["state"] in (LEFT_OUT, NOT_RUN)]
    counts = {state: sum(r["state"] == state for r in failed) for state in FAILURES}
    kinds = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if failed:
        first = f"{len(failed)} of {len(done)} checks failed ({kinds}), the first: {failed[0]['group']}: "
        first += failed[0]["check"]
    else:
        first = f"All {len(done)} checks that ran have passed" if done else "No check has run"
    return f"{first}; {len(rest)} not run." if rest else f"{first}."


def failures(records: Sequence[Record]) -> Section:
    """Wrong numbers first, then what failed otherwise."""
    failed = sorted((r for r in records if r["state"] in FAILURES), key=lambda r: r["state"] != WRONG)
    lines, in_full = [], set()
    for record in failed:
        error = record["error"]
        message = error["message"].strip().replace("\n", " | ")
        if len(message) > MESSAGE:
            message = f"{message[: MESSAGE // 2]} ... {message[-MESSAGE // 2 :]}"
        head = f"{record['state'].upper()}: {record['group']}: {record['check']} ({record['seconds']:.1f} s)"
        told = message if record["state"] == WRONG else f"{error['type']}: {message}"
        if told in in_full or len(in_full) == IN_FULL:
            lines.append(textwrap.shorten(f"{head}: {told}", WIDTH))
            continue
        in_full.add(told)
        lines += [head, *textwrap.wrap(told, WIDTH, initial_indent="    ", subsequent_indent="    ")]
        if record["state"] != WRONG:
            lines += [f"      {frame[:FRAME]}" for frame in error["frames"][-FRAMES:]]
    return Section(FAILED, lines)


def not_run(records: Sequence[Record]) -> Section:
    """By group and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["state"] in (LEFT_OUT, NOT_RUN):
            reason = f"{record['state']}, {record['error']['message']}"
            groups.setdefault((record["group"], reason), []).append(record["check"])
    lines = []
    for (group, reason), names in groups.items():
        lines += textwrap.wrap(f"{group}: {'; '.join(names)} ({reason})", WIDTH, subsequent_indent="    ")
    return Section("NOT RUN", lines)


def build(records: Sequence[Record], sections: Sequence[Section], limit: int = LIMIT) -> str:
    """The page: the verdict, failures, what was not run, then ``sections``; at most ``limit`` characters, for which
    the longest sections lose their last lines, failures only when the others have lost all but a few."""
    found = [section for section in (failures(records), not_run(records), *sections) if section.lines]
    kept = [len(section.lines) for section in found]
    head, others = f"{verdict(records)}\n", range(int(bool(found) and found[0].title == FAILED), len(found))

    def size(i: int) -> int:
        return len(text(found[i], kept[i]))

    sizes = [size(i) for i in range(len(found))]
    while len(head) + sum(sizes) > limit:
        longest = max((i for i in others if kept[i] > LEAST), key=sizes.__getitem__, default=None)
        if longest is None:
            longest = max((i for i in range(len(found)) if kept[i]), key=sizes.__getitem__, default=None)
        if longest is None:
            break
        kept[longest] -= 1 + max(0, kept[longest] - limit // 10)  # no line counts for less than ten characters
        sizes[longest] = size(longest)
    return (head + "".join(map(text, found, kept)))[:limit]


def text(section: Section, kept: int) -> str:
    """A section, of which ``kept`` lines are shown."""
    cut = len(section.lines) - kept
    more = [f"... {cut} lines more in the archive"] if cut else []
    return "\n".join(["", f"== {section.title}", *section.lines[:kept], *more, ""])
