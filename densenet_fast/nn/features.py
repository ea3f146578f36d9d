"""The convolutional part of the network: it chains the parts, fused where they can be.

Between fused parts a feature map is channels last, and its batch statistics are passed on. Every other part (one with a
hook, one of another class) gets and returns what it would in torchvision's network: the same memory format, and memory
that it may change in place.
"""

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_fast import functional
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.bn_relu_conv1x1 import Transition
from densenet_fast.nn.dense_block import DenseBlock, DenseLayer
from densenet_fast.nn.memory_format import convolved, handed_out, is_channels_last
from densenet_fast.nn.recomputation import convolution_recomputed
from densenet_fast.nn.snapshot import Found, Memory, all_below
from densenet_fast.operands import BlockOperands, ConvOperands, NormOperands, Operands

STEM = ["norm0", "relu0", "pool0"]


class Step:
    """One part of the network, or several consecutive parts that run as one op."""

    keeps_output = False
    """Whether its backward pass needs the output unchanged."""
    operands: Operands | None = None
    """Those of its op, if it can run fused."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    @property
    def changes_others(self) -> bool:
        """Whether it may run code that changes other parts. That is so of everything but torch's own layers."""
        return any(
            fusion.has_hooks(m) or m._modules or not type(m).__module__.startswith("torch.nn.") for m in self.modules
        )

    @property
    def settled(self) -> bool:
        """Whether it stays the same step as long as its modules and those below have not changed."""
        return not self.changes_others

    def now(self) -> "Step":
        """This step, with whatever may have changed since it was made."""
        return self

    def obstacle(self, x: Tensor) -> str | None:
        """Why it cannot run fused on ``x``, or None."""
        return "it is a part of its own"

    def reads_statistics(self) -> bool:
        """Whether the fused step profits from the statistics of its input."""
        return False

    def channels_last(self, before: bool) -> bool:
        """Whether stock's output would be channels last. ``before`` says so of its input."""
        return before

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs fused. ``statistics`` are those of ``x``, or None.

        Returns the result and, with ``return_statistics``, its statistics where they are computed. Running statistics
        are updated now, or later by ``updates``.
        """
        raise NotImplementedError

    def run_with(
        self, reader: "Step", x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates
    ) -> tuple[Tensor, BatchStatistics | None] | None:
        """As :meth:`run`, together with the ``reader`` of its result, in one call. The statistics returned are then
        those of the reader's result. None where the two cannot run as one."""
        return None

    def block(self) -> BlockOperands | None:
        """Its operands, if it is a dense block that can run as one op."""
        return None

    def reads_block(self) -> ConvOperands | NormOperands | None:
        """Its operands, if it can run in one call with the dense block before it."""
        return None

    def stock(self, x: Tensor) -> Tensor:
        """Runs its modules one after the other."""
        for module in self.modules:
            x = module(x)
        return x

    def note(self, reason: str | None) -> None:
        """Records that it ran fused, or why not."""


class Part(Step):
    """A dense block or a transition that can run as one op."""

    def __init__(self, module: DenseBlock | Transition, found: Found) -> None:
        super().__init__(module)
        self.module, self.found, self.operands = module, found, found.operands
        self.keeps_output = isinstance(module, DenseBlock)

    @property
    def settled(self) -> bool:
        return type(self.module) in (DenseBlock, Transition)

    def now(self) -> Step:
        return Part(self.module, self.module.found())

    def obstacle(self, x: Tensor) -> str | None:
        return self.found.obstacle or fusion.input_obstacle(x, self.module.spatial_dims)

    def reads_statistics(self) -> bool:
        return self.operands is not None and self.operands.reads_statistics

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        return self.module.run(x, self.operands, statistics, return_statistics, updates)

    def run_with(
        self, reader: Step, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates
    ) -> tuple[Tensor, BatchStatistics | None] | None:
        behind = reader.reads_block()
        if behind is None or type(self.module) is not DenseBlock or reader.obstacle(x) is not None:
            return None
        return functional.run_dense_block_and_reader(x, self.operands, behind, statistics, return_statistics, updates)

    def block(self) -> BlockOperands | None:
        return self.operands if self.keeps_output else None

    def reads_block(self) -> ConvOperands | None:
        return self.operands if type(self.module) is Transition else None

    def channels_last(self, before: bool) -> bool:
        return before or (isinstance(self.module, Transition) and is_channels_last(self.module.conv.weight))

    def note(self, reason: str | None) -> None:
        if reason is None:  # else the module is called, and says so itself
            calls.note(self.module, None, self.operands)


class Stem(Step):
    """``norm0``, ``relu0`` and ``pool0`` of ``features``, with the convolution before them if that is a plain one.

    The convolution's result is kept for the backward pass, or ``recomputed`` in it.
    """

    settled = True

    def __init__(
        self, features: "Features", convolution: nn.Conv2d | None, operands: NormOperands, recomputed: bool
    ) -> None:
        super().__init__(*([] if convolution is None else [convolution]), *_stem_modules(features))
        self.features, self.convolution, self.operands = weakref.ref(features), convolution, operands
        self.recomputed = recomputed

    def obstacle(self, x: Tensor) -> str | None:
        return fusion.input_obstacle(x, 2)

    def channels_last(self, before: bool) -> bool:
        return before or (self.convolution is not None and is_channels_last(self.convolution.weight))

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        if self.convolution is not None:
            made = None if return_statistics else functional.run_stem(x, self.convolution, self.operands, updates)
            if made is not None:
                return made, None
            images, x = x, convolved(self.convolution, x)
            if self.recomputed and not torch.compiler.is_compiling():
                with convolution_recomputed(self.convolution, images, x):
                    return functional.run_bn_relu_maxpool(x, self.operands, return_statistics, updates)
        return functional.run_bn_relu_maxpool(x, self.operands, return_statistics, updates)

    def note(self, reason: str | None) -> None:
        calls.note(self.features(), reason, self.operands, "Stem")


class Features(nn.Sequential):
    """The convolutional part of the network.

    The stem (``norm0``, ``relu0`` and ``pool0``) runs as one op, as do every dense block and every transition. The
    result has the memory format that torchvision's would have.
    """

    def stem_obstacle(self) -> str | None:
        """Why ``norm0``, ``relu0`` and ``pool0`` cannot run as one op, or None."""
        if type(self).forward is not Features.forward:
            return f"{type(self).__name__} has a forward of its own"
        names = list(self._modules)
        if "norm0" not in names or names[names.index("norm0") :][:3] != STEM:
            return f"its children {', '.join(STEM)} do not follow each other"
        return (
            fusion.hook_obstacle(self, *STEM)
            or fusion.norm_obstacle(self, "norm0", 2)
            or fusion.relu_obstacle(self, "relu0")
            or fusion.max_pool_obstacle(self, "pool0")
        )

    def steps(self) -> list[Step]:
        """Its children in order. The stem is one step if it can run as one."""
        return _steps_memory(self).operands

    def held_steps(self) -> list[Step] | None:
        """The :meth:`steps` that were found last, if nothing but tensors, in place, may have changed since."""
        found = _steps_memory.held(self)
        return None if found is None else found.operands

    def through(self, x: Tensor, steps: Sequence[Step], updates: Updates | None = None) -> Tensor:
        """Runs ``x`` through ``steps``, the first steps of the network. Their updates are made meanwhile, or when the
        last has run."""
        if torch.compiler.is_compiling():
            return self._through(x, steps, None)
        updates = Updates() if updates is None else updates
        try:
            return self._through(x, steps, updates)
        finally:
            updates.make()

    def _through(self, x: Tensor, steps: Sequence[Step], updates: Updates | None) -> Tensor:
        channels_last, kept, statistics = is_channels_last(x), False, None
        inside = False  # whether x is made by a fused part, and channels last whatever stock's would be
        changed = False  # whether anything ran that may have changed what follows
        left = [*reversed(steps)]
        while left:
            step = left.pop()
            if changed:
                step = step.now()
            reason = step.obstacle(x)
            step.note(reason)
            if reason is None:
                channels_last = step.channels_last(channels_last)
                if updates is not None:
                    updates.room.reader = left[-1].block() if left and not changed else None
                made = None if changed or updates is None else _run_with_reader(step, left, x, statistics, updates)
                if made is not None:
                    step = left.pop()
                    step.note(None)
                    channels_last = step.channels_last(channels_last)
                x, statistics = made or step.run(x, statistics, _is_described(left), updates)
                inside, kept = True, step.keeps_output
                continue
            if updates is not None:
                updates.make()
            changed = changed or step.changes_others
            x = step.stock(handed_out(x, channels_last, kept) if inside else x)
            channels_last, inside, statistics = isinstance(x, Tensor) and is_channels_last(x), False, None
        return handed_out(x, channels_last, kept) if inside and x.dim() > 2 else x

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._forward(input)
        for module in self:
            input = module(input)
        return input

    def _forward(self, input: Tensor) -> Tensor:
        reason = fusion.chain_obstacle(input)
        if reason is None:
            return self.through(input, self.steps())
        if "norm0" in self._modules:
            calls.note(self, reason, None, "Stem")
        return super().forward(input)


def _is_described(left: Sequence[Step]) -> bool:
    """Whether the next step, the last of ``left``, reads the statistics of its input."""
    return bool(left) and left[-1].reads_statistics()


def _run_with_reader(
    step: Step, left: Sequence[Step], x: Tensor, statistics: BatchStatistics | None, updates: Updates
) -> tuple[Tensor, BatchStatistics | None] | None:
    """Runs ``step`` and the one behind it in one call. None if there is no such call."""
    return step.run_with(left[-1], x, statistics, _is_described(left[:-1]), updates) if left else None


def _stem_modules(features: Features) -> list[nn.Module]:
    return [features._modules[name] for name in STEM]


def _stem_examined(features: Features) -> Found:
    reason = features.stem_obstacle()
    return Found(reason, NormOperands(fusion.batch_norm(features.norm0)) if reason is None else None)


_stem_memory = Memory(_stem_examined, _stem_modules, (Features,))


def _examined(features: Features) -> Found:
    """The steps, with a reason if they have to be found before every call."""
    steps: list[Step] = []
    stem, operands = _stem_memory(features)
    if "norm0" in features._modules:
        calls.note(features, stem, None, "Stem")
    for name, module in features._modules.items():
        if stem is None and name in STEM:
            if name == "norm0":
                plain = bool(steps) and _is_plain_convolution(steps[-1].modules[0])
                convolution = steps.pop().modules[0] if plain else None
                steps.append(Stem(features, convolution, operands, _recomputes(features)))
            continue
        found = module.found() if _is_plain_part(module) else None
        runs = found is not None and found.obstacle is None
        steps.append(Part(module, found) if runs else Step(module))
    settled = all(step.settled for step in steps) and (stem is None or "norm0" not in features._modules)
    return Found(None if settled else "what it does may change unnoticed", steps)


_steps_memory = Memory(_examined, all_below, (Features, DenseBlock, DenseLayer, Transition))


def rectified(x: Tensor) -> Tensor:
    """relu(x) in place, as in torchvision: whoever keeps the features sees them rectified.

    Where autograd forbids that (behind a full backward hook), the result has memory of its own.
    """
    if not torch.jit.is_scripting():
        return _rectified(x)
    return F.relu(x, inplace=True)


def _rectified(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return F.relu(x, inplace=True)
    try:
        return F.relu(x, inplace=True)
    except RuntimeError:
        return F.relu(x)


def _recomputes(features: Features) -> bool:
    """Whether all dense blocks are memory efficient."""
    flags = [part.memory_efficient for part in features._modules.values() if isinstance(part, DenseBlock)]
    return bool(flags) and all(flags)


def _is_plain_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and not fusion.has_hooks(module)


def _is_plain_part(module: nn.Module) -> bool:
    """Whether a call of ``module`` only runs ``forward`` as the class of blocks or transitions defines it."""
    kind = next((kind for kind in (DenseBlock, Transition) if isinstance(module, kind)), None)
    return kind is not None and type(module).forward is kind.forward and not fusion.has_hooks(module)


fusion.watch(Features, "forward")
