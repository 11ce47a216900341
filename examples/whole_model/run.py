"""Runs a whole model that na-compile compiled, with apache-tvm-ffi and TVM's runtime library alone.

    na-compile model.pt2 --whole --with-runtime -o deployment/model.so
    python run.py deployment/model.so OUTPUT.bin INPUT.bin 1x3x224x224 [INPUT.bin SHAPE ...]

Files of inputs hold float32 numbers, and so will OUTPUT.bin. ``libtvm_runtime.so`` is expected beside the model. There
is no torch here, no ONNX Runtime, no compiler, and not even NumPy: where there is one of these, ``tvm_ffi.from_dlpack``
makes tensors of its arrays, and ``na_compiler.runtime.whole.load_whole`` does all of this in one call.
"""

import array
import ctypes
import math
import sys
from pathlib import Path

import tvm_ffi

CPU, POOLED = 1, 2


def main() -> None:
    model, output, *inputs = sys.argv[1:]
    # TVM's runtime first: the model's library calls it. apache-tvm-ffi, which it calls itself, is loaded already.
    ctypes.CDLL(str(Path(model).absolute().with_name("libtvm_runtime.so")), ctypes.RTLD_GLOBAL)
    machine = tvm_ffi.load_module(model)["vm_load_executable"]()
    machine["vm_initialization"](CPU, 0, POOLED)
    result = machine["main"](*map(read, inputs[::2], inputs[1::2]))
    write(result if hasattr(result, "shape") else result[0], output)


def read(path: str, shape: str) -> tvm_ffi.Tensor:
    """Read a tensor from a file."""
    sizes = [int(size) for size in shape.split("x")]
    numbers = array.array("f")
    numbers.frombytes(Path(path).read_bytes())
    assert len(numbers) == math.prod(sizes), f"{path} has {len(numbers)} numbers, a shape of {shape} needs others"
    allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    tensor = allocate(tvm_ffi.Shape(sizes), tvm_ffi.dtype("float32"), tvm_ffi.device("cpu", 0), None)
    copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
    copy(tensor, ctypes.c_void_p(numbers.buffer_info()[0]), 4 * len(numbers))
    return tensor


def write(tensor: tvm_ffi.Tensor, path: str) -> None:
    """Write a tensor to a file."""
    numbers = array.array("f", bytes(4 * math.prod(tensor.shape)))
    copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
    copy(tensor, ctypes.c_void_p(numbers.buffer_info()[0]), 4 * len(numbers))
    Path(path).write_bytes(numbers.tobytes())


if __name__ == "__main__":
    main()
