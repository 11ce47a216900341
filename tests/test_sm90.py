"""`na_compiler.schedules.sm90`: its CUDA in the emulator, against the reference; faults that it must find; plans."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError
from draws import some
from oracle import check_forward, draw, poisoned

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.choose import choose
from na_compiler.schedules.shared import mask, softmax
from na_compiler.schedules.sm90 import block, consumer, maps, plan, products
from na_compiler.schedules.sm90 import softmax as patient
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.planner import candidates
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_90a")
_WIDE = Sm90((4, 16), (8, 16))
_PATIENT = Sm90((64,), (64,), threshold=8)

# Every parameter of a problem and of a config, by itself and mixed; head_dims with and without padding.
CASES = {
    "2d": (Problem((19, 37), 2, 128, (7, 5), dtype="bfloat16"), _WIDE),
    "2d stride causal": (Problem((24, 21), 1, 64, 9, (4, 5), 1, (True, False), dtype="float16"), _WIDE),
    "2d dilated grouped": (Problem((31, 29), 2, 64, 5, 1, (3, 2), heads_kv=1, dtype="float16"), _WIDE),
    "1d": (Problem(300, 2, 64, 129, 8, dtype="bfloat16"), Sm90((64,), (64,), stages=4)),
    "1d causal": (Problem(300, 4, 64, 65, is_causal=True, heads_kv=2, head_dim_v=128, dtype="bfloat16"),
                  Sm90((64,), (128,))),
    "1d dilated": (Problem(530, 1, 32, 20, 3, 8, heads_kv=1, dtype="bfloat16"), Sm90((64,), (64,))),
    "3d": (Problem((5, 7, 17), 2, 80, (3, 5, 4), dtype="bfloat16"), Sm90((2, 4, 8), (2, 4, 8))),
    "3d dilated": (Problem((6, 9, 16), 1, 64, 3, (1, 2, 1), (2, 1, 3), (False, True, False), dtype="bfloat16"),
                   Sm90((2, 4, 8), (2, 4, 8))),
    "head_dim 256": (Problem((12, 20), 1, 256, 7, dtype="bfloat16"), Sm90((4, 16), (4, 16))),
    "head_dim 32": (Problem((16, 20), 2, 32, 7, dtype="float16"), _WIDE),
    "head_dim 72": (Problem((16, 20), 2, 72, 7, head_dim_v=40, dtype="bfloat16"), _WIDE),
    "head_dim 16": (Problem((16, 20), 2, 16, 7, head_dim_v=8, dtype="float16"), _WIDE),
    "additional": (Problem((16, 20), 2, 64, 7, additional_kv=True, dtype="bfloat16"), _WIDE),
    "persistent": (Problem((17, 33), 2, 64, (7, 8), dilation=(1, 2), dtype="bfloat16"),
                   Sm90((2, 32), (4, 16), persistent=True)),
    "3 warpgroups": (Problem((25, 20), 1, 64, 7, dtype="bfloat16"), Sm90((4, 16), (4, 16), 3)),
    "skipped tiles": (Problem((40, 20), 1, 64, (5, 7), dtype="bfloat16"), Sm90((8, 8), (2, 16), stages=4)),
    "176 keys": (Problem((19, 37), 1, 64, (9, 7), dtype="bfloat16"), Sm90((4, 16), (11, 16))),
    "144 keys": (Problem((9, 8, 30), 1, 64, (4, 5, 9), dtype="bfloat16"), Sm90((2, 4, 8), (3, 2, 24))),
    "patient": (Problem((19, 37), 2, 64, (7, 9), dtype="float16"), Sm90((4, 16), (4, 16), threshold=8)),
    "patient additional": (Problem((16, 20), 2, 64, 7, additional_kv=True, dtype="bfloat16"),
                           Sm90((4, 16), (8, 16), threshold=8)),
    "patient, overlap": (Problem(300, 2, 64, 129, 8, dtype="float16"), Sm90((64,), (64,), overlap=True, threshold=8)),
    "no turns": (Problem((19, 20), 1, 64, 7, dtype="bfloat16"), Sm90((4, 16), (8, 16), pingpong=False, overlap=False)),
}  # fmt: skip
_ARGUMENTS = {
    "additional": {"additional": 150},
    "patient additional": {"additional": 150},
    "patient": {"scale": 3.0},
    "persistent": {"batch": 9},
    "2d": {"batch": 2},
    "3d": {"scale": -0.2},
}


def emulate(problem, config, *, edit=None, orders=ORDERS, spreads=False, **arguments):
    """Emulate a problem's kernel in both orders, and compare with the reference."""
    spec = KernelSpec(problem, "forward", TARGET, config)
    emulator = Emulator.of(spec, edit)
    example = draw(problem, **arguments)
    scale = arguments.get("scale", problem.head_dim**-0.5)
    for order in orders:
        empty = torch.empty(example.output.shape, dtype=example.inputs[0].dtype), torch.empty(example.lse.shape)
        output, lse = poisoned(*empty)
        emulator(*example.inputs, scale, output, lse, order=order)
        check_forward(example, output, lse, spreads=spreads)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config, **_ARGUMENTS.get(name, {}))


def _either():
    """A config whose softmax rescales with every higher score, or with much higher ones."""
    return random.choice([Sm90((64,), (64,)), _PATIENT])


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale, seed):
    emulate(Problem(70, 1, 64, 9, dtype="bfloat16"), _either(), orders=ORDERS[:1], scale=scale)


def test_no_additional_keys(seed):
    """There is nothing to encode a tensor map of then."""
    problem = Problem(70, 1, 64, 9, additional_kv=True, dtype="bfloat16")
    emulate(problem, Sm90((64,), (64,)), orders=ORDERS[:1], additional=0)


@pytest.mark.parametrize("name", some(["query", "key", "value", "additional_keys", "additional_values"], 2, "finite"))
def test_not_finite_where_softmax_is(name, seed):
    """One number that is not finite: so are results that depend on it, and beside hidden values there may be NaN."""
    problem = Problem(90, 1, 16, 9, additional_kv=True, dtype="bfloat16")
    for number in (math.nan, random.choice([math.inf, -math.inf])):
        spreads = name in {"value", "additional_values"}
        emulate(problem, _either(), orders=ORDERS[:1], spreads=spreads, spoiled={name: number})


@pytest.mark.parametrize("score", some([-math.inf, -3e38, 1e30], 1, "score"))
def test_scores_at_the_end_of_float32(score, seed):
    """Hidden keys have no part in it, be the scores that are seen as low as they may, and their scale large."""
    problem = Problem(70, 1, 8, 9, dtype="bfloat16")
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, _either()))
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


@pytest.mark.parametrize("size", some([1e8, 1e30], 1, "size"))
def test_large_scores(size, seed):
    """One key wins each query."""
    problem = Problem(90, 1, 16, 9, dtype="bfloat16")
    emulate(problem, _either(), orders=ORDERS[:1], scale=size * random.choice([1.0, -1.0]))


def test_large_scores_that_rise_by_the_least(seed):
    """From one tile to the next, by what floats are apart there: rounding must not add that to what weights may be."""
    problem = Problem(128, 1, 8, 128, dtype="float16")
    emulator = Emulator.of(KernelSpec(problem, "forward", TARGET, _PATIENT))
    query, key, value = draw(problem).inputs
    query.fill_(0.0)[..., :2] = torch.tensor([2.0**13, 1.0])
    key.fill_(0.0)[..., 0] = 2.0**13
    key[:, 64:, :, 1] = 8.0
    for unit in (1.3, 1.6, 1.75, 1.9, 1.99):
        output, lse = poisoned(value, torch.empty(1, 128, 1))
        emulator(query, key, value, unit / math.log2(math.e), output, lse, order=ORDERS[0])
        mean = value[:, 64:].float().mean(1, keepdim=True).expand_as(value)
        torch.testing.assert_close(output.float(), mean, rtol=2e-3, atol=2e-3)


def test_views_of_one_projection(seed):
    problem, config = Problem((9, 12), 2, 64, 5, dtype="bfloat16"), _WIDE
    spec = KernelSpec(problem, "forward", TARGET, config)
    emulator = Emulator.of(spec)
    example = draw(problem, batch=2)
    views = torch.stack(example.inputs, dim=-3).unbind(-3)
    assert not views[0].is_contiguous()
    output, lse = poisoned(torch.empty(example.output.shape, dtype=torch.bfloat16), torch.empty(example.lse.shape))
    emulator(*views, problem.head_dim**-0.5, output, lse)
    check_forward(example, output, lse)


# ---------------------------------------------------------------------------------------------- planted faults
_SMALL = Problem((19, 37), 1, 64, (7, 5), dtype="bfloat16"), Sm90((4, 16), (4, 16))


def _finds(problem, config, **options):
    """Whether the emulator or the comparison finds a fault."""
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(problem, config, **options)
    assert "was not planted" not in str(found.value)
    return str(found.value)


def test_fault_free_is_right(seed):
    emulate(*_SMALL)


@pytest.mark.parametrize(("leading", "stride"), [(1, 0.5), (0.5, 1), (1, 2)])
def test_finds_wrong_descriptor_strides(leading, stride, monkeypatch, seed):
    def encode(target, pointer, first, second, swizzle):
        return encoded(target, pointer, max(int(first * leading), 1), int(second * stride), swizzle)

    encoded = products.T.cuda.wgmma.encode_matrix_descriptor
    problem, config = _SMALL[0].replace(head_dim=128, head_dim_v=128), _SMALL[1]
    monkeypatch.setattr(products.T.cuda.wgmma, "encode_matrix_descriptor", encode)
    _finds(problem, config)


@pytest.mark.parametrize("pending", [0, 1])
def test_finds_a_missing_wait_for_products(pending, seed):
    name = f"tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_{pending}();"
    _finds(*_SMALL, edit=lambda text: text.replace(name, ";"))


@pytest.mark.parametrize("name", ["query", "key", "value", "key_empty", "value_empty"])
def test_finds_a_missing_wait_for_a_barrier(name, monkeypatch, seed):
    wait = block.Block.wait
    monkeypatch.setattr(block.Block, "wait", lambda self, which, *rest: which == name or wait(self, which, *rest))
    # Two tiles of queries in turn, so that every barrier has something to guard.
    _finds(_SMALL[0], Sm90((4, 16), (4, 16)))


def test_finds_queries_overwritten_too_early(monkeypatch, seed):
    wait = block.Block.wait
    monkeypatch.setattr(
        block.Block, "wait", lambda self, which, *rest: which == "query_empty" or wait(self, which, *rest)
    )
    problem, config = CASES["persistent"]
    _finds(problem, config, batch=9)


@pytest.mark.parametrize("name", ["key_empty", "value_empty"])
def test_finds_an_early_release(name, monkeypatch, seed):
    """Released where its products are only issued."""
    commit = products.Products.commit
    state = {}
    arrive, wait = block.Block.arrive, block.Block.wait

    def remember(self, which, stage, parity):
        if which == name.removesuffix("_empty"):
            state["release"] = (self, stage)
        wait(self, which, stage, parity)

    def release(*_):
        commit()
        if "release" in state:
            owner, stage = state.pop("release")
            arrive(owner, name, stage)

    monkeypatch.setattr(block.Block, "wait", remember)
    monkeypatch.setattr(products.Products, "commit", staticmethod(release))
    monkeypatch.setattr(block.Block, "arrive", lambda self, which, *rest: which == name or arrive(self, which, *rest))
    monkeypatch.setattr(plan.Plan, "skips", property(lambda self: False))
    _finds(*_SMALL)


def test_reports_a_wrong_parity(monkeypatch, seed):
    phase = block.Block.phase
    monkeypatch.setattr(block.Block, "phase", lambda self, tile: phase(self, tile) ^ 1)
    assert re.search("deadlock|overwritten|emulator|not finite", _finds(*_SMALL))


def test_reports_a_deadlock(monkeypatch, seed):
    """A release that never comes."""
    arrive = block.Block.arrive
    monkeypatch.setattr(
        block.Block, "arrive", lambda self, which, *rest: which == "key_empty" or arrive(self, which, *rest)
    )
    assert "deadlock" in _finds(*_SMALL)


def test_finds_weights_overwritten_too_early(monkeypatch, seed):
    """Weights packed before the product that reads the last ones is complete."""
    wait = products.Products.wait.__func__

    def late(cls, pending, *registers):
        if pending == 0 and registers and registers[0].shape[0] == 32:  # output; scores are of another size
            return None
        return wait(cls, pending, *registers)

    monkeypatch.setattr(products.Products, "wait", classmethod(late))
    _finds(_SMALL[0], Sm90((4, 16), (8, 16)))


@pytest.mark.parametrize("axis", [0, 1])
def test_finds_a_wrong_mask(axis, monkeypatch, seed):
    """A window one key too long along one axis."""
    bits = mask.Mask._bits
    monkeypatch.setattr(
        mask.Mask, "_bits", lambda self, which, start, extent: bits(self, which, start, extent + (which == axis))
    )
    _finds(*_SMALL)


def test_finds_a_mask_left_out(monkeypatch, seed):
    """Tiles taken for whole that are not: whether one axis is."""
    monkeypatch.setattr(mask, "both", lambda *conditions: next(c for c in reversed(conditions) if c is not None))
    _finds(Problem((19, 60), 1, 64, (5, 33), dtype="bfloat16"), _SMALL[1])


def test_finds_columns_of_a_neighbouring_head(monkeypatch, seed):
    """Padding of head_dim that is the next head's columns instead of zeros."""
    monkeypatch.setattr(plan.Plan, "has_head_axis", property(lambda self: False))
    monkeypatch.setattr(plan.Plan, "stores_by_tma", property(lambda self: False))
    init = maps.TensorMap.__init__

    def without_axis(self, *arguments):
        init(self, *arguments)
        self.has_head_axis = False
        self.rank = len(self.box) + 2

    monkeypatch.setattr(maps.TensorMap, "__init__", without_axis)
    _finds(Problem((16, 20), 2, 72, 7, dtype="bfloat16"), _WIDE)


def test_finds_a_missing_rescale(monkeypatch, seed):
    monkeypatch.setattr(softmax.Softmax, "rescale", lambda self: None)
    _finds(*_SMALL)


def test_finds_weighted_sums_that_stay_as_they_are(monkeypatch, seed):
    """While a row's highest score rises by much."""
    monkeypatch.setattr(patient.PatientSoftmax, "rescale", lambda self: None)
    _finds(_SMALL[0], Sm90((4, 16), (4, 16), threshold=8), scale=3.0)


def test_finds_a_threshold_that_is_too_high(monkeypatch, seed):
    """Weights of float16 overflow."""
    config = Sm90((64,), (64,), threshold=60)
    _finds(Problem(300, 1, 64, 129, dtype="float16"), config, scale=3.0)


def test_finds_a_factor_that_rounding_makes_infinite(monkeypatch, seed):
    """Rows that have met no key yet: the factor must be of the products as they were rounded, and so be 1.

    An H100 showed that it matters, at head_dim 256, where contraction left 2^72.
    """

    def factor(self):
        for row in range(2):
            softmax.put(before, row, self.highest[row])
        raise_highest(self)
        for row in range(2):
            softmax.put(self._factor, row, before[row] * self._unit[0] - self._offset[row])
            softmax.emit(products.T.ptx.ex2.approx.ftz.f32(self._factor[row], self._factor[row]))

    def start(self):
        nonlocal before
        before = softmax.local(2)
        begin(self)

    before = None
    begin = softmax.Softmax.start
    monkeypatch.setattr(softmax.Softmax, "start", start)
    raise_highest = softmax.Softmax.raise_highest
    monkeypatch.setattr(softmax.Softmax, "raise_highest", factor)
    _finds(Problem((37, 20), 1, 256, (7, 10), dtype="bfloat16"), Sm90((4, 16), (2, 16)))


def test_finds_turns_out_of_step(monkeypatch, seed):
    """A warpgroup that leaves out tiles must take its turns all the same."""
    monkeypatch.setattr(consumer.Consumer, "_pass_turn", lambda self: None)
    assert "deadlock" in _finds(*_SMALL)


# ---------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"head_dim_v": 264}, "264"),
        ({"dilation": (9, 1)}, "dilation"),
        (
            {
                "border": "shift",
                "layout": (20, 20, 20),
                "kernel_size": 5,
                "stride": 1,
                "dilation": 1,
                "is_causal": False,
                "head_dim": 72,
            },
            "3-D",
        ),
    ],
)
def test_says_what_it_does_not_take(change, reason):
    problem = Problem((64, 64), 2, 64, 7, dtype="bfloat16").replace(**change)
    choice = choose(problem, TARGET, "forward")
    assert not isinstance(choice.config, Sm90)
    assert reason in choice.reason


def test_is_chosen_on_hopper_alone():
    problem = Problem((128, 128), 2, 128, 31, dtype="bfloat16")
    assert isinstance(choose(problem, TARGET, "forward").config, Sm90)
    elsewhere = choose(problem, Target.parse("cuda:sm_80"), "forward")
    assert not isinstance(elsewhere.config, Sm90)
    assert elsewhere.reason is None, "there is nothing to be missed on another GPU"


def test_waste_is_what_the_tiles_come_to():
    """Counted tile by tile, against the planner's product of axes."""
    problem = Problem((40, 33), 1, 64, (9, 12), (1, 4), (1, 2), (False, True), dtype="bfloat16")
    for candidate in candidates(problem, 5):
        made = candidate.config.plan(problem)
        assert candidate.shared_bytes == made.shared_bytes <= plan.SHARED_MEMORY
        assert candidate.waste >= 1
        assert 0 <= candidate.masked <= 1
        assert str(candidate)


def test_blocked_attention_wastes_nothing():
    problem = Problem((256, 256), 24, 128, 80, 16, dtype="bfloat16")
    best = candidates(problem)[0]
    assert best.waste == 1
    assert best.masked == 0
