"""What Python runs when it starts, in processes below ``python -m na_compiler.compat.natten``: it has PYTHONPATH so.

Workers that a script starts import its file anew, and natten with it, before anything could call ``install``.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

# Reads the environment variable.
import na_compiler  # noqa: F401

_HERE = Path(__file__).parent
# The one that would have run without us.
_next = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path) != _HERE])
if _next is not None and _next.loader is not None:
    _module = importlib.util.module_from_spec(_next)
    sys.modules["sitecustomize"] = _module
    _next.loader.exec_module(_module)
