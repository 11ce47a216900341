"""Reading manifests: one grammar and one schema for bundles and the cache, refused by name whatever a file holds.

docs/bundle-format.md says what they are; ``native/json.cc`` and ``native/manifest.cc`` are the same in C++, and
tests/test_manifest.py runs both on one set of hostile files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from na_compiler.checks import MAX_RANK
from na_compiler.operands import BATCH, COMPACT, DIRECTIONS, FREE, GIVEN, INPUT, OUTPUT, PLACE_NUMBER, SCALAR, WORKSPACE
from na_compiler.parameters import DTYPES, LONGEST_HEAD
from na_compiler.workspace import ADDITIONAL

__all__ = [
    "BUNDLE",
    "ENTRY",
    "FILES",
    "MAX_BYTES",
    "TUNED",
    "ManifestError",
    "check_file",
    "contents",
    "digest_of",
    "parse",
    "plain",
    "read",
]

# Some eight thousand kernels.
MAX_BYTES = 8 << 20
_MAX_DEPTH = 16
# What every reader of JSON holds exactly, be its numbers doubles.
_MAX_INTEGER = 2**53 - 1
_OTHER_BYTES = re.compile(rb"[^\t\n\r -\[\]-~]")

# Says nothing of a value that is as it should be; raises ManifestError with the value's place of one that is not.
Check = Callable[[object, str], None]


class ManifestError(ValueError):
    """A file that is not the manifest that it should be, or not the file that a manifest names."""


class OtherFormatError(ManifestError):
    """A manifest has another format. What it says is there, unchecked: for advice on how to make it again."""

    def __init__(self, message: str, said: dict[str, Any]) -> None:
        super().__init__(message)
        self.said = said


# ---- Files


def read(path: Path, check: Check, format: int) -> dict[str, Any]:  # noqa: A002
    """Read a manifest.

    Parameters
    ----------
    path
        The file.
    check
        `BUNDLE` or `ENTRY`.
    format
        The number that its ``"format"`` has to be.

    Raises
    ------
    ManifestError
        If it cannot be read, or is not what it should be.
    """
    data = contents(path)
    try:
        value = parse(data)
        if not isinstance(value, dict) or "format" not in value:
            raise ManifestError("it has no format")
        if value["format"] != format or isinstance(value["format"], bool):
            number = value["format"] if type(value["format"]) is int else "no number"
            raise OtherFormatError(f"its format is {number}, and this version of na_compiler reads {format}", value)
        check(value, "")
    except OtherFormatError as error:
        raise OtherFormatError(f"{path.name}: {error}", error.said) from None
    except ManifestError as error:
        raise ManifestError(f"{path.name}: {error}") from None
    return value


def contents(path: Path) -> bytes:
    """Return what is in a file, if it is a regular one and as short as a manifest.

    Raises
    ------
    ManifestError
        If it is not, or cannot be read.
    """
    with _opened(path) as (file, size):
        if size > MAX_BYTES:
            raise ManifestError(f"{path.name} has {size} bytes, and a manifest has {MAX_BYTES} at most")
        return file.read(MAX_BYTES + 1)


def check_file(path: Path, size: int, sha256: str) -> None:
    """Check a file that a manifest names.

    Raises
    ------
    ManifestError
        If it cannot be read, or is another one.
    """
    with _opened(path) as (file, found):
        # By its size first: what is endless is not read.
        if found == size and _hash(file, size) == sha256:
            return
    raise ManifestError(f"{path.name} is not the file that was put in")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; yields it and its size. Anything else in its place, such as a pipe, might never end."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError(f"{path.name} is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    except FileNotFoundError:
        raise ManifestError(f"{path.name} is missing") from None
    except OSError as error:
        raise ManifestError(f"{path.name} cannot be read: {error.strerror}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hash(file: BinaryIO, size: int) -> str:
    hashed = hashlib.sha256()
    # One byte more than it should have: a file may grow.
    left = size + 1
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        hashed.update(block)
        left -= len(block)
    return hashed.hexdigest()


# ---- Grammar


def parse(data: bytes) -> object:
    """Return what a manifest's text says.

    It is JSON of printable ASCII without backslashes, whose numbers are integers of at most 53 bits, whose objects say
    no name twice, and whose lists and objects lie at most 16 deep in one another.

    Raises
    ------
    ManifestError
        If the text is anything else.
    """
    if len(data) > MAX_BYTES:
        raise ManifestError(f"it has more than {MAX_BYTES} bytes")
    other = _OTHER_BYTES.search(data)
    if other is not None:
        raise ManifestError(f"it has the byte 0x{other[0][0]:02x}, and a manifest is ASCII without backslashes")
    try:
        value = json.loads(
            data.decode("ascii"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except json.JSONDecodeError as error:
        raise ManifestError(f"it is no JSON: {error}") from None
    except RecursionError:
        raise ManifestError(_TOO_DEEP) from None
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for each in level if isinstance(each, (dict, list)) for child in _children(each)]
    if any(isinstance(each, (dict, list)) for each in level):
        raise ManifestError(_TOO_DEEP)
    return value


_TOO_DEEP = f"its lists and objects lie more than {_MAX_DEPTH} deep in one another"


def plain(text: str) -> str:
    """Return a text for people as a manifest may hold it: ASCII without quotes and backslashes."""
    return re.sub(r"[^ -~]", "?", text).replace('"', "'").replace("\\", "/")[:4096]


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return a hash of all that a manifest says but its own ``"digest"``, however it is spelled."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) != len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestError(f"it says {twice!r} twice")
    return made


def _integer(written: str) -> int:
    # Compared by length first: of a million digits Python makes no number.
    if len(written) > 17 or written == "-0" or abs(int(written)) > _MAX_INTEGER:
        _no_number(written)
    return int(written)


def _no_number(written: str) -> NoReturn:
    shown = written if len(written) <= 24 else written[:24] + "..."
    raise ManifestError(f"it has the number {shown}, and numbers are integers of at most 53 bits")


# ---- Schema


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _refuse(place: str, wanted: str, value: object) -> NoReturn:
    raise ManifestError(f"{place} must be {wanted}, got {_shown(value)}")


def _int(low: int = 1, high: int = _MAX_INTEGER) -> Check:
    def check(value: object, place: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            _refuse(place, f"an integer from {low} to {high}", value)

    return check


def _flag(value: object, place: str) -> None:
    if not isinstance(value, bool):
        _refuse(place, "true or false", value)


def _text(pattern: str, wanted: str) -> Check:
    matches = re.compile(pattern).fullmatch

    def check(value: object, place: str) -> None:
        if not isinstance(value, str) or matches(value) is None:
            _refuse(place, wanted, value)

    return check


def _one_of(*texts: str) -> Check:
    return _text("|".join(map(re.escape, texts)), " or ".join(texts))


def _list(each: Check, low: int, high: int | None = None) -> Check:
    def check(value: object, place: str) -> None:
        if not isinstance(value, list) or len(value) < low or (high is not None and len(value) > high):
            many = "" if high is None else f" of {low} to {high}"
            _refuse(place, f"a list{many}", value)
        for index, one in enumerate(value):
            each(one, f"{place}[{index}]")

    return check


def _record(**fields: Check) -> Check:
    """Check an object with exactly these members."""

    def check(value: object, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place or "it", "an object", value)
        within = f"{place}." if place else ""
        for name in value:
            if name not in fields:
                raise ManifestError(f"{within}{_shown(name)[1:-1]} is unknown; known are {', '.join(sorted(fields))}")
        for name in fields:
            if name not in value:
                raise ManifestError(f"{within}{name} is missing")
        for name, field in fields.items():
            field(value[name], within + name)

    return check


def _extent(value: object, place: str) -> None:
    # Of an open layout: how many parts of a size a number of queries has.
    if value != ADDITIONAL and not _matches("queries[0-2]/[1-9][0-9]{0,14}", value):
        _int()(value, place)


def _matches(pattern: str, value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _buffer(value: object, place: str) -> None:
    _list(_extent, 1, 32)(value, place)
    assert isinstance(value, list)
    elements = 1
    for extent in value:
        elements *= 1 if isinstance(extent, str) else extent
    if elements > _MAX_INTEGER:
        _refuse(place, f"of at most {_MAX_INTEGER} elements", value)


def _operand(value: object, place: str) -> None:
    is_scalar = isinstance(value, dict) and value.get("role") in (SCALAR, PLACE_NUMBER)
    (_NUMBER if is_scalar else _TENSOR)(value, place)


def _problem(value: object, place: str) -> None:
    later = _LATER.keys() & value.keys() if isinstance(value, dict) else ()
    _record(**_FIELDS, **{name: check for name, check in _LATER.items() if name in later})(value, place)


def _size(value: object, place: str) -> None:
    is_known = value in (BATCH, GIVEN, ADDITIONAL) or _matches("(queries|keys)[0-2]", value)
    if not is_known and not _matches("queries[0-2]/[1-9][0-9]{0,14}", value):
        _int()(value, place)


def _alignment(value: object, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _ALIGNMENTS:
        _refuse(place, "a power of two from 1 to 4096", value)


def _null_or(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


_PROSE = _text('[^"]{0,4096}', "a text of at most 4096 letters")
_ARGUMENT = {
    "name": _text("[0-9a-z_]{1,64}", "at most 64 letters, digits and _"),
    "role": _one_of(INPUT, SCALAR, PLACE_NUMBER, OUTPUT, WORKSPACE),
    "dtype": _text("[0-9a-z]{1,32}", "a dtype"),
}
_TENSOR = _record(**_ARGUMENT, shape=_list(_size, 0, 33), strides=_one_of(FREE, COMPACT))
_NUMBER = _record(**_ARGUMENT)
_ALIGNMENTS = {1 << power for power in range(13)}
_PER_AXIS = _list(_int(), 1, MAX_RANK)
_FIELDS = {
    "layout": _list(_null_or(_int()), 1, MAX_RANK),
    "heads": _int(),
    "head_dim": _int(1, LONGEST_HEAD),
    "kernel_size": _PER_AXIS,
    "stride": _PER_AXIS,
    "dilation": _PER_AXIS,
    "is_causal": _list(_flag, 1, MAX_RANK),
    "heads_kv": _int(),
    "head_dim_v": _int(1, LONGEST_HEAD),
    "additional_kv": _flag,
    "dtype": _one_of(*DTYPES),
}
# There only where a problem has them: so one is called as it was before there were any.
_LATER = {
    "operands": _list(_ARGUMENT["name"], 1, 64),
    "border": _list(_text("shift|cut|cut:[0-9]{1,19}|wrap", "shift, cut, cut:LEFT or wrap"), 1, MAX_RANK),
}
# What a file is, and what it is called beside the manifest: a name, never a path.
_FILE = {
    "library": _text(r"[0-9A-Za-z_+-][0-9A-Za-z_.+-]{0,254}", "a name of letters, digits and _.+-, at most 255"),
    "bytes": _int(),
    "sha256": _text("[0-9a-f]{64}", "64 hexadecimal digits"),
}
# na_compiler.runtime.kernel.KernelInfo.to_dict, and its library. A target that is not known is one for other machines.
_KERNEL = {
    "key": _text("[0-9a-z]{1,64}", "at most 64 letters and digits"),
    **_FILE,
    "problem": _problem,
    "direction": _one_of(*DIRECTIONS),
    "target": _text("(llvm|cuda):[0-9a-z_-]{1,32}", "llvm:INSTRUCTION_SET or cuda:ARCHITECTURE"),
    "workspace": _record(buffers=_list(_buffer, 0, 64), multiple=_int(1, 1 << 20)),
    "operands": _list(_operand, 0, 128),
    "alignment": _alignment,
    "adjacent_heads": _flag,
}
_MACHINE = _text("[0-9a-z_-]{1,32}", "an architecture, such as x86-64")
_VERSION = _text(r"[0-9A-Za-z.+!_-]{1,64}", "a version")
_VERSIONS = _record(**dict.fromkeys(("na_compiler", "abi", "apache-tvm", "apache-tvm-ffi"), _VERSION))
# What a bundle has beside kernels.
FILES = ("launcher", "runtime", "runtime-cuda")

# Entry of the cache.
ENTRY = _record(format=_int(), **_KERNEL, family=_PROSE, config=_PROSE, reason=_null_or(_PROSE), digest=_FILE["sha256"])
BUNDLE = _record(
    format=_int(),
    versions=_VERSIONS,
    kernels=_list(_record(**_KERNEL), 0),
    files=_list(_record(kind=_one_of(*FILES), machine=_MACHINE, **_FILE), 0),
    digest=_FILE["sha256"],
)
# na_compiler.compiler.tuned.Record, a line each.
TUNED = _record(
    format=_int(),
    version=_VERSION,
    device=_PROSE,
    **{name: _KERNEL[name] for name in ("problem", "direction", "target")},
    family=_ARGUMENT["name"],
    **dict.fromkeys(("config", "planned"), _PROSE),
    **dict.fromkeys(("nanoseconds", "planned_nanoseconds", "batch"), _int()),
)
