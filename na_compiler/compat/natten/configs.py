"""What kernels may be made of, as NATTEN lists it: ``get_configs_for_*``.

Each function lists what our planner has for tensors, the best first, in NATTEN's types: tiles of queries and of keys.
NATTEN's kernels are of other kinds than ours; the one nearest in kind answers: those for Hopper list ours for Hopper,
those of Flex ours for CPUs. There are none for Blackwell, none of Cutlass (our other CUDA kernels have other choices),
and none for dense attention, which is torch's. Nothing needs to be chosen: ``na1d``, ``na2d``, ``na3d`` take the best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from na_compiler.compat.natten.kinds import KernelSchedule
from na_compiler.problem import Problem
from na_compiler.schedules.choose import candidates
from na_compiler.target import Target, target_of

__all__ = ["functions"]

# NATTEN's kernels, by the kind of machine and the family of ours that answers for them.
_KINDS = {
    "cutlass_blackwell": ("cuda", ""),
    "cutlass_hopper": ("cuda", "sm90"),
    "cutlass": ("cuda", ""),
    "flex": ("cpu", "cpu"),
}


def _tiles(problem: Problem, target: Target, direction: str, family: str) -> list[Any]:
    """Return pairs of tiles, of queries and of keys; of Hopper's forward with how its warps share the work."""
    try:
        found = candidates(problem, target, direction)
    except NotImplementedError:
        return []
    tiles: list[Any] = []
    for candidate in found:
        config: Any = candidate.config
        if config.family != family:
            continue
        if family == "sm90" and direction == "backward":
            # Of its two kernels the one that NATTEN's is like: a block owns keys, and queries stream by.
            tiles.append(_short(problem, (config.keys.stream_tile, config.keys.own_tile)))
        elif family == "sm90":
            shared = KernelSchedule.NonPersistent
            if config.persistent:
                shared = KernelSchedule.WarpSpecializedCooperative
            if config.pingpong:
                shared = KernelSchedule.WarpSpecializedPingpong
            tiles.append((_short(problem, (config.query_tile, config.key_tile)), shared))
        else:
            box = tuple(axis.tile_box for axis in config.plan(problem))
            tiles.append(_short(problem, (config.tiling.tile, box)))
    return list(dict.fromkeys(tiles))


def _short(problem: Problem, pair: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(extent) for extent in tile[-problem.rank :]) for tile in pair)


def _function(kind: str, direction: str, operator: str) -> Callable[..., list[Any]]:
    device, family = _KINDS[kind]

    def configs(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        torch_compile: bool = False,
    ) -> list[Any]:
        if operator == "fmha" or not family or query.device.type != device:
            return []
        # What it will be called with is not said: the planner is asked for windows as large as the layout.
        problem = Problem.of_tensors(query, key, value, tuple(query.shape[1:-2]))
        return _tiles(problem, target_of(query.device), direction, family)

    configs.__name__ = configs.__qualname__ = _name(kind, direction, operator)
    configs.__doc__ = f"List tiles of the {direction}, the best first: see `na_compiler.compat.natten.configs`."
    return configs


def _name(kind: str, direction: str, operator: str) -> str:
    return f"get_{'bwd_' if direction == 'backward' else ''}configs_for_{kind}_{operator}"


# Flex' backward has no list.
functions = {
    _name(kind, direction, operator): _function(kind, direction, operator)
    for kind in _KINDS
    for direction in ("forward", "backward")
    for operator in ("fna", "fmha")
    if (kind, direction) != ("flex", "backward")
}
