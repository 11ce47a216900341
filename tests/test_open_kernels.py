"""Kernels for an open layout, for every one and for any part of one, against the float64 reference of the whole."""

import math
import random

import pytest
import torch
from chunked import compile_in_chunks
from draws import some
from oracle import TOLERANCE, check, guarded, guards_are_whole
from place_draws import PROBLEMS, draw_layout, draw_part

import na_compiler
from na_compiler import KernelSpec, Place
from na_compiler.counting import most_queries_anywhere, widest_union_anywhere
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.window import query_bounds, window_end, window_start

# What an open kernel takes beside the rule.
FURTHER = [
    Problem((12, 12), 2, 16, 5, operands=("relative_position_bias",)),
    Problem((12, 12), 4, 16, 5, 2, 2, operands=("relative_position_bias", "key_mask"), heads_kv=2, additional_kv=True),
    Problem(60, 2, 16, 21, operands=("key_mask",), is_causal=True),
]
# With keys that come 16 at a time.
IN_CHUNKS = [
    Problem(70, 2, 8, 23),
    Problem((5, 64), 2, 8, (3, 21), dilation=(1, 2), is_causal=(False, True)),
    Problem(64, 2, 8, 24, 5, 2),
]


def draw_tensors(problem, batch=1):
    dtype = getattr(torch, problem.dtype)
    tokens = (batch, *problem.layout)
    made = {
        "query": torch.randn(*tokens, problem.heads, problem.head_dim).to(dtype),
        "key": torch.randn(*tokens, problem.heads_kv, problem.head_dim).to(dtype),
        "value": torch.randn(*tokens, problem.heads_kv, problem.head_dim_v).to(dtype),
    }
    if problem.additional_kv:
        more = random.randint(1, 70)
        made["additional_keys"] = torch.randn(batch, more, problem.heads_kv, problem.head_dim).to(dtype)
        made["additional_values"] = torch.randn(batch, more, problem.heads_kv, problem.head_dim_v).to(dtype)
    if problem.has("relative_position_bias"):
        made["relative_position_bias"] = torch.randn(problem.heads, *(2 * k - 1 for k in problem.kernel_size))
    if problem.has("key_mask"):
        made["key_mask"] = torch.rand(tokens) < 0.9
    return made


def parameters(problem):
    return {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}


def exact(tensors):
    return {
        name: tensor.double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def held(tensors, part):
    """The part of tensors that a place has, which lies between NaN; a mask hides nothing more around it."""
    found = dict(tensors)
    found["query"] = part.of_queries(tensors["query"])
    for name in ("key", "value"):
        found[name] = part.of_keys(tensors[name])
    if "key_mask" in tensors:
        found["key_mask"] = tensors["key_mask"][(slice(None), *part.keys)].contiguous()
    return found


def run(problem, layouts, places, directions, make=na_compiler.compile):
    """Compile one kernel, and compare it on several layouts, and several parts of each, with the whole."""
    kernels = {direction: make(problem.opened(), direction=direction) for direction in directions}
    for _ in range(layouts):
        problem = draw_layout(problem)
        tensors = draw_tensors(problem, random.randint(1, 2) if problem.rank == 1 else 1)
        inputs = exact(tensors)
        whole = neighborhood_attention(**inputs, **parameters(problem))
        parts = [draw_part(problem) for _ in range(places)]
        for part in (None, *parts):
            compare(problem, kernels, tensors, inputs, whole, part)


def compare(problem, kernels, tensors, inputs, whole, part):
    given = tensors if part is None else held(tensors, part)
    place = {} if part is None else {"place": part.place}
    of_queries = (lambda tensor: tensor) if part is None else part.of_queries
    output, lse = map(of_queries, whole)
    if "forward" in kernels:
        made = kernels["forward"](**given, **place)
        check("output", made[0], output.detach(), problem.dtype)
        check("lse", made[1], lse.detach(), "float32")
    if "backward" not in kernels:
        return
    grad_output, grad_lse = torch.randn(output.shape).to(tensors["query"].dtype), torch.randn(lse.shape)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    grads = torch.autograd.grad(
        (output, lse), [inputs[name] for name in names], (grad_output.double(), grad_lse.double()), retain_graph=True
    )
    results = kernels["backward"](
        output=output.detach().to(grad_output.dtype).contiguous(), lse=lse.detach().float().contiguous(),
        grad_output=grad_output, grad_lse=grad_lse, **given, **place,
    )  # fmt: skip
    scale = grads[names.index("value")].norm().item()
    for name, result, gradient in zip(names, results, grads, strict=True):
        found = result.sum(0) if name == "relative_position_bias" else result
        expected = gradient if part is None else of_part(name, gradient, part)
        error = (found.double() - expected).norm() / max(expected.norm().item(), 1e-3 * scale)
        assert error < TOLERANCE[problem.dtype], f"grad_{name}: {error:.1e} of {problem} {part and part.place}"


def of_part(name, gradient, part):
    """What a part has of the gradient of a tensor of the whole, which is 0 elsewhere."""
    if name in {"key", "value"}:
        index = (slice(None), *part.keys)
        around = gradient.clone()
        around[index] = 0
        assert not around.any(), "the keys that are held are all that queries see"
        return gradient[index]
    return part.of_queries(gradient) if name == "query" else gradient


@pytest.mark.parametrize("problem", some(PROBLEMS, 4, "open forward"), ids=str)
def test_forward(problem, seed):
    run(problem, 5, 3, ("forward",))


@pytest.mark.parametrize("problem", some(PROBLEMS, 2, "open backward"), ids=str)
def test_backward(problem, seed):
    run(problem, 4, 2, ("backward",))


@pytest.mark.parametrize("problem", some(PROBLEMS, 1, "open tangents"), ids=str)
def test_tangents(problem, seed):
    kernel = na_compiler.compile(problem.opened(), direction="tangent")
    for _ in range(3):
        problem = draw_layout(problem)
        tensors = draw_tensors(problem)
        moving = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in tensors.items()}

        def whole(*inputs, names=tuple(tensors), problem=problem):
            return neighborhood_attention(**dict(zip(names, inputs, strict=True)), **parameters(problem))

        exact_inputs, exact_moves = ([one.double() for one in named.values()] for named in (tensors, moving))
        results, tangents = torch.func.jvp(whole, tuple(exact_inputs), tuple(exact_moves))
        for part in (None, draw_part(problem), draw_part(problem)):
            given, moved = (named if part is None else held(named, part) for named in (tensors, moving))
            place = {} if part is None else {"place": part.place}
            made = kernel(**given, **{f"tangent_{name}": tensor for name, tensor in moved.items()}, **place)
            of_queries = (lambda tensor: tensor) if part is None else part.of_queries
            expected = [*map(of_queries, results), *map(of_queries, tangents)]
            scale = of_queries(tangents[0]).norm().item()
            names = ("output", "lse", "tangent of output", "tangent of lse")
            for name, found, exactly in zip(names, made, expected, strict=True):
                # Of windows of one key lse moves with the score, and the output with the value alone.
                error = (found.double() - exactly).norm() / max(exactly.norm().item(), 1e-3 * scale)
                limit = TOLERANCE["float32" if name == "lse" else problem.dtype]
                assert error < limit, f"{name}: {error:.1e} of {problem} {part and part.place}"


@pytest.mark.parametrize("problem", some(FURTHER, 1, "open options"), ids=str)
def test_further_operands(problem, seed):
    run(problem, 2, 2, ("forward", "backward"))


@pytest.mark.parametrize("problem", some(IN_CHUNKS, 1, "open chunks"), ids=str)
def test_keys_in_chunks(problem, seed):
    run(problem, 4, 3, ("forward", "backward"), compile_in_chunks)


@pytest.mark.full
def test_a_window_so_large_that_its_keys_come_in_chunks(seed):
    problem = Problem(5300, 1, 8, 4300)
    assert KernelSpec.make(problem.opened()).plan.is_chunked
    run(problem, 2, 2, ("forward", "backward"))


def test_nothing_is_written_around_what_is_returned(seed):
    """Nor read around what is given, of which the tests above have NaN on one side only."""
    problem = draw_layout(Problem((20, 20), 2, 16, 5, dilation=(1, 3)))
    kernel = na_compiler.compile(problem.opened())
    part = draw_part(problem)
    tensors = draw_tensors(problem)
    given = [guarded(tensor) for tensor in held(tensors, part).values()]
    expected, lses = neighborhood_attention(**exact(tensors), **parameters(problem))
    output = guarded(torch.full(given[0].shape, math.nan))
    lse = guarded(torch.full(given[0].shape[:-1], math.nan))
    place = part.place
    numbers = [number for axis in zip(place.layout, place.queries, place.keys, strict=True) for number in axis]
    kernel.function(*given, problem.head_dim**-0.5, *numbers, output, lse)
    check("output", output, part.of_queries(expected.detach()), "float32")
    check("lse", lse, part.of_queries(lses.detach()), "float32")
    assert guards_are_whole(output, lse)


def test_unions_of_windows_anywhere():
    """Neither too small for any block of queries of any group, nor larger than some."""
    for _ in range(60):
        kernel_size, queries, is_causal = random.randint(1, 9), random.randint(1, 13), random.random() < 0.5
        stride = random.randint(1, kernel_size)
        most = 0
        for length in range(kernel_size, kernel_size + queries * stride + queries + 2 * stride):
            rule = (length, kernel_size, stride, is_causal)
            for first in range(length):
                last = min(first + queries, length) - 1
                most = max(most, window_end(last, *rule) - window_start(first, *rule))
        assert widest_union_anywhere(kernel_size, stride, is_causal, queries) == most


def test_queries_of_a_key_anywhere():
    for _ in range(60):
        kernel_size, is_causal = random.randint(1, 14), random.random() < 0.5
        stride = random.randint(1, kernel_size)
        most = 0
        for length in range(kernel_size, 3 * kernel_size + 4 * stride + 3):
            for key in range(length):
                first, end = query_bounds(key, length, kernel_size, stride, is_causal)
                most = max(most, end - first)
        assert most_queries_anywhere(kernel_size, is_causal) == most


def test_what_an_open_kernel_refuses():
    problem = Problem((None, None), 2, 8, 5)
    kernel = na_compiler.compile(problem)
    query, key = torch.zeros(1, 4, 6, 2, 8), torch.zeros(1, 6, 6, 2, 8)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must be at most the layout's 4 tokens on axis 0"):
        kernel(query, query, query)
    with pytest.raises(ValueError, match="key must hold the tokens from 0 up to 6 of the 8 on axis 0"):
        kernel(query, key[:, :5], key[:, :5], place=Place((8, 6)))
    with pytest.raises(ValueError, match=r"value must have shape \(1, 6, 6, 2, 8\) for na2d layout=any"):
        kernel(query, key, key[:, :5], place=Place((8, 6)))
    with pytest.raises(ValueError, match="takes no place; one for an open layout does"):
        na_compiler.compile(Problem((6, 6), 2, 8, 5))(key, key, key, place=Place((8, 6)))
    for border in ("cut", "wrap"):
        with pytest.raises(NotImplementedError, match="Open kernels for CPUs take border='shift' only"):
            na_compiler.compile(problem.replace(border=border))
    with pytest.raises(ValueError, match="border must not be 'clamp' with an open layout"):
        problem.replace(border="clamp")
    with pytest.raises(NotImplementedError, match="simt has no kernels for an open layout"):
        na_compiler.compile(problem, "cuda:sm_80")
    for count in (lambda: problem.tokens, problem.pairs, problem.flops):
        with pytest.raises(ValueError, match=r"problem.replace\(layout=...\) has"):
            count()
