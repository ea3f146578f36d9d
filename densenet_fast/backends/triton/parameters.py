"""The parameters of a compiled kernel as the driver takes them: what Triton's own launcher makes of the arguments.

They stand in order at their natural alignment: the run-time arguments, without those that are constants of the compiled
kernel, then two addresses of scratch memory, null where there is none.
"""

import struct
from typing import Any, NamedTuple

from densenet_fast.backends.triton.launch import Launch

FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
SCRATCH = ("*i8", "*i8")
PLAIN = {
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "num_ctas": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}
"""The fields of a compiled kernel's metadata that ask for a launch of another kind, as they are where none does."""


class Parameters(NamedTuple):
    """The bytes of all parameters; (offset, size) of each; and the offsets of those that are tensors' addresses."""

    data: bytes
    fields: list[tuple[int, int]]
    addresses: list[int]


def parameters(item: Launch, compiled: Any) -> Parameters:
    """Of the launch ``item``, for which its kernel was ``compiled``.

    Raises:
        NotImplementedError: the launch is not plain, or a parameter of a type that no kernel here has.
    """
    for name, plain in PLAIN.items():
        if getattr(compiled.metadata, name, plain) != plain:
            raise NotImplementedError(f"{item.name} has {name} = {getattr(compiled.metadata, name)}")
    signature = compiled.src.signature
    values = dict(zip(item.kernel.arg_names, item.arguments)) | item.constants
    given = [(kind, values[name]) for name, kind in signature.items() if kind != "constexpr"]
    data, fields, addresses = b"", [], []
    for kind, value in [*given, *((kind, None) for kind in SCRATCH)]:
        if kind not in FORMATS and not kind.startswith("*"):
            raise NotImplementedError(f"{item.name} has a parameter of type {kind}")
        if kind.startswith("*"):
            packed = struct.pack("<Q", 0 if value is None else value.data_ptr())
        else:
            packed = struct.pack(FORMATS[kind], value)
        data += bytes(-len(data) % len(packed))
        fields.append((len(data), len(packed)))
        if kind.startswith("*") and value is not None:
            addresses.append(len(data))
        data += packed
    return Parameters(data, fields, addresses)
