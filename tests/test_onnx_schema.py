"""`na_compiler.onnx.schema` and `nodes`: what the schemas infer, and what they refuse."""

import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.shape_inference import InferenceError, infer_shapes
from onnx_models import PARTS, PROBLEMS, cases, one_node

from na_compiler.onnx import DOMAIN, OPERATORS, add_bodies, inline_bodies, problems, register_schemas, schema
from na_compiler.onnx.signature import Signature
from na_compiler.problem import Problem


def inferred(model, **options):
    """Return the shapes of the outputs that strict inference finds, none of them declared."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    outputs = infer_shapes(model, check_type=True, strict_mode=True, **options).graph.output
    return [[d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] for output in outputs]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("body", [None, "generic"])
def test_shapes_flow_through(problem, body):
    model = one_node(problem, body=body, dynamic_layout=False)
    onnx.checker.check_model(model, full_check=True)
    lse = ["B", *problem.layout, problem.heads]
    assert inferred(model) == [[*lse, problem.head_dim_v], lse]
    symbols = ["B", *(f"L{axis}" for axis in range(problem.rank)), problem.heads]
    assert inferred(one_node(problem, body=body)) == [[*symbols, problem.head_dim_v], symbols]


def infer_cases(problems_):
    for problem in problems_:
        model = one_node(problem, body=None, dynamic_layout=False)
        onnx.checker.check_model(model, full_check=True)
        assert inferred(model)[0] == ["B", *problem.layout, problem.heads, problem.head_dim]
        assert problems(model) == {problem: 1}


def test_shapes_of_the_case_file(seed):
    infer_cases(cases(count=20))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_shapes_of_the_whole_case_file(part, seed):
    infer_cases(cases(part))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types(dtype):
    model = infer_shapes(one_node(Problem((8, 9), 2, 8, 3, dtype=dtype), body=None), strict_mode=True)
    output, lse = (value.type.tensor_type.elem_type for value in model.graph.output)
    assert lse == onnx.TensorProto.FLOAT
    assert output == model.graph.input[0].type.tensor_type.elem_type


def test_what_one_input_knows_counts_for_all():
    model = one_node(Problem((8, 9), 2, 8, 3), body=None, dynamic_layout=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    assert inferred(model)[0] == ["B", 8, 9, 2, 8]


def test_registering_again_does_nothing():
    before = {operator: onnx.defs.get_schema(operator, domain=DOMAIN).since_version for operator in OPERATORS}
    register_schemas()
    assert before == dict.fromkeys(OPERATORS, 1)
    assert [p.name for p in schema("NA2D").outputs] == ["output", "lse"]


BASE = Problem((8, 9), 4, 8, 3, heads_kv=2)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"kernel_size": [3]}, "kernel_size"),
        ({"kernel_size": [3, 0]}, "kernel_size must be at least 1"),
        ({"kernel_size": [3, 10]}, r"kernel_size \* dilation must be at most .* 9 tokens on axis 1"),
        ({"kernel_size": [3, 3], "dilation": [1, 4]}, r"kernel_size \* dilation must be at most"),
        ({"stride": [1, 4]}, "stride must be at most kernel_size=3 on axis 1, got 4; stride=3 would work"),
        ({"stride": [0, 1]}, "stride must be at least 1"),
        ({"dilation": [-1, 1]}, "dilation must be at least 1"),
        ({"is_causal": [0, 2]}, "is_causal must be 2 ints that are 0 or 1"),
        ({"is_causal": [0, 0, 0]}, "is_causal"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_wrong_attributes_are_refused(attributes, said):
    model = one_node(BASE, body=None, dynamic_layout=False, attributes=attributes)
    with pytest.raises(InferenceError, match=f"attend.*{said}"):
        infer_shapes(model, strict_mode=True)
    with pytest.raises(InferenceError, match=said):
        onnx.checker.check_model(model, full_check=True)
    with pytest.raises(ValueError, match=said):
        problems(model)


def test_attributes_that_are_missing_or_of_another_type_are_refused():
    model = one_node(BASE, body=None)
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "kernel_size"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(onnx.checker.ValidationError, match="kernel_size"):
        onnx.checker.check_model(model, full_check=True)
    with pytest.raises(onnx.checker.ValidationError, match="kernel_size"):
        onnx.checker.check_model(one_node(BASE, body=None, attributes={"kernel_size": 3.0}), full_check=True)


@pytest.mark.parametrize(
    ("place", "axis", "size", "said"),
    [
        (1, 1, 7, "key must have query's batch and layout"),
        (1, 3, 3, "heads must be a multiple of heads_kv|value must have as many heads as key"),
        (1, 4, 7, "key must have query's head_dim"),
        (2, 3, 4, "value must have as many heads as key"),
        (0, 2, 2, "must have query's batch and layout|at most"),
    ],
)
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_wrong_shapes_are_refused(place, axis, size, said, dynamic_batch):
    model = one_node(BASE, body=None, dynamic_layout=False)
    if not dynamic_batch:
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.input[place].type.tensor_type.shape.dim[axis].dim_value = size
    with pytest.raises(InferenceError, match=said):
        infer_shapes(model, strict_mode=True)


def test_wrong_ranks_types_and_numbers_of_inputs_are_refused():
    model = one_node(BASE, body=None, dynamic_layout=False)
    model.graph.node[0].op_type = "NA3D"
    with pytest.raises(InferenceError, match="query must have 6 dimensions for NA3D"):
        infer_shapes(model, strict_mode=True)
    model = one_node(BASE, body=None)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(InferenceError, match="key must be one of float32, float16, bfloat16, got int64"):
        infer_shapes(model, strict_mode=True)
    model = one_node(BASE, body=None)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(InferenceError, match="key must have query's dtype"):
        infer_shapes(model, strict_mode=True)
    model = one_node(BASE.replace(additional_kv=True), body=None)
    del model.graph.node[0].input[4]
    with pytest.raises(InferenceError, match=r"takes 3 inputs .* or 5 .* got 4"):
        infer_shapes(model, strict_mode=True)
    with pytest.raises(ValueError, match="come together"):
        problems(model)


def test_problems_of_a_dynamic_layout_are_refused():
    with pytest.raises(ValueError, match=r"node 'attend' poses no fixed problem.*export with a fixed layout"):
        problems(one_node(BASE))


def test_no_additional_keys_at_all_pose_the_problem_without():
    model = one_node(BASE.replace(additional_kv=True), body=None, dynamic_layout=False)
    assert problems(model) == {BASE.replace(additional_kv=True): 1}
    for value in model.graph.input[3:]:
        value.type.tensor_type.shape.dim[1].dim_value = 0
    assert problems(model) == {BASE: 1}


def test_problems_in_subgraphs_and_without_value_infos_are_found():
    model = one_node(BASE, body=None, dynamic_layout=False)
    inner = model.graph.node[0]
    branch = helper.make_graph([inner], "branch", [], list(model.graph.output))
    condition = helper.make_tensor_value_info("condition", onnx.TensorProto.BOOL, [])
    names = [output.name for output in model.graph.output]
    choice = helper.make_node("If", ["condition"], names, then_branch=branch, else_branch=branch)
    names = ["query_", "key", "value"]
    identity = helper.make_node("Identity", ["query_"], ["query"])  # Its output's shape is found by inference only.
    model.graph.input[0].name = "query_"
    graph = helper.make_graph([identity, choice], "g", [condition, *model.graph.input], list(model.graph.output))
    whole = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=10)
    assert problems(whole) == {BASE: 2}


def strange(change):
    model = one_node(BASE, body=None, dynamic_layout=False)
    change(model, model.graph.node[0])
    return model


STRANGE = {
    "a misspelt attribute": (lambda m, n: n.attribute.append(helper.make_attribute("dilations", [2, 2])), "dilations"),
    "no key": (lambda m, n: n.input.__setitem__(1, ""), "needs key|input 1 is marked single"),
    "a third output": (lambda m, n: n.output.append("third"), "got 3 outputs|output size 3"),
    "an eighth input": (lambda m, n: n.input.extend([""] * 4 + ["key"]), "got 8|input size 8"),
}


@pytest.mark.parametrize("kind", [*STRANGE, "another version"])
def test_what_the_operators_have_not_is_refused(kind):
    """By the checker, by `problems` and `add_bodies`, and by the passes alike."""
    from na_compiler import passes

    if kind == "another version":  # The checker has no say in it: it knows schemas up to a version, and takes the last.
        model, said = strange(lambda m, n: setattr(m.opset_import[1], "version", 2)), "version 2 of the domain"
    else:
        change, said = STRANGE[kind]
        model = strange(change)
        with pytest.raises(onnx.checker.ValidationError, match=said):
            onnx.checker.check_model(model)
    loaded = ir.serde.deserialize_model(model)
    for read in (problems, passes.collect, add_bodies, inline_bodies):
        with pytest.raises(ValueError, match=said):
            read(loaded)


def test_shapes_that_nobody_knows_pose_no_problem():
    """Not one of the smallest sizes that fit."""
    unknown = Signature("NA1D", (None, None, None), (None, None, None), {"kernel_size": [3]})
    assert unknown.problem() is None
    assert Signature("NA1D", (None, (1, 8, 2, 4), None), (None,) * 3, {"kernel_size": [3]}).problem() is None
    assert Signature("NA1D", ((None, 8, 2, 4),) * 3, (None,) * 3, {"kernel_size": [3]}).problem() is not None
