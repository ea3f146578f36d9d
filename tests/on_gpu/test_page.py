"""The page: what is wrong comes first, and it is never too long."""

import pytest

from on_gpu.checks import ERROR, NOT_RUN, PASSED, WRONG
from on_gpu.page import LIMIT, Section, build


def record(i, state, message="", frames=()):
    error = {"type": "ValueError", "message": message, "frames": list(frames)}
    return {"group": "some", "check": f"check {i}", "state": state, "seconds": 1.0, "error": error}


def test_nothing_wrong():
    page = build([record(0, PASSED)], [Section("SPEED", ["fast"])])
    assert page == "All 1 checks that ran have passed.\n\n== SPEED\nfast\n"
    assert build([], []) == "No check has run.\n"


@pytest.mark.parametrize("failures", [1, 30, 5000])
@pytest.mark.parametrize("lines", [0, 3000])
def test_the_page_is_never_too_long(failures, lines):
    frames = [f"file.py:{i} in function: {'x' * 200}" for i in range(6)]
    records = [record(i, ERROR, "many words " * 200, frames) for i in range(failures)]
    records += [record(failures, WRONG, "dW: off by 3.00e-01"), *(record(i, NOT_RUN, "no time") for i in range(500))]
    page = build(records, [Section("LONG", ["word " * 20] * lines), Section("SHORT", ["kept"])])
    first, _, title, wrong, number = page.splitlines()[:5]
    assert len(page) <= LIMIT
    assert first.startswith(f"{failures + 1} of {failures + 1} checks failed (1 wrong, {failures} error)")
    assert title == "== FAILURES" and wrong.startswith("WRONG: some: check") and "off by 3.00e-01" in number
    assert "ERROR: some: check 0" in page and "ValueError: many words" in page
    assert "== SHORT\nkept" in page
    assert "lines more in the archive" in page or not lines and failures < 5000


def test_one_failure_longer_than_the_page():
    records = [record(i, ERROR, "words " * 99, ["x" * 300] * 6) for i in range(6)]
    page = build(records, [], limit=400)
    assert len(page) <= 400 and page.startswith("6 of 6 checks failed")
    assert len(build(records, [], limit=30)) == 30
