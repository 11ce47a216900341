"""Borders in kernels of CPUs and for CUDA cores, against the float64 reference."""

import random

import pytest
import torch
from border_problems import BIAS, MASK, PROBLEMS, draw_problem
from chunked import compile_in_chunks
from draws import some
from oracle import check, check_backward, check_forward, check_tangents, draw, draw_tangents, poisoned
from test_simt import backward as emulated_backward
from test_simt import forward as emulated_forward
from test_simt import tangent as emulated_tangent
from test_tangents import run as run_tangent

import na_compiler
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention


def forward(example, compile_=na_compiler.compile):
    """Compile and run the forward."""
    problem = example.problem
    output, lse = poisoned(torch.empty(example.output.shape, dtype=example.inputs[0].dtype), example.lse.float())
    compile_(problem, direction="forward").function(*example.read, problem.head_dim**-0.5, output, lse)
    return output, lse


def run(problem, *, batch=1, compile_=na_compiler.compile):
    """Compile a problem and compare it with the reference."""
    example = draw(problem, batch=batch, lse_has_grad=bool(torch.randint(2, ())))
    scale = problem.head_dim**-0.5
    check_forward(example, *forward(example, compile_))
    results = example.output.to(example.inputs[0].dtype).contiguous(), example.lse.float().contiguous()
    arguments = (*example.inputs[:3], *results, example.grad_output, example.grad_lse)
    backward = compile_(problem, direction="backward")
    check_backward(example, backward(*arguments, *example.inputs[3:], scale=scale, **example.others))


@pytest.mark.parametrize("problem", some(PROBLEMS, 2, "cpu borders"), ids=str)
def test_cpu(problem, seed):
    run(problem, batch=2 if problem.tokens < 100 else 1)


@pytest.mark.parametrize("rank", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_cpu_on_problems_drawn_anew(rank, seed):
    problem = draw_problem(rank)
    print(problem)
    run(problem)


CHUNKED = [
    Problem(70, 2, 16, 39, border="cut", additional_kv=True, operands=(BIAS, MASK)),
    Problem(48, 1, 8, 41, 4, border="wrap", operands=(BIAS, MASK)),
]


@pytest.mark.parametrize("problem", some(CHUNKED, 1, "borders in chunks"), ids=str)
def test_windows_that_come_in_chunks(problem, seed):
    run(problem, compile_=compile_in_chunks)


LARGE = [
    Problem(6000, 1, 8, 9001, border="cut"),
    Problem(5200, 1, 8, 5100, border="wrap"),
    Problem((72, 75), 2, 8, (69, 100), (3, 1), heads_kv=1, additional_kv=True, border=("wrap", "cut")),
]


@pytest.mark.full
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_windows_that_planners_take_in_chunks(problem, seed):
    assert KernelSpec.make(problem).plan.is_chunked
    run(problem)


@pytest.mark.parametrize("dtype", some(["bfloat16", "float16"], 1, "half borders"))
def test_half_precision(dtype, seed):
    run(random.choice(PROBLEMS).replace(dtype=dtype))


@pytest.mark.parametrize("problem", some(PROBLEMS, 2, "simt borders"), ids=str)
def test_simt(problem, seed):
    example = draw(problem, additional=3, lse_has_grad=bool(torch.randint(2, ())))
    check_forward(example, *emulated_forward(example))
    check_backward(example, emulated_backward(example))


TANGENTS = [problem.replace(operands=()) for problem in PROBLEMS]


@pytest.mark.parametrize("problem", some(TANGENTS, 1, "tangents of cpu borders"), ids=str)
def test_cpu_tangents(problem, seed):
    run_tangent(problem)


@pytest.mark.parametrize("problem", some(TANGENTS, 1, "tangents of simt borders"), ids=str)
def test_simt_tangents(problem, seed):
    example = draw(problem, additional=3)
    tangents = draw_tangents(example)
    output, lse, *results = emulated_tangent(example, tangents)
    check_forward(example, output, lse)
    check_tangents(tangents, *results)


def test_simt_on_problems_drawn_anew(seed):
    problem = draw_problem(random.randint(1, 3))
    print(problem)
    example = draw(problem, additional=3)
    check_forward(example, *emulated_forward(example))
    check_backward(example, emulated_backward(example))


MASKED = Problem(21, 1, 8, 8, border="cut", operands=(MASK,))
OTHERS = [MASKED.replace(border=border, kernel_size=size) for border, size in (("cut:2", 8), ("cut", 9), ("wrap", 8))]


@pytest.mark.parametrize("attend", [forward, emulated_forward], ids=["cpu", "simt"])
@pytest.mark.parametrize("problem", [MASKED, *(pytest.param(one, marks=pytest.mark.full) for one in OTHERS)], ids=str)
def test_queries_that_do_not_see_the_only_key_see_nothing(problem, attend, seed):
    """Whatever is near: all keys but one are hidden, another one in each batch entry.

    Windows of eight keys are a chunk on CUDA cores, which would need no mask if they were not cut.
    """
    example = draw(problem, batch=problem.tokens)
    example.others["key_mask"].copy_(torch.eye(problem.tokens, dtype=torch.bool))
    expected, expected_lse = neighborhood_attention(
        *(tensor.double() for tensor in example.inputs), problem.kernel_size, border=problem.border, **example.others
    )
    output, lse = attend(example)
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert lse.isneginf().any()
    check("output", output, expected, "float32")
    check("lse", lse, expected_lse, "float32")
