"""`compile_whole`: imports a model, schedules all of it, writes a library."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from na_compiler.problem import Problem
from na_compiler.runtime.host import c_compiler
from na_compiler.target import CpuTarget, Target

__all__ = ["compile_whole"]

_LOG = logging.getLogger("na_compiler")


def compile_whole(model: Any, path: str | os.PathLike[str], target: str | Target = "llvm") -> dict[Problem, int]:
    """Compile a model to one library.

    Parameters
    ----------
    model
        A ``torch.export.ExportedProgram``, an ``onnx_ir.Model``, or an ``onnx.ModelProto`` that holds its weights. Its
        batch may be dynamic, its layouts not. It is canonicalised first, in place unless it is a proto.
    path
        The shared library to write, weights and all.
    target
        A CPU: ``"llvm"`` for this machine, or an instruction set.

    Returns
    -------
    dict
        The attention problems in it, and how often each occurs.

    Raises
    ------
    TypeError
        For another kind of model.
    ValueError
        For another target, or a model with a dynamic layout or without neighborhood attention.
    RuntimeError
        If something in the model cannot be compiled, or linked.

    Examples
    --------
    >>> compile_whole(torch.export.export(model, (image,)), "model.so")  # doctest: +SKIP
    >>> from na_compiler.runtime.whole import load_whole  # doctest: +SKIP
    >>> output = load_whole("model.so")(image)  # doctest: +SKIP
    """
    importer = _importer(model)
    parsed = Target.parse(target)
    if not isinstance(parsed, CpuTarget) or not parsed.is_native:
        raise ValueError(f"whole models are compiled for this machine's architecture, got target {parsed}")
    if c_compiler() is None:
        raise RuntimeError("there is no C compiler to link the model with; install gcc or clang, or set CC")
    import tvm  # noqa: PLC0415

    from na_compiler.whole.attention import Attention  # noqa: PLC0415
    from na_compiler.whole.linear import schedule_linear  # noqa: PLC0415
    from na_compiler.whole.rest import legalize, schedule_rest  # noqa: PLC0415

    started = time.perf_counter()
    attention = Attention(parsed)
    module = importer(model, attention)
    if not attention.problems:
        raise ValueError("the model has no neighborhood attention in it")
    module, linear = schedule_linear(module, parsed)
    with tvm.target.Target(parsed.to_tvm()):
        module = schedule_rest(legalize(module), parsed)
        executable = tvm.compile(module, target=tvm.target.Target(parsed.to_tvm()))
    _export(executable, Path(path))
    seconds = time.perf_counter() - started
    count = sum(attention.problems.values())
    _LOG.info("compiled %s in %.1f s: %d attentions, %d linear layers", path, seconds, count, linear)
    return attention.problems


def _importer(model: Any) -> Callable[[Any, Any], Any]:
    from na_compiler.whole import frontend  # noqa: PLC0415

    # By name: neither torch nor onnx need be installed for the other's models.
    importers = {
        ("torch", "ExportedProgram"): frontend.from_program,
        ("onnx_ir", "Model"): frontend.from_onnx,
        ("onnx", "ModelProto"): frontend.from_onnx,
    }
    kind = type(model)
    found = importers.get((kind.__module__.partition(".")[0], kind.__name__))
    if found is None:
        raise TypeError(
            "model must be a torch.export.ExportedProgram, an onnx_ir.Model or an onnx.ModelProto, "
            f"got {kind.__name__}; na_compiler.passes.load reads files"
        )
    return found


def _export(executable: Any, path: Path) -> None:
    """Write the library beside its place and rename it into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command, *options = c_compiler() or ()
        executable.export_library(str(made), cc=command, **({"options": options} if options else {}))
        made.replace(path)
