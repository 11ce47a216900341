"""`na_compiler.schedules.simt.schedule`: its CUDA in the emulator, all directions, against the reference."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from cuda_emulator import ORDERS, Emulator
from draws import some
from oracle import NAMES, check_backward, check_forward, check_tangents, draw, draw_tangents, poisoned, poisoned_parts

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.schedules.simt import planner as simt_planner
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_80")

PROBLEMS = [
    Problem(1, 1, 1, 1),
    Problem(45, 2, 24, 12, 5, is_causal=True),
    Problem(53, 2, 16, 6, 2, 7, dtype="float16"),
    Problem((13, 11), 2, 32, (5, 8), dtype="bfloat16"),
    Problem((9, 10), 2, 7, (5, 6), (4, 2), is_causal=(False, True), head_dim_v=3),
    Problem((7, 8), 4, 32, 5, heads_kv=2, head_dim_v=40, additional_kv=True),
    Problem((4, 5, 6), 4, 17, (2, 3, 2), (1, 2, 1), (2, 1, 3), (True, False, False), 2, 9, additional_kv=True),
    Problem((6, 7), 1, 128, 6, dtype="bfloat16"),
]


def make(problem, direction):
    config = simt_planner.choose(problem, TARGET, direction)
    return KernelSpec(problem, direction, TARGET, config)


def forward(example):
    """Emulate the forward."""
    problem = example.problem
    output, lse = poisoned(torch.empty(example.output.shape, dtype=example.inputs[0].dtype), example.lse.float())
    Emulator.of(make(problem, "forward"))(*example.read, problem.head_dim**-0.5, output, lse, order=ORDERS[0])
    return output, lse


def backward(example, grads=None):
    """Emulate the backward, of the reference's forward."""
    problem = example.problem
    spec = make(problem, "backward")
    spaces = [torch.full(shape, float("nan")) for shape in spec.info.workspace.shapes(len(example.output), 3)]
    grads = poisoned(*example.inputs) if grads is None else grads
    if problem.has("relative_position_bias"):
        grads += poisoned(example.grads[-1].float())
    output, lse = example.output.to(example.inputs[0].dtype).contiguous(), example.lse.float().contiguous()
    Emulator.of(spec)(
        *example.read, output, example.grad_output, lse, example.grad_lse, problem.head_dim**-0.5, *grads, *spaces,
        order=ORDERS[0],
    )  # fmt: skip
    return grads


def tangent(example, tangents, emulator=None):
    """Emulate the forward with its derivative."""
    problem = example.problem
    output, lse = torch.empty(example.output.shape, dtype=example.inputs[0].dtype), example.lse.float()
    results = poisoned(output, lse, output, lse)
    emulator = emulator or Emulator.of(make(problem, "tangent"))
    emulator(*example.inputs, *tangents.inputs, problem.head_dim**-0.5, *results, order=ORDERS[0])
    return results


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward(problem, seed):
    example = draw(problem, batch=2 if problem.rank == 1 else 1, additional=3)
    check_forward(example, *forward(example))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_backward(problem, seed):
    example = draw(problem, additional=3, lse_has_grad=bool(torch.randint(2, ())))
    check_backward(example, backward(example))


def test_what_fills_a_row_up_has_no_part(seed):
    """It is some elements again: 0 times an infinite one would be NaN, where a score of minus infinity is right."""
    problem = Problem(9, 1, 24, 3)
    assert make(problem, "forward").plan.head_dim > 24
    example = draw(problem)
    query, key, value = example.inputs
    query.abs_()
    key[0, 4, 0, 22] = -math.inf
    expected = neighborhood_attention(query.double(), key.double(), value.double(), 3)[0]
    assert expected.isfinite().all()
    assert torch.allclose(forward(example)[0].double(), expected, atol=1e-5)


def test_gradients_of_views_of_one_projection(seed):
    """Are written where they lie, and nothing else is."""
    example = draw(Problem((9, 12), 2, 16, (5, 3), dtype="bfloat16"), batch=2)
    parts, rest = poisoned_parts(*example.inputs)
    check_backward(example, backward(example, parts))
    assert rest.isnan().all()


@pytest.mark.parametrize("problem", some(PROBLEMS, 3, "tangents on CUDA cores"), ids=str)
def test_tangent(problem, seed):
    example = draw(problem, batch=2 if problem.rank == 1 else 1, additional=3)
    tangents = draw_tangents(example)
    output, lse, *results = tangent(example, tangents)
    check_forward(example, output, lse)
    check_tangents(tangents, *results)


def test_tangents_that_are_not_finite(seed):
    """One number that is not finite, in an input or in the tangent of one: hidden ones have no influence."""
    problem = Problem((7, 8), 2, 8, (3, 4), (1, 2), heads_kv=1, additional_kv=True)
    emulator = Emulator.of(make(problem, "tangent"))
    for name in NAMES:
        for of_tangent in (False, True):
            spoiled = {name: random.choice([math.nan, math.inf, -math.inf])}
            example = draw(problem, additional=3, spoiled=None if of_tangent else spoiled)
            tangents = draw_tangents(example, spoiled=spoiled if of_tangent else None)
            output, lse, *results = tangent(example, tangents, emulator)
            check_forward(example, output, lse, repeats=True)
            check_tangents(tangents, *results, repeats=True)


BIAS, MASK = ("relative_position_bias",), ("key_mask",)
OPTIONAL = [problem.replace(operands=options) for problem in PROBLEMS for options in (BIAS, MASK, BIAS + MASK)]


@pytest.mark.parametrize("problem", some(OPTIONAL, 4, "test_bias_and_mask"), ids=str)
def test_bias_and_mask(problem, seed):
    """Forward and backward; queries that see nothing among them."""
    example = draw(problem, batch=2, additional=3)
    check_forward(example, *forward(example))
    check_backward(example, backward(example))


def test_a_query_that_sees_nothing(seed):
    """Output 0, lse minus infinity, no gradients; NaN where all that is seen scores minus infinity."""
    problem = Problem((6, 7), 2, 8, 3, operands=MASK)
    example = draw(problem)
    example.others["key_mask"].fill_(False)
    output, lse = forward(example)
    assert output.eq(0).all()
    assert lse.eq(-math.inf).all()
    example.lse.fill_(-math.inf)
    example.output.zero_()
    assert all(grad.eq(0).all() for grad in backward(example))
    example.others["key_mask"].fill_(True)
    example.inputs[0].fill_(1.0)
    example.inputs[1].fill_(-math.inf)
    assert all(result.isnan().all() for result in forward(example))


@pytest.mark.parametrize(
    "problem",
    [
        Problem((7, 8), 2, 8, (3, 4), (1, 2), heads_kv=1, additional_kv=True),
        *(pytest.param(problem, marks=pytest.mark.full) for problem in PROBLEMS),
    ],
    ids=str,
)
def test_not_finite_where_softmax_is(problem, seed):
    """One number that is not finite: so are the results that depend on it, and no others, hidden ones neither."""
    for name in [*(NAMES if problem.additional_kv else NAMES[:3]), "grad_output", "grad_lse"]:
        example = draw(problem, additional=3, spoiled={name: random.choice([math.nan, math.inf, -math.inf])})
        check_forward(example, *forward(example), repeats=True)
        check_backward(example, backward(example), repeats=True)


def test_scores_at_the_end_of_float32(seed):
    """Hidden keys have no part in it, be the scores that are seen as low as they may."""
    problem = Problem(9, 1, 1, 3)
    for score in (-math.inf, -2.3e38):
        example = draw(problem)
        example.inputs[0].fill_(1.0)
        example.inputs[1].fill_(score)
        output, lse = forward(example)
        if math.isinf(score):
            assert output.isnan().all()
            assert lse.isnan().all()
        else:
            mean = example.inputs[2].unfold(1, 3, 1).mean(-1)[:, [0, *range(7), 6]]
            torch.testing.assert_close(output, mean)
            torch.testing.assert_close(lse, torch.full_like(lse, score))


def test_sees_a_fault(seed):
    """A sum over a row that leaves lanes out is found."""
    problem = PROBLEMS[3]
    spec = make(problem, "forward")
    example = draw(problem)
    faulty = Emulator.of(spec, lambda text: re.sub(r"(__shfl_down_sync\([^;]*), 2, 32\)", r"\1, 1, 32)", text))
    output, lse = poisoned(torch.empty(example.output.shape, dtype=example.inputs[0].dtype), example.lse.float())
    faulty(*example.inputs, problem.head_dim**-0.5, output, lse, order=ORDERS[0])
    with pytest.raises(AssertionError):
        check_forward(example, output, lse)
