"""Problems of a peer's public test suite (`data/na_cases.json`), through the operators, forward and backward.

Of each rank some geometries, each with one causal combination and one dtype, all of which change with the seed; with
``--full`` all geometries, and every causal combination in float32 as well, with more batch and heads. Where a problem
is large, heads and head_dim are reduced and the reference looks at some queries only; layout, kernel size, stride and
dilation are always those of the case.
"""

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from oracle import check_backward, check_forward, draw

import na_compiler
from na_compiler.compiler.parallel import compile_all
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem

CASES = json.loads((Path(__file__).parent / "data" / "na_cases.json").read_text())["cases"]
FUNCTIONS = {1: na_compiler.na1d, 2: na_compiler.na2d, 3: na_compiler.na3d}
# Multiply-adds of the scores up to which a problem is taken as it is.
WORK = {False: 1 << 30, True: 1 << 34}
# Geometries of each rank that a run draws: a third, so that a few runs see them all.
DRAWN = 14
# Tokens up to which the reference computes every query, and how many it computes beyond.
TOKENS, SOME = 1200, 160


def problem_of(case, is_causal, dtype, full):
    """Return a case's problem, with heads and head_dim reduced to what runs in a short time."""
    group = case["heads"] // case["heads_kv"]
    heads_kv = min(case["heads_kv"], 4 if full else 2)
    group = min(group, 8 if full else 2)
    pairs = math.prod(case["shape"]) * math.prod(case["kernel_size"])
    head_dim = case["head_dim"]
    while heads_kv > 1 and pairs * group * heads_kv * head_dim > WORK[full]:
        heads_kv //= 2
    while head_dim > 8 and pairs * group * heads_kv * head_dim > WORK[full]:
        head_dim //= 2
    return Problem(
        case["shape"], group * heads_kv, head_dim, case["kernel_size"], case["stride"], case["dilation"], is_causal,
        heads_kv, dtype=dtype,
    )  # fmt: skip


def of_rank(rank):
    return (case for case in CASES if len(case["shape"]) == rank)


def pytest_generate_tests(metafunc):
    if "problem" not in metafunc.fixturenames:
        return
    choose = random.Random(int(os.environ["NA_COMPILER_TEST_SEED"]))
    dtypes = ("float32", "float32", "bfloat16", "float16")
    drawn = {case["id"] for rank in FUNCTIONS for case in choose.sample([*of_rank(rank)], DRAWN)}
    problems = {}
    for case in CASES:
        causal, dtype = choose.choice(case["is_causal"]), choose.choice(dtypes)
        problems[problem_of(case, causal, dtype, full=False)] = case["id"]
        if metafunc.config.getoption("--full"):
            problems |= {problem_of(case, c, "float32", full=True): case["id"] for c in case["is_causal"]}
    parameters = [
        pytest.param(problem, id=f"{name} {problem}", marks=() if name in drawn else pytest.mark.full)
        for problem, name in problems.items()
    ]
    metafunc.parametrize("problem", parameters)


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Compile what is going to run, on all cores."""
    here = [item for item in request.session.items if item.path == request.path]
    problems = [item.callspec.params["problem"] for item in here if item.get_closest_marker("skip") is None]
    specs = [KernelSpec.make(p, direction=direction) for p in problems for direction in ("forward", "backward")]
    with compile_all(specs) as libraries:
        yield libraries


def some_tokens(problem):
    """Return queries to look at: corners, and others anywhere; ``None`` for all of them."""
    if problem.tokens <= TOKENS:
        return None
    corners = [0, problem.layout[-1] - 1, problem.tokens - problem.layout[-1], problem.tokens - 1]
    return torch.tensor(sorted({*corners, *random.sample(range(problem.tokens), SOME)}))


def test_case(problem, seed):
    example = draw(problem, batch=2 if problem.tokens <= 500 else 1, tokens=some_tokens(problem))
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    output, lse = FUNCTIONS[problem.rank](*inputs, *parameters, return_lse=True)
    check_forward(example, output.detach(), lse.detach())
    check_backward(example, torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse)))


@pytest.mark.full
def test_case_by_a_kernel_for_every_layout(problem, seed):
    """On a CPU one kernel serves all layouts."""
    example = draw(problem, batch=1, tokens=some_tokens(problem))
    opened = problem.opened()
    forward, backward = (na_compiler.compile(opened, direction=direction) for direction in ("forward", "backward"))
    output, lse = forward(*example.inputs)
    check_forward(example, output, lse)
    check_backward(example, backward(*example.inputs, output, lse, example.grad_output, example.grad_lse))
