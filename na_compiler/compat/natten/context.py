"""What NATTEN keeps for the process: switches that models set, and ask for.

What they switch has no counterpart here: kernels are planned for each problem, and backwards are deterministic and
take little memory whatever was asked for. The switches remember what was set, so that whoever asks finds it.
"""

from __future__ import annotations

from typing import Any

import torch

from na_compiler.compat.natten.kinds import MemoryUsagePreference

__all__ = ["LATEST", "OLD_017", "has_names"]

_PREFERENCES = {preference.name.lower(): preference for preference in MemoryUsagePreference}
# What each switch is before it is set.
_DEFAULTS: dict[str, Any] = {
    "deterministic": False,
    "kv_parallelism": True,
    "memory": MemoryUsagePreference.Default,
    "flex_compile": False,
    "flex_compile_backprop": False,
    "fused_na": False,
    "use_flex": False,
    "force_flex": False,
    "tf32": True,
    "gemm": True,
    "tiled": True,
    "tune_forward": False,
    "tune_backward": False,
    "thorough_forward": False,
    "thorough_backward": False,
}
_state = dict(_DEFAULTS)


class NattenContext:
    """The switches as a whole."""

    @staticmethod
    def reset() -> None:
        """Set all switches to what they were at first."""
        _state.update(_DEFAULTS)


def set_memory_usage_preference(pref: str = "default") -> None:
    """Set how much memory a backward may take: ``"default"``, ``"strict"`` or ``"unrestricted"``."""
    if pref not in _PREFERENCES:
        raise ValueError(f"pref must be one of {', '.join(_PREFERENCES)}, got {pref!r}")
    _state["memory"] = _PREFERENCES[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    """Return how much memory a backward may take."""
    preference: MemoryUsagePreference = _state["memory"]
    return preference


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Set whether FlexAttention may be compiled, and its backward."""
    _state.update(flex_compile=bool(mode), flex_compile_backprop=bool(backprop))


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Set whether modules attend by fused kernels. Ours always do, where the bias and dropout are none."""
    _state.update(
        fused_na=bool(mode),
        kv_parallelism=bool(kv_parallel),
        use_flex=bool(use_flex_attention or force_flex_attention),
        force_flex=bool(force_flex_attention),
    )


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Set whether tiles are found by trying. Ours are planned."""
    given = {
        "tune_forward": forward_pass,
        "tune_backward": backward_pass,
        "thorough_forward": thorough_mode_forward,
        "thorough_backward": thorough_mode_backward,
    }
    _state.update({name: bool(value) for name, value in given.items() if value is not None})


def disable_autotuner() -> None:
    """Set that tiles are not found by trying."""
    use_autotuner(forward_pass=False, backward_pass=False)


def _setter(switch: str, name: str) -> Any:
    def set_(mode: bool = True) -> None:
        _state[switch] = bool(mode)

    return _named(set_, name, f"Set the switch {switch}; it is remembered, and changes nothing.")


def _fixed(switch: str, name: str, value: bool, result: bool | None = None) -> Any:
    def set_() -> bool | None:
        _state[switch] = value
        return result

    return _named(set_, name, f"Set the switch {switch} to {value}; it is remembered, and changes nothing.")


def _getter(switch: str, name: str, wanted: Any = True) -> Any:
    def get() -> bool:
        return bool(_state[switch] == wanted)

    return _named(get, name, f"Return whether the switch {switch} is {wanted}.")


def _named(function: Any, name: str, text: str) -> Any:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function


# Name of the setter, name of the getter, switch.
_LATEST_SWITCHES = (
    ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled", "deterministic"),
    ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled", "kv_parallelism"),
    ("allow_flex_compile_backprop", "is_flex_compile_backprop_allowed", "flex_compile_backprop"),
)
_OLD_SWITCHES = (
    ("use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled", "tf32"),
    ("use_gemm_na", "is_gemm_na_enabled", "gemm"),
    ("use_tiled_na", "is_tiled_na_enabled", "tiled"),
)


def _switches(switches: tuple[tuple[str, str, str], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setter, getter, switch in switches:
        found[setter], found[getter] = _setter(switch, setter), _getter(switch, getter)
    return found


_MEMORY = {
    "set_memory_usage_preference": set_memory_usage_preference,
    "get_memory_usage_preference": get_memory_usage_preference,
    **{
        f"is_memory_usage_{name}": _getter("memory", f"is_memory_usage_{name}", preference)
        for name, preference in _PREFERENCES.items()
    },
}

# The functions of 0.20 and later.
LATEST: dict[str, Any] = {
    **_switches(_LATEST_SWITCHES),
    **_MEMORY,
    "allow_flex_compile": allow_flex_compile,
    "disable_flex_compile": _fixed("flex_compile", "disable_flex_compile", value=False),
    "disable_flex_compile_backprop": _fixed("flex_compile_backprop", "disable_flex_compile_backprop", value=False),
    "is_flex_compile_allowed": _getter("flex_compile", "is_flex_compile_allowed"),
}


def has_names() -> dict[str, Any]:
    """Return the functions of 0.15 that ask what the kernels can do, and switch between them."""

    def has_cuda() -> bool:
        """Return whether there is a GPU."""
        return torch.cuda.is_available()

    def has_half(device_index: Any = None) -> bool:
        """Return whether kernels take float16 and bfloat16: ours do on every device."""
        return True

    def has_gemm(device_index: Any = None) -> bool:
        """Return whether there are split kernels made of matrix products: there are none here."""
        return False

    found: dict[str, Any] = {"has_cuda": has_cuda, "has_half": has_half, "has_bfloat": has_half}
    found |= dict.fromkeys(("has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm"), has_gemm)
    for name, switch in (("tf32", "tf32"), ("gemm_na", "gemm"), ("tiled_na", "tiled")):
        found[f"enable_{name}"] = _fixed(switch, f"enable_{name}", value=True, result=True)
        found[f"disable_{name}"] = _fixed(switch, f"disable_{name}", value=False, result=False)
    return found


def has_fna(device_index: Any = None) -> bool:
    """Return whether there are fused kernels: ours are, on every device."""
    return True


# The functions of 0.17.
OLD_017: dict[str, Any] = {
    **has_names(),
    **_switches((*_LATEST_SWITCHES[:2], *_OLD_SWITCHES)),
    **_MEMORY,
    "has_fna": has_fna,
    "has_fused_na": has_fna,
    "use_fused_na": use_fused_na,
    "use_fna": use_fused_na,
    "is_fused_na_enabled": _getter("fused_na", "is_fused_na_enabled"),
    "is_fna_enabled": _getter("fused_na", "is_fna_enabled"),
    "use_flex_attention": _fixed("use_flex", "use_flex_attention", value=True),
    "should_use_flex_attention": _getter("use_flex", "should_use_flex_attention"),
    "force_flex_attention": _fixed("force_flex", "force_flex_attention", value=True),
    "should_force_flex_attention": _getter("force_flex", "should_force_flex_attention"),
    "use_autotuner": use_autotuner,
    "disable_autotuner": disable_autotuner,
    "is_autotuner_enabled": lambda: bool(_state["tune_forward"] or _state["tune_backward"]),
    **{
        f"is_autotuner_{name}_for_{way}": _getter(f"{switch}_{way}", f"is_autotuner_{name}_for_{way}")
        for name, switch in (("enabled", "tune"), ("thorough", "thorough"))
        for way in ("forward", "backward")
    },
}
