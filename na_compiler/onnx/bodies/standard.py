"""`inline_bodies`: a model of ONNX's own operators only, for readers that do not know functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass, ShapeInferencePass

from na_compiler.onnx.bodies.attach import add_bodies
from na_compiler.onnx.signature import DOMAIN

__all__ = ["inline_bodies"]

# Constant's ways to say a tensor other than by one, and of what type it is then. Not every importer knows them.
_FIELDS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}


def inline_bodies(model: ir.Model, body: str = "generic") -> ir.Model:
    """Put a body in the place of each of the operators' nodes.

    Parameters
    ----------
    model
        Is left as it was, apart from what `add_bodies` does to it.
    body
        See `add_bodies`.

    Returns
    -------
    ir.Model
        Without the domain: for OpenVINO, TVM's importer, and whatever else does not know functions. It has no kernels
        of this package in any runtime.

    Raises
    ------
    ValueError
        As `add_bodies`.

    Examples
    --------
    >>> ir.save(inline_bodies(ir.load("layer.onnx"), "blocked"), "layer.standard.onnx")  # doctest: +SKIP
    """
    add_bodies(model, body)
    made = InlinePass(lambda function: function.domain == DOMAIN)(model.clone()).model
    for identifier in [identifier for identifier in made.functions if identifier[0] == DOMAIN]:
        del made.functions[identifier]
    for node in made.graph.all_nodes():
        _spell_out(node)
    ShapeInferencePass(strict_mode=False, data_prop=True)(made)
    for node in list(made.graph.all_nodes()):
        _drop_cast(node)
    made.opset_imports.pop(DOMAIN, None)
    for function in made.functions.values():
        function.opset_imports.pop(DOMAIN, None)
    # Tables that several nodes share, and lse where nobody reads it.
    RemoveUnusedNodesPass()(made)
    return made


def _drop_cast(node: ir.Node) -> None:
    """Let the readers of a cast to the type that a value has already read that. Converters to float16 take it amiss."""
    if node.domain or node.op_type not in {"Cast", "CastLike"} or node.outputs[0].is_graph_output():
        return
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return
    if node.op_type == "Cast":
        wanted = node.attributes.get_int("to", 0)
    else:
        like = node.inputs[1]
        wanted = 0 if like is None or like.dtype is None else int(like.dtype)
    if wanted == int(source.dtype):
        ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _spell_out(node: ir.Node) -> None:
    """Let a Constant have a tensor for its value."""
    if node.op_type != "Constant" or node.domain:
        return
    for field, dtype in _FIELDS.items():
        attribute = node.attributes.get(field)
        if attribute is not None and not attribute.is_ref():
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, dtype)))
            del node.attributes[field]
