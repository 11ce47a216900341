"""Manifests of a bundle, good and hostile: what both readers of the format, in Python and in C++, are run on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from na_compiler import KernelSpec, Problem
from na_compiler.compiler.bundle import _versions
from na_compiler.runtime.bundle import FORMAT
from na_compiler.runtime.manifest import MAX_BYTES, digest_of
from na_compiler.workspace import Workspace

CODE = {"one.so": b"first code", "two.so": b"second code", "l.so": b"launcher"}


def file_of(name: str) -> dict[str, Any]:
    return {"library": name, "bytes": len(CODE[name]), "sha256": hashlib.sha256(CODE[name]).hexdigest()}


def good() -> dict[str, Any]:
    """A manifest that both readers take: all that can be said in one."""
    two = Problem((8, 9), 4, 16, (3, 4), (2, 1), (1, 2), (False, True), heads_kv=2, head_dim_v=8, dtype="float16")
    buffers = Workspace(((4, "additional"), (2, 3)), 8)
    infos = {
        "one.so": replace(KernelSpec.make(Problem(20, 2, 8, 5, additional_kv=True)).info, workspace=buffers),
        "two.so": KernelSpec.make(two, direction="backward").info,
    }
    kernels = [{"key": f"{i:032x}", **file_of(n), **info.to_dict()} for i, (n, info) in enumerate(infos.items())]
    files = [{"kind": "launcher", "machine": "x86-64", **file_of("l.so")}]
    return {"format": FORMAT, "versions": _versions(), "kernels": kernels, "files": files}


def written(manifest: dict[str, Any], **options: Any) -> bytes:
    """The text of a manifest, with the digest that belongs to what it says."""
    return json.dumps(manifest | {"digest": digest_of(manifest)}, **options).encode()


def taken() -> dict[str, bytes]:
    """Other ways to write a good manifest."""
    manifest = good()
    backwards = dict(reversed(manifest.items()))
    bare = manifest | {"kernels": [], "files": []}
    unknown = copy.deepcopy(manifest)
    unknown["kernels"][1]["target"] = "llvm:x86-64-v9"
    return {
        "as it is written": written(manifest, indent=1),
        "in one line": written(manifest, separators=(",", ":")),
        "with other white space": written(manifest, indent="\t").replace(b"\n", b"\r\n \t"),
        "in another order": written(backwards),
        "without kernels": written(bare),
        "as large as may be": written(manifest).ljust(MAX_BYTES),
        "with a kernel for a machine of the future": written(unknown),
    }


def grammar() -> dict[str, tuple[bytes, str]]:
    """Texts that a lenient reader takes, and what is said of them."""
    text = written(good()).decode()

    def instead(old: str, new: str) -> bytes:
        assert text.count(old) >= 1, old
        return text.replace(old, new, 1).encode()

    twice, no_json = r"it says '{}' twice", "it is no JSON"
    ascii_only = "ASCII without backslashes"
    window = '"kernel_size": [5]'
    numbers = {
        name: (instead('"heads": 2', f'"heads": {name[:50]}'), "numbers are integers of at most 53 bits")
        for name in ("2.0", "2e0", "20e-1", "-0", "-0.0", "1e400", str(2**53), str(2**63), str(-(2**64)), "9" * 50)
    }
    numbers["of 5000 digits"] = (instead('"heads": 2', '"heads": ' + "9" * 5000), "integers of at most 53 bits")
    no_numbers = ("02", "+2", "2.", ".2", "0x2", "2_0", "- 2", "--2", "2 0", "2n", "two", "True", "None", "'2'", "")
    numbers |= {f"number {name!r}": (instead('"heads": 2', f'"heads": {name}'), "it") for name in no_numbers}
    numbers |= {name: (instead('"heads": 2', f'"heads": {name}'), "it") for name in ("NaN", "Infinity", "-Infinity")}
    return numbers | {
        "a window before the window": (instead(window, f'"kernel_size": [3], {window}'), twice.format("kernel_size")),
        "a window behind the window": (instead(window, f'{window}, "kernel_size": [3]'), twice.format("kernel_size")),
        "two digests": (instead('"digest"', '"digest": "", "digest"'), twice.format("digest")),
        "two formats": (instead('{"format"', '{"format": 99, "format"'), twice.format("format")),
        "a name twice, spelled differently": (instead(window, rf'{window}, "kernel\u005fsize": [3]'), ascii_only),
        "an escaped letter": (instead('"float32"', r'"\u0066loat32"'), ascii_only),
        "an escaped slash": (instead('"one.so"', r'".\/one.so"'), ascii_only),
        "half a surrogate": (instead('"one.so"', r'"\ud800"'), ascii_only),
        "a pair of surrogates": (instead('"one.so"', r'"\ud83d\ude00"'), ascii_only),
        "a letter of UTF-8": (instead('"one.so"', '"\u00e9.so"'), ascii_only),
        "a letter of Latin-1": (instead('"one.so"', '"X.so"').replace(b"X", b"\xe9"), ascii_only),
        "an overlong slash": (instead('"one.so"', '"X.so"').replace(b"X", b"\xc0\xaf"), ascii_only),
        "a byte order mark": (b"\xef\xbb\xbf" + text.encode(), ascii_only),
        "UTF-16": (text.encode("utf-16"), ascii_only),
        "a zero in a text": (instead('"one.so"', '"one.so\0"'), ascii_only),
        "a zero at the end": (text.encode() + b"\0", ascii_only),
        "a delete": (instead('"one.so"', '"one.so\x7f"'), ascii_only),
        "a tab in a text": (instead('"one.so"', '"one\t.so"'), no_json),
        "a newline in a text": (instead('"one.so"', '"one\n.so"'), no_json),
        "a form feed for a blank": (instead(": ", ":\f"), ascii_only),
        "a comma at the end of a list": (instead("[5]", "[5,]"), no_json),
        "a comma at the end": (text[:-1].encode() + b",}", no_json),
        "two commas": (instead(", ", ",, "), no_json),
        "a comment": (instead(": ", ": /* */ "), no_json),
        "a comment of a line": (text.encode() + b"\n// no", no_json),
        "no quotes around a name": (instead('"format"', "format"), no_json),
        "other quotes": (instead('"float32"', "'float32'"), no_json),
        "no colon": (instead(": ", " "), no_json),
        "a name that is a number": (instead('"format"', "4"), no_json),
        "something behind it": (text.encode() + b" {}", no_json),
        "itself behind it": (text.encode() * 2, no_json),
        "half of it": (text[: len(text) // 2].encode(), no_json),
        "all but its last letter": (text[:-1].encode(), no_json),
        "nothing": (b"", no_json),
        "a blank": (b" ", no_json),
        "a quote": (b'"', no_json),
        "a minus": (b"-", no_json),
        "a backslash in a quote": (b'"\\', ascii_only),
        "half a word": (b"tru", no_json),
        "a null": (b"null", "it has no format"),
        "a text": (b'"format"', "it has no format"),
        "a list": (b"[]", "it has no format"),
        "an empty object": (b"{}", "it has no format"),
        "lists 100,000 deep": (b"[" * 100_000, "deep in one another"),
        "lists 100,000 deep and back": (b"[" * 100_000 + b"]" * 100_000, "deep in one another"),
        "objects 100,000 deep": (b'{"a":' * 100_000, "deep in one another"),
        "17 deep": (instead('"format"', '"a": ' + "[" * 16 + "]" * 16 + ', "format"'), "deep in one another"),
        "16 deep": (instead('"format"', '"a": ' + "[" * 15 + "]" * 15 + ', "format"'), "a is unknown"),
        "as many lists as fit": (b"[" + b"[]," * (MAX_BYTES // 3 - 2) + b"[]]", "it has no format"),
        "too large": (written(good()).ljust(MAX_BYTES + 1), "bytes"),
        "the format before": (
            instead(f'"format": {FORMAT}', f'"format": {FORMAT - 1}'),
            f"its format is {FORMAT - 1},",
        ),
        "a format that is a text": (instead(f'"format": {FORMAT}', f'"format": "{FORMAT}"'), "its format is "),
        "a format that is true": (instead(f'"format": {FORMAT}', '"format": true'), "its format is "),
        "an edited window": (instead(window, '"kernel_size": [3]'), "edited"),
        "an edited version": (instead('"abi": "', '"abi": "9'), "called in another way"),
    }


# What each place of a manifest is replaced by.
VALUES = [
    None, True, False, 0, 1, 2, 3, 4, 7, 8, -1, -8, 1000, 2**31, 2**32 + 1, 2**53 - 1, 2**53, -(2**53), 1.5, 1e300, "",
    "0", "1", "x", "main", "sideways", "forward", "additional", "additionally", "float64", "float32", "llvm", "llvm:",
    "llvm:x86-64-v3", "cuda:sm_90a", "cuda:SM_90", "cpu:x86-64", "llvm:x 86", "0.27.1", "1 2", "../one.so",
    "/etc/passwd", ".", "..", ".one.so", "a/b", "one.so/", "two.so", "missing.so", "a" * 64, "g" * 64, "A" * 64,
    "a" * 65, "a" * 256, "\u00e9", [], {}, [[]], [1], [1, 1], [1, 1, 1], [1, 1, 1, 1], [True], [True, False], [5], [21],
    [3, 3], ["additional"], [["additional"]], [[2**52, 4]], [[2**52, 2]], [[1] * 33], [[1] * 32], [[0]], [[-4]],
    [[1.5]], [None], {"a": 1},
    "runtime", "runtime-cuda", "X86", "place", "queries0", "keys2", "keys3", "queries1/8", "queries1/08",
    [["queries0/8"]],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with every key or index of it."""
    for at in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, at
        yield from places(value[at])


def schema() -> Iterator[tuple[str, bytes]]:
    """A good manifest with one place of it changed, its digest made anew."""
    count = sum(1 for _ in places(good()))

    def changed(index: int, change: Callable[[Any, Any], None]) -> bytes:
        manifest = good_copy()
        container, at = list(places(manifest))[index]
        change(container, at)
        return written(manifest)

    original = good()

    def good_copy() -> dict[str, Any]:
        return copy.deepcopy(original)

    def replace(value: Any) -> Callable[[Any, Any], None]:
        return lambda container, at: container.__setitem__(at, value)

    def add(container: Any, at: Any) -> None:
        container.update(more=1) if isinstance(container, dict) else container.append(container[at])

    for index in range(count):
        for value in VALUES:
            yield f"{index} is {value!r}"[:80], changed(index, replace(value))
        yield f"{index} is gone", changed(index, lambda container, at: container.__delitem__(at))
        yield f"{index} has company", changed(index, add)


def fuzzed(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Manifests with random damage: to their bytes, or to what they say."""
    draw = random.Random(seed)
    original = good()
    text = written(original, indent=1)
    pieces = [*'{}[],:"\\-+.eE0123456789 \t\r\n\f\0ntf', "null", "true", "NaN", '"format"', "\u00e9", '"heads": 1']
    for number in range(count):
        data = bytearray(text)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            at, end = sorted(draw.choices(range(len(data) + 1), k=2))
            end = min(end, at + draw.choice([0, 1, 1, 3, 30, len(data)]))
            piece = draw.choice([draw.choice(pieces).encode(), data[at:end] * 2, bytes([draw.randrange(256)]), b""])
            data[at:end] = piece
        yield f"fuzzed bytes {number}", bytes(data)
        manifest = copy.deepcopy(original)
        for _ in range(draw.choice([1, 2, 3])):
            container, at = draw.choice(list(places(manifest)))
            container[at] = copy.deepcopy(draw.choice(VALUES + [value[key] for value, key in places(manifest)]))
        yield f"fuzzed values {number}", written(manifest, indent=draw.choice([None, 1]))


def make_folder(folder: Path, manifest: bytes | None) -> Path:
    """Make a bundle of some files and a manifest."""
    folder.mkdir()
    for name, code in CODE.items():
        (folder / name).write_bytes(code)
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest)
    return folder


def in_its_place(path: Path) -> Iterator[str]:
    """Put one after another in a file's place what is no file, or not that file; yields what it is."""

    def empty() -> None:
        path.unlink(missing_ok=True)

    empty()
    os.mkfifo(path)
    yield "a pipe"
    for device in ("/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", path.parent, "nowhere", path):
        empty()
        path.symlink_to(device)
        yield f"a link to {device}"
    empty()
    server = socket.socket(socket.AF_UNIX)
    # Paths of sockets are short.
    server.bind(f"/proc/self/fd/{(descriptor := os.open(path.parent, os.O_RDONLY))}/{path.name}")
    os.close(descriptor)
    yield "a socket"
    server.close()
    empty()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(10**12)
    yield "a file of 10^12 zeros"
