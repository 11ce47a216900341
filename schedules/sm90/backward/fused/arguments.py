"""Arguments of the backward of five products."""

from __future__ import annotations

from na_compiler.schedules.sm90.backward.arguments import BackwardArguments
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan

__all__ = ["FusedArguments"]


class FusedArguments(BackwardArguments):
    """Those of the other form, with more workspace: ``main(..., statistics, parts, turns, ticket)``."""

    def __init__(self, plan: FusedPlan) -> None:
        super().__init__(plan)
        self._contiguous("parts", (self.batch, *plan.parts_shape), "float32")
        self._contiguous("turns", (self.batch, *plan.turns_shape), "float32")
        self._contiguous("ticket", (self.batch, 1), "float32")
