"""From an exported program or an ONNX model to a Relax module with our attention in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from na_compiler import operands
from na_compiler.operands import PARAMETERS
from na_compiler.ops.schema import FORWARD
from na_compiler.passes import canonicalise
from na_compiler.whole.attention import Attention

__all__ = ["from_onnx", "from_program"]


def from_program(program: Any, attention: Attention) -> Any:
    """Import an exported program, which is canonicalised in place."""
    from tvm.relax.frontend.torch import from_exported_program  # noqa: PLC0415

    canonicalise(program)

    def convert(node: Any, importer: Any) -> Any:
        given = FORWARD.by_name(node.args) | dict(node.kwargs)
        nodes = {operand.name: given[operand.name] for operand in operands.inputs()}
        tensors = {name: None if one is None else importer.env[one] for name, one in nodes.items()}
        return attention.emit(importer.block_builder, given | tensors)

    converters: dict[str, Any] = {f"na{rank}d.default": convert for rank in (1, 2, 3)}
    converters |= _CORRECTED
    return from_exported_program(program, custom_convert_map=converters, unwrap_unit_return_tuple=True)


def _elu(node: Any, importer: Any) -> Any:
    """Convert ``elu(x, alpha, scale, input_scale)``, which selu is made of; TVM's importer leaves the scales out."""
    from tvm.relax import const, op  # noqa: PLC0415

    given = dict(enumerate(node.args)) | {
        ("alpha", "scale", "input_scale").index(k) + 1: v for k, v in node.kwargs.items()
    }
    x = importer.env[given[0]]
    alpha, scale, input_scale = (const(float(given.get(place, 1.0)), str(x.ty.dtype)) for place in (1, 2, 3))
    below = op.nn.relu(op.subtract(const(1.0, str(x.ty.dtype)), op.exp(op.multiply(input_scale, x))))
    whole = op.multiply(scale, op.subtract(op.nn.relu(x), op.multiply(alpha, below)))
    return importer.block_builder.emit(whole)


def _refused(node: Any, importer: Any) -> Any:  # noqa: ARG001 - as the importer calls it
    raise RuntimeError(f"{node.target} cannot be compiled: what TVM makes of it ends the process; sort would do")


# What TVM's importer gets wrong.
_CORRECTED = {
    "elu.default": _elu,
    "median.default": _refused,
    "median.dim": _refused,
}


def from_onnx(model: Any, attention: Attention) -> Any:
    """Import an ONNX model, canonicalised: an ``onnx_ir.Model``, that in place, or an ``onnx.ModelProto``."""
    import onnx_ir as ir  # noqa: PLC0415
    from tvm.relax.frontend import onnx as frontend  # noqa: PLC0415

    loaded = model if isinstance(model, ir.Model) else ir.from_proto(model)
    # A proto says only the name of a file of weights, not where it is.
    ir.external_data.load_to_model(loaded)
    canonicalise(loaded, bodies=False)
    with _converters(attention):
        return frontend.from_onnx(ir.to_proto(loaded), keep_params_in_input=False)


@contextlib.contextmanager
def _converters(attention: Attention) -> Iterator[None]:
    """Teach TVM's importer our operators while it runs. It has no public way to; a test pins this one."""
    from tvm.relax.frontend.onnx import onnx_frontend  # noqa: PLC0415

    def make(rank: int) -> Any:
        def convert(cls: Any, builder: Any, inputs: Any, attributes: Any, parameters: Any) -> Any:  # noqa: ARG001
            given = {name: attributes.get(name, [name != "is_causal"] * rank) for name in PARAMETERS}
            given |= {operand.name: attributes.get(operand.name) for operand in operands.scalars()}
            given |= {operand.name: attributes.get(operand.name) for operand in operands.words()}
            names = [operand.name for operand in operands.inputs()]
            return attention.emit(builder, given | dict(zip(names, inputs, strict=False)))

        return type(f"NA{rank}D", (onnx_frontend.OnnxOpConverter,), {"_impl_v1": classmethod(convert)})

    original = onnx_frontend._get_convert_map  # noqa: SLF001
    added = {f"NA{rank}D": make(rank) for rank in (1, 2, 3)}
    onnx_frontend._get_convert_map = lambda: {**original(), **added}  # noqa: SLF001
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = original  # noqa: SLF001
