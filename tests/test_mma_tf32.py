"""float32 in TF32 on mma.sync: within its bound in the emulator, and only where torch's own switch allows it."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError
from draws import some
from oracle import draw, poisoned

from na_compiler.compiler.spec import KernelSpec
from na_compiler.ops.tf32 import is_tf32_allowed
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.schedules.choose import choose
from na_compiler.schedules.mma import resident
from na_compiler.schedules.mma.config import Mma
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_80")
PLAIN = Problem((56, 56), 4, 32, 7)

CASES = {
    "2d": (Problem((12, 20), 2, 32, 5), Mma((4, 4), (1, 2), None)),
    "2d packed ring": (Problem((13, 21), 4, 64, (7, 5), 1, (1, 2), heads_kv=2),
                       Mma((4, 2), (2, 2), (2, 8), 3, heads=2)),
    "2d 32 rows additional": (Problem((9, 20), 2, 24, 5, head_dim_v=64, additional_kv=True),
                              Mma((4, 8), (1, 1), None, chunk=3)),
    "1d causal ring": (Problem(90, 1, 40, 9, is_causal=True, head_dim_v=32, additional_kv=True),
                       Mma((16,), (2,), (16,), 2)),
    "3d": (Problem((5, 7, 17), 1, 32, (3, 5, 4)), Mma((2, 2, 4), (2, 1, 2), None, chunk=6)),
}  # fmt: skip
# Of a product of two numbers rounded to 11 bits, and of the sums in float32 beside it.
_ROUNDED = 2.0**-10 * (1 + 2.0**-6)


def emulate(problem, config, *, orders=ORDERS, edit=None, **arguments):
    """Emulate, and compare each number with the bound that docs/numerics.md states."""
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, config), edit)
    example = draw(problem, **arguments)
    scale = arguments.get("scale", problem.head_dim**-0.5)
    query, key, value, *more = (tensor.double() for tensor in example.inputs)
    # What no score of a head is further off than, whichever keys a query sees.
    keys = torch.cat([part.flatten(1, -3) for part in (key, *more[:1])], 1).abs()
    keys = keys.repeat_interleave(problem.group_size, 2)
    products = torch.einsum("bqhd,bkhd->bqhk", query.abs().flatten(1, -3), keys)
    off = _ROUNDED * abs(scale) * products.amax(-1).view(example.lse.shape) + 1e-5
    sizes = [tensor.abs() if place == 1 else tensor for place, tensor in enumerate(more)]
    absolute, _ = neighborhood_attention(query, key, value.abs(), *example.parameters, scale, *sizes)
    bound = (torch.exp(2 * off) * (1 + 2.0**-10) - 1 + 1e-5)[..., None] * absolute
    for order in orders:
        output, lse = poisoned(torch.empty(example.output.shape), torch.empty(example.lse.shape))
        emulator(*example.read, scale, output, lse, order=order)
        assert ((output - example.output).abs() <= bound).all()
        assert ((lse - example.lse).abs() <= off).all()
        # About what is to be expected; and it is TF32 that is tested.
        error = ((output - example.output).norm() / example.output.norm()).item()
        assert 2e-5 < error < 1e-3


@pytest.mark.parametrize("name", some(CASES, 2, "tf32"))
def test_is_within_its_bound(name, seed):
    emulate(*CASES[name])


@pytest.mark.full
@pytest.mark.parametrize("scale", [-0.3, 3.0])
def test_any_scale(scale, seed):
    problem, config = CASES["2d"]
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, config))
    example = draw(problem, scale=scale)
    output, lse = poisoned(torch.empty(example.output.shape), torch.empty(example.lse.shape))
    emulator(*example.read, scale, output, lse)
    assert (output - example.output).norm() < 1e-2 * example.output.norm()
    assert (lse - example.lse).abs().max() < 0.1


@pytest.mark.full
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(number, seed):
    problem, config = CASES["2d"]
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, config))
    example = draw(problem, spoiled={"key": number})
    output, lse = poisoned(torch.empty(example.output.shape), torch.empty(example.lse.shape))
    emulator(*example.read, problem.head_dim**-0.5, output, lse)
    assert (lse.isfinite() == example.lse.isfinite()).all()
    assert output[~example.output.isfinite()].isfinite().sum() == 0


def test_finds_keys_in_another_order(monkeypatch, seed):
    """A lane's two weights of eight keys belong to the two values it reads."""
    pair_at = resident.Resident.pair_at
    monkeypatch.setattr(resident.Resident, "pair_at", lambda *given: pair_at(*given)[::-1])
    with pytest.raises((AssertionError, EmulatorError)):
        emulate(*CASES["2d"], orders=ORDERS[:1])


# ---------------------------------------------------------------------------------------------- the switch
@pytest.fixture
def switch():
    """Leave torch's switch as it was."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def test_the_switch_is_torchs(switch):
    """In whichever of its ways it is set: none of them raises, and the last one counts."""
    assert not is_tf32_allowed()
    torch.backends.cuda.matmul.allow_tf32 = True
    assert is_tf32_allowed()
    torch.backends.cuda.matmul.allow_tf32 = False
    assert not is_tf32_allowed()
    torch.set_float32_matmul_precision("high")
    assert is_tf32_allowed()
    torch.set_float32_matmul_precision("highest")
    assert not is_tf32_allowed()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert is_tf32_allowed()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not is_tf32_allowed()


def test_is_never_chosen_unasked(switch):
    """Whatever the switch says: artefacts made ahead of time are exact."""
    torch.set_float32_matmul_precision("high")
    for target in ("cuda:sm_80", "cuda:sm_90a"):
        assert choose(PLAIN, Target.parse(target), "forward").config.family == "simt"


def test_the_key_tells():
    exact = KernelSpec(PLAIN, "forward", TARGET)
    rounded = KernelSpec.rounded(PLAIN, TARGET, "forward")
    assert rounded.config.family == "mma"
    assert rounded.key != exact.key


@pytest.mark.parametrize(
    ("problem", "target", "direction"),
    [
        (PLAIN, "cuda:sm_80", "backward"),
        (PLAIN, "cuda:sm_75", "forward"),
        (PLAIN, "llvm:x86-64-v3", "forward"),
        (PLAIN.replace(dtype="bfloat16"), "cuda:sm_80", "forward"),
        (PLAIN.replace(head_dim_v=24), "cuda:sm_80", "forward"),
        (PLAIN.replace(border="cut"), "cuda:sm_80", "forward"),
    ],
)
def test_what_has_no_such_kernel(problem, target, direction):
    """It is exact then, as without the switch."""
    assert KernelSpec.rounded(problem, Target.parse(target), direction) is None
