"""How many thread blocks a multiprocessor has at once. Pure Python."""

from __future__ import annotations

__all__ = ["blocks_at_once", "blocks_without_spills"]

# Registers of a multiprocessor, and warps that it has at most: CUDA's programming guide, compute capabilities 8.0 and
# 9.0. Others have as many registers, and fewer warps.
_REGISTERS, _MOST_WARPS = 65536, 64
# Its partitions, among which warps and registers are divided, and what registers of a thread are counted in.
_PARTITIONS, _UNIT = 4, 8
# Bytes of shared memory of a multiprocessor beyond that of its largest block, and what each block takes of it (the same
# guide, 8.0 and later).
_SHARED_MORE, _SHARED_EACH = 1024, 1024


def blocks_at_once(shared: int, threads: int, registers: int, shared_memory: int) -> int:
    """Return how many blocks a multiprocessor has at once.

    Parameters
    ----------
    shared
        Bytes of shared memory of a block.
    threads
        Threads of a block.
    registers
        Registers of a thread.
    shared_memory
        Bytes of shared memory that a block can have at most.
    """
    by_shared = (shared_memory + _SHARED_MORE) // (shared + _SHARED_EACH)
    by_registers = _REGISTERS // (threads * registers)
    return min(by_shared, by_registers, _MOST_WARPS * 32 // threads)


def blocks_without_spills(shared: int, threads: int, registers: int, shared_memory: int) -> int:
    """Return how many blocks a multiprocessor may be made to have at once, if threads are to have so many registers.

    Parameters are those of `blocks_at_once`. The compiler gives each thread as many as there are for all warps of the
    partition that has most.
    """
    blocks = blocks_at_once(shared, threads, registers, shared_memory)
    needed = -(-registers // _UNIT) * _UNIT * 32
    while blocks and -(-blocks * threads // 32 // _PARTITIONS) * needed > _REGISTERS // _PARTITIONS:
        blocks -= 1
    return blocks
