"""Runs generated CUDA on the CPU, for tests: no GPU, no nvcc.

`Emulator.of(spec)` compiles the CUDA C++ of a kernel with a C++ compiler and ``kernel.h``, where the instructions are
those of an emulated machine, and takes over the host's part by evaluating what the TensorIR function passes: tensor
maps, grid.
What the emulator knows of descriptors, swizzles and TMA was compared with an H100; it has no weak memory and no time.
"""

from cuda_emulator.emulator import ORDERS, Emulator, EmulatorError, Order
from cuda_emulator.host import HostProgram

__all__ = ["ORDERS", "Emulator", "EmulatorError", "HostProgram", "Order"]
