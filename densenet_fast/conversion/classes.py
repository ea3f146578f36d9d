"""Whether the classes of a library's modules are what they were when the modules were recognised.

A function that is replaced on a class changes what all its modules compute. torch's own classes are not looked at here.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from densenet_fast.nn import fusion

_SPECIAL = ("__call__", "__getattr__", "__getattribute__")


class Classes:
    """The classes of some modules, and their bases, with what stood on them when this was made. Copies are the same
    object; pickles look the functions up again."""

    def __init__(self, kinds: Iterable[type], replaced: str | None = None) -> None:
        self.kinds = tuple(kinds)
        self._contents = tuple((kind, tuple(_content(kind).items()), len(vars(kind))) for kind in self.kinds)
        self._replaced = replaced

    def replaced(self) -> str | None:
        """Which function or attribute has been replaced on its class since, or None."""
        return self._replaced or _replaced(self)

    def look(self) -> str | None:
        """What :meth:`replaced` finds now."""
        for kind, content, size in self._contents:
            now = vars(kind)
            for name, value in content:
                if now.get(name) is not value:
                    return f"{kind.__name__}.{name}"
            if len(now) != size:
                added = _content(kind).keys() - dict(content)
                if added:
                    return f"{kind.__name__}.{min(added)}"
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Classes":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Classes"], tuple[Any, ...]]:
        return _loaded, (self.kinds, tuple(_origin(kind) for kind in self.kinds), self.replaced())


def classes_of(modules: Iterable[type[nn.Module]]) -> Classes:
    """Of the modules' classes and all their bases that are not torch's."""
    kinds = {base: None for kind in modules for base in kind.__mro__}
    return Classes(k for k in kinds if k.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"))


@fusion.constant
def _replaced(classes: Classes) -> str | None:
    return classes.look()


def _content(kind: type) -> dict[str, Any]:
    """What stands on ``kind`` itself and may count for what its modules compute."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__") or name in _SPECIAL}


def _origin(kind: type) -> tuple[str, str]:
    """Where the ``forward`` of ``kind`` was written."""
    function = getattr(kind, "forward", None)
    code = getattr(function, "__code__", None)
    return (function.__globals__["__name__"], code.co_name) if code is not None else ("", repr(type(function)))


def _loaded(kinds: tuple[type, ...], origins: tuple[tuple[str, str], ...], replaced: str | None) -> Classes:
    """A pickled one: a ``forward`` that was written elsewhere than the pickled one's was replaced."""
    for kind, origin in zip(kinds, origins):
        if _origin(kind) != origin:
            replaced = replaced or f"{kind.__name__}.forward"
    return Classes(kinds, replaced)
