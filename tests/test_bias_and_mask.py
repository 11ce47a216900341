"""A bias by relative position and a key mask: kernels of CPUs, and what is called, against the reference."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from draws import some
from oracle import check, check_backward, check_forward, draw
from test_cases import FUNCTIONS, problem_of, some_tokens
from test_kernels import run
from torch import nn

import na_compiler
from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, Problem, na2d
from na_compiler.compiler.spec import KernelSpec
from na_compiler.passes import bind, collect
from na_compiler.reference import neighborhood_attention
from na_compiler.runtime.whole import load_whole
from na_compiler.whole import compile_whole

BIAS, MASK = ("relative_position_bias",), ("key_mask",)
OPTIONS = (BIAS, MASK, BIAS + MASK)
CASES = json.loads((Path(__file__).parent / "data" / "na_cases.json").read_text())["cases"]
PROBLEMS = [
    Problem(1, 1, 1, 1),
    Problem(33, 2, 16, 1),
    Problem(45, 2, 24, 12, 5, is_causal=True),
    Problem(101, 2, 16, 6, 2, 7),
    Problem(40, 2, 20, 40, is_causal=True),
    Problem((21, 18), 2, 16, (6, 7), (2, 3)),
    Problem((13, 17), 2, 16, (5, 6), (4, 2), is_causal=(False, True)),
    Problem((14, 14), 6, 32, 7, heads_kv=2, head_dim_v=48),
    Problem((9, 10), 3, 72, (2, 10), (1, 4), (3, 1)),
    Problem((11, 9), 4, 12, 3, heads_kv=2, additional_kv=True),
    Problem((14, 14), 2, 32, 7, dtype="bfloat16"),
    Problem((8, 8, 8), 2, 16, 3, (1, 2, 1), (2, 1, 2), (True, False, False)),
    Problem((5, 12, 6), 4, 17, (5, 2, 3), (1, 1, 2), (1, 5, 2), (False, True, True), 2, 9, additional_kv=True),
]
# Tables that are not spread over the lanes of tiles, with and without chunks of keys.
LARGE = [
    Problem((60, 60), 1, 8, (60, 59), (1, 2)),
    Problem(5200, 1, 8, 4500, is_causal=True),
    Problem((70, 75), 2, 8, (69, 70), (3, 1), heads_kv=1, additional_kv=True),
]
SMALL = Problem((8, 9), 2, 8, (3, 5), dilation=(2, 1))


def named(one):
    """Return what a parameter is called in the name of a test."""
    return str(one) if isinstance(one, Problem) else "+".join(one)


EACH = [(problem, options) for problem in PROBLEMS for options in OPTIONS]


@pytest.mark.parametrize(("problem", "options"), some(EACH, 5, "test_kernels"), ids=named)
def test_kernels(problem, options, seed):
    run(problem.replace(operands=options), batch=2)


@pytest.mark.parametrize("problem", some(LARGE, 1, "test_tables_that_are_not_spread"), ids=str)
def test_tables_that_are_not_spread(problem, seed):
    problem = problem.replace(operands=BIAS + MASK)
    assert not KernelSpec.make(problem).plan.spreads_bias
    run(problem)


@pytest.mark.parametrize(
    ("case", "options"),
    some([(case, options) for case in CASES for options in OPTIONS], 4, "test_case"),
    ids=lambda one: one["id"] if isinstance(one, dict) else "+".join(one),
)
def test_case(case, options, seed):
    """Geometries of the case file, through the operators."""
    dtype = random.choice(["float32", "bfloat16", "float16"])
    problem = problem_of(case, random.choice(case["is_causal"]), dtype, full=False).replace(operands=options)
    example = draw(problem, batch=2 if problem.tokens <= 500 else 1, tokens=some_tokens(problem))
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    batch = len(inputs[0])
    others = dict(example.others)
    if "relative_position_bias" in others:
        others["relative_position_bias"].requires_grad_()
        inputs.append(others["relative_position_bias"])
    parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    output, lse = FUNCTIONS[problem.rank](*inputs[:3], *parameters, return_lse=True, **others)
    check_forward(example, output.detach(), lse.detach())
    grads = list(torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse)))
    if len(inputs) > 3:  # Autograd has summed over the batch.
        example.grads[-1] = example.grads[-1].sum(0)
        example.magnitudes[3] *= batch
    check_backward(example, grads)


@pytest.mark.parametrize("problem", [SMALL, SMALL.replace(additional_kv=True)], ids=str)
def test_a_query_that_sees_nothing(problem, seed):
    """Output 0, lse minus infinity, no gradients, whatever is hidden; not so where all that it sees scores -inf."""
    problem = problem.replace(operands=MASK)
    forward, backward = (na_compiler.compile(problem, direction=d) for d in ("forward", "backward"))
    for additional in (0, 2) if problem.additional_kv else (0,):
        example = draw(problem, batch=2, additional=additional)
        mask = example.others["key_mask"]
        mask[0], mask[1] = False, True
        query, key, value, *more = example.inputs
        key[0], value[0] = 3e38, -3e38
        output, lse = forward(query, key, value, *more, key_mask=mask)
        grads = backward(query, key, value, output, lse, example.grad_output, example.grad_lse, *more, key_mask=mask)
        assert output[1].isfinite().all()
        assert lse[1].isfinite().all()
        sees = bool(additional)
        assert output[0].eq(0).all() != sees
        assert lse[0].eq(-math.inf).all() != sees
        assert grads[1][0].eq(0).all()
        assert grads[2][0].eq(0).all()
        assert grads[0][0].eq(0).all() != sees
    # Visibility is counted: scores of minus infinity are scores.
    query, key, value = torch.ones(1, 8, 9, 2, 8), torch.full((1, 8, 9, 2, 8), -math.inf), torch.ones(1, 8, 9, 2, 8)
    more = [torch.empty(1, 0, 2, 8)] * 2 if problem.additional_kv else []
    mask = torch.ones(1, 8, 9, dtype=torch.bool)
    mask[:, :, 4:] = False
    output, lse = forward(query, key, value, *more, key_mask=mask)
    expected, expected_lse = neighborhood_attention(
        *(t.double() for t in (query, key, value)), problem.kernel_size, dilation=problem.dilation, key_mask=mask
    )
    check("output", output, expected, "float32")
    check("lse", lse, expected_lse, "float32")
    assert lse.isnan().any()
    assert lse.isneginf().any()
    if problem.additional_kv:
        more = torch.full((1, 2, 2, 8), -math.inf), torch.ones(1, 2, 2, 8)
        output, lse = forward(query, key, value, *more, key_mask=torch.zeros_like(mask))
        assert output.isnan().all()
        assert lse.isnan().all()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_biases_that_are_not_finite(number, seed):
    """They are parts of scores: what they do to a softmax, they do here, and hidden keys have none of it."""
    problem = SMALL.replace(operands=BIAS + MASK)
    example = draw(problem, spoiled={"relative_position_bias": number})
    output, lse = na_compiler.compile(problem)(*example.inputs, **example.others)
    check_forward(example, output, lse)
    backward = na_compiler.compile(problem, direction="backward")
    exact = example.output.float().contiguous(), example.lse.float().contiguous()
    grads = backward(*example.inputs, *exact, example.grad_output, example.grad_lse, **example.others)
    check_backward(example, grads)


def test_the_same_bits_whatever_the_number_of_threads(seed):
    """And the right ones, where several tiles share staged keys and begin at different ones of them."""
    problem = Problem((30, 28), 4, 16, 5, heads_kv=2, operands=BIAS + MASK)
    example = draw(problem, batch=2)
    forward, backward = (na_compiler.compile(problem, direction=d) for d in ("forward", "backward"))
    plan = KernelSpec.make(problem).plan
    assert any(axis.tile_box < axis.strip_box < axis.longest for axis in plan)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            output, lse = forward(*example.inputs, **example.others)
            grads = backward(*example.inputs, output, lse, example.grad_output, example.grad_lse, **example.others)
            results.append([output, lse, *grads])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))
    check_forward(example, *results[0][:2])
    check_backward(example, results[0][2:])


def inputs(batch=2):
    """Return query, key, value, a table and a mask of `SMALL`."""
    mask = torch.rand(batch, 8, 9) < 0.7
    return *torch.randn(3, batch, 8, 9, 2, 8), torch.randn(2, 5, 9), mask


def attend(query, key, value, bias, mask):
    """Attend as `SMALL` says."""
    return na2d(query, key, value, (3, 5), dilation=(2, 1), relative_position_bias=bias, key_mask=mask)


def exact(query, key, value, bias, mask):
    """Attend in float64."""
    query, key, value, bias = (tensor.double() for tensor in (query, key, value, bias))
    return neighborhood_attention(
        query, key, value, (3, 5), dilation=(2, 1), relative_position_bias=bias, key_mask=mask
    )[0]


class Layer(nn.Module):
    """A call with both."""

    def forward(self, query, key, value, bias, mask):
        """Attend."""
        return attend(query, key, value, bias, mask)


def test_ways_that_torch_calls(seed, tmp_path):
    """Autograd, torch.func, vmap, compile, export, autocast."""
    given = inputs()
    expected = exact(*given)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.inference_mode():
        torch.testing.assert_close(attend(*given).double(), expected, **close)
    bias = given[3].clone().requires_grad_()
    weight = torch.randn_like(expected)
    (reference,) = torch.autograd.grad((exact(*given[:3], bias, given[4]) * weight).sum(), bias)

    def loss(bias):
        return (attend(*given[:3], bias, given[4]) * weight).sum()

    (own,) = torch.autograd.grad(loss(bias), bias)
    torch.testing.assert_close(own, reference, **close)
    torch.testing.assert_close(torch.func.grad(loss)(given[3]), reference.detach(), **close)
    tables = torch.stack([given[3], -given[3]])
    mapped = torch.vmap(lambda table: attend(*given[:3], table, given[4]))(tables)
    torch.testing.assert_close(mapped[1].double(), exact(*given[:3], -given[3], given[4]), **close)
    masks = torch.stack([given[4], ~given[4]])
    mapped = torch.vmap(lambda mask: attend(*given[:4], mask))(masks)
    torch.testing.assert_close(mapped[1].double(), exact(*given[:4], ~given[4]), **close)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    (through,) = torch.autograd.grad((compiled(*given[:3], bias, given[4]) * weight).sum(), bias)
    torch.testing.assert_close(through, reference, **close)
    torch.export.save(torch.export.export(Layer(), given), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2")
    torch.testing.assert_close(program.module()(*given).double(), expected, **close)
    (site,) = collect(program)
    assert site.problem == SMALL.replace(operands=BIAS + MASK)
    with torch.autocast("cpu", torch.bfloat16):
        half = attend(*given)
    assert half.dtype == torch.bfloat16
    check("output", half, expected, "bfloat16")
    torch.library.opcheck(
        torch.ops.na_compiler.na2d.default, (*given[:3], [3, 5], [1, 1], [2, 1], [0, 0], 0.5),
        {"relative_position_bias": bias, "key_mask": given[4]},
    )  # fmt: skip


def test_tables_and_masks_that_are_not_contiguous(seed):
    """They are copied, also where a contiguous one of the shape was there before; in bound programs as well."""
    query, key, value, bias, mask = inputs()
    expected = exact(query, key, value, bias, mask)
    strided = bias.transpose(0, 2).contiguous().transpose(0, 2), mask.transpose(1, 2).contiguous().transpose(1, 2)
    program = torch.export.export(Layer(), (query, key, value, bias, mask))
    assert bind(program) == 1
    for call in (attend, program.module()):
        for given in ((bias, mask), strided, (bias, strided[1])):
            with torch.inference_mode():
                torch.testing.assert_close(call(query, key, value, *given).double(), expected, rtol=1e-4, atol=1e-5)


def test_whole_models(seed, tmp_path):
    """The table is a weight of the model, and the mask an input."""
    layer = NeighborhoodAttention2D(12, 3, (3, 5), rel_pos_bias=True).eval()
    nn.init.normal_(layer.rpb)
    x, mask = torch.randn(2, 8, 9, 12), torch.rand(2, 8, 9) < 0.6
    with torch.no_grad():
        compile_whole(torch.export.export(layer, (x, mask)), tmp_path / "layer.so")
        result = torch.from_dlpack(load_whole(tmp_path / "layer.so")(x, mask))
        torch.testing.assert_close(result, layer(x, mask), rtol=1e-4, atol=1e-5)


def test_a_table_in_half_precision(seed):
    """Is computed with in float32; its gradient is in its own dtype."""
    query, key, value, bias, mask = inputs()
    bias = bias.half().requires_grad_()
    attend(query.half(), key.half(), value.half(), bias, mask).float().square().sum().backward()
    assert bias.grad.dtype == torch.float16
    exactly = bias.detach().double().requires_grad_()
    exact(query.half(), key.half(), value.half(), exactly, mask).square().sum().backward()
    check("bias", bias.grad, exactly.grad, "bfloat16")


def test_layers(seed):
    """Parameters are named as in NAT and DiNAT, whose checkpoints load strictly; None is no table of zeros."""
    layers = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
    for rank, kind in layers.items():
        layer = kind(12, 3, 3, rel_pos_bias=True)
        checkpoint = {
            "qkv.weight": torch.randn(36, 12), "qkv.bias": torch.randn(36), "rpb": torch.randn(3, *[5] * rank),
            "proj.weight": torch.randn(12, 12), "proj.bias": torch.randn(12),
        }  # fmt: skip
        layer.load_state_dict(checkpoint, strict=True)
        assert "rpb" not in kind(12, 3, 3).state_dict()
    layer = NeighborhoodAttention2D(12, 3, (3, 5), dilation=(2, 1), rel_pos_bias=True)
    assert 0 < layer.rpb.std() < 0.05
    assert "rel_pos_bias=True" in repr(layer)
    nn.init.normal_(layer.rpb)
    x, mask = torch.randn(2, 8, 9, 12), torch.rand(2, 8, 9) < 0.6
    query, key, value = layer.qkv(x).unflatten(-1, (3, 3, 4)).unbind(-3)
    expected, _ = neighborhood_attention(
        query, key, value, (3, 5), dilation=(2, 1), relative_position_bias=layer.rpb, key_mask=mask
    )
    torch.testing.assert_close(layer(x, mask), layer.proj(expected.flatten(-2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_position_bias": torch.zeros(2, 5, 5)}, r"relative_position_bias must have shape .*\(2, 5, 9\)"),
        ({"relative_position_bias": torch.zeros(1, 5, 9)}, r"relative_position_bias must have shape .*\(2, 5, 9\)"),
        ({"relative_position_bias": torch.zeros(2, 5, 9).double()}, "relative_position_bias must be float32, got"),
        ({"key_mask": torch.ones(2, 8, 9)}, "key_mask must be bool, got torch.float32"),
        ({"key_mask": torch.ones(1, 8, 9, dtype=torch.bool)}, r"key_mask must have shape .*\(2, 8, 9\)"),
        ({"key_mask": torch.ones(2, 9, 8, dtype=torch.bool)}, r"key_mask must have shape .*\(2, 8, 9\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key, value, bias, mask = inputs()
    given = {"relative_position_bias": bias, "key_mask": mask, **change}
    with pytest.raises(ValueError, match=message):
        na2d(query, key, value, (3, 5), dilation=(2, 1), **given)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got bool"):
        na2d(query, key, value, (3, 5), key_mask=True)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        na2d(query, key, value, (3, 5), relative_position_bias=[0.0])


def test_others_are_compiled_as_before():
    """A kernel without them has another key and text than one with them; see also the schedules' own tests."""
    keys = {KernelSpec.make(SMALL.replace(operands=options)).key for options in ((), *OPTIONS)}
    assert len(keys) == 4
