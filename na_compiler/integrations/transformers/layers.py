"""What `na_compiler.convert` does with models of transformers: ours is chosen where a layer has a window."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from na_compiler.passes.decline import DeclinedError, need

__all__ = ["convert_layers"]

_WINDOWS = {"sliding_attention", "chunked_attention"}


def convert_layers(model: nn.Module, implementation: str) -> dict[str, str]:
    """Choose an attention implementation for models of transformers with windows, inside a model or itself.

    Parameters
    ----------
    model
        Changed in place: the implementation is set in configurations. Models without such a layer are not touched.
    implementation
        Its name.

    Returns
    -------
    dict
        ``"converted"`` for each layer with a window, and for each other one what it is left as.
    """
    report: dict[str, str] = {}
    for name, part in _outermost(model, ""):
        found = {f"{name}.{path}" if name else path: _left(layer) for path, layer in _attentions(part)}
        if "" in found.values():
            part.set_attn_implementation(implementation)
            chosen = part.config._attn_implementation == implementation  # noqa: SLF001
            refusal = "" if chosen else f"{type(part).__name__} does not let its attention be chosen"
            found = {layer: left or refusal for layer, left in found.items()}
        report |= {layer: left or "converted" for layer, left in found.items()}
    return report


def _outermost(module: nn.Module, name: str) -> list[tuple[str, PreTrainedModel]]:
    """Return the models of transformers that are in no other, by their names."""
    if isinstance(module, PreTrainedModel):
        return [(name, module)]
    children = ((f"{name}.{child}" if name else child, inside) for child, inside in module.named_children())
    return [found for child, inside in children for found in _outermost(inside, child)]


def _attentions(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
        and isinstance(getattr(module, "layer_idx", None), int)
    ]


def _left(layer: Any) -> str:
    """Return why a layer is left alone; nothing where it has a window of ours."""
    config, kinds = layer.config, getattr(layer.config, "layer_types", None)
    if kinds and layer.layer_idx < len(kinds):
        kind = str(kinds[layer.layer_idx])
    elif getattr(config, "sliding_window", None):
        kind = "sliding_attention"
    else:
        kind = "chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"
    try:
        need(kind in _WINDOWS, f"{kind.replace('_', ' ')} stays in SDPA")
        is_causal = getattr(layer, "is_causal", True) and getattr(config, "is_causal", True)
        need(is_causal or kind == "sliding_attention", "chunks that are seen in both directions stay in SDPA")
        need(getattr(config, "attn_logit_softcapping", None) is None, "its scores have a softcap")
    except DeclinedError as why:
        return str(why)
    return ""
