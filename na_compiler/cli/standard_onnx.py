"""``na-compile standard-onnx``: an ONNX model of standard operators only."""

from __future__ import annotations

import argparse
from pathlib import Path

from na_compiler.cli.output import Commands, add_json, print_json, print_line

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "standard-onnx", help="put bodies in the place of our operators, for importers that do not know functions"
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="a model of na_compiler.onnx.export")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--body",
        choices=("generic", "blocked"),
        default="generic",
        help="generic: right for every layout (default); blocked: for fixed layouts, faster",
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from na_compiler.passes.load import load_onnx  # noqa: PLC0415

    model = load_onnx(options.model)

    import onnx_ir as ir  # noqa: PLC0415

    from na_compiler.onnx.bodies import inline_bodies  # noqa: PLC0415
    from na_compiler.onnx.nodes import attention_nodes  # noqa: PLC0415

    if Path(options.output).exists() and Path(options.output).samefile(options.model):
        raise ValueError(f"-o must be another file than MODEL, got {options.output}")
    count = sum(1 for _ in attention_nodes(model))
    ir.save(inline_bodies(model, options.body), options.output)
    if options.json:
        print_json({"model": options.output, "operators": count})
        return
    print_line(f"{options.output}: bodies in the place of {count} of our operators; it has standard operators only")
