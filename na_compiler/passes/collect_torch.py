"""*collect*: find every neighborhood attention of a model, and say which problem it poses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from na_compiler import operands
from na_compiler.borders import borders_per_axis
from na_compiler.checks import given_options
from na_compiler.passes.graph import Attention, attentions, graph_module, layer_of, tensor_of
from na_compiler.passes.sites import Site, Sites
from na_compiler.problem import Problem
from na_compiler.window import SHIFT

if TYPE_CHECKING:
    import sympy

__all__ = ["collect_torch", "site_of"]

_LOG = logging.getLogger("na_compiler")

# Along an axis: known, or a symbol of a graph with a dynamic layout.
Size = int | torch.SymInt
Shapes = Mapping[str, Sequence[int]]


def collect_torch(program: ExportedProgram | fx.GraphModule, shapes: Iterable[Shapes] | None = None) -> Sites:
    """Collect the sites of a torch graph.

    Parameters
    ----------
    program
        What to search; sizes are read from its nodes' metadata.
    shapes
        Shapes of inputs by name, one mapping for each resolution to compile for; default: the sizes that the program
        was exported with.

    Raises
    ------
    ValueError
        If a shape does not fit the program, or a window does not fit a layout; the layer is named.
    """
    module = graph_module(program)
    if shapes is None:
        return Sites(_sites(module, None))
    sites: dict[Site, None] = {}
    for one in shapes:
        sites |= dict.fromkeys(_sites(module, _solve(module, program, one)))
    return Sites(sites)


def _sites(module: fx.GraphModule, symbols: dict[sympy.Symbol, int] | None) -> Iterator[Site]:
    for found in attentions(module):
        try:
            yield site_of(found, symbols)
        except ValueError as error:
            # What is not ours may do what our kernels cannot: another dtype, another window.
            if found.is_ours or tensor_of(found.arguments["query"]) is None:
                raise
            _LOG.info("%s is left out: %s", found.operator, error)


def site_of(found: Attention, symbols: dict[sympy.Symbol, int] | None = None) -> Site:
    """Return the site of a node.

    Parameters
    ----------
    found
        The node, and what it is called with.
    symbols
        Values of the symbols in its sizes; default: those that the graph was exported with.
    """
    hints = symbols is None
    symbols = symbols or {}
    layer = layer_of(found.node, found.graph)
    query, key, value = (_sizes(found.arguments[name]) for name in ("query", "key", "value"))
    extra = _sizes(found.arguments["additional_keys"])
    if query is None or key is None or value is None:
        raise ValueError(
            f"{layer}: the graph says no shapes for {found.node.name}; run torch.fx.passes.shape_prop.ShapeProp on it, "
            f"or export it with torch.export"
        )
    flat = _flat_layout(found, query)
    names = ["batch", *(f"layout[{axis}]" for axis in range(found.rank))]
    sizes = [query[0], *(flat or query[1 : 1 + found.rank])]
    dynamic = [name for name, size in zip(names, sizes, strict=True) if not isinstance(size, int)]
    if extra is not None and not isinstance(extra[1], int):
        dynamic.append("additional")
    known = [_value(size, symbols, hints=hints) for size in sizes]
    problem, parameters = None, _parameters(found, symbols, hints=hints)
    layout = [size for size in known[1:] if size is not None]
    if len(layout) == found.rank and parameters is not None:
        # Heads too are dynamic under torch.compile(dynamic=True).
        shapes = [[_value(size, symbols, hints=hints) for size in sizes] for sizes in (query, key, value)]
        problem = _problem(found, parameters, layer, layout, *shapes)
    device = getattr(tensor_of(found.arguments["query"]), "device", None)
    kind = "cpu" if device is None else device.type
    # Of the layout of the example, other borders may be the same as "shift"; of all layouts they are not.
    is_shifted = set(borders_per_axis(found.arguments["border"], found.rank)) == {SHIFT}
    is_open = is_shifted and any(name.startswith("layout") for name in dynamic)
    where = (tuple(dynamic), known[0], kind, found.graph, problem.opened() if problem is not None and is_open else None)
    return Site(found.node.name, layer, found.operator, found.direction, problem, *where)


def _parameters(found: Attention, symbols: dict[sympy.Symbol, int], *, hints: bool) -> dict[str, Any] | None:
    """Return kernel_size, stride, dilation and is_causal; ``None`` if one depends on a size that is not known."""
    parameters: dict[str, Any] = {}
    for name in operands.PARAMETERS:
        given = found.arguments[name]
        if isinstance(given, (list, tuple)):
            given = [_value(tensor_of(one), symbols, hints=hints) if isinstance(one, fx.Node) else one for one in given]
            if None in given:
                return None
        parameters[name] = given
    return parameters


def _problem(
    found: Attention,
    parameters: dict[str, Any],
    layer: str,
    layout: list[int],
    query: Sequence[Any],
    key: Sequence[Any],
    value: Sequence[Any],
) -> Problem:
    try:
        options = given_options({operand.name: found.arguments.get(operand.name) for operand in operands.later()})
        return Problem(
            layout=tuple(layout),
            heads=query[-2],
            head_dim=query[-1],
            heads_kv=key[-2],
            head_dim_v=value[-1],
            additional_kv=operands.ADDITIONAL_KV in options,
            operands=tuple(option for option in options if option != operands.ADDITIONAL_KV),
            dtype=tensor_of(found.arguments["query"]).dtype,
            border=found.arguments["border"],
            **parameters,
        )
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None


def _flat_layout(found: Attention, query: Sequence[Size]) -> list[int] | None:
    """Return the layout where tokens come flattened and the layout beside them, as to one of NATTEN's operators."""
    layout = found.arguments.get("qkv_shape")
    return list(layout) if layout is not None and len(query) != found.rank + 3 else None


def _sizes(argument: object) -> Sequence[Size] | None:
    tensor = tensor_of(argument)
    return None if tensor is None else tuple(tensor.shape)


def _value(size: Size | None, symbols: dict[sympy.Symbol, int], *, hints: bool) -> int | None:
    if size is None or isinstance(size, int):
        return size
    value = size.node.expr.subs(symbols)
    if value.is_number:
        return int(value)
    hint = size.node.hint if hints else None
    return None if hint is None else int(hint)


def _solve(module: fx.GraphModule, program: object, shapes: Shapes) -> dict[sympy.Symbol, int]:
    """Return the values that the symbols of a graph have for some shapes of its inputs."""
    inputs = {node.name: node for node in module.graph.find_nodes(op="placeholder")}
    symbols: dict[sympy.Symbol, int] = {}
    dimensions: list[tuple[str, int, Size, int]] = []
    for name, shape in shapes.items():
        if name not in inputs:
            users = program.graph_signature.user_inputs if isinstance(program, ExportedProgram) else inputs
            raise ValueError(f"the model has no input {name!r}; its inputs are {', '.join(map(str, users))}")
        sizes = _sizes(inputs[name]) or ()
        if len(sizes) != len(shape):
            example = "x".join(str(_value(size, {}, hints=True) or 1) for size in sizes)
            raise ValueError(
                f"input {name} has {len(sizes)} dimensions, got shape {tuple(shape)}; e.g. {name}={example}"
            )
        dimensions += [(name, axis, *sizes_) for axis, sizes_ in enumerate(zip(sizes, shape, strict=True))]
    # Sizes that are a symbol first: one such as 8 * s0 + s1 gives its last symbol once the others are known.
    for _, _, size, wanted in sorted(dimensions, key=lambda dimension: _symbols(dimension[2])):
        _learn(size, wanted, symbols)
    for name, axis, size, wanted in dimensions:
        value = _value(size, symbols, hints=False)
        if value != wanted:
            what = f"is {value}" if isinstance(size, int) else f"must be of the form {size.node.expr}"
            raise ValueError(
                f"dimension {axis} of input {name} {what} in this model, got {wanted}; export it with that dimension "
                f"dynamic, or with inputs of that shape"
            )
    return symbols


def _symbols(size: Size) -> int:
    return 0 if isinstance(size, int) else len(size.node.expr.free_symbols)


def _learn(size: Size, wanted: int, symbols: dict[sympy.Symbol, int]) -> None:
    """Note the value of the one symbol that is unknown in a size, if it is linear in it."""
    if isinstance(size, int):
        return
    expression = size.node.expr.subs(symbols)
    if len(expression.free_symbols) == 1:
        symbol = next(iter(expression.free_symbols))
        at_zero, at_one = (expression.subs({symbol: value}) for value in (0, 1))
        if at_one != at_zero:
            solution = (wanted - at_zero) / (at_one - at_zero)
            if solution.is_integer and expression.subs({symbol: int(solution)}) == wanted:
                symbols[symbol] = int(solution)
