"""The models for ``torch.hub``: ``torch.hub.load(<this repository>, "densenet121", weights="DEFAULT")``."""

from densenet_fast import densenet121, densenet161, densenet169, densenet201, densenet264

__all__ = ["densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]

dependencies = ["torch", "numpy", "tqdm"]
