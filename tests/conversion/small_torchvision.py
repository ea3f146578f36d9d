"""torchvision's DenseNet, small and with random statistics."""

import torchvision

from helpers import randomise

SMALL = dict(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, num_classes=5)


def small(**options):
    return randomise(torchvision.models.DenseNet(**{**SMALL, **options}))
