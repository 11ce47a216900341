"""A bias by relative position and a key mask in ONNX: bodies, the operator library, the exporter."""

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
from draws import some
from onnx.reference import ReferenceEvaluator
from onnx_models import PROBLEMS, Forward, one_node, run, session, to_numpy
from onnxruntime import SessionOptions

import na_compiler
import na_compiler.onnx
from na_compiler import KernelSpec, NeighborhoodAttention2D, Problem
from na_compiler.onnx import reference_ops, register

OPTIONS = [("relative_position_bias",), ("key_mask",), ("relative_position_bias", "key_mask")]
EACH = [problem.replace(operands=options) for problem in PROBLEMS for options in OPTIONS]


@pytest.mark.parametrize("body", ["generic", "blocked"])
@pytest.mark.parametrize("problem", some(EACH, 5, "test_bodies"), ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bodies(problem, body, seed):
    """In ONNX Runtime, and in onnx's evaluator with functions put in place."""
    model = one_node(problem, body=body, dynamic_layout=body == "generic")
    onnx.checker.check_model(model, full_check=True)
    example = Forward(problem, batch=2)
    example.check(*run(session(model), example.feeds))
    inlined = onnx.inliner.inline_local_functions(model)
    assert not inlined.functions
    example.check(*ReferenceEvaluator(inlined).run(None, example.feeds))
    bare = ReferenceEvaluator(one_node(problem, body=None), new_ops=reference_ops())
    example.check(*bare.run(None, example.feeds))


@pytest.mark.parametrize("problem", some(EACH, 2, "test_operator_library"), ids=str)
def test_operator_library(problem, tmp_path, seed):
    """By a kernel; a batch of another size as well. What does not fit is refused by name."""
    na_compiler.save_bundle(tmp_path / "bundle", [KernelSpec.make(problem)])
    options = SessionOptions()
    options.log_severity_level = 3
    register(options, tmp_path / "bundle")
    made = session(one_node(problem, dynamic_layout=False, body=None), options)
    for batch in (2, 1, 3):
        example = Forward(problem, batch=batch)
        example.check(*run(made, example.feeds))
    free = session(one_node(problem, body=None), options)
    for name, tensor in example.others.items():
        with pytest.raises(Exception, match=f"{name} must have shape .*, got|Got invalid dimensions"):
            run(free, example.feeds | {name: to_numpy(torch.cat([tensor, tensor], -1))})


class Model(torch.nn.Module):
    """Layers with and without a bias: one function has to do for both."""

    def __init__(self):
        super().__init__()
        self.first = NeighborhoodAttention2D(12, 3, (3, 5), rel_pos_bias=True)
        self.second = NeighborhoodAttention2D(12, 3, 3)
        torch.nn.init.normal_(self.first.rpb)

    def forward(self, x, mask):
        """Attend, the first time with a mask."""
        return self.second(self.first(x, mask))


@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_exporter(body, seed):
    model = Model().eval()
    x, mask = torch.randn(2, 8, 9, 12), torch.rand(2, 8, 9) < 0.5
    program = na_compiler.onnx.export(model, (x, mask), body=body, input_names=["x", "mask"])
    problem = Problem((8, 9), 3, 4, (3, 5), operands=("relative_position_bias", "key_mask"))
    assert problem in na_compiler.onnx.problems(program.model)
    made = session(ir.serde.serialize_model(program.model))
    (output,) = made.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x, mask), rtol=1e-4, atol=1e-5)
    standard = na_compiler.onnx.export(model, (x, mask), body=body, input_names=["x", "mask"], standard=True)
    assert not standard.model.functions
    (output,) = session(ir.serde.serialize_model(standard.model)).run(None, {"x": x.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x, mask), rtol=1e-4, atol=1e-5)
