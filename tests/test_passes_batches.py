"""Masks of a batch of any size: those that are the same for all of it become ours, and the others stay."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch_graphs import close

from na_compiler import passes

TOKENS, WINDOW = 40, 7


def window(length):
    index = torch.arange(length)
    distance = index[:, None] - index
    return (distance >= 0) & (distance < WINDOW)


def packed(batch, length):
    """As transformers makes masks of positions that may be of several sequences, of each entry of the batch."""
    positions = torch.arange(length)[None].expand(batch, -1)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    entry, index = torch.arange(batch)[:, None, None, None], torch.arange(length)
    query, key = index[None, None, :, None], index[None, None, None, :]
    return window(length) & (sequence[entry, query] == sequence[entry, key])


def of_some(batch, length):
    """Of whole windows for the first entries of the batch."""
    return window(length) & (torch.arange(batch)[:, None, None, None] < 3)


# What the mask is, of the sizes of batch and length, and what is said of it.
KINDS = {
    "packed": (packed, None),
    "expanded": (lambda batch, length: window(length)[None, None].expand(batch, 1, -1, -1), None),
    "ones": (lambda batch, length: window(length) & torch.ones(batch, 1, 1, 1, dtype=torch.bool), None),
    "of some": (of_some, "computes with numbers along a dimension"),
    "moved": (
        lambda batch, length: window(length) & window(length)[torch.arange(batch)][:, None, None],
        "picks by numbers of another dimension",
    ),
    "summed": (
        lambda batch, length: window(length) & (torch.ones(batch, 1, 1, 1).cumsum(0) < 3), "differs along a dimension",
    ),
    "products": (
        lambda batch, length: window(length) & (torch.full((batch, 1, 1, 1), 2.0).cumprod(dim=0) < 3),
        "differs along a dimension",
    ),
    "a triangle": (
        lambda batch, length: window(length) & torch.ones(batch, length).tril(9).bool()[:, None, None],
        "differs along a dimension",
    ),
}  # fmt: skip


class Batches(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        mask = self.make(x.shape[0], x.shape[2])
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", ["fixed", "any"])
def test_masks_of_any_batch(length, kind, seed, caplog):
    make, said = KINDS[kind]
    model, x = Batches(make), torch.randn(2, 2, TOKENS, 8)
    dims = {0: Dim("batch", max=8)} | ({2: Dim("length", min=12, max=255)} if length == "any" else {})
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    with caplog.at_level("INFO", "na_compiler"):
        passes.canonicalise(program)
    assert len(passes.collect(program)) == (said is None)
    assert said is None or said in caplog.text
    for batch in (1, 5):
        x = torch.randn(batch, 2, TOKENS, 8)
        result, expected = program.module()(x), model(x)
        seen = expected.isfinite()  # What sees nothing is not a number, in both.
        assert torch.equal(seen, result.isfinite())
        close(result[seen], expected[seen])


def test_padding_is_said_to_be_an_input(seed, caplog):
    class Padded(nn.Module):
        def forward(self, x, keys):
            entry, index = torch.arange(x.shape[0])[:, None, None, None], torch.arange(x.shape[2])
            mask = window(x.shape[2]) & keys[entry, index[None, None, None]]
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    inputs = torch.randn(2, 2, TOKENS, 8), torch.ones(2, TOKENS, dtype=torch.bool)
    batch, length = Dim("batch", max=8), Dim("length", min=12, max=255)
    shapes = ({0: batch, 2: length}, {0: batch, 1: length})
    for dims in (shapes, tuple({0: batch} for _ in inputs), None):
        program = torch.export.export(Padded(), inputs, dynamic_shapes=dims)
        caplog.clear()
        with caplog.at_level("INFO", "na_compiler"):
            assert passes.canonicalise(program) == 0
        assert "its mask depends on the input keys" in caplog.text
