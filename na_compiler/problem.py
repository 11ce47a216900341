"""`Problem`: what a kernel computes, checked once and then trusted everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from na_compiler import checks, operands
from na_compiler.borders import CLAMP, borders_per_axis, canonical_rule, check_rule, without_clamp
from na_compiler.checks import MAX_RANK, TensorLike
from na_compiler.counting import group_lengths, visible_pairs
from na_compiler.parameters import (
    DTYPES,
    LONGEST_HEAD,
    check_strides,
    check_windows,
    dtype_name,
    flag,
    flags_per_axis,
    head_length,
    ints_per_axis,
    layout_of,
    optional_operands,
    positive,
    shown,
)
from na_compiler.window import CUT, SHIFT, border_kind

if TYPE_CHECKING:
    from na_compiler.place import Place

__all__ = [
    "DTYPES",
    "LONGEST_HEAD",
    "MAX_RANK",
    "Problem",
    "check_strides",
    "dtype_name",
    "flags_per_axis",
    "ints_per_axis",
    "shown",
]


@dataclass(frozen=True)
class Problem:
    """One neighborhood attention, as a compiler sees it.

    Batch, scale and the number of additional keys are not part of it: every kernel takes them at run time.
    Equal problems are equal and hash alike however they were spelled (an int for every axis, a list, a
    ``torch.Size``, a ``torch.dtype``).

    Parameters
    ----------
    layout
        Tokens along each of the 1, 2 or 3 axes. Or ``None`` along each: it is *open*, and a kernel learns when it is
        called which part of which layout its tensors hold.
    heads
        Query heads.
    head_dim
        Length of a query and of a key, from 1 to 8192.
    kernel_size
        Window per axis, in tokens of one dilation group; ``1 <= kernel_size`` and
        ``kernel_size * dilation <= layout``, unless windows are cut or clamped.
    stride
        Queries per axis that share one window, in ``[1, kernel_size]``.
    dilation
        Distance between neighbors per axis, at least 1.
    is_causal
        Per axis: a query sees no key after itself.
    heads_kv
        Heads of keys and values; ``heads`` is a multiple of it (grouped-query attention). Default: ``heads``.
    head_dim_v
        Length of a value and of an output. Default: ``head_dim``.
    additional_kv
        Whether every query also sees additional keys, inside the same softmax.
    operands
        Names of the other optional operands that there are, see `na_compiler.operands`.
    border
        What windows do at the ends of each axis, see `na_compiler.window`: ``"shift"``, ``"cut"``, ``"cut:LEFT"``
        (``LEFT`` keys before a query), ``"wrap"``; or ``"clamp"``, which makes the window at most as long as the axis.
        ``"shift"`` is kept in place of another one with which all queries see the same keys.
    dtype
        Of query, key, value and output: ``"float32"``, ``"bfloat16"`` or ``"float16"``. The arithmetic is float32.

    Raises
    ------
    ValueError
        Naming the argument, the value given, the limit, and a value that would work.

    Examples
    --------
    >>> problem = Problem(layout=(56, 56), heads=4, head_dim=32, kernel_size=7)
    >>> problem == Problem([56, 56], 4, 32, (7, 7), stride=[1, 1])
    True
    >>> print(problem)
    na2d layout=56x56 heads=4 head_dim=32 kernel_size=7x7 float32
    >>> problem.flops()
    78675968
    """

    layout: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = 1  # type: ignore[assignment]
    dilation: tuple[int, ...] = 1  # type: ignore[assignment]
    is_causal: tuple[bool, ...] = False  # type: ignore[assignment]
    heads_kv: int = None  # type: ignore[assignment]
    head_dim_v: int = None  # type: ignore[assignment]
    additional_kv: bool = False
    dtype: str = "float32"
    operands: tuple[str, ...] = ()
    border: tuple[str, ...] = SHIFT  # type: ignore[assignment]

    if TYPE_CHECKING:
        # Fields are what `__post_init__` makes of the arguments.
        def __init__(
            self,
            layout: int | Sequence[int] | Sequence[None],
            heads: int,
            head_dim: int,
            kernel_size: int | Sequence[int],
            stride: int | Sequence[int] = 1,
            dilation: int | Sequence[int] = 1,
            is_causal: bool | Sequence[bool] = False,
            heads_kv: int | None = None,
            head_dim_v: int | None = None,
            additional_kv: bool = False,
            dtype: object = "float32",
            operands: Sequence[str] = (),
            border: str | Sequence[str] = SHIFT,
        ) -> None: ...

    def __post_init__(self) -> None:
        layout = layout_of(self.layout)
        rank = len(layout)
        heads = positive("heads", self.heads)
        head_dim = head_length("head_dim", self.head_dim)
        heads_kv = heads if self.heads_kv is None else positive("heads_kv", self.heads_kv)
        if heads % heads_kv:
            raise ValueError(
                f"heads must be a multiple of heads_kv, got heads={heads} and heads_kv={heads_kv}; "
                f"heads_kv={math.gcd(heads, heads_kv)} would work"
            )
        canonical = {
            "layout": layout,
            "heads": heads,
            "head_dim": head_dim,
            "kernel_size": ints_per_axis("kernel_size", self.kernel_size, rank),
            "stride": ints_per_axis("stride", self.stride, rank),
            "dilation": ints_per_axis("dilation", self.dilation, rank),
            "is_causal": flags_per_axis("is_causal", self.is_causal, rank),
            "heads_kv": heads_kv,
            "head_dim_v": head_dim if self.head_dim_v is None else head_length("head_dim_v", self.head_dim_v),
            "additional_kv": flag("additional_kv", self.additional_kv),
            "dtype": dtype_name(self.dtype),
            "operands": optional_operands(self.operands),
            "border": borders_per_axis(self.border, rank),
        }
        for name, value in canonical.items():
            object.__setattr__(self, name, value)
        if self.is_open:
            self._check_open()
        elif set(self.border) != {SHIFT}:
            self._make_rule_canonical()
        else:
            check_windows(layout, self.kernel_size, self.dilation)
            check_strides(self.kernel_size, self.stride)

    def _check_open(self) -> None:
        if CLAMP in self.border:
            raise ValueError("border must not be 'clamp' with an open layout: how long a window is depends on the axis")
        check_strides(self.kernel_size, self.stride)

    def _make_rule_canonical(self) -> None:
        axes = list(zip(self.kernel_size, self.stride, self.is_causal, self.border, strict=True))
        sizes = list(zip(self.layout, self.dilation, strict=True))
        has_bias = operands.RELATIVE_POSITION_BIAS in self.operands
        rules = [without_clamp(axis, *sizes[axis], rule) for axis, rule in enumerate(axes)]
        kernel_size, stride, _, border = zip(*rules, strict=True)
        limits = [one if border_kind(kind) != CUT else 1 for one, kind in zip(kernel_size, border, strict=True)]
        gaps = [one if border_kind(kind) != CUT else 1 for one, kind in zip(self.dilation, border, strict=True)]
        check_windows(self.layout, limits, gaps)
        check_strides(kernel_size, stride)
        for axis, rule in enumerate(rules):
            check_rule(axis, *sizes[axis], rule)
        made = [canonical_rule(*size, rule, has_bias=has_bias) for size, rule in zip(sizes, rules, strict=True)]
        for name, values in zip(("kernel_size", "stride", "is_causal", "border"), zip(*made, strict=True), strict=True):
            object.__setattr__(self, name, values)

    @property
    def is_open(self) -> bool:
        """Whether the layout is open: known only when a kernel is called."""
        return self.layout[0] is None

    def opened(self) -> Problem:
        """Return the problem with an open layout."""
        return self if self.is_open else self.replace(layout=(None,) * self.rank)

    @property
    def rank(self) -> int:
        """Number of axes of the layout: 1, 2 or 3."""
        return len(self.layout)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of query, key, value and output."""
        return 4 if self.dtype == "float32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one batch entry.

        Raises
        ------
        ValueError
            If the layout is open.
        """
        if self.is_open:
            raise ValueError(f"{self} has no number of tokens; problem.replace(layout=...) has")
        return math.prod(self.layout)

    @property
    def group_size(self) -> int:
        """Query heads that read one key/value head."""
        return self.heads // self.heads_kv

    def has(self, option: str) -> bool:
        """Return whether there are the operands of an option, see `na_compiler.operands.Operand`."""
        return self.additional_kv if option == operands.ADDITIONAL_KV else option in self.operands

    @property
    def has_borders(self) -> bool:
        """Whether windows do anything else at an end of an axis than to shift."""
        return any(border != SHIFT for border in self.border)

    def pairs(self) -> int:
        """Return how many (query, key) pairs one head of one batch entry attends over, additional keys not counted.

        Raises
        ------
        ValueError
            If the layout is open.
        """
        if self.is_open:
            raise ValueError(f"{self} has no number of pairs; problem.replace(layout=...) has")
        return math.prod(
            _axis_pairs(*axis)
            for axis in zip(
                self.layout, self.kernel_size, self.stride, self.dilation, self.is_causal, self.border, strict=True
            )
        )

    def flops(self, batch: int = 1, additional: int = 0, direction: str = "forward") -> int:
        """Return the useful floating-point operations: a multiply and an add for each pair that the windows need.

        Parameters
        ----------
        batch
            Batch entries.
        additional
            Additional keys of each batch entry.
        direction
            ``"forward"`` counts the two products (scores, output), ``"backward"`` the five (scores, and the
            gradients of the probabilities, query, key and value), ``"tangent"`` the six (the two, and their
            derivatives by either factor).

        Raises
        ------
        ValueError
            For another direction.
        """
        operands.check_direction(direction)
        pairs = batch * self.heads * (self.pairs() + self.tokens * additional)
        keys, values = {"forward": (1, 1), "backward": (3, 2), "tangent": (3, 3)}[direction]
        return 2 * pairs * (keys * self.head_dim + values * self.head_dim_v)

    @classmethod
    def of_tensors(
        cls,
        query: TensorLike,
        key: TensorLike,
        value: TensorLike,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        additional_keys: TensorLike | None = None,
        additional_values: TensorLike | None = None,
        *,
        dtype: object = None,
        border: str | Sequence[str] = SHIFT,
        place: Place | None = None,
        **others: object,
    ) -> Problem:
        """Make the problem that tensors pose, checking that they fit each other.

        Parameters
        ----------
        query, key, value, additional_keys, additional_values
            Tensors of any library: only shape, dtype and device are looked at.
        kernel_size, stride, dilation, is_causal, border
            As for the class.
        dtype
            In place of the tensors' own, for those that only the reference takes.
        place
            Where in a larger layout the tensors lie: the problem is that of the whole. Default: they hold all of it.
        **others
            Further operands of `na_compiler.operands`, by name.

        Raises
        ------
        ValueError
            Naming the argument, the value given, the limit, and a value that would work.
        TypeError
            For an operand that there is not.
        """
        checks.check_required({"query": query, "key": key, "value": value}, lie_apart=place is not None)
        given = {"additional_keys": additional_keys, "additional_values": additional_values, **others}
        found = checks.given_options(given)
        *_, heads, head_dim = query.shape
        if place is not None:
            place.check_queries(query.shape[1:-2])
        problem = cls(
            layout=tuple(query.shape[1:-2]) if place is None else place.layout,
            heads=heads,
            head_dim=head_dim,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            heads_kv=key.shape[-2],
            head_dim_v=value.shape[-1],
            additional_kv=operands.ADDITIONAL_KV in found,
            dtype=query.dtype if dtype is None else dtype,
            operands=tuple(option for option in found if option != operands.ADDITIONAL_KV),
            border=border,
        )
        if place is not None:
            place.check(problem, query.shape[1:-2], key.shape[1:-2])
        checks.check_operands(problem, given, query, None if place is None else key)
        return problem

    def replace(self, **changes: Any) -> Problem:  # noqa: ANN401 - each as its field is
        """Return a copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data, from which `from_dict` makes an equal problem; fit for JSON."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
            # A name for a problem outlives what is added to problems.
            if (field.name != "operands" or self.operands) and (field.name != "border" or self.has_borders)
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """Make a problem from what `to_dict` returned.

        Raises
        ------
        ValueError
            For a field that is unknown, missing or out of its limits.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown fields of a problem: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        missing = sorted({"layout", "heads", "head_dim", "kernel_size"} - set(data))
        if missing:
            raise ValueError(f"a problem needs {', '.join(missing)} as well")
        return cls(**data)

    def __str__(self) -> str:
        layout = "any" if self.is_open else _times(self.layout)
        words = [f"na{self.rank}d layout={layout} heads={self.heads}"]
        if self.heads_kv != self.heads:
            words.append(f"heads_kv={self.heads_kv}")
        words.append(f"head_dim={self.head_dim}")
        if self.head_dim_v != self.head_dim:
            words.append(f"head_dim_v={self.head_dim_v}")
        words.append(f"kernel_size={_times(self.kernel_size)}")
        words += [
            f"{name}={_times(value)}"
            for name, value in (("stride", self.stride), ("dilation", self.dilation))
            if any(extent != 1 for extent in value)
        ]
        if any(self.is_causal):
            words.append("is_causal=" + "x".join("1" if flag else "0" for flag in self.is_causal))
        if self.has_borders:
            words.append(f"border={','.join(self.border)}")
        if self.additional_kv:
            words.append("additional_kv")
        words += self.operands
        words.append(self.dtype)
        return " ".join(words)


def _times(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _axis_pairs(tokens: int, kernel: int, stride: int, dilation: int, is_causal: bool, border: str) -> int:
    lengths = group_lengths(tokens, dilation)
    return sum(groups * visible_pairs(length, kernel, stride, is_causal, border) for length, groups in lengths.items())
