"""What a row visits, chunk by chunk: a query its keys, a key the queries that see it; and what rows of a chunk have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.simt.frame import Buffer, DirectFrame, Expr, Place, Rows, scalar
from na_compiler.schedules.simt.places import AxisPlaces
from na_compiler.tensorir.arithmetic import LOG2_E
from na_compiler.tensorir.axes import AXES, Extents

__all__ = [
    "AdditionalChunks",
    "Chunks",
    "KeyChunks",
    "QueryChunks",
    "StripChunks",
    "unless_masked",
    "with_bias",
]


class Chunks:
    """What a row visits, chunk by chunk.

    Attributes
    ----------
    prefix
        Of the names of the blocks, so that a schedule can tell several apart.
    counts
        Chunks per axis.
    size
        Rows of a chunk per axis.
    """

    prefix: str
    counts: tuple[Any, Any, Any]
    size: Extents

    def token(self, chunk: Place, place: Place) -> list[Expr]:
        """Return where in its tensor a row of a chunk is, between the batch and the head.

        In place of one that is not to be visited, this is another one that is: what a query does not see is never read.
        """
        raise NotImplementedError

    def rows(self, chunk: Place, batch: Expr, head: Expr) -> Rows:
        """Return the indices of the elements of the rows of a chunk."""
        return lambda place: lambda d: [batch, *self.token(chunk, place), head, d]

    def exists(self, chunk: Place, place: Place) -> Expr | None:
        """Return whether a row of a chunk is to be visited; ``None`` if all are."""
        raise NotImplementedError

    def meets(self, chunk: Place) -> Expr | None:
        """Return whether any row of a chunk is; ``None`` if always."""
        return self.exists(chunk, (0, 0, 0))

    def only(self, chunk: Place, place: Place, value: Expr, otherwise: float = 0.0) -> Expr:
        """Return a value for the rows that are to be visited, and another one for the rest."""
        exists = self.exists(chunk, place)
        return value if exists is None else T.if_then_else(exists, value, T.float32(otherwise))

    def number(self, chunk: Place, place: Place) -> Expr:
        """Return the number of the token that a row of a chunk is."""
        raise NotImplementedError

    def bias(self, chunk: Place, place: Place) -> list[Expr] | None:  # noqa: ARG002
        """Return where in a table of biases that of a row of a chunk is; ``None`` where rows have none."""
        return None


class _Interval(Chunks):
    """Consecutive tokens of a dilation group on every axis."""

    # Of an axis, the place in a table of biases of one of a row's tokens.
    place_of: Callable[[AxisPlaces, Expr], Expr]

    def __init__(self, f: DirectFrame, base: list[Expr], count: list[Expr | None], along: list[AxisPlaces]) -> None:
        """Take the first token of each axis, and how many there are where that is not the same for all rows."""
        self.f, self.base, self.count = f, base, count
        self.along = along if f.problem.has(RELATIVE_POSITION_BIAS) else []

    def token(self, chunk: Place, place: Place) -> list[Expr]:
        """Return where in its tensor a row of a chunk is, between the batch and the head."""
        indices = zip(self.base, self._indices(chunk, place), self.f.plan.axes, strict=True)
        token = [AxisPlaces.around(axis, base[0] + index * axis.dilation) for base, index, axis in indices]
        return token[AXES - self.f.problem.rank :]

    def _indices(self, chunk: Place, place: Place) -> list[Expr]:
        """Return which of a row's tokens along each axis one of a chunk is, or in place of one beyond, the last."""
        indices = [part * size + at for part, size, at in zip(chunk, self.size, place, strict=True)]
        return [
            index if count is None else tirx.min(index, count[0] - 1)
            for index, count in zip(indices, self.count, strict=True)
        ]

    def bias(self, chunk: Place, place: Place) -> list[Expr] | None:
        """Return where in a table of biases that of a row of a chunk is; ``None`` where rows have none."""
        if not self.along:
            return None
        places = [
            self.place_of(along, index) for along, index in zip(self.along, self._indices(chunk, place), strict=True)
        ]
        return places[AXES - self.f.problem.rank :]

    def number(self, chunk: Place, place: Place) -> Expr:
        """Return the number of the token that a row of a chunk is."""
        return self.f.places.number(self.token(chunk, place))

    def exists(self, chunk: Place, place: Place) -> Expr | None:
        """Return whether a row of a chunk is to be visited; ``None`` if all are."""
        conditions = [
            part * size + at < count[0]
            for count, part, size, at in zip(self.count, chunk, self.size, place, strict=True)
            if count is not None
        ]
        return tirx.all(*conditions) if conditions else None


class KeyChunks(_Interval):
    """The keys of a query's window."""

    prefix = ""

    def __init__(self, f: DirectFrame, token: list[Expr]) -> None:
        """Emit the bounds of the window of a token."""
        self.size = f.plan.keys
        first, second, third = (axis.key_chunks for axis in f.plan.axes)
        self.counts = (first, second, third)
        base, count = [], []
        for number, along in enumerate(f.places.along_axes(token)):
            first, keys = along.keys()
            base.append(scalar(f"first_key{number}", first, "int32"))
            count.append(scalar(f"keys{number}", keys, "int32") if along.axis.masks_keys else None)
        super().__init__(f, base, count, f.places.along_axes(token))

    place_of = staticmethod(AxisPlaces.bias)


class QueryChunks(_Interval):
    """The queries that see a key."""

    prefix = ""

    def __init__(self, f: DirectFrame, token: list[Expr]) -> None:
        """Emit the bounds of the queries that see a token."""
        self.size = f.plan.queries
        first, second, third = (axis.query_chunks for axis in f.plan.axes)
        self.counts = (first, second, third)
        base, count = [], []
        for number, along in enumerate(f.places.along_axes(token)):
            first, queries = along.queries()
            base.append(scalar(f"first_query{number}", first, "int32"))
            count.append(scalar(f"queries{number}", queries, "int32"))
        super().__init__(f, base, count, f.places.along_axes(token))

    place_of = staticmethod(AxisPlaces.bias_of_query)


class AdditionalChunks(Chunks):
    """The additional keys."""

    prefix = "additional_"

    def __init__(self, f: DirectFrame) -> None:
        self.f = f
        self.size = (1, 1, f.plan.key_count)
        self.counts = (1, 1, tirx.ceildiv(f.additional, tirx.IntImm("int64", f.plan.key_count)))

    def token(self, chunk: Place, place: Place) -> list[Expr]:
        """Return where in its tensor a row of a chunk is, between the batch and the head."""
        return [tirx.min(chunk[-1] * self.size[-1] + place[-1], self.f.additional - 1)]

    def exists(self, chunk: Place, place: Place) -> Expr | None:
        """Return whether a row of a chunk is to be visited; ``None`` if all are."""
        return None if self.size[-1] == 1 else chunk[-1] * self.size[-1] + place[-1] < self.f.additional

    def meets(self, chunk: Place) -> Expr | None:  # noqa: ARG002
        """Return whether any row of a chunk is to be visited; ``None`` if always."""
        return None


class StripChunks(Chunks):
    """The tokens of a strip: all queries, a part at a time."""

    prefix = "strip_"

    def __init__(self, f: DirectFrame, strip: Expr) -> None:
        self.f, self.strip = f, strip
        self.size = (1, 1, f.plan.query_count)
        self.counts = (1, 1, -(-f.plan.strip // f.plan.query_count))

    def number(self, chunk: Place, place: Place) -> Expr:
        """Return the number of the token that a row of a chunk is."""
        return self.f.places.clamp(self._number(chunk, place))

    def _number(self, chunk: Place, place: Place) -> Expr:
        return self.f.places.of_strip(self.strip, chunk[-1] * self.size[-1]) + place[-1]

    def token(self, chunk: Place, place: Place) -> list[Expr]:
        """Return where in its tensor a row of a chunk is, between the batch and the head."""
        return self.f.token(self.number(chunk, place))

    def exists(self, chunk: Place, place: Place) -> Expr | None:
        """Return whether a row of a chunk is to be visited; ``None`` if all are."""
        inside = self.f.places.exists(self._number(chunk, place))
        if self.f.plan.strip % self.size[-1] == 0:
            return inside
        return tirx.all(inside, chunk[-1] * self.size[-1] + place[-1] < self.f.plan.strip)


def with_bias(chunks: Chunks, chunk: Place, place: Place, score: Expr, tensors: dict[str, Buffer], head: Expr) -> Expr:
    """Return the score of a row of a chunk with its bias by relative position, where it has one."""
    at = chunks.bias(chunk, place)
    if at is None:
        return score
    return score + tensors[RELATIVE_POSITION_BIAS][[head, *at]] * T.float32(LOG2_E)


def unless_masked(
    chunks: Chunks, chunk: Place, place: Place, value: Expr, tensors: dict[str, Buffer], batch: Expr, hidden: float
) -> Expr:
    """Return a value for a row of a chunk of keys, or another one where the key mask hides it."""
    mask = tensors.get(KEY_MASK)
    if mask is None or not isinstance(chunks, KeyChunks):
        return value
    return T.if_then_else(mask[[batch, *chunks.token(chunk, place)]], value, T.float32(hidden))
