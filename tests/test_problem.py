"""`na_compiler.problem`: spelling, refusals, FLOPs."""

import json
import random

import pytest
import torch

from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_mask


def test_equal_however_spelled():
    problems = {
        Problem((8, 9), 4, 16, 3),
        Problem([8, 9], 4, 16, [3, 3], stride=[1, 1], dilation=1, is_causal=[False, False], heads_kv=4),
        Problem(torch.Size([8, 9]), 4, 16, (3, 3), is_causal=False, head_dim_v=16, dtype=torch.float32),
        Problem((8, 9), 4, 16, 3, dtype="torch.float32"),
    }
    assert len(problems) == 1


def test_round_trip_through_json():
    problem = Problem((8, 9, 10), 4, 16, (3, 4, 5), (1, 2, 3), (2, 1, 1), (True, False, True), 2, 24, True, "bfloat16")
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def test_str_names_what_is_not_default():
    assert str(Problem(64, 2, 8, 7)) == "na1d layout=64 heads=2 head_dim=8 kernel_size=7 float32"
    problem = Problem((8, 9), 4, 16, 3, 2, 2, (True, False), 2, 24, True, "float16")
    assert str(problem) == (
        "na2d layout=8x9 heads=4 heads_kv=2 head_dim=16 head_dim_v=24 kernel_size=3x3 stride=2x2 dilation=2x2 "
        "is_causal=1x0 additional_kv float16"
    )


def test_flops_count_the_pairs_of_the_mask(seed):
    for _ in range(30):
        rank = random.randint(1, 3)
        layout = [random.randint(1, 9) for _ in range(rank)]
        dilation = [random.randint(1, extent) for extent in layout]
        kernel = [random.randint(1, extent // d) for extent, d in zip(layout, dilation, strict=True)]
        stride = [random.randint(1, k) for k in kernel]
        causal = [random.random() < 0.5 for _ in layout]
        problem = Problem(layout, 4, 8, kernel, stride, dilation, causal, 2, 24)
        pairs = int(neighborhood_mask(problem).sum())
        assert problem.pairs() == pairs
        assert problem.flops(3, additional=7) == 2 * 3 * 4 * (pairs + 7 * problem.tokens) * (8 + 24)
        assert problem.flops(direction="backward") == 2 * 4 * pairs * (3 * 8 + 2 * 24)


def test_unknown_direction():
    with pytest.raises(ValueError, match="direction must be 'forward', 'backward' or 'tangent', got 'sideways'"):
        Problem(8, 1, 8, 3).flops(direction="sideways")


REFUSED = [
    (dict(layout=()), "layout must have 1, 2 or 3 axes"),
    (dict(layout=(2, 2, 2, 2)), "layout must have 1, 2 or 3 axes"),
    (dict(layout=(8, 0)), "layout must have at least one token on each axis, got (8, 0)"),
    (dict(layout="88"), "layout must have 1, 2 or 3 axes"),
    (dict(heads=0), "heads must be at least 1, got 0"),
    (dict(heads=2.5), "heads must be an int, got 2.5"),
    (dict(head_dim=True), "head_dim must be an int, got True"),
    (dict(heads=6, heads_kv=4), "heads must be a multiple of heads_kv, got heads=6 and heads_kv=4; heads_kv=2 would"),
    (dict(head_dim_v=0), "head_dim_v must be at least 1, got 0"),
    (dict(kernel_size=0), "kernel_size must be at least 1, got 0 on axis 0"),
    (
        dict(kernel_size=(3,)),
        "kernel_size must be an int or 2 ints (one per axis of the layout), got (3,); e.g. (3, 3)",
    ),
    (dict(kernel_size="33"), "kernel_size must be an int or 2 ints"),
    (dict(kernel_size=3.0), "kernel_size must be an int or 2 ints"),
    (dict(kernel_size=(3, True)), "kernel_size must be an int or 2 ints"),
    (dict(kernel_size=9), "on axis 0, got kernel_size=9 * dilation=1 = 9; kernel_size=8 would work"),
    (
        dict(dilation=(1, 4)),
        "kernel_size * dilation must be at most the layout's 9 tokens on axis 1, got kernel_size=3 * dilation=4 = 12",
    ),
    (dict(dilation=20), "got kernel_size=3 * dilation=20 = 60; dilation=2 would work"),
    (dict(stride=0), "stride must be at least 1, got 0 on axis 0"),
    (dict(stride=(1, 4)), "stride must be at most kernel_size=3 on axis 1, got 4; stride=3 would work"),
    (dict(dilation=0), "dilation must be at least 1, got 0 on axis 0"),
    (dict(is_causal=1), "is_causal must be a bool or 2 bools (one per axis of the layout), got 1; e.g. (True, True)"),
    (dict(is_causal=(True,)), "is_causal must be a bool or 2 bools"),
    (dict(is_causal=(1, 0)), "is_causal must be a bool or 2 bools"),
    (dict(additional_kv=1), "additional_kv must be True or False, got 1"),
    (dict(dtype="float64"), "dtype must be one of float32, bfloat16, float16, got float64"),
    (dict(dtype=torch.int32), "dtype must be one of float32, bfloat16, float16, got torch.int32"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refused(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Problem(**{"layout": (8, 9), "heads": 4, "head_dim": 16, "kernel_size": 3, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layout": [8], "heads": 1, "head_dim": 8}, "a problem needs kernel_size as well"),
        (
            {"layout": [8], "heads": 1, "head_dim": 8, "kernel_size": 3, "color": 1},
            "unknown fields of a problem: color",
        ),
    ],
)
def test_refused_data(data, message):
    with pytest.raises(ValueError, match=message):
        Problem.from_dict(data)


def tensors(**changes):
    shapes = {"query": (2, 8, 9, 4, 16), "key": (2, 8, 9, 2, 16), "value": (2, 8, 9, 2, 24)}
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return made | changes


def test_of_tensors():
    problem = Problem.of_tensors(**tensors(), kernel_size=3, stride=2)
    assert problem == Problem((8, 9), 4, 16, 3, 2, heads_kv=2, head_dim_v=24)
    extra = {"additional_keys": torch.zeros(2, 5, 2, 16), "additional_values": torch.zeros(2, 5, 2, 24)}
    assert Problem.of_tensors(**tensors(**extra), kernel_size=3).additional_kv


z = torch.zeros
REFUSED_TENSORS = [
    (dict(query=z(2, 8, 4)), "query must have 4, 5 or 6 dimensions"),
    (dict(query=z(1, 2, 3, 4, 5, 6, 7)), "query must have 4, 5 or 6 dimensions"),
    (dict(key=z(2, 8, 2, 16)), "key must have query's batch and layout, (2, 8, 9), as its first dimensions"),
    (dict(key=z(3, 8, 9, 2, 16)), "key must have query's batch and layout, (2, 8, 9)"),
    (dict(value=z(2, 8, 8, 2, 24)), "value must have query's batch and layout, (2, 8, 9)"),
    (dict(key=z(2, 8, 9, 2, 8)), "key must have query's head_dim, 16, got 8"),
    (dict(value=z(2, 8, 9, 4, 24)), "value must have as many heads as key, 2, got 4"),
    (
        dict(key=z(2, 8, 9, 3, 16), value=z(2, 8, 9, 3, 24)),
        "heads must be a multiple of heads_kv, got heads=4 and heads_kv=3",
    ),
    (dict(key=z(2, 8, 9, 2, 16).half()), "key must have query's dtype, torch.float32, got torch.float16"),
    (dict(value=z(2, 8, 9, 2, 24, device="meta")), "value must be on query's device, cpu, got meta"),
    (
        dict(additional_keys=z(2, 5, 2, 16)),
        "additional_keys and additional_values come together, and additional_values is None",
    ),
    (
        dict(additional_values=z(2, 5, 2, 24)),
        "additional_keys and additional_values come together, and additional_keys is None",
    ),
    (
        dict(additional_keys=z(2, 5, 4, 16), additional_values=z(2, 5, 2, 24)),
        "additional_keys must have shape [batch, additional",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 16), additional_values=z(2, 6, 2, 24)),
        "additional_values must have shape [batch, additional",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 16), additional_values=z(2, 5, 2, 24).half()),
        "additional_values must have query's dtype",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_tensors(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Problem.of_tensors(**tensors(**change), kernel_size=3)
    assert message in str(caught.value)
