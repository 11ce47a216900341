"""`na_compiler.ops.projection`: gradients of views of one projection lie where that of the projection is."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, modules, na2d
from na_compiler.ops import projection
from na_compiler.ops.projection import split_projection

LAYERS = {
    1: (NeighborhoodAttention1D, (2, 13, 24), dict(kernel_size=5, stride=2)),
    2: (NeighborhoodAttention2D, (2, 6, 7, 24), dict(kernel_size=(3, 5), dilation=(2, 1), rel_pos_bias=True)),
    3: (NeighborhoodAttention3D, (1, 4, 5, 6, 24), dict(kernel_size=3, is_causal=(True, False, False))),
}


@pytest.fixture
def stacked(monkeypatch):
    """How often gradients were put side by side by a copy."""
    calls = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda *given, **named: calls.append(None) or stack(*given, **named))
    return calls


def make(rank, **options):
    kind, shape, given = LAYERS[rank]
    return kind(embed_dim=24, num_heads=3, **given, **options), torch.randn(shape)


def gradients(layer, x, run=None):
    """Gradients of the input and of the parameters; and what the projection's gradient was."""
    x = x.clone().requires_grad_()
    seen = []

    def watch(module, given, projected):
        if projected.requires_grad:
            projected.register_hook(seen.append)

    watching = layer.qkv.register_forward_hook(watch)
    output = (run or layer)(x)
    torch.manual_seed(0)
    output.backward(torch.randn_like(output))
    watching.remove()
    found = [x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
    layer.zero_grad()
    return found, seen[0]


def stacking(monkeypatch):
    """Have layers take their views by unbind, whose derivative is a copy."""
    monkeypatch.setattr(modules, "split_projection", projection._views)


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied_and_nothing_changes(rank, dtype, stacked, monkeypatch, seed):
    layer, x = make(rank)
    layer, x = layer.to(dtype), x.to(dtype)
    with monkeypatch.context() as patch:
        stacking(patch)
        expected, _ = gradients(layer, x)
    made = []
    whole = projection._whole
    monkeypatch.setattr(projection, "_whole", lambda parts: made.append(parts[0].data_ptr()) or whole(parts))
    found, gradient = gradients(layer, x)
    assert not stacked
    # What the linear layer's derivative gets is what the kernel wrote.
    assert made == [gradient.data_ptr()]
    assert gradient.is_contiguous()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_one_tensor_is_all_that_a_backward_makes(seed):
    """No more memory than the gradient of the projection, which torch's derivative would double."""
    layer, x = make(2)
    query, key, value = split_projection(layer.qkv(x), 3, 8)
    output = na2d(query, key, value, 3)
    parts = torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == 3 * parts[0].numel() * 4


@pytest.mark.parametrize(
    "use",
    [
        lambda query, key, value: na2d(query, key, value, 3) + query,
        lambda query, key, value: na2d(query, key, value, 3) + na2d(query, key, value, 5),
        lambda query, key, value: na2d(query, key.detach(), value, 3),
        lambda query, key, value: na2d(key, query, value, 3),
        lambda query, key, value: na2d(query, key * 2, value, 3),
        lambda query, key, value: query.square(),
    ],
    ids=["query as well", "twice", "key detached", "other order", "key scaled", "query only"],
)
def test_other_uses_of_the_views(use, seed):
    projected = torch.randn(2, 6, 7, 72, dtype=torch.float32, requires_grad=True)
    found = []
    for split in (split_projection, projection._views):
        output = use(*split(projected, 3, 8))
        torch.manual_seed(1)
        found += torch.autograd.grad(output, projected, torch.randn_like(output))
    torch.testing.assert_close(*found)


def test_hooks_see_and_change_gradients(seed):
    projected = torch.randn(1, 6, 7, 72, requires_grad=True)
    for change in (lambda grad: grad * 2, lambda grad: grad.mul_(2), lambda grad: None):
        found = []
        for split in (split_projection, projection._views):
            query, key, value = split(projected, 3, 8)
            key.register_hook(change)
            found += torch.autograd.grad(na2d(query, key, value, 3).sum(), projected)
        torch.testing.assert_close(*found)


def test_a_gradient_is_differentiated(stacked, seed):
    """By that of the output: with the views' own derivative."""
    layer, x = make(2)
    x.requires_grad_()
    grad = torch.randn(2, 6, 7, 3, 8, requires_grad=True)
    found = []
    for split in (split_projection, projection._views):
        query, key, value = split(layer.qkv(x), 3, 8)
        (first,) = torch.autograd.grad(na2d(query, key, value, 3), x, grad, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), grad)
    assert stacked
    torch.testing.assert_close(*found)


def test_checkpointing(seed):
    layer, x = make(2)
    expected, _ = gradients(layer, x)
    for reentrant in (False, True):
        run = functools.partial(checkpoint, layer, use_reentrant=reentrant)
        found, _ = gradients(layer, x, run)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_autocast_is_right(seed, monkeypatch):
    """With the views' own derivative."""
    layer, x = make(2)
    found = []
    for change in (lambda: None, lambda: stacking(monkeypatch)):
        change()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(layer, x)[0])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_transforms(seed):
    layer, x = make(1)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for one in x:
        made = torch.autograd.grad(loss(parameters, one[None]), list(parameters.values()))
        expected = {name: sum_ + grad for (name, sum_), grad in zip(expected.items(), made, strict=True)}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    for name, grad in found.items():
        torch.testing.assert_close(grad.sum(0), expected[name])
    _, tangent = torch.func.jvp(lambda given: loss(parameters, given), (x,), (torch.ones_like(x),))
    step = 1e-3
    slope = (loss(parameters, x + step) - loss(parameters, x - step)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=2e-2, atol=1e-2)


def test_compile_and_export(seed):
    layer, x = make(2)
    expected, _ = gradients(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = x.clone().requires_grad_()
    torch.manual_seed(0)
    output = compiled(given)
    torch.manual_seed(0)
    output.backward(torch.randn_like(output))
    torch.testing.assert_close(given.grad, expected[0])
    program = torch.export.export(layer, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("unbind" in name for name in names)
    torch.testing.assert_close(program.module()(x), layer(x))
