"""Forward mode of torch's operators, and second derivatives as far as there are: `na_compiler.ops.tangents`."""

import pytest
import torch
from oracle import NAMES, check_forward, check_tangents, draw, draw_tangents
from test_ops import PLAIN, RICH, attend, error
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import na_compiler
from na_compiler import na1d, na2d
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

OPS = torch.ops.na_compiler
SMALL = (1, 5, 1, 2)


def moved(problem, example, tangents):
    """Return output and lse, and their tangents, of ``torch.func.jvp``."""
    tensors = tuple(example.inputs), tuple(tangents.inputs)
    return torch.func.jvp(lambda *t: attend(problem, t, return_lse=True), *tensors)


def self_attend(x):
    return na1d(x, 2 * x, x.sin(), 3)


class TestForwardMode:
    @pytest.mark.parametrize("problem", [RICH, PLAIN.replace(dtype="bfloat16"), Problem((4, 5, 6), 2, 8, 3)], ids=str)
    def test_jvp(self, problem, seed):
        example = draw(problem, batch=2)
        tangents = draw_tangents(example)
        results, changes = moved(problem, example, tangents)
        check_forward(example, *results)
        check_tangents(tangents, *changes)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_dual_tensor_among_others(self, name, seed):
        example = draw(RICH)
        tangents = draw_tangents(example, only=name)
        with forward_ad.dual_level():
            inputs = [
                forward_ad.make_dual(tensor, tangent) if each == name else tensor
                for each, tensor, tangent in zip(NAMES, example.inputs, tangents.inputs, strict=True)
            ]
            output, lse = map(forward_ad.unpack_dual, attend(RICH, inputs, return_lse=True))
        check_forward(example, output.primal, lse.primal)
        if name.endswith(("value", "values")):
            assert not lse.tangent.any()
        else:
            check_tangents(tangents, output.tangent, lse.tangent)

    def test_views_that_are_no_rows(self, seed):
        """Tangents of a fused projection, of an expanded row, and of what lies the other way round."""
        inputs, whole = torch.randn(3, 1, 6, 9, 2, 8), torch.randn(1, 6, 9, 3, 2, 8)
        query = whole.unbind(-3)[1]
        key, value = torch.randn(8).expand(1, 6, 9, 2, 8), torch.randn(1, 6, 9, 8, 2).mT
        _, change = torch.func.jvp(lambda *t: na2d(*t, 3), tuple(inputs), (query, key, value))
        exact = [tensor.double() for tensor in (query, key, value)]
        _, expected = torch.func.jvp(lambda *t: neighborhood_attention(*t, 3)[0], tuple(inputs.double()), tuple(exact))
        assert error(change, expected) < 1e-5

    def test_jacobian(self, seed):
        x = torch.randn(SMALL)
        assert error(torch.func.jacfwd(self_attend)(x), torch.func.jacrev(self_attend)(x)) < 1e-5

    def test_vmap(self, seed):
        x, tangent = torch.randn(2, 3, *SMALL)

        def one(x, tangent):
            return torch.func.jvp(self_attend, (x,), (tangent,))

        for given, dims in (((x, tangent), 0), ((x[0], tangent), (None, 0)), ((x, tangent[0]), (0, None))):
            rows = [one(*(t[i] if t.dim() == x.dim() else t for t in given)) for i in range(3)]
            for result, expected in zip(torch.vmap(one, dims)(*given), zip(*rows, strict=True), strict=True):
                assert error(result, torch.stack(expected)) < 1e-6
        results = torch.func.jvp(torch.vmap(self_attend), (x,), (tangent,))
        assert error(results[1], torch.stack([one(*each)[1] for each in zip(x, tangent, strict=True)])) < 1e-6

    def test_of_a_layer_and_of_its_parameters(self, seed):
        layer = na_compiler.NeighborhoodAttention2D(16, 2, 3).double()
        parameters = dict(layer.named_parameters())
        x = torch.randn(2, 6, 9, 16, dtype=torch.float64)
        layer, x = layer.float(), x.float()
        tangents = {name: torch.randn_like(parameter) for name, parameter in layer.named_parameters()}
        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

        def run(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,))

        change = torch.func.jvp(run, (parameters, x), (tangents, x))[1]
        step, both = 1e-2, []
        for sign in (1, -1):
            near = {name: tensor + sign * step * tangents[name] for name, tensor in parameters.items()}
            both.append(run(near, x * (1 + sign * step)))
        assert error((both[0] - both[1]) / (2 * step), change) < 1e-2

    def test_autocast(self, seed):
        example = draw(PLAIN)
        tangents = draw_tangents(example)
        with torch.autocast("cpu", torch.bfloat16):
            _, (change, change_lse) = moved(PLAIN, example, tangents)
        assert (change.dtype, change_lse.dtype) == (torch.bfloat16, torch.float32)
        assert error(change, tangents.output) < 2e-2

    def test_counts_six_products(self, seed):
        example = draw(RICH, additional=5)
        tangents = draw_tangents(example)
        with FlopCounterMode(display=False) as counter:
            moved(RICH, example, tangents)
        assert counter.get_total_flops() == RICH.flops(1, 5, "tangent")
        assert RICH.flops(1, 5, "tangent") == 3 * RICH.flops(1, 5)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
    def test_compiled_programs_have_the_tangents_of_eager_ones(self, backend, seed):
        layer = na_compiler.NeighborhoodAttention2D(16, 2, 3)
        x, tangent = torch.randn(2, 2, 6, 9, 16)

        def run(x, tangent):
            return torch.func.jvp(lambda x: layer(x + 1).square(), (x,), (tangent,))

        compiled = torch.compile(run, fullgraph=True, backend=backend)
        with torch.no_grad():
            for result, expected in zip(compiled(x, tangent), run(x, tangent), strict=True):
                assert error(result, expected) < 1e-5

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_compiled_training_with_a_detached_tangent(self, seed):
        """What is not detached has a gradient by the parameters, which the compiler asks for: refused by name."""
        layer = na_compiler.NeighborhoodAttention1D(4, 2, 3)
        x, tangent = torch.randn(2, 1, 7, 4)

        def run(x):
            return torch.func.jvp(lambda x: layer(x + 1).square(), (x,), (tangent,))

        def loss(x):
            primal, change = run(x)
            return (primal - (primal + change).detach()).square().sum() + primal.sum()

        compiled, parameters = torch.compile(loss, fullgraph=True, backend="aot_eager"), list(layer.parameters())
        ours, expected = (torch.autograd.grad(step(x), parameters) for step in (compiled, loss))
        for grad, reference in zip(ours, expected, strict=True):
            assert error(grad, reference) < 1e-5
        with pytest.raises(Exception, match="detach the tangent"):
            torch.compile(run, fullgraph=True, backend="aot_eager")(x)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_opcheck(self, seed):
        example = draw(RICH)
        tangents = draw_tangents(example).inputs
        parameters = (RICH.kernel_size, RICH.stride, RICH.dilation, RICH.is_causal)
        more = dict(zip(NAMES[3:], example.inputs[3:], strict=True))
        more |= {f"tangent_{name}": tensor for name, tensor in zip(NAMES[3:], tangents[3:], strict=True)}
        arguments = (*example.inputs[:3], *tangents[:3], *map(list, parameters), 0.3)
        torch.library.opcheck(OPS.na2d_tangent.default, arguments, more)


class TestGradientsBesideTangents:
    def test_the_primal_keeps_its_gradient(self, seed):
        """A loss of a flow map: what the tangent says is the target, and has no gradient."""
        x, tangent = torch.randn(2, *SMALL)

        def loss(x):
            primal, change = torch.func.jvp(self_attend, (x,), (tangent,))
            return (primal - (primal + change).detach()).square().sum() + primal.sum()

        inner = torch.func.grad(loss)(x)
        x.requires_grad_()
        target = (self_attend(x) + torch.func.jvp(self_attend, (x,), (tangent,))[1]).detach()
        plain = self_attend(x)
        expected = torch.autograd.grad((plain - target).square().sum() + plain.sum(), x)[0]
        assert error(torch.autograd.grad(loss(x), x)[0], expected) < 1e-5
        assert error(inner, expected) < 1e-5

    def test_the_gradient_by_tangents_is_the_backward(self, seed):
        example = draw(RICH)
        tangents = draw_tangents(example)
        moving = [tensor.requires_grad_() for tensor in tangents.inputs]
        _, changes = moved(RICH, example, tangents)
        grads = torch.autograd.grad(changes, moving, (example.grad_output, example.grad_lse))
        for grad, expected in zip(grads, example.grads, strict=True):
            assert error(grad, expected) < 1e-5

    def test_the_gradient_of_a_gradient_by_what_it_was_given(self, seed):
        """The trick by which ``torch.autograd.functional.jvp`` finds tangents."""
        example = draw(RICH)
        tangents = draw_tangents(example)
        inputs, moving = tuple(example.inputs), tuple(tangents.inputs)
        _, changes = torch.autograd.functional.jvp(lambda *t: attend(RICH, t, return_lse=True), inputs, moving)
        check_tangents(tangents, *changes)

    def test_the_tangent_of_a_gradient_by_what_it_was_given(self, seed):
        x, grad, tangent = torch.randn(3, *SMALL)
        _, pull = torch.func.vjp(self_attend, x)
        (result,), (change,) = torch.func.jvp(pull, (grad,), (tangent,))
        assert error(result, pull(grad)[0]) < 1e-6
        assert error(change, pull(tangent)[0]) < 1e-6


class TestRefused:
    """Second derivatives by query, key and value, by name, and only where they are asked for."""

    def test_double_backward(self, seed):
        query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(na2d(query, query, query, 3).square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"cannot be differentiated twice.*kernel of ten products"):
            grad.sum().backward()

    def test_double_backward_inside_of_functional_transforms(self, seed):
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            torch.func.jacrev(torch.func.jacrev(lambda x: self_attend(x).square().sum()))(torch.randn(SMALL))

    def test_the_gradient_through_a_tangent(self, seed):
        x, tangent = torch.randn(2, *SMALL)

        def change(x):
            return torch.func.jvp(self_attend, (x,), (tangent,))[1].sum()

        with pytest.raises(NotImplementedError, match=r"the gradient through a tangent .* detach the tangent"):
            torch.func.grad(change)(x)
        with pytest.raises(NotImplementedError, match="the gradient through a tangent"):
            change(x.requires_grad_()).backward()

    def test_forward_mode_through_a_gradient(self, seed):
        with pytest.raises(NotImplementedError, match=r"as in torch\.func\.hessian, is not there"):
            torch.func.hessian(lambda x: self_attend(x).square().sum())(torch.randn(SMALL))

    def test_forward_mode_in_forward_mode(self, seed):
        x = torch.randn(SMALL)

        def change(x):
            return torch.func.jvp(self_attend, (x,), (torch.ones_like(x),))[1]

        with pytest.raises(NotImplementedError, match="first derivatives in forward mode, and no second ones"):
            torch.func.jvp(change, (x,), (x,))
