"""The tuner without a GPU: what it leaves out, and why."""

import csv
from math import inf
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from backends.triton.absent_gpu import absent_gpu
from densenet_fast.backends import aten
from densenet_fast.backends.triton import config, hazards, launch, tune
from densenet_fast.backends.triton.config import Device, Tile
from densenet_fast.backends.triton.tune import Results, Shape, Step, Tuner

TINY = Shape(1, 4, 8, 16, 4, 8)
KERNEL = "bn_relu_conv1x1"
NOW, FAST, HAZARDOUS, WRONG, LARGE = (Tile(rows, 16, 16, 4, 2) for rows in (16, 32, 64, 128, 256))


class Outcome:
    """Of each candidate a time, and whether its code or its results have a fault. Keeps what was written."""

    times = {NOW: 3.0, FAST: 2.0, HAZARDOUS: 1.0, WRONG: 1.5, LARGE: inf}

    def __init__(self, monkeypatch):
        self.rows = []
        monkeypatch.setattr(tune, "SHAPES", {128: (TINY,)})
        monkeypatch.setattr(tune, "candidates", lambda kernel, limit: (HAZARDOUS, WRONG, LARGE, FAST))
        monkeypatch.setattr(tune, "milliseconds", self.milliseconds)
        monkeypatch.setattr(tune, "code_fault", self.code_fault)
        monkeypatch.setattr(tune, "Results", lambda step: SimpleNamespace(fault=self.fault))
        monkeypatch.setattr(launch, "compile_all", lambda items, device, ignore_errors: None)
        monkeypatch.setitem(config.TABLE[KERNEL], (0, "any"), ((config.ANY, NOW),))

    def milliseconds(self, items):
        time = self.times[items[0].tile]
        return time, None if time < inf else "OutOfResources: shared memory"

    def code_fault(self, items):
        return "9 hazards" if items[0].tile == HAZARDOUS else None

    def fault(self):
        tile = config.tile(KERNEL, config.INTERPRETER, torch.float32, 16)
        return "result 0 is off" if tile == WRONG else None


def test_the_fastest_that_is_right(monkeypatch, tmp_path):
    outcome = Outcome(monkeypatch)
    with tune.rows_to(tmp_path / "rows/tuning.csv") as write:
        tuner = Tuner(torch.float32, torch.device("cpu"), config.INTERPRETER, write)
        assert tuner.row(KERNEL, [128]) == f"\"{KERNEL}\": {{(0, 'any'): ((128, Tile{tuple(FAST)}),)}}"
    rows = list(csv.DictReader((tmp_path / "rows/tuning.csv").open()))
    told = {(row["tile"], row["fault"] or row["best"]) for row in rows if row["fault"] or row["best"]}
    assert told == {
        (str(tuple(LARGE)), "OutOfResources: shared memory"),
        (str(tuple(HAZARDOUS)), "9 hazards"),
        (str(tuple(WRONG)), "result 0 is off"),
        (str(tuple(FAST)), f"1.50 times as fast as the table's {tuple(NOW)}"),
    }
    assert config.tile(KERNEL, config.INTERPRETER, torch.float32, 16) == NOW
    outcome.times = dict.fromkeys(Outcome.times, inf)
    with pytest.raises(RuntimeError, match="every candidate is wrong"):
        Tuner(torch.float32, torch.device("cpu"), config.INTERPRETER, outcome.rows.append).best(KERNEL, 128)


class Off:
    """``aten`` with one result that is wrong."""

    def __getattr__(self, name):
        function = getattr(aten, name)

        def run(*arguments, **options):
            result = function(*arguments, **options)
            if name == KERNEL:
                arguments[4][3, 2] += 2
            return result

        return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_compared_with_float64(dtype):
    results = Results(Step(TINY, dtype, torch.device("cpu")))
    assert results.fault(aten) is None
    assert results.fault(Off()).startswith("result 0 is off by")


def test_the_code_of_a_candidate_is_read(monkeypatch):
    with config.assume(Device(90, 132)), absent_gpu(90):
        items = [i for i in Step(TINY, torch.bfloat16, torch.device("meta")).launches() if i.name == KERNEL]
        assert tune.code_fault(items) is None
        monkeypatch.setattr(tune, "register_hazards", lambda code: ["R1 while HGMMA"])
        monkeypatch.setattr(tune, "races_of", lambda item, ptx: ["st.shared"])
        assert tune.code_fault(items) == "2 hazards: R1 while HGMMA"
        monkeypatch.setattr(tune, "register_hazards", lambda code: hazards.register_hazards("/*0000*/ BRX R2 ; HGMMA"))
        assert "got BRX" in tune.code_fault(items)


def test_what_does_not_compile_or_fit_is_left_out(monkeypatch):
    import triton

    def fails(*_, **__):
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", fails)
    time, why = tune.milliseconds([None])
    assert time == inf and "shared memory" in why
