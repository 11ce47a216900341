"""``na-compile MODEL -o BUNDLE`` and ``na-compile problem ... -o BUNDLE``."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

from na_compiler import operands
from na_compiler.cli.output import Commands, add_json, counted, print_json, print_line
from na_compiler.cli.table import print_rows, rows
from na_compiler.compiler.bundle import check_place, save_bundle
from na_compiler.compiler.spec import KernelSpec
from na_compiler.parameters import DTYPES
from na_compiler.passes.progress import progress_bar
from na_compiler.passes.sites import Site, Sites
from na_compiler.problem import Problem
from na_compiler.runtime.folders import runtime_library
from na_compiler.window import SHIFT

__all__ = ["add_parser", "add_problem_arguments", "add_problem_parser", "extents", "problem_of"]

_T = TypeVar("_T")

_EXAMPLES = """
examples:
  na-compile model.pt2 -o kernels
  na-compile model.onnx -o kernels --target llvm:x86-64-v3 --target llvm:x86-64-v4
  na-compile model.pt2 --shape image=1x3x224x224 --shape image=1x3x384x384 --dry-run
  na-compile my_package.models:make -o kernels --training

A bundle is native code. Whoever loads one trusts its author.
"""


def add_parser(commands: Commands) -> None:
    """Add the command that compiles a model."""
    parser = commands.add_parser(
        "model",
        help="compile the kernels of a model; the word 'model' may be left out",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="na-compile MODEL -o BUNDLE [options]",
    )
    parser.add_argument("model", metavar="MODEL", help=".pt2 of torch.export.save, .onnx, or package.module:function")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME=AxBxC[,NAME=...]",
        help="shapes of a file's inputs, where they are dynamic: kernels of their own beside the one for every layout; "
        "again for another resolution",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="compile the whole model to the library that -o names, to run with TVM's runtime alone",
    )
    _add_common(parser)
    parser.set_defaults(run=_run_model)


def add_problem_parser(commands: Commands) -> None:
    """Add the command that compiles one problem."""
    parser = commands.add_parser("problem", help="compile the kernel of one problem, given by flags")
    add_problem_arguments(parser)
    _add_common(parser)
    parser.set_defaults(run=_run_problem)


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a problem; see `problem_of`."""
    each: dict[str, Any] = {"type": extents, "metavar": "AxB"}
    parser.add_argument(
        "--layout", required=True, type=_layout, metavar="AxB",
        help="tokens on each axis, e.g. 56x56; or anyxany: a kernel for every layout",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--head-dim", type=int, required=True, help="length of a query and a key")
    parser.add_argument("--kernel-size", required=True, help="window on each axis; one number is for all", **each)
    parser.add_argument("--stride", default=(1,), help="queries that share a window", **each)
    parser.add_argument("--dilation", default=(1,), help="distance between neighbors", **each)
    parser.add_argument("--causal", type=_flags, default=(False,), metavar="AxB", help="1 or 0 for each axis")
    parser.add_argument(
        "--border",
        default=SHIFT,
        metavar="WORD",
        help="shift, cut, cut:LEFT, wrap or clamp; or one for each axis, as cut,wrap",
    )
    parser.add_argument("--heads-kv", type=int, help="heads of keys and values (default: as many)")
    parser.add_argument("--head-dim-v", type=int, help="length of a value (default: the same)")
    parser.add_argument("--additional-kv", action="store_true", help="there are additional keys")
    parser.add_argument(
        "--operand", action="append", default=[], metavar="NAME",
        help="a further operand that there is; again for several" if operands.options()[1:] else argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default: float32)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="BUNDLE", help="folder to write; a bundle that is there is replaced")
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="llvm (this machine, the default), llvm:x86-64-v3, cuda:sm_90a, ...; again for several; or cuda:all",
    )
    parser.add_argument("--training", action="store_true", help="the backward as well")
    parser.add_argument("--tangents", action="store_true", help="forward mode (jvp) as well")
    parser.add_argument(
        "--tf32", action="store_true", help="let products of float32 forwards on a GPU round to TF32 (default: exact)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one for each core)")
    parser.add_argument("--with-runtime", action="store_true", help="put TVM's runtime library there as well")
    parser.add_argument("--dry-run", action="store_true", help="show what would be compiled, and stop")
    add_json(parser)


def _run_model(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    _check_output(options)
    if options.whole:
        _compile_whole(options, started)
        return
    from na_compiler.passes.load import sites_of  # noqa: PLC0415

    shapes = [_shapes(text) for text in options.shape] if options.shape else None
    sites = sites_of(options.model, shapes)
    if not sites:
        raise ValueError(f"{options.model} has no neighborhood attention in it; nothing to compile")
    targets = options.target or ["llvm"]
    open_specs = sites.open_specs(targets, training=options.training, tangents=options.tangents)
    # On every target: one that has no open kernels gets nothing for a layout that nobody said.
    served = set.intersection(*({spec.problem for spec in sites.open_specs([target])} for target in targets))
    unknown = [site for site in sites.unknown() if site.open_problem not in served]
    if unknown:
        site = unknown[0]
        dynamic = " and ".join(site.dynamic) or "layout"
        raise ValueError(
            f"{site.layer} has a dynamic {dynamic}, and kernels are compiled for one layout; say "
            f"which with --shape, e.g. --shape INPUT=1x3x224x224"
        )
    _compile(options, sites, open_specs, f"{counted(len(sites), 'neighborhood attention')} in {options.model}", started)


def _compile_whole(options: argparse.Namespace, started: float) -> None:
    """Compile the whole model, to a library and not a bundle."""
    for flag in ("shape", "training", "tangents", "tf32", "dry_run", "jobs"):
        if getattr(options, flag):
            raise ValueError(f"--{flag.replace('_', '-')} does not go with --whole")
    targets = options.target or ["llvm"]
    if len(targets) > 1:
        raise ValueError(f"--whole compiles for one target, got {', '.join(targets)}")
    from na_compiler.passes.load import load_whole_model  # noqa: PLC0415
    from na_compiler.whole import compile_whole  # noqa: PLC0415

    problems = compile_whole(load_whole_model(options.model), options.output, targets[0])
    if options.with_runtime:
        shutil.copyfile(runtime_library(), Path(options.output).absolute().with_name(runtime_library().name))
    seconds = time.perf_counter() - started
    if options.json:
        found = [{"problem": problem.to_dict(), "count": count} for problem, count in problems.items()]
        print_json({"library": options.output, "problems": found, "seconds": seconds})
        return
    attentions = counted(sum(problems.values()), "neighborhood attention")
    print_line(f"{options.model}: the whole model, with {attentions}, to {options.output}, in {seconds:.1f} s")


def _run_problem(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    _check_output(options)
    problem = problem_of(options)
    sites = Sites([Site("", "command line", "na_compiler", "forward", problem, (), 1)])
    _compile(options, sites, [], str(problem), started)


def problem_of(options: argparse.Namespace) -> Problem:
    """Return the problem that the command line describes."""
    rank = len(options.layout)

    def per_axis(values: tuple[_T, ...]) -> _T | tuple[_T, ...]:
        return values[0] if len(values) == 1 and rank > 1 else values

    return Problem(
        layout=options.layout,
        heads=options.heads,
        head_dim=options.head_dim,
        kernel_size=per_axis(options.kernel_size),
        stride=per_axis(options.stride),
        dilation=per_axis(options.dilation),
        is_causal=per_axis(options.causal),
        heads_kv=options.heads_kv,
        head_dim_v=options.head_dim_v,
        additional_kv=options.additional_kv,
        dtype=options.dtype,
        operands=options.operand,
        border=options.border,
    )


def _check_output(options: argparse.Namespace) -> None:
    if not options.output and not options.dry_run:
        raise ValueError("name the bundle to write with -o BUNDLE, or look only with --dry-run")
    if options.output and not options.dry_run and not getattr(options, "whole", False):
        check_place(Path(options.output))


def _compile(options: argparse.Namespace, sites: Sites, further: list[KernelSpec], title: str, started: float) -> None:
    specs = sites.specs(
        options.target or ["llvm"], training=options.training, tangents=options.tangents, tf32=options.tf32
    )
    specs += [spec for spec in further if spec not in specs]
    data = rows(sites, specs)
    report: dict[str, Any] = {"kernels": data, "bundle": None}
    if options.dry_run:
        report["seconds"] = time.perf_counter() - started
        if options.json:
            print_json(report)
        else:
            problems = counted(len({spec.problem for spec in specs}), "problem")
            kernels = counted(len(specs), "kernel")
            print_rows(data, f"{title}: {problems}, {kernels}")
        return
    with progress_bar(len(set(specs))) as progress:
        done = save_bundle(
            options.output, specs, jobs=options.jobs, with_runtime=options.with_runtime, progress=progress
        )
    cached = sum(one.was_cached for one in done)
    seconds = time.perf_counter() - started
    report |= {"bundle": options.output, "compiled": len(done) - cached, "cached": cached, "seconds": seconds}
    if options.json:
        print_json(report)
        return
    print_line(
        f"{title}: {counted(len(done), 'kernel')} in {options.output}, {len(done) - cached} compiled and {cached} from "
        f"the cache, in {seconds:.1f} s"
    )


def extents(text: str) -> tuple[int, ...]:
    """Read numbers such as ``56x56``."""
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 56x56, got {text!r}") from None


def _layout(text: str) -> tuple[int | None, ...]:
    """Read numbers such as ``56x56``, or ``anyxany`` of an open layout."""
    parts = text.replace(",", "x").split("x")
    return (None,) * len(parts) if set(parts) == {"any"} else extents(text)


def _flags(text: str) -> tuple[bool, ...]:
    values = {"0": False, "1": True}
    try:
        return tuple(values[part] for part in text.replace(",", "x").split("x"))
    except KeyError:
        raise argparse.ArgumentTypeError(f"must be 1 or 0 for each axis, such as 1x0, got {text!r}") from None


def _shapes(text: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for part in text.split(","):
        name, equals, shape = part.partition("=")
        try:
            found[name] = tuple(int(size) for size in shape.split("x"))
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"--shape must be NAME=AxBxC, e.g. image=1x3x224x224, got {part!r}")
    return found
