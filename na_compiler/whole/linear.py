"""Linear layers in Relax: matrix products with constant weights become calls of our scheduled function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import IRModule, relax, runtime, tirx
from tvm.relax.dpl import is_const, is_op, rewrite_call, wildcard

from na_compiler.target import CpuTarget
from na_compiler.whole.dense import dense, pack

__all__ = ["schedule_linear"]

_OPAQUE = 8  # OpPatternKind: nothing is fused with it.


def schedule_linear(module: IRModule, target: CpuTarget) -> tuple[IRModule, int]:
    """Replace products of float32 with constant matrices, and the addition of a constant bias.

    Parameters
    ----------
    module
        With a function ``main``.
    target
        What it is compiled for.

    Returns
    -------
    IRModule, int
        The module, and how many linear layers there are.
    """
    weight, bias, x = is_const(), is_const(), wildcard()
    turned = is_op("relax.permute_dims")(weight)
    product = is_op("relax.matmul")(x, turned | weight)
    with_bias = is_op("relax.add")(bias, product) | is_op("relax.add")(product, bias)
    builder = relax.BlockBuilder(module)
    made: dict[tuple[int, int, bool], Any] = {}
    count = 0

    def rewrite(call: Any, matches: Any) -> Any:
        nonlocal count
        matrix = matches[weight].value.numpy()
        offset = matches[bias].value.numpy() if bias in matches else None
        # A layer's weights are [outputs, inputs]; its product is with their transpose.
        matrix = matrix if turned in matches else np.swapaxes(matrix, -1, -2)
        source = matches[x]
        shape = list(source.ty.shape or ()) if isinstance(source.ty, relax.TensorType) else []
        if matrix.ndim != 2 or matrix.dtype != np.float32 or str(source.ty.dtype) != "float32" or len(shape) < 2:
            return call
        outputs, inputs = matrix.shape
        if offset is not None and offset.shape != (outputs,):
            return call
        at = inputs, outputs, offset is not None
        if at not in made:
            function = dense(inputs, outputs, target, has_bias=at[2]).with_attr("op_pattern", _OPAQUE)
            name = f"linear_{inputs}_{outputs}{'_bias' if at[2] else ''}"
            made[at] = builder.add_func(function.without_attr("global_symbol"), name)
        count += 1
        rows = math.prod(shape[1:-1], start=shape[0])
        flat = source if len(shape) == 2 else relax.op.reshape(source, (rows, tirx.IntImm("int64", inputs)))
        constants = [pack(matrix, target)] if offset is None else [pack(matrix, target), offset]
        arguments = [flat, *(relax.const(runtime.tensor(np.ascontiguousarray(value))) for value in constants)]
        result = relax.call_tir(made[at], arguments, relax.TensorType([rows, outputs], "float32"))
        return result if len(shape) == 2 else relax.op.reshape(result, (*shape[:-1], tirx.IntImm("int64", outputs)))

    main = module["main"]
    for pattern in (with_bias, product):
        main = rewrite_call(pattern, rewrite, main)
    module = builder.get()
    module["main"] = main
    return module, count
