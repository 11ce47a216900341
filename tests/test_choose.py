"""`na_compiler.schedules.choose`: families by the names of their folders; one can be left out, and one more added."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from oracle import check_forward, draw, poisoned
from processes import run_python

import na_compiler
from na_compiler import KernelSpec, Problem, schedules
from na_compiler.schedules import choose as choose_module
from na_compiler.schedules.choose import FAMILIES, choose, family_of
from na_compiler.schedules.family import Family
from na_compiler.schedules.shared.config import Config
from na_compiler.target import Target

_PACKAGE, _FAMILIES = Path(na_compiler.__file__).parent, Path(schedules.__file__).parent
_TARGETS = ("llvm:x86-64-v3", "llvm:aarch64", "cuda:sm_80", "cuda:sm_90a")


def test_every_folder_is_a_family_that_is_asked():
    assert {path.parent.name for path in _FAMILIES.glob("*/family.py")} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_folders_name(name):
    family = choose_module._load(name)
    assert isinstance(family, Family)
    assert family.name == name


@pytest.mark.parametrize("target", _TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_config_belongs_to_the_family_that_chose_it(target, direction):
    for dtype in ("float32", "bfloat16"):
        config = choose(Problem((30, 30), 2, 64, 7, dtype=dtype), Target.parse(target), direction).config
        assert isinstance(config, Config)
        family = family_of(config)
        assert family.name == config.family
        assert family.is_for(Target.parse(target))


def test_a_problem_that_no_family_takes_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(choose_module, "FAMILIES", ("sm90",))
    problem = Problem(64, 1, 64, 7)
    with pytest.raises(NotImplementedError, match=r"float32 forward on cuda:sm_90a: .*takes float16 and bfloat16"):
        choose(problem, Target.parse("cuda:sm_90a"), "forward")
    with pytest.raises(NotImplementedError, match="forward on cuda:sm_80: none of sm90 is for it"):
        choose(problem, Target.parse("cuda:sm_80"), "forward")


def _copy_without(name: str, folder: Path) -> Path:
    """Copy the package as an installation has it, without a family: its folder, and its line in ``choose``."""
    ignored = shutil.ignore_patterns("__pycache__", "schedules")
    shutil.copytree(_PACKAGE, folder / "na_compiler", ignore=ignored)
    copied = folder / "na_compiler" / "schedules"
    shutil.copytree(_FAMILIES, copied, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copied / name)
    text = (copied / "choose.py").read_text()
    without, lines = re.subn(rf'^    "{name}",\n', "", text, flags=re.MULTILINE)
    assert lines == 1
    (copied / "choose.py").write_text(without)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_can_be_left_out(name, tmp_path):
    """Everything else works: other families are chosen, the command line says so, and kernels are compiled."""
    pytest.importorskip("tvm")
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        name, targets = sys.argv[2], sys.argv[3].split()
        import na_compiler
        from na_compiler import KernelSpec, Problem, cli, schedules
        assert schedules.__file__.startswith(sys.argv[1]), schedules.__file__
        for target in targets:
            for dtype in ("float32", "bfloat16"):
                for direction in ("forward", "backward"):
                    try:
                        spec = KernelSpec.make(Problem((30, 30), 2, 64, 7, dtype=dtype), target, direction)
                        family = spec.config.family
                    except NotImplementedError as error:
                        family = "none"
                    print(target, dtype, direction, family)
                    assert family != name
        if name != "cpu":
            from na_compiler.compiler import build
            build.build_in_memory(KernelSpec.make(Problem((8, 9), 2, 16, 3)))
        plan = "plan --layout 30x30 --heads 2 --head-dim 64 --kernel-size 7 --dtype bfloat16"
        assert cli.main([*plan.split(), "--target", "cuda:sm_90a"]) == 0
    """
    copied = _copy_without(name, tmp_path)
    chosen = run_python(code, str(copied), name, " ".join(_TARGETS), PYTHONPATH=None)
    left = {
        "sm90": "cuda:sm_90a bfloat16 forward mma",
        "mma": "cuda:sm_80 bfloat16 forward simt",
        "simt": "cuda:sm_80 float32 forward none",
    }
    assert left.get(name, "llvm:aarch64 float32 forward none") in chosen.splitlines()


_TOY = """
from dataclasses import dataclass

from na_compiler.schedules.cpu.forward import forward
from na_compiler.schedules.cpu.plan import Tiling, TilingPlan
from na_compiler.schedules.family import Family, Lowered
from na_compiler.schedules.shared.config import Config
from na_compiler.workspace import Workspace


@dataclass(frozen=True)
class Toy(Config):
    rows: int = 2
    family = "toy"

    def plan(self, problem):
        return TilingPlan.make(problem, Tiling(strip=(1, 1, self.rows)))

    def workspace(self, problem, direction):
        return Workspace()


class ToyFamily(Family):
    name = "toy"

    def is_for(self, target):
        return target.device_type == "cpu"

    def refusal(self, problem, target, direction):
        return None if problem.head_dim == 5 and direction == "forward" else "Toys have 5 elements and no backward."

    def choose(self, problem, target, direction):
        return Toy()

    def lower(self, problem, config, direction):
        return Lowered(forward(config.plan(problem)))


FAMILY = ToyFamily()
"""


def test_a_family_is_added_by_a_folder_and_a_name(monkeypatch, tmp_path, seed):
    pytest.importorskip("tvm")
    from na_compiler.compiler.build import build_in_memory
    from na_compiler.runtime.kernel import make_kernel

    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "family.py").write_text(_TOY)
    monkeypatch.setattr(schedules, "__path__", [*schedules.__path__, str(tmp_path)])
    monkeypatch.setattr(choose_module, "FAMILIES", ("toy", *FAMILIES))
    problem = Problem((6, 7), 2, 5, 3)
    try:
        spec = KernelSpec.make(problem)
        assert spec.config.family == "toy"
        assert choose_module.candidates(problem, spec.target, "forward") == (), "there is nothing to rank"
        other = KernelSpec.make(problem, direction="backward")
        assert (other.config.family, other.reason) == ("cpu", "Toys have 5 elements and no backward.")
        assert KernelSpec.make(problem, "cuda:sm_80").config.family == "simt"
        function, module = build_in_memory(spec)
    finally:
        choose_module._load.cache_clear()
        for loaded in ("toy", "toy.family"):
            sys.modules.pop(f"{schedules.__name__}.{loaded}", None)
    example = draw(problem, batch=2)
    output, lse = poisoned(example.output.float(), example.lse.float())
    make_kernel(spec.info, function, module).function(*example.inputs, problem.head_dim**-0.5, output, lse)
    check_forward(example, output, lse)
