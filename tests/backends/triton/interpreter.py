"""Triton's interpreter with shortcuts, which compute the same in a third of the time.

They leave out what has no effect. The interpreter checks that integers do not overflow, and drops the results unless it
debugs. It patches Triton's functions again for each function that a kernel calls. The shortcuts keep what it makes over
and over: types of blocks, shapes, the names in a module.
"""

import dataclasses
import inspect
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_patched: set[tuple[bool, bool]] = set()
"""The modules that are patched for calls of functions in the present launch."""
_modules: dict[Any, tuple[bool, bool]] = {}
_names: dict[Any, list[str]] = {}
_types: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_shapes: dict[int, tuple[Any, ...]] = {}
_numpy: dict[str, Any] = {}

launch = interpreter.GridExecutor.__call__
make_type = core.block_type.__init__
make_tensor = core.tensor.__init__
numpy_dtype = interpreter._get_np_dtype


def _launch(self, *args, **kwargs):
    _patched.clear()
    return launch(self, *args, **kwargs)


def _call(self, *args, **kwargs):
    if self.fn not in _modules:
        modules = list(filter(inspect.ismodule, self.fn.__globals__.values()))
        _modules[self.fn] = (tl in modules, core in modules)
    if _modules[self.fn] not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(_modules[self.fn])
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _patch_builtin(owner, builder, *scope):
    if owner not in _names:
        _names[owner] = [name for name, _ in inspect.getmembers(owner)]
    for name in _names[owner]:
        member = getattr(owner, name)
        if core.is_builtin(member):
            interpreter._patch_attr(owner, name, member, builder, *scope)


def _make_type(self, element_ty, shape):
    key = (element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in shape))
    if key not in _types:
        make_type(self, element_ty, shape)
        _types[key] = self.shape, self.numel, self.name
    self.element_ty, (self.shape, self.numel, self.name) = element_ty, _types[key]


def _make_tensor(self, handle, type):
    shape = type.shape if type.is_block() else ()
    if id(shape) not in _shapes:
        make_tensor(self, handle, type)
        _shapes[id(shape)] = shape, self.numel, self.shape
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, self.numel, self.shape = _shapes[id(shape)]


def _numpy_dtype(dtype):
    if dtype.name not in _numpy:
        _numpy[dtype.name] = numpy_dtype(dtype)
    return _numpy[dtype.name]


SHORTCUTS = [
    (
        interpreter.interpreter_builder,
        "options",
        dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False),
    ),
    (interpreter.GridExecutor, "__call__", _launch),
    (interpreter.InterpretedFunction, "__call__", _call),
    (interpreter, "_patch_builtin", _patch_builtin),
    (core.block_type, "__init__", _make_type),
    (core.tensor, "__init__", _make_tensor),
    (interpreter, "_get_np_dtype", _numpy_dtype),
]
AS_IT_IS = [(owner, name, getattr(owner, name)) for owner, name, _ in SHORTCUTS]


def take(values=SHORTCUTS):
    """Takes the shortcuts from now on or, given ``AS_IT_IS``, none."""
    for owner, name, value in values:
        setattr(owner, name, value)
