"""Adds operands to the table, and nothing else, and looks for them in the C++ operators; run by test_operands.py.

The kernel is a few lines of C, which say what they were given: no family has these operands.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from na_compiler import operands
from na_compiler.operands import COMPACT, INPUT, OUTPUT, SCALAR, Operand

OLD = operands.TABLE
operands.TABLE = (
    *OLD,
    Operand("gain", INPUT, "what outputs are multiplied by", ("heads",), "float32", option="gain", differentiable=True),
    Operand("row_mask", INPUT, "False hides a key", ("batch", "layout"), "bool", COMPACT, "row_mask"),
    Operand("cap", SCALAR, "of something", dtype="float32", option="cap"),
    Operand("first", SCALAR, "of queries", dtype="int64", default=3),
)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from onnx import helper  # noqa: E402

import na_compiler.onnx  # noqa: E402
from na_compiler import Problem, aot  # noqa: E402
from na_compiler.compiler.bundle import _versions  # noqa: E402
from na_compiler.ops.schema import FORWARD  # noqa: E402
from na_compiler.runtime import native  # noqa: E402
from na_compiler.runtime.bundle import FORMAT, read_bundle  # noqa: E402
from na_compiler.runtime.host import c_compiler  # noqa: E402
from na_compiler.runtime.kernel import KernelInfo  # noqa: E402
from na_compiler.runtime.manifest import digest_of  # noqa: E402

PROBLEM = Problem((6, 9), 2, 8, 3, operands=("gain", "row_mask", "cap"))
KERNEL = r"""
#include <tvm/ffi/c_api.h>
/* query, key, value, gain, row_mask, scale, cap, first, output, lse */
__attribute__((visibility("default")))
int __tvm_ffi_main(void* self, const TVMFFIAny* given, int32_t count, TVMFFIAny* result) {
  DLTensor* tensors[10];
  (void)self, (void)result;
  if (count != 10 || given[7].type_index != kTVMFFIInt || given[6].type_index != kTVMFFIFloat) return -1;
  for (int i = 0; i < 10; ++i) tensors[i] = given[i].v_ptr;
  const float *value = tensors[2]->data, *gain = tensors[3]->data;
  const unsigned char* mask = tensors[4]->data;
  float *output = tensors[8]->data, *lse = tensors[9]->data;
  for (int64_t token = 0; token < tensors[8]->shape[0] * 6 * 9; ++token) {
    for (int head = 0; head < 2; ++head) {
      int64_t row = 2 * token + head;
      for (int d = 0; d < 8; ++d) output[8 * row + d] = value[8 * row + d] * gain[head] + (float)given[6].v_float64;
      lse[row] = mask[token] ? (float)given[7].v_int64 : (float)given[5].v_float64;
    }
  }
  return 0;
}
"""
# In a process that does not import the package: calls the operator, and says what came of it.
TORCH = """
import ctypes, sys, torch
library, bundle, calls, results = sys.argv[1:]
torch.ops.load_library(library)
assert ctypes.CDLL(library).na_compiler_load_bundle(bundle.encode()) == 0
made = [str(torch.ops.na_compiler.na2d.default._schema)]
for arguments in torch.load(calls):
    try:
        made.append(torch.ops.na_compiler.na2d(*arguments))
    except RuntimeError as error:
        made.append(str(error))
torch.save(made, results)
"""


def bundle_in(folder):
    """Write a bundle of one kernel, as `save_bundle` does; returns it."""
    include = native.installed("tvm_ffi") / "include"
    source, library = folder / "kernel.c", folder / "bundle" / "kernel.so"
    library.parent.mkdir()
    source.write_text(KERNEL)
    subprocess.run([*c_compiler(), "-shared", "-fPIC", f"-I{include}", "-o", library, source], check=True)
    data = library.read_bytes()
    file = {"library": library.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    info = KernelInfo(PROBLEM, "forward", "llvm:x86-64")
    kernels = [{"key": "0" * 32, **file, **info.to_dict()}]
    said = {"format": FORMAT, "versions": _versions(), "kernels": kernels, "files": []}
    (library.parent / "manifest.json").write_text(json.dumps(said | {"digest": digest_of(said)}))
    assert [entry.info for entry in read_bundle(library.parent).entries] == [info]
    return library.parent


def torchs(folder, bundle):
    """The operators for programs without Python: schema, marshalling, checks."""
    library = aot.build_library()
    parameters = ([3, 3], [1, 1], [1, 1], [0, 0], 0.25)
    # What the table has before the made-up ones may be left out.
    before = (query, key, value, *parameters, *[one.default for one in OLD if one.role != OUTPUT and one.is_later])
    calls = [
        (*before, gain, mask, 1.5, 7),
        (*before, gain, mask, 1.5),
        (*before, torch.ones(3), mask, 1.5),
        (*before, gain.double(), mask, 1.5),
        (*before, gain),
        (*before,),
    ]
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", TORCH, library, bundle, folder / "calls.pt", folder / "results.pt"]
    subprocess.run(command, check=True)
    schema, given, without, *refused = torch.load(folder / "results.pt")
    declared = schema.removeprefix("na_compiler::na2d").replace("SymInt[]", "int[]")
    assert declared == FORWARD.text().replace("SymInt[]", "int[]"), declared
    for (output, lse), first in ((given, 7), (without, 3)):
        assert torch.equal(output, expected)
        assert torch.equal(lse, torch.where(mask, first, 0.25)[..., None].expand_as(lse))
    wanted = (
        r"gain must have shape \[2\], got \[3\]",
        "tensors must be float32, bfloat16 or float16|gain must be float32",
        "no kernel for na2d layout=6x9 heads=2 head_dim=8 kernel_size=3x3 gain float32",
        "no kernel for na2d layout=6x9 heads=2 head_dim=8 kernel_size=3x3 float32",
    )
    for said, pattern in zip(refused, wanted, strict=True):
        with pytest.raises(RuntimeError, match=pattern):
            raise RuntimeError(said)


def onnx_runtimes(bundle):
    """ONNX Runtime's: inputs, attributes, checks."""

    def session(size, **attributes):
        absent = ["" for operand in OLD if operand.role == INPUT and operand.is_later]
        inputs = ["q", "k", "v", *absent, "gain", "mask"]
        node = helper.make_node("NA2D", inputs, ["y", "l"], domain="na_compiler", kernel_size=[3, 3], **attributes)
        kinds = onnx.TensorProto
        shapes = {name: (kinds.FLOAT, ["B", 6, 9, 2, 8]) for name in "qkv"}
        shapes |= {"gain": (kinds.FLOAT, [size]), "mask": (kinds.BOOL, ["B", 6, 9])}
        given = [helper.make_tensor_value_info(name, *one) for name, one in shapes.items()]
        made = [helper.make_tensor_value_info(name, kinds.FLOAT, None) for name in ("y", "l")]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("na_compiler", 1)]
        model = helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        na_compiler.onnx.register(options, bundle)
        return onnxruntime.InferenceSession(model.SerializeToString(), options)

    feed = {"q": query, "k": key, "v": value, "gain": gain, "mask": mask}
    feed = {name: tensor.numpy() for name, tensor in feed.items()}
    for attributes, first in (({"first": 7}, 7), ({}, 3)):
        output, lse = session(2, scale=0.25, cap=1.5, **attributes).run(None, feed)
        assert torch.equal(torch.from_numpy(output), expected)
        assert torch.equal(torch.from_numpy(lse), torch.where(mask, first, 0.25)[..., None].expand(3, 6, 9, 2))
    wanted = {
        r"gain must have shape \[2\] .*got \[3\]": {"size": 3, "cap": 1.5},
        "no kernel for .* gain row_mask float32": {"size": 2},
        "first must be an int, and is of another type": {"size": 2, "cap": 1.5, "first": 0.5},
        "attribute Cap, which is unknown; known are .* scale, cap, first": {"size": 2, "Cap": 1.5},
    }
    for pattern, given in wanted.items():
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException, match=pattern):
            session(**given)


torch.manual_seed(0)
query, key, value = (torch.randn(3, 6, 9, 2, 8) for _ in range(3))
gain, mask = torch.randn(2), torch.rand(3, 6, 9) < 0.5
expected = value * gain[:, None] + 1.5

with tempfile.TemporaryDirectory() as made:
    bundle = bundle_in(Path(made))
    torchs(Path(made), bundle)
    onnx_runtimes(bundle)
print("ok")
