"""What planners know of NVIDIA's GPUs: one line a generation, and the least time that a problem takes on one.

An H100 could be measured: planners' own constants are fitted to it, and rank candidates for all others as well. The
other lines are the makers' figures of a usual GPU of the generation, and assumed where none is given: nothing was
fitted to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.operands import BATCH, INPUT, OUTPUT, arguments
from na_compiler.problem import Problem
from na_compiler.target import CudaTarget

__all__ = ["GPUS", "H100", "Gpu", "floors", "gpu_of"]

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True)
class Gpu:
    """A GPU, and what a multiprocessor of it does in a cycle.

    Parameters
    ----------
    name
        As its maker calls it.
    architecture
        That of the target.
    processors
        Multiprocessors.
    megahertz
        Its clock.
    dram
        Bytes a second of its memory, in units of 1e9.
    l2
        Bytes a cycle that the second-level cache gives a multiprocessor.
    tensor
        Operations a cycle of its tensor cores, on 16 bits with sums of 32; a multiply-add is two.
    fma
        Multiply-adds a cycle of its CUDA cores, on float32.
    exp
        Exponentials a cycle.
    is_measured
        Whether anything was fitted to it.
    """

    name: str
    architecture: str
    processors: int
    megahertz: float
    dram: float
    l2: float
    tensor: int
    fma: int
    exp: int
    is_measured: bool = False


# Of an H100 the clock is that which it has while its tensor cores work, and the rate of L2 was fitted, see
# schedules/sm90/backward/planner.py: for the others that rate is assumed to be the same. Exponentials, multiply-adds:
# CUDA C++ Programming Guide, throughput of arithmetic instructions. The rest: datasheets, dense, at the boost clock.
GPUS = (
    #   name                architecture  SMs   MHz     DRAM    L2    tensor  FMA  exp
    Gpu("T4",               "sm_75",      40,   1590.0, 320.0,  18.0, 1024,   64,  16),
    Gpu("A100 80GB SXM",    "sm_80",      108,  1410.0, 2039.0, 18.0, 2048,   64,  16),
    Gpu("A10",              "sm_86",      72,   1695.0, 600.0,  18.0, 1024,   128, 16),
    Gpu("L40S",             "sm_89",      142,  2520.0, 864.0,  18.0, 1024,   128, 16),
    Gpu("H100 SXM",         "sm_90a",     132,  1700.0, 3350.0, 18.0, 4096,   128, 16, is_measured=True),
    Gpu("B200",             "sm_100",     148,  1850.0, 7700.0, 18.0, 8192,   128, 16),
    Gpu("GeForce RTX 5090", "sm_120",     170,  2407.0, 1792.0, 18.0, 512,    128, 16),
)  # fmt: skip
H100 = next(gpu for gpu in GPUS if gpu.is_measured)


def gpu_of(target: CudaTarget) -> Gpu:
    """Return the line for a target: that of its architecture, or the last one before it."""
    return [gpu for gpu in GPUS if _capability(gpu) <= target.capability][-1]


def _capability(gpu: Gpu) -> tuple[int, int]:
    return CudaTarget(gpu.architecture).capability


def floors(problem: Problem, direction: str, gpu: Gpu, *, has_tensor_cores: bool) -> dict[str, float]:
    """Return the microseconds that a batch entry takes at least, among many, by what would bind it.

    Parameters
    ----------
    problem
        What to compute.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    gpu
        On which.
    has_tensor_cores
        Whether products run on tensor cores.

    Returns
    -------
    dict
        ``"DRAM"``: all that is read and written, once. ``"products"`` and ``"exponentials"``: of the pairs that windows
        need, once each.
    """
    moved = sum(
        _BYTES[one.dtype] * _elements(one.shape)
        for one in arguments(problem, direction)
        if one.role in (INPUT, OUTPUT) and BATCH in one.shape
    )
    rate = gpu.tensor if has_tensor_cores else 2 * gpu.fma
    each = gpu.processors * gpu.megahertz
    return {
        "DRAM": moved / (1e3 * gpu.dram),
        "products": problem.flops(direction=direction) / (each * rate),
        "exponentials": problem.heads * problem.pairs() / (each * gpu.exp),
    }


def _elements(shape: tuple[int | str, ...]) -> int:
    """Return the elements of a shape for one batch entry; additional keys, whose number is not known, are left out."""
    count = 1
    for extent in shape:
        count *= extent if isinstance(extent, int) else extent == BATCH
    return count
