"""`na_compiler.integrations.diffusers`: the video decoder computes the same with our processor."""

import pytest
import torch
from torch import nn

import na_compiler
from na_compiler.integrations.diffusers import NeighborhoodAttnProcessor, convert_layers

decoder = pytest.importorskip(
    "diffusers.models.autoencoders.ltx2_diffusion_decoder",
    reason="diffusers 0.42 is not installed: pip install 'na-compiler[diffusers]'",
)
Layer = decoder.LTX2VideoVaeNeighborhoodAttention


@pytest.mark.parametrize(
    "kernel_size", [(3, 7, 7), (3, 5, 5), pytest.param((11, 11, 11), marks=pytest.mark.full)], ids=str
)
def test_a_layer_computes_the_same(kernel_size, seed):
    layer = Layer(128, kernel_size)
    grid = tuple(size + more for size, more in zip(kernel_size, (1, 2, 0), strict=True))
    x = torch.randn(1, *grid, 128, requires_grad=True)
    # What its own processor computes, dense: FlexAttention takes minutes to compile for a CPU.
    query, key, value = layer.project_qkv(x)
    blocks = decoder._neighborhood_block_mask(*grid, kernel_size, x.device)
    count = grid[0] * grid[1] * grid[2]
    index = torch.arange(count)
    mask = blocks.mask_mod(0, 0, index[:, None], index[None])
    tokens_last = [tensor.flatten(1, 3).transpose(1, 2) for tensor in (query, key, value)]
    expected = nn.functional.scaled_dot_product_attention(*tokens_last, attn_mask=mask, scale=1.0)
    expected = layer.to_out[0](expected.transpose(1, 2).flatten(-2).unflatten(1, grid))
    assert convert_layers(nn.ModuleList([layer])) == {"0": "converted"}
    assert layer.build_block_mask(x) is None, "no block mask is made that nobody reads"
    result = layer(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    wanted, *_ = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
    found, *_ = torch.autograd.grad(result.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_convert_reports_layers_and_keeps_processors_of_ones_own(caplog):
    class Own:
        pass

    model = nn.ModuleDict({"near": Layer(64, (3, 5, 5)), "own": Layer(64, (3, 5, 5)), "other": nn.Linear(2, 2)})
    model["own"].set_processor(Own())
    report = {}
    with caplog.at_level("INFO", "na_compiler"):
        na_compiler.convert(model, report=report)
    assert report == {"near": "converted", "own": "it has a processor of its own, Own"}
    assert isinstance(model["near"].processor, NeighborhoodAttnProcessor)
    assert isinstance(model["own"].processor, Own)
    assert "1 layers: converted: near" in caplog.text
