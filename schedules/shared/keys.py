"""`KeyWork`: one tile of keys of one head, and the queries that see one of them. Mirrors `Work` of a forward."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, let, maximum, minimum
from na_compiler.schedules.shared.work import Work
from na_compiler.window import query_bounds

__all__ = ["KeyWork"]

Expr = Any


class KeyWork(Work):
    """A tile of keys of one head, and the queries that see one of them, which are consecutive along every axis.

    Heads of queries that share the keys are one after another from `stream_head` on.
    """

    @property
    def heads(self) -> int:
        """Heads of the keys."""
        return self.plan.problem.heads_kv

    @property
    def stream_head(self) -> Expr:
        """The first of the query heads."""
        size = self.plan.problem.group_size
        return let(self.head * size) if size > 1 else self.head

    def extent(self, axis: int) -> int | None:  # noqa: ARG002
        """Return none: keys near a border are seen by other numbers of queries."""
        return None

    def bounds(self, axis: int, query: Expr) -> tuple[Expr, Expr]:
        """Return the first and the end of the queries that see a key."""
        problem = self.plan.problem
        return query_bounds(
            query,
            self.lengths[axis],
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.is_causal[axis],
            problem.border[axis],
            minimum=minimum,
            maximum=maximum,
            choose=T.Select,
        )
