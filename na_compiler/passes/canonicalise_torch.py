"""*canonicalise*: NATTEN's nodes, split attention and masked attention become our operators, which read views."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from na_compiler.passes.flex import replace_flex
from na_compiler.passes.graph import finish, graph_module
from na_compiler.passes.multi_head import open_multi_head
from na_compiler.passes.natten_nodes import replace_natten
from na_compiler.passes.sdpa import replace_sdpa
from na_compiler.passes.split import replace_split
from na_compiler.passes.views import copies, drop_copies

__all__ = ["Canonicalise", "canonicalise_torch"]

_LOG = logging.getLogger("na_compiler")


class Canonicalise(PassBase):
    """`canonicalise_torch` for pipelines of torch.fx passes."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run on a graph, in place."""
        return PassResult(graph_module, canonicalise_torch(graph_module) > 0)


def canonicalise_torch(
    program: ExportedProgram | fx.GraphModule,
    held: Mapping[str, torch.Tensor] | None = None,
    used: set[str] | None = None,
) -> int:
    """Make every neighborhood attention of a graph a call of ours, reading views; returns how many nodes changed.

    Parameters
    ----------
    program
        Changed in place. What it computes stays the same.
    held, used
        See `na_compiler.passes.sdpa.replace_sdpa`.

    Notes
    -----
    After it `na_compiler.passes.views.copies` finds no node but those that something else reads as well.
    """
    module = graph_module(program)
    count = replace_natten(module) + replace_split(module) + open_multi_head(module)
    count += replace_sdpa(program, held, used) + replace_flex(program, held, used)
    dropped = drop_copies(module)
    finish(program)
    left = copies(module)
    if left:
        # Something else reads them, or rows would not have a stride of 1 without them.
        _LOG.info("copies in front of attention: %s", ", ".join(node.name for node in left))
    return count + dropped
