"""`na_compiler.compiler.serving`: which kernel serves a layout, one of its own or the open one."""

import logging
import time

import pytest
import torch
from processes import run_python

import na_compiler
from na_compiler import KernelSpec, MissingKernelError, Problem, compiling, load_bundle, save_bundle, specialize
from na_compiler.compiler import cache, serving
from na_compiler.compiler.kernels import cached_entry
from na_compiler.compiler.serving import find_kernel
from na_compiler.reference import neighborhood_attention
from na_compiler.runtime import bundle as bundles
from na_compiler.target import Target

# A rule that no other test has: what is cached of it is known here.
RULE = Problem((None, None), 2, 6, (3, 4), stride=(1, 3), dilation=(2, 1))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No cache, no bundles, and nothing said."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serving, "_served", {})
    monkeypatch.delenv("NA_COMPILER_SPECIALIZE", raising=False)
    monkeypatch.setattr(na_compiler.compiler.kernels, "_kernels", {})
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
    monkeypatch.setattr(bundles, "_loaded", [])
    specialize(None)
    yield
    specialize(None)


def layout(*extents):
    return RULE.replace(layout=extents)


def test_one_compile_serves_all_layouts_and_says_so(fresh, seed, caplog):
    specialize("never")
    sizes = [(6, 4), (9, 11), (20, 5), (31, 30)]
    with caplog.at_level(logging.INFO, "na_compiler"):
        for size in sizes:
            query, key, value = torch.randn(3, 1, *size, 2, 6)
            output = na_compiler.na2d(query, key, value, RULE.kernel_size, RULE.stride, RULE.dilation)
            expected, _ = neighborhood_attention(
                query.double(), key.double(), value.double(), RULE.kernel_size, RULE.stride, RULE.dilation
            )
            assert (output - expected).norm() < 1e-5 * expected.norm()
    messages = [record.getMessage() for record in caplog.records]
    assert [one.split(" for ")[0] for one in messages if one.startswith("compiling")] == [f"compiling {RULE} forward"]
    assert sum("is served by the open kernel" in one for one in messages) == len(sizes)


def test_a_kernel_of_its_own_goes_before(fresh):
    own = na_compiler.compile(layout(9, 9))
    specialize("never")
    assert find_kernel(layout(9, 9), "forward") is own
    assert find_kernel(layout(9, 10), "forward").problem == RULE
    assert find_kernel(layout(9, 10), "backward").problem == RULE


def test_what_serves_a_layout_does_not_change_within_a_process(fresh):
    specialize("never")
    assert find_kernel(layout(9, 9), "forward").problem == RULE
    na_compiler.compiler.kernels.make_entry(KernelSpec.make(layout(9, 9)))
    for when in ("never", "background", "always"):
        specialize(when)
        assert find_kernel(layout(9, 9), "forward").problem == RULE
    serving._served.clear()  # As in another process.
    assert find_kernel(layout(9, 9), "forward").problem == layout(9, 9)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_steps_have_a_kernel_of_their_own(fresh, direction):
    every = find_kernel(RULE, direction)
    with compiling(False):
        assert find_kernel(RULE, direction, steps=True) is every, "serves them as well"
    few = find_kernel(RULE, direction, steps=True)
    assert few is not every
    assert few.problem == RULE
    with compiling(False):
        assert find_kernel(RULE, direction, steps=True) is few
    config = KernelSpec.of_steps(RULE, Target.parse("llvm"), direction).config
    assert config.tiling.strip == (1, 1, 1)


def test_by_default_the_first_layouts_get_kernels_of_their_own(fresh, monkeypatch):
    assert serving._MOST_OWN == 4
    monkeypatch.setattr(serving, "_MOST_OWN", 2)
    sizes = [(9, 9), (9, 10), (12, 13), (6, 5)]
    for _ in range(2):  # What serves a layout stays.
        for number, size in enumerate(sizes):
            problem = layout(*size)
            assert find_kernel(problem, "forward").problem == (problem if number < 2 else RULE)
    serving._served.clear()  # As in another process, which finds these in the cache: no more of them are compiled.
    for size in sizes[:2]:
        assert find_kernel(layout(*size), "forward").problem == layout(*size)
    assert find_kernel(layout(20, 21), "forward").problem == RULE
    serving._served.clear()
    assert find_kernel(layout(12, 13), "forward").problem == layout(12, 13), "met first"


def test_by_default_a_backward_of_few_windows_has_a_kernel_of_its_own(fresh, monkeypatch):
    """The open one takes several times as long there."""
    monkeypatch.setattr(serving, "_MOST_OWN", 0)
    for size, opens in (((18, 12), True), ((17, 12), False), ((18, 11), False)):
        problem = layout(*size)
        assert find_kernel(problem, "backward").problem == (RULE if opens else problem)
    assert find_kernel(layout(17, 11), "forward").problem == RULE


def test_always_each_layout_gets_a_kernel_of_its_own(fresh, monkeypatch):
    monkeypatch.setattr(serving, "_MOST_OWN", 1)
    specialize("always")
    sizes = [(9, 9), (9, 10), (7, 8)]
    assert [find_kernel(layout(*size), "forward").problem.layout for size in sizes] == sizes


def test_where_compiling_is_off_the_open_kernel_serves(fresh):
    with compiling(False), pytest.raises(MissingKernelError, match=r"layout=9x9 .*--layout 9x9 "):
        find_kernel(layout(9, 9), "forward")
    with compiling(False), pytest.raises(MissingKernelError, match=r"layout=any .*--layout anyxany "):
        find_kernel(RULE, "forward")
    na_compiler.compile(RULE)
    with compiling(False):
        assert find_kernel(layout(9, 9), "forward").problem == RULE


def test_from_a_bundle_whatever_is_said(fresh, tmp_path, monkeypatch):
    """It was made ahead of time: nothing waits for a compiler; a kernel of its own goes before."""
    save_bundle(tmp_path / "kernels", [KernelSpec.make(one) for one in (RULE, layout(9, 9))])
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(na_compiler.compiler.kernels, "_kernels", {})
    load_bundle(tmp_path / "kernels")
    assert find_kernel(layout(9, 9), "forward").problem == layout(9, 9)
    assert find_kernel(layout(9, 10), "forward").problem == RULE


def test_what_no_open_kernel_takes_gets_its_own(fresh):
    specialize("never")
    problem = layout(9, 10).replace(border="cut")
    assert find_kernel(problem, "forward").problem == problem


def test_often_met_in_the_background(fresh, seed, monkeypatch):
    monkeypatch.setattr(serving, "OFTEN", 3)
    specialize("background")
    query = torch.randn(1, 9, 9, 2, 6)
    outputs = [na_compiler.na2d(query, query, query, RULE.kernel_size, RULE.stride, RULE.dilation) for _ in range(4)]
    own = KernelSpec.make(layout(9, 9))
    end = time.monotonic() + 60
    while cached_entry(own) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert cache.find(own.key).info.problem == layout(9, 9), "is there for later processes"
    outputs.append(na_compiler.na2d(query, query, query, RULE.kernel_size, RULE.stride, RULE.dilation))
    assert all(torch.equal(output, outputs[0]) for output in outputs), "and invisible to this one"


def test_words():
    before = specialize("never")
    assert specialize(before) == "never"
    specialize(None)
    with pytest.raises(ValueError, match="when must be one of 'always', 'few', 'background', 'never', or None, got"):
        specialize("often")
    code = """
        from na_compiler import Problem, compile
        from na_compiler.compiler.serving import find_kernel
        try:
            print(find_kernel(Problem(9, 1, 8, 3), "forward").problem)
        except ValueError as error:
            print(error)
    """
    assert "layout=any" in run_python(code, NA_COMPILER_SPECIALIZE="never")
    said = run_python(code, NA_COMPILER_SPECIALIZE="sometimes")
    assert "NA_COMPILER_SPECIALIZE must be one of always, few, background, never, got 'sometimes'" in said
