"""Problems with borders, for the tests of all that takes one."""

from __future__ import annotations

import random

from na_compiler.problem import Problem

__all__ = ["BIAS", "MASK", "PROBLEMS", "SMALL", "draw_problem"]

BIAS, MASK = "relative_position_bias", "key_mask"
# None is the same as one without a border (`tests/test_borders.py` sees to it), so that each tests one.
PROBLEMS = [
    Problem(61, 2, 32, 9, border="cut"),
    Problem(46, 2, 24, 12, 5, is_causal=True, border="cut"),
    Problem(37, 2, 16, 64, 64, is_causal=True, border="cut", additional_kv=True),
    Problem(20, 2, 16, 50, border="cut", operands=(BIAS, MASK)),
    Problem(54, 2, 12, 44, border="cut:15", heads_kv=1, operands=(MASK,)),
    Problem(101, 2, 16, 6, 2, 7, border="cut", operands=(BIAS,)),
    Problem(43, 1, 8, 9, border="cut:0", operands=(BIAS,)),
    Problem(48, 2, 24, 11, 4, border="wrap", operands=(BIAS, MASK)),
    Problem(60, 2, 16, 12, 5, 4, border="wrap", additional_kv=True),
    Problem((19, 23), 2, 32, (5, 8), border="cut", operands=(BIAS,)),
    Problem((13, 17), 2, 16, (5, 6), (4, 2), is_causal=(False, True), border=("shift", "cut")),
    Problem((12, 16), 4, 16, (5, 7), (2, 1), heads_kv=2, border=("wrap", "cut"), operands=(BIAS, MASK)),
    Problem((14, 10), 2, 8, (7, 9), border=("cut:2", "wrap"), head_dim_v=20, operands=(MASK,)),
    Problem((9, 10), 3, 24, (2, 3), dilation=(3, 2), border=("shift", "wrap"), additional_kv=True),
    Problem((7, 6, 9), 2, 16, (9, 3, 4), (1, 3, 1), (1, 1, 2), border=("cut", "wrap", "cut"), operands=(BIAS,)),
    Problem((5, 8, 6), 2, 17, (5, 4, 3), is_causal=(True, False, False), border=("shift", "cut:1", "wrap")),
]
SMALL = [
    Problem(17, 2, 8, 5, 3, is_causal=True, border="cut"),
    Problem(12, 2, 8, 20, border="cut", operands=(BIAS, MASK)),
    Problem(
        (8, 9),
        2,
        8,
        (3, 4),
        dilation=(1, 2),
        heads_kv=1,
        border=("wrap", "cut:1"),
        additional_kv=True,
        operands=(BIAS,),
    ),
]


def draw_problem(rank):
    """Draw a problem with mixed borders."""
    axes = []
    for _ in range(rank):
        length = random.randint(1, {1: 40, 2: 9, 3: 5}[rank])
        dilation = random.choice((1, 1, 2, 3))
        border = random.choice(("cut", "cut:", "wrap", "shift", "clamp"))
        is_causal = border in {"cut", "shift", "clamp"} and random.random() < 0.3
        kernel_size = random.randint(1, length if border in {"shift", "wrap"} else length + 4)
        strides = [1, kernel_size, random.randint(1, kernel_size)]
        if border == "wrap":
            strides = [stride for stride in range(1, kernel_size + 1) if length % stride == 0]
        stride = 1 if border == "cut:" else random.choice(strides)
        border += str(random.randrange(kernel_size)) if border == "cut:" else ""
        rest = 0 if border == "wrap" else random.randrange(dilation)
        axes.append((length * dilation + rest, kernel_size, stride, dilation, is_causal, border))
    layout, kernel_size, stride, dilation, is_causal, border = zip(*axes, strict=True)
    options = [option for option in (BIAS, MASK) if random.random() < 0.4]
    return Problem(
        layout, 2, random.choice((8, 12, 20)), kernel_size, stride, dilation, is_causal, random.choice((1, 2)),
        additional_kv=random.random() < 0.3, operands=options, border=border,
    )  # fmt: skip
