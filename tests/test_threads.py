"""`na_compiler.runtime.threads`: on whose threads kernels run, from wherever they are called."""

import ctypes
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import WITHOUT_TORCH, run_python

import na_compiler
from na_compiler import Problem, na2d
from na_compiler.reference import neighborhood_attention
from na_compiler.runtime import threads

# Runs for some milliseconds; backward has as many tasks as forward, with one batch entry and few heads.
PROBLEM = Problem((48, 48), 2, 32, 9)
CORES = len(os.sched_getaffinity(0))


def ticks():
    """Processor time of each thread of this process, in hundredths of a second."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        times[task.name] = int(fields[11]) + int(fields[12])
    return times


def busy_threads(run, seconds=0.4):
    """Return how many threads worked while something ran again and again."""
    run()
    before, total = ticks(), 0
    while total < 100 * seconds:
        run()
        used = {name: value - before.get(name, 0) for name, value in ticks().items()}
        total = sum(used.values())
    return sum(value > 0.1 * total for value in used.values())


@pytest.fixture
def forward_and_backward(seed):
    tensors = [torch.randn(1, 48, 48, 2, 32, requires_grad=True) for _ in range(3)]
    output = na2d(*tensors, 9)
    grad = torch.randn_like(output)
    with torch.no_grad():
        yield (
            lambda: na2d(*tensors, 9),
            lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True),
        )


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
def test_torchs_number_of_threads_is_honoured(count, forward_and_backward, set_threads):
    set_threads(count)
    for run in forward_and_backward:
        assert busy_threads(run) == count


def test_the_same_bits_whatever_the_number_of_threads(forward_and_backward, set_threads):
    forward, backward = forward_and_backward
    results = []
    for count in (1, 2, 3, 7):
        set_threads(count)
        results.append([forward(), *backward()])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_a_process_without_torch_uses_all_its_cores():
    """TVM by itself would take half of them."""
    code = f"""
import os
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import na_compiler
kernel = na_compiler.compile(na_compiler.Problem((48, 48), 2, 32, 9))
query = np.random.default_rng(0).standard_normal((1, 48, 48, 2, 32), np.float32)
from pathlib import Path
"""
    source = Path(__file__).read_text()
    code += source[source.index("def ticks") : source.index("@pytest.fixture")]
    code += """
print(busy_threads(lambda: kernel(query, query, query)))
assert "torch" not in sys.modules
"""
    variables = dict(TVM_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert int(run_python(WITHOUT_TORCH + code, **variables)) == CORES
    assert int(run_python(WITHOUT_TORCH + code, **variables | {"OMP_NUM_THREADS": "1"})) == 1


class TestForkedChildren:
    def test_of_a_process_that_has_run_kernels(self, forward_and_backward):
        forward, _ = forward_and_backward
        expected = forward()
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)

        def work():
            theirs.send_bytes(forward().numpy().tobytes())

        child = context.Process(target=work)
        child.start()
        assert ours.poll(60), "the child hangs"
        received = np.frombuffer(ours.recv_bytes(), np.float32)
        child.join(60)
        assert child.exitcode == 0
        assert np.array_equal(received, expected.numpy().ravel()), "the same bits as in the parent"
        assert torch.equal(forward(), expected), "the parent goes on"

    def test_workers_of_a_data_loader(self, seed):
        pictures = torch.randn(6, 12, 13, 2, 8)

        class Smoothed(torch.utils.data.Dataset):
            def __len__(self):
                return len(pictures)

            def __getitem__(self, index):
                picture = pictures[index : index + 1]
                return index, na2d(picture, picture, picture, 5)[0]

        expected = na2d(pictures, pictures, pictures, 5)
        for workers in (0, 2):
            loader = torch.utils.data.DataLoader(
                Smoothed(), batch_size=2, num_workers=workers, timeout=60 if workers else 0,
                multiprocessing_context="fork" if workers else None,
            )  # fmt: skip
            seen = [index for indices, batch in loader for index in indices if torch.equal(batch, expected[indices])]
            assert sorted(map(int, seen)) == list(range(6))

    def test_of_a_process_without_torch(self):
        code = """
import os, signal
import numpy as np
import na_compiler
kernel = na_compiler.compile(na_compiler.Problem((48, 48), 2, 32, 9))
query = np.random.default_rng(0).standard_normal((1, 48, 48, 2, 32), np.float32)
output, _ = kernel(query, query, query)
if os.fork() == 0:
    signal.alarm(60)
    os._exit(0 if np.array_equal(kernel(query, query, query)[0], output) else 1)
print(os.wait()[1])
assert np.array_equal(kernel(query, query, query)[0], output)
"""
        assert run_python(WITHOUT_TORCH + code).strip() == "0"


def test_python_threads_at_once(seed):
    """Each with its own inputs, forward and backward."""
    inputs = [[torch.randn(1, 20, 21, 2, 16, requires_grad=True) for _ in range(3)] for _ in range(4)]
    references = []
    for tensors in inputs:
        output, _ = neighborhood_attention(*tensors, 5)
        references.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    na2d(*inputs[0], 5).sum().backward()
    results = [None] * len(inputs)
    start = threading.Barrier(len(inputs))

    def work(place):
        start.wait()
        for _ in range(10):
            output = na2d(*inputs[place], 5)
            results[place] = [output, *torch.autograd.grad(output.square().sum(), inputs[place])]

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for result, reference in zip(results, references, strict=True):
        for ours, theirs in zip(result, reference, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_inside_a_parallel_region_of_torch(seed):
    """Where torch's pool is taken already; calls from each of its threads."""
    kernel = na_compiler.compile(PROBLEM)
    query = torch.randn(4, 48, 48, 2, 32)
    expected = kernel(query, query, query)[0]
    outputs = [None] * 4
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

    @callback
    def attend(begin, end, context):
        for entry in range(begin, end):
            part = query[entry : entry + 1]
            outputs[entry] = kernel(part, part, part)[0]

    library.torch_parallel_for.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, callback, ctypes.c_void_p)
    assert library.torch_parallel_for(0, 4, 1, attend, None) == 0
    assert torch.equal(torch.cat(outputs), expected)


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path, caplog):
    """The launcher cannot be built then, and kernels run on TVM's threads."""
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    assert threads.launcher_library() is None
    assert "could not build the launcher" in caplog.text
