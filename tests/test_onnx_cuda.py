"""The operator library on ONNX Runtime's CUDA provider: runs where there is one, and a GPU."""

import json

import onnxruntime
import pytest
import torch
from onnx_models import Forward, feeds, one_node, run

import na_compiler
from na_compiler.devices.cuda import cuda_capabilities
from na_compiler.onnx import register
from na_compiler.problem import Problem

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not cuda_capabilities(),
    reason="needs onnxruntime-gpu and a GPU",
)
PROBLEMS = [
    Problem((40, 48), 4, 64, 13, dtype="float32"),
    Problem((40, 48), 4, 64, 13, dtype="float16"),
    Problem((40, 48), 4, 64, 13, dtype="bfloat16"),
    Problem((11, 9), 6, 12, 3, heads_kv=2, additional_kv=True),
    Problem((8, 9, 10), 4, 32, 3, (1, 2, 1), (2, 1, 2), (True, False, False), heads_kv=2),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem, seed, tmp_path):
    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem, "cuda")])
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    register(options, tmp_path / "bundle")
    torch.zeros(1).cuda()  # Loads CUDA's libraries.
    session = onnxruntime.InferenceSession(
        one_node(problem, dynamic_layout=False).SerializeToString(),
        options,
        providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    example = Forward(problem)
    example.check(*run(session, feeds(example.inputs)))
    with open(session.end_profiling()) as file:  # noqa: PTH123
        events = [event.get("args", {}) for event in json.load(file)]
    providers = {event["provider"] for event in events if event.get("op_name", "").startswith("NA")}
    assert providers == {"CUDAExecutionProvider"}
