"""The parameters of a compiled kernel as the driver takes them: what Triton's own launcher makes of the arguments.

They stand in order, each at its natural alignment. First come the run-time arguments that are no constants of the
compiled kernel. Then come two addresses of scratch memory, which are null where there is none.
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
"""The fields of a compiled kernel's metadata that may ask for a launch of another kind, with the values of a plain
launch."""


class Parameters(NamedTuple):
    """The bytes of all parameters, (offset, size) of each, and the offsets of those that are tensors' addresses."""

    data: bytes
    fields: list[tuple[int, int]]
    addresses: list[int]


def parameters(item: Launch, compiled: Any) -> Parameters:
    """Those of the launch ``item``, for which its kernel was ``compiled``.

    Raises:
        NotImplementedError: the launch is not plain, or a parameter has a type that no kernel here has.
    """
    for name, plain in PLAIN.items():
        if getattr(compiled.metadata, name, plain) != plain:
            raise NotImplementedError(f"{item.name} has {name} = {getattr(compiled.metadata, name)}")
    signature = compiled.src.signature
    values = item.named
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
