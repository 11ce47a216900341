"""scaled_dot_product_attention with a mask: what becomes ours, and what stays as it was, with a line that says why."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch_graphs import close, targets

from na_compiler import Problem, passes
from na_compiler.passes.masks import axis_mask
from na_compiler.passes.views import copies


@pytest.mark.parametrize("kind", ["bool", "float", "computed"])
@pytest.mark.parametrize("rank", [1, 2])
def test_masked_attention_becomes_neighborhood_attention(kind, rank, seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            axes = [axis_mask(6, 5), axis_mask(10, 3, dilation=2)] if rank == 2 else [axis_mask(60, 9, is_causal=True)]
            mask = torch.from_numpy(axes[0] if rank == 1 else np.kron(*axes))
            if kind == "float":
                mask = torch.zeros(60, 60).masked_fill(~mask, -torch.inf)
            self.register_buffer("mask", mask)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).contiguous().unbind()
            mask = self.mask
            if kind == "computed":
                mask = mask.logical_not().logical_not()
            y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
            return y.transpose(1, 2).flatten(-2)

    model, x = Masked().eval(), torch.randn(2, 60, 32)
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("B", max=8)},))
    assert passes.canonicalise(program) == 2
    (site,) = passes.collect(program)
    wanted = Problem((6, 10), 2, 16, (5, 3), dilation=(1, 2)) if rank == 2 else Problem(60, 2, 16, 9, is_causal=True)
    assert site.problem == wanted
    assert copies(program.graph_module) == []
    assert not any("contiguous" in str(target) or "attention" in str(target) for target in targets(program))
    program.validate()
    close(program.module()(x), expected)


def test_attention_with_another_mask_is_left_alone(seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            mask = torch.from_numpy(axis_mask(20, 5))
            mask[3, 9] = True
            self.register_buffer("mask", mask)
            self.register_buffer("bias", torch.randn(20, 20))

        def forward(self, query, mask):
            attend = nn.functional.scaled_dot_product_attention
            masked = attend(query, query, query, attn_mask=self.mask) + attend(query, query, query, attn_mask=self.bias)
            return masked + attend(query, query, query, attn_mask=mask) + attend(query, query, query)

    query = torch.randn(1, 2, 20, 16)
    program = torch.export.export(Masked(), (query, torch.from_numpy(axis_mask(20, 5))))
    before = targets(program)
    assert passes.canonicalise(program) == 0
    assert targets(program) == before
    assert passes.collect(program) == ()


def masked(mask, **options):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, **options)

    return Masked().eval()


def heads_first(*shapes, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


LIKE = (2, 4, 20, 8)
# What has a neighborhood for a mask and is none of ours all the same: what it is called with, and what is said of it.
NOT_OURS = {
    "float64": (heads_first(LIKE, LIKE, LIKE, dtype=torch.float64), {}, "it is in float64"),
    "a value with batch 1": (heads_first(LIKE, LIKE, (1, 4, 20, 8)), {}, "one batch"),
    "a value with one head": (heads_first(LIKE, LIKE, (2, 1, 20, 8)), {}, "value are 4, 4 and 1"),
    "a query with one head": (heads_first((2, 1, 20, 8), LIKE, LIKE), {}, "value are 1, 4 and 4"),
    "dropout": (heads_first(LIKE, LIKE, LIKE), {"dropout_p": 1.0}, "dropout"),
    "long heads": (heads_first(*[(1, 1, 20, 9000)] * 3), {}, "head_dim is at most 8192 here, and it is 9000"),
    "a scale of infinity": (heads_first(LIKE, LIKE, LIKE), {"scale": float("inf")}, "scale is inf"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_not_ours_stays_as_it_was(kind, seed, caplog):
    tensors, options, said = NOT_OURS[kind]
    model = masked(torch.from_numpy(axis_mask(20, 5)), **options)
    expected = model(*tensors)
    program = torch.export.export(model, tensors)
    before = targets(program)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert said in caplog.text
    assert "attention with a mask stays as it is" in caplog.text
    assert targets(program) == before
    assert passes.collect(program) == ()
    if kind not in {"float64", "a value with one head"}:
        return  # Inductor takes its seconds.
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend="na_compiler", fullgraph=True)(*tensors)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (3, 5)])
def test_masks_that_repeat_a_query_are_left(shape, seed, caplog):
    """Of more heads or a larger batch than it: what torch makes of them is the device's affair."""
    model = masked(torch.from_numpy(axis_mask(20, 5)).expand(*shape, 20, 20).contiguous())
    tensors = heads_first((1, 1, 20, 8), (1, 1, 20, 8), (1, 1, 20, 8))
    program = torch.export.export(model, tensors)
    before = targets(program)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert f"its mask is [{shape[0]}, {shape[1]}, 20, 20], and query [1, 1, 20, 8]" in caplog.text
    assert targets(program) == before


def test_one_head_of_keys_and_values_for_all_is_ours(seed):
    tensors = heads_first(LIKE, (2, 1, 20, 8), (2, 1, 20, 8))
    model = masked(torch.from_numpy(axis_mask(20, 5)))
    program = torch.export.export(model, tensors)
    assert passes.canonicalise(program) == 1
    assert [site.problem for site in passes.collect(program)] == [Problem(20, 4, 8, 5, heads_kv=1)]
    close(program.module()(*tensors), model(*tensors))


def test_tokens_that_are_repeated_are_no_heads(seed):
    class Masked(nn.Module):
        def forward(self, query, key, value):
            twice = [tensor.repeat_interleave(2, 2) for tensor in (key, value)]
            mask = torch.from_numpy(axis_mask(20, 5))
            return nn.functional.scaled_dot_product_attention(query, *twice, attn_mask=mask)

    tensors = heads_first(LIKE, (2, 4, 10, 8), (2, 4, 10, 8))
    program = torch.export.export(Masked(), tensors)
    assert passes.canonicalise(program) >= 1
    assert [site.problem for site in passes.collect(program)] == [Problem(20, 4, 8, 5)]
    close(program.module()(*tensors), Masked()(*tensors))


def test_masks_that_are_random_or_written_are_no_constants(seed):
    band = torch.from_numpy(axis_mask(20, 5))

    def drawn(query):
        other = torch.rand(()) < 2.0  # Always, but only now.
        mask = torch.logical_and(torch.from_numpy(axis_mask(20, 5)), other)
        return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", band.clone())

        def forward(self, query):
            self.mask.fill_(True)
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=self.mask)

    query = torch.randn(LIKE)
    for model in (drawn, Written()):
        torch._dynamo.reset()
        found = []

        def backend(module, inputs, found=found):
            names = [node.name for node in module.graph.find_nodes(op="placeholder")]
            held = {name: value for name, value in zip(names, inputs, strict=True) if value.dtype is torch.bool}
            found.append(passes.canonicalise_torch.canonicalise_torch(module, held))
            return module.forward

        with torch.no_grad():
            close(torch.compile(model, backend=backend, fullgraph=True)(query), model(query))
        assert found == [0]


def test_reading_constants_looks_at_each_node_once():
    """Values that two others are computed from, many times over."""

    class Diamonds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(axis_mask(20, 5)))

        def forward(self, query):
            mask = self.mask
            for _ in range(60):
                mask = mask.logical_not().logical_not() & mask
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    program = torch.export.export(Diamonds(), (torch.randn(LIKE),))
    used = set()
    from na_compiler.passes.sdpa import replace_sdpa

    assert replace_sdpa(program, {"none": torch.ones(1)}, used) == 1


def test_masked_attention_inside_control_flow_stays_with_a_line_that_says_why(seed, caplog):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(axis_mask(20, 5)))

        def forward(self, flag, query):
            attend = nn.functional.scaled_dot_product_attention

            def masked(query):
                return attend(query, query, query, attn_mask=self.mask)

            def dense(query):
                return attend(query, query, query)

            return torch.cond(flag, masked, dense, (query,))

    inputs = (torch.tensor(True), torch.randn(1, 2, 20, 8))
    program = torch.export.export(Branches(), inputs)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    (said,) = [one.message for one in caplog.records if "stays as it is" in one.message]
    assert "inside control flow (true_graph_0)" in said
    close(program.module()(*inputs), Branches()(*inputs))
