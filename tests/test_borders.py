"""Borders, from the rule to the kernels: against their published form, and the float64 reference."""

import io
import itertools
import random

import onnx
import onnxruntime
import pytest
import torch
from draws import some
from onnx.reference import ReferenceEvaluator
from onnx_models import Forward, one_node, session
from onnx_models import run as run_session
from oracle import check_backward, check_forward, check_tangents, draw, draw_tangents, poisoned
from test_aot import call as native_call
from test_aot import run as native_run
from test_simt import backward as emulated_backward
from test_simt import forward as emulated_forward
from test_simt import tangent as emulated_tangent
from test_tangents import run as run_tangent

import na_compiler
import na_compiler.onnx
from na_compiler import aot, na1d, na2d, na3d
from na_compiler.compiler.spec import KernelSpec
from na_compiler.counting import most_queries, visible_pairs, widest_union
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention, neighborhood_mask, relative_places
from na_compiler.runtime.jit import command_for
from na_compiler.schedules.choose import choose
from na_compiler.target import Target
from na_compiler.window import group_length, query_bounds, window_bounds

BIAS, MASK = "relative_position_bias", "key_mask"
PROBLEMS = [
    Problem(61, 2, 32, 9, border="cut"),
    Problem(45, 2, 24, 12, 5, is_causal=True, border="cut"),
    Problem(37, 2, 16, 64, 64, is_causal=True, border="cut", additional_kv=True),
    Problem(20, 2, 16, 50, border="cut", operands=(BIAS, MASK)),
    Problem(54, 2, 12, 44, border="cut:15", heads_kv=1, operands=(MASK,)),
    Problem(101, 2, 16, 6, 2, 7, border="cut", operands=(BIAS,)),
    Problem(43, 1, 8, 9, border="cut:0"),
    Problem(48, 2, 24, 11, 4, border="wrap", operands=(BIAS, MASK)),
    Problem(60, 2, 16, 12, 5, 4, border="wrap", additional_kv=True),
    Problem((19, 23), 2, 32, (5, 8), border="cut", operands=(BIAS,)),
    Problem((13, 17), 2, 16, (5, 6), (4, 2), is_causal=(False, True), border=("shift", "cut")),
    Problem((12, 16), 4, 16, (5, 7), (2, 1), heads_kv=2, border=("wrap", "cut"), operands=(BIAS, MASK)),
    Problem((14, 9), 2, 8, (7, 9), border=("cut:2", "wrap"), head_dim_v=20, operands=(MASK,)),
    Problem((9, 10), 3, 24, (2, 3), dilation=(3, 2), border=("shift", "wrap"), additional_kv=True),
    Problem((7, 6, 9), 2, 16, (9, 3, 4), (1, 3, 1), (1, 1, 2), border=("cut", "wrap", "cut"), operands=(BIAS,)),
    Problem((5, 8, 6), 2, 17, (5, 4, 3), is_causal=(True, False, False), border=("shift", "cut:3", "wrap")),
]


def published(index, length, kernel_size, stride, is_causal, border):
    """The rule as it is said: a window in its place, of which what lies outside is cut off."""
    left = int(border[4:]) if border.startswith("cut:") else kernel_size // 2
    if is_causal:
        start, end = index // stride * stride + stride - 1 - kernel_size + 1, index + 1
    else:
        start = index // stride * stride + stride // 2 - left
        end = start + kernel_size
    return (start, end) if border == "wrap" else (max(start, 0), min(end, length))


def rules(length):
    """Every rule of an axis with borders: kernel size, stride, causality, border."""
    for kernel_size in range(1, 2 * length + 2):
        for stride in range(1, kernel_size + 1):
            yield from ((kernel_size, stride, is_causal, "cut") for is_causal in (False, True))
            if kernel_size <= length and length % stride == 0:
                yield kernel_size, stride, False, "wrap"
        yield from ((kernel_size, 1, False, f"cut:{left}") for left in range(kernel_size))


def test_agrees_with_the_published_rule_everywhere():
    for length in range(1, 11):
        for rule in rules(length):
            bounds = [window_bounds(index, length, *rule) for index in range(length)]
            assert bounds == [published(index, length, *rule) for index in range(length)], (length, rule)


def test_queries_of_keys_are_those_whose_windows_have_them():
    for length in range(1, 9):
        for rule in rules(length):
            windows = [{key % length for key in range(*window_bounds(i, length, *rule))} for i in range(length)]
            for key in range(length):
                first, end = query_bounds(key, length, *rule)
                seeing = [index for index in range(length) if key in windows[index]]
                assert sorted(index % length for index in range(first, end)) == seeing, (length, rule, key)


def test_counts_along_an_axis(seed):
    """The closed forms, token by token."""
    for length in random.sample(range(1, 60), 12):
        drawn = list(rules(min(length, 14)))
        for kernel_size, *rest, border in random.sample(drawn, min(40, len(drawn))):
            if border == "wrap" and length % rest[0]:
                continue
            rule = (kernel_size, *rest, border)
            windows = [window_bounds(index, length, *rule) for index in range(length)]
            assert visible_pairs(length, *rule) == sum(end - start for start, end in windows), (length, rule)
            seen = [query_bounds(key, length, *rule) for key in range(length)]
            assert most_queries(length, *rule) == max(end - first for first, end in seen), (length, rule)
            for queries in {1, length, random.randint(1, length)}:
                blocks = range(0, length, queries)
                widest = max(windows[min(first + queries, length) - 1][1] - windows[first][0] for first in blocks)
                found = widest_union(length, kernel_size, *rest, queries, border)
                assert found == widest, (length, rule, queries)


def draw_problem(rank):
    """Draw a problem with mixed borders."""
    axes = []
    for _ in range(rank):
        length = random.randint(1, {1: 40, 2: 9, 3: 5}[rank])
        dilation = random.choice((1, 1, 2, 3))
        border = random.choice(("cut", "cut:", "wrap", "shift", "clamp"))
        is_causal = border in {"cut", "shift", "clamp"} and random.random() < 0.3
        kernel_size = random.randint(1, length if border in {"shift", "wrap"} else length + 4)
        strides = [1, kernel_size, random.randint(1, kernel_size)]
        if border == "wrap":
            strides = [stride for stride in range(1, kernel_size + 1) if length % stride == 0]
        stride = 1 if border == "cut:" else random.choice(strides)
        border += str(random.randrange(kernel_size)) if border == "cut:" else ""
        rest = 0 if border == "wrap" else random.randrange(dilation)
        axes.append((length * dilation + rest, kernel_size, stride, dilation, is_causal, border))
    layout, kernel_size, stride, dilation, is_causal, border = zip(*axes, strict=True)
    options = [option for option in (BIAS, MASK) if random.random() < 0.4]
    if any(":" in one for one in border):
        options = [option for option in options if option != BIAS]
    return Problem(
        layout, 2, random.choice((8, 12, 20)), kernel_size, stride, dilation, is_causal, random.choice((1, 2)),
        additional_kv=random.random() < 0.3, operands=options, border=border,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_reference_is_the_rule(rank, seed):
    for _ in range(12):
        problem = draw_problem(rank)
        mask = neighborhood_mask(problem)
        biases = relative_places(problem, torch.arange(problem.tokens))
        places = list(itertools.product(*map(range, problem.layout)))
        for query in random.sample(range(problem.tokens), min(problem.tokens, 8)):
            seen = {}
            for axis, place in enumerate(places[query]):
                dilation, layout = problem.dilation[axis], problem.layout[axis]
                index, length = place // dilation, group_length(layout, dilation, place % dilation)
                rule = [getattr(problem, name)[axis] for name in ("kernel_size", "stride", "is_causal", "border")]
                bounds = window_bounds if rule[-1] == "shift" else published
                keys = range(*bounds(index, length, *rule))
                seen[axis] = {key % length * dilation + place % dilation: key - index + rule[0] - 1 for key in keys}
            expected = {}
            for key in itertools.product(*seen.values()):
                number = 0
                for axis, along in enumerate(key):
                    number = number * (2 * problem.kernel_size[axis] - 1) + seen[axis][along]
                expected[key] = number
            found = {place: int(biases[query, at]) for at, place in enumerate(places) if mask[query, at]}
            assert found == expected, (problem, query)
        assert problem.pairs() == mask.sum()


def run(problem, target="llvm", batch=1):
    """Compile a problem and compare it with the reference."""
    example = draw(problem, batch=batch, lse_has_grad=bool(torch.randint(2, ())))
    scale = problem.head_dim**-0.5
    output, lse = poisoned(torch.empty(example.output.shape, dtype=example.inputs[0].dtype), example.lse.float())
    na_compiler.compile(problem, target).function(*example.read, scale, output, lse)
    check_forward(example, output, lse)
    kernel = na_compiler.compile(problem, target, direction="backward")
    results = example.output.to(example.inputs[0].dtype).contiguous(), example.lse.float().contiguous()
    arguments = (*example.inputs[:3], *results, example.grad_output, example.grad_lse)
    check_backward(example, kernel(*arguments, *example.inputs[3:], scale=scale, **example.others))


@pytest.mark.parametrize("problem", some(PROBLEMS, 6, "cpu borders"), ids=str)
def test_cpu(problem, seed):
    run(problem, batch=2 if problem.tokens < 100 else 1)


@pytest.mark.parametrize("rank", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_cpu_on_problems_drawn_anew(rank, seed):
    problem = draw_problem(rank)
    print(problem)
    run(problem)


LARGE = [
    Problem(6000, 1, 8, 9001, border="cut"),
    Problem(5200, 1, 8, 5100, border="wrap"),
    Problem((72, 75), 2, 8, (69, 100), (3, 1), heads_kv=1, additional_kv=True, border=("wrap", "cut")),
]


@pytest.mark.parametrize("problem", some(LARGE, 1, "large borders"), ids=str)
def test_windows_that_come_in_chunks(problem, seed):
    assert KernelSpec.make(problem).plan.is_chunked
    run(problem)


@pytest.mark.parametrize("dtype", some(["bfloat16", "float16"], 1, "half borders"))
def test_half_precision(dtype, seed):
    run(random.choice(PROBLEMS).replace(dtype=dtype))


@pytest.mark.parametrize("problem", some(PROBLEMS, 4, "simt borders"), ids=str)
def test_simt(problem, seed):
    example = draw(problem, additional=3, lse_has_grad=bool(torch.randint(2, ())))
    check_forward(example, *emulated_forward(example))
    check_backward(example, emulated_backward(example))


TANGENTS = [problem.replace(operands=()) for problem in PROBLEMS]


@pytest.mark.parametrize("problem", some(TANGENTS, 1, "tangents of cpu borders"), ids=str)
def test_cpu_tangents(problem, seed):
    run_tangent(problem)


@pytest.mark.parametrize("problem", some(TANGENTS, 1, "tangents of simt borders"), ids=str)
def test_simt_tangents(problem, seed):
    example = draw(problem, additional=3)
    tangents = draw_tangents(example)
    output, lse, *results = emulated_tangent(example, tangents)
    check_forward(example, output, lse)
    check_tangents(tangents, *results)


def test_simt_on_problems_drawn_anew(seed):
    problem = draw_problem(random.randint(1, 3))
    print(problem)
    example = draw(problem, additional=3)
    check_forward(example, *emulated_forward(example))
    check_backward(example, emulated_backward(example))


# ---- Problems ------------------------------------------------------------------------------------------------------

SAME = [
    # Causal windows of NATTEN's rule end there already; only the last stride group differs, if it is not whole.
    (dict(is_causal=True, border="cut"), dict(is_causal=True)),
    (dict(stride=3, is_causal=True, border="cut"), dict(stride=3, is_causal=True)),
    (dict(border="cut:4"), dict(is_causal=True)),
    (dict(border="cut:2"), dict(border="cut")),
    (dict(kernel_size=1, border="cut"), dict(kernel_size=1)),
    (dict(kernel_size=12, border="wrap"), dict(kernel_size=12)),
    (dict(kernel_size=99, stride=20, border="clamp"), dict(kernel_size=12, stride=12)),
    (dict(kernel_size=99, dilation=5, border="clamp"), dict(kernel_size=2, dilation=5)),
    (dict(border=["shift"]), dict()),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_equal_problems_are_equal(one, other):
    first, second = (Problem(12, 1, 8, **{"kernel_size": 5, **changes}) for changes in (one, other))
    assert first == second
    assert torch.equal(neighborhood_mask(first), neighborhood_mask(second))
    assert Problem.from_dict(first.to_dict()) == first
    assert ("border" in first.to_dict()) == first.has_borders


def test_a_problem_that_only_looks_alike_keeps_its_border():
    ragged = Problem(11, 1, 8, 5, 3, is_causal=True)
    assert ragged.replace(border="cut") != ragged
    assert not torch.equal(neighborhood_mask(ragged.replace(border="cut")), neighborhood_mask(ragged))
    whole = Problem(12, 1, 8, 12, operands=(BIAS,))
    assert whole.replace(border="wrap") != whole  # The bias tells how far around a key is.


def test_chunked_attention_is_cut(seed):
    tokens, chunk = random.randint(5, 40), random.randint(1, 12)
    problem = Problem(tokens, 1, 8, chunk, chunk, is_causal=True, border="cut")
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert torch.equal(neighborhood_mask(problem), (i // chunk == j // chunk) & (j <= i))


REFUSED = [
    (dict(border="cyclic"), "border must be one of 'shift', 'cut', .* got 'cyclic'; e.g. \\('cut',\\)"),
    (dict(border=("cut", "cut")), "or 1 of these .*got \\('cut', 'cut'\\)"),
    (dict(border=1), "border must be .* got 1"),
    (dict(border="cut:-1"), "border must be .* got 'cut:-1'"),
    (dict(border="cut:01"), "border must be .* got 'cut:01'"),
    (dict(border="cut:5"), "LEFT less than kernel_size=5 on axis 0, got 5; border='cut:4' would work"),
    (dict(border="cut:1", stride=2), "must have stride=1 and no causality on axis 0, got stride=2; border='cut' would"),
    (dict(border="cut:1", is_causal=True), "got is_causal=True; border='cut' would work"),
    (dict(border="cut:1", operands=(BIAS,)), "border must not be 'cut:LEFT' with relative_position_bias"),
    (dict(border="cut", stride=6), "stride must be at most kernel_size=5 on axis 0, got 6; stride=5 would work"),
    (dict(border="cut", dilation=13), "dilation must be at most the layout's 12 tokens .* got 13; dilation=12 would"),
    (dict(border="wrap", kernel_size=13), "kernel_size \\* dilation must be at most .* kernel_size=12 would work"),
    (dict(border="wrap", stride=5), "stride must divide the 12 tokens .* got 5; stride=4 would work"),
    (dict(border="wrap", kernel_size=2, dilation=5), "dilation must divide the layout's 12 tokens .* dilation=4 would"),
    (dict(border="wrap", is_causal=True), "border='wrap' must have is_causal=False on axis 0"),
    (dict(border="clamp", dilation=13), "dilation must be at most .* also with border='clamp', got 13; dilation=12"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        Problem(12, 1, 8, **{"kernel_size": 5, **changes})


def test_families_without_borders_say_so():
    problem = Problem((20, 28), 1, 64, (7, 9), dtype="bfloat16", border=("cut", "shift"))
    choice = choose(problem, Target.parse("cuda:sm_90a"), "forward")
    assert choice.config.family == "simt"
    assert "sm90 has no kernels with border='cut'." in choice.reason
    assert "mma has no kernels with border='cut'." in choice.reason


def test_no_family_with_a_border(monkeypatch):
    monkeypatch.setattr("na_compiler.schedules.choose.FAMILIES", ("sm90", "mma"))
    problem = Problem((20, 28), 1, 64, 7, dtype="bfloat16", border="wrap")
    with pytest.raises(NotImplementedError, match="mma has no kernels with border='wrap'"):
        choose(problem, Target.parse("cuda:sm_90a"), "forward")


def test_the_command_that_compiles_a_problem(capsys, monkeypatch):
    problem = Problem((12, 20), 1, 8, 5, border=("wrap", "cut:1"))
    words = command_for(problem, "forward", "llvm").split()
    monkeypatch.setattr("sys.argv", [*words[:-2], "--dry-run"])
    from na_compiler.cli import main

    main()
    assert "border=wrap,cut:1" in capsys.readouterr().out


# ---- Functions and layers ------------------------------------------------------------------------------------------

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


@pytest.mark.parametrize("problem", some(PROBLEMS, 3, "functions of borders"), ids=str)
def test_functions(problem, seed):
    """Outputs and gradients, by the short way and by torch's dispatcher."""
    example = draw(problem)
    p, others = problem, dict(example.others)
    attend = FUNCTIONS[p.rank]
    inputs = [tensor.clone().requires_grad_() for tensor in example.inputs]
    if BIAS in others:
        others[BIAS] = others[BIAS].clone().requires_grad_()
    wanted = [*inputs, *(others[name] for name in (BIAS,) if name in others)]
    for call in (attend, torch.compile(attend, backend="eager", fullgraph=True)):
        output, lse = call(
            *inputs[:3], p.kernel_size, p.stride, p.dilation, p.is_causal, None, *inputs[3:], border=p.border,
            return_lse=True, **others,
        )  # fmt: skip
        check_forward(example, output.detach(), lse.detach())
        grads = torch.autograd.grad((output, lse), wanted, (example.grad_output, torch.zeros_like(lse)))
        exact = [tensor.detach().double().requires_grad_() for tensor in wanted]
        named = dict(zip(others, [exact[-1], *list(others.values())[1:]], strict=True)) if BIAS in others else others
        expected, _ = neighborhood_attention(
            *exact[:3], p.kernel_size, p.stride, p.dilation, p.is_causal, None, *exact[3 : len(inputs)],
            border=p.border, **named,
        )  # fmt: skip
        for one, other in zip(grads, torch.autograd.grad(expected, exact, example.grad_output.double()), strict=True):
            assert (one.double() - other).norm() <= 1e-5 * other.norm()


def test_a_window_larger_than_the_layout_is_clamped_with_its_bias(seed):
    query, key, value = torch.randn(3, 1, 5, 9, 2, 8)
    bias = torch.randn(2, 13, 13, requires_grad=True)
    output = na2d(query, key, value, 7, border="clamp", relative_position_bias=bias)
    exact = bias.detach().double().requires_grad_()
    named = {"relative_position_bias": exact, "border": ("clamp", "shift")}
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), 7, **named)
    assert (output - expected).norm() < 1e-5 * expected.norm()
    grad = torch.randn_like(output)
    found, wanted = torch.autograd.grad(output, bias, grad)[0], torch.autograd.grad(expected, exact, grad.double())[0]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert not found[:, :2].any()
    plain = na2d(query, key, value, (5, 7), relative_position_bias=bias[:, 2:11])
    assert torch.equal(output, plain)
    with pytest.raises(ValueError, match=r"relative_position_bias must have shape .*\(2, 13, 13\), got \(2, 9, 13\)"):
        na2d(query, key, value, 7, border="clamp", relative_position_bias=bias[:, 2:11])


def test_layers(seed):
    layer = na_compiler.NeighborhoodAttention2D(16, 2, 7, border=("cut", "clamp"), rel_pos_bias=True)
    assert "border='cut,clamp'" in repr(layer)
    x = torch.randn(2, 9, 5, 16)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    named = {"relative_position_bias": layer.rpb, "border": ("cut", "clamp")}
    expected = layer.proj(na2d(query, key, value, 7, **named).flatten(-2))
    assert torch.equal(layer(x), expected)
    assert "border" not in repr(na_compiler.NeighborhoodAttention2D(16, 2, 7, border="shift"))
    plain = na_compiler.NeighborhoodAttention1D(16, 2, 7, border="wrap")
    assert torch.equal(torch.jit.script(plain)(x[:, :, 0]), plain(x[:, :, 0]))
    traced = torch.jit.trace(plain, x[:, :, 0])
    assert torch.equal(traced(x[:, :, 1]), plain(x[:, :, 1]))


def test_flops_count_what_is_seen():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = torch.randn(3, 1, 12, 2, 8)
    with FlopCounterMode(display=False) as counter:
        na1d(query, key, value, 5, border="cut")
    assert counter.get_total_flops() == Problem(12, 2, 8, 5, border="cut").flops() < Problem(12, 2, 8, 5).flops()


def test_programs_keep_the_border(tmp_path, seed):
    """torch.export, its file, the passes that look for attention, and the kernel that is bound."""
    from na_compiler import passes
    from na_compiler.passes.bind_torch import unbind

    layer = na_compiler.NeighborhoodAttention1D(16, 2, 5, border="cut")
    x = torch.randn(1, 12, 16)
    program = torch.export.export(layer, (x,))
    (site,) = passes.collect(program)
    assert site.problem == Problem(12, 2, 8, 5, border="cut")
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert torch.equal(loaded.module()(x), layer(x))
    passes.bind(loaded, "llvm")
    torch.testing.assert_close(loaded.module()(x), layer(x), rtol=0, atol=0)
    assert unbind(loaded) == 1
    assert torch.equal(loaded.module()(x), layer(x))


# ---- ONNX, and programs without Python -----------------------------------------------------------------------------

SMALL = [
    Problem(17, 2, 8, 5, 3, is_causal=True, border="cut"),
    Problem(12, 2, 8, 20, border="cut", operands=(BIAS, MASK)),
    Problem((8, 9), 2, 8, (3, 4), dilation=(1, 2), heads_kv=1, border=("wrap", "cut:1"), additional_kv=True),
]


@pytest.mark.parametrize("problem", some(SMALL, 2, "onnx borders"), ids=str)
def test_onnx(problem, tmp_path, seed):
    """Schema, evaluator, operator library; what has no kernel for a border is told so."""
    made = one_node(problem, dynamic_layout=False, body=None)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(made, strict_mode=True), full_check=True)
    assert na_compiler.onnx.problems(made) == {problem: 1}
    example = Forward(problem, batch=2)
    example.check(*ReferenceEvaluator(made, new_ops=na_compiler.onnx.reference_ops()).run(None, example.feeds))
    other = problem.replace(border="shift", kernel_size=3, stride=1)
    na_compiler.save_bundle(tmp_path / "bundle", [KernelSpec.make(one) for one in (problem, other)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    na_compiler.onnx.register(options, tmp_path / "bundle")
    example.check(*run_session(session(made, options), example.feeds))
    example = Forward(other, batch=2)
    example.check(*run_session(session(one_node(other, dynamic_layout=False, body=None), options), example.feeds))
    for border, message in (("wrapped", "border must be shift, cut"), ("cut:9", "LEFT less than kernel_size=3")):
        broken = one_node(other, dynamic_layout=False, body=None, attributes={"border": border})
        with pytest.raises(Exception, match=message):
            session(broken, options)


def test_onnx_refuses_what_is_no_border(seed):
    made = one_node(SMALL[0], dynamic_layout=False, body=None, attributes={"border": "cyclic"})
    with pytest.raises(onnx.shape_inference.InferenceError, match="border must be one of"):
        onnx.shape_inference.infer_shapes(made, strict_mode=True)
    made = one_node(SMALL[0], dynamic_layout=False, body=None, attributes={"border": 1})
    with pytest.raises(ValueError, match="border must be of type STRING, got INT"):
        na_compiler.onnx.problems(made)
    with pytest.raises(ValueError, match="bodies do not compute border: leave bodies out"):
        one_node(SMALL[0], dynamic_layout=False)


def test_exporting(seed):
    layer = na_compiler.NeighborhoodAttention1D(16, 2, 5, border="cut")
    x = torch.randn(1, 12, 16)
    tables = dict(custom_translation_table=na_compiler.onnx.translation_table())
    for options in (dict(dynamo=True, **tables), dict(dynamo=False)):
        path = io.BytesIO()
        torch.onnx.export(layer, (x,), path, **options)
        model = onnx.load_model_from_string(path.getvalue())
        assert na_compiler.onnx.problems(model) == {Problem(12, 2, 8, 5, border="cut"): 1}


def test_operators_without_python(tmp_path, seed):
    problems = [*SMALL, Problem(12, 2, 8, 4, border="wrap"), Problem(12, 2, 8, 5, is_causal=True)]
    na_compiler.save_bundle(tmp_path / "bundle", [KernelSpec.make(problem) for problem in problems])
    examples = [draw(problem, scale=0.3) for problem in problems]
    calls = []
    for p, example in zip(problems, examples, strict=True):
        later = [*example.additional, example.others.get(BIAS), example.others.get(MASK), ",".join(p.border)]
        calls.append((*native_call(p, example.inputs[:3]), *later))
    # What is the same problem is the same kernel: the last one's.
    (_, *last), rest = native_call(problems[-1], examples[-1].inputs), (None,) * 4
    calls += [("na1d", *last, *rest, "cut"), ("na1d", *last[:6], [0], 0.3, *rest, "cut:4")]
    refused = {
        "cyclic": "border must be shift, cut, cut:LEFT, wrap or clamp",
        "cut,cut": "for each of the 1 axes",
        "wrap": "border=wrap on axis 0 must have no causality",
        "cut:1": "LEFT less than kernel_size=5, stride=1 and no causality",
    }
    calls += [("na1d", *last, *rest, border) for border in refused]
    results = native_run(aot.build_library(), tmp_path / "bundle", calls, tmp_path)
    for example, result in zip([*examples, examples[-1], examples[-1]], results, strict=False):
        assert not isinstance(result, str), result
        check_forward(example, *result[:2])
    for message, found in zip(refused.values(), results[-4:], strict=True):
        assert message in found


def test_calls_that_differ_in_the_border_only(seed):
    tensors = torch.randn(3, 1, 12, 2, 8)
    for border in ("shift", "cut", "wrap"):
        expected, _ = neighborhood_attention(*tensors.double(), 5, border=border)
        assert (na1d(*tensors, 5, border=border) - expected).norm() < 1e-5 * expected.norm()
