"""A stand-in for NATTEN: modules, functions and operators of its names, computed by our reference.

The passes know NATTEN by its names and never import it; neither do the tests.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import nn

from na_compiler.reference import neighborhood_attention


def _function(rank):
    def function(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None,
                 additional_keys=None, additional_values=None, return_lse=False):  # fmt: skip
        output, lse = neighborhood_attention(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
        )
        return (output, lse) if return_lse else output

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__module__ = "natten.functional"
    return function


class _Attention(nn.Module):
    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False):
        super().__init__()
        self.num_heads, self.scale = num_heads, (embed_dim // num_heads) ** -0.5
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        shape = (*x.shape[:-1], 3, self.num_heads, x.shape[-1] // self.num_heads)
        axes = len(x.shape)
        query, key, value = self.qkv(x).reshape(shape).permute(axes - 1, *range(axes - 1), axes, axes + 1)
        parameters = (self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        output = self.function(query, key, value, *parameters)
        return self.proj_drop(self.proj(output.reshape(x.shape)))


def make(package_name="natten"):
    """Return the modules of the package, by name, and its three layers; loaded from a model hub it has another name."""
    names = (f"{package_name}{name}" for name in ("", ".functional", ".modules"))
    package, functional, modules = map(types.ModuleType, names)
    layers = {}
    for rank in (1, 2, 3):
        function = _function(rank)
        function.__module__ = functional.__name__
        setattr(functional, f"na{rank}d", function)
        name = f"NeighborhoodAttention{rank}D"
        layers[rank] = type(name, (_Attention,), {"function": staticmethod(function), "__module__": modules.__name__,
                                                  "forward": _Attention.forward})  # fmt: skip
        setattr(modules, name, layers[rank])
    package.functional, package.modules = functional, modules
    return {module.__name__: module for module in (package, functional, modules)}, layers


def register_operators(library, namespace="natten"):
    """Register NATTEN's operators of rank 2: the plain one, and the reference, which takes flattened tokens."""
    dense = (
        "(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "
    )
    library.define(f"na2d_forward{dense}float scale, int[] q_tile_shape, int[] kv_tile_shape) -> (Tensor, Tensor)")
    library.define(f"reference_na2d_forward{dense}float scale, int[] qkv_shape, int num_extra_kv) -> (Tensor, Tensor)")

    def forward(query, key, value, kernel_size, stride, dilation, is_causal, scale, *tiles):
        return neighborhood_attention(query, key, value, kernel_size, stride, dilation, is_causal, scale)

    def reference(query, key, value, kernel_size, stride, dilation, is_causal, scale, shape, extra):
        tensors = [tensor.unflatten(1, shape) for tensor in (query, key, value)]
        output, lse = neighborhood_attention(*tensors, kernel_size, stride, dilation, is_causal, scale)
        return output.flatten(1, 2), lse.flatten(1, 2)

    def fake(query, key, value, *parameters):
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        return output, query.new_empty(query.shape[:-1], dtype=torch.float32)

    library.impl("na2d_forward", forward, "CPU")
    library.impl("reference_na2d_forward", reference, "CPU")
    for name in ("na2d_forward", "reference_na2d_forward"):
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)


def install(monkeypatch):
    """Put the package where ``import natten`` finds it; returns its three layers."""
    modules, layers = make()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return layers
