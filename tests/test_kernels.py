"""`na_compiler.compiler.kernels`: compiled kernels against the reference, over all that a problem can be."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from draws import some
from oracle import check_backward, check_forward, draw, guarded, guards_are_whole, poisoned, poisoned_parts
from processes import run_python

import na_compiler
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import make_kernel
from na_compiler.target import Target

PROBLEMS = [
    # Each axis of what a Problem can be, by itself and mixed.
    Problem(1, 1, 1, 1),
    Problem(33, 2, 16, 1),
    Problem(61, 2, 32, 9),
    Problem(50, 1, 8, 8, 3),
    Problem(64, 2, 16, 16, 16, is_causal=True),
    Problem(45, 2, 24, 12, 5, is_causal=True),
    Problem(40, 2, 64, 40),
    Problem(40, 2, 20, 40, is_causal=True),
    Problem(101, 2, 16, 6, 2, 7),
    Problem(700, 1, 32, 255),
    Problem(300, 2, 40, 130, 7, 2, is_causal=True),
    Problem((19, 23), 2, 32, (5, 8)),
    Problem((21, 18), 2, 16, (6, 7), (2, 3)),
    Problem((13, 17), 2, 16, (5, 6), (4, 2), is_causal=(False, True)),
    Problem((3, 40), 1, 16, (3, 7), dilation=(1, 5)),
    Problem((28, 28), 4, 32, 7, heads_kv=2),
    Problem((14, 14), 6, 32, 7, heads_kv=1, head_dim_v=48),
    Problem((20, 20), 2, 7, 5, head_dim_v=3),
    Problem((12, 12), 2, 96, 12),
    Problem((9, 10), 3, 72, (2, 10), (1, 4), (3, 1)),
    Problem((11, 9), 2, 128, 3, additional_kv=True),
    Problem((16, 16), 4, 32, 16, heads_kv=2, additional_kv=True),
    Problem((7, 9, 11), 2, 32, (3, 4, 5)),
    Problem((8, 8, 8), 2, 16, 3, (1, 2, 1), (2, 1, 2), (True, False, False)),
    Problem((5, 12, 6), 4, 17, (5, 2, 3), (1, 1, 2), (1, 5, 2), (False, True, True), 2, 9, additional_kv=True),
]
HALF = [
    Problem((14, 14), 2, 32, 7),
    Problem(90, 4, 24, 17, 2, 3, is_causal=True, heads_kv=2, head_dim_v=40),
    Problem((6, 7, 8), 2, 20, 3, additional_kv=True),
]


def run(problem, *, target="llvm", batch=1, additional=5, scale=None, directions=("forward", "backward")):
    """Compile a problem and compare it with the reference; all tensors lie between NaN, and outputs are NaN before."""
    lse_has_grad = bool(torch.randint(2, ()))
    example = draw(problem, batch=batch, additional=additional, scale=scale, lse_has_grad=lse_has_grad)
    scale = problem.head_dim**-0.5 if scale is None else scale
    inputs = [guarded(tensor) for tensor in example.inputs]
    others = {name: guarded(tensor) for name, tensor in example.others.items()}
    if "forward" in directions:
        empty = poisoned(
            torch.empty(example.output.shape, dtype=example.inputs[0].dtype), torch.empty(example.lse.shape)
        )
        output, lse = (guarded(tensor) for tensor in empty)
        kernel = na_compiler.compile(problem, target)
        kernel.function(*inputs, *others.values(), scale, output, lse)
        check_forward(example, output, lse)
        assert guards_are_whole(output, lse)
    if "backward" in directions:
        kernel = na_compiler.compile(problem, target, direction="backward")
        output = guarded(example.output.to(example.inputs[0].dtype))
        lse = guarded(example.lse.float())
        arguments = (*inputs[:3], output, lse, guarded(example.grad_output), guarded(example.grad_lse))
        check_backward(example, kernel(*arguments, *inputs[3:], scale=scale, **others))


@pytest.mark.parametrize("problem", some(PROBLEMS, 12, "float32"), ids=str)
def test_float32(problem, seed):
    run(problem, batch=2 if problem.tokens < 200 else 1)


@pytest.mark.parametrize(
    ("problem", "dtype"), some(itertools.product(HALF, ("bfloat16", "float16")), 3, "half precision"), ids=str
)
def test_half_precision(problem, dtype, seed):
    run(problem.replace(dtype=dtype))


@pytest.mark.parametrize(
    "problem",
    some(
        [
            Problem(6000, 1, 8, 5001),
            Problem(5200, 1, 8, 5200, is_causal=True),
            Problem((70, 75), 2, 8, (69, 70), (3, 1), heads_kv=1, additional_kv=True),
            Problem((17, 18, 19), 1, 4, (16, 17, 17), is_causal=(False, True, False)),
        ],
        2,
        "chunks",
    ),
    ids=str,
)
def test_windows_that_come_in_chunks(problem, seed):
    assert KernelSpec.make(problem).plan.is_chunked
    run(problem)


@pytest.mark.parametrize("head_dim", some([1, 2, 5, 8, 12, 31, 33, 48, 80], 4, "head_dim"))
def test_head_dims(head_dim, seed):
    run(Problem((6, 10), 1, head_dim, 3, head_dim_v=head_dim + 3), directions=("forward",))


@pytest.mark.parametrize("additional", some([0, 1, 64, 65, 200], 3, "additional"))
def test_numbers_of_additional_keys(additional, seed):
    run(Problem((6, 10), 2, 16, 3, additional_kv=True), additional=additional)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 3.0])
def test_scales(scale, seed):
    run(Problem((6, 10), 2, 16, 3), scale=scale)


_TARGETS = ("llvm:x86-64", "llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:x86-64-v4")
_FOR_TARGETS = (
    Problem((14, 15), 2, 32, 7),
    Problem((6, 7, 8), 4, 20, 3, 2, 2, (True, False, True), 2, 24, additional_kv=True, dtype="bfloat16"),
    Problem(80, 2, 24, 9, dtype="float16"),
)


@pytest.mark.parametrize(("problem", "target"), some(itertools.product(_FOR_TARGETS, _TARGETS), 6, "targets"), ids=str)
def test_targets(problem, target, seed):
    if not Target.parse(target).runs_here:
        pytest.skip(f"this machine cannot run {target}; it is compiled in test_builds_for_machines_that_this_is_not")
    run(problem, target=target)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("target", ["llvm:x86-64-v4", "llvm:aarch64"])
def test_builds_for_machines_that_this_is_not(target, direction):
    problem = Problem((14, 15), 2, 32, 7, additional_kv=True)
    kernel = na_compiler.compile(problem, target, direction)
    if Target.parse(target).runs_here:
        pytest.skip(f"this machine is {target}; it runs in test_targets")
    tensors = torch.zeros(3, 1, 14, 15, 2, 32)
    with pytest.raises(RuntimeError, match=f"compiled for {target}, which this machine cannot run"):
        kernel(*tensors, *tensors)


def test_emits_an_object_file_for_another_architecture(tmp_path):
    from na_compiler.compiler.build import build_library

    path = tmp_path / "kernel.o"
    build_library(KernelSpec.make(Problem((14, 15), 2, 32, 7), "llvm:aarch64"), path)
    header = path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[16:18], "little") == 1, "a relocatable object"
    assert int.from_bytes(header[18:20], "little") == 183, "for AArch64"


def strided(tensor, kind):
    """Return a tensor of the same values that lies differently in memory."""
    if kind == "heads_first":
        return tensor.transpose(1, -2).contiguous().transpose(1, -2)
    if kind == "misaligned":
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        moved = flat[1:].view(tensor.shape)
        moved.copy_(tensor)
        assert moved.data_ptr() % 16 == tensor.element_size()
        return moved
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["heads_first", "misaligned", "padded"])
def test_tensors_are_read_where_they_are(kind, dtype, seed):
    problem = Problem((9, 10), 2, 16, 3, additional_kv=True, dtype=dtype)
    example = draw(problem)
    inputs = [strided(tensor, kind) for tensor in example.inputs]
    output, lse = na_compiler.compile(problem)(*inputs)
    check_forward(example, output, lse)
    backward = na_compiler.compile(problem, direction="backward")
    grads = backward(*inputs[:3], output, lse, strided(example.grad_output, kind), example.grad_lse, *inputs[3:])
    check_backward(example, grads)


def test_views_of_a_fused_projection(seed):
    problem = Problem((9, 10), 2, 16, 3)
    fused = torch.randn(2, 9, 10, 3, 2, 16)
    views = fused.unbind(-3)
    assert not views[0].is_contiguous()
    kernel = na_compiler.compile(problem)
    copies = kernel(*(view.contiguous() for view in views))
    assert all(map(torch.equal, kernel(*views), copies))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [(40,), (9, 10), (4, 5, 6)], ids=str)
def test_gradients_of_views_of_a_fused_projection(layout, dtype, seed):
    """Are written where they lie, and nothing else is."""
    problem = Problem(layout, 2, 12, 3, dtype=dtype)
    example = draw(problem, batch=2)
    parts, rest = poisoned_parts(*example.inputs)
    kernel = na_compiler.compile(problem, direction="backward")
    output, lse = example.output.to(example.inputs[0].dtype).contiguous(), example.lse.float().contiguous()
    arguments = (*example.inputs, output, example.grad_output, lse, example.grad_lse, problem.head_dim**-0.5)
    kernel.function(*arguments, *parts, *kernel.spaces(example.inputs[0]))
    check_backward(example, parts)
    assert rest.isnan().all()


def test_numpy_arrays(seed):
    problem = Problem((9, 10), 2, 16, 3)
    example = draw(problem)
    output, lse = na_compiler.compile(problem)(*(tensor.numpy() for tensor in example.inputs))
    check_forward(example, torch.from_numpy(output), torch.from_numpy(lse))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_nothing_in_the_batch_and_no_additional_keys(make, batch):
    """Tensors without elements, whose strides torch and NumPy choose each in its way."""
    problem = Problem((6, 10), 2, 16, 3, additional_kv=True)
    dtype = (torch if make is torch.zeros else np).float32
    query, extra = make((batch, 6, 10, 2, 16), dtype=dtype), make((batch, 0, 2, 16), dtype=dtype)
    output, lse = na_compiler.compile(problem)(query, query, query, extra, extra)
    assert output.shape == (batch, 6, 10, 2, 16)
    assert lse.shape == (batch, 6, 10, 2)
    kernel = na_compiler.compile(problem, direction="backward")
    grads = kernel(query, query, query, output, lse, output, None, extra, extra)
    assert [grad.shape for grad in grads] == [query.shape] * 3 + [extra.shape] * 2


@pytest.mark.parametrize("problem", [Problem((12, 13), 2, 16, 5), Problem(5200, 1, 4, 4500)], ids=str)
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_a_key_outside_the_window_has_no_influence(problem, size, seed):
    """However large it is, as long as it is finite; its value and its gradient likewise."""
    query, key, value = torch.randn(3, 1, *problem.layout, problem.heads, problem.head_dim)
    forward = na_compiler.compile(problem)
    backward = na_compiler.compile(problem, direction="backward")
    grad = torch.zeros_like(query)
    first = (0,) * (problem.rank + 1)
    grad[first] = 1.0  # Only the first query has a gradient, and the last key is not in its window.
    output, lse = forward(query, key, value)
    grads = backward(query, key, value, output, lse, grad)
    last = (0, *(extent - 1 for extent in problem.layout))
    key[last], value[last] = size, -size
    again, again_lse = forward(query, key, value)
    assert torch.equal(again[first], output[first])
    assert torch.equal(again_lse[first], lse[first])
    repeated = backward(query, key, value, again, again_lse, grad)
    # The scores of queries that do see the key may overflow, as the exact ones would: then so do their gradients.
    assert torch.equal(repeated[0][first], grads[0][first])
    if size < 1e31:
        assert all(map(torch.equal, repeated, grads))


def test_extreme_scores(seed):
    """Scores far apart, and far from 0, come out as the softmax says."""
    problem = Problem((8, 8), 1, 4, 3)
    example = draw(problem, scale=3000.0)
    output, lse = na_compiler.compile(problem)(*example.inputs, scale=3000.0)
    check_forward(example, output, lse)


BITWISE = [
    Problem((23, 17), 2, 16, 5, additional_kv=True),
    Problem(4500, 1, 8, 4400),
    Problem((6, 7, 8), 2, 16, 3, dilation=2),
]


@pytest.mark.parametrize("problem", BITWISE, ids=str)
def test_the_same_bits_whatever_the_number_of_threads(problem, seed):
    example = draw(problem, tokens=torch.arange(8))
    forward = na_compiler.compile(problem)
    backward = na_compiler.compile(problem, direction="backward")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8, 1):
            torch.set_num_threads(count)
            output, lse = forward(*example.inputs)
            extra = example.inputs[3:]
            grads = backward(*example.inputs[:3], output, lse, example.grad_output, example.grad_lse, *extra)
            results.append([output, lse, *grads])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_backward_is_parallel_over_one_head():
    for problem in (Problem((56, 56), 1, 32, 7), Problem(4096, 1, 64, 255), Problem((32, 32), 1, 64, 32)):
        assert KernelSpec.make(problem, direction="backward").plan.tasks >= 8


def test_bad_arguments_are_refused():
    kernel = na_compiler.compile(Problem((6, 10), 2, 16, 3))
    good = torch.zeros(1, 6, 10, 2, 16)
    with pytest.raises(ValueError, match=r"key must have shape \(1, 6, 10, 2, 16\) .* got \(1, 6, 9, 2, 16\)"):
        kernel(good, good[:, :, 1:], good)
    with pytest.raises(ValueError, match=r"value must be float32 .*, got float64"):
        kernel(good, good, good.double())
    with pytest.raises(ValueError, match="takes no additional_keys and additional_values"):
        kernel(good, good, good, good, good)
    with pytest.raises(ValueError, match="additional_keys and additional_values come together"):
        kernel(good, good, good, good[:, 0])
    kernel = na_compiler.compile(Problem((6, 10), 2, 16, 3, additional_kv=True))
    with pytest.raises(ValueError, match="needs additional_keys and additional_values"):
        kernel(good, good, good)
    with pytest.raises(ValueError, match="direction must be 'forward', 'backward' or 'tangent', got 'up'"):
        na_compiler.compile(Problem(8, 1, 8, 3), direction="up")


def test_the_compiled_function_checks_its_arguments():
    """Also the raw function of a kernel never reads or writes what does not fit."""
    function = na_compiler.compile(Problem((6, 10), 2, 16, 3)).function
    query, lse = torch.zeros(1, 6, 10, 2, 16), torch.zeros(1, 6, 10, 2)
    wrong = {
        "shape": (query[:, :5], query, query, 1.0, query, lse),
        "last stride": (query.transpose(-1, -2).contiguous().transpose(-1, -2), query, query, 1.0, query, lse),
        "dtype": (query.half(), query, query, 1.0, query, lse),
        "output's strides": (query, query, query, 1.0, query.transpose(1, 2).contiguous().transpose(1, 2), lse),
        "batch": (query, query.repeat(2, 1, 1, 1, 1), query, 1.0, query, lse),
    }
    for name, arguments in wrong.items():
        try:
            function(*arguments)
        except (ValueError, TypeError, RuntimeError):
            continue
        pytest.fail(f"a wrong {name} was accepted")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_tensors_that_a_gpu_cannot_read_are_refused(direction):
    """Before the function is called: a GPU would fault. Here the function is one that says that it was reached."""
    spec = KernelSpec.make(Problem((2, 4, 5), 3, 8, 2, additional_kv=True, dtype="float16"), direction=direction)
    info, reached = dataclasses.replace(spec.info, alignment=16, adjacent_heads=True), []
    kernel = make_kernel(info, lambda *arguments: reached.append(arguments))
    token, extra = torch.zeros(1, 2, 4, 5, 3, 8).half(), torch.zeros(1, 6, 3, 8).half()
    arguments = [token, token, token, extra, extra]
    names = {"query": 0, "key": 1, "value": 2, "additional_keys": 3, "additional_values": 4}
    if direction == "backward":
        arguments += [token, token, token[..., 0]]  # Output, which has to be contiguous anyway; its gradient; lse.
        names["grad_output"] = 6
    arguments += [token] * (len(info.arguments) - len(arguments))  # Gradients, which may have strides, and the scale.
    kernel.function(*arguments)
    assert len(reached) == 1
    bad = {
        "multiple of 16 bytes": torch.zeros(token.numel() + 1).half()[1:].view(token.shape),
        "multiples of 8": torch.zeros(*token.shape[:-1], 9).half()[..., :8],
        "heads that lie 8 elements apart": torch.zeros(*token.shape[:-1], 16).half()[..., :8],
    }
    for name, place in names.items():
        for said, tensor in bad.items():
            is_extra = name.startswith("additional")
            given = list(arguments)
            given[place] = tensor[:, 1, 1] if is_extra else tensor
            if is_extra and "heads" in said:  # These may be anywhere.
                kernel.function(*given)
                continue
            with pytest.raises(ValueError, match=f"^{name} must .*{said}"):
                kernel.function(*given)
    assert len(reached) == 3


@pytest.mark.full
def test_many_random_problems(seed):
    import random

    for _ in range(60):
        rank = random.randint(1, 3)
        layout = [random.randint(1, {1: 300, 2: 40, 3: 14}[rank]) for _ in range(rank)]
        dilation = [random.choice([1, 1, 2, 3, extent]) for extent in layout]
        dilation = [min(d, extent) for d, extent in zip(dilation, layout, strict=True)]
        kernel = [random.randint(1, extent // d) for extent, d in zip(layout, dilation, strict=True)]
        stride = [random.choice([1, random.randint(1, k)]) for k in kernel]
        causal = [random.random() < 0.3 for _ in layout]
        heads_kv = random.choice([1, 2])
        run(
            Problem(
                layout, heads_kv * random.choice([1, 3]), random.randint(1, 70), kernel, stride, dilation, causal,
                heads_kv, random.randint(1, 70), random.random() < 0.3,
                random.choice(["float32", "bfloat16", "float16"]),
            ),
            additional=random.randint(0, 100),
        )  # fmt: skip


def test_ids_are_unique():
    everything = list(itertools.chain(PROBLEMS, HALF, BITWISE))
    assert len(set(map(str, everything))) == len(everything)


SLOW = """
    import sys, time
    from na_compiler import Problem, compile
    from na_compiler.compiler import build
    quick = build.build_library
    def slowly(*arguments):
        time.sleep(float(sys.argv[1]))
        return quick(*arguments)
    build.build_library = slowly
    exec(sys.argv[2])
    sys.stderr = sys.stdout
    from na_compiler.compiler import kernels
    kernels._PATIENCE = 0.3 if sys.argv[1] == "1" else 100
    compile(Problem((5, 6), 1, 8, 3))
"""


@pytest.mark.parametrize(
    ("seconds", "setup", "lines"),
    [
        ("1", "", 1),
        ("0", "", 0),
        ("1", "import logging; logging.basicConfig()", 0),
        ("1", "import logging; logging.getLogger('na_compiler').setLevel('WARNING')", 0),
    ],
)
def test_a_long_compilation_says_so_in_a_line(seconds, setup, lines, tmp_path):
    said = run_python(SLOW, seconds, setup, NA_COMPILER_CACHE=tmp_path)
    assert said.count("na_compiler: compiling na2d layout=5x6 heads=1 head_dim=8") == lines
    assert len(said.splitlines()) == lines
