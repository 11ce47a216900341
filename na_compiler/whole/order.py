"""Maxima, minima and orders with NaN as torch has it: the result of a maximum and of a minimum, and greatest in order.

TensorIR's own maximum may return either operand beside NaN, and a sort by ``<`` goes wrong where there is one. Here
they are computed on integers of the same order: the bits of a float, those of a negative number the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, te, tirx

__all__ = ["ORDERED", "ordered"]

# The operators, and whether NaN is the greatest or the least of what they compare.
ORDERED: dict[str, bool] = {
    "relax.argmax": True,
    "relax.argmin": False,
    "relax.argsort": True,
    "relax.bucketize": True,
    "relax.max": True,
    "relax.min": False,
    "relax.nn.max_pool1d": True,
    "relax.nn.max_pool2d": True,
    "relax.nn.max_pool3d": True,
    "relax.sort": True,
    "relax.topk": True,
}
_BITS = {"float32": 32, "float64": 64}


def ordered(name: str, default: Callable[[relax.BlockBuilder, relax.Call], Any] | None) -> Any:
    """Return how an operator is lowered: as it is otherwise, to integers of the same order.

    Parameters
    ----------
    name
        Of `ORDERED`.
    default
        How it is lowered otherwise; ``None`` for those that TVM lowers in a later pass.
    """

    def legalized(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        dtype = str(call.args[0].ty.dtype)
        if "float" not in dtype:
            return call if default is None else default(builder, call)
        make = functools.partial(_keys, width=_BITS.get(dtype, 32), nan_is_greatest=ORDERED[name])
        compared = call.args if name == "relax.bucketize" else call.args[:1]
        keys = [builder.emit(builder.call_te(make, one, primfunc_name_hint="keys")) for one in compared]
        again = builder.normalize(relax.Call(call.op, [*keys, *call.args[len(keys) :]], call.attrs, call.ty_args))
        result = builder.emit(again if default is None else default(builder, again))

        if name.startswith(("relax.arg", "relax.bucketize")) or (
            name == "relax.topk" and call.attrs.ret_type == "indices"
        ):
            return result  # Places.

        def floats(one: Any) -> Any:
            return builder.call_te(functools.partial(_floats, dtype=dtype), one, primfunc_name_hint="floats")

        if isinstance(result.ty, relax.TupleType):
            # Values first, of those that have both.
            values, places = (builder.emit(relax.TupleGetItem(result, i)) for i in range(2))
            return relax.Tuple([builder.emit(floats(values)), places])
        return floats(result)

    return legalized


def _turned(bits: Any, width: int) -> Any:
    """Return a float's bits as an integer of its order, and the other way round."""
    kind = f"int{width}"
    return bits ^ ((bits >> tirx.const(width - 1, kind)) & tirx.const(2 ** (width - 1) - 1, kind))


def _keys(x: te.Tensor, width: int, nan_is_greatest: bool) -> te.Tensor:
    kind, top = f"int{width}", 2 ** (width - 1)
    infinity = np.array(np.inf, f"float{width}").view(kind).item()
    nan = tirx.const(top - 1 if nan_is_greatest else -top, kind)

    def key(*index: Any) -> Any:
        # Of integers alone: TensorIR takes ``x != x`` for false, and ``x + 0`` for x.
        bits = tirx.reinterpret(kind, x[index].astype(f"float{width}"))
        size = bits & tirx.const(top - 1, kind)
        number = tirx.Select(size == tirx.const(0, kind), size, _turned(bits, width))  # 0 and -0 are equal.
        return tirx.Select(size > tirx.const(infinity, kind), nan, number)

    return te.compute(x.shape, key, name="keys")


def _floats(keys: te.Tensor, dtype: str) -> te.Tensor:
    width = int(str(keys.dtype).removeprefix("int"))

    def value(*index: Any) -> Any:
        return tirx.reinterpret(f"float{width}", _turned(keys[index], width)).astype(dtype)

    return te.compute(keys.shape, value, name="floats")
