"""How operators take shards: on two processes as on one, forward and backward, and models that torch shares out."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from na_compiler import NeighborhoodAttention2D, na2d
from na_compiler.reference import neighborhood_attention

distributed = pytest.importorskip("torch.distributed", reason="torch was built without it")
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

_PROCESSES = 2
_LAYOUT, _HEADS, _HEADS_KV, _HEAD_DIM, _KERNEL_SIZE = (7, 8), 4, 2, 8, (3, 5)
# Of query, key and value, of the table of biases, and of the output.
_CASES = {
    "batch": ("Shard(0)", "Replicate()", "Shard(0)"),
    "heads": ("Shard(3)", "Shard(0)", "Shard(3)"),
    "everything everywhere": ("Replicate()", "Replicate()", "Replicate()"),
    # No kernel takes a part of a layout with its halo from others: torch gathers it first.
    "layout": ("Shard(1)", "Replicate()", "Replicate()"),
}


def _in_each(rank, place, work, arguments):
    """Run in a process: join the others, and do the work; what it raises ends the test."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=_PROCESSES)
    try:
        work(distributed.device_mesh.init_device_mesh("cpu", (_PROCESSES,)), *arguments)
    finally:
        distributed.destroy_process_group()


def on_each(tmp_path, work, *arguments):
    torch.multiprocessing.spawn(_in_each, (tmp_path / "group", work, arguments), nprocs=_PROCESSES)


def _compare_all_shards(mesh, seed):
    _compare_shards(mesh, seed, _CASES, _HEADS, _HEADS_KV)
    # One process would have the keys of the other's queries: torch gathers the heads.
    _compare_shards(mesh, seed, {"heads": ("Shard(3)", "Shard(0)", "Replicate()")}, 6, 3)


def _compare_shards(mesh, seed, cases, heads, heads_kv):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = {"Replicate()": Replicate(), **{f"Shard({axis})": Shard(axis) for axis in range(4)}}
    torch.manual_seed(seed)
    token = (_PROCESSES, *_LAYOUT)
    whole = [torch.randn(*token, number, _HEAD_DIM) for number in (heads, heads_kv, heads_kv)]
    whole += [torch.randn(heads, *(2 * extent - 1 for extent in _KERNEL_SIZE))]
    grad = torch.randn(*token, heads, _HEAD_DIM)
    leaves = [tensor.double().requires_grad_() for tensor in whole]
    expected = neighborhood_attention(*leaves[:3], _KERNEL_SIZE, relative_position_bias=leaves[3])[0]
    expected.backward(grad.double())
    for name, (of_tokens, of_bias, of_output) in cases.items():
        wanted = [placements[of_tokens]] * 3 + [placements[of_bias]]
        shards = [
            distribute_tensor(tensor, mesh, [one]).requires_grad_() for tensor, one in zip(whole, wanted, strict=True)
        ]
        output = na2d(*shards[:3], _KERNEL_SIZE, relative_position_bias=shards[3])
        assert output.placements == (placements[of_output],), (name, output.placements)
        output.backward(distribute_tensor(grad, mesh, [placements[of_output]]))
        assert torch.allclose(output.full_tensor().double(), expected, atol=1e-5), name
        for shard, leaf in zip(shards, leaves, strict=True):
            assert torch.allclose(shard.grad.full_tensor().double(), leaf.grad, atol=1e-4), name


def test_shards_give_what_the_whole_gives(tmp_path, seed):
    on_each(tmp_path, _compare_all_shards, seed)


def _train_alike(mesh, seed, wrap):
    torch.manual_seed(seed)
    layer = NeighborhoodAttention2D(_HEADS * _HEAD_DIM, _HEADS, kernel_size=3, rel_pos_bias=True)
    tokens, grad = torch.randn(2, _PROCESSES, *_LAYOUT, _HEADS * _HEAD_DIM)
    alone = copy.deepcopy(layer)
    expected = alone(tokens)
    expected.backward(grad)
    shared = wrap(mesh, layer)
    own = slice(mesh.get_rank(), mesh.get_rank() + 1)
    output = shared(tokens[own])
    assert torch.allclose(output, expected[own], atol=1e-5)
    output.backward(grad[own])
    for name, parameter in alone.named_parameters():
        # Gradients are averaged over the processes.
        found = dict(layer.named_parameters())[name].grad
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert torch.allclose(_PROCESSES * found, parameter.grad, atol=1e-4), name


def _fully_shard(mesh, layer):
    from torch.distributed.fsdp import fully_shard

    fully_shard(layer, mesh=mesh)
    return layer


def _replicate(mesh, layer):
    return torch.nn.parallel.DistributedDataParallel(layer, process_group=mesh.get_group())


def _train_all_alike(mesh, seed):
    for wrap in (_fully_shard, _replicate):
        _train_alike(mesh, seed, wrap)


def test_layers_are_trained_unchanged(tmp_path, seed):
    """By FSDP2 and by DDP."""
    on_each(tmp_path, _train_all_alike, seed)


def test_rules_follow_the_table():
    """An operand that is not there has no place, and what batch entries share is summed over by whoever shares it."""
    from torch.distributed.tensor import Replicate, Shard

    from na_compiler.distributed.sharding import acceptable_placements
    from na_compiler.ops.schema import BACKWARD

    class Known:
        def __init__(self, *shape):
            self.shape = shape
            self.mesh = type("Mesh", (), {"size": staticmethod(lambda: 2)})

    tokens, numbers = Known(2, 7, 8, 4, 8), Known(2, 7, 8, 4)
    arguments = (tokens, None, tokens, tokens, tokens, tokens, numbers, (3, 3), (1, 1), (1, 1), (0, 0), 1.0, None, None)
    arguments += (Known(4, 5, 5),)
    everywhere, of_batch, of_heads = acceptable_placements(2, BACKWARD, *arguments)
    assert set(everywhere[0]) == {Replicate()}
    places = dict(zip(BACKWARD.names, of_batch[1], strict=True))
    assert (places["query"], places["relative_position_bias"], places["grad_lse"]) == (Shard(0), Replicate(), None)
    results = dict(zip((one.name for one in BACKWARD.results), of_batch[0], strict=True))
    assert (results["grad_relative_position_bias"], results["grad_additional_keys"]) == (Shard(0), Replicate())
    assert dict(zip(BACKWARD.names, of_heads[1], strict=True))["lse"] == Shard(3)
    results = dict(zip((one.name for one in BACKWARD.results), of_heads[0], strict=True))
    assert results["grad_relative_position_bias"] == Shard(1)


def test_importing_torch_does_not_import_its_distributed_tensors(tmp_path):
    """They are slow to import, and few need them; whoever does gets the rules in either order."""
    there = "'na_compiler.distributed.sharding' in sys.modules"
    first = f"import sys, torch, na_compiler; assert not {there}; import torch.distributed.tensor; assert {there}"
    last = f"import sys, torch.distributed.tensor, na_compiler; assert {there}"
    for code in (first, last):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
