"""``python -m densenet_fast bench``: time and peak memory of ours beside its peers, its profile, its floor."""

import argparse
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch

from densenet_fast.benchmarking import floor, plots, profile
from densenet_fast.benchmarking.competitors import COMPETITORS, LAYOUTS, Entry, available, layouts_of
from densenet_fast.benchmarking.conditions import conditions, device_name, folder_name
from densenet_fast.benchmarking.largest import largest_batch
from densenet_fast.benchmarking.memory import Job, Memory, compile_ahead, free_memory, measure, measure_all
from densenet_fast.benchmarking.networks import KNOWN, architecture
from densenet_fast.benchmarking.results import bench_rows, bench_table, best_rows, write_csv, write_page
from densenet_fast.benchmarking.steps import DTYPES, agree
from densenet_fast.benchmarking.times import Timing, measure_times
from densenet_fast.memory import GIB

__all__ = ["add_arguments", "execute"]

AGAINST = {
    "cpu": ("reference", "torchvision", "torchvision-me", "timm"),
    "cuda": ("reference", "torchvision", "torchvision-me", "timm", "compile"),
}
WITH_OURS = {"cpu": ("ours", "ours-me"), "cuda": ("ours", "ours-me", "ours-compile")}
ENGINES = {"cpu": ("openvino", "onnxruntime"), "cuda": ()}
"""Who is also compared by default in inference."""
DEFAULTS = {
    "cpu": {"batch": [16], "dtype": "fp32", "repeats": 5},
    "cuda": {"batch": [64], "dtype": "bf16", "repeats": 20},
}
TIMED_SHARE = 0.6
"""The share of ``--minutes`` that times take where memory is measured too."""
DESCRIPTION = """\
Runs every competitor from the same weights on the same images, checks that they compute the same, times their steps in
turn, measures the peak memory of each in a process of its own, and prints one table: one row a competitor, of the
memory layout in which it is faster (torch.compile has channels_last alone), with the memory of the layout that needs
less. All rows go to a CSV file, the table to a Markdown file, a picture to a PNG file. A training step is forward and
backward, without the optimizer. On a GPU the time until the host has enqueued a step stands beside the time until the
device has done it.
"""


def batches(text: str) -> list[int] | str:
    """``16``, ``32,128`` or ``max``."""
    if text == "max":
        return text
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def competitors(text: str) -> list[str]:
    """Names with commas between them; none for ours alone."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in COMPETITORS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(COMPETITORS)}, got {', '.join(unknown)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    who = "\n".join(f"  {name:15} {competitor.label}" for name, competitor in COMPETITORS.items())
    parser.description = f"{DESCRIPTION}\ncompetitors:\n{who}"
    parser.add_argument("--model", default="densenet121", metavar="NAME", help=f"{KNOWN} (densenet121)")
    parser.add_argument(
        "--batch",
        type=batches,
        metavar="N,N,...|max",
        help="images a step (16; on a GPU 64); max: the largest that fits --memory-budget, for each competitor, in "
        "channels_last alone",
    )
    parser.add_argument(
        "--size", type=int, metavar="N", help="height and width of the images (224; densenet_bc<L>: 32)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 and fp16 are autocast (fp32; on a GPU bf16)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="a training step (this is the default)")
    mode.add_argument("--infer", action="store_true", help="inference in eval mode instead")
    parser.add_argument(
        "--against",
        type=competitors,
        metavar="NAME,...",
        help="whom to compare ours and ours-me with (all; on a CPU without compile and ours-compile, whose compilation "
        "by the C++ compiler takes many minutes: name them)",
    )
    parser.add_argument(
        "--compile-limit",
        type=float,
        default=1800,
        metavar="S",
        help="seconds that torch.compile may take; who needs more is named and left out (1800)",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="timed rounds after warming up (5; on a GPU 20)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        metavar="M",
        help="for all but compiling and the search of --batch max: who is slow gets fewer rounds, and memory is "
        "measured in the faster layouts first, as far as the time goes (9)",
    )
    parser.add_argument(
        "--layout", choices=(*LAYOUTS, "both"), help="of memory (both; with --batch max channels_last alone)"
    )
    parser.add_argument(
        "--memory",
        choices=("all", "faster", "none"),
        default="all",
        help="measure it in both layouts, in the faster one alone, or not at all (all)",
    )
    parser.add_argument(
        "--memory-budget",
        type=float,
        metavar="GIB",
        help="for --batch max (70 %% of what is free; on a GPU 90 %% of all)",
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="files go to DIR/<device>")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--profile", action="store_true", help="instead: a torch.profiler trace of ours, and its time part by part"
    )
    other.add_argument(
        "--floor", action="store_true", help="instead: each kernel's time beside what the device allows at best"
    )


def execute(parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    try:
        network = architecture(options.model)
    except ValueError as error:
        parser.error(f"--{error}")
    defaults = DEFAULTS[options.device.type]
    for name, value in {**defaults, "size": 32 if network.get("small_inputs") else 224}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {
        "size": 8 if network.get("small_inputs") else 32,
        "repeats": 1,
        "threads": 1,
        "minutes": 0,
        "compile_limit": 1,
    }
    for name, bound in least.items():
        if getattr(options, name) < bound:
            parser.error(f"--{name.replace('_', '-')}: expected at least {bound}, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    files = Files(options, " ".join(["python -m densenet_fast bench", *map(shlex.quote, arguments)]))
    if options.profile or options.floor:
        if options.batch == "max" or options.infer:
            parser.error(f"--{'profile' if options.profile else 'floor'}: expected a training step of a given --batch")
        return run_profile(options, files) if options.profile else run_floor(options, files)
    return run_bench(options, files)


class Files:
    """Where the results go, and the conditions that they are made in."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.conditions = conditions(options.device)
        self.folder = options.out / folder_name(options.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mode = "infer" if options.infer else "train"

    def path(self, what: str, suffix: str) -> Path:
        name = f"{self.options.model}_{self.mode}_{self.options.dtype}{what}"
        return self.folder / f"{name}.{suffix}"

    def title(self) -> str:
        what = "inference" if self.options.infer else "training step"
        batch = self.options.batch if self.options.batch == "max" else ", ".join(map(str, self.options.batch))
        size = f"{self.options.size}x{self.options.size}"
        return f"{self.options.model}, {what}, {batch} images of {size}, {self.options.dtype}"

    def markdown(self, what: str, body: str) -> None:
        """Prints ``body`` and writes it, with its title and conditions."""
        heading = f"{self.title()}, on {device_name(self.options.device)}"
        print(f"{heading}\n\n{body}\n")
        write_page(self.path(what, "md"), heading, self.command, self.conditions, body)


def run_bench(options: argparse.Namespace, files: Files) -> int:
    """The comparison."""
    kind = options.device.type
    against = AGAINST[kind] if options.against is None else options.against
    ours = WITH_OURS[kind] if options.against is None else ("ours", "ours-me")
    if options.against is None and options.infer:
        against += ENGINES[kind]
    train, dtype = not options.infer, DTYPES[options.dtype]
    names, left_out = available(list(dict.fromkeys([*against, *ours])), options.model, train, dtype, options.device)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    if not names:
        return 1
    layout = options.layout or ("channels_last" if options.batch == "max" else "both")
    free = {name: layout != "both" and COMPETITORS[name].engine is None for name in names}
    layouts = {name: [layout] if free[name] else layouts_of(name) for name in names}
    entries = [Entry(name, own, options.model) for name in names for own in layouts[name]]
    start = time.perf_counter()
    agree(compared(entries), train, options.device, min(64, options.size))
    checked = time.perf_counter()
    turns, dropped = chosen_batches(options, entries)
    for name, why in dropped.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    left_out |= dropped
    if not turns:
        return 1
    start += time.perf_counter() - checked
    end = start + 60 * options.minutes
    timed = end if options.memory == "none" else start + TIMED_SHARE * (end - start)
    timings = measure_times(turns, options.size, dtype, train, options.device, options.repeats, timed)
    names = list(dict.fromkeys(entry.competitor for entry, _ in turns))
    baseline = next(name for name in ("torchvision", "reference", *names) if name in names)
    setting = {"network": options.model, "mode": files.mode, "batches": "max" if options.batch == "max" else "given"}
    setting |= {"size": options.size, "dtype": options.dtype}
    times_alone = bench_rows(timings, [None] * len(timings), setting, baseline, files.conditions)
    write_csv(files.path("", "csv"), times_alone)  # should the rest not come to its end
    memories = measured_memories(options, timings, end)
    rows = bench_rows(timings, memories, setting, baseline, files.conditions)
    best = best_rows(rows)
    write_csv(files.path("", "csv"), rows)
    notes = "".join(f"\n\n{name} is left out: {why}" for name, why in left_out.items())
    files.markdown("", bench_table(best, baseline) + notes)
    plots.bench_bars(files.path("", "png"), f"{files.title()}\n{device_name(options.device)}", best, baseline)
    print(f"{files.path('', 'csv')}: all rows")
    return 0


def compared(entries: list[Entry]) -> list[Entry]:
    """The entries whose results are compared beforehand: all but the compiled ones. One that runs in float64 is
    first."""
    return sorted((entry for entry in entries if not entry.compiled), key=lambda entry: entry.by_engine)


def chosen_batches(options: argparse.Namespace, entries: list[Entry]) -> tuple[list[tuple[Entry, int]], dict[str, str]]:
    """Each entry with each batch that it is to run, and why others will not run. What needs it is compiled now."""
    if options.batch != "max":
        turns = [(entry, batch) for batch in options.batch for entry in entries]
        ahead = {job(options, *turn): turn for turn in turns if turn[0].compiled}
        failures = compile_ahead(list(ahead), options.compile_limit) if ahead else {}
        left_out = {f"{failed.competitor}, batch {failed.batch}": why for failed, why in failures.items()}
        return [turn for turn in turns if job(options, *turn) not in failures], left_out
    share = 0.9 if options.device.type == "cuda" else 0.7
    budget = options.memory_budget * GIB if options.memory_budget else share * free_memory(options.device)
    turns, left_out = [], {}
    for entry in entries:
        run = partial(measure, limit=options.compile_limit) if entry.compiled else measure
        largest = largest_batch(job(options, entry, 1), budget, run)
        if largest.batch:
            turns.append((entry, largest.batch))
        else:
            left_out[entry.name] = largest.failure or "not one image fits"
    return turns, left_out


def measured_memories(options: argparse.Namespace, timings: list[Timing], until: float) -> list[Memory | None]:
    """The memory of each timing that succeeded, faster layouts first, as far as ``--memory`` asks and the time goes."""

    def faster(timing: Timing) -> bool:
        peers = [t for t in timings if (t.entry.competitor, t.batch) == (timing.entry.competitor, timing.batch)]
        return timing.quantile(0.5) == min(t.quantile(0.5) for t in peers if not t.failure)

    asked = [timing for timing in timings if options.memory != "none" and not timing.failure]
    asked.sort(key=faster, reverse=True)
    if options.memory == "faster":
        asked = [timing for timing in asked if faster(timing)]
    # torch's own counters do not mind company, the resident set does
    workers = 4 if options.device.type == "cuda" else 1
    found = measure_all([job(options, timing.entry, timing.batch) for timing in asked], workers, until)
    missing = [timing.entry.name for timing, memory in zip(asked, found) if memory is None]
    if missing:
        print(f"memory is left out, for the --minutes are over: {'; '.join(missing)}", file=sys.stderr)
    results = {id(timing): memory for timing, memory in zip(asked, found)}
    return [results.get(id(timing)) for timing in timings]


def job(options: argparse.Namespace, entry: Entry, batch: int) -> Job:
    """The measurement of one entry's memory."""
    return Job.of(entry, batch, options.size, options, train=not options.infer)


def run_floor(options: argparse.Namespace, files: Files) -> int:
    """``--floor``."""
    (batch,) = options.batch[:1]
    lines, step, ceilings = floor.floor_lines(
        options.model, batch, options.size, DTYPES[options.dtype], options.device, options.repeats
    )
    setting = {"network": options.model, "batch": batch, "size": options.size, "dtype": options.dtype}
    write_csv(
        files.path("_floor", "csv"),
        [{**setting, **floor.as_row(line, ceilings), **files.conditions} for line in (*lines, step)],
    )
    files.markdown("_floor", floor.floor_table(lines, step, ceilings))
    plots.floor_bars(files.path("_floor", "png"), f"{files.title()}\n{device_name(options.device)}", lines)
    return 0


def run_profile(options: argparse.Namespace, files: Files) -> int:
    """``--profile``."""
    trace = files.path("_trace", "json.gz")
    parts = profile.profile_step(
        options.model, options.batch[0], options.size, DTYPES[options.dtype], options.device, False, trace
    )
    setting = {"network": options.model, "batch": options.batch[0], "size": options.size, "dtype": options.dtype}
    rows = [{**setting, "part": part, "ms": ms, **files.conditions} for part, ms in parts.items()]
    write_csv(files.path("_profile", "csv"), rows)
    files.markdown("_profile", profile.profile_table(parts))
    print(f"{trace}: the trace, for https://ui.perfetto.dev")
    return 0
