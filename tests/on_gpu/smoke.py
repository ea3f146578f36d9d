"""``python3 tests/gpu.py --smoke``: what is wrong? Every check within three minutes, and a page at the end.

The library is built and kernels are compiled on all cores in the background; nothing waits for what it does not need,
and nothing that fails stops the rest. To ``--out`` go ``smoke.jsonl``, a line a check as soon as it has ended,
``page.txt`` and ``logs.tar.gz``.
"""

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from on_gpu.archive import pack, write_text
from on_gpu.checks import LEFT_OUT, PASSED, Journal, Record
from on_gpu.page import WIDTH, Section, build
from on_gpu.runner import Group, Runner
from on_gpu.settings import SETTINGS, Settings

SECONDS = 165.0
RESERVE = 5.0
"""Seconds at the end for the page."""

ROWS = 24
"""Kernels on the page."""


def background() -> list[Group]:
    """What runs beside the checks."""
    return [Group("build", "on_gpu.build"), Group("warm-up", "on_gpu.warm_up")]


def groups(settings: Settings) -> list[Group]:
    """The checks, in order of their worth."""
    built = dict(after=("build",), wait=60.0)
    both = dict(after=("build", "warm-up"), wait=20.0)
    return [
        Group("Triton", "on_gpu.triton_kernels", settings.interpreted, after=("warm-up",), wait=40.0),
        Group("machine", "on_gpu.machine", **built),
        Group("CUDA C++", "on_gpu.cuda_kernels", settings.library, **built),
        Group("3x3 in CUDA C++", "on_gpu.convolution", {**settings.library, **settings.interpreted}, **both),
        Group("plans", "on_gpu.plans", {**settings.library, **settings.interpreted}, **both),
        Group("network", "on_gpu.network", **both),
        Group("speed", "on_gpu.speed", **both),
        Group("kernels", "on_gpu.kernel_times", **both),
        Group("choices", "on_gpu.choices", settings.interpreted, **both),
        Group("machine code", "on_gpu.machine_code"),
    ]


def run(
    out: Path, settings: str, seconds: float = SECONDS, beside: Sequence[Group] = (), checks: Sequence[Group] = ()
) -> tuple[str, list[Record]]:
    """Runs the groups ``beside`` in the background and, one after the other, ``checks``; the page and the records."""
    start = time.monotonic()
    deadline = start + seconds - RESERVE
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "smoke.jsonl")
    journal.path.unlink(missing_ok=True)
    logs = Path(tempfile.mkdtemp())
    runner = Runner(settings, journal, logs, deadline)
    threads = {group.name: threading.Thread(target=runner.run_noting, args=(group,)) for group in beside}
    for thread in threads.values():
        thread.start()
    ahead = runner.worker(checks[0]) if checks else None
    for i, group in enumerate(checks):
        worker, ahead = ahead, runner.worker(checks[i + 1]) if i + 1 < len(checks) else None
        waited = time.monotonic() + group.wait
        for name in threads.keys() & group.after:
            threads[name].join(max(0.0, min(waited, deadline) - time.monotonic()))
        print(f"{time.monotonic() - start:5.0f} s  {group.name}", flush=True)
        runner.run_noting(group, worker)
        keep(out, journal, logs)
    for thread in threads.values():
        thread.join()
    kept = keep(out, journal, logs)
    shutil.rmtree(logs)
    return kept


def keep(out: Path, journal: Journal, logs: Path) -> tuple[str, list[Record]]:
    """Writes everything that is known; the page and the records."""
    records = [record for record in journal.read() if "state" in record]
    page = build(records, sections(records))
    write_text(out / "page.txt", page)
    pack(logs, out / "logs.tar.gz")
    return page, records


def sections(records: Sequence[Record]) -> list[Section]:
    """What was measured."""
    by_group: dict[str, list[Record]] = {}
    for record in records:
        if record["state"] == PASSED:
            by_group.setdefault(record["group"], []).append(record)
    return [
        speed(by_group.get("speed", [])),
        kernels(by_group.get("kernels", [])),
        choices(by_group.get("choices", [])),
        plans(records),
        accuracy([r for name in ("Triton", "CUDA C++", "3x3 in CUDA C++", "network") for r in by_group.get(name, [])]),
        machine(by_group.get("machine", []), by_group.get("warm-up", []), by_group.get("build", [])),
    ]


def speed(records: Sequence[Record]) -> Section:
    """A row a batch and competitor, beside the second competitor's time."""
    results = [record["result"] for record in records]
    stock = {r["batch"]: r for r in results if not r["competitor"].startswith("ours")}
    title = "A TRAINING STEP, ms: enqueued, finished; peak GiB; faster than stock (finished)"
    lines = []
    for r in sorted(results, key=lambda r: r["batch"]):
        faster = f"{stock[r['batch']]['finish_s'] / r['finish_s']:.2f}x" if r["batch"] in stock else "-"
        enqueued, finished, peak = 1e3 * r["enqueue_s"], 1e3 * r["finish_s"], r["peak_bytes"] / (1 << 30)
        lines.append(
            f"batch {r['batch']:4}  {r['competitor']:12} {enqueued:8.2f} {finished:8.2f}   {peak:7.2f}   {faster}"
        )
    return Section(title, lines)


def kernels(records: Sequence[Record]) -> Section:
    """A row a kernel."""
    lines = []
    for record in records:
        found = record["result"]
        lines.append(
            f"{record['check']}: {1e3 * found['total_s']:.2f} ms in {found['launches']:.0f} launches; "
            f"{found['copied_bytes_per_s'] / 1e9:.0f} GB/s copied, {found['products_per_s'] / 1e12:.1f} T products/s"
        )
        lines.append(f"{'kernel':44} {'ms':>8} {'floor':>8} {'ratio':>6} {'launches':>8}")
        for row in found["kernels"][:ROWS]:
            floor = row.get("floor")
            beside = f"{1e3 * floor:8.3f} {row['seconds'] / floor:6.2f}" if floor else f"{'-':>8} {'-':>6}"
            lines.append(f"{row['kernel'][:44]:44} {1e3 * row['seconds']:8.3f} {beside} {row['launches']:8.0f}")
    return Section("GPU TIME OF A TRAINING STEP, beside what bandwidth and products allow", lines)


def choices(records: Sequence[Record]) -> Section:
    """A row a configuration."""
    lines = []
    for record in records:
        r = record["result"]
        lines.append(
            f"{record['check']:54} {1e6 * r['seconds']:9.1f} us, the table's {1e6 * r['table_s']:9.1f} us"
            f" ({r['table_s'] / r['seconds']:.2f}x)"
        )
    return Section("OPEN CHOICES", lines)


def plans(records: Sequence[Record]) -> Section:
    """How many bodies of ops were planned, and of the others why not."""
    lines = []
    for record in records:
        r = record.get("result", {})
        if "planned" not in r:
            continue
        reasons = "; ".join(f"{sum(ops.values())} walked, {reason}" for reason, ops in r["walked"].items())
        lines.append(f"{record['group']}: {record['check']}: {r['planned']} bodies planned{reasons and f'; {reasons}'}")
    return Section("PLANS", [line[:WIDTH] for line in lines])


def accuracy(records: Sequence[Record]) -> Section:
    """The error of what is right, beside stock's."""
    lines = []
    for record in records:
        r = record.get("result", {})
        if "worst" in r:
            lines.append(f"{record['group']}: {record['check']}: {r['worst']} {r['error']:.1e}, stock {r['stock']:.1e}")
    return Section("LARGEST ERRORS against what is allowed, of the checks that passed", lines)


def machine(records: Sequence[Record], warmed: Sequence[Record], built: Sequence[Record]) -> Section:
    """Versions, what is missing, what runs where, and what the preparation took."""
    lines = []
    for record in records:
        r = dict(record["result"])
        lines += [line for line in r.pop("info", "").splitlines() if line.strip() and not line.startswith("|-")]
        lines += [f"{key}: {value}" for key, value in r.items()]
    lines += [f"{r['check']}: {r['seconds']:.0f} s, {r.get('result')}" for r in (*warmed, *built)]
    return Section("VERSIONS", lines)


def main(out: Path, dry: bool, seconds: float, only: str) -> int:
    """Runs the groups whose name matches ``only``, prints the page, and returns 0 if nothing failed."""
    name = "dry" if dry else "gpu"
    beside, chosen = (
        [g for g in all_of if re.search(only, g.name)] for all_of in (background(), groups(SETTINGS[name]))
    )
    page, records = run(out, name, seconds, beside, chosen)
    print(f"\n{page}", end="", flush=True)
    return int(any(record["state"] not in (PASSED, LEFT_OUT) for record in records))
