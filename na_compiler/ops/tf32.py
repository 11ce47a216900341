"""Whether torch lets products of float32 on a GPU round to TF32: its own switch, in whichever way it was set."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_tf32_allowed"]

# What ``torch.backends.cuda.matmul.fp32_precision`` reads, where torch has it (2.9). Once that was set, the older names
# cannot be read: they raise. Set by an older name, it says so here.
_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)


def is_tf32_allowed() -> bool:
    """Return whether ``torch.matmul`` of float32 may compute with TF32 on a GPU.

    It may after ``torch.backends.cuda.matmul.fp32_precision = "tf32"``,
    ``torch.backends.cuda.matmul.allow_tf32 = True`` or ``torch.set_float32_matmul_precision("high")``, and may not by
    default.

    Examples
    --------
    >>> is_tf32_allowed()
    False
    """
    if _precision is None:
        return bool(torch._C._get_cublas_allow_tf32())
    return bool(_precision("cuda", "matmul") == "tf32")
