"""The passes look at masks by their content, however they are made; and what they leave, they leave as it was."""

import operator

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import na_compiler
from na_compiler import Problem, passes
from na_compiler.passes import sdpa as sdpa_pass
from na_compiler.passes.backend import _buffers
from na_compiler.passes.canonicalise_torch import canonicalise_torch
from na_compiler.passes.masks import axis_mask

N, WINDOW, HEADS = 40, 5, 4
BAND = torch.from_numpy(axis_mask(N, WINDOW, is_causal=True))
PROBLEM = Problem(N, HEADS, 8, WINDOW, is_causal=True)
sdpa = nn.functional.scaled_dot_product_attention


def tensors(tokens=N, heads_kv=HEADS, dtype=torch.float32):
    return tuple(torch.randn(2, heads, tokens, 8, dtype=dtype) for heads in (HEADS, heads_kv, heads_kv))


def close(result, expected, tolerance=1e-5):
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=tolerance)


class Masked(nn.Module):
    """Attention with a mask that a function makes of a buffer and a query."""

    def __init__(self, make, mask=BAND):
        super().__init__()
        self.make = make
        self.register_buffer("mask", mask)

    def forward(self, query, key, value):
        return sdpa(query, key, value, attn_mask=self.make(self.mask, query))


def in_place(mask, query):
    made = torch.zeros_like(mask, dtype=query.dtype)
    made.masked_fill_(~mask, float("-inf"))
    return made


def by_rows(mask, query):
    made = torch.zeros(N, N, dtype=torch.bool)
    for row in range(N):
        made[row, max(0, row - WINDOW + 1) : row + 1] = True
    return made


def of_numbers(mask, query):
    index = torch.arange(query.shape[2], device=query.device)
    return (index[:, None] - index[None]).ge(0) & (index[:, None] - index[None]).lt(WINDOW)


MADE = {
    "for each head": lambda mask, query: mask.expand(1, HEADS, N, N).clone(),
    "expanded to the batch": lambda mask, query: mask[None, None].expand(query.shape[0], -1, -1, -1),
    "of numbers": of_numbers,
    "of ones": lambda mask, query: torch.ones(N, N, dtype=torch.bool).tril().triu(1 - WINDOW),
    "of new ones": lambda mask, query: (1.0 - query.new_ones(N, query.size(2)).tril().triu(1 - WINDOW)) * -1e4,
    "of infinities": lambda mask, query: torch.full((N, N), float("-inf")).triu(1) + mask.new_full(
        (N, N), float("-inf"), dtype=torch.float32
    ).tril(-WINDOW),
    "finite": lambda mask, query: (1.0 - mask.float()) * -1e4,
    "in place": in_place,
    "row by row": by_rows,
}  # fmt: skip


def captured(model, *inputs):
    """Return what a model computes as Dynamo captured it and the passes left it, and how many nodes they changed."""
    found = []

    def backend(module, given):
        held = {name: given[place] for name, place in _buffers(module, given).items()}
        found.append(canonicalise_torch(module, held, set()))
        found.append([site.problem for site in passes.collect(module)])
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return result, found[1]


@pytest.mark.parametrize("made", MADE)
def test_masks_however_they_are_made(made, seed):
    model, inputs = Masked(MADE[made]).eval(), tensors()
    expected = model(*inputs)
    batch = {0: Dim("batch", max=8)}
    program = torch.export.export(model, inputs, dynamic_shapes=(None, batch, batch, batch)[1:])
    passes.canonicalise(program)
    assert [site.problem for site in passes.collect(program)] == [PROBLEM]
    assert not any("fill" in str(node.target) for node in program.graph.nodes), "what made the mask is gone"
    close(program.module()(*inputs), expected)
    result, problems = captured(model, *inputs)
    assert problems == [PROBLEM]
    close(result, expected)


def test_half_precision_has_its_own_finite_numbers(seed):
    for dtype in (torch.bfloat16, torch.float16):
        model, inputs = Masked(lambda mask, query: (1.0 - mask.to(query.dtype)) * -1e4), tensors(dtype=dtype)
        program = torch.export.export(model, inputs)
        assert passes.canonicalise(program) == 1
        close(program.module()(*inputs), model(*inputs), 0.02)


def differs(mask, query):
    made = mask.expand(1, HEADS, N, N).clone()
    made[0, 1, 7, 7] = False
    return made


def written(mask, query):
    mask[3, 1] = True
    return mask


LEFT = {
    "differs between heads": (differs, "differs between heads"),
    "adds": (lambda mask, query: (1.0 - mask.float()) * -100, "adds more to scores than 0 and, to hide, -1e4 or less"),
    "is random": (lambda mask, query: mask & (torch.rand(()) < 2), "not known to give the same"),
    "of the query": (lambda mask, query: mask & (query[:1, :1, :, :1] < 99), "depends on the input"),
    "written to": (written, "written to"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_masks_that_are_left(kind, seed, caplog):
    make, said = LEFT[kind]
    inputs = tuple(tensor[:1] for tensor in tensors())
    model = Masked(make, BAND.clone()).eval()
    with caplog.at_level("INFO", "na_compiler"):
        result, problems = captured(model, *inputs)
    assert problems == []
    assert said in caplog.text
    assert caplog.text.count("attention with a mask stays as it is") == 1
    torch.manual_seed(seed)
    close(result, Masked(make, BAND.clone())(*inputs))


def test_what_is_written_later_does_not_count(seed):
    """And what is written before does; each reader has the mask of its time. The caller's tensors are written into."""

    class Twice(nn.Module):
        def forward(self, query, key, value):
            index = torch.arange(N)
            mask = index[:, None] >= index
            mask &= index[:, None] - index < WINDOW
            first = sdpa(query, key, value, attn_mask=mask)
            mask |= index[:, None] - index == WINDOW
            second = sdpa(query, key, value, attn_mask=mask)
            key.mul_(2.0)
            return first, second, key

    inputs, others = tensors(), tensors()
    for mine, other in zip(inputs, others, strict=True):
        other.copy_(mine)
    expected = Twice()(*inputs)
    result, problems = captured(Twice(), *others)
    assert [problem.kernel_size for problem in problems] == [(WINDOW,), (WINDOW + 1,)]
    for one, wanted in zip(result, expected, strict=True):
        close(one, wanted)
    close(others[1], inputs[1])


@pytest.mark.parametrize("first", ["view", "whole"])
def test_a_view_that_is_written_into_is_another_mask_than_the_whole(first, seed):
    class Turned(nn.Module):
        def forward(self, query, key, value):
            whole = torch.ones(N, N, dtype=torch.bool)
            view = whole.t()
            view.tril_()
            masks = (view, whole) if first == "view" else (whole, view)
            return tuple(sdpa(query, key, value, attn_mask=mask) for mask in masks)

    inputs = tensors()
    program = torch.export.export(Turned(), inputs)
    passes.canonicalise(program)
    # Each sees itself and what is before; of the other one, what is behind.
    problems = [PROBLEM.replace(kernel_size=N), Problem(N, HEADS, 8, N, border="cut:0")]
    assert [site.problem for site in passes.collect(program)] == problems[:: 1 if first == "view" else -1]
    for one, wanted in zip(program.module()(*inputs), Turned()(*inputs), strict=True):
        close(one, wanted)


@pytest.mark.parametrize(("dynamic", "makes"), [(False, BAND), (True, None), (False, torch.randn(N, N))])
def test_a_mask_of_many_layers_is_looked_at_once(dynamic, makes, seed, monkeypatch, caplog):
    """Also one that is left."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", makes)

        def forward(self, x):
            mask = counted(self, x, x.shape[2]) if dynamic else self.mask
            for _ in range(3):
                x = sdpa(x, x, x, attn_mask=mask)
            return x

    looked, real = [], sdpa_pass._as_bool
    monkeypatch.setattr(sdpa_pass, "_as_bool", lambda mask: [looked.append(mask.shape), real(mask)][1])
    dims = {2: Dim("length", min=8, max=255)} if dynamic else None
    program = torch.export.export(Layers(), (torch.randn(2, HEADS, N, 8),), dynamic_shapes=(dims,))
    with caplog.at_level("INFO", "na_compiler"):
        passes.canonicalise(program)
    is_left = makes is not None and makes.dtype is torch.float32
    assert caplog.text.count("adds more to scores" if is_left else "its mask is a neighborhood") == 3
    assert len(looked) == 1


class MultiHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(32, HEADS, batch_first=True), options
        self.register_buffer("hidden", ~BAND)

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=self.hidden, **self.options)[0]


def test_multi_head_attention(seed, caplog):
    x = torch.randn(2, N, 32)
    for options in ({"need_weights": False}, {}):
        model = MultiHead(**options).eval()
        result, problems = captured(model, x)
        assert problems == [PROBLEM]
        close(result, model(x))
    program = torch.export.export(MultiHead(need_weights=False).eval(), (x,))
    passes.canonicalise(program)
    assert len(passes.collect(program)) == 1
    model = nn.TransformerEncoderLayer(32, HEADS, 64, batch_first=True, dropout=0.0)
    layer = Masked(None)
    layer.forward = lambda x: model(x, src_mask=~layer.mask)
    program = torch.export.export(layer, (x,))
    passes.canonicalise(program)
    assert len(passes.collect(program)) == 1
    close(program.module()(x), model(x, src_mask=~BAND))
    with caplog.at_level("INFO", "na_compiler"):
        _, problems = captured(model.eval(), x, ~BAND)
    assert problems == []
    assert "set_fastpath_enabled(False)" in caplog.text


class Repeated(Masked):
    """Keys and values of two heads, each repeated for two more of queries."""

    def __init__(self, repeat):
        super().__init__(lambda mask, query: mask)
        self.repeat = repeat

    def forward(self, query, key, value):
        return super().forward(query, self.repeat(key), self.repeat(value))


def expanded(x):
    return x[:, :, None, :, :].expand(x.shape[0], 2, 2, N, 8).reshape(x.shape[0], HEADS, N, 8)


def expanded_tokens_first(x):
    rows = x.transpose(1, 2)
    return rows.unsqueeze(3).expand(-1, -1, -1, 2, -1).flatten(2, 3).transpose(1, 2)


REPEATED = {
    "interleaved": (lambda x: x.repeat_interleave(2, 1), 2),
    "expanded": (expanded, 2),
    "tokens first": (expanded_tokens_first, 2),
    "one after the other": (lambda x: x.repeat(1, 2, 1, 1), HEADS),
    "the other way round": (lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2), HEADS),
}


@pytest.mark.parametrize("how", REPEATED)
def test_repeated_heads_are_read_where_they_were(how, seed):
    repeat, heads_kv = REPEATED[how]
    model, inputs = Repeated(repeat).eval(), tensors(heads_kv=2)
    problem = Problem(N, HEADS, 8, WINDOW, is_causal=True, heads_kv=heads_kv)
    program = torch.export.export(model, inputs)
    passes.canonicalise(program)
    assert [site.problem for site in passes.collect(program)] == [problem]
    close(program.module()(*inputs), model(*inputs))
    result, problems = captured(model, *inputs)
    assert problems == [problem]
    close(result, model(*inputs))


def test_only_one_of_them_repeated(seed):
    class One(Masked):
        def forward(self, query, key, value):
            return super().forward(query, key.repeat_interleave(2, 1), value)

    query, key, _ = tensors(heads_kv=2)
    model, inputs = One(lambda mask, query: mask).eval(), (query, key, torch.randn_like(query))
    program = torch.export.export(model, inputs)
    passes.canonicalise(program)
    assert [site.problem.heads_kv for site in passes.collect(program)] == [HEADS]
    close(program.module()(*inputs), model(*inputs))


def sliding(window):
    return lambda batch, head, query, key: (query >= key) & (query - key < window)


class Flex(nn.Module):
    def __init__(self, mask_mod, **options):
        super().__init__()
        self.block_mask = create_block_mask(mask_mod, None, None, N, N, device="cpu", BLOCK_SIZE=16)
        self.options = options

    def forward(self, query, key, value):
        output = flex_attention(query, key, value, block_mask=self.block_mask, enable_gqa=True, **self.options)
        return output[0] + output[1][..., None] if isinstance(output, tuple) else output


BLOCK_MASKS = {
    "causal": (sliding(WINDOW), dict(kernel_size=WINDOW, is_causal=True)),
    "band": (lambda b, h, q, k: (q - k).abs() < WINDOW, dict(kernel_size=2 * WINDOW - 1, border="cut")),
    "circle": (lambda b, h, q, k: (q - k + 2) % N < 5, dict(kernel_size=5, border="wrap")),
}


@pytest.mark.parametrize("kind", BLOCK_MASKS)
def test_block_masks_of_flex_attention(kind, seed):
    inputs = tensors(heads_kv=2)
    mask_mod, parameters = BLOCK_MASKS[kind]
    model = Flex(mask_mod, scale=0.3)
    problem = Problem(N, HEADS, 8, heads_kv=2, **parameters)
    with torch.no_grad():
        expected = model(*inputs)
        result, problems = captured(model, *inputs)
        program = torch.export.export(model, inputs)
    passes.canonicalise(program)
    for found in (problems, [site.problem for site in passes.collect(program)]):
        assert found == [problem]
    close(result, expected)
    close(program.module()(*inputs), expected)


def without_a_block(model):
    """Take a block from what queries see, of which ``mask_mod`` knows nothing."""
    model.block_mask.kv_num_blocks[0, 0, 2] -= 1
    return model


FLEX_LEFT = {
    "blocks": (lambda: without_a_block(Flex(sliding(WINDOW))), "its block mask is no neighborhood"),
    "scores": (lambda: Flex(sliding(WINDOW), score_mod=lambda score, b, h, q, k: score + q - k), "it has a score_mod"),
    "heads": (lambda: Flex(lambda b, h, q, k: (q >= k) & (q - k < WINDOW + h)), "differs between heads"),
    "lse": (lambda: Flex(sliding(WINDOW), return_lse=True), "its lse is read"),
    "stripes": (lambda: Flex(lambda b, h, q, k: (q - k).abs() % 3 != 1), "its block mask is no neighborhood"),
}


@pytest.mark.parametrize("kind", FLEX_LEFT)
@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
def test_block_masks_that_are_left(kind, seed, caplog):
    make, said = FLEX_LEFT[kind]
    model = make()
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        _, problems = captured(model, *tensors())
    assert problems == []
    assert said in caplog.text


class Lengths(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        index = torch.arange(256)
        self.register_buffer("large", (index[:, None] >= index) & (index[:, None] - index < WINDOW))
        # As NATTEN's rule has them for 256 tokens: the last windows are others for fewer.
        self.register_buffer("chunks", torch.from_numpy(axis_mask(256, 9, 9, is_causal=True)))
        self.register_buffer("shifted", torch.from_numpy(axis_mask(256, 9)))
        self.register_buffer("stripes", (index[:, None] - index) % 3 != 1)

    def forward(self, x):
        return sdpa(x, x, x, attn_mask=self.make(self, x, x.shape[2]))


def counted(model, x, length):
    index = torch.arange(length, device=x.device)
    distance = index[:, None] - index[None, :]
    return ((distance >= 0) & (distance < WINDOW))[None, None].expand(x.shape[0], 1, -1, -1)


def chunks(model, x, length):
    index = torch.arange(length)
    return (index[:, None] // WINDOW == index // WINDOW) & (index[:, None] >= index)


def packed(model, x, length):
    """As transformers makes masks of positions that may be of several sequences."""
    positions = torch.arange(length)[None].expand(1, -1)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, index = torch.arange(1)[:, None, None, None], torch.arange(length)
    query, key = index[None, None, :, None], index[None, None, None, :]
    distance = positions[batch, query] - positions[batch, key]
    return (distance >= 0) & (distance < WINDOW) & (sequence[batch, query] == sequence[batch, key])


def from_the_end(model, x, length):
    index = length - 1 - torch.arange(length)
    return (index[:, None] <= index) & (index - index[:, None] < WINDOW)


OF_LENGTHS = {
    "counted": (counted, None),
    "ones": (lambda model, x, length: (1.0 - x.new_ones(length, length).tril().triu(1 - WINDOW)) * -1e4, None),
    "sliced": (lambda model, x, length: model.large[:length, :length], None),
    "packed": (packed, None),
    "picked from the end": (
        lambda model, x, length: model.large[:length, :length][torch.arange(length) - 1], "count from its end",
    ),
    "differences at the end": (
        lambda model, x, length: torch.diff(
            torch.arange(length), prepend=torch.zeros(1), append=torch.ones(1)
        )[1:] + model.large[:length, :length] > 1, "count from its end",
    ),
    "from the end": (from_the_end, "computes with a size"),
    "up to 0": (lambda model, x, length: (torch.arange(-length, 0) > -9) & model.large[:length, :length], "from 0"),
    "of the length": (
        lambda model, x, length: torch.ones(length, length, dtype=torch.bool).tril().triu(-(length // 4)), "a size",
    ),
    "filled with it": (lambda model, x, length: torch.full((length, length), length).tril(4) > 0, "inside"),
    "sliced at the end": (lambda model, x, length: model.large[-length:, -length:], "may count from its end"),
    "whole": (lambda model, x, length: torch.ones(length, length, dtype=torch.bool).tril(), "hides nothing but"),
    "both sides": (lambda model, x, length: torch.ones(length, length).tril(4).triu(-4).bool(), None),
    "more before": (lambda model, x, length: torch.ones(length, length).tril(1).triu(-4).bool(), None),
    "chunks": (chunks, None),
    "stripes": (lambda model, x, length: model.stripes[:length, :length], "is no neighborhood"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_LENGTHS)
def test_masks_of_any_length(kind, seed, caplog):
    make, said = OF_LENGTHS[kind]
    model, x = Lengths(make), torch.randn(2, HEADS, N, 8)
    dims = {0: Dim("batch", max=8), 2: Dim("length", min=8, max=255)}
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    with caplog.at_level("INFO", "na_compiler"):
        passes.canonicalise(program)
    assert len(passes.collect(program)) == (said is None)
    assert said is None or said in caplog.text
    # Also where the window is as long, and longer.
    for length in (8, N, 77) if said is None else (N,):
        x = torch.randn(2, HEADS, length, 8)
        close(program.module()(x), model(x))


def test_lengths_that_have_no_bound_are_guarded(seed, caplog):
    """torch.compile takes all lengths up to a bound, those that are shorter than the window among them."""
    model = Lengths(counted)
    found = []

    def backend(module, inputs):
        canonicalise_torch(module)
        found.append(len(passes.collect(module)))
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        for length in (N, 48, 77, WINDOW - 1, 64):
            x = torch.randn(2, HEADS, length, 8)
            close(compiled(x), model(x))
    assert found == [1, 1], "of one length, and of all"
    program = torch.export.export(model, (x,), dynamic_shapes=({2: Dim("length", min=8)},))
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert "a dimension with a max would do" in caplog.text


@pytest.mark.parametrize(
    ("name", "said"), [("chunks", "256 tokens, for which its mask was looked at, end within"), ("shifted", "no window")]
)
def test_windows_that_depend_on_the_length_are_left(name, said, seed, caplog, monkeypatch):
    """What a mask is for the longest length is not what it is for others."""
    monkeypatch.setattr(sdpa_pass, "LONGEST", 256)
    model = Lengths(lambda model, x, length: getattr(model, name)[:length, :length])

    def backend(module, inputs):
        assert canonicalise_torch(module, _held(module, inputs)) == 0
        return module.forward

    torch._dynamo.reset()
    x = torch.randn(2, HEADS, N, 8)
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        close(torch.compile(model, backend=backend, dynamic=True)(x), model(x))
    assert said in caplog.text


def _held(module, inputs):
    """Masks are taken as constant."""
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    found = zip(names, inputs, strict=True)
    return {name: value for name, value in found if isinstance(value, torch.Tensor) and value.dtype is torch.bool}


def test_two_kernel_sizes_through_one_function(seed):
    def attend(query, key, value, kernel_size):
        return na_compiler.na1d(query, key, value, kernel_size)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="na_compiler", fullgraph=True)
    inputs = torch.randn(3, 1, 32, 2, 8).unbind()
    with torch.no_grad():
        for kernel_size in (3, 5, 7):
            close(compiled(*inputs, kernel_size), attend(*inputs, kernel_size))


def test_a_reshape_that_copies_is_no_failure(seed):
    """Fake tensors raise another exception than real ones where a tensor cannot be looked at in another shape."""

    def attend(x):
        rows = x.permute(0, 2, 1, 4, 3).reshape(x.shape[0], N, 2, 8)
        return na_compiler.na1d(rows, rows, rows, 3)

    x = torch.randn(2, 2, N, 4, 2)
    from na_compiler.passes.views import copies

    program = torch.export.export(Lambda(attend), (x,), dynamic_shapes=({0: Dim("batch", max=4)},))
    passes.canonicalise(program)
    assert [node.op for node in copies(program.graph_module)] == ["call_function"]
    close(program.module()(x), attend(x))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_which_operators_are_known_to_write(seed):
    from na_compiler.passes.effects import is_pure, shares_memory_with, writes, writes_constantly

    graph = torch.fx.Graph()
    x = graph.placeholder("x")

    def method(name, *args):
        return graph.call_method(name, (x, *args))

    for name in ("masked_fill_", "copy_", "fill_", "__iadd__"):
        assert writes(method(name)), name
    for name in ("uniform_", "bernoulli_", "normal_", "resize_", "set_", "random_", "exponential_"):
        assert not writes_constantly(method(name)), name
    assert not any(map(is_pure, (method("bernoulli"), method("masked_fill_", 1), method("new_empty", 3))))
    assert shares_memory_with(method("transpose", 0, 1)) == [x]
    assert shares_memory_with(method("type_as", x)) == [x]
    assert shares_memory_with(method("add", 1)) == []
    assert shares_memory_with(graph.call_function(operator.getitem, (x, 0))) == [x]
    assert shares_memory_with(graph.call_function(torch.dropout, (x, 0.5, False))) == [x]
