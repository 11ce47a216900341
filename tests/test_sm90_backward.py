"""`na_compiler.schedules.sm90.backward`: its CUDA in the emulator, against the reference; planted faults; plans."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import replace

import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError, Order
from oracle import check_backward, draw, poisoned, poisoned_parts

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.choose import choose
from na_compiler.schedules.shared import keys
from na_compiler.schedules.sm90 import plan as forward_plan
from na_compiler.schedules.sm90 import products as forward_products
from na_compiler.schedules.sm90.backward import (
    arguments,
    block,
    consumer,
    plan,
    planner,
    producer,
    products,
    statistics,
    weights,
    work,
)
from na_compiler.schedules.sm90.backward.config import Sm90Backward, Sweep
from na_compiler.schedules.sm90.backward.planner import sweeps
from na_compiler.schedules.sm90.family import FAMILY
from na_compiler.target import Target

TARGET = Target.parse("cuda:sm_90a")
# Those that load are the last warps here: in the second order it is they who run right after products were issued.
_ORDERS = (ORDERS[0], Order(late_loads=False, late_products=True, descending=False))


@pytest.fixture(autouse=True)
def _drawn(request, session_seed):
    """About half of the planted faults in a run, other ones in each: it is compiling them that takes long."""
    name = request.node.name
    is_one_of_many = name.startswith(("test_finds", "test_numbers")) and not request.config.getoption("--full")
    if is_one_of_many and zlib.crc32(f"{session_seed} {name}".encode()) % 2:
        pytest.skip("not drawn in this run: --full runs all")


def _config(own, queries, keys, **options):
    """The same tile for both sides, and what streams by for each."""
    split = options.pop("split", False)
    return Sm90Backward(Sweep(own, queries, **options), Sweep(own, keys, **options), split)


# Every parameter of a problem and of a config, by itself and mixed; head_dims with and without padding.
CASES = {
    "2d": (Problem((19, 37), 2, 64, (7, 5), dtype="bfloat16"), _config((4, 16), (8, 16), (8, 8))),
    "2d head_dim 128": (Problem((19, 37), 1, 128, (6, 9), dtype="bfloat16"), _config((4, 16), (8, 8), (8, 8))),
    "2d stride causal": (Problem((24, 21), 1, 64, 9, (4, 5), 1, (True, False), dtype="float16"),
                         _config((4, 16), (4, 16), (4, 16), defer=True)),
    "2d dilated grouped": (Problem((31, 29), 2, 64, 5, 1, (3, 2), heads_kv=1, dtype="float16"),
                           _config((4, 16), (4, 16), (4, 8), warpgroups=1, blocks=2)),
    "1d long": (Problem(300, 2, 64, 129, 8, dtype="bfloat16"), _config((64,), (64,), (32,), stages=3, defer=True)),
    "1d causal grouped": (Problem(300, 4, 64, 65, is_causal=True, heads_kv=2, head_dim_v=128, dtype="bfloat16"),
                          _config((64,), (64,), (48,))),
    "1d dilated": (Problem(530, 1, 32, 20, 3, 8, dtype="bfloat16"), _config((64,), (128,), (32,))),
    "3d": (Problem((5, 7, 17), 2, 80, (3, 5, 4), dtype="bfloat16"), _config((2, 4, 8), (2, 4, 8), (2, 4, 8))),
    "3d dilated additional": (
        Problem((6, 9, 16), 4, 64, 3, (1, 2, 1), (2, 1, 3), (False, True, False), 2, additional_kv=True,
                dtype="bfloat16"),
        _config((2, 4, 8), (2, 4, 8), (2, 4, 8), warpgroups=1, blocks=2)),
    "head_dim 256": (Problem((12, 20), 1, 256, 7, dtype="bfloat16"), _config((4, 16), (4, 8), (2, 16), split=True)),
    "head_dim 72": (Problem((16, 20), 2, 72, 7, head_dim_v=40, dtype="bfloat16"),
                    _config((4, 16), (4, 16), (4, 16), defer=True)),
    "head_dim 16": (Problem((16, 20), 2, 16, 7, head_dim_v=8, dtype="float16"),
                    _config((4, 16), (8, 16), (8, 8), warpgroups=1, blocks=4)),
    "additional": (Problem((16, 20), 2, 64, 7, additional_kv=True, dtype="bfloat16"),
                   _config((4, 16), (4, 16), (4, 16))),
    "skipped tiles": (Problem((40, 20), 1, 64, (5, 7), dtype="bfloat16"),
                      _config((8, 8), (2, 16), (2, 16), stages=3, defer=True)),
    "window of everything": (Problem((14, 14), 2, 32, 7, 1, 2, dtype="float16"),
                             _config((8, 8), (8, 8), (8, 8), warpgroups=1, blocks=4)),
    "one key": (Problem((9, 11), 1, 64, 1, dtype="bfloat16"), _config((8, 8), (4, 8), (4, 8))),
}  # fmt: skip
_ARGUMENTS = {"additional": {"additional": 150, "batch": 2}, "2d": {"batch": 2}, "head_dim 72": {"batch": 2},
              "3d": {"scale": -0.2}}  # fmt: skip
# A few of them in a run.
_SOME = 4


def differentiate(emulator, problem, config, example, *, order, scale=None, inputs=None, grad_output=None, grads=None):
    """Run the emulated backward on poisoned gradients and workspace."""
    inputs = example.inputs if inputs is None else inputs
    batch, additional = inputs[0].shape[0], inputs[3].shape[1] if problem.additional_kv else 0
    shapes = config.workspace(problem, "backward").shapes(batch, additional)
    dtype = inputs[0].dtype
    if grads is None:
        grads = poisoned(*example.inputs)
        if len({tensor.shape for tensor in inputs[:3]}) == 1 and random.random() < 0.5:
            grads[:3], _ = poisoned_parts(*inputs[:3])
    spaces = poisoned(*(torch.empty(shape) for shape in shapes))
    emulator(
        *inputs,
        example.output.to(dtype).contiguous(),
        example.grad_output if grad_output is None else grad_output,
        example.lse.float().contiguous(),
        example.grad_lse,
        problem.head_dim**-0.5 if scale is None else scale,
        *grads,
        *spaces,
        order=order,
    )
    return grads


def emulate(problem, config, *, edit=None, orders=_ORDERS, spreads=False, **arguments):
    """Emulate a problem's backward in some orders, and compare with the reference."""
    arguments.setdefault("lse_has_grad", random.random() < 0.5)
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config), edit)
    example = draw(problem, **arguments)
    for order in orders:
        grads = differentiate(emulator, problem, config, example, order=order, scale=arguments.get("scale"))
        check_backward(example, grads, spreads=spreads)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config, **_ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("number", range(_SOME))
def test_some_match_the_reference(number, session_seed, seed):
    """Some of the cases, other ones in each run, in one of the orders."""
    name = random.Random(session_seed).sample(sorted(CASES), _SOME)[number]
    print(name)
    problem, config = CASES[name]
    emulate(problem, config, orders=[random.choice(_ORDERS)], **_ARGUMENTS.get(name, {}))


def _random_problem():
    """A problem of any parameters, small enough to be emulated."""
    rank = random.choice((1, 2, 3))
    layout, kernel, stride, dilation = [], [], [], []
    for most in {1: (400,), 2: (30, 40), 3: (6, 10, 18)}[rank]:
        length = random.randint(3, most)
        step = random.choice((1, 1, 2, 3)) if length >= 8 else 1
        window = random.randint(1, length // step)
        layout.append(length)
        kernel.append(window)
        dilation.append(step)
        stride.append(random.randint(1, window))
    causal = [random.random() < 0.3 for _ in range(rank)]
    heads_kv = random.choice((1, 2))
    unit = 16 if rank == 3 else 8
    dims = [unit * random.randint(1, 256 // unit) if random.random() < 0.3 else random.choice((32, 64, 128))
            for _ in range(2)]  # fmt: skip
    return Problem(
        tuple(layout), heads_kv * random.choice((1, 2)), dims[0], tuple(kernel), tuple(stride), tuple(dilation),
        tuple(causal), heads_kv, dims[1], random.random() < 0.25, random.choice(("bfloat16", "float16")),
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(1, 40))])
def test_random_problems_with_planned_configs(number, seed):
    """Whatever the planner chooses for whatever it takes."""
    problem = _random_problem()
    print(problem)
    config = FAMILY.choose(problem, TARGET, "backward")
    assert isinstance(config, Sm90Backward)
    emulate(problem, config, orders=[random.choice(_ORDERS)], batch=random.choice((1, 2)))


@pytest.mark.full
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale, seed):
    problem, config = Problem(70, 1, 64, 9, dtype="bfloat16"), _config((64,), (64,), (64,))
    emulate(problem, config, orders=_ORDERS[:1], scale=scale)


def test_no_additional_keys(seed):
    """There is nothing to encode a tensor map of then, and nothing to launch."""
    problem = Problem(70, 1, 64, 9, additional_kv=True, dtype="bfloat16")
    emulate(problem, _config((64,), (64,), (64,)), orders=_ORDERS[:1], additional=0)


def test_views_of_one_projection(seed):
    problem, config = Problem((9, 12), 2, 64, 5, dtype="bfloat16"), _config((4, 16), (4, 16), (4, 16))
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config))
    example = draw(problem, batch=2)
    *views, grad_output = torch.stack([*example.inputs, example.grad_output], dim=-3).unbind(-3)
    assert not views[0].is_contiguous()
    parts, rest = poisoned_parts(*example.inputs)
    grads = differentiate(
        emulator, problem, config, example, order=_ORDERS[1], inputs=views, grad_output=grad_output, grads=parts
    )
    check_backward(example, grads)
    assert rest.isnan().all()


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output", "grad_lse"])
def test_numbers_that_are_not_finite(name, seed):
    """They reach what depends on them, and windows hide them from what does not: up to NaN beside a hidden NaN."""
    problem = Problem(90, 1, 64, 9, dtype="bfloat16")
    number = random.choice([math.nan, math.inf])
    emulate(problem, _config((64,), (64,), (64,)), orders=_ORDERS[:1], spreads=True, spoiled={name: number})


def test_hidden_numbers_may_overflow(seed):
    """Products of tokens that do not see each other: finite inputs leave no trace there."""
    problem, config = Problem(90, 1, 64, 9, dtype="bfloat16"), _config((64,), (64,), (64,))
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config))
    example = draw(problem)
    expected = differentiate(emulator, problem, config, example, order=_ORDERS[0])
    # Of the last token, which the first ones do not see; and theirs.
    example.inputs[2][0, -1] = 3e38
    example.grad_output[0, 0] = 3e38
    grads = differentiate(emulator, problem, config, example, order=_ORDERS[0])
    for grad, before in zip(grads, expected, strict=True):
        assert torch.equal(grad[0, 20:70], before[0, 20:70])
    assert torch.equal(grads[0][0, 20:80], expected[0][0, 20:80])


# ---------------------------------------------------------------------------------------------- planted faults
# Narrow, because it is the generated code that takes long to compile; each has a tile more than stages.
_SMALL = Problem((19, 37), 1, 32, (7, 5), dtype="bfloat16"), _config((4, 16), (4, 16), (4, 16))
_LONG = Problem(300, 1, 32, 129, dtype="bfloat16"), _config((64,), (64,), (64,))


def _finds(problem, config, **options):
    """Whether the emulator or the comparison finds a fault."""
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(problem, config, **options)
    assert "was not planted" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("case", [_SMALL, _LONG], ids=["small", "long"])
def test_fault_free_is_right(case, seed):
    emulate(*case, orders=_ORDERS[:1])


def test_finds_statistics_that_begin_anywhere(monkeypatch, seed):
    """TMA's innermost coordinate; on an H100 this was an illegal instruction."""
    monkeypatch.setattr(work.KeyWork, "begin", lambda self, axis, low: low)
    assert "multiple of 16" in _finds(*_SMALL, orders=_ORDERS[:1])


@pytest.mark.parametrize("name", ["own", "first", "second", "first_empty", "second_empty"])
def test_finds_a_missing_wait_for_a_barrier(name, monkeypatch, seed):
    wait = block.SweepBlock.wait
    monkeypatch.setattr(block.SweepBlock, "wait", lambda self, which, *rest: which == name or wait(self, which, *rest))
    problem, config = _SMALL
    # Only sums of values give the first tensor's tiles back before the second's.
    _finds(problem, replace(config, split=name == "second_empty"))


@pytest.mark.parametrize("pending", [0, 1])
def test_finds_a_missing_wait_for_products(pending, seed):
    name = f"tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_{pending}();"
    _finds(*_SMALL, edit=lambda text: text.replace(name, ";"), orders=_ORDERS[1:])


def test_finds_an_early_release(monkeypatch, seed):
    """Tiles given back when the gradients of weights are there, while sums still read them."""
    monkeypatch.setattr(consumer.SweepConsumer, "_early", property(lambda self: (0, 1)))
    monkeypatch.setattr(consumer.SweepConsumer, "_late", property(lambda self: ()))
    _finds(*_LONG)


def test_finds_operands_overwritten_too_early(monkeypatch, seed):
    """Weights packed before the product that reads the last ones is complete."""
    problem, config = Problem(300, 1, 32, 129, dtype="bfloat16"), _config((64,), (64,), (32,), stages=3, defer=True)
    wait = products.SweepProducts.wait.__func__

    def late(cls, pending, *registers):
        return None if pending == 1 else wait(cls, pending, *registers)

    monkeypatch.setattr(products.SweepProducts, "wait", classmethod(late))
    _finds(problem, config, orders=_ORDERS[1:])


@pytest.mark.parametrize("axis", [0, 1])
def test_finds_a_wrong_mask(axis, monkeypatch, seed):
    """A window one token too long along one axis."""
    bits = weights.Window._bits
    monkeypatch.setattr(
        weights.Window, "_bits", lambda self, which, start, extent: bits(self, which, start, extent + (which == axis))
    )
    _finds(*_SMALL, orders=_ORDERS[:1])


def test_finds_a_mask_left_out(monkeypatch, seed):
    """Tiles taken for whole that begin before the window; short windows have no such tile."""
    monkeypatch.setattr(weights, "both", lambda *conditions: next(c for c in reversed(conditions) if c is not None))
    _finds(*_LONG, orders=_ORDERS[:1])


@pytest.mark.parametrize("end", [0, 1])
def test_finds_wrong_queries_of_a_key(end, monkeypatch, seed):
    """The inverse of the window rule off by one, where nothing is masked."""
    bounds = keys.query_bounds

    def wrong(*given, **options):
        found = list(bounds(*given, **options))
        found[end] = found[end] + 1 if end == 0 else found[end] - 1
        return tuple(found)

    monkeypatch.setattr(keys, "query_bounds", wrong)
    _finds(*_LONG, orders=_ORDERS[:1])


def test_finds_a_read_before_a_choice(monkeypatch):
    """Of a gradient of lse, for a row that does not exist: guards of tensors see it in few layouts."""
    monkeypatch.setattr(statistics, "register", lambda value, dtype="int32": value)
    problem, config = CASES["2d dilated grouped"]
    with pytest.raises(EmulatorError, match="before it chooses"):
        Emulator.of(KernelSpec(problem, "backward", TARGET, config))


def test_finds_a_wrong_plane_of_statistics(monkeypatch, seed):
    plane = block.SweepBlock.plane
    monkeypatch.setattr(block.SweepBlock, "plane", lambda self, stage, number: plane(self, stage, 1 - number))
    init = producer.SweepProducer._statistics

    def straight(self, *given):
        with monkeypatch.context() as inner:
            inner.setattr(block.SweepBlock, "plane", plane)
            init(self, *given)

    monkeypatch.setattr(producer.SweepProducer, "_statistics", straight)
    _finds(*_SMALL, orders=_ORDERS[:1])


def test_finds_a_wrong_descriptor(monkeypatch, seed):
    """Boxes of columns at a wrong distance, where an operand is read across its rows."""
    made = products.descriptor
    monkeypatch.setattr(
        products, "descriptor", lambda buffer, place, leading, columns: made(buffer, place, leading // 2 or 1, columns)
    )
    _finds(Problem(70, 1, 128, 9, dtype="bfloat16"), _config((64,), (64,), (64,)), orders=_ORDERS[:1])


def test_finds_a_wrong_head(monkeypatch, seed):
    """Keys that are shared collect from one query head only, again and again."""
    monkeypatch.setattr(work.QueryCursor, "_step", work.StreamCursor._step)
    problem = Problem(70, 2, 64, 9, heads_kv=1, dtype="bfloat16")
    _finds(problem, _config((64,), (64,), (64,)), orders=_ORDERS[:1])


def test_finds_statistics_in_the_wrong_place(monkeypatch, seed):
    """Those of the second batch entry."""
    monkeypatch.setattr(arguments, "PLANES", 1)
    _finds(*_SMALL, orders=_ORDERS[:1], batch=2)


def test_finds_results_in_the_place_of_others(monkeypatch, seed):
    """Both results where the first one's rows were."""
    monkeypatch.setattr(plan.SweepPlan, "own_offset", lambda self, which: 0)
    _finds(*_SMALL, orders=_ORDERS[:1])


def test_reports_a_deadlock(monkeypatch, seed):
    """A release that never comes."""
    arrive = block.SweepBlock.arrive
    monkeypatch.setattr(
        block.SweepBlock, "arrive", lambda self, which, *rest: which == "second_empty" or arrive(self, which, *rest)
    )
    assert "deadlock" in _finds(*_LONG, orders=_ORDERS[:1])


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
    choice = choose(problem, TARGET, "backward")
    assert choice.config.family != "sm90"
    assert reason in choice.reason


def test_candidates_fit():
    problem = Problem((40, 33), 1, 64, (9, 12), (1, 4), (1, 2), (False, True), dtype="bfloat16")
    found = FAMILY.candidates(problem, TARGET, "backward", 5)
    assert found[0].config == FAMILY.choose(problem, TARGET, "backward")
    for candidate in found:
        made = candidate.config.plan(problem)
        assert all(sweep.shared_bytes <= forward_plan.SHARED_MEMORY for sweep in made.sweeps)
        assert candidate.waste >= 1
        assert str(candidate)
        assert candidate.columns()


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_waste_is_what_the_tiles_come_to(side):
    """Counted tile by tile, against the planner's product of axes."""
    problem = Problem((21, 33), 2, 64, (5, 12), (1, 4), (1, 2), (False, True), dtype="bfloat16")
    results = ("grad_query",) if side == "queries" else ("grad_key", "grad_value")
    for candidate in sweeps(problem, side, results)[:3]:
        made = plan.SweepPlan(problem, candidate.sweep, side, results)
        assert candidate.waste * problem.pairs() % (64 * made.streamed) == pytest.approx(0, abs=1e-6)
        assert 0 <= candidate.masked <= 1


def test_blocked_attention_wastes_nothing():
    problem = Problem((256, 256), 24, 128, 80, 16, dtype="bfloat16")
    best = planner.candidates(problem, 1)[0]
    assert best.queries.waste == 1
    assert best.keys.waste < 1.02


def test_products_are_shared_with_the_forward():
    assert products.multiply_shared is forward_products.multiply_shared
