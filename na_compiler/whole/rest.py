"""Everything of a model that is neither attention nor a linear layer: elementwise functions, norms, copies.

Relax lowers each operator to a loop nest, fuses what is elementwise, and leaves the loops as they are: on one thread,
without vectors, and calling libm for each exponential. Here the functions that models use get forms that vectorise, and
all loop nests one simple schedule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from tvm import IRModule, relax, s_tir, te, tirx, topi
from tvm.tirx import IterVar

from na_compiler.target import CpuTarget
from na_compiler.tensorir.arithmetic import LOG2_E, exp2
from na_compiler.whole.order import ORDERED, ordered

__all__ = ["legalize", "schedule_rest"]

Expr = Any


# ---- Functions that vectorise --------------------------------------------------------------------------------------


def _float(value: float) -> Expr:
    return tirx.const(value, "float32")


def _exp_negative(x: Expr) -> Expr:
    """Return ``exp(x)`` for ``x <= 0``."""
    return exp2(x * _float(LOG2_E))


def _sigmoid(x: Expr) -> Expr:
    power = _exp_negative(-tirx.abs(x))
    return tirx.Select(x >= _float(0), _float(1), power) / (_float(1) + power)


def _odd(x: Expr, limit: float, coefficients: tuple[float, ...], beyond: Expr) -> Expr:
    """Return an odd function: near 0 by its series, as ``1 - small`` would cancel there; ``beyond`` is of ``|x|``."""
    square = x * x
    series = _float(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series = series * square + _float(coefficient)
    signed = tirx.Select(x >= _float(0), beyond, -beyond)
    return tirx.Select(tirx.abs(x) < _float(limit), x * series, signed)


def _tanh(x: Expr) -> Expr:
    power = _exp_negative(_float(-2) * tirx.abs(x))
    return _odd(x, 0.125, (1, -1 / 3, 2 / 15, -17 / 315), (_float(1) - power) / (_float(1) + power))


def _erf(x: Expr) -> Expr:
    """Return the error function to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    size = tirx.abs(x)
    t = _float(1) / (_float(1) + _float(0.3275911) * size)
    series = _float(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + _float(coefficient)
    scale = 2 / math.sqrt(math.pi)
    taylor = (scale, -scale / 3, scale / 10, -scale / 42, scale / 216)
    return _odd(x, 0.4, taylor, _float(1) - series * t * _exp_negative(-(size * size)))


def _gelu(x: Expr) -> Expr:
    return _float(0.5) * x * (_float(1) + _erf(x * _float(math.sqrt(0.5))))


def _gelu_tanh(x: Expr) -> Expr:
    inner = _float(math.sqrt(2 / math.pi)) * (x + _float(0.044715) * x * x * x)
    return x * _sigmoid(_float(2) * inner)


# Limits are selections, whose comparisons NaN fails: TensorIR's maximum may return either operand beside NaN.
def _relu(x: Expr) -> Expr:
    return tirx.Select(x < _float(0), _float(0), x)


def _clip(low: float, high: float) -> Callable[[Expr], Expr]:
    return lambda x: tirx.Select(x < _float(low), _float(low), tirx.Select(x > _float(high), _float(high), x))


_ELEMENTWISE: dict[str, Callable[[Expr], Expr]] = {
    "relax.sigmoid": _sigmoid,
    "relax.tanh": _tanh,
    "relax.erf": _erf,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.relu": _relu,
    "relax.nn.silu": lambda x: x * _sigmoid(x),
}


def _elementwise(name: str, function: Callable[[Expr], Expr]) -> Any:
    def legalized(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        if str(call.args[0].ty.dtype) != "float32":
            return _default(name)(builder, call)

        def compute(x: te.Tensor) -> te.Tensor:
            return te.compute(x.shape, lambda *index: function(x[index]), name=name.rpartition(".")[2])

        return builder.call_te(compute, call.args[0], primfunc_name_hint=name.rpartition(".")[2])

    return legalized


def _clipped(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    try:
        low, high = (float(limit.value) for limit in call.args[1:])
    except TypeError:  # A symbol.
        return _default("relax.clip")(builder, call)
    return _elementwise("relax.clip", _clip(low, high))(builder, call)


def _of_two(name: str, wins: Callable[[Any, Any], Any]) -> Any:
    """Lower a maximum or minimum; TensorIR's own may return either operand where one is NaN."""

    def legalized(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        if str(call.ty.dtype) != "float32":
            return _default(name)(builder, call)

        def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
            return topi.where(topi.logical_or(wins(b, a), topi.isnan(b)), b, a)

        return builder.call_te(compute, *call.args, primfunc_name_hint=name.rpartition(".")[2])

    return legalized


def _not_equal(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Lower a comparison by which NaN differs from itself: LLVM gets one from TVM that is false beside NaN."""

    def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        same = topi.cast(topi.equal(a, b), "int8")
        return topi.cast(topi.subtract(topi.full_like(same, 1), same), "bool")

    return builder.call_te(compute, *call.args, primfunc_name_hint="not_equal")


def _default(name: str) -> Any:
    from tvm.ir import Op  # noqa: PLC0415

    return Op.get(name).get_attr("FLegalize")


def _layer_norm(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Lower a layer norm over the last axis; sums go through partial ones, a vector wide, so that they vectorise."""
    x, gamma, beta = call.args
    axes = [int(axis) for axis in call.attrs.axes]
    rank = len(x.ty.shape)
    width = x.ty.shape[-1]
    is_last = axes in ([-1], [rank - 1])
    lanes = next((lanes for lanes in (16, 8, 4) if isinstance(width, tirx.IntImm) and int(width) % lanes == 0), None)
    if not is_last or lanes is None or str(x.ty.dtype) != "float32":
        return _default("relax.nn.layer_norm")(builder, call)
    count, epsilon = int(width), float(call.attrs.epsilon)
    center, scale = bool(call.attrs.center), bool(call.attrs.scale)

    def compute(x: te.Tensor, gamma: te.Tensor, beta: te.Tensor) -> te.Tensor:
        outer = x.shape[:-1]

        def total(value: Callable[..., Expr], name: str) -> te.Tensor:
            part = te.reduce_axis((0, count // lanes), "part")
            partial = te.compute(
                (*outer, lanes),
                lambda *i: te.sum(value(*i[:-1], part * lanes + i[-1]), axis=part),
                name=f"{name}_parts",
            )
            lane = te.reduce_axis((0, lanes), "lane")
            return te.compute(outer, lambda *i: te.sum(partial[(*i, lane)], axis=lane), name=name)

        mean = total(lambda *i: x[i], "sum")

        def deviation(*i: Expr) -> Expr:
            return x[i] - mean[i[:-1]] * _float(1 / count)

        square = total(lambda *i: deviation(*i) * deviation(*i), "square")

        def normal(*i: Expr) -> Expr:
            value = deviation(*i) * tirx.rsqrt(square[i[:-1]] * _float(1 / count) + _float(epsilon))
            value = value * gamma[i[-1]] if scale else value
            return value + beta[i[-1]] if center else value

        return te.compute(x.shape, normal, name="normal")

    return builder.call_te(compute, x, gamma, beta, primfunc_name_hint="layer_norm")


def legalize(module: IRModule) -> IRModule:
    """Lower all operators to functions, and fuse what is elementwise."""
    custom = {name: _elementwise(name, function) for name, function in _ELEMENTWISE.items()}
    custom["relax.clip"] = _clipped
    custom["relax.maximum"] = _of_two("relax.maximum", topi.greater)
    custom["relax.minimum"] = _of_two("relax.minimum", topi.less)
    custom["relax.not_equal"] = _not_equal
    custom["relax.nn.layer_norm"] = _layer_norm
    custom |= {name: ordered(name, _default(name)) for name in ORDERED}
    module = relax.transform.LegalizeOps(custom)(module)
    for transform in (
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ):
        module = transform(module)
    return module


# ---- One schedule for all ------------------------------------------------------------------------------------------


def schedule_rest(module: IRModule, target: CpuTarget) -> IRModule:
    """Schedule the functions that are not yet: parallel over all but the last axis, which is vectorised."""
    for variable, function in list(module.functions_items()):
        if isinstance(function, tirx.PrimFunc) and not (function.attrs or {}).get("tirx.is_scheduled"):
            module[variable] = _scheduled(function, target.vector)
    return module


def _scheduled(function: tirx.PrimFunc, vector: int) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(IRModule({"main": function}))
    root = schedule.get_sblock("root", func_name="main") if _has_root(schedule) else None
    if root is None:
        return function
    blocks = schedule.get_child_blocks(root)
    kept = []
    for block in blocks:
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            kept.append(block)
    if not kept:
        return function
    last = kept[-1]
    loops = schedule.get_loops(last)
    spatial = _spatial(schedule, last)
    if not spatial or len(loops) < len(spatial):
        return function
    outer = loops[: len(spatial) - 1] if len(spatial) == len(loops) and len(loops) > 1 else loops[: len(spatial)]
    with contextlib.suppress(s_tir.ScheduleError):
        at = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
        # What the last block needs of a row is computed where the row is.
        for block in reversed(kept[:-1]):
            with contextlib.suppress(s_tir.ScheduleError):
                schedule.compute_at(block, at, preserve_unit_loops=True)
        schedule.parallel(at)
    for block in kept:
        with contextlib.suppress(s_tir.ScheduleError):
            _vectorize(schedule, block, vector)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def _has_root(schedule: s_tir.Schedule) -> bool:
    try:
        schedule.get_sblock("root", func_name="main")
    except (s_tir.ScheduleError, ValueError, RuntimeError):
        return False
    return True


def _spatial(schedule: s_tir.Schedule, block: Any) -> list[Any]:
    return [iterator for iterator in schedule.get(block).iter_vars if iterator.iter_type == IterVar.DataPar]


def _vectorize(schedule: s_tir.Schedule, block: Any, vector: int) -> None:
    """Vectorise the last spatial loop of a block, inside of its reductions."""
    kinds = [iterator.iter_type for iterator in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    own = loops[len(loops) - len(kinds) :] if len(loops) >= len(kinds) else loops
    reduced = kinds.count(IterVar.CommReduce)
    spatial = own[: len(own) - reduced]
    if not spatial:
        return
    extent = schedule.get(spatial[-1]).extent
    if not isinstance(extent, tirx.IntImm):
        return
    width = next((width for width in (2 * vector, vector, vector // 2) if width and int(extent) % width == 0), None)
    if width is None:
        return
    loop = spatial[-1]
    if int(extent) != width:
        _, loop = schedule.split(loop, [None, width])
    if reduced:
        schedule.reorder(*own[len(own) - reduced :], loop)
        schedule.decompose_reduction(block, own[len(own) - reduced])
    schedule.vectorize(loop)
