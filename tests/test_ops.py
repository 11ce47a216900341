"""`na_compiler.ops.operators`: what torch has to know of the operators, asked the way that torch asks."""

import io
import subprocess
import sys

import pytest
import torch
from oracle import check_backward, check_forward, draw
from torch.utils.flop_counter import FlopCounterMode

import na_compiler.ops.operators
import na_compiler.passes
from na_compiler import na1d, na2d, na3d
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

OPS = torch.ops.na_compiler
PLAIN = Problem((6, 9), 2, 8, 3)
RICH = Problem((6, 9), 4, 8, (3, 4), (1, 2), (2, 1), (False, True), 2, 12, additional_kv=True)
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def fused(batch=2, layout=(6, 9), heads=2, head_dim=8, **options):
    """Query, key and value as views of one projection, and the projection."""
    whole = torch.randn(batch, *layout, 3, heads, head_dim, **options)
    return (*whole.unbind(-3), whole)


def attend(problem, tensors, **options):
    extra = dict(zip(("additional_keys", "additional_values"), tensors[3:], strict=False))
    parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    return FUNCTIONS[problem.rank](*tensors[:3], *parameters, **extra, **options)


def error(result, expected):
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "problem", [PLAIN, RICH, Problem(40, 2, 8, 7, 2, 3, dtype="float16"), Problem((4, 5, 6), 2, 8, 3)], ids=str
)
def test_agrees_with_the_reference(problem, mode, seed):
    example = draw(problem, batch=2)
    with mode():
        output, lse = attend(problem, example.inputs, return_lse=True)
    assert output.is_contiguous()
    assert lse.is_contiguous()
    check_forward(example, output, lse)


@pytest.mark.parametrize("problem", [PLAIN, RICH, RICH.replace(dtype="bfloat16")], ids=str)
def test_training(problem, seed):
    example = draw(problem, batch=2)
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    output, lse = attend(problem, inputs, return_lse=True)
    check_backward(example, torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse)))


def test_gradient_of_output_alone_and_of_lse_alone(seed):
    example = draw(PLAIN)
    inputs = [tensor.requires_grad_() for tensor in example.inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    results = attend(PLAIN, inputs, return_lse=True)
    expected = neighborhood_attention(*exact, 3)
    for result, reference, grad in zip(results, expected, (example.grad_output, example.grad_lse), strict=True):
        grads = torch.autograd.grad(result, inputs, grad, retain_graph=True, allow_unused=True)
        references = torch.autograd.grad(reference, exact, grad.double(), retain_graph=True, allow_unused=True)
        for ours, theirs in zip(grads, references, strict=True):
            if theirs is None:  # lse does not depend on value.
                assert ours is None or not ours.any()
            else:
                assert error(ours, theirs) < 1e-5


def test_only_some_inputs_want_a_gradient(seed):
    query, key, value = (torch.randn(1, 6, 9, 2, 8) for _ in range(3))
    key.requires_grad_()
    output = na2d(query, key, value, 3)
    output.sum().backward()
    assert query.grad is None
    assert key.grad is not None
    assert not na2d(query, key.detach(), value, 3).requires_grad


def test_negated_views(seed):
    """Imaginary parts of conjugates have their sign in a bit that only the dispatcher looks at."""
    value = torch.randn(1, 6, 9, 2, 8, dtype=torch.complex64).conj().imag
    assert value.is_neg()
    query = torch.randn(1, 6, 9, 2, 8)
    for mode in MODES:
        with mode():
            expected = neighborhood_attention(query, query, value, 3)[0]
            assert error(na2d(query, query, value, 3), expected) < 1e-5


@pytest.mark.parametrize("operator", ["na2d", "na2d_backward"])
@pytest.mark.parametrize("problem", [PLAIN, RICH], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(problem, operator, seed):
    example = draw(problem)
    parameters = (*map(list, (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)), 0.3)
    extra = dict(zip(("additional_keys", "additional_values"), example.inputs[3:], strict=False))
    output, lse = OPS.na2d(*example.inputs[:3], *parameters, **extra)
    if operator == "na2d":
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        extra = dict(zip(extra, inputs[3:], strict=True))
        torch.library.opcheck(OPS.na2d.default, (*inputs[:3], *parameters), extra)
    else:
        arguments = (example.grad_output, example.grad_lse, *example.inputs[:3], output, lse, *parameters)
        torch.library.opcheck(OPS.na2d_backward.default, arguments, extra)
        torch.library.opcheck(OPS.na2d_backward.default, (arguments[0], None, *arguments[2:]), extra)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_of_views_and_the_other_ranks(seed):
    query, key, value, _ = fused()
    torch.library.opcheck(OPS.na2d.default, (query, key, value, [3, 3], [1, 1], [1, 1], [False, False], 0.3))
    for rank, operator in ((1, OPS.na1d), (3, OPS.na3d)):
        tensors = fused(1, (6, 4, 5)[:rank])[:3]
        arguments = ([3] * rank, [1] * rank, [1] * rank, [False] * rank, 0.3)
        torch.library.opcheck(operator.default, (*tensors, *arguments))


def test_no_gradient_of_lse_is_one_of_zeros(seed):
    example = draw(RICH)
    parameters = (*map(list, (RICH.kernel_size, RICH.stride, RICH.dilation, RICH.is_causal)), 0.3)
    extra = example.inputs[3:]
    output, lse = OPS.na2d(*example.inputs[:3], *parameters, *extra)
    rest = (*example.inputs[:3], output, lse, *parameters, *extra)
    none, zeros, ones = (
        OPS.na2d_backward(example.grad_output, grad, *rest)
        for grad in (None, torch.zeros_like(lse), torch.ones_like(lse))
    )
    assert all(map(torch.equal, none, zeros))
    assert not torch.equal(none[0], ones[0])
    with pytest.raises(ValueError, match=r"grad_lse must have shape \(1, 6, 9, 4\).* got \(2, 6, 9, 4\)"):
        OPS.na2d_backward(example.grad_output, torch.cat([lse, lse]), *rest)
    with pytest.raises(ValueError, match="grad_output must be a tensor"):
        OPS.na2d_backward(None, lse, *rest)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mode", MODES)
    def test_casts_to_the_active_dtype(self, mode, dtype, seed):
        example = draw(Problem((6, 9), 2, 8, 3))
        with mode(), torch.autocast("cpu", dtype):
            output, lse = na2d(*example.inputs, 3, return_lse=True)
            inner = na2d(example.inputs[0], example.inputs[1].to(dtype), example.inputs[2], 3)
        assert (output.dtype, lse.dtype, inner.dtype) == (dtype, torch.float32, dtype)
        assert error(output, example.output) < 1e-2
        with mode(), torch.autocast("cpu", enabled=False):
            assert na2d(*example.inputs, 3).dtype == torch.float32

    def test_gradients_come_back_in_the_inputs_dtype(self, seed):
        example = draw(Problem((6, 9), 2, 8, 3))
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        with torch.autocast("cpu", torch.bfloat16):
            output, lse = na2d(*inputs, 3, return_lse=True)
        grads = torch.autograd.grad((output, lse), inputs, (example.grad_output.bfloat16(), example.grad_lse))
        for grad, reference in zip(grads, example.grads, strict=True):
            assert grad.dtype == torch.float32
            assert error(grad, reference) < 2e-2

    def test_in_a_compiled_and_in_an_exported_program(self, seed):
        layer = na_compiler.NeighborhoodAttention2D(16, 2, 3)
        x = torch.randn(2, 6, 9, 16)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype), torch.no_grad():
                expected = layer(x)
                assert error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected) < 1e-2
                program = torch.export.export(layer, (x,))
                assert program.module()(x).dtype == dtype


class TestVmap:
    def test_over_any_dimension(self, seed):
        query, key, value = torch.randn(4, 2, 6, 9, 2, 8), torch.randn(2, 6, 4, 9, 2, 8), torch.randn(2, 6, 9, 2, 8)
        for mode in MODES:
            with mode():
                mapped = torch.vmap(lambda q, k, v: na2d(q, k, v, 3), in_dims=(0, 2, None))(query, key, value)
                rows = [na2d(query[i], key[:, :, i], value, 3) for i in range(4)]
                torch.testing.assert_close(mapped, torch.stack(rows))

    def test_additional_keys_and_lse(self, seed):
        example = draw(RICH, batch=2)
        tensors = [torch.stack([tensor, 2 * tensor]) for tensor in example.inputs]
        mapped = torch.vmap(lambda *t: attend(RICH, t, return_lse=True))(*tensors)
        rows = [attend(RICH, [tensor[i] for tensor in tensors], return_lse=True) for i in range(2)]
        for result, expected in zip(mapped, zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(result, torch.stack(expected))

    def test_of_a_backward(self, seed):
        """Gradients of a batch of outputs' gradients."""
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        output = na2d(query, query, query, 3)
        grads = torch.randn(3, *output.shape)
        (mapped,) = torch.autograd.grad(output, query, grads, is_grads_batched=True, retain_graph=True)
        rows = [torch.autograd.grad(output, query, grad, retain_graph=True)[0] for grad in grads]
        torch.testing.assert_close(mapped, torch.stack(rows))

    def test_in_two_levels(self, seed):
        x = torch.randn(2, 3, 1, 6, 9, 2, 8)
        mapped = torch.vmap(torch.vmap(lambda q: na2d(q, q, q, 3)))(x)
        torch.testing.assert_close(mapped[1, 2], na2d(x[1, 2], x[1, 2], x[1, 2], 3))

    def test_over_nothing(self, seed):
        x = torch.randn(0, 2, 6, 9, 2, 8)
        for mode in MODES:
            with mode():
                assert torch.vmap(lambda q: na2d(q, q, q, 3))(x).shape == x.shape
        assert torch.vmap(torch.func.grad(lambda q: na2d(q, q, q, 3).sum()))(x).shape == x.shape


class TestFunctionalTransforms:
    """`torch.func`, against the same in plain autograd."""

    @staticmethod
    def gradient(x, **options):
        x = x.detach().requires_grad_()
        output, lse = na2d(x, 2 * x, x.sin(), 3, return_lse=True, **options)
        return torch.autograd.grad(output.square().sum() + lse.sum(), x)[0]

    @staticmethod
    def loss(x, **options):
        output, lse = na2d(x, 2 * x, x.sin(), 3, return_lse=True, **options)
        return output.square().sum() + lse.sum()

    def test_grad(self, seed):
        x = torch.randn(1, 6, 9, 2, 8)
        assert error(torch.func.grad(self.loss)(x), self.gradient(x)) < 1e-6
        # A gradient of lse alone.
        grad = torch.func.grad(lambda q: na2d(q, x, x, 3, return_lse=True)[1].sum())(x)
        weighted = na2d(x, x, x, 3) * 8**-0.5
        assert error(grad, weighted) < 1e-5

    def test_of_additional_keys(self, seed):
        x, extra = torch.randn(1, 6, 9, 2, 8), torch.randn(1, 5, 2, 8, requires_grad=True)

        def loss(extra):
            return self.loss(x, additional_keys=extra, additional_values=extra.cos())

        expected = torch.autograd.grad(loss(extra), extra)[0]
        assert error(torch.func.grad(loss)(extra.detach()), expected) < 1e-6

    def test_gradients_per_sample(self, seed):
        x = torch.randn(4, 1, 6, 9, 2, 8)
        expected = torch.stack([self.gradient(sample) for sample in x])
        assert error(torch.vmap(torch.func.grad(self.loss))(x), expected) < 1e-6

    def test_jacobian(self, seed):
        x = torch.randn(1, 4, 1, 2)
        jacobian = torch.func.jacrev(lambda x: na1d(x, x, x, 3))(x)
        expected = torch.autograd.functional.jacobian(lambda x: na1d(x, x, x, 3), x)
        assert error(jacobian, expected) < 1e-6

    def test_of_a_layer(self, seed):
        layer = na_compiler.NeighborhoodAttention2D(16, 2, 3)
        x = torch.randn(2, 6, 9, 16)
        parameters = dict(layer.named_parameters())
        grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert error(grads[name], parameter.grad) < 1e-5

    def test_autocast(self, seed):
        x = torch.randn(1, 6, 9, 2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            grad = torch.func.grad(lambda x: na2d(x, x, x, 3).float().square().sum())(x)
        expected = torch.func.grad(lambda x: na2d(x, x, x, 3).square().sum())(x)
        assert grad.dtype == torch.float32
        assert error(grad, expected) < 2e-2

    def test_compiled(self, seed):
        x = torch.randn(1, 6, 9, 2, 8)
        compiled = torch.compile(torch.func.grad(self.loss), fullgraph=True, backend="aot_eager")
        assert error(compiled(x), self.gradient(x)) < 1e-6
        each = torch.compile(torch.vmap(torch.func.grad(self.loss)), fullgraph=True, backend="aot_eager")
        samples = torch.stack([x, 2 * x])
        assert error(each(samples), torch.stack([self.gradient(x), self.gradient(2 * x)])) < 1e-6

    def test_gradient_of_the_value_beside_a_gradient(self, seed):
        """The outer level has its graph although torch switches graphs off where the inner one calls the operator."""
        x = torch.randn(1, 6, 9, 2, 8)
        grad = torch.func.grad(lambda x: torch.func.grad_and_value(self.loss)(x)[1])(x)
        assert error(grad, self.gradient(x)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_flop_counter(mode):
    for problem in (PLAIN, RICH):
        tensors = [tensor.requires_grad_() for tensor in draw(problem, batch=2, additional=5).inputs]
        expected = problem.flops(2, 5 if problem.additional_kv else 0)
        with mode(), FlopCounterMode(display=False) as counter:
            output = attend(problem, tensors)
            if mode is torch.enable_grad:
                output.sum().backward()
                expected += problem.flops(2, 5 if problem.additional_kv else 0, "backward")
        assert counter.get_total_flops() == expected


def test_profiler_sees_the_operator_in_inference_mode(seed):
    query = torch.randn(1, 6, 9, 2, 8)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        na2d(query, query, query, 3)
    assert "na_compiler::na2d" in {event.key for event in profile.key_averages()}


def test_fakes_and_meta_tensors_have_the_shapes(seed):
    query, key = torch.empty(2, 6, 9, 4, 8, device="meta"), torch.empty(2, 6, 9, 2, 8, device="meta")
    value = torch.empty(2, 6, 9, 2, 12, device="meta")
    for mode in MODES:
        with mode():
            output, lse = na2d(query, key, value, 3, return_lse=True)
            assert (output.shape, output.dtype) == ((2, 6, 9, 4, 12), torch.float32)
            assert (lse.shape, lse.dtype, lse.device.type) == ((2, 6, 9, 4), torch.float32, "meta")


def test_default_device_is_no_matter(seed):
    query = torch.randn(1, 6, 9, 2, 8)
    for mode in MODES:
        with mode(), torch.device("meta"):
            assert na2d(query, query, query, 3).device.type == "cpu"


def test_tensor_subclasses(seed):
    class Named(torch.Tensor):
        pass

    query = torch.randn(1, 6, 9, 2, 8)
    named = query.as_subclass(Named)
    for mode in MODES:
        with mode():
            assert type(na2d(named, named, named, 3)) is Named
            torch.testing.assert_close(na2d(named, query, query, 3).as_subclass(torch.Tensor), na2d(*[query] * 3, 3))
            assert na2d(torch.nn.Parameter(query), query, query, 3).shape == query.shape


def test_deepcopy_and_pickle_of_results(seed):
    """Outputs are ordinary tensors."""
    query = torch.randn(1, 6, 9, 2, 8)
    output = na2d(query, query, query, 3)
    buffer = io.BytesIO()
    torch.save(output, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), output)


def test_importing_torch_first_registers_the_operators():
    """A program loaded from a file needs the operators before anything has called them."""
    code = "import torch, na_compiler; print(torch.ops.na_compiler.na3d_backward.default)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "na_compiler.na3d_backward.default"
