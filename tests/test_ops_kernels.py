"""`na_compiler.ops.kernels`: tensors are read where they are, and copied where a kernel cannot read them."""

import dataclasses
import functools
import gc
import logging
import threading
import weakref

import pytest
import torch
from oracle import check_backward, check_forward, copies, draw

import na_compiler.bound
from na_compiler import na1d, na2d, na3d
from na_compiler.compiler import serving
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.runtime.kernel import make_kernel

OPS = torch.ops.na_compiler
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


def error(result, expected):
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_views_of_a_fused_projection_are_read_where_they_are(mode, seed):
    query, key, value = torch.randn(2, 6, 9, 3, 2, 8).unbind(-3)
    with mode(), copies() as made:
        output, lse = na2d(query, key, value, 3, return_lse=True)
    assert not made
    assert error(output, neighborhood_attention(query, key, value, 3)[0]) < 1e-5
    grad_output, parameters = torch.randn(2, 6, 9, 3, 2, 8).unbind(-3)[0], ([3, 3], [1, 1], [1, 1], [False, False], 0.3)
    with copies() as made:
        OPS.na2d_backward(grad_output, torch.zeros_like(lse), query, key, value, output, lse, *parameters)
    assert not made
    with copies() as made:
        na2d(query.transpose(-1, -2), key.transpose(-1, -2), value.transpose(-1, -2), 3)
    assert made


def test_heads_first_tensors(seed):
    tensors = [torch.randn(2, 2, 6, 9, 8).movedim(1, -2) for _ in range(3)]
    assert error(na2d(*tensors, 3), neighborhood_attention(*tensors, 3)[0]) < 1e-5


def test_expanded_and_transposed_tensors(seed):
    query = torch.randn(1, 6, 9, 2, 8).expand(3, -1, -1, -1, -1)
    key = torch.randn(3, 8, 6, 9, 2).movedim(1, -1)
    value = torch.randn(3, 6, 9, 1, 8).expand(-1, -1, -1, 2, -1)
    assert error(na2d(query, key, value, 3), neighborhood_attention(query, key, value, 3)[0]) < 1e-5


@pytest.mark.parametrize("layout", [(4,), (1, 4), (4, 1)])
def test_strides_of_dimensions_of_one_element(layout, seed):
    """They may be anything, and torch calls the tensor contiguous."""
    rank = len(layout)
    shape = (1, *layout, 1, 1)
    query = torch.randn(4).as_strided(shape, [7 if extent == 1 else 1 for extent in shape])
    assert query.is_contiguous()
    query.requires_grad_()
    output, lse = FUNCTIONS[rank](query, query, query, 1, return_lse=True)
    torch.testing.assert_close(output, query)
    torch.testing.assert_close(lse, query.square()[..., 0])
    grad_output, grad_lse = torch.empty_like(query), torch.ones(shape[:-1])
    (grad,) = torch.autograd.grad((output, lse), query, (torch.ones_like(grad_output), grad_lse))
    torch.testing.assert_close(grad, 1 + 2 * query)


def test_gradients_of_any_strides(seed):
    """What autograd hands to backward may be expanded or transposed."""
    query, key, value = (torch.randn(1, 6, 9, 2, 8, requires_grad=True) for _ in range(3))
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected, _ = neighborhood_attention(*exact, 3)
    for use in (torch.sum, lambda x: (x.transpose(1, -1) * torch.arange(6.0)).sum(), lambda x: x[..., ::2].sum()):
        grads = torch.autograd.grad(use(na2d(query, key, value, 3)), (query, key, value))
        references = torch.autograd.grad(use(expected), exact, retain_graph=True)
        # The gradient of a sum over all channels can vanish in query and key: compare with the largest.
        scale = max(reference.norm() for reference in references)
        for ours, theirs in zip(grads, references, strict=True):
            assert (ours - theirs).norm() / scale < 1e-5


@pytest.fixture
def particular_kernels(monkeypatch):
    """Kernels that, as those of a GPU, do not read every tensor where it is."""
    find = serving.find_kernel

    def found(*arguments, **named):
        kernel = find(*arguments, **named)
        return make_kernel(dataclasses.replace(kernel.info, alignment=16, adjacent_heads=True), kernel.function)

    monkeypatch.setattr(serving, "find_kernel", found)
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
    monkeypatch.setattr(na_compiler.ops.kernels, "_said", set())


def misaligned(tensor):
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor.detach())


def padded(tensor):
    return torch.cat([tensor.detach()] * 2, -1)[..., : tensor.shape[-1]]


@pytest.mark.parametrize("move", [misaligned, padded])
def test_what_a_kernel_cannot_read_is_copied(move, particular_kernels, seed, caplog):
    example = draw(Problem((4, 5, 6), 2, 8, 3, dtype="bfloat16"))
    query, key, value = example.inputs
    attend = functools.partial(na3d, kernel_size=3, return_lse=True)
    with caplog.at_level(logging.WARNING), copies() as made:
        attend(query, key, value)
    assert not made
    assert not caplog.messages
    for place in range(3):
        given = [move(tensor) if i == place else tensor for i, tensor in enumerate((query, key, value))]
        given = [tensor.requires_grad_() for tensor in given]
        with copies() as made:
            output, lse = attend(*given)
        assert made
        check_forward(example, output.detach(), lse.detach())
        grads = torch.autograd.grad((output, lse), given, (move(example.grad_output), example.grad_lse))
        check_backward(example, grads)
    said = [message for message in caplog.messages if message.startswith("copying what the operator was given: query")]
    assert len(said) == 1


def test_a_bound_kernel_copies_as_well(seed):
    """`torch.ops.na_compiler.bound` is given what the operator was given."""
    problem = Problem((6, 9), 2, 8, 3)
    key = na_compiler.KernelSpec.make(problem).key
    na_compiler.compile(problem)
    query = torch.randn(1, 6, 9, 8, 2).transpose(-1, -2)
    parameters = ([3, 3], [1, 1], [1, 1], [False, False])
    output, _ = OPS.bound(query, query, query, key, 0.3, *parameters)
    assert error(output, neighborhood_attention(query, query, query, 3, scale=0.3)[0]) < 1e-5


def test_two_python_threads_at_once_find_one_kernel(seed):
    """Shapes that neither has seen."""
    query = torch.randn(1, 7, 13, 2, 8)
    expected = neighborhood_attention(query, query, query, 5)[0]
    results = []

    def work():
        results.append(na2d(query, query, query, 5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(error(result, expected) < 1e-5 for result in results)


class TestChecks:
    """What is refused is refused whatever ran before, with one message."""

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_dtypes_of_additional_tensors(self, mode, seed):
        query, extra = torch.randn(1, 6, 9, 2, 8), torch.randn(1, 5, 2, 8)
        with mode():
            for _ in range(2):
                na2d(query, query, query, 3, additional_keys=extra, additional_values=extra)
                for given in ((extra.half(), extra), (extra, extra.half()), (extra.double(), extra.double())):
                    with pytest.raises(ValueError, match="must have query's dtype"):
                        na2d(query, query, query, 3, additional_keys=given[0], additional_values=given[1])

    def test_ranks(self, seed):
        query = torch.randn(1, 6, 9, 2, 8)
        parameters = ([3, 3], [1, 1], [1, 1], [0, 0], 0.3)
        for _ in range(2):
            OPS.na2d(query, query, query, *parameters)
            for operator in (OPS.na1d, OPS.na3d):
                with pytest.raises(ValueError, match=r"query must have [46] dimensions for na[13]d"):
                    operator(query, query, query, *parameters)

    def test_flags(self, seed):
        query = torch.randn(1, 6, 9, 2, 8)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"is_causal must be 0 or 1 for each axis, got \[2, 0\]"):
                OPS.na2d(query, query, query, [3, 3], [1, 1], [1, 1], [2, 0], 0.3)

    @pytest.mark.parametrize("place", range(7))
    def test_tensors_of_a_backward(self, place, seed):
        """Shapes and dtypes, of which only query, key and value say which kernel it is."""
        query = torch.randn(1, 6, 9, 2, 8)
        output, lse = na2d(query, query, query, 3, return_lse=True)
        tensors = [output, lse, query, query, query, output, lse]
        parameters = ([3, 3], [1, 1], [1, 1], [0, 0], 0.3)
        for _ in range(2):
            OPS.na2d_backward(*tensors, *parameters)
            for wrong in (tensors[place].double(), tensors[place][:, :5]):
                given = [wrong if i == place else tensor for i, tensor in enumerate(tensors)]
                with pytest.raises(ValueError, match="must"):
                    OPS.na2d_backward(*given, *parameters)


def test_no_tensor_is_kept(seed):
    """One that was made in a user's call may belong to a CUDA graph, which frees it."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = [getattr(value, name) for name in getattr(value, "__slots__", ())]
        parts += value if isinstance(value, list | tuple) else []
        parts += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        parts += vars(value).values() if dataclasses.is_dataclass(value) and hasattr(value, "__dict__") else []
        return [tensor for part in parts for tensor in tensors(part)]

    table = na_compiler.ops.kernels._kernels
    table.clear()
    query = torch.randn(1, 6, 9, 2, 8, requires_grad=True)
    # Weakly, and by what they are: another may get the place of one that went.
    before = {id(tensor): weakref.ref(tensor) for tensor in all_tensors()}
    na2d(query, query, query, 3, additional_keys=query[:, 0], additional_values=query[:, 0]).sum().backward()
    query.grad = None
    assert len(table) == 2
    backwards = na_compiler.ops.call._backwards
    assert not tensors([*table, *table.values(), *backwards, *backwards.values()])
    # Others may go meanwhile: what tests before this one left.
    assert all(id(tensor) in before and before[id(tensor)]() is tensor for tensor in all_tensors())


def all_tensors():
    """Return the tensors that there are in the process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
