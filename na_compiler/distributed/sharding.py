"""How torch's operators take and return a ``DTensor``: which axes may be shared out over a mesh of devices.

Batch entries and heads are computed each for itself, so that tensors may be shards of either, and each device calls the
kernel of what it has. It follows from `na_compiler.operands`, for whatever operands there are. Other shards (of the
layout, of head_dim) are gathered by torch before the operator, as for operators of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from na_compiler.operands import BATCH, GIVEN, INPUT, OUTPUT, Operand
from na_compiler.ops.schema import BACKWARD, FORWARD, TANGENT, Signature

__all__ = ["acceptable_placements", "register"]

# Terms of an operand's shape that one device may have a part of, together.
_BATCH, _HEADS = frozenset({BATCH, GIVEN}), frozenset({"heads", "heads_kv"})
# Terms that stand for an extent for each axis of the layout.
_PER_AXIS = frozenset({"layout", "offsets"})
_SUFFIXES = {"": FORWARD, "_backward": BACKWARD, "_tangent": TANGENT}

# Of each result and of each argument: where it is on a mesh's axis; ``None`` for what is no tensor.
_Rule = tuple[list[Placement | None], list[Placement | None]]


def register() -> None:
    """Tell torch how the operators of whole layouts take shards."""
    for rank in (1, 2, 3):
        for suffix, signature in _SUFFIXES.items():
            operator = getattr(torch.ops.na_compiler, f"na{rank}d{suffix}").default
            register_sharding(operator)(functools.partial(acceptable_placements, rank, signature))


def acceptable_placements(rank: int, signature: Signature, *arguments: object) -> list[_Rule]:
    """Return how an operator's tensors may lie on one axis of a mesh.

    Parameters
    ----------
    rank
        Axes of the layout.
    signature
        Of the operator.
    arguments
        What it is called with; of tensors what torch knows of them: ``shape`` and ``mesh``.

    Returns
    -------
    list
        Placements of the results, and of the arguments: all alike on every device, shards of the batch, and shards of
        the heads, where those that share keys stay together.
    """
    given = signature.by_name(arguments)
    shares = [frozenset[str](), _BATCH]
    if _heads_part_evenly(given):
        shares.append(_HEADS)
    return [_rule(rank, signature, given, terms) for terms in shares]


def _heads_part_evenly(given: dict[str, Any]) -> bool:
    """Whether any shard of heads has just the keys of its queries."""
    heads, heads_kv = given["query"].shape[-2], given["key"].shape[-2]
    return bool(heads == heads_kv or heads_kv % given["query"].mesh.size() == 0)


def _rule(rank: int, signature: Signature, given: dict[str, Any], terms: frozenset[str]) -> _Rule:
    taken = [
        _placement(rank, one, terms) if isinstance(one, Operand) and _is_tensor(one) and given[one.name] is not None
        else None
        for one in signature.operands
    ]  # fmt: skip
    # The gradient of an input that is not there is empty.
    returned = [
        Replicate() if _is_missing(one, given) else _placement(rank, one, terms) for one in signature.results
    ]  # fmt: skip
    return [*returned], [*taken]


def _is_tensor(operand: Operand) -> bool:
    return operand.role in {INPUT, OUTPUT}


def _is_missing(result: Operand, given: dict[str, Any]) -> bool:
    name = result.name.removeprefix("grad_")
    return name != result.name and given.get(name, result) is None


def _placement(rank: int, operand: Operand, terms: frozenset[str]) -> Placement:
    """Return the shard of the axis that one of the terms is; the whole where none is."""
    place = 0
    for term in operand.shape:
        if term in terms:
            return Shard(place)
        place += rank if term in _PER_AXIS else 1
    return Replicate()
