"""The operators under `torch.compile` and `torch.export`: no copies, dynamic sizes, programs in other processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import check_backward, check_forward, draw
from test_ops import OPS, RICH, attend, error

import na_compiler.passes
from na_compiler import na2d


class TestCompile:
    @staticmethod
    def graphs(function, *inputs):
        """Compile a function, run it and, if it is differentiable, its backward; returns the generated code."""
        torch._dynamo.reset()
        from torch._inductor import config
        from torch._inductor.utils import run_and_get_code

        def run():
            output = torch.compile(function, fullgraph=True)(*inputs)
            if output.requires_grad:
                output.square().sum().backward()
            return output

        # Inductor's own cache does not see that an operator's tags have changed.
        with config.patch(force_disable_caches=True):
            return run_and_get_code(run)

    def test_forward_and_backward_of_a_layer(self, seed):
        """And no copy of query, key and value: what Inductor generates for the layer's forward has no kernel at all."""
        layer = na_compiler.NeighborhoodAttention2D(16, 2, 3)
        x = torch.randn(2, 6, 9, 16, requires_grad=True)
        layer(x).square().sum().backward()
        expected = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        x.grad = None
        layer.zero_grad()
        output, codes = self.graphs(layer, x)
        assert error(output, layer(x)) < 1e-5
        for grad, reference in zip((x.grad, *(p.grad for p in layer.parameters())), expected, strict=True):
            assert error(grad, reference) < 1e-5
        forward, backward = codes
        assert "na_compiler.na2d.default(" in forward
        assert "na_compiler.na2d_backward.default(" in backward
        # Two matrix products and the operator; a copy would be a generated loop.
        assert "cpp_fused" not in forward
        operator = next(line for line in forward.splitlines() if "na_compiler.na2d.default(" in line)
        assert operator.count("reinterpret_tensor(") == 3, operator

    def test_inference(self, seed):
        layer = na_compiler.NeighborhoodAttention1D(16, 2, 3, is_causal=True)
        x = torch.randn(2, 17, 16)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output, _ = self.graphs(layer, x)
                assert error(output, layer(x)) < 1e-5

    def test_additional_keys_and_lse(self, seed):
        example = draw(RICH, batch=2)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        compiled = torch.compile(lambda *t: attend(RICH, t, return_lse=True), fullgraph=True)
        output, lse = compiled(*inputs)
        check_forward(example, output, lse)
        check_backward(example, torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse)))

    def test_dynamic_shapes(self, seed):
        compiled = torch.compile(lambda q: na2d(q, q, q, 3), fullgraph=True, dynamic=True)
        for batch, x, y in ((2, 6, 9), (3, 6, 9), (2, 7, 8)):
            query = torch.randn(batch, x, y, 2, 8)
            assert error(compiled(query), na2d(query, query, query, 3)) < 1e-6

    def test_errors_are_those_of_the_function(self):
        query = torch.randn(1, 6, 9, 2, 8)
        with pytest.raises(Exception, match="kernel_size=6 would work"):
            torch.compile(lambda q: na2d(q, q, q, 7), fullgraph=True)(query)

    @pytest.mark.parametrize("scale", [np.float32(0.25), np.float64(0.25), np.int64(2)])
    @pytest.mark.parametrize("given", ["constant", "argument", "layer"])
    def test_scales_of_numpy(self, scale, given, seed):
        """To Dynamo they are arrays."""
        query = torch.randn(1, 6, 9, 2, 8)
        options = {"fullgraph": True, "backend": "aot_eager"}
        if given == "layer":
            layer = na_compiler.NeighborhoodAttention2D(16, 2, np.int64(3), qk_scale=scale, is_causal=np.bool_(True))
            x = query.flatten(-2)
            assert error(torch.compile(layer, **options)(x), layer(x)) < 1e-6
        elif given == "argument":
            found = torch.compile(lambda q, s: na2d(q, q, q, 3, scale=s), **options)(query, scale)
            assert error(found, na2d(query, query, query, 3, scale=float(scale))) < 1e-6
        else:
            found = torch.compile(lambda q: na2d(q, q, q, 3, scale=scale), **options)(query)
            assert error(found, na2d(query, query, query, 3, scale=float(scale))) < 1e-6

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"kernel_size": np.int64(3)}, "int.* of each would work"),
            ({"kernel_size": (3, np.int64(3))}, "must be Python's ints and bools"),
            ({"kernel_size": 3, "is_causal": np.bool_(True)}, "must be Python's ints and bools"),
            ({"kernel_size": 3, "scale": np.array([0.5, 0.5])}, "scale must be a finite number, got ndarray"),
            ({"kernel_size": 3, "scale": torch.tensor(0.5)}, "scale must be a finite number, got Tensor"),
        ],
    )
    def test_what_dynamo_cannot_take_is_refused_by_name(self, options, said):
        query = torch.randn(1, 6, 9, 2, 8)
        with pytest.raises(Exception, match=said):
            torch.compile(lambda q: na2d(q, q, q, **options), fullgraph=True, backend="eager")(query)


class Whole(torch.nn.Module):
    """Attends with a window as large as the layout allows."""

    def forward(self, x):
        return na2d(x, x, x, kernel_size=(min(7, x.shape[1]), 3))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = na_compiler.NeighborhoodAttention2D(16, 2, 3)
        self.second = na_compiler.NeighborhoodAttention2D(16, 4, (3, 5), dilation=(2, 1))

    def forward(self, x):
        return self.second(x + self.first(x))


LOAD = """
import sys, torch, na_compiler
program = torch.export.load(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    output = program.module()(x)
    assert ((output - expected).norm() / expected.norm()) < 1e-5, "wrong"
print("ok")
"""


class TestExport:
    @pytest.mark.parametrize("dynamic", ["batch", "layout"])
    def test_saved_and_loaded_in_another_process(self, dynamic, seed, tmp_path):
        net = Net().eval()
        dims = {0: torch.export.Dim("batch", max=64)}
        shapes = [(2, 7, 8), (5, 7, 8), (1, 7, 8)]
        if dynamic == "layout":
            dims |= {1: torch.export.Dim("x", min=6, max=40), 2: torch.export.Dim("y", min=5, max=40)}
            shapes += [(2, 6, 11), (1, 12, 5)]
        program = torch.export.export(net, (torch.randn(2, 7, 8, 16),), dynamic_shapes=(dims,))
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(OPS.na2d.default) == 2
        torch.export.save(program, tmp_path / "net.pt2")
        with torch.no_grad():
            cases = [(x := torch.randn(*shape, 16), net(x)) for shape in shapes]
        torch.save(cases, tmp_path / "cases.pt")
        command = [sys.executable, "-c", LOAD, str(tmp_path / "net.pt2"), str(tmp_path / "cases.pt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip().endswith("ok"), done.stderr

    def test_a_kernel_size_that_depends_on_the_layout(self, seed, tmp_path):
        dims = {1: torch.export.Dim("x", min=2, max=40)}
        program = torch.export.export(Whole(), (torch.randn(1, 8, 9, 2, 8),), dynamic_shapes=(dims,))
        torch.export.save(program, tmp_path / "whole.pt2")
        loaded = torch.export.load(tmp_path / "whole.pt2")
        compiled = torch.compile(Whole(), fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (5, 8, 12):
            x = torch.randn(1, tokens, 9, 2, 8)
            expected = Whole()(x)
            for module in (program.module(), loaded.module(), compiled):
                assert torch.equal(module(x), expected)
        for tokens, window in ((5, 5), (12, 7)):
            (site,) = na_compiler.passes.collect(program, [{"x": (1, tokens, 9, 2, 8)}])
            assert site.problem.kernel_size == (window, 3)

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("make", [lambda q: q.shape[-1] ** -0.5, lambda q: 3 / q.shape[1], lambda q: None])
    def test_a_scale_of_a_dynamic_size(self, make, strict, seed):
        """It multiplies query, as the operator would have the scale of the example for all."""

        class Scaled(torch.nn.Module):
            def forward(self, q):
                return na2d(q, q, q, 3, scale=make(q), return_lse=True)

        dims = {1: torch.export.Dim("x", min=3, max=40), 4: torch.export.Dim("head_dim", min=2, max=64)}
        query = torch.randn(1, 6, 9, 2, 8)
        program = torch.export.export(Scaled(), (query,), dynamic_shapes=(dims,), strict=strict)
        for x, head_dim in ((6, 8), (9, 12)):
            query = torch.randn(1, x, 9, 2, head_dim)
            for result, expected in zip(program.module()(query), Scaled()(query), strict=True):
                torch.testing.assert_close(result, expected)

    def test_a_scale_of_a_fixed_size_stays_with_the_operator(self):
        class Scaled(torch.nn.Module):
            def forward(self, q):
                return na2d(q, q, q, 3, scale=q.shape[-1] ** -0.5)

        dims = {1: torch.export.Dim("x", min=3, max=40)}
        for strict in (False, True):
            query = torch.randn(1, 6, 9, 2, 4)
            program = torch.export.export(Scaled(), (query,), dynamic_shapes=(dims,), strict=strict)
            (node,) = [node for node in program.graph.nodes if node.target == OPS.na2d.default]
            assert node.args[7] == 0.5

    def test_decompositions_keep_the_operator(self, seed):
        program = torch.export.export(Net(), (torch.randn(2, 7, 8, 16),)).run_decompositions()
        assert OPS.na2d.default in [node.target for node in program.graph.nodes]

    def test_the_layers_gradient_exports(self, seed):
        """A whole training step, traced with `make_fx`."""
        from torch.fx.experimental.proxy_tensor import make_fx

        def step(query):
            query = query.detach().requires_grad_()
            return torch.autograd.grad(na2d(query, query, query, 3).square().sum(), query)[0]

        query = torch.randn(1, 6, 9, 2, 8)
        graph = make_fx(step)(query)
        assert OPS.na2d_backward.default in [node.target for node in graph.graph.nodes]
        torch.testing.assert_close(graph(query), step(query))
