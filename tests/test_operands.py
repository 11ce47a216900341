"""`na_compiler.operands`: what is said once appears everywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from na_compiler import operands
from na_compiler.operands import arguments, later
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import KernelInfo
from na_compiler.workspace import Workspace

PLAIN = Problem((6, 9), 4, 8, 3, heads_kv=2, head_dim_v=12)
RICH = PLAIN.replace(additional_kv=True, dtype="float16")


def names(problem, direction, workspace=None):
    return [argument.name for argument in arguments(problem, direction, workspace)]


def test_order_of_a_kernels_arguments():
    """The families of kernels are written for it."""
    assert names(PLAIN, "forward") == ["query", "key", "value", "scale", "output", "lse"]
    assert names(RICH, "forward") == [
        "query", "key", "value", "additional_keys", "additional_values", "scale", "output", "lse",
    ]  # fmt: skip
    assert names(RICH, "backward", Workspace(((4, 5), ("additional",)))) == [
        "query", "key", "value", "additional_keys", "additional_values", "output", "grad_output", "lse", "grad_lse",
        "scale", "grad_query", "grad_key", "grad_value", "grad_additional_keys", "grad_additional_values",
        "workspace0", "workspace1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="direction must be 'forward', 'backward' or 'tangent', got 'sideways'"):
        arguments(PLAIN, "sideways")


def test_what_a_manifest_says_of_them():
    info = KernelInfo(RICH, "backward", "llvm", Workspace(((4, "additional"),)))
    said = {operand["name"]: operand for operand in json.loads(json.dumps(info.to_dict()))["operands"]}
    assert said["query"] == {
        "name": "query", "role": "input", "dtype": "float16", "shape": ["batch", 6, 9, 4, 8], "strides": "free",
    }  # fmt: skip
    assert said["additional_values"]["shape"] == ["batch", "additional", 2, 12]
    assert said["scale"] == {"name": "scale", "role": "scalar", "dtype": "float32"}
    assert (said["lse"]["role"], said["lse"]["dtype"], said["lse"]["strides"]) == ("input", "float32", "compact")
    assert (said["grad_output"]["strides"], said["grad_lse"]["strides"]) == ("free", "compact")
    assert (said["grad_key"]["role"], said["grad_key"]["shape"]) == ("output", ["batch", 6, 9, 2, 8])
    assert said["workspace0"]["shape"] == ["batch", 4, "additional"]
    assert KernelInfo.from_dict(info.to_dict()) == info


def test_a_kernel_with_other_operands_is_refused():
    data = KernelInfo(PLAIN, "forward", "llvm").to_dict()
    data["operands"] = data["operands"][:-1]
    with pytest.raises(ValueError, match="takes other operands than those of this version"):
        KernelInfo.from_dict(data)


def test_everything_after_the_first_may_be_left_out():
    """Otherwise programs of before could not call the operators."""
    assert [operand.name for operand in operands.TABLE if operand.role != "output" and not operand.is_later] == [
        "query", "key", "value", "scale",
    ]  # fmt: skip
    assert [operand.name for operand in later()][:2] == ["additional_keys", "additional_values"]


def test_operands_of_a_problem_are_known_ones():
    with pytest.raises(
        ValueError, match=r"operands must be names among relative_position_bias, key_mask, got \('gain',\)"
    ):
        PLAIN.replace(operands=("gain",))


def test_one_line_in_the_table_is_enough():
    """Made-up operands: a number a head, a table with a gradient, a mask, numbers at run time; nothing else changes."""
    script = Path(__file__).parent / "made_up_operands.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_one_line_in_the_table_is_enough_for_the_operators_in_cxx():
    """Made-up operands in both libraries: torch's schema, ONNX Runtime's inputs and attributes, calls, messages."""
    script = Path(__file__).parent / "made_up_native.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")
