"""`na_compiler.schedules.mma`: its CUDA in the emulator, against the reference; faults that it must find; plans."""

from __future__ import annotations

import itertools
import math
import random
import re
import time

import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError
from draws import some
from oracle import check, check_forward, draw, poisoned

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.schedules.choose import choose
from na_compiler.schedules.mma import copies, planner, products, resident
from na_compiler.schedules.mma.boxes import largest_union
from na_compiler.schedules.mma.config import Mma
from na_compiler.schedules.mma.packing import HeadsWork
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared import mask, softmax
from na_compiler.target import Target
from na_compiler.window import window_bounds

TARGET = Target.parse("cuda:sm_80")

# Every parameter of a problem and of a config, by itself and mixed, both with keys in a ring and with all of them kept.
CASES = {
    "2d ring": (Problem((19, 37), 2, 64, (7, 5), dtype="bfloat16"), Mma((4, 4), (2, 2), (4, 16))),
    "2d": (Problem((19, 37), 2, 64, (7, 5), dtype="float16"), Mma((4, 4), (2, 2), None)),
    "2d 8 warps": (Problem((19, 37), 1, 128, (7, 5), dtype="bfloat16"), Mma((4, 4), (2, 4), None)),
    "2d stride causal ring": (Problem((24, 21), 1, 64, 9, (4, 5), 1, (True, False), dtype="float16"),
                              Mma((4, 4), (2, 2), (4, 8), 3)),
    "2d stride causal": (Problem((24, 21), 1, 64, 9, (4, 5), 1, (True, False), dtype="float16"),
                         Mma((2, 8), (2, 2), None)),
    "2d dilated grouped": (Problem((31, 29), 4, 64, 5, 1, (3, 2), heads_kv=2, dtype="float16"),
                           Mma((4, 4), (1, 2), None)),
    "2d dilated grouped ring": (Problem((65, 20), 2, 64, 5, 1, (13, 2), heads_kv=1, dtype="float16"),
                                Mma((4, 4), (1, 2), (2, 8), 1)),
    "1d ring": (Problem(300, 2, 64, 129, 8, dtype="bfloat16"), Mma((16,), (4,), (64,), 4)),
    "1d causal ring": (Problem(300, 4, 64, 65, is_causal=True, heads_kv=2, head_dim_v=128, dtype="bfloat16"),
                       Mma((16,), (8,), (32,))),
    "1d dilated": (Problem(530, 1, 32, 20, 3, 8, dtype="bfloat16"), Mma((16,), (4,), None)),
    "3d ring": (Problem((5, 7, 17), 1, 80, (3, 5, 4), dtype="bfloat16"), Mma((2, 2, 4), (2, 2, 1), (2, 2, 8))),
    "3d": (Problem((5, 7, 17), 1, 80, (3, 5, 4), dtype="bfloat16"), Mma((2, 2, 4), (2, 2, 2), None, chunk=6)),
    "3d dilated": (Problem((6, 9, 16), 1, 64, 3, (1, 2, 1), (2, 1, 3), (False, True, False), dtype="bfloat16"),
                   Mma((2, 2, 4), (1, 2, 2), None)),
    "head_dim 256": (Problem((12, 20), 1, 256, 7, dtype="bfloat16"), Mma((4, 4), (1, 2), (2, 8))),
    "head_dim 72": (Problem((16, 20), 2, 72, 7, head_dim_v=40, dtype="bfloat16"), Mma((4, 4), (1, 2), None)),
    "head_dim 16": (Problem((16, 20), 2, 16, 7, head_dim_v=8, dtype="float16"), Mma((4, 4), (2, 2), None)),
    "head_dim 8 ring": (Problem((16, 20), 2, 8, 7, head_dim_v=24, dtype="float16"), Mma((4, 4), (1, 1), (2, 8))),
    "additional ring": (Problem((16, 20), 1, 64, 7, additional_kv=True, dtype="bfloat16"),
                        Mma((4, 4), (1, 2), (4, 16))),
    "additional": (Problem((16, 20), 1, 64, 7, additional_kv=True, dtype="bfloat16"), Mma((4, 4), (1, 2), None)),
    "skipped tiles": (Problem((40, 20), 1, 64, (5, 7), dtype="bfloat16"), Mma((4, 4), (2, 4), (2, 16), 4)),
    "2d packed": (Problem((19, 37), 8, 64, (7, 5), heads_kv=2, dtype="float16"), Mma((2, 2), (2, 2), None, heads=4)),
    "2d packed ring": (Problem((31, 29), 6, 64, 5, (1, 2), (3, 2), heads_kv=3, head_dim_v=32, dtype="bfloat16"),
                       Mma((2, 4), (2, 2), (2, 8), 3, heads=2)),
    "2d 32 rows": (Problem((19, 37), 2, 32, (7, 5), dtype="float16"), Mma((4, 8), (2, 1), None, chunk=3)),
    "3d 32 rows ring": (Problem((5, 7, 17), 1, 72, (3, 5, 4), dtype="bfloat16"),
                        Mma((2, 4, 4), (1, 1, 2), (2, 2, 8))),
    "1d packed 32 rows causal ring": (Problem(150, 8, 64, 65, is_causal=True, heads_kv=2, dtype="bfloat16"),
                                      Mma((8,), (4,), (32,), heads=4)),
    "additional packed 32 rows": (Problem((16, 19), 4, 64, 7, heads_kv=1, additional_kv=True, dtype="bfloat16"),
                                  Mma((2, 4), (1, 2), None, chunk=3, heads=4)),
    "2d dense": (Problem((14, 14), 2, 32, 7, 1, 2, dtype="float16"), Mma((4, 4), (2, 2), None)),
    "2d dense ring": (Problem((10, 20), 2, 32, (5, 10), (5, 3), 2, dtype="float16"), Mma((4, 4), (2, 2), (2, 8))),
    "1d dense additional": (Problem(40, 2, 64, 20, 1, 2, dtype="bfloat16", additional_kv=True), Mma((16,), (2,), None)),
    "one token": (Problem(1, 1, 8, 1, dtype="bfloat16"), Mma((16,), (1,), None)),
}  # fmt: skip
_ARGUMENTS = {
    "additional ring": {"additional": 150},
    "additional": {"additional": 70},
    "2d": {"batch": 2},
    "3d": {"scale": -0.2},
}


def emulate(problem, config, *, edit=None, orders=ORDERS, spreads=False, **arguments):
    """Emulate a problem's kernel in both orders, and compare with the reference."""
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, config), edit)
    example = draw(problem, **arguments)
    scale = arguments.get("scale", problem.head_dim**-0.5)
    for order in orders:
        empty = torch.empty(example.output.shape, dtype=example.inputs[0].dtype), torch.empty(example.lse.shape)
        output, lse = poisoned(*empty)
        emulator(*example.read, scale, output, lse, order=order)
        check_forward(example, output, lse, spreads=spreads)


@pytest.mark.parametrize("name", some(CASES, 8, "mma"))
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config, **_ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", some(CASES, 4, "mma bias"))
def test_bias(name, seed):
    """By relative position: its place is right for every key that is seen, whatever the others read."""
    problem, config = CASES[name]
    emulate(problem.replace(operands=("relative_position_bias",)), config, **_ARGUMENTS.get(name, {}))


# A warp of 32 rows takes no key mask: no planner gives it one.
_MASKED = itertools.product(
    (name for name, (problem, config) in CASES.items() if config.plan(problem).row_tiles == 1),
    [("key_mask",), ("relative_position_bias", "key_mask")],
)


@pytest.mark.parametrize(("name", "operands"), some(_MASKED, 3, "mma key mask"))
def test_key_mask(name, operands, seed):
    """Its place is right for every key, and there are queries that see nothing."""
    problem, config = CASES[name]
    emulate(problem.replace(operands=operands), config, **_ARGUMENTS.get(name, {}))


_HIDDEN = list(itertools.product([(32,), (64,), None], [None, 0, 3]))


@pytest.mark.parametrize(("key_tile", "additional"), some(_HIDDEN, 2, "mma hidden"))
def test_hidden_keys(key_tile, additional, seed):
    """They may hold NaN. Who sees none, is told from who sees scores of minus infinity, whatever tiles keys lie in."""
    problem = Problem(150, 1, 16, 65, additional_kv=additional is not None, dtype="bfloat16", operands=("key_mask",))
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, Mma((16,), (2,), key_tile, chunk=3)))
    example = draw(problem, batch=4, additional=additional or 0)
    query, key, value, *more = example.inputs
    mask = torch.zeros(4, 150, dtype=torch.bool)
    # A tile, or half of one, that all queries of a block see; some here and there, none at the end; all; low scores.
    mask[0, 32:64], mask[1, :80], mask[2], mask[3, :20] = True, torch.rand(80) < 0.3, True, True
    query[3], key[3] = 1.0, -math.inf
    expected, expected_lse = neighborhood_attention(
        *(tensor.double() for tensor in (query, key, value)), 65, 1, 1, False, None,
        *(tensor.double() for tensor in more), key_mask=mask,
    )  # fmt: skip
    key[~mask], value[~mask] = math.nan, 3e38
    output, lse = poisoned(value, torch.empty(4, 150, 1))
    emulator(query, key, value, *more, mask, problem.head_dim**-0.5, output, lse, order=random.choice(ORDERS))
    check("output", output, expected, "bfloat16")
    check("lse", lse, expected_lse, "float32", floor=math.sqrt(lse.numel()))
    assert lse.isneginf().any() != bool(additional)
    assert lse[3].isnan().any() != bool(additional)


@pytest.mark.parametrize(("scale", "key_tile"), some(itertools.product([0.0, -0.5, 3.0], [(16,), None]), 2, "scale"))
def test_any_scale(scale, key_tile, seed):
    emulate(Problem(70, 1, 64, 9, dtype="bfloat16"), Mma((16,), (2,), key_tile), orders=ORDERS[:1], scale=scale)


@pytest.mark.parametrize(("additional", "key_tile"), some(itertools.product([0, 5], [(4, 8), None]), 2, "additional"))
def test_few_additional_keys(additional, key_tile, seed):
    problem = Problem((9, 20), 1, 64, 3, additional_kv=True, dtype="bfloat16")
    emulate(problem, Mma((4, 4), (1, 1), key_tile), orders=ORDERS[:1], additional=additional)


@pytest.mark.parametrize("key_tile", some([((16,),), None], 1, "finite"))
@pytest.mark.parametrize("name", some(["query", "key", "value", "additional_keys", "additional_values"], 2, "finite"))
def test_not_finite_where_softmax_is(name, key_tile, seed):
    """One number that is not finite: so are results that depend on it, and beside hidden values there may be NaN."""
    problem = Problem(90, 1, 16, 9, additional_kv=True, dtype="bfloat16")
    for number in (math.nan, random.choice([math.inf, -math.inf])):
        spreads = name in {"value", "additional_values"}
        emulate(problem, Mma((16,), (2,), key_tile), orders=ORDERS[:1], spreads=spreads, spoiled={name: number})


@pytest.mark.parametrize("key_tile", some([((16,),), None], 1, "finite"))
@pytest.mark.parametrize("score", some([-math.inf, -3e38, 1e30], 1, "score"))
def test_scores_at_the_end_of_float32(key_tile, score, seed):
    """Hidden keys have no part in it, be the scores that are seen as low as they may, and their scale large."""
    problem = Problem(70, 1, 8, 9, dtype="bfloat16")
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, Mma((16,), (2,), key_tile)))
    for scale in (2.0**-2, 1.0, 2.0**10):
        query, key, value = draw(problem).inputs
        query.fill_(0.0)[..., 0] = 1.0
        key.fill_(0.0)[..., 0] = score
        output, lse = poisoned(value, torch.empty(1, 70, 1))
        emulator(query, key, value, scale, output, lse, order=ORDERS[0])
        scaled = torch.tensor(key[0, 0, 0, 0].item() * scale * math.log2(math.e), dtype=torch.float32)
        if scaled.isinf():
            assert output.isnan().all()
            assert lse.isnan().all()
            continue
        mean = value.float().unfold(1, 9, 1).mean(-1)[:, [0] * 4 + list(range(62)) + [61] * 4]
        torch.testing.assert_close(output.float(), mean, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse, torch.full_like(lse, key[0, 0, 0, 0].item() * scale))


@pytest.mark.parametrize("key_tile", some([((16,),), None], 1, "finite"))
@pytest.mark.parametrize("size", some([1e8, 1e30], 1, "size"))
def test_large_scores(key_tile, size, seed):
    """One key wins each query."""
    problem = Problem(90, 1, 16, 9, dtype="bfloat16")
    emulate(problem, Mma((16,), (2,), key_tile), orders=ORDERS[:1], scale=size * random.choice([1.0, -1.0]))


def test_views_of_one_projection(seed):
    problem, config = Problem((9, 12), 2, 64, 5, dtype="bfloat16"), Mma((4, 4), (1, 2), None)
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, config))
    example = draw(problem, batch=2)
    views = torch.stack(example.inputs, dim=-3).unbind(-3)
    assert not views[0].is_contiguous()
    output, lse = poisoned(torch.empty(example.output.shape, dtype=torch.bfloat16), torch.empty(example.lse.shape))
    emulator(*views, problem.head_dim**-0.5, output, lse)
    check_forward(example, output, lse)


# ---------------------------------------------------------------------------------------------- planted faults
_RING = Problem((13, 21), 1, 64, (7, 5), dtype="bfloat16"), Mma((4, 4), (2, 2), (4, 8))
_KEPT = _RING[0], Mma((4, 4), (2, 2), None)


def _finds(problem, config, **options):
    """Whether the emulator or the comparison finds a fault."""
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(problem, config, **options)
    assert "was not planted" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("case", [_RING, _KEPT])
def test_fault_free_is_right(case, seed):
    emulate(*case)


_PENDING = [(_RING, 1), (_RING, 2), (_KEPT, 0), (_KEPT, 1), (_KEPT, 2)]


@pytest.mark.parametrize(("case", "pending"), some(_PENDING, 2, "pending"))
def test_finds_a_wait_for_too_few_copies(case, pending, seed):
    """Queries, keys and values each have a wait of their own."""
    name = "tvm_builtin_ptx_cp_async_wait_group_async_wait_group_{}();"
    if case is _RING:
        case = _RING[0], Mma((4, 4), (2, 2), (4, 8), 3)
    _finds(*case, edit=lambda text: text.replace(name.format(pending), name.format(pending + 1)))


@pytest.mark.parametrize("case", some([(_RING,), (_KEPT,)], 1, "barrier"))
def test_finds_a_missing_barrier(case, seed):
    name = "tvm_builtin_cuda_cta_sync();"
    _finds(*case, edit=lambda text: text.replace(name, "tvm_builtin_cuda_warp_sync();"))


@pytest.mark.parametrize("by", ["- 40", "+ 32"])
def test_finds_a_shift_that_is_undefined(by, seed):
    """By a negative number, or by more bits than there are: CUDA says nothing of what comes out."""
    amount = r"(?<=\(uint\)31 << \(\(uint\))(\w+\[0\])"
    found = _finds(*_KEPT, edit=lambda text: re.sub(amount, rf"(\1 {by})", text), orders=ORDERS[:1])
    assert "a shift by a negative number, or by all bits or more" in found


@pytest.mark.parametrize(
    ("case", "which"), some(itertools.product([_RING, _KEPT], ["LOAD", "LOAD_TRANSPOSED"]), 2, "matrices")
)
def test_finds_matrices_read_the_other_way(case, which, monkeypatch, seed):
    other = {"LOAD": products.LOAD_TRANSPOSED, "LOAD_TRANSPOSED": products.LOAD}
    monkeypatch.setattr(products, which, other[which])
    _finds(*case)


@pytest.mark.parametrize("case", some([(_RING,), (_KEPT,)], 1, "swizzle"))
def test_finds_a_wrong_swizzle_of_copies(case, monkeypatch, seed):
    swizzled = copies.swizzled
    monkeypatch.setattr(copies, "swizzled", lambda row, tile: copies.T.bitwise_xor(swizzled(row, tile), 1))
    _finds(*case)


@pytest.mark.parametrize("axis", some([0, 1], 1, "axis"))
def test_finds_a_window_that_is_too_long(axis, monkeypatch, seed):
    bits = mask.Mask._bits
    monkeypatch.setattr(
        mask.Mask, "_bits", lambda self, which, start, extent: bits(self, which, start, extent + (which == axis))
    )
    _finds(*_RING)


@pytest.mark.parametrize("row", some([0, 1], 1, "row"))
def test_finds_a_stretch_of_another_row(row, monkeypatch, seed):
    line = resident.WarpMask._line
    monkeypatch.setattr(
        resident.WarpMask, "_line", lambda self, which, number: line(self, which, number + (which == row))
    )
    _finds(*_KEPT)


_STEPS = _KEPT[0].replace(kernel_size=(11, 13)), Mma((4, 4), (2, 2), None, chunk=4)


@pytest.mark.parametrize("case", some([(_RING,), (_STEPS,)], 1, "rescale"))
def test_finds_a_missing_rescale(case, monkeypatch, seed):
    monkeypatch.setattr(softmax.Softmax, "rescale", lambda self: None)
    _finds(*case)


def test_finds_a_copy_beyond_a_limit(monkeypatch, seed):
    """Rows beyond the last key are not read: the tensor ends there."""
    monkeypatch.setattr(copies, "both", lambda *conditions: None)
    assert "outside the tensors" in _finds(*_RING)


_PACKED = Problem((5, 9), 4, 16, 3, heads_kv=1, dtype="float16"), Mma((2, 4), (1, 1), None, chunk=2, heads=4)


def _of_first_rows(self, plan, warp, lane, first_row=0, packed=1):
    made_rows(self, plan, warp, lane, 0, packed)


made_rows = Rows.__init__
_FAULTS = {
    "lse of the first head": (HeadsWork, "place", lambda work, at, head: work.address(at, 1) * work.plan.packed),
    "output of the first head": (Rows, "head", lambda rows, row: 0),
    "the first 16 rows again": (Rows, "__init__", _of_first_rows),
    "windows taken for whole": (HeadsWork, "bounds", lambda work, axis, query: (0, work.lengths[axis])),
}


@pytest.mark.parametrize("name", some(_FAULTS, 1, "packed"))
def test_finds_rows_taken_for_others(name, monkeypatch, seed):
    """Heads side by side, 32 rows a warp."""
    monkeypatch.setattr(*_FAULTS[name])
    _finds(*_PACKED)


# ---------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_is_chosen_for_small_windows(architecture):
    problem, target = Problem((56, 56), 4, 32, 7, dtype="float16"), Target.parse(f"cuda:{architecture}")
    choice = choose(problem, target, "forward")
    assert isinstance(choice.config, Mma), choice.reason
    assert choice.config.plan(problem).shared_bytes <= target.shared_memory


@pytest.mark.parametrize(("heads_kv", "packed"), [(8, 1), (2, 4), (1, 8)])
def test_heads_that_share_keys_are_packed(heads_kv, packed):
    problem = Problem((56, 56), 8, 64, 7, heads_kv=heads_kv, dtype="float16")
    assert choose(problem, TARGET, "forward").config.heads == packed


def test_leaves_long_windows_to_hopper():
    """Two families that say how long they take compete."""
    problem = Problem((256, 256), 24, 128, 80, dtype="bfloat16")
    assert choose(problem, Target.parse("cuda:sm_90a"), "forward").config.family == "sm90"
    assert isinstance(choose(problem, Target.parse("cuda:sm_80"), "forward").config, Mma)


def test_is_not_chosen_before_ampere():
    problem = Problem((56, 56), 4, 32, 7, dtype="float16")
    assert not isinstance(choose(problem, Target.parse("cuda:sm_75"), "forward").config, Mma)


def test_the_largest_union_is_that_of_all_boxes(seed):
    for _ in range(300):
        length = random.randint(1, 60)
        kernel = random.randint(1, length)
        stride, causal, extent = random.randint(1, kernel), random.random() < 0.5, random.choice([1, 2, 4, 8, 16])
        spans = []
        for first in range(0, length, extent):
            last = min(first + extent, length) - 1
            low = window_bounds(first, length, kernel, stride, causal)[0]
            spans.append(window_bounds(last, length, kernel, stride, causal)[1] - low)
        assert largest_union(length, kernel, stride, causal, extent) == max(spans), (length, kernel, stride, causal)


def test_plans_take_milliseconds_for_any_layout():
    problem = Problem((1 << 12, 1 << 10, 1 << 10), 4, 64, (3, 7, 7), dtype="bfloat16")
    began = time.process_time()
    assert planner.candidates(problem, TARGET.shared_memory)
    assert time.process_time() - began < 0.5


def test_waste_is_what_the_boxes_come_to():
    """A warp of 4x4 queries visits 10x10 keys in 7 groups of 16, for 49 that each query needs."""
    problem = Problem((56, 56), 4, 32, 7, dtype="float16")
    found = next(
        c
        for c in planner.candidates(problem, 227 * 1024, 100)
        if c.config.key_tile is None and c.config.warp_box == (4, 4) and c.config.warps == (2, 2)
    )
    assert found.waste == pytest.approx(7 * 16 / 49)
