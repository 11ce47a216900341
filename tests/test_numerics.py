"""What ``docs/numerics.md`` promises about numbers that are not finite, and about large ones: on the CPU."""

import itertools
import math
import random

import pytest
import torch
from chunked import compile_in_chunks
from oracle import NAMES, check, check_backward, check_forward, draw

import na_compiler
from na_compiler.problem import Problem

NUMBERS = (math.nan, math.inf, -math.inf)
PROBLEMS = [
    Problem((12, 13), 2, 16, 5),
    Problem((9, 11), 4, 8, (3, 5), (1, 2), (2, 1), (False, True), 2, 6, additional_kv=True),
    Problem(37, 1, 3, 7, 3, 3, head_dim_v=5),
    Problem((8, 8), 2, 16, 8, dtype="bfloat16"),
    Problem((5, 6, 7), 2, 8, (3, 2, 5), (2, 1, 3), (1, 2, 1), (True, False, False), dtype="float16"),
]
# Keys come in chunks of which many queries see nothing.
CHUNKED = Problem(90, 2, 16, 41, is_causal=True)


def kernels(problem):
    """Return forward and backward."""
    make = compile_in_chunks if problem is CHUNKED else na_compiler.compile
    return [make(problem, direction=direction) for direction in ("forward", "backward")]


def tensors(problem):
    """Return the names of the tensors that a backward depends on."""
    return (*(NAMES if problem.additional_kv else NAMES[:3]), "grad_output", "grad_lse")


def check_spoiled(problem, spoiled):
    """Check a kernel with numbers that are not finite in one place each."""
    forward, backward = kernels(problem)
    for name, number in spoiled:
        example = draw(problem, spoiled={name: number})
        output, lse = forward(*example.inputs)
        check_forward(example, output, lse, spreads=name == "value")
        exact = example.output.to(output.dtype).contiguous(), example.lse.float().contiguous()
        grads = backward(*example.inputs[:3], *exact, example.grad_output, example.grad_lse, *example.inputs[3:])
        check_backward(example, grads, spreads=name in {"query", "key", "grad_output"})


@pytest.mark.parametrize("problem", [*PROBLEMS, CHUNKED], ids=str)
def test_not_finite_where_softmax_is(problem, seed):
    """One number that is not finite: results are so where they should be, and may be NaN beside hidden ones."""
    check_spoiled(problem, [(name, random.choice(NUMBERS)) for name in tensors(problem)])


@pytest.mark.full
@pytest.mark.parametrize("problem", [*PROBLEMS, CHUNKED], ids=str)
def test_every_tensor_and_number(problem, seed):
    """Each in a few places."""
    check_spoiled(problem, [*itertools.product(tensors(problem), NUMBERS)] * 3)


def test_all_queries_of_a_diverged_layer(seed):
    """Numbers that overflowed in float16 show in every output that dense attention has them in."""
    problem = Problem((14, 14), 2, 32, 7, dtype="float16")
    inputs = [torch.randn(1, 14, 14, 2, 32).mul(1e4).half() for _ in range(3)]
    assert not all(tensor.isfinite().all() for tensor in [tensor * 20 for tensor in inputs])
    query, key, value = (tensor * 20 for tensor in inputs)
    output, lse = na_compiler.compile(problem)(query, key, value)
    assert not output.isfinite().any()
    assert lse.isnan().all()


@pytest.mark.parametrize("problem", [Problem(9, 1, 1, 3), Problem(9, 1, 1, 3, additional_kv=True)], ids=str)
@pytest.mark.parametrize("score", [-math.inf, math.inf, -3e38, 3e38, 1e30])
def test_scores_at_the_end_of_float32(problem, score, seed):
    """Hidden keys have no part in it, be the scores that are seen as low as they may."""
    query, key, value = torch.ones(1, 9, 1, 1), torch.full((1, 9, 1, 1), score), torch.randn(1, 9, 1, 1)
    more = (torch.full((1, 2, 1, 1), score), torch.randn(1, 2, 1, 1)) if problem.additional_kv else ()
    output, lse = na_compiler.compile(problem)(query, key, value, *more, scale=0.5)
    if math.isinf(score):
        assert output.isnan().all()
        assert lse.isnan().all()
        return
    expected = value.unfold(1, 3, 1).sum(-1)[:, [0, *range(7), 6]]
    expected = (expected + more[1].sum()) / 5 if more else expected / 3
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, torch.full_like(lse, score / 2))


@pytest.mark.parametrize("size", [1e8, 1e15, 1e30])
def test_large_scores(size, seed):
    """One key wins each query: its value is the output, and has the whole gradient of it."""
    problem = Problem((6, 7), 1, 8, 3)
    scale = size * random.choice([1.0, -1.0])
    example = draw(problem, scale=scale)
    output, lse = na_compiler.compile(problem)(*example.inputs, scale=scale)
    check_forward(example, output, lse)
    backward = na_compiler.compile(problem, direction="backward")
    grads = backward(*example.inputs, output, lse, example.grad_output, scale=scale)
    check("grad_value", grads[2], example.grads[2], "float32")
    assert all(grad.isfinite().all() for grad in grads)
