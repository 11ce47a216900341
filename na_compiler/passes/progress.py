"""*compile*: each distinct problem of a model, once, in parallel worker processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from na_compiler.compiler.parallel import Compiled, compile_all
from na_compiler.compiler.spec import KernelSpec

__all__ = ["compile_specs", "progress_bar"]


@contextlib.contextmanager
def progress_bar(total: int, console: Console | None = None) -> Iterator[Callable[[Compiled, int, int], None]]:
    """Show a progress bar, on a terminal; yields what `compile_all` calls.

    Parameters
    ----------
    total
        Kernels to wait for.
    console
        Where; default: standard error.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("compiling"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", table_column=Column(overflow="ellipsis", no_wrap=True, ratio=1)),
    )
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def ready(compiled: Compiled, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=str(compiled.spec.problem))

        yield ready


def compile_specs(specs: Iterable[KernelSpec], jobs: int | None = None) -> list[Compiled]:
    """Compile specs into the cache, with a progress bar on a terminal.

    Parameters
    ----------
    specs
        See `Sites.specs`.
    jobs
        Worker processes; default: one for each core.

    Raises
    ------
    CompileError
        If one could not be compiled.
    """
    wanted = list(dict.fromkeys(specs))
    with progress_bar(len(wanted)) as ready, compile_all(wanted, jobs, ready) as compiled:
        return compiled
