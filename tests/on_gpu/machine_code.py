"""The machine code of the kernels, as this machine's Triton makes it."""

from functools import partial

from densenet_fast.backends.triton import tune
from densenet_fast.backends.triton.launch import Launch
from on_gpu.checks import Check, Record
from on_gpu.settings import Settings
from on_gpu.warm_up import in_parallel, planned, raise_if_any


def checks(settings: Settings) -> list[Check]:
    """One of all kernels."""
    return [Check("no product's registers are touched too early", partial(faults, settings), 60)]


def faults(settings: Settings) -> Record:
    """What the reader of machine code says of them.

    Raises:
        Wrong: it finds something.
    """
    outcomes = in_parallel(fault_of, planned(settings), settings)
    raise_if_any([outcome.fault or outcome.error for outcome in outcomes.values()])
    return {"kernels": len(outcomes)}


def fault_of(item: Launch) -> str | None:
    """The first fault of a launch's code."""
    return tune.code_fault([item])
