"""``torch.compile(model, backend="na_compiler")``: the passes, and then Inductor."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from na_compiler.passes.canonicalise_torch import canonicalise_torch
from na_compiler.passes.collect_torch import collect_torch
from na_compiler.passes.progress import compile_specs
from na_compiler.runtime.jit import is_compiling_allowed

__all__ = ["backend"]

_LOG = logging.getLogger("na_compiler")


def backend(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    """Compile a graph that Dynamo captured: every neighborhood attention in it in parallel, the rest with Inductor.

    Parameters
    ----------
    module, inputs
        As torch hands them over.
    **options
        Inductor's ``mode`` and ``options``, as ``torch.compile`` has them.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    changed = canonicalise_torch(module)
    sites = collect_torch(module)
    training = torch.is_grad_enabled() and any(_needs_grad(node) for node in module.graph.nodes)
    specs = [spec for spec in sites.specs(training=training) if spec.target.runs_here]
    _LOG.info("%d neighborhood attentions, %d kernels, %d nodes rewritten", len(sites), len(specs), changed)
    if specs and is_compiling_allowed():
        compile_specs(specs)
    patches = dict(options.get("options") or {})
    if options.get("mode"):
        patches |= torch._inductor.list_mode_options(options["mode"])  # noqa: SLF001
    return compile_fx(module, inputs, config_patches=patches or None)


def _needs_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return node.op in {"placeholder", "get_attr"} and isinstance(value, torch.Tensor) and value.requires_grad
