"""Borders in ONNX: schema, evaluator, operator library, exporters."""

import io
import itertools

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from border_problems import PROBLEMS, SMALL
from draws import some
from onnx.reference import ReferenceEvaluator
from onnx_models import Forward, one_node, run, session
from test_onnx_bodies import two_nodes

import na_compiler
import na_compiler.onnx
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem


@pytest.mark.parametrize("problem", some(SMALL, 1, "onnx borders"), ids=str)
def test_onnx(problem, tmp_path, seed):
    """Schema, evaluator, operator library; what has no kernel for a border is told so."""
    made = one_node(problem, dynamic_layout=False, body=None)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(made, strict_mode=True), full_check=True)
    assert na_compiler.onnx.problems(made) == {problem: 1}
    example = Forward(problem, batch=2)
    example.check(*ReferenceEvaluator(made, new_ops=na_compiler.onnx.reference_ops()).run(None, example.feeds))
    other = problem.replace(border="shift", kernel_size=3, stride=1)
    na_compiler.save_bundle(tmp_path / "bundle", [KernelSpec.make(one) for one in (problem, other)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    na_compiler.onnx.register(options, tmp_path / "bundle")
    example.check(*run(session(made, options), example.feeds))
    example = Forward(other, batch=2)
    example.check(*run(session(one_node(other, dynamic_layout=False, body=None), options), example.feeds))
    for border, message in (("wrapped", "border must be shift, cut"), ("cut:9", "LEFT less than kernel_size=3")):
        broken = one_node(other, dynamic_layout=False, body=None, attributes={"border": border})
        with pytest.raises(Exception, match=message):
            session(broken, options)


def test_onnx_refuses_what_is_no_border(seed):
    made = one_node(SMALL[0], dynamic_layout=False, body=None, attributes={"border": "cyclic"})
    with pytest.raises(onnx.shape_inference.InferenceError, match="border must be one of"):
        onnx.shape_inference.infer_shapes(made, strict_mode=True)
    made = one_node(SMALL[0], dynamic_layout=False, body=None, attributes={"border": 1})
    with pytest.raises(ValueError, match="border must be of type STRING, got INT"):
        na_compiler.onnx.problems(made)
    # Its bias is that of the window before, and its window depends on the layout.
    with pytest.raises(ValueError, match="bodies do not compute border='clamp': leave bodies out"):
        one_node(Problem(17, 2, 8, 5), dynamic_layout=False, attributes={"border": "clamp"})


_BODIES = list(itertools.product([*SMALL, *PROBLEMS], ["generic", "blocked"]))


@pytest.mark.parametrize(("problem", "body"), some(_BODIES, 3, "onnx bodies of borders"), ids=str)
def test_bodies(problem, body, seed):
    """In ONNX Runtime without our library, in onnx's evaluator, and with everything put in the nodes' place."""
    # Strides divide groups that wrap, which they do not in every layout.
    is_dynamic = body == "generic" and "wrap" not in problem.border
    model = one_node(problem, body=body, dynamic_layout=is_dynamic)
    onnx.checker.check_model(model, full_check=True)
    example = Forward(problem, batch=2)
    example.check(*run(session(model), example.feeds))
    example.check(*ReferenceEvaluator(model).run(None, example.feeds))
    example.check(*ReferenceEvaluator(onnx.inliner.inline_local_functions(model)).run(None, example.feeds))


@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_bodies_of_one_border(body, seed):
    """Several nodes of an operator share a function, if they have one border."""
    model = two_nodes(Problem(14, 2, 8, 5, border="cut:1"), {"kernel_size": [3]}, body, additional=True)
    assert len(model.functions) == (1 if body == "generic" else 3)
    with pytest.raises(ValueError, match=r"'again': bodies compute one border for .* NA1D, got .'cut',. beside"):
        two_nodes(Problem(14, 2, 8, 5, border="cut:1"), {"border": "cut"}, body, additional=True)


def test_exporting(seed):
    layer = na_compiler.NeighborhoodAttention1D(16, 2, 5, border="cut")
    x = torch.randn(1, 12, 16)
    tables = dict(custom_translation_table=na_compiler.onnx.translation_table())
    for options in (dict(dynamo=True, **tables), dict(dynamo=False)):
        path = io.BytesIO()
        torch.onnx.export(layer, (x,), path, **options)
        model = onnx.load_model_from_string(path.getvalue())
        assert na_compiler.onnx.problems(model) == {Problem(12, 2, 8, 5, border="cut"): 1}
