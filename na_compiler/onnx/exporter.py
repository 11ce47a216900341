"""`export`: from a torch model to an ONNX file that every runtime can run; and the table for ``torch.onnx.export``."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from na_compiler.onnx.bodies import BODIES, add_bodies, inline_bodies
from na_compiler.onnx.nodes import attention_nodes, node_signature
from na_compiler.onnx.signature import DOMAIN, INPUTS, OPERATORS, VERSION
from na_compiler.operands import PARAMETERS, scalars, words
from na_compiler.ops.operators import OPERATORS as TORCH_OPERATORS
from na_compiler.ops.schema import FORWARD

__all__ = ["export", "translation_table"]

_LOG = logging.getLogger("na_compiler")
_OPSET = 21
# Attributes of numbers, by their dtype.
_NUMBERS: Mapping[str, Callable[[Any], float | int]] = {"float32": float, "int64": int}
# A file of ONNX holds at most 2 GiB. Weights go beside it long before: who only looks at the graph need not read them.
_EXTERNAL_BYTES = 100 << 20


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    path: str | os.PathLike[str] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    body: str = "generic",
    standard: bool = False,
    opset: int = _OPSET,
    external_data: bool | None = None,
) -> torch.onnx.ONNXProgram:
    """Export a model; neighborhood attention becomes operators of the domain ``na_compiler``, with bodies.

    Parameters
    ----------
    model
        With modules of this package or calls of `na_compiler.na1d`, `na2d` and `na3d`; or exported already. It is put
        in ``eval`` mode while it is exported; after that each of its modules has the mode again that it had.
    args, kwargs
        Inputs to trace it with. Nothing is compiled and no kernel runs.
    path
        The file to write; default none: only the program is returned.
    dynamic_shapes
        As for ``torch.export.export``. A dynamic batch needs nothing else. A dynamic layout runs with the generic body
        only: kernels are compiled for one layout.
    input_names, output_names
        Names in the file.
    body
        ``"generic"``: right for every layout. ``"blocked"``: for fixed layouts, with a fraction of the time and memory
        in runtimes that do not have the operator library.
    standard
        Whether bodies take the nodes' places: a file of ONNX's own operators only, for importers that do not know
        functions (OpenVINO's, TVM's). No runtime computes it with the kernels of this package.
    opset
        Version of ONNX's own operators, 18 or later.
    external_data
        Whether weights go to a file of their own beside ``path``, ``path`` and ``.data``. Default: where they take more
        than 100 MiB.

    Returns
    -------
    torch.onnx.ONNXProgram
        Its ``model`` is an ``onnx_ir.Model``.

    Raises
    ------
    ValueError
        For another body, an opset under 18, or an operand that bodies do not compute.

    Examples
    --------
    >>> import torch
    >>> from na_compiler import NeighborhoodAttention2D
    >>> layer = NeighborhoodAttention2D(embed_dim=32, num_heads=2, kernel_size=3)
    >>> program = export(layer, (torch.randn(2, 8, 8, 32),), "layer.onnx")  # doctest: +SKIP
    """
    if body not in BODIES:
        raise ValueError(f"body must be one of {', '.join(BODIES)}, got {body!r}")
    if opset < 18:
        raise ValueError(f"opset must be at least 18, got {opset}; {_OPSET} would work")
    with _evaluating(model):
        program = torch.onnx.export(
            model,
            tuple(args),
            kwargs=dict(kwargs) if kwargs else None,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=translation_table(),
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    assert program is not None
    if standard:
        program.model = inline_bodies(program.model, body)
    else:
        add_bodies(program.model, body)
    _warn_of_bfloat16(program.model)
    if path is not None:
        if external_data is None:
            size = sum(
                value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value
            )
            external_data = size > _EXTERNAL_BYTES
        program.save(Path(path), external_data=external_data)
    return program


@contextlib.contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Put a model in ``eval`` mode, and each of its modules back in its own: some may be frozen."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [(module, module.training) for module in modules]
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``, for who calls it without `export`.

    The model that it makes has no bodies: `add_bodies` adds them, or it runs with the operator library only.

    Examples
    --------
    >>> torch.onnx.export(model, args, custom_translation_table=translation_table())  # doctest: +SKIP
    """
    return {TORCH_OPERATORS[rank]: _translation(operator) for operator, rank in OPERATORS.items()}


def _translation(operator: str) -> Callable[..., Any]:
    operators = onnxscript.values.Opset(DOMAIN, VERSION)

    def translate(*arguments: object, **named: object) -> object:
        """Make a node of what torch's operator is called with."""
        given = FORWARD.by_name(arguments) | named
        inputs = [given[name] for name in INPUTS]
        while inputs[-1] is None:  # Absent ones between others are there without a name.
            inputs.pop()
        attributes = {name: list(map(int, given[name])) for name in PARAMETERS}
        numbers = {o.name: _NUMBERS[o.dtype](given[o.name]) for o in scalars() if given[o.name] is not None}
        said = {o.name: given[o.name] for o in words() if given[o.name] != o.default}
        return getattr(operators, operator)(*inputs, **attributes, **numbers, **said, _outputs=len(FORWARD.results))

    return translate


def _warn_of_bfloat16(model: ir.Model) -> None:
    if any("bfloat16" in node_signature(node).dtypes for node in attention_nodes(model)):
        _LOG.warning(
            "the model computes in bfloat16: without the operator library it runs only where the runtime has bfloat16 "
            "for all of its operators (ONNX Runtime's CPU provider does not); export in float32 or float16 for the rest"
        )
