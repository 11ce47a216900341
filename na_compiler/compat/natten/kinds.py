"""The types of NATTEN's signatures: ``natten.types``."""

from __future__ import annotations

from enum import Enum
from typing import Any

__all__ = ["KernelSchedule", "MemoryUsagePreference", "names"]

_INTS = {1: tuple[int], 2: tuple[int, int], 3: tuple[int, int, int]}
_FLAGS = {1: tuple[bool], 2: tuple[bool, bool], 3: tuple[bool, bool, bool]}


class KernelSchedule(Enum):
    """How a Hopper kernel's warps share the work."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


class MemoryUsagePreference(Enum):
    """How much memory a backward may take beside its results."""

    Default = 0
    Strict = 1
    Unrestricted = 2


def names() -> dict[str, object]:
    """Return the types by the names that callers import."""
    found: dict[str, object] = {"KernelSchedule": KernelSchedule, "NoneType": type(None)}
    for rank, ints in _INTS.items():
        found[f"Dimension{rank}DType"], found[f"Dimension{rank}DTypeOrDed"] = ints, int | ints
    for rank, flags in _FLAGS.items():
        found[f"CausalArg{rank}DType"], found[f"CausalArg{rank}DTypeOrDed"] = flags, bool | flags
    any_ints, any_flags = _INTS[1] | _INTS[2] | _INTS[3], _FLAGS[1] | _FLAGS[2] | _FLAGS[3]
    tiles = (
        tuple[tuple[int], tuple[int]]
        | tuple[tuple[int, int], tuple[int, int]]
        | tuple[tuple[int, int, int], tuple[int, int, int]]
    )
    found |= {
        "CausalArgType": any_flags,
        "CausalArgTypeOrDed": bool | any_flags,
        "DimensionType": any_ints,
        "DimensionTypeOrDed": int | any_ints,
        "QKTileShapeType": tiles,
    }
    for kind in ("Cutlass", "CutlassBlackwell", "CutlassHopper", "Flex"):
        for direction in ("Forward", "Backward"):
            found[f"{kind}Fna{direction}ConfigType"] = tiles
            found[f"{kind}Fmha{direction}ConfigType"] = tuple[int, int]
    found["CutlassHopperFnaForwardConfigType"] = tuple[Any, KernelSchedule]
    found["CutlassHopperFmhaForwardConfigType"] = tuple[tuple[int, int], KernelSchedule]
    found["FmhaForwardConfigType"] = tuple[int, int]
    return found
