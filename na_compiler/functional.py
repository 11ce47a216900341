"""`na1d`, `na2d` and `na3d`: neighborhood attention as functions, with NATTEN's signatures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from na_compiler import checks, operands
from na_compiler.borders import CLAMP, borders_per_axis, clamped, joined, middle_of_bias
from na_compiler.ops.call import call
from na_compiler.ops.operators import refuse_unless_dense
from na_compiler.ops.torchscript import refuse_scripting
from na_compiler.place import Place
from na_compiler.traced import canonical, canonical_parameters, checked_scale, default_scale, is_array, is_unknown
from na_compiler.window import SHIFT

__all__ = ["na1d", "na2d", "na3d"]

_LOG = logging.getLogger("na_compiler")
# Arguments of NATTEN's that tune its kernels. Ours are planned per problem, so there is nothing to set.
TUNING = {
    "attention_kwargs",
    "backend",
    "backward_kv_splits",
    "backward_kv_tile_shape",
    "backward_q_tile_shape",
    "backward_use_pt_reduction",
    "kernel_schedule",
    "kv_tile_shape",
    "q_tile_shape",
    "run_persistent_kernel",
    "torch_compile",
}
_ignored: set[str] = set()

Ints = int | Sequence[int]
Flags = bool | Sequence[bool]

_PARAMETERS = """
    Parameters
    ----------
    query
        ``[batch, {axes}, heads, head_dim]``; float32, bfloat16 or float16, on the CPU or on CUDA.
    key
        ``[batch, {axes}, heads_kv, head_dim]``; ``heads`` is a multiple of ``heads_kv``.
    value
        ``[batch, {axes}, heads_kv, head_dim_v]``.
    kernel_size
        Window along the layout, in tokens; ``kernel_size * dilation`` is at most the layout's extent, unless
        ``border`` says otherwise.
    stride
        Queries that share one window, at most ``kernel_size``. Default 1.
    dilation
        Distance between neighbors. Default 1.
    is_causal
        Whether a query sees no key after itself. Default False.
    scale
        Of the scores. Default ``head_dim ** -0.5``; 0 is 0. One that ``torch.export`` or Dynamo does not know, as it
        follows from a dynamic size or is a NumPy number, multiplies query instead.
    additional_keys, additional_values
        ``[batch, additional, heads_kv, head_dim]`` and ``[..., head_dim_v]``: seen by every query beside its window,
        inside the same softmax. Default none.
    relative_position_bias
        ``[heads, {offsets}]``: added to the scaled scores. Its place along an axis is ``key - query + kernel_size - 1``
        of the positions that the two have in their dilation groups, so that the middle is a query itself: as NAT and
        DiNAT have it. Computed with, and differentiated, in float32. Default none.
    key_mask
        ``[batch, {axes}]``, bool: False hides a key of the layout from all queries, as in torch's
        ``scaled_dot_product_attention``. Additional keys stay visible. A query that sees no key has output 0, lse minus
        infinity, and no gradients. Default: none is hidden.
    border
        What windows do at the ends of an axis, a word or one for each axis. ``"shift"``, the default: they move
        inwards, as NATTEN's. ``"cut"``: they end where the layout ends, and may be longer than it. ``"cut:LEFT"``: the
        same with ``LEFT`` keys before a query and the rest after it. ``"wrap"``: the axis is a circle; the dilation
        divides it, and the stride the dilation groups. ``"clamp"``: a window that is longer than the axis is made as
        long, and shifted.
    place
        A `na_compiler.Place`: the tensors hold a part of a larger layout, key and value another one than query, that
        has all keys which its queries see. The result is that part of what the whole would give. On the CPU, and with
        ``border="shift"``. Default: they hold all of it.
    return_lse
        Whether to return lse as well. It has a gradient.
    **tuning
        NATTEN's tuning arguments are accepted and ignored, with one line in the log.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output, ``[batch, {axes}, heads, head_dim_v]`` in query's dtype, and lse, ``[batch, {axes}, heads]`` in
        float32: the natural logarithm of the sum of exponentials of the scaled scores.

    Raises
    ------
    ValueError
        If arguments do not fit each other; the message names a value that would work.
    NotImplementedError
        For sparse or nested tensors, and for tensors on other devices than CPU and CUDA.

    Notes
    -----
    Tensors may have any strides: views of one fused projection are read where they are. (One whose last stride is
    not 1 is copied.) The first call with a shape compiles it, unless the on-disk cache or a loaded bundle has it.
    The window rule is that of NATTEN 0.21, see `na_compiler.window`.
"""


def _attention(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    dilation: Ints | None,
    is_causal: Flags | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    relative_position_bias: Tensor | None,
    key_mask: Tensor | None,
    border: str | Sequence[str],
    place: Place | None,
    return_lse: bool,
    tuning: dict[str, object],
) -> Tensor | tuple[Tensor, Tensor]:
    if relative_position_bias is not None:
        _check_tensors(rank, relative_position_bias=relative_position_bias)
        # A layer in half precision has a table of its own dtype.
        is_half = relative_position_bias.dtype in {torch.bfloat16, torch.float16}
        tuning["relative_position_bias"] = relative_position_bias.float() if is_half else relative_position_bias
    if key_mask is not None:
        tuning["key_mask"] = key_mask
    if border not in _SHIFTS:
        borders = borders_per_axis(border, rank)
        if CLAMP in borders:
            kernel_size, stride, borders = _clamped(rank, query, place, kernel_size, stride, dilation, borders, tuning)
        tuning["border"] = joined(borders)
    later = () if not tuning and place is None else _others(rank, tuning, place)
    is_usual = type(query) is type(key) is type(value) is Tensor
    if not is_usual or query.is_nested or key.is_nested or value.is_nested:
        _check_tensors(rank, query=query, key=key, value=value)
    if additional_keys is not None or additional_values is not None:
        given = {"additional_keys": additional_keys, "additional_values": additional_values}
        _check_tensors(rank, **{name: tensor for name, tensor in given.items() if tensor is not None})
        later = (additional_keys, additional_values, *later)
    elif later:
        later = (None, None, *later)
    factor = default_scale(query) if scale is None else checked_scale(scale)
    if torch.compiler.is_compiling() and is_unknown(factor):
        query, factor = query * (float(factor) if is_array(factor) else factor), 1.0
    result: Tensor | tuple[Tensor, Tensor] = call(
        rank,
        return_lse,
        query,
        key,
        value,
        *canonical(rank, kernel_size, stride, dilation, is_causal),
        factor,
        *later,
    )
    return result


# What a border is, by default or said for each axis; an argument that is not hashable is looked at.
_SHIFTS: tuple[object, ...] = (SHIFT, *((SHIFT,) * rank for rank in (1, 2, 3)))


def _clamped(
    rank: int,
    query: Tensor,
    place: Place | None,
    kernel_size: Ints,
    stride: Ints | None,
    dilation: Ints | None,
    borders: tuple[str, ...],
    tuning: dict[str, object],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Return kernel_size, stride and border with windows that fit; cuts the middle out of a table of biases."""
    given, strides, gaps, _ = canonical_parameters(rank, kernel_size, stride, dilation, is_causal=False)
    layout = query.shape[1 : rank + 1] if place is None else place.layout
    fitting, strides, borders = clamped(layout, given, strides, gaps, borders)
    bias = tuning.get("relative_position_bias")
    if isinstance(bias, Tensor) and fitting != given:
        expected = tuple(2 * size - 1 for size in given)
        if tuple(bias.shape[1:]) != expected:
            raise ValueError(
                f"relative_position_bias must have shape [heads, offsets], here {(query.shape[-2], *expected)}, got "
                f"{tuple(bias.shape)}"
            )
        tuning["relative_position_bias"] = bias[middle_of_bias(given, fitting)].contiguous()
    return fitting, strides, borders


# Operands that the table has beside those which the signature names, by keyword; each may be left out.
_OTHERS = tuple(operand for operand in operands.later() if not operand.name.startswith("additional_"))


def _others(rank: int, given: dict[str, object], place: Place | None) -> tuple[object, ...]:
    """Take further operands from keyword arguments, in the operator's order, and a place; the rest is for tuning."""
    values = tuple(given.pop(operand.name, operand.default) for operand in _OTHERS)
    for operand, value in zip(_OTHERS, values, strict=True):
        if value is not None and operand.role == operands.SCALAR:
            checks.check_scalar(operand, value)
        elif value is not None and operand.role != operands.PARAMETER:
            _check_tensors(rank, **{operand.name: value})
    if given:
        _ignore(rank, given)
    if place is None:
        return values
    if not isinstance(place, Place):
        raise TypeError(f"place must be a na_compiler.Place, got {type(place).__name__}")
    return (*values, place.numbers())


def _check_tensors(rank: int, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:  # It has no shape to look at, and operators of nested tensors are its own affair.
            refuse_unless_dense(rank, tensor)


def _ignore(rank: int, tuning: dict[str, object]) -> None:
    unknown = sorted(set(tuning) - TUNING)
    if unknown:
        raise TypeError(f"na{rank}d() got an unexpected keyword argument {unknown[0]!r}")
    new = sorted(set(tuning) - _ignored)
    if new and not torch.compiler.is_compiling():
        _ignored.update(new)
        _LOG.warning("ignoring %s: kernels are planned for each problem", ", ".join(new))


class _Attend(Protocol):
    """The signature that the functions share, which is NATTEN's."""

    __name__: str
    __qualname__: str

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        relative_position_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        border: str | Sequence[str] = SHIFT,
        place: Place | None = None,
        return_lse: Literal[False] = False,
        **tuning: object,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        relative_position_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        border: str | Sequence[str] = SHIFT,
        place: Place | None = None,
        return_lse: Literal[True],
        **tuning: object,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        relative_position_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        border: str | Sequence[str] = SHIFT,
        place: Place | None = None,
        return_lse: bool,
        **tuning: object,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


_AXES = {1: "X", 2: "X, Y", 3: "X, Y, Z"}
_OFFSETS = {1: "2 k - 1", 2: "2 k - 1, 2 k - 1", 3: "2 k - 1, 2 k - 1, 2 k - 1"}
_WORDS = {1: "Attend along one axis", 2: "Attend over two axes", 3: "Attend over three axes"}
_SIZES = {1: "8", 2: "8, 8", 3: "4, 4, 4"}
_EXAMPLE = """
    Examples
    --------
    >>> import torch
    >>> query, key, value = torch.randn(3, 1, {sizes}, 2, 16)
    >>> na{rank}d(query, key, value, kernel_size=3).shape
    torch.Size([1, {sizes}, 2, 16])
"""


def _function(rank: int) -> _Attend:
    """Make the function of a rank."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        relative_position_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        border: str | Sequence[str] = SHIFT,
        place: Place | None = None,
        return_lse: bool = False,
        **tuning: object,
    ) -> Any:  # noqa: ANN401 - which of the two, the overloads say
        return _attention(
            rank, query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
            additional_values, relative_position_bias, key_mask, border, place, return_lse, tuning,
        )  # fmt: skip

    refuse_scripting(  # Layers have a form that can be scripted.
        attend,
        f"na{rank}d cannot be scripted: call torch.ops.na_compiler.na{rank}d, which can, with all arguments and lists "
        f"for kernel_size, stride, dilation and is_causal; or script a layer, or use torch.jit.trace or torch.export",
    )
    attend.__name__ = attend.__qualname__ = f"na{rank}d"
    parameters = _PARAMETERS.format(axes=_AXES[rank], offsets=_OFFSETS[rank])
    attend.__doc__ = (
        f"{_WORDS[rank]}, each query to its neighborhood.\n{parameters}{_EXAMPLE.format(rank=rank, sizes=_SIZES[rank])}"
    )
    return attend


na1d, na2d, na3d = map(_function, (1, 2, 3))
