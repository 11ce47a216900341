"""``nn.MultiheadAttention`` in Dynamo's graphs is one node; with a mask it becomes what it is made of."""

from __future__ import annotations

import inspect
import logging
import operator

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.graph import attempt, fake_mode_of, layer_of, propagate, replace_node, tensor_of

__all__ = ["open_multi_head"]

_LOG = logging.getLogger("na_compiler")
# What layers of torch call where no gradient is wanted.
_FAST = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}


def open_multi_head(module: fx.GraphModule) -> int:
    """Put the operators of multi-head attention with a mask in the place of its node; returns how many there were.

    Weights that nobody reads are not asked for: then it is made of scaled_dot_product_attention.
    """
    count = 0
    for node in list(module.graph.nodes):
        if getattr(node.target, "__name__", "") in _FAST:
            _LOG.info(
                "%s: it is one operator of torch's for inference, which passes do not look into: "
                "torch.backends.mha.set_fastpath_enabled(False) would do", layer_of(node),
            )  # fmt: skip
        if node.target is not functional.multi_head_attention_forward:
            continue
        try:
            with attempt(node.graph):
                _open(node)
            count += 1
        except DeclinedError as why:
            _LOG.info("%s: multi-head attention stays as it is: %s", layer_of(node), why)
    return count


def _open(node: fx.Node) -> None:
    bound = inspect.signature(functional.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    arguments = dict(bound.arguments)
    need(arguments.get("attn_mask") is not None, "it has no mask")
    read = [user.args[1] for user in node.users if user.target is operator.getitem]
    need(read == [0] and len(node.users) == 1, "its weights are read as well")
    arguments["need_weights"] = False
    nodes = {name: value for name, value in arguments.items() if isinstance(value, fx.Node)}
    tensors = {name: tensor_of(value) for name, value in nodes.items()}
    need(all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()), "the graph does not say its tensors")

    def attend(given: dict[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = functional.multi_head_attention_forward(**arguments | given)[0]
        return output

    mode = fake_mode_of(tensors)
    need(mode is not None, "the graph has no fake tensors")
    assert mode is not None
    with mode:
        inside = make_fx(attend, pre_dispatch=True)(tensors)
    (attended,) = node.users
    with node.graph.inserting_before(node):
        made = _copied(inside, list(nodes.values()), node)
    replace_node(attended, made)
    node.graph.erase_node(node)


def _copied(inside: fx.GraphModule, inputs: list[fx.Node], like: fx.Node) -> fx.Node:
    """Copy a graph in front of a node, and return what it returns."""
    made: dict[fx.Node, fx.Node] = dict(zip(inside.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in inside.graph.nodes:
        if node.op == "output":
            (returned,) = node.all_input_nodes
            return made[returned]
        if node.op != "placeholder":
            need(node.op == "call_function", "it is made of more than operators")
            made[node] = like.graph.node_copy(node, made.__getitem__)
            propagate(made[node], like)
    raise DeclinedError("it returns nothing")
