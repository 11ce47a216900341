"""`na1d`, `na2d`, `na3d` of a part of a layout: tiles of an image, steps of a stream, gradients, torch's modes."""

import random

import pytest
import torch
from oracle import check

import na_compiler
from na_compiler import Place, Problem, na1d, na2d, na3d
from na_compiler.compiler import serving
from na_compiler.counting import keys_needed
from na_compiler.reference import neighborhood_attention

LAYOUT = (37, 41)
RULE = {"kernel_size": (7, 6), "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}


def tiles(problem, shape):
    """Cut a layout into tiles of queries, with the keys that each needs."""
    found = [()]
    axes = (problem.layout, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    for axis, size in enumerate(shape):
        tokens, *rule = (values[axis] for values in axes)
        cuts = [(first, min(size, tokens - first)) for first in range(0, tokens, size)]
        found = [
            (*tile, (slice(first, first + count), slice(*keys_needed(tokens, first, count, *rule))))
            for tile in found
            for first, count in cuts
        ]
    for tile in found:
        queries, keys = zip(*tile, strict=True)
        place = Place(problem.layout, [one.start for one in queries], [one.start for one in keys])
        yield place, (slice(None), *queries), (slice(None), *keys)


def test_tiles_of_an_image_are_the_whole(seed):
    """With their gradients, each computed by itself: what is too large for memory is no matter of one call."""
    problem = Problem(LAYOUT, 4, 8, **RULE, heads_kv=2)
    query = torch.randn(2, *LAYOUT, 4, 8)
    key, value = torch.randn(2, 2, *LAYOUT, 2, 8)
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    whole = neighborhood_attention(*exact, **RULE)
    grads = torch.randn(whole[0].shape), torch.randn(whole[1].shape)
    expected = torch.autograd.grad(whole, exact, [grad.double() for grad in grads])
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:-1], torch.nan)
    found = [torch.zeros_like(tensor) for tensor in inputs]
    for place, queries, keys in tiles(problem, (16, 20)):
        parts = [inputs[0][queries], inputs[1][keys], inputs[2][keys]]
        results = na2d(*parts, **RULE, place=place, return_lse=True)
        output[queries], lse[queries] = (result.detach() for result in results)
        gradients = torch.autograd.grad(results, inputs, [grad[queries] for grad in grads])
        found = [total + gradient for total, gradient in zip(found, gradients, strict=True)]
    check("output", output, whole[0].detach(), "float32")
    check("lse", lse, whole[1].detach(), "float32")
    for name, total, gradient in zip(("query", "key", "value"), found, expected, strict=True):
        check(f"grad_{name}", total, gradient, "float32")


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(16, 1, 1), (9, 1, 3), (8, 4, 1)])
def test_steps_of_a_stream_are_the_whole(kernel_size, stride, dilation, seed):
    """Queries one by one, or a few, against the last keys only; the length need not be known."""
    tokens, most = 90, 10**6
    query, key, value = torch.randn(3, 1, tokens, 2, 16)
    rule = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": True}
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), **rule)
    if stride > 1:
        # A stream that goes on has no last stride group that is cut short.
        longer = [torch.cat([one, torch.zeros(1, 4, 2, 16)], 1).double() for one in (query, key, value)]
        expected = neighborhood_attention(*longer, **rule)[0][:, :tokens]
    first = 0
    while first < tokens:
        count = min(random.choice((1, 1, 5)), tokens - first)
        low, high = keys_needed(most, first, count, kernel_size, stride, dilation, is_causal=True)
        held = slice(low, min(high, tokens))
        step = na1d(
            query[:, first : first + count], key[:, held], value[:, held], **rule, place=Place(most, first, low)
        )
        check("output", step, expected[:, first : first + count], "float32")
        first += count


def test_a_stream_with_and_without_a_kernel_for_steps(monkeypatch, seed):
    """Forward and backward: up to 16 queries by one, more by the other."""
    problem = Problem(60, 2, 16, 11, is_causal=True)
    query, key, value = torch.randn(3, 1, 60, 2, 16)
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    expected, _ = neighborhood_attention(*exact, 11, is_causal=True)
    steps, find = [], serving.find_kernel
    monkeypatch.setattr(serving, "find_kernel", lambda *a, **named: steps.append(named["steps"]) or find(*a, **named))
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
    for first, count in ((20, 16), (36, 17)):
        low, high = keys_needed(problem.tokens, first, count, 11, is_causal=True)
        held, asked = slice(low, high), slice(first, first + count)
        inputs = [one.clone().requires_grad_() for one in (query[:, asked], key[:, held], value[:, held])]
        output = na1d(*inputs, 11, is_causal=True, place=Place(60, first, low))
        check("output", output.detach(), expected[:, asked].detach(), "float32")
        grad = torch.randn(output.shape)
        wanted = torch.autograd.grad(expected[:, asked], exact, grad.double(), retain_graph=True)
        slices = (asked, held, held)
        for found, gradient, one in zip(torch.autograd.grad(output, inputs, grad), wanted, slices, strict=True):
            check("gradient", found, gradient[:, one], "float32")
    assert steps == [True, True, False, False]


def test_places_of_tensors_of_one_size(seed):
    """Each query by itself against all keys: nothing but the place is another from call to call."""
    query, key, value = torch.randn(3, 1, 23, 2, 8)
    rule = {"kernel_size": 5, "stride": 2, "dilation": 2}
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), **rule)
    steps = [na1d(query[:, at : at + 1], key, value, **rule, place=Place(23, at)) for at in range(23)]
    check("output", torch.cat(steps, 1), expected, "float32")


def test_a_clip_by_frames(seed):
    query, key, value = torch.randn(3, 1, 6, 7, 8, 1, 8)
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), 3)
    for frame in range(6):
        low, high = keys_needed(6, frame, 1, 3)
        held = (slice(None), slice(low, high))
        place = Place((6, 7, 8), (frame, 0, 0), (low, 0, 0))
        output = na3d(query[:, frame : frame + 1], key[held], value[held], 3, place=place)
        check("output", output, expected[:, frame : frame + 1], "float32")


def test_bias_mask_and_additional_keys_go_along(seed):
    layout, place = (14, 15), Place((14, 15), (5, 0), (3, 0))
    query, key, value = torch.randn(3, 1, *layout, 2, 8)
    named = {"relative_position_bias": torch.randn(2, 9, 9), "additional_keys": torch.randn(1, 3, 2, 8)}
    named |= {"additional_values": torch.randn(1, 3, 2, 8)}
    mask = torch.rand(1, *layout) < 0.7
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, *named.values())]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, _ = neighborhood_attention(*exact[:3], 5, key_mask=mask, **dict(zip(named, exact[3:], strict=True)))
    expected = expected[:, 5:9]
    held = slice(3, 11)
    output = na2d(query[:, 5:9], key[:, held], value[:, held], 5, key_mask=mask[:, held], place=place, **named)
    check("output", output.detach(), expected.detach(), "float32")
    grad = torch.randn(output.shape)
    for found, gradient in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        check("gradient", found, gradient, "float32")


def test_by_the_dispatcher_as_without(seed):
    """Under autocast, vmap and torch.compile: the operator of a part."""
    query, key, value = torch.randn(3, 2, 1, 12, 2, 8)
    place = Place(40, 20, 18)

    def attend(query, key, value):
        return na1d(query[:, 2:8], key, value, 5, place=place)

    expected = attend(query[0], key[0], value[0])
    torch.testing.assert_close(torch.vmap(attend)(query, key, value)[0], expected)
    torch.testing.assert_close(
        torch.compile(attend, fullgraph=True, backend="aot_eager")(query[0], key[0], value[0]), expected
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(query[0], key[0], value[0]).dtype == torch.bfloat16
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attend(query[0], key[0], value[0])
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 2 * 8
    torch.library.opcheck(
        torch.ops.na_compiler.na1d_part.default,
        (query[0, :, 2:8], key[0], value[0], [5], [1], [1], [0], 0.5, None, None, None, None, "shift", [40, 20, 18]),
    )


def test_what_there_is_no_derivative_of(seed):
    query, key, value = (tensor.requires_grad_() for tensor in torch.randn(3, 1, 12, 2, 8))

    def attend(query):
        return na1d(query, key, value, 5, place=Place(40, 20, 18))

    with pytest.raises(ValueError, match="key must hold the tokens from 18 up to 34 of the 40"):
        attend(query)
    query = query[:, 2:10].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="has first derivatives backwards, and no others"):
        torch.func.jvp(attend, (query,), (query,))
    (gradient,) = torch.autograd.grad(attend(query).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="and no others"):
        torch.autograd.grad(gradient.sum(), query)


def test_what_a_place_is_refused_with():
    query, key = torch.zeros(1, 4, 2, 8), torch.zeros(1, 8, 2, 8)
    with pytest.raises(TypeError, match=r"place must be a na_compiler.Place, got tuple"):
        na1d(query, key, key, 5, place=(8, 0, 0))
    for border in ("cut", "wrap"):
        with pytest.raises(NotImplementedError, match="Open kernels for CPUs take border='shift' only"):
            na1d(query, key, key, 5, border=border, place=Place(8))
    with pytest.raises(ValueError, match=r"query must have the 2 axes of place\.layout"):
        na1d(query, key, key, 5, place=Place((8, 8)))
    with pytest.raises(ValueError, match="kernel_size=8 would work"):
        na1d(query, key, key, 9, place=Place(8))
    given = (key, key, key, [5], [1], [1], [0], 0.5)
    with pytest.raises(ValueError, match=r"place must be three numbers for each axis of the layout, got \[\]"):
        torch.ops.na_compiler.na1d_part(*given)
    # Windows that are clamped are those of the whole.
    assert na1d(query, key, key, 9, border="clamp", place=Place(8)).shape == query.shape
