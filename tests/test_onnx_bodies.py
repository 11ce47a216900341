"""The portable bodies, in ONNX Runtime without our library and in onnx's own evaluator."""

import itertools
import math
import random

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_models import PARTS, PROBLEMS, Forward, cases, cost, feeds, one_node, session
from onnx_models import run as run_session
from oracle import NAMES, check_forward, draw

from na_compiler.onnx import DOMAIN, add_bodies, reference_ops
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

# Elements of gathered keys up to which a case is run through the generic body: 1 GiB.
LARGEST = 2**28


def run_ort(model, inputs):
    return run_session(session(model), inputs)


def run_evaluator(model, inputs, **options):
    return ReferenceEvaluator(model, **options).run(None, inputs)


@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_generic_body(problem, run, seed):
    example = Forward(problem, batch=2)
    example.check(*run(one_node(problem), feeds(example.inputs)))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_blocked_body(problem, seed):
    model = one_node(problem, body="blocked", dynamic_layout=False)
    onnx.checker.check_model(model, full_check=True)
    made = session(model)
    for batch, additional in ((2, 5), (1, 0)):
        example = Forward(problem, batch=batch, additional=additional)
        example.check(*run_session(made, feeds(example.inputs)))
        example.check(*run_evaluator(model, feeds(example.inputs)))


def test_blocked_functions_are_right_by_themselves(seed):
    # The evaluator above took the generic one: it knows no overloads.
    for problem in PROBLEMS:
        example = Forward(problem)
        model = one_node(problem, body="blocked", dynamic_layout=False)
        inlined = onnx.inliner.inline_local_functions(model)
        assert not inlined.functions
        example.check(*run_evaluator(inlined, feeds(example.inputs)))


@pytest.mark.parametrize("body", ["generic", "blocked"])
@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, run, body, seed):
    problem = Problem((6, 7, 8), 2, 20, 3, additional_kv=True, dtype=dtype)
    example = Forward(problem)
    example.check(*run(one_node(problem, body=body, dynamic_layout=False), feeds(example.inputs)))


@pytest.mark.parametrize("body", ["generic", "blocked"])
@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_finite_where_softmax_is(run, body, seed):
    """One number that is not finite: so are results that depend on it, and beside hidden values there may be NaN."""
    for problem in (Problem((6, 7), 2, 8, 3, additional_kv=True), Problem(19, 2, 4, 7, 2, 2, is_causal=True)):
        model = one_node(problem, body=body, dynamic_layout=False)
        for name, number in itertools.product(NAMES[: 5 if problem.additional_kv else 3], (math.nan, math.inf)):
            example = draw(problem, spoiled={name: random.choice([1, -1]) * number})
            output, lse = map(torch.as_tensor, run(model, feeds(example.inputs)))
            check_forward(example, output, lse, spreads=name in {"value", "additional_values"})


def run_cases(problems):
    for problem in problems:
        if cost(problem) > LARGEST:
            continue  # The generic body needs gigabytes for these; the library's test runs them.
        example = Forward(problem)
        model = one_node(problem)
        for run in (run_ort, run_evaluator):
            example.check(*run(model, feeds(example.inputs)))
        model = one_node(problem, body="blocked", dynamic_layout=False)
        assert model.ByteSize() < 30_000 + 50 * sum(problem.layout)  # Tables are kept for each axis.
        example.check(*run_ort(model, feeds(example.inputs)))


def test_case_file(seed):
    run_cases(cases())


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_whole_case_file(part, seed):
    run_cases(cases(part))


@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_scales(scale, run, seed):
    example = Forward(Problem((6, 10), 2, 16, 3), scale=scale)
    example.check(*run(one_node(example.problem, scale=scale), feeds(example.inputs)))


@pytest.mark.parametrize("additional", [0, 1, 7])
@pytest.mark.parametrize("run", [run_ort, run_evaluator])
def test_numbers_of_additional_keys(additional, run, seed):
    example = Forward(Problem((6, 10), 4, 16, 3, additional_kv=True, heads_kv=2), additional=additional)
    example.check(*run(one_node(example.problem), feeds(example.inputs)))


def test_one_function_serves_every_layout(seed):
    problem = Problem((8, 9), 2, 8, (3, 4), (2, 1), (1, 2), (False, True))
    model = one_node(problem)
    for layout in ((6, 8), (15, 9)):
        example = Forward(problem.replace(layout=layout), batch=3)
        example.check(*run_ort(model, feeds(example.inputs)))


def test_reference_ops_evaluate_models_without_bodies(seed):
    for problem in PROBLEMS:
        example = Forward(problem)
        model = one_node(problem, body=None)
        example.check(*run_evaluator(model, feeds(example.inputs), new_ops=reference_ops()))
        output = run_evaluator(one_node(problem, body=None, lse=False), feeds(example.inputs), new_ops=reference_ops())
        example.check(*output, example.lse.float().numpy()) if example.tokens is None else None


def two_nodes(problem, attributes, body, *, additional):
    """Return a model with two nodes of one operator: the second attends over the first one's output."""
    model = one_node(problem, body=None, dynamic_layout=False)
    first = model.graph.node[0]
    second = onnx.NodeProto.FromString(first.SerializeToString())
    second.name = "again"
    first.output[0] = "between"
    second.input[0] = "between"
    second.output[1] = ""
    if not additional:
        del second.input[3:]
    for attribute in second.attribute:
        if attribute.name in attributes:
            attribute.CopyFrom(helper.make_attribute(attribute.name, attributes[attribute.name]))
    model.graph.node.append(second)
    loaded = ir.serde.deserialize_model(model)
    add_bodies(loaded, body)
    return ir.serde.serialize_model(loaded)


@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_nodes_with_and_without_additional_keys_in_one_model(body, run, seed):
    problem = Problem((8, 9), 2, 8, 3, additional_kv=True)
    model = two_nodes(problem, {"kernel_size": [5, 4]}, body, additional=False)
    onnx.checker.check_model(model, full_check=True)
    first = Forward(problem, batch=2)
    results = run(model, feeds(first.inputs))
    second = Forward(Problem((8, 9), 2, 8, (5, 4)), batch=2)
    second.inputs = [first.output.float(), *first.inputs[1:3]]
    exact = [tensor.double() for tensor in second.inputs]
    second.output, _ = neighborhood_attention(first.output, *exact[1:], (5, 4))
    second.lse = first.lse
    second.check(results[0], results[1])


@pytest.mark.parametrize("run", [run_ort, run_evaluator])
@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_nodes_of_several_windows_in_one_model(body, run, seed):
    problem = Problem((8, 9), 2, 8, 3)
    model = two_nodes(problem, {"kernel_size": [5, 4], "is_causal": [1, 0]}, body, additional=True)
    assert len(model.functions) == (1 if body == "generic" else 3)
    example = Forward(problem)
    query, key, value = (tensor.double() for tensor in example.inputs)
    between, example.lse = neighborhood_attention(query, key, value, 3)
    example.output, _ = neighborhood_attention(between, key, value, (5, 4), is_causal=(True, False))
    example.check(*run(model, feeds(example.inputs)))


def test_the_blocked_body_of_a_dynamic_layout_is_the_generic_one(caplog, seed):
    problem = PROBLEMS[4]
    model = one_node(problem, body="blocked")
    assert [function.overload for function in model.functions] == [""]
    assert "node attend has no fixed layout: it gets the generic body" in caplog.text
    example = Forward(problem)
    example.check(*run_ort(model, feeds(example.inputs)))


def test_bodies_need_an_opset_and_a_known_name():
    loaded = ir.serde.deserialize_model(one_node(PROBLEMS[0], body=None))
    with pytest.raises(ValueError, match="body must be one of generic, blocked, got 'dense'"):
        add_bodies(loaded, "dense")
    loaded.opset_imports[""] = 17
    with pytest.raises(ValueError, match="opset 18 or later, the model has 17"):
        add_bodies(loaded)


def test_a_node_without_scale_and_head_dim_is_refused():
    model = one_node(PROBLEMS[1], body=None)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[3].dim_param = "D"
    with pytest.raises(ValueError, match="node 'attend' needs the attribute scale"):
        add_bodies(ir.serde.deserialize_model(model))


def test_adding_bodies_twice_changes_nothing():
    loaded = ir.serde.deserialize_model(one_node(PROBLEMS[4]))
    before = ir.serde.serialize_model(loaded).SerializeToString()
    add_bodies(loaded)
    assert ir.serde.serialize_model(loaded).SerializeToString() == before


def test_bodies_are_small_and_of_onnx_s_own_operators():
    for problem in PROBLEMS:
        (function,) = one_node(problem).functions
        assert {node.domain for node in function.node} == {""}
        assert function.ByteSize() < 20_000
        assert function.domain == DOMAIN
