"""The styles in which people write DenseNets, by name, and what of each runs fused."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from conversion import segmenters, small_images, staged


class Style(NamedTuple):
    """How a network of ``growth`` features a layer, ``layers`` in each block, for images of ``size``, is made."""

    make: Callable[..., nn.Module]
    """Of growth, layers and size."""
    small: bool = False
    """Whether its stem keeps the images' size."""
    dims: int = 2
    channels: int = 3
    transitions: bool = True
    """Whether its transitions are called whole."""
    up: bool = False
    """Whether it has blocks on the way up too."""
    ends: tuple[str, ...] = ()
    """"Stem" and "Head", where one Sequential or module holds all of it."""

    def parts(self, count: int) -> dict[str, int]:
        """How many parts of each kind run fused, of a network with ``count`` blocks on its way down."""
        found = {"DenseBlock": 2 * count - 1 if self.up else count, **dict.fromkeys(self.ends, 1)}
        return {**found, "Transition": count - 1} if self.transitions else found


STYLES = {
    "new features in front": Style(small_images.FrontNet, small=True),
    "tutorial": Style(small_images.TutorialNet, small=True, ends=("Head",)),
    "dropout behind each convolution": Style(small_images.DroppingNet, small=True),
    "dropout behind each convolution, no bottleneck": Style(
        lambda *sizes: small_images.DroppingNet(*sizes, bottleneck=False), small=True
    ),
    "transitions without ReLU": Style(small_images.LinearTransitionNet, small=True),
    "functional dropout": Style(small_images.AlwaysDroppingNet, small=True),
    "stages of transition and units": Style(staged.StagedNet, ends=("Stem",)),
    "stages of transition and units, small images": Style(
        lambda *sizes: staged.StagedNet(*sizes, rate=0.1, small=True), small=True
    ),
    "transition behind units": Style(staged.TailNet, small=True),
    "one flat Sequential": Style(staged.flat_net, ends=("Stem", "Head")),
    "frozen normalisations": Style(lambda *sizes: staged.LibraryNet(*sizes, norm=staged.FrozenNorm), ends=("Stem",)),
    "checkpointed layers": Style(lambda *sizes: staged.LibraryNet(*sizes, checkpointed=True), ends=("Stem",)),
    "volumes, dropout of channels": Style(staged.VolumeNet, dims=3, channels=1, ends=("Stem",)),
    "fully convolutional": Style(segmenters.FCDenseNet, small=True, up=True),
    "U-Net": Style(segmenters.UNet),
    "U-Net, skips from transitions": Style(lambda *sizes: segmenters.UNet(*sizes, inside=True), transitions=False),
}
