"""The operator library in ONNX Runtime: right results, on the session's threads, from bundles, and how it is built."""

import concurrent.futures
import ctypes
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import PARTS, PROBLEMS, Forward, cases, feeds, one_node, run, session
from onnx_sessions import SMALL, make_bundle, misaligned, open_session, options_for
from processes import run_python

import na_compiler
from na_compiler.cli import main
from na_compiler.onnx import build_library, register
from na_compiler.onnx.ort import build
from na_compiler.problem import Problem
from na_compiler.runtime import native
from na_compiler.runtime.bundle import MANIFEST
from na_compiler.runtime.host import cxx_compiler

HALF = [p.replace(dtype=dtype) for p in (PROBLEMS[5], PROBLEMS[6]) for dtype in ("float16", "bfloat16")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("ort") / "bundle", [*PROBLEMS, *HALF, SMALL])


@pytest.mark.parametrize("dynamic_layout", [False, True])
@pytest.mark.parametrize("body", [None, "generic"])
@pytest.mark.parametrize("problem", [*PROBLEMS, *HALF], ids=str)
def test_results(problem, body, dynamic_layout, bundle, seed):
    example = Forward(problem, batch=2)
    made = open_session(one_node(problem, body=body, dynamic_layout=dynamic_layout), bundle)
    example.check(*run(made, feeds(example.inputs)))
    other = Forward(problem, batch=3, additional=9)
    other.check(*run(made, feeds(other.inputs)))


def run_cases(problems, folder):
    bundle = make_bundle(folder, problems)
    for problem in problems:
        example = Forward(problem)
        made = open_session(one_node(problem, body=None, dynamic_layout=False), bundle)
        example.check(*run(made, feeds(example.inputs)))


def test_case_file(seed, tmp_path):
    run_cases(cases(), tmp_path / "bundle")


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_whole_case_file(part, seed, tmp_path):
    run_cases(cases(part), tmp_path / "bundle")


@pytest.mark.parametrize("scale", [None, 0.0, -0.3, 3.0])
def test_scales(scale, bundle, seed):
    example = Forward(SMALL, scale=scale)
    example.check(*run(open_session(one_node(SMALL, scale=scale, body=None), bundle), feeds(example.inputs)))


def test_the_kernel_runs_and_not_the_body(bundle, tmp_path, seed):
    options = options_for(bundle)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session(one_node(SMALL), options)
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["NA2D"]


def test_a_node_without_lse(bundle, seed):
    example = Forward(SMALL)
    for body in (None, "generic"):
        model = one_node(SMALL, lse=False, body=body)
        (output,) = run(open_session(model, bundle), feeds(example.inputs))
        example.check(output, example.lse.float().numpy())


def test_shapes_are_inferred(bundle):
    model = one_node(SMALL, dynamic_layout=False, body=None)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    output, _ = open_session(model, bundle).get_outputs()
    assert output.shape == ["B", 8, 9, 4, 8]
    assert output.type == "tensor(float)"


def test_an_empty_batch_and_no_additional_keys(bundle, seed):
    made = open_session(one_node(SMALL), bundle)
    empty = {name: np.zeros((0, *array.shape[1:]), np.float32) for name, array in feeds(Forward(SMALL).inputs).items()}
    output, lse = made.run(None, empty)
    assert output.shape == (0, 8, 9, 4, 8)
    assert lse.shape == (0, 8, 9, 4)
    # SMALL is in the bundle without additional keys: none of them is the same problem.
    example = Forward(SMALL.replace(additional_kv=True), additional=0)
    example.check(*run(open_session(one_node(example.problem, body=None), bundle), feeds(example.inputs)))


def test_inputs_may_lie_anywhere(bundle, seed):
    example = Forward(SMALL)
    inputs = {name: misaligned(array) for name, array in feeds(example.inputs).items()}
    example.check(*open_session(one_node(SMALL), bundle).run(None, inputs))


def tasks():
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_kernels_run_on_the_session_s_threads(tmp_path, seed):
    problem = Problem((32, 32), 4, 32, 7)  # Large enough for all threads to take part.
    bundle = make_bundle(tmp_path / "bundle", [problem])
    example = Forward(problem)
    used = {}
    for threads in (1, 3):
        before = tasks()
        made = open_session(one_node(problem), bundle, threads)
        own = tasks() - before
        assert len(own) == threads - 1
        at = cpu_time(own)
        for _ in range(100):
            output, lse = made.run(None, feeds(example.inputs))
        assert tasks() - before == own, "a kernel started threads of its own"
        example.check(output, lse)
        used[threads] = cpu_time(own) - at
    assert used[3] > 0, "the session's threads took no part"


def cpu_time(threads):
    """Return the clock ticks that threads of this process have run."""
    fields = [Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split() for thread in threads]
    return sum(int(field[11]) + int(field[12]) for field in fields)


def test_sessions_and_threads_at_once(bundle, tmp_path, seed):
    other = make_bundle(tmp_path / "other", [SMALL])
    example = Forward(SMALL)
    sessions = [open_session(one_node(SMALL), folder, threads) for folder in (bundle, other) for threads in (1, 2)]
    kernel = na_compiler.compile(SMALL)

    def work(i):
        if i % 5 == 4:  # torch, on the same libraries.
            output, lse = kernel(*example.inputs)
            example.check(output.numpy(), lse.numpy())
        else:
            example.check(*sessions[i % 4].run(None, feeds(example.inputs)))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(300)))


def test_torch_and_a_session_share_a_library(bundle, seed):
    example = Forward(SMALL)
    made = open_session(one_node(SMALL), bundle)
    kernel = na_compiler.load_bundle(bundle).find(SMALL)
    for _ in range(3):
        example.check(*made.run(None, feeds(example.inputs)))
        output, lse = kernel(*example.inputs)
        example.check(output.numpy(), lse.numpy())
    worker = threading.Thread(target=lambda: kernel(*example.inputs))
    worker.start()
    worker.join()


def test_sessions_come_and_go(bundle, seed):
    example = Forward(SMALL)
    for _ in range(20):
        example.check(*open_session(one_node(SMALL), bundle).run(None, feeds(example.inputs)))


# ---- Memory

KEPT = """
import resource, sys
import numpy as np, onnxruntime
library, bundle, model, runs = sys.argv[1:]

def options():
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = 1
    made.log_severity_level = 4
    made.add_session_config_entry("na_compiler.bundle", bundle)
    made.register_custom_ops_library(library)
    return made

def used():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

session = onnxruntime.InferenceSession(model, options())
inputs = [{name: np.ones((1, tokens, 1, 8), "float32") for name in ("query", "key", "value")} for tokens in (6, 7, 8)]
grown = []
for step in (lambda i: session.run(None, inputs[i % 3]), lambda i: options()):
    for i in range(int(runs) // 4):
        step(i)
    before = used()
    for i in range(int(runs)):
        step(i)
    grown.append(used() - before)
    runs = int(runs) // 40
print(*grown)
"""


def test_nothing_grows_with_runs_and_sessions(tmp_path):
    """20,000 runs that take turns at three resolutions, and 500 sessions' options."""
    problems = [Problem(tokens, 1, 8, 3) for tokens in (6, 7, 8)]
    bundle = make_bundle(tmp_path / "bundle", problems)
    onnx.save(one_node(problems[0], body=None), tmp_path / "model.onnx")
    files = (build_library(), bundle, tmp_path / "model.onnx")
    said = run_python(KEPT, *map(str, files), "20000", MALLOC_ARENA_MAX="1")
    runs, options = map(int, said.split())
    assert runs < 500, "KiB, of 20,000 runs"
    assert options < 500, "KiB, of 500 sessions' options"


# ---- Bundles


def test_the_best_kernel_for_the_cpu_is_taken(tmp_path, seed):
    targets = ("llvm:x86-64-v3", "llvm:x86-64", "llvm")
    na_compiler.save_bundle(tmp_path / "b", [na_compiler.KernelSpec.make(SMALL, target) for target in targets])
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    best = na_compiler.KernelSpec.make(SMALL).target.name
    made = open_session(one_node(SMALL), tmp_path / "b")
    for kernel in manifest["kernels"]:
        if kernel["target"] != best:
            (tmp_path / "b" / kernel["library"]).unlink()
    example = Forward(SMALL)
    example.check(*run(made, feeds(example.inputs)))


def test_bundles_named_by_the_environment(bundle, tmp_path, monkeypatch, seed):
    other = make_bundle(tmp_path / "other", [PROBLEMS[1]])
    monkeypatch.setenv("NA_COMPILER_BUNDLE", f"{other}:{bundle}")
    options = onnxruntime.SessionOptions()
    register(options)
    example = Forward(SMALL)
    example.check(*run(session(one_node(SMALL), options), feeds(example.inputs)))


# ---- Building


def test_the_library_is_small_and_needs_no_header(tmp_path):
    library = build_library(tmp_path / "deployment")
    assert library == tmp_path / "deployment" / build.LIBRARY
    assert library.stat().st_size < 165_000
    assert build_library() == build_library()
    sources = "".join(path.read_text() for path in native.sources(build.source_folder()))
    assert sources.count("OrtStatus* RegisterCustomOps(") == 1
    assert "#include <onnxruntime" not in sources


def test_the_command_builds_it(tmp_path, capsys):
    assert main(["ort-library", "-o", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / build.LIBRARY).is_file()
    assert build.LIBRARY in capsys.readouterr().out


def test_a_library_built_elsewhere(bundle, tmp_path, seed, monkeypatch):
    library = build_library(tmp_path)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    options = onnxruntime.SessionOptions()
    register(options, bundle, library=library)
    example = Forward(SMALL)
    example.check(*run(session(one_node(SMALL), options), feeds(example.inputs)))
    with pytest.raises(FileNotFoundError, match=r"no operator library at .*na-compile ort-library"):
        register(options, bundle, library=tmp_path / "other.so")


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(RuntimeError, match=r"needs a C.. compiler, and none was found; install one, set CXX"):
        build_library(tmp_path)


HEADERS = [
    Path(folder) / "onnxruntime_c_api.h"
    for folder in (
        *os.environ.get("NA_COMPILER_ORT_INCLUDE", "").split(":"),
        "/usr/include/onnxruntime",
        "/usr/local/include/onnxruntime",
        "/usr/local/include",
        "/usr/include/onnxruntime/core/session",
    )
    if folder
]
CHECK = """
#include <cstddef>
#include <type_traits>
#include "onnxruntime_c_api.h"
#include "ort_slots.h"
template <typename T> struct Plain;
template <typename R, typename... A> struct Plain<R (*)(A...)> { using type = R (*)(A...); };
template <typename R, typename... A> struct Plain<R (*)(A...) noexcept> { using type = R (*)(A...); };
#define SLOT(number, name, result, ...) \\
  static_assert(offsetof(OrtApi, name) == number * sizeof(void*), #name); \\
  static_assert(std::is_same_v<Plain<decltype(OrtApi::name)>::type, result (*)(__VA_ARGS__)>, #name);
NA_ORT_SLOTS(SLOT)
#define MEMBER(number, name, result, ...) \\
  static_assert(offsetof(OrtCustomOp, name) == number * sizeof(void*), #name); \\
  static_assert(std::is_same_v<Plain<decltype(OrtCustomOp::name)>::type, result (*)(__VA_ARGS__)>, #name);
NA_ORT_CUSTOM_OP(MEMBER)
"""


def test_the_slots_are_those_of_the_header(tmp_path):
    header = next((path for path in HEADERS if path.is_file()), None)
    if header is None:
        pytest.skip("no onnxruntime_c_api.h is installed here; NA_COMPILER_ORT_INCLUDE names the folder of one")
    (tmp_path / "check.cc").write_text(CHECK)
    command = [*cxx_compiler(), "-std=c++17", "-fsyntax-only", "-w", f"-I{header.parent}"]
    result = subprocess.run(
        [*command, f"-I{build.source_folder()}", tmp_path / "check.cc"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[:2000]


def test_an_onnx_runtime_that_is_too_old_is_refused():
    library = ctypes.CDLL(str(build_library()))
    said = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda _, message: said.append(message.decode()) or 0x1234
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version < 20 else None
    )
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.cast(version_text, ctypes.c_void_p).value)
    version_text = ctypes.create_string_buffer(b"1.19.2")
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, base) == 0x1234
    assert said == ["na_compiler: needs ONNX Runtime 1.21 or later, this is 1.19.2"]
