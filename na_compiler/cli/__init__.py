"""The command line: ``na-compile``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import na_compiler
from na_compiler.cli import (
    bench,
    cache,
    draw,
    info,
    inspect,
    model,
    ort_library,
    plan,
    standard_onnx,
    torch_library,
    tune,
)
from na_compiler.cli.output import Commands

__all__ = ["main"]

_USAGE = """na-compile MODEL -o BUNDLE [options]
       na-compile COMMAND [options]
       na-compile COMMAND --help"""

_DESCRIPTION = """A compiler for neighborhood attention. Given a MODEL (a .pt2 of
torch.export.save, an .onnx, or package.module:function) it finds the
neighborhood attention in it and compiles the kernels into a BUNDLE, a folder
that needs no compiler."""

_EXAMPLES = """
examples:
  na-compile model.pt2 --dry-run
  na-compile model.onnx -o kernels --target llvm:x86-64-v3 --target cuda:sm_90a
  na-compile problem --layout 56x56 --heads 4 --head-dim 32 --kernel-size 7 \\
      -o kernels
  na-compile info
"""

# What is not installed with the package, and the extra that it comes with.
_EXTRAS = {
    "matplotlib": "draw",
    "ml_dtypes": "onnx",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnxruntime",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Parameters
    ----------
    arguments
        Default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="na-compile",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"na_compiler {na_compiler.__version__}")
    _add_verbose(parser, default=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="na-compile")
    model.add_problem_parser(commands)
    for module in (model, inspect, plan, draw, tune, bench, cache, ort_library, standard_onnx, torch_library, info):
        module.add_parser(commands)
    _verbose_everywhere(commands)
    words = list(sys.argv[1:] if arguments is None else arguments)
    unknown = _unknown_command(words, commands.choices)
    if unknown:
        parser.error(unknown)
    options = parser.parse_args(_with_command(words, commands.choices))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return _run(options)
    except BrokenPipeError:
        # Who reads has enough, as in `na-compile cache list | head`. Python would flush once more at the end, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        advice = f"; pip install 'na-compiler[{extra}]'" if extra else ""
        print(f"na-compile: {error}{advice}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, NotImplementedError, ImportError) as error:
        sentence, *rest = _text(error).splitlines() or [type(error).__name__]
        print(f"na-compile: {sentence}", file=sys.stderr)
        if rest:
            logging.getLogger("na_compiler").info("%s", "\n".join(rest))
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001
        # Not foreseen, so that there is no better sentence than this one.
        logging.getLogger("na_compiler").info("%s", traceback.format_exc())
        first = next(iter(str(error).strip().splitlines()), "no message")
        advice = "" if options.verbose else "; -v shows where"
        print(
            f"na-compile: {type(error).__name__}: {first}. This is a fault of na-compile{advice}; "
            "please report it, with what na-compile info prints",
            file=sys.stderr,
        )
        return 1


def _add_verbose(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", default=default, help="log what is compiled and why")


def _verbose_everywhere(commands: Commands) -> None:
    """Take ``-v`` behind a command as well: there it is left as it is, unless it is given."""
    for parser in dict.fromkeys(commands.choices.values()):
        _add_verbose(parser, argparse.SUPPRESS)
        for action in parser._actions:  # noqa: SLF001 - argparse lists a parser's subparsers nowhere else
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
                _verbose_everywhere(action)


def _run(options: argparse.Namespace) -> int:
    status = int(options.run(options) or 0)
    sys.stdout.flush()
    return status


def _text(error: Exception) -> str:
    """Return what an error says; of the operating system's, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip()


def _unknown_command(words: Sequence[str], known: Iterable[str]) -> str | None:
    """Return what to say of a first word that is neither a command nor looks like a model; ``None`` if it is one."""
    word = next((word for word in words if not word.startswith("-")), None)
    if word is None or word in known or set(word) & {".", ":", "/"} or Path(word).exists():
        return None
    near = difflib.get_close_matches(word, known, 1)
    advice = f"did you mean {near[0]}?" if near else f"commands are {', '.join(known)}"
    return f"{word!r} is no command, and there is no such file; {advice}"


def _with_command(arguments: list[str], known: Container[str]) -> list[str]:
    """Complete ``na-compile MODEL ...`` with the command's name."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return arguments if argument in known else [*arguments[:place], "model", *arguments[place:]]
    return arguments
