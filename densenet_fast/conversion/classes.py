"""Detects changes of a library's classes after its modules were recognised.

Replacing a function on a class changes the results of all its modules. torch's own classes are not checked here.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from densenet_fast.nn import fusion

_SPECIAL = ("__call__", "__getattr__", "__getattribute__")


class Classes:
    """The classes of some modules and their bases, with their attributes at the time of construction.

    A deep copy is the same object. Unpickling reads the attributes again.
    """

    def __init__(self, kinds: Iterable[type], replaced: str | None = None) -> None:
        self.kinds = tuple(kinds)
        self._contents = tuple((k, tuple(_relevant_attributes(k).items()), len(vars(k))) for k in self.kinds)
        self._replaced = replaced

    def replaced(self) -> str | None:
        """The first function or attribute that was replaced since the construction, or None."""
        return self._replaced or _replaced(self)

    def find_replaced(self) -> str | None:
        """Compares all classes with the time of construction, for :meth:`replaced`."""
        for kind, attributes, size in self._contents:
            current = vars(kind)
            for name, value in attributes:
                if current.get(name) is not value:
                    return f"{kind.__name__}.{name}"
            if len(current) != size:
                added = _relevant_attributes(kind).keys() - dict(attributes)
                if added:
                    return f"{kind.__name__}.{min(added)}"
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Classes":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Classes"], tuple[Any, ...]]:
        return _loaded, (self.kinds, tuple(_origin(kind) for kind in self.kinds), self.replaced())


def classes_of(modules: Iterable[type[nn.Module]]) -> Classes:
    """The classes of the modules, with all bases that do not belong to torch."""
    kinds = {base: None for kind in modules for base in kind.__mro__}
    return Classes(k for k in kinds if k.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"))


@fusion.constant
def _replaced(classes: Classes) -> str | None:
    return classes.find_replaced()


def _relevant_attributes(kind: type) -> dict[str, Any]:
    """The attributes of ``kind`` itself that its modules' results may depend on."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__") or name in _SPECIAL}


def _origin(kind: type) -> tuple[str, str]:
    """The module and the name under which the ``forward`` of ``kind`` was defined."""
    function = getattr(kind, "forward", None)
    code = getattr(function, "__code__", None)
    return (function.__globals__["__name__"], code.co_name) if code is not None else ("", repr(type(function)))


def _loaded(kinds: tuple[type, ...], origins: tuple[tuple[str, str], ...], replaced: str | None) -> Classes:
    """Unpickles. A ``forward`` whose definition is not the pickled one counts as replaced."""
    for kind, origin in zip(kinds, origins):
        if _origin(kind) != origin:
            replaced = replaced or f"{kind.__name__}.forward"
    return Classes(kinds, replaced)
