"""Other ways to compute neighborhood attention in torch, to measure against: each a function of no arguments.

All take what suits them best: heads-first contiguous copies, masks and tables made beforehand and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_mask
from na_compiler.window import group_length, window_start

__all__ = ["Inputs", "dense_sdpa", "flex_attention", "gather", "masked_sdpa", "masked_sdpa_backward"]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one problem, heads last and heads first."""

    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> Inputs:
        """Draw inputs for a batch of one."""
        generator = torch.Generator().manual_seed(seed)
        shape = (3, 1, *problem.layout, problem.heads, problem.head_dim)
        query, key, value = torch.randn(shape, generator=generator).to(getattr(torch, problem.dtype))
        return cls(problem, query, key, value)

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return contiguous copies, ``[batch, heads, tokens, head_dim]``."""
        tensors = (self.query, self.key, self.value)
        query, key, value = (tensor.flatten(1, -3).transpose(1, 2).contiguous() for tensor in tensors)
        return query, key, value

    def heads_last(self, output: Tensor) -> Tensor:
        """Return an output of heads-first tensors in the layout of ours."""
        return output.transpose(1, 2).reshape(-1, *self.problem.layout, *output.shape[1::2])


def masked_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    """Torch's attention with the neighborhood as a boolean mask."""
    query, key, value = inputs.heads_first()
    mask = neighborhood_mask(inputs.problem)
    return lambda: inputs.heads_last(scaled_dot_product_attention(query, key, value, attn_mask=mask))


def dense_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    """Torch's attention without a mask: the same problem only where the window is the whole layout."""
    query, key, value = inputs.heads_first()
    return lambda: inputs.heads_last(scaled_dot_product_attention(query, key, value))


def masked_sdpa_backward(inputs: Inputs, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Differentiate `masked_sdpa`; `dense_sdpa` where nothing is masked."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs.heads_first())
    mask = neighborhood_mask(inputs.problem)
    output = scaled_dot_product_attention(query, key, value, attn_mask=None if bool(mask.all()) else mask)
    first = grad.flatten(1, -3).transpose(1, 2).contiguous()

    def run() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(output, (query, key, value), first, retain_graph=True)
        return tuple(map(inputs.heads_last, gradients))

    return run


def flex_attention(inputs: Inputs, compiled: Callable[..., Tensor] | None = None) -> Callable[[], Tensor]:
    """Torch's compiled FlexAttention with the neighborhood as a block mask.

    Parameters
    ----------
    inputs
        Of the problem.
    compiled
        What torch made of it, for several problems. Default: compiled for this one.

    Raises
    ------
    RuntimeError
        Where torch cannot compile it.
    """
    from torch.nn.attention import flex_attention as flex  # noqa: PLC0415

    problem = inputs.problem
    if any(extent != 1 for extent in (*problem.stride, *problem.dilation)) or any(problem.is_causal):
        raise RuntimeError("written for windows without stride, dilation and causality")

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        seen = None
        for extent, kernel in zip(problem.layout[::-1], problem.kernel_size[::-1], strict=True):
            start = (query % extent - kernel // 2).clamp(0, extent - kernel)
            place = key % extent
            along = (place >= start) & (place < start + kernel)
            seen = along if seen is None else seen & along
            query, key = query // extent, key // extent
        assert seen is not None
        return seen

    query, key, value = inputs.heads_first()
    blocks = flex.create_block_mask(sees, None, None, problem.tokens, problem.tokens, device="cpu")
    attend = torch.compile(flex.flex_attention) if compiled is None else compiled
    return lambda: inputs.heads_last(attend(query, key, value, block_mask=blocks))


def gather(inputs: Inputs) -> Callable[[], Tensor]:
    """Gather each query's keys and values by a table, and attend with plain torch operators."""
    problem = inputs.problem
    table = torch.zeros(1, 1, dtype=torch.long)
    axes = zip(problem.layout, problem.kernel_size, problem.stride, problem.dilation, strict=True)
    for extent, kernel, stride, dilation in axes:
        keys = [
            [window_start(x // dilation, group_length(extent, dilation, x % dilation), kernel, stride) + k
             for k in range(kernel)] for x in range(extent)
        ]  # fmt: skip
        groups = torch.arange(extent)[:, None] % dilation
        along = torch.tensor(keys) * dilation + groups
        table = (table[:, None, :, None] * extent + along[None, :, None, :]).flatten(2).flatten(0, 1)
    query, key, value = (tensor.flatten(1, -3) for tensor in (inputs.query, inputs.key, inputs.value))
    scale = problem.head_dim**-0.5
    at_once = max(1, 2**22 // (table.shape[1] * problem.heads * problem.head_dim))

    def run() -> Tensor:
        parts = []
        for first in range(0, problem.tokens, at_once):
            rows = table[first : first + at_once]
            scores = torch.einsum("bnhd,bnkhd->bnhk", query[:, first : first + at_once], key[:, rows]) * scale
            parts.append(torch.einsum("bnhk,bnkhd->bnhd", scores.softmax(-1), value[:, rows]))
        return torch.cat(parts, 1).reshape(1, *problem.layout, *query.shape[2:])

    return run
