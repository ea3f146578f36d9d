"""The Triton kernels compiled by the newest Triton that is known to compile them well. ``make emulate`` runs this
file."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from backends.triton.test_hazards import assert_well_compiled_by


def test_the_newest_triton():
    assert_well_compiled_by("3.9.0")
