"""Graph passes: find neighborhood attention in a model, make it canonical, compile it, bind it.

Each works by itself, on a ``torch.export.ExportedProgram``, a ``torch.fx.GraphModule`` or an ``onnx_ir.Model``.

Examples
--------
>>> program = torch.export.export(model, (image,))  # doctest: +SKIP
>>> canonicalise(program)  # doctest: +SKIP
>>> sites = collect(program)  # doctest: +SKIP
>>> save_bundle("kernels", sites.specs(["llvm:x86-64-v3", "llvm:x86-64-v4"]))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from na_compiler.passes.sites import Site, Sites

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import fx
    from torch.export import ExportedProgram
    from torch.nn import Module
    from typing_extensions import TypeIs

    from na_compiler.compiler.parallel import Compiled

    Program = ExportedProgram | fx.GraphModule
    Model = Program | ir.Model | onnx.ModelProto

__all__ = ["Site", "Sites", "bind", "canonicalise", "collect", "compile", "convert"]


def collect(model: Model, shapes: Iterable[Mapping[str, Sequence[int]]] | None = None) -> Sites:
    """Find every neighborhood attention of a model; see `na_compiler.passes.collect_torch` and `collect_onnx`."""
    if _is_onnx(model):
        from na_compiler.passes.collect_onnx import collect_onnx  # noqa: PLC0415

        return collect_onnx(model, shapes)
    from na_compiler.passes.collect_torch import collect_torch  # noqa: PLC0415

    return collect_torch(model, shapes)


def canonicalise(model: Model, *, bodies: bool = True) -> int:
    """Make every neighborhood attention of a model a call of ours, in place; returns how many nodes changed.

    What is not ours stays as it was; the log says why, at level INFO.

    Parameters
    ----------
    model
        An exported program, an FX graph or an ``onnx_ir.Model``.
    bodies
        For ONNX models: whether new nodes get bodies, for runtimes without the operator library.
    """
    if _is_onnx(model):
        from na_compiler.passes.canonicalise_onnx import canonicalise_onnx  # noqa: PLC0415

        return canonicalise_onnx(model, bodies=bodies)
    from na_compiler.passes.canonicalise_torch import canonicalise_torch  # noqa: PLC0415

    return canonicalise_torch(model)


def compile(  # noqa: A001
    model: Model,
    targets: Sequence[str] = ("llvm",),
    *,
    training: bool = False,
    tangents: bool = False,
    jobs: int | None = None,
) -> list[Compiled]:
    """Compile every distinct problem of a model into the cache; see `na_compiler.passes.progress`.

    Forwards only, unless ``training`` wants their backward as well, and ``tangents`` their forward mode.
    """
    from na_compiler.passes.progress import compile_specs  # noqa: PLC0415

    return compile_specs(collect(model).specs(targets, training=training, tangents=tangents), jobs)


def bind(model: Program, target: str = "llvm") -> int:
    """Let every neighborhood attention of a torch graph call its kernel by key; see `na_compiler.passes.bind_torch`."""
    from na_compiler.passes.bind_torch import bind as bind_torch  # noqa: PLC0415

    return bind_torch(model, target)


def convert(model: Module, *, report: dict[str, str] | None = None) -> Module:
    """Swap NATTEN's modules in a live model for ours, and say what became of each; see `na_compiler.passes.natten`."""
    from na_compiler.passes.natten import convert as convert_modules  # noqa: PLC0415

    return convert_modules(model, report=report)


def _is_onnx(model: Model) -> TypeIs[ir.Model | onnx.ModelProto]:
    return type(model).__module__.partition(".")[0] in {"onnx_ir", "onnx"}
