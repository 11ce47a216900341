"""``import natten`` means ours where it is asked for, and only there. Each in a process of its own: imports stay."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import environment, run_python

from na_compiler.compat.natten.finder import RELEASES, full_version
from na_compiler.compat.natten.names import contents

# What NATTEN 0.21 has, as its users write it.
PUBLIC = """
    NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D HAS_LIBNATTEN __version__
    na1d na2d na3d attention merge_attentions
    are_deterministic_algorithms_enabled use_deterministic_algorithms use_kv_parallelism_in_fused_na
    is_kv_parallelism_in_fused_na_enabled set_memory_usage_preference get_memory_usage_preference
    is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted is_flex_compile_allowed
    is_flex_compile_backprop_allowed allow_flex_compile allow_flex_compile_backprop disable_flex_compile
    disable_flex_compile_backprop
    get_bwd_configs_for_cutlass_fmha get_bwd_configs_for_cutlass_fna get_configs_for_cutlass_fmha
    get_configs_for_cutlass_fna get_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fmha
    get_configs_for_cutlass_hopper_fna get_bwd_configs_for_cutlass_hopper_fna
    get_bwd_configs_for_cutlass_blackwell_fmha get_bwd_configs_for_cutlass_blackwell_fna
    get_configs_for_cutlass_blackwell_fmha get_configs_for_cutlass_blackwell_fna get_configs_for_flex_fmha
    get_configs_for_flex_fna
"""
# Scripts are processes that must not inherit what another test asked for.
CLEAN = {"NA_COMPILER_NATTEN": None, "PYTHONPATH": None}

INSTALLED = """
import importlib.metadata, importlib.util, sys
from na_compiler.compat.natten import install, uninstall

assert importlib.util.find_spec("natten") is None
assert install() and install()
assert "torch" not in sys.modules, "installing loads torch"
spec = importlib.util.find_spec("natten")
assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
assert importlib.metadata.version("natten") == "0.21.6"
assert any(each.metadata["Name"] == "natten" for each in importlib.metadata.distributions())
assert "torch" not in sys.modules, "looking for natten loads torch"

import natten
assert natten.__spec__.name == "natten" and natten.__version__ == "0.21.6" and natten.HAS_LIBNATTEN
for name in sys.argv[1].split():
    assert hasattr(natten, name), name
assert set(sys.argv[1].split()) <= {*natten.__all__, "__version__"}
from natten.functional import na2d
from natten.modules import NeighborhoodAttention2D
from natten.context import use_deterministic_algorithms
from natten.types import KernelSchedule, CausalArg2DTypeOrDed
from natten.utils.checks import check_all_args
from natten.utils import log
from natten.backends import na2d_reference
from natten.backends.reference import na1d_reference, na3d_reference
import natten.profiler
assert natten.utils.checks.check_all_args(2, 3, None, 1, None) == ((3, 3), (1, 1), (1, 1), (False, False))
assert not hasattr(natten.functional, "na2d_qk") and not hasattr(natten, "natten2dqkrpb")
assert not hasattr(natten, "has_fused_na")
try:
    from natten.functional import natten2dav
except ImportError:
    pass
else:
    raise AssertionError("an old name is there")
try:
    natten.functional.na2d_qk
except AttributeError as error:
    assert "install(version='0.17')" in str(error), error
assert importlib.util.find_spec("natten.nothing") is None
try:
    install("0.17")
except RuntimeError as error:
    assert "0.21.6" in str(error)
else:
    raise AssertionError("two versions at once")
uninstall()
assert importlib.util.find_spec("natten") is None
try:
    importlib.metadata.version("natten")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("metadata stays")
assert install("0.17.1")
import natten
assert natten.__version__ == "0.17.1" and natten.functional.na2d_qk and natten.has_fused_na()
print("done")
"""


def test_installed():
    assert run_python(INSTALLED, PUBLIC, **CLEAN) == "done\n"


@pytest.fixture
def real(tmp_path):
    """A natten that is installed."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '9.9'\n")
    metadata = tmp_path / "natten-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: natten\nVersion: 9.9\n")
    return tmp_path


@pytest.mark.parametrize(("force", "version"), [(False, "9.9"), (True, "0.21.6")])
def test_another_natten_is_shadowed_only_when_told(real, force, version):
    code = f"""
    import importlib.metadata
    from na_compiler.compat.natten import install
    assert install(force={force}) is {force}
    import natten
    print(natten.__version__, importlib.metadata.version("natten"))
    """
    assert run_python(code, **{**CLEAN, "PYTHONPATH": real}) == f"{version} {version}\n"


def test_one_that_is_installed_later_comes_first(real):
    code = f"""
    import importlib.metadata, sys
    from na_compiler.compat.natten import install
    assert install()
    sys.path.insert(0, {str(real)!r})
    import natten
    assert natten.__version__ == importlib.metadata.version("natten") == "9.9"
    """
    run_python(code, **CLEAN)


def test_a_folder_of_that_name_is_no_package(tmp_path):
    (tmp_path / "natten" / "src").mkdir(parents=True)
    code = "from na_compiler.compat.natten import install\nassert install()\nimport natten; print(natten.__version__)"
    assert run_python(code, **{**CLEAN, "PYTHONPATH": tmp_path}) == "0.21.6\n"


@pytest.mark.parametrize(("value", "expected"), [("1", "0.21.6"), ("0.15", "0.15.1"), ("0", "None")])
def test_environment_variable(value, expected):
    code = """
    import importlib.util
    import na_compiler
    found = importlib.util.find_spec("natten")
    print(found and __import__("natten").__version__)
    """
    assert run_python(code, **{**CLEAN, "NA_COMPILER_NATTEN": value}) == f"{expected}\n"


def test_environment_variable_of_no_version():
    done = subprocess.run(
        [sys.executable, "-c", "import na_compiler"],
        env=environment(**{**CLEAN, "NA_COMPILER_NATTEN": "0.16"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "NA_COMPILER_NATTEN" in done.stderr
    assert "0.14, 0.15, 0.17, 0.20, 0.21" in done.stderr


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from natten import __version__
import helper

def work(number):
    return f"{number} {__version__}"

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        print(sys.argv[1:], __version__, list(pool.map(work, [5])))
"""


def test_script_and_its_workers(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "na_compiler.compat.natten",
        "--version",
        "0.17",
        tmp_path / "script.py",
        "-x",
        "1",
    ]
    done = subprocess.run(command, env=environment(**CLEAN), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['-x', '1'] 0.17.5 ['5 0.17.5']\n"


def test_versions():
    assert full_version("0.17") == "0.17.5"
    for wrong in ("0.16", "0.13", "1", "", "0.17.5.1", "0.x", 0.21, None):
        with pytest.raises(ValueError, match=r"version must be one of 0\.14"):
            full_version(wrong)


def test_old_names_are_there_by_version():
    found = {version: contents(last) for version, last in RELEASES.items()}
    where = {
        "natten2dqkrpb": {"0.14", "0.15", "0.17"},
        "natten3dav": {"0.15", "0.17"},
        "na2d_qk_with_bias": {"0.15"},
        "na2d_qk": {"0.15", "0.17"},
        "na2d": {"0.17", "0.20", "0.21"},
        "attention": {"0.20", "0.21"},
    }
    for name, versions in where.items():
        assert {version for version in found if name in found[version]["functional"]} == versions, name
    for name, versions in {"has_cuda": {"0.15", "0.17"}, "use_fused_na": {"0.17"}}.items():
        assert {version for version in found if name in found[version][""]} == versions, name
