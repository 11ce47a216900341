"""``torch.compile(model, backend="na_compiler")``: the passes, and then Inductor."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from na_compiler.passes.canonicalise_torch import canonicalise_torch
from na_compiler.passes.collect_torch import collect_torch
from na_compiler.passes.progress import compile_specs
from na_compiler.runtime.jit import is_compiling_allowed

__all__ = ["backend"]

# For the device that tensors are on: the CPU, or the GPU present.
_TARGETS = {"cpu": "llvm", "cuda": "cuda"}
# Buffers of modules, and what block masks of FlexAttention are made of.
_BUFFER = re.compile(r"\._buffers\['\w+'\]$|\.(?:full_)?(?:kv|q)_(?:num_blocks|indices)$")
_LOG = logging.getLogger("na_compiler")


def backend(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., object]:  # noqa: ANN401 - torch's
    """Compile a graph that Dynamo captured: every neighborhood attention in it in parallel, the rest with Inductor.

    Parameters
    ----------
    module, inputs
        As torch hands them over.
    **options
        Inductor's ``mode`` and ``options``, as ``torch.compile`` has them.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    buffers = _buffers(module, inputs)
    original = copy.deepcopy(module) if buffers else module
    used: set[str] = set()
    changed = canonicalise_torch(module, {name: inputs[place] for name, place in buffers.items()}, used)
    _compile_ahead(module, changed)
    patches = dict(options.get("options") or {})
    if options.get("mode"):
        patches |= torch._inductor.list_mode_options(options["mode"])  # noqa: SLF001

    def compiled(graph: fx.GraphModule) -> Callable[..., object]:
        made: Any = compile_fx(graph, inputs, config_patches=patches or None)
        return made  # type: ignore[no-any-return]

    if not used:
        return compiled(module)
    constants = [_Constant(buffers[name], inputs[buffers[name]]) for name in sorted(used)]
    return _guarded(compiled(module), lambda: compiled(original), constants)


def _compile_ahead(module: fx.GraphModule, changed: int) -> None:
    """Compile what the model will ask for. Where that fails it is its operators' affair, when it runs."""
    training = torch.is_grad_enabled() and any(_needs_grad(node) for node in module.graph.nodes)
    try:
        sites = collect_torch(module)
        specs = [
            spec for device, target in _TARGETS.items() for spec in sites.on(device).specs([target], training=training)
        ]
        _LOG.info("%d neighborhood attentions, %d kernels, %d nodes rewritten", len(sites), len(specs), changed)
        if specs and is_compiling_allowed():
            compile_specs(specs)
    except (OSError, RuntimeError, ValueError) as error:
        _LOG.warning("kernels were not compiled ahead: %s", str(error).partition("\n")[0])


class _Constant:
    """A buffer that was taken as constant, because it is a mask: what it was like then."""

    def __init__(self, place: int, tensor: torch.Tensor) -> None:
        # Kept, so that no other tensor gets its memory.
        self.place, self.tensor, self.version = place, tensor, tensor._version  # noqa: SLF001
        # On the host: what is allocated on a device during a user's call may belong to a CUDA graph.
        self.value = tensor.detach().cpu().clone()

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Return whether the buffer is still what it was; takes half a microsecond where nobody wrote to it."""
        tensor = inputs[self.place]
        if tensor.data_ptr() == self.tensor.data_ptr() and tensor._version == self.version:  # noqa: SLF001
            return True
        if tensor.shape != self.value.shape or not torch.equal(tensor.cpu(), self.value):
            return False
        self.tensor, self.version = tensor, tensor._version  # noqa: SLF001
        return True


def _guarded(
    fast: Callable[..., object], make_slow: Callable[[], Callable[..., object]], constants: list[_Constant]
) -> Callable[..., object]:
    """Run one of two functions: the other where a buffer has changed since its value was compiled in."""
    make_slow = functools.cache(make_slow)

    def run(*inputs: object) -> object:
        if all(constant.holds(inputs) for constant in constants):
            return fast(*inputs)
        _LOG.warning("a mask that was a neighborhood has changed: compiling the model again, with it as an input")
        return make_slow()(*inputs)

    return run


def _buffers(module: fx.GraphModule, inputs: list[Any]) -> dict[str, int]:
    """Return the places of inputs that are buffers of modules or of block masks, by the names of their nodes."""
    found = {}
    for place, node in enumerate(module.graph.find_nodes(op="placeholder")):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = str(getattr(source, "name", ""))
        tensor = inputs[place]
        # Inference tensors do not say when they are written to.
        if _BUFFER.search(name) and type(tensor) is torch.Tensor and not tensor.is_inference():
            found[node.name] = place
    return found


def _needs_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return node.op in {"placeholder", "get_attr"} and isinstance(value, torch.Tensor) and value.requires_grad
