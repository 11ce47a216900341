"""`FreshNames`: names for new values and nodes of a model that nothing in any of its graphs has."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["FreshNames"]


class FreshNames:
    """Gives names that are new in a model. A subgraph sees the names around it, so one set serves all graphs.

    Parameters
    ----------
    model
        Whose names are taken.
    """

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in (model.graph, *model.graph.subgraphs()):
            self._taken.update(value.name for value in (*graph.inputs, *graph.initializers.values()) if value.name)
            for node in graph:
                self._taken.update(name for name in (node.name, *(output.name for output in node.outputs)) if name)

    def __call__(self, wanted: str) -> str:
        """Return a name: the wanted one, or that with a number."""
        name, count = wanted, 0
        while not name or name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name
