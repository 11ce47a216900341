"""The table of what a model needs: problems, where they come from, and what was chosen for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from na_compiler.cli.output import print_table
from na_compiler.compiler.kernels import cached_entry
from na_compiler.compiler.spec import KernelSpec
from na_compiler.passes.sites import Sites

__all__ = ["print_rows", "rows"]


def rows(sites: Sites, specs: Iterable[KernelSpec]) -> list[dict[str, Any]]:
    """Return a row of plain data for each kernel."""
    where = sites.problems()
    for site in sites:
        if site.open_problem is not None:
            where.setdefault(site.open_problem, []).append(site)
    made = []
    for spec in specs:
        at = where.get(spec.problem, [])
        batch = max((site.batch or 1 for site in at), default=1)
        # An open layout has no number of tokens.
        flops = None if spec.problem.is_open else spec.problem.flops(batch, direction=spec.direction)
        made.append(
            {
                "problem": spec.problem.to_dict(),
                "text": str(spec.problem),
                "direction": spec.direction,
                "target": spec.target.name,
                "layers": list(dict.fromkeys(site.layer for site in at)),
                "count": len(at),
                "dynamic": list(dict.fromkeys(name for site in at for name in site.dynamic)),
                "flops": flops,
                "schedule": spec.config.family,
                "config": _config(spec.config),
                "tf32": spec.rounds,
                "wasted": _wasted(spec),
                "reason": spec.reason,
                "key": spec.key,
                "cached": cached_entry(spec) is not None,
            }
        )
    return made


def print_rows(data: list[dict[str, Any]], title: str) -> None:
    """Print rows of `rows` as a table."""
    columns = ("problem", "used in", "kernel", "schedule", "MFLOP", "wasted", "cached")
    print_table(columns, list(map(_cells, data)), title, numbers=columns[-3:])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    layers = row["layers"]
    used = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    if row["count"] > 1:
        used = f"{row['count']}x: {used}"
    config = " ".join(f"{name}={value}" for name, value in row["config"].items())
    return (
        row["text"],
        used,
        f"{row['direction']}{' in TF32' if row['tf32'] else ''}, {row['target']}",
        f"{row['schedule']}: {config}",
        "" if row["flops"] is None else f"{row['flops'] / 1e6:.1f}",
        "" if row["wasted"] is None else f"{100 * row['wasted']:.0f}%",
        "yes" if row["cached"] else "no",
    )


def _config(config: object) -> dict[str, Any]:
    """Return a config's choices, without those that are left as they are by default."""
    assert dataclasses.is_dataclass(config)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= _config(value)
        elif value != field.default:
            found[field.name] = "x".join(map(str, value)) if isinstance(value, tuple) else value
    return found


def _wasted(spec: KernelSpec) -> float | None:
    """Return the part of the pairs that a kernel computes which no window needs; ``None`` where it is not counted."""
    if spec.problem.is_open:
        return None
    visited = spec.config.visited_pairs(spec.problem)
    return None if visited is None else 1 - spec.problem.pairs() / visited
