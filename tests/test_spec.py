"""`na_compiler.compiler.spec`: what a kernel is named by, without TVM."""

import dataclasses
import pickle
import time

import imports
import pytest
import torch
from processes import WITHOUT_TORCH, run_python

from na_compiler.compiler import spec as spec_module
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem

PROBLEM = Problem((8, 9), 2, 16, 3)


def test_equal_problems_have_one_key():
    spellings = [
        PROBLEM,
        Problem([8, 9], 2, 16, (3, 3), [1, 1], 1, [False, False], 2, 16, False, torch.float32),
        Problem.from_dict(PROBLEM.to_dict()),
    ]
    assert len({KernelSpec.make(problem).key for problem in spellings}) == 1
    assert len({KernelSpec.make(problem) for problem in spellings}) == 1


def test_everything_that_changes_the_code_changes_the_key(monkeypatch):
    changes = dict(
        layout=(9, 8), heads=4, head_dim=8, kernel_size=(3, 4), stride=(1, 2), dilation=(2, 1),
        is_causal=(True, False), heads_kv=1, head_dim_v=8, additional_kv=True, dtype="float16",
        border=("cut", "shift"),
    )  # fmt: skip
    # Operands that no table has yet cannot be asked for: tests/test_operands.py.
    assert set(changes) | {"operands"} == {field.name for field in dataclasses.fields(Problem)}
    specs = [KernelSpec.make(PROBLEM.replace(**{name: value})) for name, value in changes.items()]
    specs += [KernelSpec.make(PROBLEM, target) for target in ("llvm:x86-64", "llvm:x86-64-v3", "llvm:aarch64")]
    specs += [KernelSpec.make(PROBLEM, "llvm:x86-64-v4", direction) for direction in ("forward", "backward")]
    config = specs[-1].config
    specs += [dataclasses.replace(specs[-1], forced=config)]
    specs += [dataclasses.replace(specs[-1], forced=dataclasses.replace(config, accumulators=config.accumulators - 1))]
    keys = [spec.key for spec in specs]
    for name, value in (("tvm_version", "0.99"), ("source_fingerprint", "another"), ("ABI", 99)):
        with monkeypatch.context() as patch:
            patch.setattr(spec_module, name, value if name == "ABI" else lambda value=value: value)
            keys.append(KernelSpec.make(PROBLEM, "llvm:x86-64-v4").key)
    assert len(set(keys)) == len(keys)


def test_the_fingerprint_covers_all_that_generates_code(monkeypatch, tmp_path):
    """A changed byte in any of what families are made of, and of what they import, makes other keys."""
    graph, paths = imports.graph(), imports.sources()
    left = [module for module in graph if module.startswith("na_compiler.schedules.")]
    made_of = {"na_compiler.compiler.build", "na_compiler.compiler.nvcc"}
    while left:
        module = left.pop()
        if module not in made_of and module != "na_compiler":
            made_of.add(module)
            left += graph[module]
    read_bytes, read = type(tmp_path).read_bytes, set()
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: read.add(path.resolve()) or read_bytes(path))
    before = spec_module.source_fingerprint.__wrapped__()
    assert {module for module in made_of if paths[module].resolve() not in read} == set()
    for name in ("plan.py", "transpose.py", "axes.py", "window.py", "build.py"):
        with monkeypatch.context() as patch:
            changed = lambda path, name=name: read_bytes(path) + (b"#" if path.name == name else b"")  # noqa: E731
            patch.setattr(type(tmp_path), "read_bytes", changed)
            assert spec_module.source_fingerprint.__wrapped__() != before, name


def test_a_key_needs_no_plan(monkeypatch):
    """It takes no longer for a large problem, and nothing but Python."""
    monkeypatch.setattr(spec_module, "choose", None)
    spec_module.source_fingerprint()
    for rank, layout in ((1, (2**31 - 1,)), (2, (46341, 46337)), (3, (1291, 1289, 1283))):
        problem = Problem(layout, 8, 64, tuple(x // 3 for x in layout), 2, 3, True)
        for target in ("llvm:x86-64-v3", "cuda:sm_90a"):
            started = time.thread_time()
            assert len(KernelSpec.make(problem, target, "backward").key) == 32
            assert time.thread_time() - started < 0.005, rank


def test_a_spec_can_be_sent_and_is_planned_when_it_is_asked():
    spec = KernelSpec.make(PROBLEM, "llvm:x86-64-v3")
    fresh = pickle.loads(pickle.dumps(spec))
    assert spec.config.family == "cpu"
    sent = pickle.loads(pickle.dumps(spec))
    for other in (fresh, sent):
        assert (other, hash(other), other.key, other.config) == (spec, hash(spec), spec.key, spec.config)
    forced = dataclasses.replace(spec, forced=dataclasses.replace(spec.config, row_block=3))
    assert forced.config.row_block == 3
    assert forced.reason is None
    assert forced != spec
    assert pickle.loads(pickle.dumps(forced)) == forced


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_keys_are_the_same_in_another_process_which_loads_no_tvm(direction):
    code = """
        import sys
        from na_compiler.compiler.spec import KernelSpec
        from na_compiler.problem import Problem
        print(KernelSpec.make(Problem((8, 9), 2, 16, 3), "llvm", sys.argv[1]).key)
        assert "tvm" not in sys.modules
        assert "tvm_ffi" not in sys.modules
        assert "torch" not in sys.modules
    """
    keys = {run_python(code, direction, PYTHONHASHSEED=str(seed)).strip() for seed in (1, 2)}
    assert keys == {KernelSpec.make(PROBLEM, "llvm", direction).key}


def test_a_second_process_finds_what_the_first_compiled_without_tvm(tmp_path):
    code = """
        import sys
        import numpy as np
        import na_compiler
        kernel = na_compiler.compile(na_compiler.Problem((8, 9), 2, 16, 3))
        query = np.ones((1, 8, 9, 2, 16), np.float32)
        output, lse = kernel(query, query, query)
        assert np.allclose(output, 1)
        print("tvm" in sys.modules, "torch" in sys.modules)
    """
    assert run_python(code, NA_COMPILER_CACHE=tmp_path).split() == ["True", "True"]
    assert run_python(code, NA_COMPILER_CACHE=tmp_path).split()[0] == "False"
    assert run_python(WITHOUT_TORCH + code.replace("\n        ", "\n"), NA_COMPILER_CACHE=tmp_path).split() == [
        "False",
        "False",
    ]


def test_importing_the_package_is_light():
    code = """
        import sys
        import na_compiler
        assert {"torch", "tvm", "tvm_ffi", "numpy", "onnx", "rich"} & set(sys.modules) == set()
        print(sorted(na_compiler.__all__))
    """
    assert "na2d" in run_python(code)


def test_names_a_direction():
    with pytest.raises(ValueError, match="direction must be 'forward', 'backward' or 'tangent', got 'sideways'"):
        KernelSpec.make(PROBLEM, direction="sideways")


def test_readable():
    assert str(KernelSpec.make(PROBLEM, "llvm:x86-64-v3")) == f"{PROBLEM} forward for llvm:x86-64-v3"
