"""A compiling process: reads requests, compiles, answers. Started by `na_compiler.compiler.workers` alone.

It ends when whoever started it has ended, or has had nothing to compile for a while.
"""

from __future__ import annotations

import os
import select
import shutil
import traceback

from na_compiler.compiler.build import compile_here
from na_compiler.compiler.messages import Answer, Failure, Request, receive, send

__all__ = ["serve"]

# After this long with nothing to compile the process ends: it takes some hundred megabytes.
_IDLE_SECONDS = 120.0


def serve(folder: str) -> None:
    """Answer requests until there are none.

    Parameters
    ----------
    folder
        Of this process alone, for what is temporary; deleted in the end.
    """
    requests, answers = os.dup(0), os.dup(1)
    # What libraries print goes to standard error: the pipe is for answers. Compilers that are called read nothing.
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        while select.select([requests], [], [], _IDLE_SECONDS)[0]:
            send(answers, _answer(receive(requests, Request)))
    except (EOFError, BrokenPipeError):
        pass  # Nobody asks any more.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answer(request: Request) -> Answer:
    try:
        return Answer(request.number, compile_here(request.spec, request.path, request.nvcc, request.linker))
    except OSError as error:
        traceback.print_exc()
        return Answer(request.number, Failure(str(error), error.errno))
    except Exception as error:  # noqa: BLE001 - told to the other process, which raises it
        traceback.print_exc()
        return Answer(request.number, Failure(f"{type(error).__name__}: {error}"))
