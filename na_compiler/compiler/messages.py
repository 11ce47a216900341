"""What this process and a compiling one say to each other: a request, and an answer with its number.

Each is a pickle behind its length, through a pipe to a process of this package's own: nobody else writes there.
"""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from na_compiler.compiler.spec import KernelSpec

__all__ = ["Answer", "Build", "Failure", "Request", "receive", "send"]


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Parameters
    ----------
    number
        The answer has it as well.
    spec
        What to compile.
    path
        Where to write the library; ``None`` for the source text alone, of a kernel for a GPU.
    nvcc
        NVIDIA's compiler, where it is needed.
    linker
        The C compiler and its arguments, where it is needed.
    """

    number: int
    spec: KernelSpec
    path: str | None
    nvcc: str | None
    linker: tuple[str, ...] | None


@dataclass(frozen=True)
class Build:
    """What came of a compilation.

    Parameters
    ----------
    source
        The CUDA C++ that TVM generated; empty for a CPU.
    log
        What nvcc said: registers, shared memory, spills.
    """

    source: str = ""
    log: str = ""


@dataclass(frozen=True)
class Failure:
    """Why nothing came of it.

    Parameters
    ----------
    text
        In words.
    errno
        The system's number, where it is an error of the system: a full disk, say.
    """

    text: str
    errno: int | None = None


@dataclass(frozen=True)
class Answer:
    """What became of the request with a number."""

    number: int
    result: Build | Failure


def send(descriptor: int, message: object) -> None:
    """Write a message to a pipe."""
    data = pickle.dumps(message)
    left = memoryview(struct.pack("<Q", len(data)) + data)
    while left:
        left = left[os.write(descriptor, left) :]


Message = TypeVar("Message")


def receive(descriptor: int, kind: type[Message]) -> Message:
    """Read a message of a kind from a pipe.

    Raises
    ------
    EOFError
        If there is none.
    TypeError
        If it is of another kind.
    """
    (size,) = struct.unpack("<Q", _read(descriptor, 8))
    message = pickle.loads(_read(descriptor, size))  # noqa: S301 - from this package's own process
    if not isinstance(message, kind):
        raise TypeError(f"expected a message of kind {kind.__name__}, got {type(message).__name__}")
    return message


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
