"""Whether nvcc is here: what builds kernels for GPUs is tested where it is."""

from __future__ import annotations

import pytest

from na_compiler.compiler import toolkit


def _has_nvcc() -> bool:
    try:
        toolkit.find_toolkit()
    except RuntimeError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not here: pip install nvidia-cuda-nvcc")
