"""torch and this package are imported in either order, and nothing of torch is other than it was."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import na_compiler

LOADS = """
import sys
for name in sys.argv[2:]:
    __import__(name)
import torch
program = torch.export.load(sys.argv[1])
assert any("na_compiler" in str(node.target) for node in program.graph.nodes)
print(*program.module()(torch.ones(1, 6, 7, 16)).shape)
"""


def python(code, *arguments):
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "layer.pt2"
    layer = na_compiler.NeighborhoodAttention2D(16, 2, 3).eval()
    torch.export.save(torch.export.export(layer, (torch.ones(1, 6, 7, 16),)), path)
    return path


@pytest.mark.parametrize("order", [("na_compiler", "torch"), ("torch", "na_compiler"), ("na_compiler.problem",)])
def test_a_program_is_loaded_in_either_order(program, order):
    assert python(LOADS, program, *order).stdout == "1 6 7 16\n"


def test_torch_is_as_it_was():
    """Looking for torch does not import it, and importing it leaves nothing of ours in its place.

    Nor in that of its tensors of several devices, which are waited for until somebody imports them.
    """
    code = """
import importlib.util, inspect, sys
before = list(sys.meta_path)
import na_compiler
spec = importlib.util.find_spec("torch")
assert spec.loader.get_filename("torch") == spec.origin
assert "torch" not in sys.modules
import torch
assert type(torch.__loader__) is type(torch.__spec__.loader) is importlib.machinery.SourceFileLoader
assert "import" in inspect.getsource(torch)
ours = [finder.name for finder in sys.meta_path if type(finder).__module__ == "na_compiler.after_torch"]
assert ours == ["torch.distributed.tensor"], ours
assert torch.ops.na_compiler.na2d.default
import torch.distributed.tensor as tensor
assert type(tensor.__loader__) is type(tensor.__spec__.loader) is importlib.machinery.SourceFileLoader
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "na_compiler.after_torch"]
"""
    python(code)


def test_a_torch_that_cannot_be_used_is_still_imported(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '1.0'\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import na_compiler, torch; print(torch.__version__)"
    done = python(code, tmp_path)
    assert done.stdout == "1.0\n"
    assert done.stderr.count("\n") == 1
    assert "torch.ops.na_compiler has no operators" in done.stderr


def test_a_process_without_torch(tmp_path):
    code = """
import sys
import na_compiler
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ == "na_compiler.after_torch"]
try:
    import torch
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code).stdout == "No module named 'torch'\n"


def test_everything_public_is_listed():
    assert set(na_compiler.__all__) <= set(dir(na_compiler))
    assert importlib.util.find_spec("na_compiler.after_torch")
    code = "import na_compiler, sys; assert 'na2d' in dir(na_compiler); print('torch' in sys.modules)"
    assert python(code).stdout == "False\n"
