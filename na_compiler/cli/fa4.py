"""FA4's block-sparse kernel with the neighborhood as its mask, which ``na-compile bench --suite hopper`` times as well.

FA4 (flash-attn-4, in the CuTe DSL) skips blocks of 128 queries by 128 keys that a mask hides, in the order of memory. A
window of several axes is spread over many such blocks, so tokens are put into an order of tiles, each of 128 tokens:
beforehand, since that is not the kernel's time, so what is timed is less than the whole operation.

Its bf16 kernels for Hopper are timed as they are chosen by default. flash-attn-4 brings nvidia-cutlass-dsl; neither is
a dependency, and without them the competitor is left out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from na_compiler.problem import Problem
from na_compiler.window import window_start

__all__ = ["Tiles", "attention", "in_layout", "in_tiles", "missing", "refusal"]

# Tokens of a block, of queries and of keys.
BLOCK = 128
# Values in FA4 and in the CuTe DSL, which are not installed where types are checked.
Value = Any
_PACKAGES = ("cutlass", "flash_attn")


def missing() -> str | None:
    """Return in a sentence what is not installed; ``None`` if all is."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"no module {' and '.join(absent)} here: pip install flash-attn-4 would bring FA4" if absent else None


def refusal(problem: Problem) -> str | None:
    """Return in a sentence why a problem is not given to FA4; ``None`` if it is."""
    if any(problem.is_causal) or any(dilation != 1 for dilation in problem.dilation) or problem.additional_kv:
        return "the mask is written for windows that are shifted, without dilation, causality and additional keys"
    if not _boxes(problem.layout):
        return f"no tile of {BLOCK} tokens divides the layout {problem.layout}"
    return None


@dataclass(frozen=True)
class Tiles:
    """Boxes of 128 tokens: a block of queries and one of keys.

    Parameters
    ----------
    query, key
        Their extents, which divide the layout.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem) -> Tiles:
        """Choose those with the fewest blocks to visit."""
        boxes = _boxes(problem.layout)
        return min(
            (cls(query, key) for query, key in itertools.product(boxes, boxes)),
            key=lambda tiles: math.prod(
                int(_met(problem, axis, tiles.query[axis], tiles.key[axis])[0].sum()) for axis in range(problem.rank)
            ),
        )

    def blocks(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return for each block of queries which blocks of keys it sees any token of, and which of them as a whole."""
        seen, whole = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
        for axis in range(problem.rank):
            any_, all_ = _met(problem, axis, self.query[axis], self.key[axis])
            seen, whole = (torch.kron(a.int(), b.int()).bool() for a, b in ((seen, any_), (whole, all_)))
        return seen, whole


@functools.cache
def _boxes(layout: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the boxes of 128 tokens that divide a layout."""
    extents = [[extent for extent in range(1, BLOCK + 1) if length % extent == 0] for length in layout]
    return [box for box in itertools.product(*extents) if math.prod(box) == BLOCK]


@functools.cache
def _met(problem: Problem, axis: int, query: int, key: int) -> tuple[Tensor, Tensor]:
    """Return along one axis which tiles see any token of which, and which all."""
    length, size = problem.layout[axis], problem.kernel_size[axis]
    # Windows begin later and later: those of a tile reach from where its first begins to where its last ends.
    first, last = (
        torch.tensor(
            [[window_start(begin + at, length, size, problem.stride[axis])] for begin in range(0, length, query)]
        )
        for at in (0, query - 1)
    )
    keys = torch.arange(0, length, key)
    return (keys < last + size) & (keys + key > first), (keys >= last) & (keys + key <= first + size)


def in_tiles(tensor: Tensor, tile: Sequence[int]) -> Tensor:
    """Return ``[batch, *layout, heads, head_dim]`` with tokens by tiles: ``[batch, tokens, heads, head_dim]``."""
    rank = len(tile)
    for axis, extent in enumerate(tile):
        tensor = tensor.unflatten(1 + 2 * axis, (-1, extent))
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1, 2 * rank + 2)
    return tensor.permute(order).flatten(1, 2 * rank).contiguous()


def in_layout(tensor: Tensor, layout: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Return what `in_tiles` was given."""
    rank = len(tile)
    counts = [length // extent for length, extent in zip(layout, tile, strict=True)]
    order = (0, *(1 + axis + half * rank for axis in range(rank) for half in (0, 1)), 2 * rank + 1, 2 * rank + 2)
    tensor = tensor.unflatten(1, (*counts, *tile)).permute(order)
    for axis in range(rank):
        tensor = tensor.flatten(1 + axis, 2 + axis)
    return tensor


def attention(problem: Problem, tiles: Tiles) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return FA4 with a problem's neighborhood as mask, on tokens in the order of tiles.

    Parameters
    ----------
    problem
        Which `refusal` does not refuse.
    tiles
        In whose order tokens are: keys and values in that of ``tiles.key``.
    """
    from flash_attn.cute.interface import flash_attn_func  # noqa: PLC0415

    seen, whole = tiles.blocks(problem)
    options = {
        "mask_mod": _mask(problem, tiles),
        "block_sparse_tensors": _listed(seen & ~whole, whole),
        "block_sparse_tensors_bwd": _listed((seen & ~whole).T, whole.T),
    }

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = flash_attn_func(query, key, value, **options)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    return attend


def _listed(part: Tensor, whole: Tensor) -> Value:
    """Return FA4's lists: for each row of blocks how many are masked and which, and how many are whole and which."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # noqa: PLC0415

    lists = []
    for blocks in (part, whole):
        order = torch.argsort((~blocks).int(), dim=-1, stable=True).int()
        lists += [blocks.sum(-1).int()[None, None].cuda(), order[None, None].contiguous().cuda()]
    return BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK))


def _mask(problem: Problem, tiles: Tiles) -> Value:
    """Return the mask in the CuTe DSL: whether a query sees a key, by their places in the order of tiles."""
    import cutlass  # noqa: PLC0415
    from cutlass import cute  # noqa: PLC0415
    from flash_attn.cute import utils  # noqa: PLC0415

    def place(token: Value, tile: Sequence[int]) -> list[Value]:
        number, rest = token // BLOCK, token % BLOCK
        found = []
        for length, extent in reversed(list(zip(problem.layout, tile, strict=True))):
            found.append(number % (length // extent) * extent + rest % extent)
            number, rest = number // (length // extent), rest // extent
        return found[::-1]

    def sees(query: Value, key: Value) -> Value:
        seen = None
        axes = zip(place(query, tiles.query), place(key, tiles.key), problem.layout, problem.kernel_size,
                   problem.stride, strict=True)  # fmt: skip
        for own, other, length, size, stride in axes:
            start = window_start(own, length, size, stride, minimum=cutlass.min, maximum=cutlass.max)
            along = (other >= start) & (other < start + size)
            seen = along if seen is None else seen & along
        return seen

    @cute.jit  # type: ignore[untyped-decorator, unused-ignore]
    def mask(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, ARG001
        return utils.scalar_to_ssa(sees(utils.ssa_to_scalar(query), utils.ssa_to_scalar(key)), cutlass.Boolean)

    # FA4 keeps compiled kernels by the mask's source, which is the same for all problems.
    name = hashlib.sha256(repr((str(problem), tiles)).encode()).hexdigest()
    getattr(mask, "__wrapped__", mask).__cute_hash__ = name
    return mask
