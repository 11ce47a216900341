"""`na_compiler.ops.call`: the short way around torch's dispatcher is taken where it gives the same, nowhere else."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from na_compiler import na2d
from na_compiler.ops import call, plain
from na_compiler.reference import neighborhood_attention

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
KEYS = torch._C.DispatchKey


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_keys_of_ordinary_tensors(device, mode):
    """A fake tensor has the keys of one of the device, and two of its own."""
    with mode(), FakeTensorMode():
        keys = torch._C._dispatch_keys(torch.empty(2, device=device)).raw_repr()
    own = [
        torch._C.DispatchKeySet.from_raw_repr(keys_of).add(KEYS.Python).add(KEYS.PythonTLSSnapshot)
        for keys_of in plain.PLAIN
    ]
    assert keys in [one.raw_repr() for one in own]


@pytest.fixture
def dispatched(monkeypatch):
    """How often the operator was called, rather than what it does."""
    calls = []
    operator = call.OPERATORS[2]
    monkeypatch.setitem(call.OPERATORS, 2, lambda *arguments: calls.append(None) or operator(*arguments))
    return calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [False, True])
def test_plain_tensors_take_the_short_way(mode, wanted, dispatched, seed):
    query = torch.randn(1, 6, 9, 2, 8, requires_grad=wanted)
    with mode():
        output = na2d(query, query, query, 3)
        assert output.requires_grad == (wanted and mode is torch.enable_grad)
        assert output.is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode():
        na2d(*torch.nn.ParameterList([query, query, query]), 3)
    assert not dispatched


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        lambda: torch.utils.flop_counter.FlopCounterMode(display=False),
        lambda: torch.device("cpu"),
        torch.autograd.forward_ad.dual_level,
    ],
)
def test_what_looks_at_operators_sees_them(around, dispatched, seed):
    query = torch.randn(1, 6, 9, 2, 8)
    for mode in MODES:
        with mode(), around():
            na2d(query, query, query, 3)
    assert len(dispatched) == len(MODES)


class TestGradients:
    """By the short way, as torch's own operators."""

    def test_inputs_that_were_changed_in_between(self, seed):
        query, key = torch.randn(2, 1, 6, 9, 2, 8).unbind()
        query.requires_grad_()
        output = na2d(query, key, key, 3)
        key.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_outputs_that_were_changed_in_between(self, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        output = na2d(query, query, query, 3)
        output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_twice_and_once_too_often(self, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        loss = na2d(query, query, query, 3).square().sum()
        loss.backward(retain_graph=True)
        once = query.grad.clone()
        loss.backward()
        assert torch.equal(query.grad, 2 * once)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()

    def test_saved_tensors_go_through_hooks(self, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: packed.append(x.shape) or x.double(), torch.Tensor.float
        ):
            output = na2d(query, 2 * query, query.sin(), 3)
        assert torch.Size([1, 6, 9, 2]) in packed  # lse
        (grad,) = torch.autograd.grad(output.square().sum(), query)
        exact = query.detach().double().requires_grad_()
        expected = neighborhood_attention(exact, 2 * exact, exact.sin(), 3)[0].square().sum()
        (reference,) = torch.autograd.grad(expected, exact)
        assert (grad - reference).norm() < 1e-5 * reference.norm()

    def test_inputs_that_lie_elsewhere_now(self, seed):
        """`data` may be set in between, as optimisers do that keep parameters in one buffer."""
        tensors = [torch.randn(1, 6, 9, 2, 8, requires_grad=True) for _ in range(3)]
        loss = na2d(*tensors, 3).square().sum()
        expected = torch.autograd.grad(loss, tensors, retain_graph=True)
        tensors[0].data = tensors[0].detach().movedim(1, 2).contiguous().movedim(2, 1)
        tensors[1].data = tensors[1].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        for given, other in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
            torch.testing.assert_close(given, other)

    @pytest.mark.parametrize("with_lse", [False, True])
    def test_nothing_is_made_for_a_gradient_that_nobody_asked_for(self, with_lse, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        output, lse = na2d(query, query, query, 3, return_lse=True)
        grads = [torch.ones_like(output), torch.ones_like(lse)] if with_lse else [torch.ones_like(output)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad([output, lse][: len(grads)], query, grads)
        names = {event.name for event in profile.events()}
        assert names & {"aten::zeros_like", "aten::zero_", "aten::fill_", "aten::zeros"} == set()

    def test_activation_checkpointing(self, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        plain = torch.autograd.grad(na2d(query, query, query, 3).square().sum(), query)[0]
        for reentrant in (False, True):
            output = torch.utils.checkpoint.checkpoint(lambda q: na2d(q, q, q, 3), query, use_reentrant=reentrant)
            query.grad = None
            output.square().sum().backward()
            assert torch.equal(query.grad, plain)

    def test_tensors_of_inference_mode_are_refused_in_training(self, seed):
        with torch.inference_mode():
            key = torch.randn(1, 6, 9, 2, 8)
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            na2d(query, key, key, 3)

    def test_an_error_of_a_backward_is_raised(self, monkeypatch, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        output = na2d(query, query, query, 3)

        def fail(*arguments):
            raise RuntimeError("no kernel")

        monkeypatch.setattr(call, "find", fail)
        monkeypatch.setattr(call, "_backwards", {})
        with pytest.raises(RuntimeError, match="no kernel"):
            output.sum().backward()
        with contextlib.suppress(RuntimeError):
            output.sum().backward()
