"""The passes over ONNX models."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import na_compiler.onnx
from na_compiler import NeighborhoodAttention2D, Problem, passes
from na_compiler.onnx.reference_ops import reference_ops
from na_compiler.passes.masks import axis_mask

BATCH = {0: Dim("B", min=1, max=64)}


def run(program, x):
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NeighborhoodAttention2D(32, 2, 3, dilation=d) for d in (1, 2, 1)])

    def forward(self, image):
        x = image.permute(0, 2, 3, 1)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_collect_finds_each_layer_with_its_problem(tmp_path):
    x = torch.randn(2, 32, 8, 9)
    model = na_compiler.onnx.export(Encoder().eval(), (x,), dynamic_shapes=(BATCH,)).model
    sites = passes.collect(model)
    assert [site.layer for site in sites] == ["layers.0", "layers.1", "layers.2"]
    assert all(site.dynamic == ("batch",) and site.is_ours for site in sites)
    near, far = Problem((8, 9), 2, 16, 3), Problem((8, 9), 2, 16, 3, dilation=2)
    assert {problem: len(found) for problem, found in sites.problems().items()} == {near: 2, far: 1}


def test_collect_at_other_resolutions():
    x = torch.randn(2, 32, 8, 9)
    dims = {0: Dim("B", min=1, max=64), 2: Dim("X", min=6, max=64), 3: Dim("Y", min=6, max=64)}
    model = na_compiler.onnx.export(Encoder().eval(), (x,), dynamic_shapes=(dims,)).model
    sites = passes.collect(model)
    assert [site.problem for site in sites] == [None] * 3
    assert sites[0].dynamic == ("batch", "layout[0]", "layout[1]")
    sites = passes.collect(model, [{"image": (1, 32, 12, 16)}, {"image": (4, 32, 20, 7)}])
    assert {site.problem.layout for site in sites} == {(12, 16), (20, 7)}
    with pytest.raises(ValueError, match="dimension 1 of input image is 32 in this model, got 3"):
        passes.collect(model, [{"image": (1, 3, 12, 16)}])
    with pytest.raises(ValueError, match="no input 'x'; its inputs are image"):
        passes.collect(model, [{"x": (1, 32, 12, 16)}])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", ["bool", "float", "lowest", "bfloat16", "broken"])
def test_masked_attention_becomes_neighborhood_attention(kind, opset, seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            mask = torch.from_numpy(np.kron(axis_mask(6, 5), axis_mask(10, 3, dilation=2)))
            if kind == "broken":
                mask[7, 30] ^= True
            if kind in {"float", "lowest"}:
                hidden = -torch.inf if kind == "float" else torch.finfo(torch.float32).min
                mask = torch.zeros(60, 60).masked_fill(~mask, hidden)
            if kind == "bfloat16":
                mask = torch.zeros(60, 60).masked_fill(~mask, torch.finfo(torch.bfloat16).min).bfloat16()
            self.register_buffer("mask", mask)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
            y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=0.3)
            return y.transpose(1, 2).flatten(-2)

    model, x = Masked().eval(), torch.randn(2, 60, 32)
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=opset, dynamic_shapes=(BATCH,), verbose=False)
    changed = passes.canonicalise(program.model)
    sites = passes.collect(program.model)
    if kind == "broken":
        assert (changed, sites) == (0, ())
        return
    assert changed == 1
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    assert [site.problem for site in sites] == [Problem((6, 10), 2, 16, (5, 3), dilation=(1, 2), dtype=dtype)]
    assert not {"Softmax", "Attention", "MatMul_1"} & {node.op_type for node in program.model.graph}
    if kind == "bfloat16":
        return  # ONNX Runtime has no products of bfloat16 on a CPU.
    for rows in (x, x[:1]):
        np.testing.assert_allclose(run(program, rows), model(rows).detach().numpy(), rtol=1e-4, atol=1e-5)


def attention(inputs, attributes=None, *, mask=None, opset=25, more=(), outputs=("output",), element=None):
    """Return a model of one node ``Attention``; inputs are shapes, of query, key and value."""
    element = element or onnx.TensorProto.FLOAT
    names = ["query", "key", "value"]
    infos = [helper.make_tensor_value_info(n, element, shape) for n, shape in zip(names, inputs, strict=True)]
    initializers = []
    if mask is not None:
        names.append("mask")
        initializers.append(numpy_helper.from_array(mask, "mask"))
    node = helper.make_node("Attention", [*names, *more], outputs, name="attend", **(attributes or {}))
    rank = len(inputs[0])
    last = inputs[2][-1] if rank == 4 else inputs[2][-1] // attributes["kv_num_heads"] * attributes["q_num_heads"]
    results = [helper.make_tensor_value_info(name, element, None) for name in outputs if name]
    results[0] = helper.make_tensor_value_info(outputs[0], element, [*inputs[0][:-1], last])
    graph = helper.make_graph([node], "g", infos, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def written_out(inputs, mask, *, opset=18, element=None):
    """Return a model of attention that is spelled out."""
    element = element or onnx.TensorProto.FLOAT
    dtype = helper.tensor_dtype_to_np_dtype(element)
    infos = [
        helper.make_tensor_value_info(n, element, s) for n, s in zip(("query", "key", "value"), inputs, strict=True)
    ]
    bias = np.where(mask, 0, -np.inf).astype(dtype)
    nodes = [
        helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["query", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "turned"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "value"], ["output"]),
    ]
    batch, heads = (max(shape[axis] for shape in inputs) for axis in (0, 1))
    result = helper.make_tensor_value_info("output", element, [batch, heads, inputs[0][2], inputs[2][3]])
    constants = [numpy_helper.from_array(np.array(0.3, dtype), "scale"), numpy_helper.from_array(bias, "mask")]
    graph = helper.make_graph(nodes, "g", infos, [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def canonical(model, **options):
    """Return how much was replaced, and the model after it."""
    loaded = ir.serde.deserialize_model(model)
    return passes.canonicalise(loaded, **options), loaded


def check_same(model, loaded, seed, *, has_bodies=True):
    """Compare a model with what a pass made of it, on data drawn anew; without bodies by onnx's own evaluator."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value or 2 for dim in tensor.shape.dim]
        feeds[value.name] = random.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    wanted = ReferenceEvaluator(model).run(None, feeds)[0]
    made = ir.serde.serialize_model(loaded)
    onnx.checker.check_model(made, full_check=True)
    if has_bodies:
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        result = session.run(None, feeds)[0]
    else:
        result = ReferenceEvaluator(made, new_ops=reference_ops()).run(None, feeds)[0]
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


LIKE = [2, 4, 20, 8]
BAND = axis_mask(20, 5)


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"right_window_size": 0}], ids=["causal", "right"])
@pytest.mark.parametrize("flat", [False, True])
def test_causal_sliding_windows_are_neighborhood_attention(attributes, flat, seed):
    attributes = {**attributes, "left_window_size": 4, "softmax_precision": 1}
    inputs = [LIKE, [2, 2, 20, 8], [2, 2, 20, 6]]
    if flat:
        inputs = [["B", 20, 32], ["B", 20, 16], ["B", 20, 12]]
        attributes |= {"q_num_heads": 4, "kv_num_heads": 2}
    model = attention(inputs, attributes)
    count, loaded = canonical(model)
    assert count == 1
    problem = Problem(20, 4, 8, 5, is_causal=True, heads_kv=2, head_dim_v=6)
    assert [site.problem for site in passes.collect(loaded)] == [problem]
    model.opset_import[0].version = 25
    check_same(model, loaded, seed)


def test_a_window_beside_a_mask_counts(seed):
    """The mask of a window of 9, cut down to one of 5 by the window, is a neighborhood if it is causal only."""
    mask = axis_mask(20, 9, is_causal=True)
    model = attention([LIKE] * 3, {"left_window_size": 4}, mask=mask)
    count, loaded = canonical(model)
    assert count == 1
    assert [site.problem for site in passes.collect(loaded)] == [Problem(20, 4, 8, 5, is_causal=True)]
    check_same(model, loaded, seed)
    assert canonical(attention([LIKE] * 3, {"left_window_size": 1}, mask=BAND))[0] == 0
    model = attention([LIKE] * 3, {"is_causal": 1}, mask=BAND)
    assert canonical(model)[0] == 0, "windows at the end have a place that a causal one has not"
    model = attention([LIKE] * 3, mask=BAND)
    count, loaded = canonical(model)
    assert count == 1
    check_same(model, loaded, seed)


def cut_off(left, right):
    return attention([LIKE] * 3, {"left_window_size": left, "right_window_size": right})


BORDERS = {
    "both sides": (cut_off(3, 3), (7, "cut")),
    "more before": (cut_off(4, 1), (6, "cut:4")),
    "nothing before": (cut_off(0, 3), (4, "cut:0")),
    "a mask that is cut off": (attention([LIKE] * 3, mask=axis_mask(20, 6, border="cut")), (6, "cut")),
    "a mask that wraps": (attention([LIKE] * 3, mask=axis_mask(20, 5, border="wrap")), (5, "wrap")),
}


@pytest.mark.parametrize("has_bodies", [False, True])
@pytest.mark.parametrize("kind", BORDERS)
def test_windows_with_another_border(kind, has_bodies, seed):
    model, (size, border) = BORDERS[kind]
    count, loaded = canonical(model, bodies=has_bodies)
    assert count == 1
    assert [site.problem for site in passes.collect(loaded)] == [Problem(20, 4, 8, size, border=border)]
    check_same(model, loaded, seed, has_bodies=has_bodies)


def test_bodies_have_the_border_of_what_comes_first(seed, caplog):
    """One function computes all nodes of an operator."""
    model, first = attention([LIKE] * 3, mask=BAND), cut_off(3, 3)
    for tensor in first.graph.initializer:
        tensor.name = f"more_{tensor.name}"
    first.graph.node[0].output[0] = "more"
    model.graph.node.extend(first.graph.node)
    model.graph.output.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, None))
    with caplog.at_level("INFO", "na_compiler"):
        count, loaded = canonical(model)
    assert count == 1
    assert "bodies compute one border for all nodes of NA1D, which is shift, and it has cut: bodies=Fals" in caplog.text
    count, _ = canonical(ir.serde.serialize_model(loaded), bodies=True)
    assert count == 0, "also where nodes are there already"
    assert canonical(model, bodies=False)[0] == 2


DOUBLE = onnx.TensorProto.DOUBLE
NOT_OURS = {
    "a window without an end": (attention([LIKE] * 3, {"left_window_size": 2}), "hides nothing but what came before"),
    "a window without a beginning": (attention([LIKE] * 3, {"right_window_size": 2}), "hides nothing but what comes"),
    "a window larger than all": (attention([LIKE] * 3, {"left_window_size": 19, "is_causal": 1}), "hides nothing"),
    "an attribute nobody knows": (attention([LIKE] * 3, {"sink": 1}, mask=BAND), "not known here: sink"),
    "a soft cap": (attention([LIKE] * 3, {"softcap": 2.0}, mask=BAND), "soft cap"),
    "double softmax": (attention([LIKE] * 3, {"softmax_precision": 11}, mask=BAND), "another precision"),
    "scores that are read": (attention([LIKE] * 3, mask=BAND, outputs=["output", "", "", "scores"]), "more than one"),
    "counts of keys": (attention([LIKE] * 3, mask=BAND, more=["", "", "counts"]), "a cache"),
    "a newer opset": (attention([LIKE] * 3, mask=BAND, opset=99), "opset 99 is not known"),
    "long heads": (attention([["B", 1, 20, 9000]] * 3, mask=BAND), "head_dim is at most 8192 here, and it is 9000"),
    "double": (attention([LIKE] * 3, mask=BAND, element=DOUBLE), "in double"),
    "a value with one head": (attention([LIKE, LIKE, [2, 1, 20, 8]], mask=BAND), "heads of query, key and value"),
    "a value with batch 1": (attention([LIKE, LIKE, [1, 4, 20, 8]], mask=BAND), "one batch"),
    "dynamic tokens": (attention([["B", 4, "T", 8]] * 3, {"left_window_size": 4, "is_causal": 1}), "dynamic"),
    "a mask for each head": (attention([LIKE] * 3, mask=np.stack([BAND] * 4)), "one of all tokens"),
    "written out, double": (written_out([LIKE] * 3, BAND, element=DOUBLE), "in double"),
    "written out, a value with one head": (written_out([LIKE, LIKE, [2, 1, 20, 8]], BAND), "heads of query"),
    "written out, a value with batch 1": (written_out([LIKE, LIKE, [1, 4, 20, 8]], BAND), "one batch"),
    "written out, one query for all heads": (written_out([[2, 1, 20, 8], LIKE, LIKE], BAND), "heads of query"),
    "written out, opset 12": (written_out([LIKE] * 3, BAND, opset=12), "opset 12"),
    "written out, opset 17, with bodies": (written_out([LIKE] * 3, BAND, opset=17), "bodies need opset 18"),
}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_not_ours_stays_as_it_was(kind, caplog):
    model, said = NOT_OURS[kind]
    with caplog.at_level("INFO", "na_compiler"):
        count, loaded = canonical(model)
    assert count == 0
    assert said in caplog.text
    assert "stays as it is" in caplog.text
    assert ir.serde.serialize_model(loaded) == ir.serde.serialize_model(ir.serde.deserialize_model(model))
    assert passes.collect(loaded) == ()


def test_a_mask_that_callers_may_override_is_no_constant():
    model = attention([LIKE] * 3, mask=BAND)
    model.graph.input.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, [20, 20]))
    assert canonical(model)[0] == 0


@pytest.mark.parametrize("opset", [13, 17])
def test_what_needs_no_bodies_takes_older_models(opset, tmp_path, capsys):
    from na_compiler import cli

    model = written_out([LIKE] * 3, BAND, opset=opset)
    assert canonical(model, bodies=False)[0] == 1
    onnx.save(model, tmp_path / "model.onnx")
    assert cli.main([str(tmp_path / "model.onnx"), "--dry-run"]) == 0
    assert "1 neighborhood attention" in capsys.readouterr().out
    if opset == 13:
        assert cli.main([str(tmp_path / "model.onnx"), "--whole", "-o", str(tmp_path / "model.so")]) == 0


def test_one_head_of_keys_and_values_for_all_is_ours(seed):
    model = written_out([LIKE, [2, 1, 20, 8], [2, 1, 20, 8]], BAND)
    count, loaded = canonical(model)
    assert count == 1
    assert [site.problem for site in passes.collect(loaded)] == [Problem(20, 4, 8, 5, heads_kv=1)]
    check_same(model, loaded, seed)


def branches():
    """Return a model with attention in it and in both branches of an If: the nodes have one name, or none."""
    whole = attention([LIKE] * 3, mask=BAND)
    inner = [attention([LIKE] * 3, mask=axis_mask(20, size)).graph for size in (3, 7)]
    bodies = []
    for i, graph in enumerate(inner):
        node = onnx.NodeProto.FromString(graph.node[0].SerializeToString())
        node.name = ""
        node.input[0], node.input[3], node.output[0] = "output", f"mask_{i}", f"inner_{i}"
        graph.initializer[0].name = f"mask_{i}"
        result = helper.make_tensor_value_info(f"inner_{i}", onnx.TensorProto.FLOAT, LIKE)
        bodies.append(helper.make_graph([node], f"branch_{i}", [], [result], list(graph.initializer)))
    choice = helper.make_node("If", ["flag"], ["chosen"], then_branch=bodies[0], else_branch=bodies[1])
    again = helper.make_node("Attention", ["output", "key", "value", "mask"], ["again"])
    sum_ = helper.make_node("Add", ["chosen", "again"], ["sum"])
    flag = helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    result = helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, LIKE)
    value = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, LIKE)
    graph = helper.make_graph(
        [whole.graph.node[0], choice, again, sum_],
        "g",
        [*whole.graph.input, flag],
        [result],
        list(whole.graph.initializer),
        value_info=[value],
    )
    return helper.make_model(graph, opset_imports=list(whole.opset_import), ir_version=10)


def test_nodes_of_one_name_or_none_are_told_apart(seed):
    model = branches()
    loaded = ir.serde.deserialize_model(model)
    assert passes.canonicalise(loaded) == 4
    sites = passes.collect(loaded)
    assert len({(site.graph, site.node) for site in sites}) == len({site.layer for site in sites}) == 4
    assert sorted(site.problem.kernel_size for site in sites) == [(3,), (5,), (5,), (7,)]
    assert len({site.graph for site in sites}) == 3
    made = ir.serde.serialize_model(loaded)
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    feeds = {name: random.standard_normal(LIKE).astype(np.float32) for name in ("query", "key", "value")}
    for flag in (True, False):
        feeds["flag"] = np.array(flag)
        wanted = ReferenceEvaluator(model).run(None, feeds)[0]
        np.testing.assert_allclose(session.run(None, feeds)[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_function_that_is_called_with_two_shapes_poses_two_problems():
    inner = helper.make_node("NA1D", ["x", "x", "x"], ["y"], domain="na_compiler", kernel_size=[3], name="attend")
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("na_compiler", 1)]
    function = helper.make_function("mine", "Layer", ["x"], ["y"], [inner], imports)
    shapes = {"a": [1, 12, 2, 8], "b": [1, 20, 2, 8]}
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    results = [helper.make_tensor_value_info(f"{n}_", onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
    nodes = [helper.make_node("Layer", [name], [f"{name}_"], domain="mine", name=f"call_{name}") for name in shapes]
    model = helper.make_model(
        helper.make_graph(nodes, "g", infos, results),
        opset_imports=[*imports, helper.make_opsetid("mine", 1)],
        functions=[function],
        ir_version=10,
    )
    wanted = [Problem(12, 2, 8, 3), Problem(20, 2, 8, 3)]
    assert [site.problem for site in passes.collect(model)] == wanted
    assert list(na_compiler.onnx.problems(model)) == wanted


def test_blocked_bodies_stay_blocked(seed):
    model = attention([LIKE] * 3, mask=BAND)
    second = helper.make_node("Attention", ["output", "key", "value", "mask"], ["again"], name="again")
    model.graph.node.append(second)
    model.graph.value_info.append(helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, LIKE))
    model.graph.output[0].name = "again"
    loaded = ir.serde.deserialize_model(model)
    mask = loaded.graph.initializers["mask"]
    last = list(loaded.graph)[-1]
    last.replace_input_with(3, None)
    assert passes.canonicalise(loaded) == 1
    na_compiler.onnx.add_bodies(loaded, "blocked")
    overloads = {function.overload for function in loaded.functions.values()}
    assert len(overloads) == 2
    loaded.graph.register_initializer(mask)
    last.resize_inputs(4)
    last.replace_input_with(3, mask)
    assert passes.canonicalise(loaded) == 1
    assert {function.overload for function in loaded.functions.values()} == overloads
