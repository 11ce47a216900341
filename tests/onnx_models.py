"""One-node ONNX models of a problem, their inputs, and the problems that tests draw from."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from oracle import check_forward, draw_others

from na_compiler.onnx import DOMAIN, VERSION, add_bodies
from na_compiler.onnx.signature import INPUTS
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

ELEMENTS = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
_CASES = Path(__file__).parent / "data" / "na_cases.json"
# What each axis of a Problem can be, small enough for everything.
PROBLEMS = [
    Problem(1, 1, 1, 1),
    Problem(17, 1, 8, 5, 3, 3, is_causal=True),
    Problem(40, 2, 20, 40, is_causal=True),
    Problem(50, 1, 8, 8, 3, heads_kv=1, head_dim_v=3),
    Problem((8, 9), 2, 8, (3, 4), (2, 1), (1, 2), (False, True)),
    Problem((7, 11), 4, 8, 3, 1, (2, 3), heads_kv=2, head_dim_v=5),
    Problem((11, 9), 6, 12, 3, additional_kv=True, heads_kv=2),
    Problem((9, 10), 3, 24, (2, 10), (1, 4), (3, 1)),
    Problem((5, 6, 7), 2, 8, (3, 2, 5), (1, 2, 4), (1, 2, 1), (False, False, True), additional_kv=True),
    Problem((6, 6, 6), 3, 8, 3, (3, 1, 2), (2, 1, 1), (True, False, False)),
]


# Parts that the whole case file is run in: a test has ten minutes.
PARTS = 30


def cases(part: int | None = None, count: int = 6) -> list[Problem]:
    """Return problems of the case file: a part of it, or some that change from run to run and are cheap to check."""
    found = []
    for case in json.loads(_CASES.read_text(encoding="utf-8"))["cases"]:
        for is_causal in case["is_causal"]:
            fields = ("heads", "head_dim", "kernel_size", "stride", "dilation", "heads_kv")
            found.append(Problem(case["shape"], is_causal=is_causal, **{name: case[name] for name in fields}))
    found = list(dict.fromkeys(found))
    if part is not None:
        return found[part::PARTS]
    return random.sample([problem for problem in found if cost(problem) < 2**26], count)


def cost(problem: Problem) -> int:
    """Return the elements of keys that the generic body gathers."""
    window = int(np.prod(problem.kernel_size))
    return problem.tokens * window * problem.heads_kv * problem.head_dim


def one_node(
    problem: Problem,
    *,
    scale: float | None = None,
    dynamic_layout: bool = True,
    body: str | None = "generic",
    lse: bool = True,
    attributes: dict | None = None,
) -> onnx.ModelProto:
    """Return a model of one node, checked; with symbols for the batch and, if asked for, the layout."""
    p = problem
    layout = [f"L{axis}" for axis in range(p.rank)] if dynamic_layout else list(p.layout)
    tokens = ["B", *layout]
    dims = [[*tokens, p.heads, p.head_dim], [*tokens, p.heads_kv, p.head_dim], [*tokens, p.heads_kv, p.head_dim_v]]
    if p.additional_kv:
        dims += [["B", "S", p.heads_kv, p.head_dim], ["B", "S", p.heads_kv, p.head_dim_v]]
    element = ELEMENTS[p.dtype]
    kinds = dict(zip(INPUTS, ((element, shape) for shape in dims), strict=False))
    if p.has("relative_position_bias"):
        places = [2 * extent - 1 for extent in p.kernel_size]
        kinds["relative_position_bias"] = onnx.TensorProto.FLOAT, [p.heads, *places]
    if p.has("key_mask"):
        kinds["key_mask"] = onnx.TensorProto.BOOL, tokens
    # By their places, of which the last ones may be left out.
    names = [name if name in kinds else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    given = {
        "kernel_size": list(p.kernel_size),
        "stride": list(p.stride),
        "dilation": list(p.dilation),
        "is_causal": [int(flag) for flag in p.is_causal],
    }
    if scale is not None:
        given["scale"] = scale
    if p.has_borders:
        given["border"] = ",".join(p.border)
    given.update(attributes or {})
    outputs = [helper.make_tensor_value_info("output", element, [*tokens, p.heads, p.head_dim_v])]
    if lse:
        outputs.append(helper.make_tensor_value_info("lse", onnx.TensorProto.FLOAT, [*tokens, p.heads]))
    node = helper.make_node(f"NA{p.rank}D", names, [o.name for o in outputs], domain=DOMAIN, name="attend", **given)
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=imports, ir_version=10)
    if body is not None:
        loaded = ir.serde.deserialize_model(model)
        add_bodies(loaded, body)
        model = ir.serde.serialize_model(loaded)
    return model


def feeds(inputs: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as a runtime takes them."""
    return {name: to_numpy(tensor) for name, tensor in zip(INPUTS, inputs, strict=False)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = np.asarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array)


def session(model: onnx.ModelProto, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """Return a session on the CPU; without options of its own it says nothing but errors."""
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(made: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a session; NumPy's arrays cannot say that they are bfloat16, so that goes through values of the runtime's."""
    if not any(array.dtype == ml_dtypes.bfloat16 for array in inputs.values()):
        return made.run(None, inputs)
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {name: make(array.view(np.uint16), onnx.TensorProto.BFLOAT16) for name, array in inputs.items()}
    binding = made.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in made.get_outputs():
        binding.bind_output(output.name)
    made.run_with_iobinding(binding)
    results = []
    for value in binding.get_outputs():
        if "bfloat16" in value.data_type():
            count = int(np.prod(value.shape()))
            raw = ctypes.string_at(value.data_ptr(), 2 * count)
            results.append(np.frombuffer(raw, dtype=ml_dtypes.bfloat16).reshape(value.shape()))
        else:
            results.append(value.numpy())
    return results


def flags(rank: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((False, True), repeat=rank))


class Forward:
    """Inputs of a problem drawn anew, and what the reference makes of them: for some queries, if there are many."""

    def __init__(self, problem: Problem, *, batch: int = 1, additional: int = 5, scale: float | None = None) -> None:
        p = self.problem = problem
        tokens = (batch, *p.layout)
        shapes = [
            (*tokens, p.heads, p.head_dim),
            (*tokens, p.heads_kv, p.head_dim),
            (*tokens, p.heads_kv, p.head_dim_v),
        ]
        if p.additional_kv:
            shapes += [(batch, additional, p.heads_kv, p.head_dim), (batch, additional, p.heads_kv, p.head_dim_v)]
        self.inputs = [torch.randn(shape).to(getattr(torch, p.dtype)) for shape in shapes]
        self.tokens = torch.randperm(p.tokens)[:300].sort().values if p.tokens > 4096 else None
        self.others = draw_others(p, batch)
        exact = [tensor.double() for tensor in self.inputs]
        parameters = (p.kernel_size, p.stride, p.dilation, p.is_causal, scale)
        self.output, self.lse = neighborhood_attention(
            *exact[:3], *parameters, *exact[3:], tokens=self.tokens, border=p.border, **self.others
        )

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """All inputs, as a runtime takes them."""
        return feeds(self.inputs) | {name: to_numpy(tensor) for name, tensor in self.others.items()}

    def check(self, output: np.ndarray, lse: np.ndarray) -> None:
        """Assert that a runtime's results are right, as `oracle.check_forward` does."""
        output, lse = to_torch(output), to_torch(lse)
        assert output.dtype is self.inputs[0].dtype
        assert lse.dtype is torch.float32
        check_forward(self, output, lse)
