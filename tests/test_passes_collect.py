"""What the passes collect: each site with its problem, at other sizes, in each graph, and what is kept of a file's."""

import os

import pytest
import torch
from torch import fx, nn
from torch.export import Dim
from torch_graphs import Encoder, close

import na_compiler
from na_compiler import Problem, passes


def test_collect_finds_each_layer_with_its_problem():
    program = torch.export.export(Encoder().eval(), (torch.randn(2, 8, 9, 32),), dynamic_shapes=({0: Dim("B", max=8)},))
    sites = passes.collect(program)
    assert [site.layer for site in sites] == ["layers.0", "layers.1", "layers.2"]
    assert all(site.dynamic == ("batch",) and site.batch == 2 and site.is_ours for site in sites)
    near, far = Problem((8, 9), 2, 16, 3), Problem((8, 9), 2, 16, 3, dilation=2)
    assert {problem: len(found) for problem, found in sites.problems().items()} == {near: 2, far: 1}
    specs = sites.specs(["llvm:x86-64-v3", "llvm:x86-64-v4"], training=True)
    assert len(specs) == len(set(specs)) == 8


def test_collect_at_other_resolutions():
    dims = {1: 4 * Dim("X", min=2, max=20), 2: Dim("Y", min=6, max=64)}
    program = torch.export.export(Encoder().eval(), (torch.randn(1, 8, 9, 32),), dynamic_shapes=(dims,))
    assert {site.problem.layout for site in passes.collect(program)} == {(8, 9)}
    sites = passes.collect(program, [{"x": (1, 16, 12, 32)}, {"x": (1, 40, 7, 32)}])
    assert {site.problem.layout for site in sites} == {(16, 12), (40, 7)}
    assert sites[0].dynamic == ("layout[0]", "layout[1]")
    with pytest.raises(ValueError, match=r"dimension 1 of input x .*4\*.*got 10"):
        passes.collect(program, [{"x": (1, 10, 12, 32)}])
    with pytest.raises(ValueError, match="dimension 0 of input x is 1 in this model, got 3"):
        passes.collect(program, [{"x": (3, 8, 12, 32)}])
    with pytest.raises(ValueError, match="no input 'y'; its inputs are x"):
        passes.collect(program, [{"y": (1, 8, 12, 32)}])
    with pytest.raises(ValueError, match=r"layers.1: kernel_size \* dilation must be at most"):
        passes.collect(program, [{"x": (1, 4, 12, 32)}])


def test_collect_reads_gqa_additional_keys_and_the_backward(seed):
    class Text(nn.Module):
        def forward(self, query, key, value, more):
            return na_compiler.na1d(query, key, value, 5, is_causal=True, additional_keys=more, additional_values=more)

    tensors = (
        torch.randn(1, 12, 4, 16),
        torch.randn(1, 12, 2, 16),
        torch.randn(1, 12, 2, 16),
        torch.randn(1, 3, 2, 16),
    )
    (site,) = passes.collect(torch.export.export(Text(), tensors))
    problem = Problem(12, 4, 16, 5, is_causal=True, heads_kv=2, additional_kv=True)
    assert site.problem == problem

    def loss(query, key, value, more):
        return torch.autograd.grad(Text()(query, key, value, more).sum(), query)

    tensors = [tensor.requires_grad_() for tensor in tensors]
    joint = fx.experimental.proxy_tensor.make_fx(loss)(*tensors)
    found = passes.collect(joint)
    assert [(site.direction, site.problem) for site in found] == [("forward", problem), ("backward", problem)]


class Branches(nn.Module):
    """Two branches whose nodes have the same names, and copies in one that writes."""

    def forward(self, flag, query):
        def near(query):
            return na_compiler.na1d(query, query, query, 3)

        def far(query):
            return na_compiler.na1d(query, query, query, 5)

        return torch.cond(flag, near, far, (query,))


def test_nodes_of_one_name_in_different_graphs_are_different_ones(seed, tmp_path, monkeypatch):
    query = torch.randn(1, 12, 2, 8)
    model, inputs = Branches(), [(torch.tensor(flag), query) for flag in (True, False)]
    expected = [model(*each) for each in inputs]
    program = torch.export.export(model, inputs[0])
    sites = passes.collect(program)
    assert sites[0].node == sites[1].node, "which is what this is about"
    assert len(set(sites)) == len({site.layer for site in sites}) == len({site.graph for site in sites}) == 2
    assert {site.problem.kernel_size for site in sites} == {(3,), (5,)}
    passes.compile(program)
    assert passes.bind(program) == 2
    for each, wanted in zip(inputs, expected, strict=True):
        close(program.module()(*each), wanted)
    from na_compiler.passes.bind_torch import unbind

    assert unbind(program) == 2
    for each, wanted in zip(inputs, expected, strict=True):
        close(program.module()(*each), wanted)

    from na_compiler.passes.remember import remembered

    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    file = tmp_path / "program"
    file.write_text("any")
    assert remembered(str(file), None, lambda: sites) == sites
    assert remembered(str(file), None, lambda: None) == sites


def test_one_problem_twice_in_two_graphs_is_two_sites(seed):
    class Same(nn.Module):
        def forward(self, flag, query):
            def one(query):
                return na_compiler.na1d(query, query, query, 3)

            def other(query):
                return na_compiler.na1d(query, query, query, 3) * 2

            return torch.cond(flag, one, other, (query,))

    dims = (None, {1: Dim("X", min=6, max=64)})
    program = torch.export.export(Same(), (torch.tensor(True), torch.randn(1, 12, 2, 8)), dynamic_shapes=dims)
    assert len(passes.collect(program, [{"query": (1, 14, 2, 8)}])) == 2


class TestRemembered:
    """Which sites a file has is kept beside the kernels; whatever else may be in that place is no more than missing."""

    @pytest.fixture
    def find(self, monkeypatch, tmp_path):
        from na_compiler.passes import remember

        monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))

        def find(text, sites=passes.Sites()):  # noqa: B008
            file = tmp_path / "program"
            file.write_text(text)
            return remember.remembered(str(file), None, lambda: sites)

        return find

    @pytest.mark.parametrize("what", ["deep", "list", "pipe", "large"])
    def test_what_is_no_such_file(self, find, tmp_path, what):
        find("any")
        (entry,) = (tmp_path / "cache" / "models").iterdir()
        entry.unlink()
        if what == "pipe":
            os.mkfifo(entry)
        else:
            text = {"deep": "[" * 100_000, "list": '{"sites": [[]]}', "large": " " * (9 << 20) + '{"sites": []}'}
            entry.write_text(text[what])
        known = passes.Sites([passes.Site("node", "layer", "na_compiler::na1d", "forward", None)])
        assert find("any", known) == known
        assert find("any") == known

    def test_there_is_a_bound(self, find, tmp_path, monkeypatch):
        from na_compiler.compiler import cache
        from na_compiler.passes import remember

        monkeypatch.setattr(remember, "_LIMIT", 3)
        for count in range(5):
            find(str(count))
        folder = tmp_path / "cache" / "models"
        assert len(list(folder.iterdir())) == 3
        cache.clear()
        assert not list(folder.iterdir())
