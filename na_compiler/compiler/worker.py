"""A worker process of `na_compiler.compiler.parallel`: reads specs, compiles them, writes what became of them.

One line each way: a pickled spec in base64, and an answer in JSON. A process of its own, and not one forked or spawned
by multiprocessing, so that a user's script needs no ``if __name__ == "__main__"``, and a worker that crashes says so by
going away.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import time
import traceback

from na_compiler.compiler.kernels import make_entry
from na_compiler.compiler.spec import KernelSpec

__all__ = ["main"]


def main() -> None:
    """Serve until the input ends."""
    # Whatever libraries print would be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        started = time.perf_counter()
        try:
            spec: KernelSpec = pickle.loads(base64.b64decode(line))  # noqa: S301 - from the parent process
            answer = {"library": str(make_entry(spec).library), "seconds": time.perf_counter() - started}
        except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
