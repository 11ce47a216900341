"""Who imports whom in the package, read off the sources. Imports within functions count as well."""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["graph", "sources"]

ROOT = Path(__file__).parent.parent


def sources():
    """Every module by its name, with its path."""
    found = {}
    for folder, package in ((ROOT / "na_compiler", "na_compiler"), (ROOT / "schedules", "na_compiler.schedules")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph():
    """Every module by its name, with those of the package that it imports."""
    modules = sources()
    return {module: _imports(module, path, modules) for module, path in modules.items()}


def _running(node):
    """A tree's nodes, without those that only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _running(child)


def _imports(module, path, modules):
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in modules}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            if node.module in modules:
                names = (f"{node.module}.{name.name}" for name in node.names)
                found |= {name if name in modules else node.module for name in names}
    return found - {module}
