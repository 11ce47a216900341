"""Which names each version of NATTEN has, and what they are here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from na_compiler import modules
from na_compiler.compat.natten import attention, checks, configs, context, kinds, layers_015, layers_017, older

__all__ = ["contents"]

_RANKS = (1, 2, 3)
_BACKENDS = ("blackwell-fna", "hopper-fna", "cutlass-fna", "flex-fna")


@functools.cache
def contents(release: str) -> dict[str, dict[str, Any]]:
    """Return the names of each submodule of a release; of the package itself under ``""``."""
    made = {"0.14": _of_014, "0.15": _of_015, "0.17": _of_017}.get(release.rpartition(".")[0], _latest)()
    made[""]["__version__"] = release
    made["version"] = {"__version__": release}
    return made


def _latest() -> dict[str, dict[str, Any]]:
    layers = {f"NeighborhoodAttention{rank}D": getattr(modules, f"NeighborhoodAttention{rank}D") for rank in _RANKS}
    dense = {"attention": attention.attention, "merge_attentions": attention.merge_attentions}
    functional = {**attention.functions, **dense}
    types = kinds.names()
    # Kernels are on every device that there are tensors on.
    has = {"HAS_LIBNATTEN": True}
    environment = {
        **has,
        "_IS_CUDA_AVAILABLE": torch.cuda.is_available(),
        "_TORCH_VERSION": [int(part) for part in torch.__version__.split(".")[:2]],
    }
    return {
        "": {**functional, **layers, **context.LATEST, **configs.functions, **has},
        "_environment": environment,
        "attn_merge": {"merge_attentions": attention.merge_attentions},
        "backends": {**configs.functions, **attention.references, **_backends()},
        "backends.configs": dict(configs.functions),
        "backends.reference": {**attention.references},
        "context": {
            **context.LATEST,
            "MemoryUsagePreference": kinds.MemoryUsagePreference,
            "NattenContext": context.NattenContext,
        },
        "functional": {
            **functional,
            "neighborhood_attention_generic": attention.neighborhood_attention_generic,
        },
        "modules": layers,
        "profiler": {
            name: _meaningless(f"profiler.{name}", "na-compile bench times kernels")
            for name in ("do_profile", "get_args", "profile")
        },
        "types": types,
        "utils": {},
        "utils.checks": dict(checks.LATEST),
        "utils.device": {"get_device_cc": checks.get_device_cc},
        "utils.log": {"get_logger": logging.getLogger},
    }


def _backends() -> dict[str, Any]:
    """Return NATTEN's functions for one backend each: what they are has no counterpart here, what there are has."""
    plain = [
        f"na{rank}d_{name}"
        for rank in _RANKS
        for name in ("cutlass_fna", "cutlass_hopper_fna", "cutlass_blackwell_fna", "flex")
    ]
    dense = [f"{name}_fmha" for name in ("cutlass", "cutlass_hopper", "cutlass_blackwell", "flex")]
    asked = [f"can_run_{name}" for name in (*dense, "flex_attention")]
    asked += [f"can_run_{name}_fna" for name in ("cutlass", "cutlass_hopper", "cutlass_blackwell")]
    found: dict[str, Any] = {
        name: _meaningless(f"backends.{name}", "natten.na1d, na2d and na3d take the kernel made for the problem")
        for name in plain
    }
    found |= {name: _meaningless(f"backends.{name}", "natten.attention takes torch's") for name in dense}
    found |= dict.fromkeys(asked, _cannot_run)
    return {**found, "choose_backend": _choose_backend, "get_compatible_backends": _compatible}


def _cannot_run(*arguments: Any, raise_error: bool = False, **others: Any) -> bool:
    """Return False: none of NATTEN's kernels are here."""
    if raise_error:
        raise RuntimeError("none of NATTEN's kernels are here: natten is na_compiler, which makes its own")
    return False


def _choose_backend(*arguments: Any, **others: Any) -> str:
    """Return the name of what computes, which no call minds."""
    return "na_compiler"


def _compatible(*arguments: Any, **others: Any) -> Sequence[str]:
    """Return the names of what can compute, which no call minds."""
    return ["na_compiler"]


def _meaningless(name: str, instead: str) -> Callable[..., Any]:
    """Make a function whose name callers import, and that has no meaning here."""

    def refuse(*arguments: Any, **others: Any) -> Any:
        raise NotImplementedError(f"natten.{name} has no meaning in na_compiler: {instead}")

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse


# ---- What there was --------------------------------------------------------------------------------------------------


def _layers(module: Any, ranks: Sequence[int]) -> dict[str, Any]:
    return {f"NeighborhoodAttention{rank}D": getattr(module, f"NeighborhoodAttention{rank}D") for rank in ranks}


def _by_rank(prefix: str, layers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the submodules of one layer each."""
    return {f"{prefix}{name[-2:].lower()}": {name: layer} for name, layer in layers.items()}


def _of_014() -> dict[str, dict[str, Any]]:
    layers = _layers(layers_015, (1, 2))
    return {"": dict(layers), "functional": dict(older.OLD_014), **_by_rank("natten", layers)}


def _of_015() -> dict[str, dict[str, Any]]:
    layers, asked = _layers(layers_015, _RANKS), context.has_names()
    functional = {**older.OLD_015, **asked}
    return {"": {**layers, **asked}, "functional": functional, **_by_rank("natten", layers)}


def _of_017() -> dict[str, dict[str, Any]]:
    layers = _layers(layers_017, _RANKS)
    top = {name: value for name, value in context.OLD_017.items() if not name.startswith("should_")}
    return {
        "": {**layers, **top},
        "context": {
            **context.OLD_017,
            "MemoryUsagePreference": kinds.MemoryUsagePreference,
            "NattenContext": context.NattenContext,
        },
        "functional": dict(older.OLD_017),
        "types": kinds.names(),
        "utils": dict(checks.OLD),
        "utils.checks": dict(checks.OLD),
        **_by_rank("na", layers),
        **_by_rank("natten", layers),
    }
