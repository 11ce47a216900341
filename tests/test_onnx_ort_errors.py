"""What the operator library refuses, kernels, bundles and nodes: an error each, and never a crash."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx_models import PROBLEMS, Forward, feeds, one_node, session
from onnx_sessions import SMALL, edit_manifest, make_bundle, misaligned, open_session, options_for, refused

import na_compiler
from na_compiler.onnx import register
from na_compiler.runtime.bundle import MANIFEST


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("ort") / "bundle", [*PROBLEMS, SMALL])


def test_inputs_that_a_kernel_cannot_read_are_an_error(tmp_path, seed):
    """A GPU would fault on them; a manifest that says so is believed of any kernel."""
    folder = make_bundle(tmp_path / "bundle", [SMALL])
    edit_manifest(folder, lambda text: text.replace('"alignment": 1', '"alignment": 16'))
    example = Forward(SMALL)
    inputs = feeds(example.inputs)
    made = open_session(one_node(SMALL), folder)
    for name in inputs:
        with refused(f"{name} cannot be read where it is: its address must be a multiple of 16"):
            made.run(None, inputs | {name: misaligned(inputs[name])})


def test_a_problem_without_a_kernel_is_an_error_that_names_it(bundle, seed):
    missing = SMALL.replace(kernel_size=(3, 3), dilation=1, stride=1)
    said = "node attend .NA2D.*no kernel for na2d layout=8x9 heads=4 heads_kv=2 head_dim=8 kernel_size=3x3.*on this CPU"
    with refused(said):  # Fixed: when the session is made.
        open_session(one_node(missing, dynamic_layout=False), bundle)
    made = open_session(one_node(missing), bundle)
    with refused(said):
        made.run(None, feeds(Forward(missing).inputs))


def test_a_kernel_for_another_machine_is_no_kernel(tmp_path, seed):
    folder = make_bundle(tmp_path / "bundle", [SMALL])
    target = na_compiler.KernelSpec.make(SMALL).target.name
    edit_manifest(folder, lambda text: text.replace(f'"target": "{target}"', '"target": "llvm:x86-64-v9"'))
    with refused(f"has kernels for llvm:x86-64-v9 only, and this machine is {target}; make it again with --target"):
        open_session(one_node(SMALL, dynamic_layout=False), folder)
    # With another kernel that runs here, it is about the problem.
    make_bundle(folder, [SMALL, PROBLEMS[1]])
    other = f'"target": "{target}"'
    edit_manifest(folder, lambda text: text.replace(other, '"target": "llvm:x86-64-v9"', 1))
    with refused("has the problem for llvm:x86-64-v9 only|has kernels for"):
        open_session(one_node(SMALL, dynamic_layout=False), folder)


def test_missing_bundles(tmp_path, monkeypatch):
    monkeypatch.delenv("NA_COMPILER_BUNDLE", raising=False)
    with refused("no bundle of kernels is named; add the session config entry na_compiler.bundle"):
        register(onnxruntime.SessionOptions())
    with refused("there is no bundle in .*nowhere: no such folder"):
        register(onnxruntime.SessionOptions(), tmp_path / "nowhere")
    with refused("it has no manifest.json"):
        register(onnxruntime.SessionOptions(), tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "manifest.json: it is no JSON"),
        (lambda text: text.replace('"heads": 4', '"heads": 8'), "edited"),
    ],
)
def test_damaged_manifests(damage, said, tmp_path):
    """What else there can be in a manifest, tests/test_manifest.py has."""
    folder = make_bundle(tmp_path / "bundle", [SMALL])
    (folder / MANIFEST).write_text(damage((folder / MANIFEST).read_text()))
    with refused(f"cannot be used: .*{said}.*make it again with na-compile"):
        register(onnxruntime.SessionOptions(), folder)


def test_a_bundle_of_another_runtime(tmp_path):
    folder = make_bundle(tmp_path / "bundle", [SMALL])
    edit_manifest(folder, lambda text: text.replace('"apache-tvm-ffi": "0.1', '"apache-tvm-ffi": "0.7'))
    with refused("it was made with apache-tvm-ffi 0.7.*, and 0.1.* is here"):
        register(onnxruntime.SessionOptions(), folder)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_libraries(damage, tmp_path):
    """Before anything of the bundle is used, although the library is another problem's."""
    folder = make_bundle(tmp_path / "bundle", [SMALL, PROBLEMS[1]])
    library = folder / json.loads((folder / MANIFEST).read_text())["kernels"][1]["library"]
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        library.unlink()
    else:
        library.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    with refused("is missing" if damage == "missing" else "is not the file that was put in"):
        register(onnxruntime.SessionOptions(), folder)


def test_a_library_that_changes_after_registering_is_not_opened(tmp_path):
    folder = make_bundle(tmp_path / "bundle", [SMALL])
    options = options_for(folder)
    (entry,) = json.loads((folder / MANIFEST).read_text())["kernels"]
    (folder / entry["library"]).write_bytes(bytes(entry["bytes"]))
    with refused("is not the file that was put in"):
        session(one_node(SMALL, dynamic_layout=False), options)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"kernel_size": [3]}, "kernel_size must be 2 ints, one per axis, got 1"),
        ({"kernel_size": 3.0}, "kernel_size must be 2 ints, one per axis, and is empty or something else"),
        ({"kernel_size": [3, 100]}, r"kernel_size \* dilation must be at most the layout's 9 tokens on axis 1"),
        ({"kernel_size": [3, -(2**63)]}, "kernel_size must be at least 1"),
        ({"dilation": [1, 2**63 - 1]}, r"kernel_size \* dilation must be at most"),
        ({"stride": "ab"}, "stride must be 2 ints, one per axis, and is empty or something else"),
        ({"stride": [1, 5]}, "stride must be at least 1 and at most kernel_size=4 on axis 1, got 5"),
        ({"is_causal": [0, 2]}, "is_causal must be 0 or 1"),
        ({"scale": 3}, "scale must be a float, and is of another type"),
        ({"scale": float("inf")}, "scale must be finite"),
    ],
)
def test_wrong_attributes(attributes, said, bundle):
    with refused(f"node attend .NA2D.: {said}"):
        open_session(one_node(SMALL, body=None, dynamic_layout=False, attributes=attributes), bundle)


@pytest.mark.parametrize(
    "name",
    ["dilations", "strides", "kernel_shape", "kernelSize", "window_size", "Scale", "is_casual", "dialtion", "causal"],
)
@pytest.mark.parametrize("value", [[1, 1], 1, 0.5, "text", ["a", "b"], [0.5], helper.make_tensor("t", 1, [1], [1.0])])
def test_an_attribute_that_is_not_ours(name, value, bundle):
    """With another name the default would be taken, and another window computed."""
    model = one_node(SMALL, body=None)
    node(model).attribute.append(helper.make_attribute(name, value))
    with refused(f"node attend .NA2D.: it has an attribute {name}, which is unknown; known are kernel_size, stride"):
        open_session(model, bundle)


@pytest.mark.parametrize("change", ["empty key", "third output", "eighth input", "no output"])
def test_inputs_and_outputs_that_are_not_ours(change, bundle):
    """ONNX Runtime itself refuses them."""
    model = one_node(SMALL, body=None)
    if change == "empty key":
        node(model).input[1] = ""
    elif change == "third output":
        node(model).output.append("more")
    elif change == "eighth input":
        node(model).input.extend([""] * 5)
    else:
        node(model).output[0] = ""
        del model.graph.output[0]
    with refused("This is an invalid model. .*attend"):
        open_session(model, bundle)


def node(model):
    (found,) = (node for node in model.graph.node if node.op_type == "NA2D")
    return found


def test_wrong_types_and_shapes(bundle, seed):
    model = one_node(SMALL, body=None)
    for value in (*model.graph.input, model.graph.output[0]):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    inputs = {name: array.astype(np.float64) for name, array in feeds(Forward(SMALL).inputs).items()}
    with refused("Type 'tensor.double.' of input parameter .query. .* is invalid"):
        open_session(model, bundle).run(None, inputs)
    model = one_node(SMALL, body=None)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with refused("key|type"):
        inputs = feeds(Forward(SMALL).inputs)
        open_session(model, bundle).run(None, {**inputs, "key": inputs["key"].astype(np.float16)})
    model = one_node(SMALL, body=None)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    inputs = feeds(Forward(SMALL).inputs)
    made = open_session(model, bundle)
    with refused(r"key must have shape \[1, 8, 9, 2, 8\] where query has \[1, 8, 9, 4, 8\], got \[1, 8, 8, 2, 8\]"):
        made.run(None, {**inputs, "key": inputs["key"][:, :, :8]})
    with refused(r"query must have 5 dimensions, got shape \[1, 8, 9, 4\]"):
        made.run(None, {**inputs, "query": inputs["query"][..., 0]})
    with refused("query's heads must be a multiple of key's, got 4 and 3"):
        wide = {name: np.repeat(inputs[name], 2, 3)[..., :3, :] for name in ("key", "value")}
        made.run(None, {**inputs, **wide})
    made.run(None, inputs)  # It still works.


def test_fuzzed_nodes_never_crash(bundle, session_seed):
    script = Path(__file__).parent / "onnx_fuzz.py"
    count = 150
    result = subprocess.run(
        [sys.executable, script, bundle, str(session_seed), str(count)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    ran, refusals = map(int, result.stdout.split()[-2:])
    assert ran + refusals == count
    assert refusals > 0
    assert ran > 0
