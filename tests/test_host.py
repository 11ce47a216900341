"""`na_compiler.runtime.host`: libraries that the system's compiler makes, once, in the cache or where it is said."""

import ctypes
import logging
import os
import time

import pytest

from na_compiler.runtime import host
from na_compiler.runtime.host import HostCompileError, HostLibrary, NoCompilerError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def library(folder, **options):
    """A library whose function is 3 in C++ and 4 in C."""
    folder.mkdir(exist_ok=True)
    (folder / "one.cc").write_text('extern "C" int two(void); extern "C" int one() { return two() - N; }')
    (folder / "two.c").write_text("int new(void) { return 4; } int two(void) { return new(); }")
    sources = (folder / "one.cc", folder / "two.c")
    return HostLibrary("libone.so", "the library", sources, **{"options": ("-DN=1",), **options})


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_the_compiler_is_found(variable, monkeypatch, tmp_path):
    find = {"CC": host.c_compiler, "CXX": host.cxx_compiler}[variable]
    monkeypatch.setenv(variable, "/nowhere/compiler")
    assert find() is None
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() is None
    name = {"CC": "clang", "CXX": "clang++"}[variable]
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    assert find() == (str(tmp_path / name),)
    monkeypatch.setenv(variable, f"{name} -m64 '-DWHAT=a b'")
    assert find() == (str(tmp_path / name), "-m64", "-DWHAT=a b")
    spaced = tmp_path / "a b" / name
    spaced.parent.mkdir()
    (tmp_path / name).rename(spaced)
    monkeypatch.setenv(variable, str(spaced))
    assert find() == (str(spaced),)
    monkeypatch.setenv(variable, f"{name} -m64")
    assert find() is None


def test_built_once_and_again_when_anything_of_it_changes(tmp_path, cache, caplog):
    caplog.set_level(logging.INFO)
    made = library(tmp_path / "sources").build()
    assert made.is_relative_to(cache)
    assert ctypes.CDLL(str(made)).one() == 3
    assert library(tmp_path / "sources").build() == made
    assert len([message for message in caplog.messages if message.startswith("built ")]) == 1
    other = library(tmp_path / "sources", options=("-DN=2",)).build()
    assert ctypes.CDLL(str(other)).one() == 2
    part = tmp_path / "sources" / "part.h"
    part.write_text("")
    parts = [library(tmp_path / "sources", parts=(part,)).build()]
    part.write_text("// Another one.")
    parts.append(library(tmp_path / "sources", parts=(part,)).build())
    assert len({made, other, *parts}) == 4
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["libone.so"] * 4


def test_found_without_a_compiler(tmp_path, monkeypatch):
    made = library(tmp_path / "sources").build()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert library(tmp_path / "sources").build() == made
    said = r"the library needs a C\+\+ compiler, and none was found; install one, set CXX, or bring libone.so"
    with pytest.raises(NoCompilerError, match=said):
        library(tmp_path / "sources").build(tmp_path / "elsewhere")


def test_a_folder_is_written_every_time(tmp_path, cache):
    made = library(tmp_path / "sources").build(tmp_path / "made" / "here")
    assert made == tmp_path / "made" / "here" / "libone.so"
    assert not cache.exists()
    library(tmp_path / "sources", options=("-DN=2",)).build(tmp_path / "made" / "here")
    assert ctypes.CDLL(str(made)).one() == 2
    assert [path.name for path in made.parent.iterdir()] == ["libone.so"]


def test_without_a_cache_there_is_a_temporary_one(tmp_path, cache):
    cache.write_text("no folder")
    made = library(tmp_path / "sources").build()
    assert ctypes.CDLL(str(made)).one() == 3
    assert library(tmp_path / "sources").build() == made
    with pytest.raises(OSError, match="cache"):
        library(tmp_path / "sources").build(cache / "within")


def test_a_failure_has_the_compilers_words(tmp_path, cache):
    with pytest.raises(HostCompileError, match=r"(?s)could not build the library: .*one.cc.*NONE"):
        library(tmp_path / "sources", options=("-DN=NONE",)).build()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_a_killed_process_left_beside_a_library_goes(tmp_path):
    place = library(tmp_path / "sources").build().parent
    (place / "libone.so").unlink()
    old, new = place / ".building-old", place / ".building-new"
    for left in (old, new):
        left.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    assert library(tmp_path / "sources").build().is_file()
    assert not old.exists()
    assert new.exists(), "somebody may be about to use it"
