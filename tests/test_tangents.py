"""The direction "tangent": compiled kernels against forward mode of the float64 reference, over all of `Problem`."""

import json
import math
import random

import numpy as np
import pytest
import torch
from chunked import compile_in_chunks
from draws import some
from oracle import (
    NAMES,
    check_forward,
    check_tangents,
    draw,
    draw_tangents,
    guarded,
    guards_are_whole,
    poisoned,
)
from test_kernels import HALF, PROBLEMS, strided
from test_numerics import CHUNKED, NUMBERS
from test_numerics import PROBLEMS as SPOILED

import na_compiler
from na_compiler.cli import bench, bench_tangents, main
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem

CHUNKY = [
    Problem(6000, 1, 8, 5001),
    Problem((70, 75), 2, 8, (69, 70), (3, 1), heads_kv=1, additional_kv=True),
    Problem((17, 18, 19), 1, 4, (16, 17, 17), is_causal=(False, True, False)),
]


def compiled(problem):
    return na_compiler.compile(problem, direction="tangent")


def by_name(example, tangents):
    """Return what a kernel is called with."""
    more = {f"tangent_{name}": tensor for name, tensor in zip(NAMES, tangents.inputs, strict=False)}
    return dict(zip(NAMES, example.inputs, strict=False)) | more


def run(problem, *, batch=1, additional=5, scale=None):
    """Compile a problem and compare it with the reference; all tensors lie between NaN, and results are NaN before."""
    example = draw(problem, batch=batch, additional=additional, scale=scale)
    tangents = draw_tangents(example, scale=scale)
    dtype = example.inputs[0].dtype
    empty = (torch.empty(example.output.shape, dtype=dtype), torch.empty(example.lse.shape)) * 2
    results = [guarded(tensor) for tensor in poisoned(*empty)]
    inputs = [guarded(tensor) for tensor in (*example.inputs, *tangents.inputs)]
    compiled(problem).function(*inputs, problem.head_dim**-0.5 if scale is None else scale, *results)
    check_forward(example, *results[:2])
    check_tangents(tangents, *results[2:])
    assert guards_are_whole(*results)


@pytest.mark.parametrize("problem", some(PROBLEMS, 6, "tangents"), ids=str)
def test_float32(problem, seed):
    run(problem, batch=2 if problem.tokens < 200 else 1)


@pytest.mark.parametrize(
    "problem", some([problem.replace(dtype=dtype) for problem in HALF for dtype in ("bfloat16", "float16")], 2, "half"),
    ids=str,
)  # fmt: skip
def test_half_precision(problem, seed):
    run(problem)


@pytest.mark.full
@pytest.mark.parametrize("problem", CHUNKY, ids=str)
def test_windows_that_come_in_chunks(problem, seed):
    assert KernelSpec.make(problem, direction="tangent").plan.is_chunked
    run(problem)


@pytest.mark.parametrize("additional", [0, 1, 65])
def test_numbers_of_additional_keys(additional, seed):
    run(Problem((6, 10), 2, 16, 3, additional_kv=True), additional=additional)


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_scales(scale, seed):
    run(Problem((6, 10), 2, 16, 3), scale=scale)


@pytest.mark.parametrize("name", NAMES)
def test_one_tangent_of_an_input(name, seed):
    """The others are left out: zeros, of which a row is in memory."""
    problem = Problem((6, 10), 4, 16, 3, heads_kv=2, additional_kv=True)
    example = draw(problem, batch=2)
    tangents = draw_tangents(example, only=name)
    given = dict(zip(NAMES, example.inputs, strict=True))
    moving = {f"tangent_{name}": tangents.inputs[NAMES.index(name)]}
    output, lse, *results = compiled(problem)(**given, **moving)
    check_forward(example, output, lse)
    if name in {"value", "additional_values"}:
        assert not results[1].any(), "lse does not depend on values"
        check_tangents(tangents, results[0], tangents.lse.float())
    else:
        check_tangents(tangents, *results)


@pytest.mark.parametrize("make", [torch, np])
def test_no_tangent_at_all(make, seed):
    problem = Problem((6, 10), 2, 16, 3)
    inputs = [tensor if make is torch else tensor.numpy() for tensor in draw(problem).inputs]
    results = compiled(problem)(*inputs)
    assert not any(result.any() for result in results[2:])
    plain = na_compiler.compile(problem)(*inputs)
    assert all((ours == theirs).all() for ours, theirs in zip(results, plain, strict=False))


@pytest.mark.parametrize("kind", ["heads_first", "misaligned", "padded"])
def test_tangents_are_read_where_they_are(kind, seed):
    problem = Problem((9, 10), 2, 16, 3, additional_kv=True, dtype=random.choice(["float32", "bfloat16"]))
    example = draw(problem)
    tangents = draw_tangents(example)
    named = {name: strided(tensor, kind) for name, tensor in by_name(example, tangents).items()}
    output, lse, *results = compiled(problem)(**named)
    check_forward(example, output, lse)
    check_tangents(tangents, *results)


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_nothing_in_the_batch(make):
    problem = Problem((6, 10), 2, 16, 3, additional_kv=True)
    dtype = (torch if make is torch.zeros else np).float32
    query, extra = make((0, 6, 10, 2, 16), dtype=dtype), make((0, 0, 2, 16), dtype=dtype)
    results = compiled(problem)(query, query, query, query, None, None, extra, extra)
    assert [tuple(result.shape) for result in results] == [query.shape, query.shape[:-1]] * 2


@pytest.mark.parametrize("problem", [Problem((12, 13), 2, 16, 5), Problem(400, 1, 32, 300)], ids=str)
def test_a_common_change_of_all_scores_costs_no_digits(problem, seed):
    """What is the same for all keys of a query has no part in the tangent of its output, however large it is."""
    example = draw(problem)
    tangents = draw_tangents(example)
    plain = compiled(problem)(**by_name(example, tangents))
    example.inputs[1] += 30.0  # Of every key, and so of every score's change by the query's tangent.
    example = dataclass_of(problem, example.inputs)
    moved = draw_tangents(example)
    results = compiled(problem)(**by_name(example, moved))
    check_tangents(moved, *results[2:])
    assert plain[2].isfinite().all()


def dataclass_of(problem, inputs):
    """Return an example of given inputs."""
    example = draw(problem)
    example.inputs = inputs
    return example


def spoiled_kernel(problem):
    return compile_in_chunks(problem, "tangent") if problem is CHUNKED else compiled(problem)


def test_a_small_window_in_chunks(seed):
    example = draw(CHUNKED)
    tangents = draw_tangents(example)
    output, lse, *results = spoiled_kernel(CHUNKED)(**by_name(example, tangents))
    check_forward(example, output, lse)
    check_tangents(tangents, *results)


def check_spoiled(problem, kernel, name, number):
    """Write a number that is not finite into one place of an input, or of the tangent of one."""
    kind, _, of = name.partition(" ")
    example = draw(problem, spoiled={kind: number} if not of else None)
    tangents = draw_tangents(example, spoiled={of: number} if of else None)
    output, lse, *results = kernel(**by_name(example, tangents))
    is_value = (of or kind).endswith(("value", "values"))
    check_forward(example, output, lse, spreads=is_value)
    check_tangents(tangents, *results, spreads=is_value, repeats=True)


@pytest.mark.parametrize("problem", some([*SPOILED, CHUNKED], 3, "spoiled tangents"), ids=str)
def test_not_finite_where_the_reference_is(problem, seed):
    """Beside a hidden value or its tangent that is not finite there may be NaN, see ``docs/numerics.md``."""
    kernel = spoiled_kernel(problem)
    names = NAMES if problem.additional_kv else NAMES[:3]
    for name in [*names, *(f"tangent {name}" for name in names)]:
        check_spoiled(problem, kernel, name, random.choice(NUMBERS))


@pytest.mark.parametrize("problem", [Problem((12, 13), 2, 16, 5), Problem(5200, 1, 4, 4500)], ids=str)
def test_a_key_outside_the_window_has_no_influence(problem, seed):
    """However large it and its tangent are, as long as they are finite: to the bit."""
    tensors = torch.randn(6, 1, *problem.layout, problem.heads, problem.head_dim)
    kernel = compiled(problem)
    # The next key after the first query's window: in its tile, where products with it are computed and hidden.
    first, hidden = (0,) * (problem.rank + 1), (*(0,) * problem.rank, problem.kernel_size[-1])
    before = [result[first].clone() for result in kernel(*tensors)]
    for place in (1, 2, 4, 5):
        tensors[place][hidden] = random.choice([3e38, -3e38])
    after = [result[first] for result in kernel(*tensors)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("score", [-math.inf, math.inf, 1e30])
def test_scores_at_the_end_of_float32(score, seed):
    problem = Problem(9, 1, 1, 3)
    query, key, value = torch.ones(1, 9, 1, 1), torch.full((1, 9, 1, 1), score), torch.randn(1, 9, 1, 1)
    tangent = torch.randn(1, 9, 1, 1)
    results = compiled(problem)(query, key, value, None, tangent, None, scale=0.5)
    if math.isinf(score):
        assert all(result.isnan().all() for result in results)
        return
    windows = tangent.unfold(1, 3, 1)[:, [0, *range(7), 6]] / 2, value.unfold(1, 3, 1)[:, [0, *range(7), 6]]
    mean = windows[0].mean(-1)
    torch.testing.assert_close(results[3], mean[..., 0])
    torch.testing.assert_close(results[2], ((windows[0] - mean[..., None]) * windows[1]).mean(-1))


def test_the_same_bits_whatever_the_number_of_threads(seed):
    example = draw(Problem((23, 17), 2, 16, 5, additional_kv=True))
    given, results, threads = by_name(example, draw_tangents(example)), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(compiled(example.problem)(**given))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_what_does_not_fit_is_refused(seed):
    query, kernel = torch.zeros(1, 6, 10, 2, 16), compiled(Problem((6, 10), 2, 16, 3))
    with pytest.raises(ValueError, match=r"tangent_key must have shape \(1, 6, 10, 2, 16\) .* got \(1, 6, 9, 2, 16\)"):
        kernel(query, query, query, None, query[:, :, 1:])
    with pytest.raises(ValueError, match=r"tangent_query must be float32 .*, got float64"):
        kernel(query, query, query, query.double())
    with pytest.raises(ValueError, match="tangent_additional_keys is given, and additional_keys is None"):
        kernel(query, query, query, tangent_additional_keys=query)


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90a"])
def test_families_for_tensor_cores_say_that_they_have_none(target):
    spec = KernelSpec.make(Problem((14, 14), 2, 64, 7, dtype="bfloat16"), target, "tangent")
    assert spec.config.family == "simt"
    assert "The schedule for tensor cores of single warps has no tangents." in spec.reason
    assert ("The schedule for Hopper has no tangents." in spec.reason) == (target == "cuda:sm_90a")


def test_ahead_of_time_if_asked(tmp_path, seed):
    problem = Problem((6, 10), 2, 16, 3)
    flags = ["problem", "--layout", "6x10", "--heads", "2", "--head-dim", "16", "--kernel-size", "3"]
    assert main([*flags, "-o", str(tmp_path / "plain")]) == 0
    assert main([*flags, "--tangents", "-o", str(tmp_path / "both")]) == 0
    plain, both = (na_compiler.load_bundle(tmp_path / name) for name in ("plain", "both"))
    assert plain.find(problem, "tangent") is None
    example = draw(problem)
    tangents = draw_tangents(example)
    check_tangents(tangents, *both.find(problem, "tangent")(*example.inputs, *tangents.inputs)[2:])
    with na_compiler.compiling(False):
        found = torch.func.jvp(lambda *t: na_compiler.na2d(*t, 3), tuple(example.inputs), tuple(tangents.inputs))
        check_tangents(tangents, found[1], tangents.lse.float())
        another = torch.zeros(1, 5, 11, 1, 3)
        with pytest.raises(na_compiler.MissingKernelError, match=r"--layout 5x11 .* --tangents --target"):
            torch.func.jvp(lambda x: na_compiler.na2d(x, x, x, 3), (another,), (another,))


def test_the_bench_says_what_they_cost(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CPU_SUITE", (bench.Case("2-D", Problem((10, 11), 2, 16, 3), {}),))
    monkeypatch.setattr(bench_tangents, "_SMALL", ())
    assert main(["bench", "--tangents", "--seconds", "0.05", "--threads", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["ratio"] == pytest.approx(row["tangent"] / row["forward"])
    assert main(["bench", "--tangents", "--suite", "onnx"]) == 1
    assert "--tangents goes with --suite cpu" in capsys.readouterr().err
