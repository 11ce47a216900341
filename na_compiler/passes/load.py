"""From what a user has, a file or a function, to the sites of its model."""

from __future__ import annotations

import importlib
import logging
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_compiler.passes import canonicalise, collect
from na_compiler.passes.remember import remembered
from na_compiler.passes.sites import Site, Sites

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch.export import ExportedProgram

__all__ = ["export_all", "load_onnx", "load_program", "load_whole_model", "sites_of"]

_LOG = logging.getLogger("na_compiler")

Shapes = Sequence[Mapping[str, Sequence[int]]]


def sites_of(model: str, shapes: Shapes | None = None) -> Sites:
    """Return the sites of a model, canonicalised.

    Parameters
    ----------
    model
        A ``.pt2`` that ``torch.export.save`` wrote, an ``.onnx``, or ``package.module:function``. The function returns
        a model and example inputs: a tuple of positional ones, a dict of named ones, or a list of such for several
        resolutions.
    shapes
        Shapes of inputs by name, a mapping for each resolution, for what is dynamic in a file.

    Raises
    ------
    ValueError
        If the model cannot be read, or a shape does not fit it.
    FileNotFoundError
        If there is no such file.
    """
    if _is_function(model):
        if shapes:
            raise ValueError("--shape is for files; a function returns its example inputs, in a list for several")
        programs = export_all(model)
        found: dict[Site, None] = {}
        for program in programs:
            canonicalise(program)
            found |= dict.fromkeys(collect(program))
        return Sites(found)
    if Path(model).suffix == ".onnx":
        loaded = load_onnx(model)
        canonicalise(loaded, bodies=False)  # It is only looked at.
        return collect(loaded, shapes)
    return remembered(model, shapes, lambda: _sites_of_program(model, shapes))


def _sites_of_program(path: str, shapes: Shapes | None) -> Sites:
    program = load_program(path)
    canonicalise(program)
    return collect(program, shapes)


def load_whole_model(model: str) -> ExportedProgram | ir.Model:
    """Load a model with its weights: an exported program, or an ``onnx_ir.Model``.

    Raises
    ------
    FileNotFoundError, ValueError
        As `sites_of`.
    """
    if _is_function(model):
        programs = export_all(model)
        if len(programs) > 1:
            raise ValueError(f"--whole compiles for one shape of inputs, and {model} returns {len(programs)}")
        return programs[0]
    return load_onnx(model) if Path(model).suffix == ".onnx" else load_program(model)


def load_program(path: str) -> ExportedProgram:
    """Load an exported program.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no file {path}; MODEL is a .pt2 of torch.export.save, an .onnx, or package.module:function"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no exported program: write one with torch.export.save(program, 'model.pt2')")
    import torch  # noqa: PLC0415

    import na_compiler.bound  # noqa: F401, PLC0415 - registers the operators

    # A program that cannot be read is told in one sentence, torch's own warnings about it beside.
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an exported program: {_first_line(error)}") from error


def load_onnx(path: str) -> ir.Model:
    """Load an ONNX model; weights are not read before they are used.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        import onnx_ir  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"reading {path} needs onnx: pip install 'na-compiler[onnx]'") from error
    try:
        return onnx_ir.load(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an ONNX model: {_first_line(error)}") from error


def export_all(model: str) -> list[ExportedProgram]:
    """Export what ``package.module:function`` returns, once for each set of example inputs.

    Raises
    ------
    ValueError
        If there is no such function, it returns something else, or the model cannot be exported.
    """
    module, inputs = _call(model)
    programs = []
    import torch  # noqa: PLC0415

    from na_compiler.passes.natten import convert_modules  # noqa: PLC0415 - needs torch

    module = convert_modules(module, strict=False)[0].eval()
    for example in inputs if isinstance(inputs, list) else [inputs]:
        args, kwargs = ((), example) if isinstance(example, dict) else (_positional(example), {})
        try:
            with torch.no_grad():
                programs.append(torch.export.export(module, args, kwargs))
        except Exception as error:
            raise ValueError(f"{model} cannot be exported: {_first_line(error)}") from error
    return programs


def _positional(example: object) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)


def _call(model: str) -> tuple[torch.nn.Module, object]:
    path, _, name = model.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{model} cannot be found: {error}") from error
    import torch  # noqa: PLC0415

    returned = function()
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], torch.nn.Module):
        raise ValueError(f"{model} must return a torch.nn.Module and its example inputs, got {type(returned).__name__}")
    return returned


def _is_function(model: str) -> bool:
    path, colon, name = model.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in path.split("."))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
