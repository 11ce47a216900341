"""*canonicalise*: NATTEN's nodes and masked attention become our operators, which read views."""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from na_compiler.passes.graph import graph_module
from na_compiler.passes.natten import replace_natten
from na_compiler.passes.sdpa import replace_sdpa
from na_compiler.passes.views import copies, drop_copies

__all__ = ["Canonicalise", "canonicalise_torch"]


class Canonicalise(PassBase):
    """`canonicalise_torch` for pipelines of torch.fx passes."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run on a graph, in place."""
        return PassResult(graph_module, canonicalise_torch(graph_module) > 0)


def canonicalise_torch(program: ExportedProgram | fx.GraphModule) -> int:
    """Make every neighborhood attention of a graph a call of ours, reading views; returns how many nodes changed.

    Parameters
    ----------
    program
        Changed in place. What it computes stays the same.

    Raises
    ------
    RuntimeError
        If a copy is left between a projection and attention where the graph is free of writes: a defect of ours.
    """
    module = graph_module(program)
    count = replace_natten(module) + replace_sdpa(program)
    dropped = drop_copies(module)
    module.graph.lint()
    module.recompile()
    if dropped:
        left = [node.name for node in copies(module) if _is_contiguous_call(node)]
        if left:
            raise RuntimeError(f"copies are left in front of attention: {', '.join(left)}")
    return count + dropped


def _is_contiguous_call(node: fx.Node) -> bool:
    return "contiguous" in str(node.target)
