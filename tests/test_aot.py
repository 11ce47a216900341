"""`na_compiler.aot`: the library of torch operators, in processes that do not import this package."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from border_problems import BIAS, MASK
from border_problems import SMALL as BORDERS
from oracle import check_forward, draw
from place_draws import draw_layout
from processes import run_python

import na_compiler
from na_compiler import aot
from na_compiler.aot.build import operator_library
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import MANIFEST
from na_compiler.runtime.host import HostLibrary
from na_compiler.runtime.manifest import digest_of

PROBLEMS = [
    Problem(40, 2, 8, 7, 2, 3, is_causal=True, dtype="float16"),
    Problem((8, 9), 4, 12, (3, 4), (2, 1), (1, 2), (False, True), heads_kv=2, head_dim_v=20, additional_kv=True),
    Problem((4, 5, 6), 2, 8, 3, dtype="bfloat16"),
]
# Reads calls, and writes for each output and lse, how often tensors were copied, or what was said.
RUN = """
import ctypes, sys, torch
library, bundle, calls, results = sys.argv[1:]
torch.ops.load_library(library)
if bundle and ctypes.CDLL(library).na_compiler_load_bundle(bundle.encode()):
    sys.exit("no bundle")
made = []
for name, *arguments in torch.load(calls):
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output, lse = getattr(torch.ops.na_compiler, name)(*arguments)
        made.append((output, lse, sum(event.name == "aten::copy_" for event in profile.events())))
    except RuntimeError as error:
        made.append(str(error))
assert not any(name.startswith(("na_compiler", "tvm")) for name in sys.modules)
torch.save(made, results)
"""


@pytest.fixture(scope="module")
def library():
    return aot.build_library()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot") / "bundle"
    na_compiler.save_bundle(folder, [na_compiler.KernelSpec.make(problem) for problem in PROBLEMS])
    return folder


def call(problem, inputs, scale=0.3):
    """Return what `RUN` reads."""
    parameters = (problem.kernel_size, problem.stride, problem.dilation)
    return (f"na{problem.rank}d", *inputs[:3], *map(list, parameters), list(problem.is_causal), scale, *inputs[3:])


def run(library, bundle, calls, folder):
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", RUN, library, bundle, folder / "calls.pt", folder / "results.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def padded(tensor):
    """Rows that are longer than they are: strides and the places of heads change."""
    return torch.cat([tensor, torch.full_like(tensor, float("nan"))], -1)[..., : tensor.shape[-1]]


def test_results(library, bundle, tmp_path, seed):
    examples = [draw(problem, batch=2, scale=0.3) for problem in PROBLEMS]
    moves = (lambda tensor: tensor, padded, lambda tensor: padded(tensor.movedim(1, -2)).movedim(-2, 1))
    calls = [call(e.problem, [move(t) for t in e.inputs]) for e, move in itertools.product(examples, moves)]
    results = run(library, bundle, calls, tmp_path)
    for (example, _), (output, lse, copies) in zip(itertools.product(examples, moves), results, strict=True):
        check_forward(example, output, lse)
        assert copies == 0


def test_other_operands(library, tmp_path, seed):
    """By their places; one that is not contiguous is copied."""
    problem = Problem((6, 9), 2, 8, 3, operands=("relative_position_bias", "key_mask"))
    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem)])
    example = draw(problem, batch=2, scale=0.3)
    bias, mask = example.others.values()
    columns = bias.transpose(-1, -2).contiguous().transpose(-1, -2)
    calls = [(*call(problem, example.inputs), None, None, one, mask) for one in (bias, columns)]
    for copies, (output, lse, copied) in enumerate(run(library, tmp_path / "bundle", calls, tmp_path)):
        check_forward(example, output, lse)
        assert copied == copies


def test_borders(library, tmp_path, seed):
    """By a word; what is the same problem is the same kernel, and what is no border is told so."""
    problems = [*BORDERS, Problem(12, 2, 8, 4, border="wrap"), Problem(12, 2, 8, 5, is_causal=True)]
    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem) for problem in problems])
    examples = [draw(problem, scale=0.3) for problem in problems]
    calls = []
    for p, example in zip(problems, examples, strict=True):
        later = [*example.additional, example.others.get(BIAS), example.others.get(MASK), ",".join(p.border)]
        calls.append((*call(p, example.inputs[:3]), *later))
    # What is the same problem is the same kernel: the last one's.
    (_, *last), rest = call(problems[-1], examples[-1].inputs), (None,) * 4
    calls += [("na1d", *last, *rest, "cut"), ("na1d", *last[:6], [0], 0.3, *rest, "cut:4")]
    refused = {
        "cyclic": "border must be shift, cut, cut:LEFT, wrap or clamp",
        "cut,cut": "for each of the 1 axes",
        "wrap": "border=wrap on axis 0 must have no causality",
        "cut:1": "LEFT less than kernel_size=5, stride=1 and no causality",
    }
    calls += [("na1d", *last, *rest, border) for border in refused]
    results = run(library, tmp_path / "bundle", calls, tmp_path)
    for example, result in zip([*examples, examples[-1], examples[-1]], results, strict=False):
        assert not isinstance(result, str), result
        check_forward(example, *result[:2])
    for message, found in zip(refused.values(), results[-4:], strict=True):
        assert message in found


def test_layouts_that_no_bundle_lists(library, tmp_path, seed):
    """By a kernel for an open layout; what is smaller than a window is refused."""
    rules = [problem.opened() for problem in PROBLEMS[:2]]
    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem) for problem in rules])
    examples = [draw(draw_layout(problem), batch=2, scale=0.3) for problem in PROBLEMS[:2] for _ in range(4)]
    small = draw(PROBLEMS[0], scale=0.3)
    calls = [call(example.problem, example.inputs) for example in (*examples, small)]
    calls[-1] = (calls[-1][0], *(tensor[:, :20] for tensor in small.inputs[:3]), *calls[-1][4:])
    *results, refused = run(library, tmp_path / "bundle", calls, tmp_path)
    for example, (output, lse, copies) in zip(examples, results, strict=True):
        check_forward(example, output, lse)
        assert copies == 0
    assert "kernel_size * dilation must be at most the layout's 20 tokens on axis 0" in refused


def test_tensors_that_a_kernel_cannot_read_are_copied(library, bundle, tmp_path, seed):
    """Those of a GPU cannot read all; a manifest that says so is believed of any."""
    problem = PROBLEMS[2]
    na_compiler.save_bundle(tmp_path / "bundle", [na_compiler.KernelSpec.make(problem)])
    path = tmp_path / "bundle" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["kernels"][0] |= {"alignment": 16, "adjacent_heads": True}
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    example = draw(problem, scale=0.3)
    query, key, value = example.inputs

    def misaligned(tensor):
        # What is saved is the whole storage, and so lies in it as here when it is loaded.
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    columns = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    wanted = {
        0: (query, key, value),
        1: (query, key, padded(value)),
        2: (misaligned(query), misaligned(key), value),
        3: (columns, padded(key), misaligned(value)),
    }
    results = run(library, tmp_path / "bundle", [call(problem, inputs) for inputs in wanted.values()], tmp_path)
    for count, (output, lse, copies) in zip(wanted, results, strict=True):
        check_forward(example, output, lse)
        assert copies == count
    # Where no kernel asks for it, only rows have to lie together.
    *_, (output, lse, copies) = run(library, bundle, [call(problem, inputs) for inputs in wanted.values()], tmp_path)
    check_forward(example, output, lse)
    assert copies == 1


def test_an_empty_batch_and_no_additional_keys(library, bundle, tmp_path):
    problem = PROBLEMS[0]
    empty = torch.zeros(0, *problem.layout, problem.heads, problem.head_dim).half()
    ((output, lse, _),) = run(library, bundle, [call(problem, [empty] * 3)], tmp_path)
    assert output.shape == empty.shape
    assert lse.shape == empty.shape[:-1]


def test_what_is_wrong_is_said(library, bundle, tmp_path):
    query = torch.zeros(1, 40, 2, 8).half()
    problem, inputs = PROBLEMS[0], [query] * 3
    good = call(problem, inputs)
    wrong = {
        "there is no kernel for na1d layout=40 heads=2 head_dim=8 kernel_size=5": call(
            problem.replace(kernel_size=5), inputs
        ),
        "query must have 5 dimensions, got 4": ("na2d", *good[1:]),
        "kernel_size must have 1 values": (*good[:4], [7, 7], *good[5:]),
        "additional_keys and additional_values come together": (*good, query, None),
        "additional_values must have 4 dimensions, got 0": (*good, query, query.sum()),
        "tensors must be float32, bfloat16 or float16": call(problem, [query.double()] * 3),
        r"kernel_size \* dilation must be at most the layout's 40 tokens": (*good[:4], [20], *good[5:]),
        r"key must have shape \[1, 40, 2, 8\], got \[1, 39, 2, 8\]": call(problem, [query, query[:, 1:], query]),
    }
    for said, result in zip(wrong, run(library, bundle, list(wrong.values()), tmp_path), strict=True):
        assert isinstance(result, str), said
        assert re.search(said, result), result
    (result,) = run(library, "", [good], tmp_path)
    assert "no bundle is loaded; call na_compiler_load_bundle, or set NA_COMPILER_BUNDLE" in result


def test_beside_the_package(library, bundle):
    before = """
        import ctypes, sys, torch, na_compiler
        torch.ops.load_library(sys.argv[1])
        query = torch.randn(1, 9, 2, 8, requires_grad=True)
        na_compiler.na1d(query, query, query, 3).sum().backward()  # The library has no gradients.
        loaded = ctypes.CDLL(sys.argv[1])
        loaded.na_compiler_last_error.restype = ctypes.c_char_p
        result = loaded.na_compiler_load_bundle(sys.argv[2].encode())
        said = b"operators of this process are not this library's" in loaded.na_compiler_last_error()
        print(result, said, query.grad.isfinite().all().item())
    """
    assert run_python(before, str(library), str(bundle)) == "-1 True True\n"
    after = """
        import sys, torch
        torch.ops.load_library(sys.argv[1])
        said = []
        for _ in range(2):
            try:
                import na_compiler
            except ImportError as error:
                said.append(error)
        print(*said, sep="\\n")
    """
    assert run_python(after, str(library)).count("import torch and na_compiler before it is loaded") == 2


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has the library that the stand-in is for")
def test_the_stream_of_a_torch_whose_symbols_are_not_global(tmp_path):
    """As in a Python process: a stand-in for torch's CUDA library, and the library with a function that asks."""
    cuda, asks = tmp_path / "cuda.c", tmp_path / "asks.cc"
    cuda.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) {"
                    " *stream = (void*)(long)(40 + device); return 0; }")  # fmt: skip
    asks.write_text(f'#include "{aot.header_folder() / "torch_library.cc"}"\n'
                    'extern "C" NA_EXPORT void* ask(int device) { return na::current_stream(device); }')  # fmt: skip
    options = ("-Wl,-soname,libtorch_cuda.so",)
    built = HostLibrary("libtorch_cuda.so", "a stand-in", (cuda,), options).build(tmp_path)
    code = """
        import ctypes, sys, torch
        asks = ctypes.CDLL(sys.argv[2])
        asks.ask.restype = ctypes.c_void_p
        ctypes.CDLL(sys.argv[1], ctypes.RTLD_LOCAL)
        print(asks.ask(2))
    """
    library = operator_library()
    library = dataclasses.replace(library, sources=(asks, *library.sources[1:]), parts=())
    assert run_python(code, str(built), str(library.build(tmp_path))) == "42\n"


def test_a_missing_bundle_is_said(library, tmp_path):
    code = (
        "import ctypes, sys, torch; library = ctypes.CDLL(sys.argv[1]); "
        "library.na_compiler_last_error.restype = ctypes.c_char_p; "
        "print(library.na_compiler_load_bundle(b'/nowhere'), library.na_compiler_last_error().decode())"
    )
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=True)
    assert done.stdout == "-1 there is no bundle in /nowhere: no such folder\n"
