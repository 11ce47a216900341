"""The functions of 0.14 to 0.17: split operators, and fused ones whose fifth argument is the dilation.

Names are those of NATTEN's versions, and so are the arguments and their order; what is computed is in
`na_compiler.compat.natten.split`. Tensors of the split operators have their heads first, of the fused ones last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from na_compiler import functional
from na_compiler.compat.natten.split import Flags, Ints, av, qk

__all__ = ["OLD_014", "OLD_015", "OLD_017", "fused"]

_FUSED: dict[int, Callable[..., Any]] = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Flags | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Attend, heads last, as 0.17 did, by one kernel."""
    output: Tensor = _FUSED[query.dim() - 3](
        query, key, value, kernel_size, 1, dilation, is_causal, scale, additional_keys, additional_values,
        relative_position_bias=rpb,
    )  # fmt: skip
    return output


def _checked(rank: int, name: str, tensor: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    if tensor.dim() != rank + 3:
        raise ValueError(f"{name} takes tensors of {rank + 3} dimensions, got shape {tuple(tensor.shape)}")
    return function


def _of_rank(rank: int, name: str, function: Callable[..., Any], text: str) -> Callable[..., Any]:
    """Name a function for a rank, and refuse tensors of others."""

    def named(first: Tensor, *arguments: Any, **others: Any) -> Any:
        return _checked(rank, name, first, function)(first, *arguments, **others)

    functools.update_wrapper(named, function)  # For its signature.
    named.__name__ = named.__qualname__ = name
    named.__doc__ = text
    return named


def _scores_017(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Tensor | None = None,
    is_causal: Flags | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    return qk(query, key, kernel_size, dilation, is_causal or False, rpb, additional_keys)


def _sums_017(
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Tensor | None = None,
    is_causal: Flags | None = False,
) -> Tensor:
    return av(attn, value, kernel_size, dilation, is_causal or False, additional_values)


def _scores(
    query: Tensor, key: Tensor, kernel_size: Ints, dilation: Ints, additional_keys: Tensor | None = None
) -> Tensor:
    return qk(query, key, kernel_size, dilation, additional_keys=additional_keys)


def _biased(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: Ints,
    dilation: Ints,
    additional_keys: Tensor | None = None,
) -> Tensor:
    return qk(query, key, kernel_size, dilation, bias=bias, additional_keys=additional_keys)


def _with_rpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Ints, dilation: Ints) -> Tensor:
    return qk(query, key, kernel_size, dilation, bias=rpb)


def _sums(
    attn: Tensor, value: Tensor, kernel_size: Ints, dilation: Ints, additional_values: Tensor | None = None
) -> Tensor:
    return av(attn, value, kernel_size, dilation, additional_values=additional_values)


# Of three axes, where the first has parameters of its own and the other two share theirs.


def _scores_3d(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    sizes, steps = _three(kernel_size_d, kernel_size), _three(dilation_d, dilation)
    return qk(query, key, sizes, steps, additional_keys=additional_keys)


def _biased_3d(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    sizes, steps = _three(kernel_size_d, kernel_size), _three(dilation_d, dilation)
    return qk(query, key, sizes, steps, bias=bias, additional_keys=additional_keys)


def _with_rpb_3d(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    return _biased_3d(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


def _sums_3d(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    sizes, steps = _three(kernel_size_d, kernel_size), _three(dilation_d, dilation)
    return av(attn, value, sizes, steps, additional_values=additional_values)


def _three(first: int, others: int) -> tuple[int, int, int]:
    return first, others, others


_QK = "Return each query's products with its window's keys, heads first: `na_compiler.compat.natten.split.qk`."
_AV = "Return weighted sums of each window's values, heads first: `na_compiler.compat.natten.split.av`."


def _functions(ranks: tuple[int, ...], names: dict[str, Any]) -> Any:
    found: dict[str, Callable[..., Any]] = {}
    for rank in ranks:
        for pattern, (function, function_3d, text) in names.items():
            name = pattern.format(rank)
            found[name] = _of_rank(rank, name, function_3d if rank == 3 else function, text)
    return found


_NATTEN = {
    "natten{}dqk": (_scores, _scores_3d, _QK),
    "natten{}dqkrpb": (_with_rpb, _with_rpb_3d, _QK),
    "natten{}dav": (_sums, _sums_3d, _AV),
}
OLD_014: dict[str, Callable[..., Any]] = _functions((1, 2), _NATTEN)
OLD_015: dict[str, Callable[..., Any]] = {
    **_functions((1, 2, 3), _NATTEN),
    **_functions(
        (1, 2, 3),
        {
            "na{}d_qk": (_scores, _scores_3d, _QK),
            "na{}d_qk_with_bias": (_biased, _biased_3d, _QK),
            "na{}d_av": (_sums, _sums_3d, _AV),
        },
    ),
}
# The names of before stayed for a while, and so they do here.
OLD_017: dict[str, Callable[..., Any]] = {
    **_functions((1, 2, 3), _NATTEN),
    **_functions((1, 2, 3), {"na{}d_qk": (_scores_017, _scores_017, _QK), "na{}d_av": (_sums_017, _sums_017, _AV)}),
    **_functions((1, 2, 3), {"na{}d": (fused, fused, fused.__doc__ or "")}),
}
