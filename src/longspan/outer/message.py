"""What a site sends of a fragment: a header of 64 bytes, then the codes of its outer gradient."""

import struct
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from longspan.errors import DivergenceError

__all__ = ["HEADER_BYTES", "Header", "check_headers", "checksum", "read_header", "write_header"]

HEADER_BYTES = 64
_FORMAT = struct.Struct("<4s8s4qQd?")


@dataclass(frozen=True, slots=True)
class Header:
    """About a message: turns are exchanges of any fragment, rounds are a fragment's merges.

    ``checksum`` is that of the global fragment which the outer gradient starts from; ``tokens``
    were trained on since then. ``stop``: the site wishes to.
    """

    codec: str
    turn: int
    fragment: int
    rounds: int
    numel: int
    checksum: int
    tokens: float
    stop: bool


def checksum(values: Tensor) -> int:
    """The sum of a flat tensor's bits, taken as 32-bit integers, modulo 2^64."""
    return int(values.view(torch.int32).sum(dtype=torch.int64).item()) % 2**64


def write_header(message: Tensor, header: Header) -> None:
    """Write it into the first bytes of a message (uint8)."""
    name, *numbers = astuple(header)
    packed = _FORMAT.pack(b"lspn", name.encode(), *numbers)
    filled = bytearray(packed.ljust(HEADER_BYTES, b"\0"))
    message[:HEADER_BYTES] = torch.frombuffer(filled, dtype=torch.uint8)


def read_header(message: Tensor) -> Header:
    """Read it; raises DivergenceError if there is none."""
    magic, name, *numbers = _FORMAT.unpack_from(bytes(message[:HEADER_BYTES].tolist()))
    if magic != b"lspn":
        raise DivergenceError("a site sent no outer gradient: all must run the same version")
    return Header(name.rstrip(b"\0").decode(), *numbers)


def check_headers(headers: list[Header], fragment: str) -> None:
    """Raise DivergenceError, naming the fragment and both values, unless the sites agree."""
    first = headers[0]
    for site, other in enumerate(headers[1:], 1):
        for one in fields(Header):
            ours, theirs = getattr(first, one.name), getattr(other, one.name)
            if ours == theirs or one.name in ("tokens", "stop"):
                continue
            if one.name == "checksum":
                raise DivergenceError(
                    f"fragment '{fragment}' differs between sites after {first.rounds} rounds: "
                    f"checksum {ours:016x} at site 0, {theirs:016x} at site {site}; "
                    "go on from the last checkpoint"
                )
            raise DivergenceError(
                f"fragment '{fragment}': {one.name} is {ours} at site 0, {theirs} at site {site}; "
                "all sites need the same model, sharding and outer settings"
            )
