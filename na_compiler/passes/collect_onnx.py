"""*collect* for ONNX models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from na_compiler.onnx.nodes import (
    Source,
    attention_nodes,
    check_version,
    load,
    located_nodes,
    name_of,
    node_signature,
    with_functions_inlined,
    with_shapes,
)
from na_compiler.passes.sites import Site, Sites

__all__ = ["collect_onnx"]

# Where torch's exporter says which modules a node came from.
_SCOPES = "pkg.torch.onnx.name_scopes"


def collect_onnx(model: Source, shapes: Iterable[Mapping[str, Sequence[int]]] | None = None) -> Sites:
    """Collect the sites of an ONNX model.

    Parameters
    ----------
    model
        An ``onnx_ir.Model``, a ``ModelProto`` or a path.
    shapes
        Shapes of inputs by name, one mapping for each resolution; default: the model's own.

    Raises
    ------
    ValueError
        If a shape does not fit the model, or a window does not fit a layout; the node is named.
    """
    loaded = load(model)
    check_version(loaded)
    loaded = with_functions_inlined(loaded)
    if shapes is None:
        return Sites(_sites(loaded, with_shapes(loaded)))
    found: dict[Site, None] = {}
    for one in shapes:
        found |= dict.fromkeys(_sites(loaded, with_shapes(_with_shapes(loaded, one))))
    return Sites(found)


def _sites(model: ir.Model, inferred: ir.Model) -> list[Site]:
    sites = []
    seen: set[str] = set()
    for (path, node), known in zip(located_nodes(model), attention_nodes(inferred), strict=True):
        layer = _layer(path, node)
        try:
            signature = node_signature(known)
            problem = signature.problem()
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        unknown = node_signature(node)
        original = unknown.shapes
        batch = (signature.shapes[0] or (None,))[0]
        operator = f"{node.domain}::{node.op_type}"
        # Nodes need no names, and may share one; values have names, and share none.
        name = name_of(node) if name_of(node) not in seen else node.outputs[0].name or ""
        seen.add(name)
        sites.append(
            Site(
                name, layer, operator, "forward", problem, _dynamic(original), batch, graph=path,
                open_problem=unknown.open_problem(),
            )
        )  # fmt: skip
    return sites


def _dynamic(shapes: Sequence[Sequence[int | None] | None]) -> tuple[str, ...]:
    query = shapes[0]
    if query is None:
        return ()
    names = ["batch", *(f"layout[{axis}]" for axis in range(len(query) - 3))]
    found = [name for name, size in zip(names, query, strict=False) if size is None]
    if len(shapes) > 3 and (shapes[3] is None or shapes[3][1] is None):
        found.append("additional")
    return tuple(found)


def _layer(path: str, node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes:
        # A list as Python spells it: the module's path from the outermost to the node's own.
        names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
        if len(names) > 1 and names[-2]:
            return names[-2]
    return f"{path}/{name_of(node)}" if path else name_of(node)


def _with_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """Return a copy of a model whose inputs have some shapes; all others are forgotten, to be inferred."""
    made = model.clone()
    inputs = {value.name: value for value in made.graph.inputs}
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ValueError(f"the model has no input {name!r}; its inputs are {', '.join(map(str, inputs))}")
        _set_shape(inputs[name], shape, symbols)
    for node in made.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    for value in made.graph.inputs:
        if value.name not in shapes and value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else symbols.get(str(size.value), size.value)
                                    for size in value.shape])  # fmt: skip
    return made


def _set_shape(value: ir.Value, shape: Sequence[int], symbols: dict[str, int]) -> None:
    """Give an input a shape that fits the one it has, and remember what its symbols are then."""
    sizes = list(value.shape) if value.shape is not None else [None] * len(shape)
    if len(sizes) != len(shape):
        raise ValueError(f"input {value.name} has {len(sizes)} dimensions, got shape {tuple(shape)}")
    for axis, (size, wanted) in enumerate(zip(sizes, shape, strict=True)):
        if isinstance(size, int):
            known = size
        else:
            symbol = None if size is None else size.value
            known = wanted if symbol is None else symbols.setdefault(symbol, wanted)
        if known != wanted:
            raise ValueError(
                f"dimension {axis} of input {value.name} is {known} in this model, got {wanted}; export it with that "
                f"dimension dynamic"
            )
    value.shape = ir.Shape(shape)
