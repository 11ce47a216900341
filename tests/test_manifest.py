"""Manifests: both readers of the format, in Python and in C++, come to one verdict on whatever lies in a bundle."""

import json
import logging
import random
import re
import subprocess
import sys

import manifests
import pytest

from na_compiler import KernelSpec, Problem
from na_compiler.compiler import cache
from na_compiler.runtime import native
from na_compiler.runtime.host import cxx_compiler
from na_compiler.runtime.manifest import digest_of

# As where apache-tvm is not installed: a C++ program knows no version of TVM's runtime but that of apache-tvm-ffi.
PYTHON = """
import sys
from na_compiler.runtime import bundle
installed = bundle._version
bundle._version = lambda name: None if name == "apache-tvm" else installed(name)
load_bundle = bundle.load_bundle
for line in sys.stdin:
    try:
        load_bundle(line.rstrip("\\n"))
        print("taken", flush=True)
    except (OSError, ValueError) as error:
        print("refused", " ".join(str(error).split("\\n")), flush=True)
"""
CXX = """
#include <iostream>
#include "native.cc"
int main() {
  for (std::string folder; std::getline(std::cin, folder);) {
    try {
      na::Bundle::open(folder);
      std::cout << "taken" << std::endl;
    } catch (const na::Error& error) {
      std::cout << "refused " << error.what() << std::endl;
    }
  }
}
"""


def build(folder, *options):
    """Return a program that reads folders of bundles, and writes a verdict for each."""
    source = folder / "reader.cc"
    source.write_text(CXX)
    command = [*cxx_compiler(), "-std=c++17", *native.flags(), *options, "-o", folder / "reader", source, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [str(folder / "reader")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return build(tmp_path_factory.mktemp("reader"), "-O1", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    options = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS")
    return build(tmp_path_factory.mktemp("sanitized"), *options)


def verdicts(command, folders):
    """Return what a reader says of each folder; it has a second for forty of them, and some memory."""
    given = "".join(f"{folder}\n" for folder in folders)
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, timeout=60 + len(folders) / 40
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert len(said) == len(folders)
    return said


def both(reader, folders):
    """Return what Python and C++ say of each folder, which is one verdict."""
    found = [*zip(verdicts([sys.executable, "-c", PYTHON], folders), verdicts(reader, folders), strict=True)]
    # Python knows what operands a kernel has to the last extent; C++ checks their form, and the order of their names.
    known = [pair for pair in found if "takes other operands than those of this version" not in pair[0]]
    other = [pair for pair in known if pair[0].split()[0] != pair[1].split()[0]]
    assert not other, "\n".join(map(str, other[:20]))
    return found


def made(folder, texts):
    return [manifests.make_folder(folder / str(index), text) for index, text in enumerate(texts)]


def test_good_manifests_are_taken(reader, tmp_path):
    cases = manifests.taken()
    for name, said in zip(cases, both(reader, made(tmp_path, cases.values())), strict=True):
        assert said == ("taken", "taken"), name


def test_the_grammar_is_one(reader, tmp_path):
    cases = manifests.grammar()
    folders = made(tmp_path, [text for text, _ in cases.values()])
    for (name, (_, wanted)), folder, said in zip(cases.items(), folders, both(reader, folders), strict=True):
        for one in said:
            assert one.startswith(f"refused the bundle in {folder} cannot be used: "), (name, one)
            assert re.search(wanted, one), (name, one)
            assert "; make it again with" in one, (name, one)
            assert len(one) < 600 + 2 * len(str(folder)), name


@pytest.mark.parametrize("count", [800, pytest.param(None, marks=pytest.mark.full)])
def test_the_schema_is_one(count, reader, tmp_path, seed):
    """Every place of a manifest, replaced by values of all kinds."""
    cases = [*manifests.schema()]
    cases = dict(random.sample(cases, count) if count else cases)
    found = both(reader, made(tmp_path, cases.values()))
    are_taken = sum(said == ("taken", "taken") for said in found)
    assert 0 < are_taken < len(cases) / 5  # One in a hundred, as a rule.
    are_alike = 0
    for name, said in zip(cases, found, strict=True):
        assert len(said[0]) < 800, name
        if all("cannot be used: manifest.json: " in one for one in said):
            # The place and the rule, in the same words; a problem that is none has its own in Python.
            first, other = (re.sub(r"^.*?cannot be used: |, got .*|; known are.*|; make it.*", "", one) for one in said)
            assert first == other, name
            are_alike += 1
    assert are_alike > len(found) / 2


def test_fuzzed_manifests(reader, tmp_path, seed):
    both(reader, made(tmp_path, dict(manifests.fuzzed(seed, 150)).values()))


@pytest.mark.parametrize("name", ["manifest.json", "one.so", "l.so"])
def test_what_is_no_file_is_refused_by_its_name(name, reader, tmp_path):
    """Without waiting for it, and without reading it to an end that may not come."""
    folder = manifests.make_folder(tmp_path / "bundle", manifests.written(manifests.good()))
    for what in manifests.in_its_place(folder / name):
        for said in both(reader, [folder])[0]:
            assert said.startswith(f"refused the bundle in {folder} cannot be used: "), (what, said)
            assert name in said, (what, said)


def test_files_are_checked_before_anything_is_used(reader, tmp_path):
    """Those of every kernel, of either direction, and what lies beside them."""
    folders = []
    for name in manifests.CODE:
        for change in (bytes.upper, lambda code: code[:-1], lambda code: code + b"!", None):
            folder = manifests.make_folder(tmp_path / str(len(folders)), manifests.written(manifests.good()))
            folders.append(folder)
            if change is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(change(manifests.CODE[name]))
    for index, said in enumerate(both(reader, folders)):
        name = list(manifests.CODE)[index // 4]
        wanted = f"{name} is {'missing' if index % 4 == 3 else 'not the file that was put in'}; make it again"
        assert all(wanted in one for one in said), said


INFO = KernelSpec.make(Problem((5, 6), 1, 8, 3)).info


def put(build):
    """Return an entry of the cache, made if there is none."""
    try:
        return cache.find("a")
    except (FileNotFoundError, cache.DamagedEntryError):
        # What is said for people may be anything: this is no text of a manifest's.
        return cache.make(
            "a", lambda: {**INFO.to_dict(), "family": "cpu", "config": '"\\\u00e9\n', "reason": None}, build
        )


def entry(folder, change=lambda manifest: None):
    """Return the text of an entry of the cache, with something changed and its digest made anew."""
    manifest = json.loads((folder / "kernel.json").read_text())
    change(manifest)
    return json.dumps(manifest | {"digest": digest_of(manifest)})


HOSTILE = {
    "a window before the window": lambda text: text.replace('"heads":', '"heads": 9, "heads":'),
    "an edited window": lambda text: text.replace('"kernel_size": [3, 3]', '"kernel_size": [1, 1]'),
    "lists 100,000 deep": lambda text: "[" * 100_000,
    "many numbers": lambda text: "[" + "1," * 5_000_000 + "1]",
    "UTF-16": lambda text: "\ufeff" + text,
    "an edited alignment": lambda text: text.replace('"alignment": 1', '"alignment": -8'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_entry_of_the_cache_is_built_again(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    built = []

    def fetch():
        return put(lambda path: built.append(path.write_bytes(b"code")))

    path = fetch().library.with_name("kernel.json")
    path.write_text(HOSTILE[name](entry(path.parent)))
    assert [*cache.entries()] == []
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert fetch().library.read_bytes() == b"code"
    assert caplog.text.count("compiling a again: ") == 1
    assert len(built) == 2
    assert fetch().info == INFO
    assert len(built) == 2


def test_what_is_no_file_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    for name in ("kernel.so", "kernel.json"):
        folder = put(lambda path: path.write_bytes(b"code")).library.parent
        for what in manifests.in_its_place(folder / name):
            with pytest.raises(cache.DamagedEntryError, match=name):
                cache.read_entry(folder, "a")
            assert what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alignment": -8}, "alignment must be a power of two"),
        ({"target": 3}, "target must be llvm:INSTRUCTION_SET or cuda:ARCHITECTURE, got 3"),
        ({"direction": "sideways"}, "direction must be forward or backward or tangent, got 'sideways'"),
        ({"border": "wrap"}, "border is unknown; known are"),
        ({"workspace": None}, "workspace must be an object, got None"),
    ],
)
def test_an_entry_of_another_make(change, said, tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    folder = put(lambda path: path.write_bytes(b"code")).library.parent
    (folder / "kernel.json").write_text(entry(folder, lambda manifest: manifest.update(change)))
    with pytest.raises(cache.DamagedEntryError, match=said):
        cache.read_entry(folder, "a")


@pytest.mark.full
def test_hostile_manifests_under_sanitizers(sanitized, tmp_path, seed):
    cases = [*manifests.taken().values(), *(text for text, _ in manifests.grammar().values())]
    cases += [text for _, text in manifests.schema()] + [text for _, text in manifests.fuzzed(seed, 1500)]
    both(sanitized, made(tmp_path, cases))
