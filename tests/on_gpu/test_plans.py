"""What the checks of plans say where something is wrong. The replay is the dry run's."""

import pytest
import torch

from densenet_fast.backends import plan
from densenet_fast.backends.symbolic import Unplannable
from densenet_fast.ops import planned
from on_gpu import plans, smoke
from on_gpu.checks import Wrong
from on_gpu.planning import Bodies, watched, without_plans
from on_gpu.settings import DRY

X = torch.randn(2, 3)


def doubled(x):
    return 2 * x


@pytest.fixture
def plannable(monkeypatch):
    """Bodies on CPU tensors, by plans that make what they are told to."""
    monkeypatch.setattr(planned, "DEVICE", "cpu")
    monkeypatch.setattr(planned, "obstacle", lambda x: None if planned.DEVICE == "cpu" else "the input is on cpu")
    monkeypatch.setattr(plan, "unavailable", lambda: None)
    results = iter([plan.FIRST, 2 * X, Unplannable("aten.add.Tensor")])
    monkeypatch.setattr(plan, "run", lambda *_: next(results))


def test_bodies_are_counted_with_the_reason(plannable):
    with watched() as bodies:
        for _ in range(3):
            assert planned.run("densenet_fast::doubled", doubled, [X]).equal(2 * X)
        with without_plans():
            planned.run("densenet_fast::other", doubled, [X])
    assert planned.run.__module__ == planned.__name__ and len(bodies.ran) == 4
    record = bodies.record()
    assert record["planned"] == 1 and record["walked"] == {
        str(plan.FIRST): {"doubled": 1},
        "aten.add.Tensor": {"doubled": 1},
        "the input is on cpu": {"other": 1},
    }
    with pytest.raises(
        Wrong, match="1 of 4 bodies were planned; doubled: it was the first .*; doubled: aten.add"
    ) as told:
        bodies.all_planned(DRY)
    assert told.value.measured == record


def test_no_body_is_no_plan(plannable):
    with pytest.raises(Wrong, match="0 of 0 bodies were planned; no op ran"):
        Bodies().all_planned(DRY)


def test_where_nothing_can_be_planned_it_is_told_alone(monkeypatch):
    bodies = Bodies()
    bodies.ran.append(("densenet_fast::doubled", "the input is on cpu"))
    assert bodies.all_planned(DRY)["walked"] == {"the input is on cpu": {"doubled": 1}}
    monkeypatch.setattr(planned, "DEVICE", "cpu")
    monkeypatch.setattr(plan, "unavailable", lambda: "the compiled kernels were built without CUDA")
    assert bodies.all_planned(DRY)["planned"] == 0


def test_results_that_differ_in_a_bit_are_told():
    expected = {"logits": torch.tensor([1.0, torch.nan, 0.0])}
    plans.raise_if_other(expected, {"logits": expected["logits"].clone()}, "another walk's")
    for other in ([1.0, torch.nan, -0.0], [torch.nan, torch.nan, 0.0], [1.0, 0.0, 0.0]):
        with pytest.raises(Wrong, match="the planned step's logits: 1 of 3 elements are others"):
            plans.raise_if_other(expected, {"logits": torch.tensor(other)}, "the planned step's")


def test_a_plan_that_refuses_its_own_inputs(monkeypatch):
    class Refusing:
        calls = ()

        def run(self, inputs):
            return None

    monkeypatch.setattr(plans, "needed", lambda: None)
    monkeypatch.setattr(plans, "every_kernel", lambda *given: given[0])
    monkeypatch.setattr(plan, "make", lambda *_: Refusing())
    with pytest.raises(Wrong, match="the plan does not know the inputs it was made with"):
        plans.by_the_driver(DRY, DRY.layers[0])


def test_the_page_tells_why():
    result = {"planned": 3, "walked": {"aten.add.Tensor": {"dense_block": 2, "bn_relu_maxpool": 1}}}
    record = {"group": "network", "check": "inference", "result": result}
    assert smoke.plans([record]).lines == ["network: inference: 3 bodies planned; 3 walked, aten.add.Tensor"]
    assert smoke.plans([{"group": "network", "check": "inference", "result": {}}]).lines == []
