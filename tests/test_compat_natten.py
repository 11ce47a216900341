"""The names of NATTEN 0.21 compute what they did there."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import na_compiler
from na_compiler.compat.natten import attention as functions
from na_compiler.compat.natten.attention import attention, merge_attentions
from na_compiler.compat.natten.kinds import KernelSchedule, MemoryUsagePreference
from na_compiler.compat.natten.names import contents
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.schedules.choose import candidates
from na_compiler.target import Target


@pytest.fixture
def natten():
    return contents("0.21.6")


def error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def dense(query, key, value, is_causal=False, scale=None):
    """Attention as it is defined, in float64, and its lse."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def test_every_argument_of_na2d_in_its_place(natten, seed):
    query, key, value = torch.randn(3, 1, 6, 7, 2, 8)
    additional = torch.randn(2, 1, 3, 2, 8)
    tuning = ({}, "cutlass-fna", (8, 8), (8, 8), (8, 8), (8, 8), None, False, True, KernelSchedule.NonPersistent, False)
    arguments = (query, key, value, (3, 4), (1, 2), (2, 1), (False, True), 0.3, *additional)
    output, lse = natten[""]["na2d"](*arguments, *tuning, True)
    expected, expected_lse = neighborhood_attention(*(a.double() if torch.is_tensor(a) else a for a in arguments))
    assert error(output, expected) < 1e-5
    assert error(lse, expected_lse) < 1e-5
    reference, _ = natten["backends"]["na2d_reference"](*arguments, True)
    assert error(reference, expected) < 1e-5
    assert reference.dtype == torch.float32


def test_reference_is_of_its_rank(natten):
    with pytest.raises(ValueError, match="5 dimensions"):
        natten["backends"]["na2d_reference"](*torch.randn(3, 1, 6, 2, 8), 3)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("queries", "keys", "heads_kv", "is_causal"), [(9, 9, 1, True), (5, 12, 4, False)])
def test_attention(seed, monkeypatch, queries, keys, heads_kv, is_causal, return_lse):
    monkeypatch.setattr(functions, "_SCORES", 40)  # Some queries at a time.
    query, key, value = torch.randn(2, queries, 4, 8), *torch.randn(2, 2, keys, heads_kv, 8)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    result = attention(*tensors, is_causal=is_causal, scale=0.4, return_lse=return_lse)
    output, *lse = result if return_lse else (result,)
    expected, expected_lse = dense(*tensors, is_causal, 0.4)
    grad, grad_lse = torch.randn_like(output), torch.randn(2, queries, 4)
    total, expected_total = (output * grad).sum(), (expected * grad).sum()
    assert error(output, expected) < 1e-5
    if return_lse:
        assert error(lse[0], expected_lse) < 1e-5
        total, expected_total = total + (lse[0] * grad_lse).sum(), expected_total + (expected_lse * grad_lse).sum()
    for mine, theirs in zip(
        torch.autograd.grad(total, tensors), torch.autograd.grad(expected_total, tensors), strict=True
    ):
        assert error(mine, theirs) < 1e-5


def test_attention_of_packed_sequences(seed):
    query, key, value = torch.randn(1, 9, 2, 8), *torch.randn(2, 1, 11, 2, 8)
    lengths = torch.tensor([4, 0, 5]), torch.tensor([3, 2, 6])
    output, lse = attention(query, key, value, seqlens_Q=lengths[0], seqlens_KV=lengths[1], return_lse=True)
    ends = [torch.tensor([0, *itertools.accumulate(each.tolist())], dtype=torch.int32) for each in lengths]
    cumulative = {
        "cumulative_seqlen_Q": ends[0],
        "cumulative_seqlen_KV": ends[1],
        "max_seqlen_Q": 5,
        "max_seqlen_KV": 6,
    }
    assert torch.allclose(attention(query, key, value, **cumulative), output, atol=1e-6)
    for queries, keys in ((slice(0, 4), slice(0, 3)), (slice(4, 9), slice(5, 11))):
        expected, expected_lse = dense(query[:, queries], key[:, keys], value[:, keys])
        assert error(output[:, queries], expected) < 1e-5
        assert error(lse[:, queries], expected_lse) < 1e-5
    for wrong in (
        {"seqlens_Q": lengths[0]},
        {**cumulative, "max_seqlen_Q": None},
        {"seqlens_Q": lengths[0] + 1, "seqlens_KV": lengths[1]},
        {"seqlens_Q": lengths[0][1:], "seqlens_KV": lengths[1]},
    ):
        with pytest.raises(ValueError, match="packed sequences"):
            attention(query, key, value, **wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_parts_are_the_whole(seed, dtype):
    query, key, value = torch.randn(2, 6, 3, 8), *torch.randn(2, 2, 12, 3, 8)
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    query, key, value = tensors
    parts = [
        attention(query, key[:, keys], value[:, keys], return_lse=True)
        for keys in (slice(0, 2), slice(2, 7), slice(7, 12))
    ]
    output, lse = merge_attentions([part for part, _ in parts], [part for _, part in parts])
    assert output.dtype == dtype
    expected, expected_lse = dense(*tensors)
    grad, grad_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    mine = torch.autograd.grad((output.double() * grad).sum() + (lse.double() * grad_lse).sum(), tensors)
    theirs = torch.autograd.grad((expected * grad).sum() + (expected_lse * grad_lse).sum(), tensors)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for one, other in zip((output, lse, *mine), (expected, expected_lse, *theirs), strict=True):
        assert error(one.double(), other.double()) < limit


def test_part_in_which_a_query_saw_nothing_has_no_weight(seed):
    outputs = [torch.randn(1, 4, 2, 8).requires_grad_() for _ in range(3)]
    lses = [torch.randn(1, 4, 2) - 1000 for _ in range(3)]
    lses[1][:, 1], lses[2][:, 1] = -math.inf, -math.inf  # One part sees.
    for lse in lses:
        lse[:, 3] = -math.inf  # None does.
    with torch.no_grad():
        outputs[1][:, 1] = math.nan
        outputs[0][:, 3] = math.nan
    lses = [lse.requires_grad_() for lse in lses]
    output, lse = merge_attentions(outputs, lses)
    assert torch.equal(output[:, 1], outputs[0][:, 1])
    assert torch.equal(lse[:, 1], lses[0][:, 1])
    assert (output[:, 3] == 0).all()
    assert (lse[:, 3] == -math.inf).all()
    grads = torch.autograd.grad((output.sum() + lse[:, :3].sum()), [*outputs, *lses])
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[:, 3] == 0).all() for grad in grads)
    assert (grads[1][:, 1] == 0).all()
    assert (grads[0][:, 1] == 1).all()
    lost = [lse.detach().clone() for lse in lses]
    lost[0][0, 0, 0] = math.nan
    assert merge_attentions(outputs, lost)[0][0, 0, 0].isnan().all()


def test_merge_refuses_what_does_not_fit():
    output, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2)
    for outputs, lses in (([output], [lse]), ([output] * 2, [lse]), ([output, output[..., :4]], [lse] * 2)):
        with pytest.raises(ValueError, match="outputs"):
            merge_attentions(outputs, lses)
    with pytest.raises(ValueError, match="without head_dim"):
        merge_attentions([output] * 2, [lse, lse[:, :3]])


def test_parts_by_na2d_merge_with_gradients_of_lse(seed):
    """Registers beside a window, as models split them: the same as additional keys."""
    tensors = [*torch.randn(3, 1, 6, 6, 2, 8), *torch.randn(2, 1, 3, 2, 8)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    query, key, value, *registers = tensors
    window, lse = na_compiler.na2d(query, key, value, 3, return_lse=True)
    others, others_lse = attention(query.flatten(1, 2), *registers, return_lse=True)
    merged, _ = merge_attentions([window.flatten(1, 2), others], [lse.flatten(1, 2), others_lse])
    expected, _ = neighborhood_attention(*(t.double() for t in tensors[:3]), 3, 1, 1, False, None,
                                         *(t.double() for t in registers))  # fmt: skip
    grad = torch.randn_like(merged)
    mine = torch.autograd.grad(merged, tensors, grad)
    theirs = torch.autograd.grad(expected.flatten(1, 2), tensors, grad.double())
    for one, other in zip((merged, *mine), (expected.flatten(1, 2), *theirs), strict=True):
        assert error(one, other) < 1e-5


def test_context_remembers(natten):
    context = natten["context"]
    context["NattenContext"].reset()
    for setter, getter in (
        ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled"),
        ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled"),
        ("allow_flex_compile", "is_flex_compile_allowed"),
        ("allow_flex_compile_backprop", "is_flex_compile_backprop_allowed"),
    ):
        for mode in (True, False):
            context[setter](mode)
            assert context[getter]() is mode
    context["allow_flex_compile"](True, True)
    context["disable_flex_compile"]()
    assert not context["is_flex_compile_allowed"]()
    context["disable_flex_compile_backprop"]()
    assert not context["is_flex_compile_backprop_allowed"]()
    for name in ("strict", "unrestricted", "default"):
        context["set_memory_usage_preference"](name)
        assert context[f"is_memory_usage_{name}"]()
        assert context["get_memory_usage_preference"]() is MemoryUsagePreference[name.title()]
    assert not context["is_memory_usage_strict"]()
    with pytest.raises(ValueError, match="strict"):
        context["set_memory_usage_preference"]("much")


def test_configs_are_the_planners(natten):
    query, key, value = torch.randn(3, 1, 24, 24, 2, 32)
    listed = natten[""]["get_configs_for_flex_fna"](query, key, value)
    planned = candidates(Problem((24, 24), 2, 32, 24), Target.parse("llvm"), "forward")
    assert listed
    assert listed[0][0] == tuple(planned[0].config.tiling.tile[-2:])
    assert all(len(tile) == 2 and all(type(extent) is int for extent in tile) for pair in listed for tile in pair)
    for name, function in natten[""].items():
        if "configs_for" in name and name != "get_configs_for_flex_fna":
            assert function(query, key, value) == []


def test_configs_of_hopper(natten, monkeypatch):
    from na_compiler.compat.natten import configs

    problem, target = Problem((64, 64), 2, 128, 64, dtype="bfloat16"), Target.parse("cuda:sm_90a")
    ((first, schedule), *_) = configs._tiles(problem, target, "forward", "sm90")
    config = candidates(problem, target, "forward")[0].config
    assert first == (tuple(config.query_tile[-2:]), tuple(config.key_tile[-2:]))
    assert isinstance(schedule, KernelSchedule)
    first, *_ = configs._tiles(problem, target, "backward", "sm90")
    keys = candidates(problem, target, "backward")[0].config.keys
    assert first == (tuple(keys.stream_tile[-2:]), tuple(keys.own_tile[-2:]))
    assert configs._tiles(problem.replace(head_dim=20, head_dim_v=20), target, "forward", "sm90") == []


def test_names_without_meaning_say_so(natten):
    for module, name in (("profiler", "profile"), ("backends", "na2d_flex"), ("backends", "cutlass_fmha")):
        with pytest.raises(NotImplementedError, match=rf"natten\.{module}\.{name} has no meaning"):
            natten[module][name](1, 2, backend="x")
    assert natten["backends"]["can_run_cutlass_fna"](1, 2, 3) is False
