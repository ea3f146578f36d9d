"""Every network of the paper has the published size."""

import pytest

import paper_counts
from densenet_fast.thirdparty import import_torchvision

ROWS = paper_counts.rows()


@pytest.mark.parametrize("row", ROWS, ids=[row["network"] for row in ROWS])
def test_counts_are_the_published(row):
    assert paper_counts.agrees(row["parameters"] / 1e6, row["published parameters, M"])
    if row["source"] == paper_counts.TORCHVISION:
        assert paper_counts.agrees(row["multiply-adds"] / 1e9, row["published multiply-adds, G"])


def test_torchvisions_counts_are_what_it_prints():
    models = import_torchvision().models
    for name, published in paper_counts.IMAGENET.items():
        if published.source == paper_counts.TORCHVISION:
            meta = models.get_model_weights(name).IMAGENET1K_V1.meta
            assert (meta["num_params"], meta["_ops"]) == (
                round(float(published.parameters) * 1e6),
                float(published.products),
            )


def test_one_digit_off_is_not_agreement():
    assert paper_counts.agrees(7.978856, "7.978856") and not paper_counts.agrees(7.978858, "7.978856")
    assert paper_counts.agrees(0.769, "0.8") and not paper_counts.agrees(0.65, "0.8")
