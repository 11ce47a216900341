"""Adds operands to the table, and nothing else, and looks everywhere for them; run by test_operands.py."""

import json

from na_compiler import operands
from na_compiler.operands import COMPACT, INPUT, SAME, SCALAR, Operand

operands.TABLE = (
    *operands.TABLE,
    Operand("gain", INPUT, "what outputs are multiplied by", ("heads",), "float32", option="gain", differentiable=True),
    Operand("bias", INPUT, "by offset", ("heads", "offsets"), SAME, option="bias", differentiable=True),
    Operand("row_mask", INPUT, "False hides a key", ("batch", "layout"), "bool", COMPACT, "row_mask"),
    Operand("cap", SCALAR, "of something", dtype="float32", option="cap"),
    Operand("first", SCALAR, "of queries", dtype="int64", default=0),
)

import onnx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from onnx import helper  # noqa: E402

import na_compiler.onnx  # noqa: E402
from na_compiler import Problem, na2d  # noqa: E402
from na_compiler.compiler import serving  # noqa: E402
from na_compiler.passes.bind_torch import unbind  # noqa: E402
from na_compiler.reference import neighborhood_attention, neighborhood_mask  # noqa: E402
from na_compiler.runtime.kernel import KernelInfo, make_kernel  # noqa: E402
from na_compiler.schedules.choose import choose  # noqa: E402
from na_compiler.target import Target  # noqa: E402

OPS = torch.ops.na_compiler
calls = []


def attend(problem, query, key, value, scale):
    """Return output and lse, densely."""
    flat = [tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value)]
    mask = neighborhood_mask(problem, torch.arange(problem.tokens))
    scores = (scale * flat[0] @ flat[1].transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    output, lse = scores.softmax(-1) @ flat[2], scores.logsumexp(-1)
    return output.transpose(1, 2).reshape(value.shape), lse.transpose(1, 2).reshape(value.shape[:-1])


def find_kernel(problem, direction, machine, *, rounds=False, steps=False):
    """Return what a family would have compiled: attention, whose output is multiplied by a number a head."""
    info = KernelInfo(problem, direction, "llvm")

    def function(*values):
        given = dict(zip((argument.name for argument in info.arguments), values, strict=True))
        calls.append(given)
        names = ["query", "key", "value", *(["gain"] if problem.has("gain") else [])]
        with torch.inference_mode(mode=False), torch.enable_grad():
            read = [given[name].double().clone() for name in names]
            if problem.has("gain"):  # One for each batch entry, so that each has a gradient of its own.
                read[3] = read[3].expand(len(read[0]), -1).clone()
            read = [tensor.requires_grad_() for tensor in read]
            output, lse = attend(problem, *read[:3], given["scale"])
            if problem.has("gain"):
                output = output * read[3][:, None, None, :, None]
            if direction == "forward":
                results = (output, lse)
            else:
                grad_lse = given["grad_lse"].double() if len(given["grad_lse"]) else torch.zeros_like(lse)
                grads = (given["grad_output"].double(), grad_lse)
                results = torch.autograd.grad((output, lse), read, grads)
        written = ("output", "lse") if direction == "forward" else [f"grad_{name}" for name in names]
        for name, result in zip(written, results, strict=True):
            given[name].copy_(result.detach())
        if direction == "backward" and problem.has("bias"):
            given["grad_bias"].fill_(1)

    return make_kernel(info, function)


serving.find_kernel = find_kernel
torch.manual_seed(0)
query, key, value = (torch.randn(3, 6, 9, 2, 8) for _ in range(3))
gain, bias, mask = torch.randn(2), torch.randn(2, 5, 5), torch.ones(3, 6, 9, dtype=torch.bool)
plain = neighborhood_attention(query, key, value, 3)[0]
expected = plain * gain[:, None]


def close(one, other):
    """Assert that numbers agree."""
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5)


def schemas():
    """Torch's and ONNX's."""
    schema = str(OPS.na2d.default._schema)
    assert """key_mask=None, str border="shift", Tensor? gain=None, Tensor? bias=None, """ in schema, schema
    assert "float? cap=None, int first=0) -> (Tensor output, Tensor lse)" in schema, schema
    assert len(OPS.na2d_backward.default._schema.returns) == 8
    made = na_compiler.onnx.schema("NA2D")
    assert [parameter.name for parameter in made.inputs][7:] == ["gain", "bias", "row_mask"]
    assert {parameter.option for parameter in made.inputs[3:]} == {onnx.defs.OpSchema.FormalParameterOption.Optional}
    assert (made.inputs[7].type_str, made.inputs[8].type_str, made.inputs[9].type_str) == (
        "tensor(float)", "T", "tensor(bool)",
    )  # fmt: skip
    assert not made.attributes["cap"].required
    assert helper.get_attribute_value(made.attributes["first"].default_value) == 0


def model(shape):
    """Return a model of one node with gain, without the additional tensors before it."""
    float_type = onnx.TensorProto.FLOAT
    node = helper.make_node(
        "NA2D", ["q", "q", "q", "", "", "", "", "gain"], ["y"], domain="na_compiler", kernel_size=[3, 3], cap=1.5
    )
    inputs = [
        helper.make_tensor_value_info("q", float_type, ["B", 6, 9, 2, 8]),
        helper.make_tensor_value_info("gain", float_type, shape),
    ]
    outputs = [helper.make_tensor_value_info("y", float_type, ["B", 6, 9, 2, 8])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("na_compiler", 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets)


def nodes():
    """What a model's nodes pose."""
    onnx.checker.check_model(model([2]), full_check=True)
    problem = Problem((6, 9), 2, 8, 3, operands=("gain", "cap"))
    assert na_compiler.onnx.problems(model([2])) == {problem: 1}
    with pytest.raises(
        onnx.shape_inference.InferenceError, match=r"gain must have shape \[heads\], here \(2,\), got \(3,\)"
    ):
        onnx.shape_inference.infer_shapes(model([3]), strict_mode=True)


def checks():
    """The same message each time, whatever ran before."""
    refused = [
        ({"gain": torch.randn(3)}, r"gain must have shape \[heads\], here \(2,\), got \(3,\)"),
        ({"gain": gain.half()}, "gain must be float32, got torch.float16"),
        ({"gain": gain.to("meta")}, "gain must be on query's device, cpu, got meta"),
        ({"bias": bias.half()}, "bias must have query's dtype, torch.float32, got torch.float16"),
        ({"bias": bias[:, :4]}, r"bias must have shape \[heads, offsets\], here \(2, 5, 5\), got \(2, 4, 5\)"),
        ({"row_mask": mask[:1]}, r"row_mask must have shape \[batch, layout\], here \(3, 6, 9\), got \(1, 6, 9\)"),
        ({"cap": float("nan")}, "cap must be a finite number, got nan"),
        ({"first": 1.5}, "first must be an int, got 1.5"),
    ]
    for _ in range(2):
        for given, message in refused:
            for mode in (torch.inference_mode, torch.enable_grad):
                with mode(), pytest.raises((ValueError, NotImplementedError), match=message):
                    na2d(query, key, value, 3, **given)
        na2d(query, key, value, 3, gain=gain, bias=bias, row_mask=mask, cap=2.0, first=4)
    kernel = find_kernel(Problem((6, 9), 2, 8, 3, operands=("gain",)), "forward", None)
    with pytest.raises(ValueError, match="needs gain"):
        kernel(query, key, value)
    close(kernel(query, key, value, gain=gain)[0], expected)
    with pytest.raises(ValueError, match=r"gain must have shape \(2,\) for na2d"):
        kernel(query, key, value, gain=bias)


def forward():
    """Values reach the kernel, in its order, by every way there is."""
    parameters = ([3, 3], [1, 1], [1, 1], [0, 0], 8**-0.5)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            close(na2d(query, key, value, 3), plain)
            assert calls[-1]["first"] == 0
            close(na2d(query, key, value, 3, gain=gain, cap=2.5, first=7), expected)
            assert (calls[-1]["cap"], calls[-1]["first"]) == (2.5, 7)
            assert list(calls[-1]) == ["query", "key", "value", "gain", "scale", "cap", "first", "output", "lse"]
            close(OPS.na2d(query, key, value, *parameters, None, None, None, None, "shift", gain)[0], expected)
    for rank, tensors in ((2, (query, key, value)),):
        fake = OPS.na2d(*(tensor.to("meta") for tensor in tensors), *parameters, gain=gain.to("meta"))
        assert [tuple(result.shape) for result in fake] == [(3, 6, 9, 2, 8), (3, 6, 9, 2)], rank
    torch.library.opcheck(OPS.na2d.default, (query, key, value, *parameters), {"gain": gain, "first": 3})
    program = torch.export.export(Module(), (query, key, value, gain))
    close(program.module()(query, key, value, gain), expected)
    close(torch.compile(Module(), backend="aot_eager", fullgraph=True)(query, key, value, gain), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d(query, key, value, 3, gain=gain).dtype == torch.bfloat16
    assert calls[-1]["gain"].dtype == torch.float32


class Module(torch.nn.Module):
    """A call with an operand by name."""

    def forward(self, query, key, value, gain):
        """Attend."""
        return na2d(query, key, value, 3, gain=gain, first=2)


def gradients():
    """Of what all batch entries share: summed over them; by autograd, by torch.func, and for each sample."""
    weight = torch.randn_like(plain)
    exact = (weight * plain).sum((0, 1, 2, 4))

    def loss(gain, query=query, key=key, value=value, weight=weight):
        return (weight * na2d(query, key, value, 3, gain=gain)).sum()

    for create_graph in (False, True):
        own = gain.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(own), own, create_graph=create_graph)
        assert grad.shape == gain.shape
        close(grad, exact)
    assert calls[-1]["grad_gain"].shape == (3, 2)
    half = gain.clone().requires_grad_()
    some = [tensor.clone().requires_grad_() for tensor in (query, bias)]
    (weight * na2d(some[0], key, value, 3, gain=half, bias=some[1])).sum().backward()
    close(half.grad, exact)
    assert some[1].grad.eq(3).all()  # From each batch entry one.
    close(torch.func.grad(loss)(gain), exact)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))(
        gain, *(tensor.unsqueeze(1) for tensor in (query, key, value, weight))
    )
    close(each, (weight * plain).sum((1, 2, 4)))
    gains = torch.stack([gain, 2 * gain])
    close(torch.vmap(lambda gain: na2d(query, key, value, 3, gain=gain))(gains), torch.stack([expected, 2 * expected]))


def manifest():
    """What a bundle says."""
    problem = Problem((6, 9), 2, 8, 3, operands=("cap", "gain"))
    assert problem.operands == ("gain", "cap")
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem
    assert str(problem).endswith("kernel_size=3x3 gain cap float32")
    data = json.loads(json.dumps(KernelInfo(problem, "backward", "llvm").to_dict()))
    said = {operand["name"]: operand for operand in data["operands"]}
    assert said["gain"] == {"name": "gain", "role": "input", "dtype": "float32", "shape": [2], "strides": "compact"}
    assert (said["cap"]["role"], said["first"]["dtype"]) == ("scalar", "int64")
    assert (said["grad_gain"]["shape"], said["grad_gain"]["role"]) == (["batch", 2], "output")
    # Nobody has written such a kernel: no family may take the problem for one without its operand.
    for target in ("llvm", "cuda:sm_90a"):
        with pytest.raises(NotImplementedError, match="has no kernels with cap, gain"):
            choose(problem, Target.parse(target), "forward")


def exported():
    """The program of `Module`, with a number besides."""

    class Capped(Module):
        def forward(self, query, key, value, gain):
            return na2d(query, key, value, 3, gain=gain, cap=1.5, first=2)

    return torch.export.export(Capped(), (query, key, value, gain))


def exporter():
    """ONNX's node has it by its place and its name; bodies, which would leave it out, are refused."""
    table = na_compiler.onnx.translation_table()
    made = torch.onnx.export(exported(), (), dynamo=True, custom_translation_table=table, verbose=False)
    (node,) = (node for node in made.model.graph if node.domain == "na_compiler")
    names = [None if value is None else value.name for value in node.inputs]
    assert names == ["query", "key", "value", None, None, None, None, "gain"]
    assert (node.attributes["cap"].value, node.attributes["first"].value) == (1.5, 2)
    problem = Problem((6, 9), 2, 8, 3, operands=("gain", "cap"))
    assert na_compiler.onnx.problems(made.model) == {problem: 1}
    for body in ("generic", "blocked"):
        with pytest.raises(ValueError, match=r"bodies do not compute gain and .*first.*: leave bodies out"):
            na_compiler.onnx.export(exported(), body=body)


def passes():
    """Sites pose the problem with it, and bound nodes, and those that are bound no more, have it still."""
    program = exported()
    problem = Problem((6, 9), 2, 8, 3, operands=("gain", "cap"))
    assert [site.problem for site in na_compiler.passes.collect(program)] == [problem]
    assert na_compiler.passes.bind(program) == 1
    (node,) = program.graph.find_nodes(op="call_function", target=OPS.bound.default)
    assert [getattr(value, "name", value) for value in node.args[-7:]] == [None, "shift", "gain", None, None, 1.5, 2]
    assert unbind(program) == 1
    (node,) = program.graph.find_nodes(op="call_function", target=OPS.na2d.default)
    assert [getattr(value, "name", value) for value in node.args[-7:]] == [None, "shift", "gain", None, None, 1.5, 2]


for part in (schemas, nodes, checks, forward, gradients, manifest, exporter, passes):
    part()
print("ok")
