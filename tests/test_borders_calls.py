"""Borders in functions, layers and exported programs."""

import pytest
import torch
from border_problems import BIAS, PROBLEMS
from draws import some
from oracle import check_backward, check_forward, draw

import na_compiler
from na_compiler import na1d, na2d, na3d
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


@pytest.mark.parametrize("problem", some(PROBLEMS, 2, "functions of borders"), ids=str)
def test_functions(problem, seed):
    """Outputs and gradients, by the short way and by torch's dispatcher."""
    torch._dynamo.reset()  # It compiles a function only so many times.
    example = draw(problem)
    if BIAS in example.others:
        example.grads[-1] = example.grads[-1].sum(0)
    p, others = problem, dict(example.others)
    attend = FUNCTIONS[p.rank]
    inputs = [tensor.clone().requires_grad_() for tensor in example.inputs]
    if BIAS in others:
        others[BIAS] = others[BIAS].clone().requires_grad_()
    wanted = [*inputs, *(others[name] for name in (BIAS,) if name in others)]
    for call in (attend, torch.compile(attend, backend="eager", fullgraph=True)):
        output, lse = call(
            *inputs[:3], p.kernel_size, p.stride, p.dilation, p.is_causal, None, *inputs[3:], border=p.border,
            return_lse=True, **others,
        )  # fmt: skip
        check_forward(example, output.detach(), lse.detach())
        grads = torch.autograd.grad((output, lse), wanted, (example.grad_output, example.grad_lse))
        check_backward(example, grads)


def test_a_window_larger_than_the_layout_is_clamped_with_its_bias(seed):
    query, key, value = torch.randn(3, 1, 5, 9, 2, 8)
    bias = torch.randn(2, 13, 13, requires_grad=True)
    output = na2d(query, key, value, 7, border="clamp", relative_position_bias=bias)
    exact = bias.detach().double().requires_grad_()
    named = {"relative_position_bias": exact, "border": ("clamp", "shift")}
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), 7, **named)
    assert (output - expected).norm() < 1e-5 * expected.norm()
    grad = torch.randn_like(output)
    found, wanted = torch.autograd.grad(output, bias, grad)[0], torch.autograd.grad(expected, exact, grad.double())[0]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert not found[:, :2].any()
    plain = na2d(query, key, value, (5, 7), relative_position_bias=bias[:, 2:11])
    assert torch.equal(output, plain)
    with pytest.raises(ValueError, match=r"relative_position_bias must have shape .*\(2, 13, 13\), got \(2, 9, 13\)"):
        na2d(query, key, value, 7, border="clamp", relative_position_bias=bias[:, 2:11])


def test_layers(seed):
    layer = na_compiler.NeighborhoodAttention2D(16, 2, 7, border=("cut", "clamp"), rel_pos_bias=True)
    assert "border='cut,clamp'" in repr(layer)
    x = torch.randn(2, 9, 5, 16)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    named = {"relative_position_bias": layer.rpb, "border": ("cut", "clamp")}
    expected = layer.proj(na2d(query, key, value, 7, **named).flatten(-2))
    assert torch.equal(layer(x), expected)
    assert "border" not in repr(na_compiler.NeighborhoodAttention2D(16, 2, 7, border="shift"))
    plain = na_compiler.NeighborhoodAttention1D(16, 2, 7, border="wrap")
    assert torch.equal(torch.jit.script(plain)(x[:, :, 0]), plain(x[:, :, 0]))
    traced = torch.jit.trace(plain, x[:, :, 0])
    assert torch.equal(traced(x[:, :, 1]), plain(x[:, :, 1]))


def test_flops_count_what_is_seen():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = torch.randn(3, 1, 12, 2, 8)
    with FlopCounterMode(display=False) as counter:
        na1d(query, key, value, 5, border="cut")
    assert counter.get_total_flops() == Problem(12, 2, 8, 5, border="cut").flops() < Problem(12, 2, 8, 5).flops()


def test_programs_keep_the_border(tmp_path, seed):
    """torch.export, its file, the passes that look for attention, and the kernel that is bound."""
    from na_compiler import passes
    from na_compiler.passes.bind_torch import unbind

    layer = na_compiler.NeighborhoodAttention1D(16, 2, 5, border="cut")
    x = torch.randn(1, 12, 16)
    program = torch.export.export(layer, (x,))
    (site,) = passes.collect(program)
    assert site.problem == Problem(12, 2, 8, 5, border="cut")
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert torch.equal(loaded.module()(x), layer(x))
    passes.bind(loaded, "llvm")
    torch.testing.assert_close(loaded.module()(x), layer(x), rtol=0, atol=0)
    assert unbind(loaded) == 1
    assert torch.equal(loaded.module()(x), layer(x))


def test_calls_that_differ_in_the_border_only(seed):
    tensors = torch.randn(3, 1, 12, 2, 8)
    for border in ("shift", "cut", "wrap"):
        expected, _ = neighborhood_attention(*tensors.double(), 5, border=border)
        assert (na1d(*tensors, 5, border=border) - expected).norm() < 1e-5 * expected.norm()
