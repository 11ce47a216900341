"""`na_compiler.schedules.mma.backward`: its CUDA in the emulator, against the reference; planted faults; plans."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError
from draws import some
from oracle import check_backward, draw, poisoned, poisoned_parts

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.choose import choose
from na_compiler.schedules.mma.backward import lists, planner, products, statistics, strips, sweep, weights
from na_compiler.schedules.mma.backward.config import MmaBackward
from na_compiler.schedules.mma.backward.sweep_config import Sweep
from na_compiler.schedules.mma.boxes import largest_inverse
from na_compiler.schedules.shared import keys
from na_compiler.target import Target
from na_compiler.window import query_bounds

TARGET = Target.parse("cuda:sm_80")


def _config(warp_box, warps, queries=None, keys=None, *, split=False, **options):
    """The same boxes for both kernels, and the tiles that stream by in each: all at once, or in a ring."""
    return MmaBackward(Sweep(warp_box, warps, queries, **options), Sweep(warp_box, warps, keys, **options), split)


# Every parameter of a problem and of a config, by itself and mixed, both in a ring and with all tokens at once.
CASES = {
    "2d": (Problem((19, 37), 2, 64, (7, 5), dtype="bfloat16"), _config((4, 4), (2, 2))),
    "2d ring": (Problem((19, 37), 1, 64, (7, 5), dtype="bfloat16"),
                _config((4, 4), (2, 2), (3, 14), (2, 20), stages=3)),
    "2d one stage": (Problem((19, 37), 1, 32, (7, 5), 2, dtype="bfloat16"), _config((4, 4), (2, 2), (3, 5), (4, 7))),
    "2d stride causal": (Problem((24, 21), 1, 64, 9, (4, 5), 1, (True, False), dtype="float16"),
                         _config((2, 8), (2, 2), chunk=1)),
    "2d dilated grouped": (Problem((31, 19), 4, 32, 5, 1, (3, 2), heads_kv=2, dtype="float16"),
                           _config((4, 4), (1, 2))),
    "2d grouped ring": (Problem((29, 17), 4, 32, (7, 5), heads_kv=2, dtype="bfloat16"),
                        _config((4, 4), (2, 2), (3, 8), (4, 7), stages=2)),
    "window of everything": (Problem((14, 14), 2, 32, 7, 1, 2, dtype="float16"), _config((4, 4), (1, 2), chunk=3)),
    "1d": (Problem(300, 2, 64, 29, 8, dtype="bfloat16"), _config((16,), (4,))),
    "1d causal grouped ring": (
        Problem(300, 4, 32, 65, is_causal=True, heads_kv=2, head_dim_v=64, dtype="bfloat16"),
        _config((16,), (4,), (32,), (48,), chunk=4, stages=2)),
    "3d": (Problem((5, 7, 17), 1, 80, (3, 5, 4), dtype="bfloat16"), _config((2, 2, 4), (2, 2, 1))),
    "3d dilated": (Problem((6, 9, 16), 1, 64, 3, (1, 2, 1), (2, 1, 3), (False, True, False), dtype="bfloat16"),
                   _config((2, 2, 4), (1, 2, 2))),
    "3d ring": (Problem((9, 11, 13), 1, 32, (5, 5, 7), dtype="bfloat16"),
                _config((2, 2, 4), (2, 1, 2), (2, 4, 9), (1, 9, 16), stages=2)),
    "head_dim 128": (Problem((12, 20), 1, 128, 7, dtype="bfloat16"), _config((4, 4), (1, 2))),
    "head_dim 256": (Problem((12, 20), 1, 256, 7, dtype="bfloat16"), _config((4, 4), (1, 1), split=True, chunk=1)),
    "head_dim 72": (Problem((16, 20), 2, 72, 7, head_dim_v=40, dtype="bfloat16"), _config((4, 4), (1, 2))),
    "head_dim 8": (Problem((16, 20), 2, 8, 7, head_dim_v=24, dtype="float16"), _config((4, 4), (1, 1))),
    "additional": (Problem((12, 17), 2, 32, 5, additional_kv=True, dtype="bfloat16"), _config((4, 4), (1, 2))),
    "additional 3d grouped ring": (
        Problem((6, 9, 16), 4, 32, 3, (1, 2, 1), (2, 1, 3), (False, True, False), 2, 64, additional_kv=True,
                dtype="bfloat16"),
        _config((2, 2, 4), (1, 2, 2), (1, 5, 4), (2, 3, 4), stages=2)),
    "additional head_dim 256": (Problem((9, 12), 1, 256, 5, additional_kv=True, dtype="bfloat16"),
                                _config((4, 4), (1, 1), split=True, chunk=1)),
    "one token": (Problem(1, 1, 8, 1, dtype="bfloat16"), _config((16,), (1,))),
}  # fmt: skip
_ARGUMENTS = {"window of everything": {"batch": 2, "lse_has_grad": False}, "3d": {"scale": -0.2},
              "additional": {"additional": 70, "batch": 2}}  # fmt: skip


def differentiate(emulator, problem, config, example, *, order, scale=None, inputs=None, grad_output=None, grads=None):
    """Run the emulated backward on poisoned gradients and workspace."""
    inputs = example.inputs if inputs is None else inputs
    additional = inputs[3].shape[1] if problem.additional_kv else 0
    shapes = config.workspace(problem, "backward").shapes(inputs[0].shape[0], additional)
    if grads is None:
        # The gradient of biases is float32, and one for each batch entry.
        grads = poisoned(*example.inputs, *(grad.float() for grad in example.grads[len(example.inputs) :]))
        if len({tensor.shape for tensor in inputs[:3]}) == 1 and random.random() < 0.5:
            grads[:3], _ = poisoned_parts(*inputs[:3])
    spaces = poisoned(*(torch.empty(shape) for shape in shapes))
    emulator(
        *inputs,
        *example.others.values(),
        example.output.to(inputs[0].dtype).contiguous(),
        example.grad_output if grad_output is None else grad_output,
        example.lse.float().contiguous(),
        example.grad_lse,
        problem.head_dim**-0.5 if scale is None else scale,
        *grads,
        *spaces,
        order=order,
    )
    return grads


def emulate(problem, config, *, edit=None, orders=ORDERS, spreads=False, **arguments):
    """Emulate a problem's backward in some orders, and compare with the reference."""
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config), edit)
    example = draw(problem, **arguments)
    for order in orders:
        grads = differentiate(emulator, problem, config, example, order=order, scale=arguments.get("scale"))
        check_backward(example, grads, spreads=spreads)


# Half a minute to two each.
_HEAVY = ("additional 3d grouped ring", "head_dim 256", "2d grouped ring")


@pytest.mark.parametrize(
    "name",
    [
        *some([name for name in CASES if name not in _HEAVY], 4, "mma backward"),
        *(pytest.param(name, marks=pytest.mark.full) for name in _HEAVY),
    ],
)
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config, **_ARGUMENTS.get(name, {}))


def _random_problem():
    """A problem of any parameters, small enough to be emulated."""
    rank = random.choice((1, 2, 3))
    layout, kernel, stride, dilation = [], [], [], []
    for most in {1: (300,), 2: (20, 30), 3: (6, 8, 14)}[rank]:
        length = random.randint(3, most)
        step = random.choice((1, 1, 2, 3)) if length >= 8 else 1
        window = random.randint(1, length // step)
        layout.append(length)
        kernel.append(window)
        dilation.append(step)
        stride.append(random.randint(1, window))
    causal = [random.random() < 0.3 for _ in range(rank)]
    heads_kv = random.choice((1, 2))
    dims = [8 * random.randint(1, 32) if random.random() < 0.2 else random.choice((32, 64)) for _ in range(2)]
    return Problem(
        tuple(layout), heads_kv * random.choice((1, 2)), dims[0], tuple(kernel), tuple(stride), tuple(dilation),
        tuple(causal), heads_kv, dims[1], random.random() < 0.25, random.choice(("bfloat16", "float16")),
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.full) for number in range(1, 40))])
def test_random_problems_with_planned_configs(number, seed):
    """Whatever is planned for whatever is taken: one of the best, so that others are met than those that are chosen."""
    problem = _random_problem()
    found = planner.candidates(problem, TARGET.shared_memory, 20)
    config = random.choice(found).config
    print(problem, config)
    emulate(problem, config, orders=[random.choice(ORDERS)])


@pytest.mark.parametrize("scale", some([0.0, -0.5, 3.0], 1, "scale"))
def test_any_scale(scale, seed):
    emulate(Problem(70, 1, 32, 9, dtype="bfloat16"), _config((16,), (2,)), orders=ORDERS[:1], scale=scale)


def test_additional_keys_that_fill_no_step(seed):
    """Words of the mask beyond the last of them hide all."""
    problem = Problem(70, 1, 32, 9, additional_kv=True, dtype="bfloat16")
    emulate(problem, _config((16,), (2,), chunk=4), orders=ORDERS[:1], additional=5)


def test_no_additional_keys(seed):
    """There is nothing to launch for them then."""
    problem = Problem(70, 1, 32, 9, additional_kv=True, dtype="bfloat16")
    emulate(problem, _config((16,), (2,)), orders=ORDERS[:1], additional=0)


def test_views_of_one_projection(seed):
    problem, config = Problem((9, 12), 2, 32, 5, dtype="bfloat16"), _config((4, 4), (1, 2))
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config))
    example = draw(problem, batch=2)
    *views, grad_output = torch.stack([*example.inputs, example.grad_output], dim=-3).unbind(-3)
    assert not views[0].is_contiguous()
    parts, rest = poisoned_parts(*example.inputs)
    grads = differentiate(
        emulator, problem, config, example, order=ORDERS[1], inputs=views, grad_output=grad_output, grads=parts
    )
    check_backward(example, grads)
    assert rest.isnan().all()


@pytest.mark.parametrize("name", some(["query", "key", "value", "grad_output", "grad_lse"], 2, "finite"))
def test_numbers_that_are_not_finite(name, seed):
    """They reach what depends on them, and windows hide them from what does not: up to NaN beside a hidden NaN."""
    problem, number = Problem(90, 1, 32, 9, dtype="bfloat16"), random.choice([math.nan, math.inf])
    emulate(problem, _config((16,), (2,)), orders=ORDERS[:1], spreads=True, spoiled={name: number})


def test_hidden_numbers_may_overflow(seed):
    """Products of tokens that do not see each other: finite inputs leave no trace there."""
    problem, config = Problem(90, 1, 32, 9, dtype="bfloat16"), _config((16,), (2,), (48,), (48,))
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config))
    example = draw(problem)
    expected = differentiate(emulator, problem, config, example, order=ORDERS[0])
    # Of the last token, which the first ones do not see; and theirs.
    example.inputs[2][0, -1] = 3e38
    example.grad_output[0, 0] = 3e38
    grads = differentiate(emulator, problem, config, example, order=ORDERS[0])
    for grad, before in zip(grads, expected, strict=True):
        assert torch.equal(grad[0, 20:70], before[0, 20:70])
    assert torch.equal(grads[0][0, 20:80], expected[0][0, 20:80])


# ---------------------------------------------------------------------------------------------- planted faults
_KEPT = Problem((13, 21), 1, 32, (7, 5), dtype="bfloat16"), _config((4, 4), (2, 2))
_RING = _KEPT[0], _config((4, 4), (2, 2), (4, 12), (4, 14), stages=3)


def _finds(problem, config, **options):
    """Whether the emulator or the comparison finds a fault."""
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(problem, config, **options)
    assert "was not planted" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("case", [_KEPT, _RING], ids=["kept", "ring"])
def test_fault_free_is_right(case, seed):
    emulate(*case)


_PENDING = [(_RING, 2), (_RING, 1), (_KEPT, 1), (_KEPT, 0)]


@pytest.mark.parametrize(("case", "pending"), some(_PENDING, 1, "pending"))
def test_finds_a_wait_for_too_few_copies(case, pending, seed):
    """What a warp owns, and tiles that stream by, have a wait of their own."""
    name = "tvm_builtin_ptx_cp_async_wait_group_async_wait_group_{}();"
    _finds(*case, edit=lambda text: text.replace(name.format(pending), name.format(pending + 1)))


@pytest.mark.parametrize("case", some([(_RING,), (_KEPT,)], 1, "barrier"))
def test_finds_a_missing_barrier(case, seed):
    name = "tvm_builtin_cuda_cta_sync();"
    _finds(*case, edit=lambda text: text.replace(name, "tvm_builtin_cuda_warp_sync();"))


def test_finds_tables_read_while_they_are_written(monkeypatch, seed):
    """The emulator runs a warp's lanes one after another, up to where they meet."""
    monkeypatch.setattr(sweep.SweepBlock, "sync_warp", staticmethod(lambda: None))
    _finds(*_KEPT)


@pytest.mark.parametrize("which", some(["LOAD", "LOAD_TRANSPOSED"], 1, "matrices"))
def test_finds_matrices_read_the_other_way(which, monkeypatch, seed):
    other = {"LOAD": products.LOAD_TRANSPOSED, "LOAD_TRANSPOSED": products.LOAD}
    monkeypatch.setattr(products, which, other[which])
    _finds(*_KEPT, orders=ORDERS[:1])


def test_finds_a_wrong_swizzle_of_lists(monkeypatch, seed):
    swizzled = lists.swizzled
    monkeypatch.setattr(lists, "swizzled", lambda row, tile: lists.T.bitwise_xor(swizzled(row, tile), 1))
    _finds(*_KEPT, orders=ORDERS[:1])


@pytest.mark.parametrize("end", some([0, 1], 1, "stretch"))
def test_finds_a_wrong_stretch(end, monkeypatch, seed):
    """A window one token too long along the last axis."""
    line = lists.WindowLists._line

    def longer(self, place, window, extent):
        moved = [at + (number == end) * (2 * end - 1) for number, at in enumerate(window)]
        return line(self, place, moved, extent)

    monkeypatch.setattr(lists.WindowLists, "_line", longer)
    _finds(*_KEPT, orders=ORDERS[:1])


@pytest.mark.parametrize("name", some(["exponentiate", "differentiate", "clear"], 1, "weights"))
def test_finds_a_step_left_out(name, monkeypatch, seed):
    monkeypatch.setattr(weights.Weights, name, lambda self, *rest: None)
    _finds(*_KEPT, orders=ORDERS[:1])


def test_finds_strips_of_other_queries(monkeypatch, seed):
    """A strip one tile too long: its last one is counted twice."""
    problem, config = CASES["additional"]
    init = strips.StripWork.__init__

    def longer(self, *given):
        init(self, *given)
        self.end = self.end + 1

    monkeypatch.setattr(strips.StripWork, "__init__", longer)
    _finds(problem.replace(heads=64, heads_kv=64, head_dim=8, head_dim_v=8), config, orders=ORDERS[:1])


@pytest.mark.parametrize("end", some([0, 1], 1, "queries of a key"))
def test_finds_wrong_queries_of_a_key(end, monkeypatch, seed):
    """The inverse of the window rule off by one."""
    bounds = keys.query_bounds

    def wrong(*given, **options):
        found = list(bounds(*given, **options))
        found[end] = found[end] + 1 if end == 0 else found[end] - 1
        return tuple(found)

    monkeypatch.setattr(keys, "query_bounds", wrong)
    _finds(*_KEPT, orders=ORDERS[:1])


def test_finds_statistics_of_other_queries(monkeypatch, seed):
    at = statistics.Statistics.at
    monkeypatch.setattr(statistics.Statistics, "at", lambda self, places: at(self, [*places[:-1], places[-1] ^ 1]))
    copy = sweep.Sweep._copy_statistics

    def straight(self, *given):
        with monkeypatch.context() as inner:
            inner.setattr(statistics.Statistics, "at", at)
            copy(self, *given)

    monkeypatch.setattr(sweep.Sweep, "_copy_statistics", straight)
    _finds(_KEPT[0].replace(layout=(13, 22)), _KEPT[1], orders=ORDERS[:1])


# ---------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
@pytest.mark.parametrize("problem", [
    Problem((56, 56), 4, 32, 7, dtype="float16"),
    Problem((16, 32, 48), 16, 64, 11, dtype="bfloat16"),
    Problem((256, 256), 24, 128, 80, dtype="bfloat16"),
    Problem(32768, 24, 256, 2048, is_causal=True, heads_kv=4, dtype="bfloat16"),
])  # fmt: skip
def test_is_chosen_where_there_is_no_better_one(problem, architecture):
    target = Target.parse(f"cuda:{architecture}")
    choice = choose(problem, target, "backward")
    assert isinstance(choice.config, MmaBackward), choice.reason
    assert choice.config.plan(problem).shared_bytes <= target.shared_memory


@pytest.mark.parametrize(("layout", "window", "head_dim", "family"), [
    ((56, 56), 7, 32, "mma"), ((32, 32, 32), 3, 32, "mma"), ((64, 64), 13, 64, "sm90"), ((256, 256), 80, 128, "sm90"),
])  # fmt: skip
def test_competes_with_hopper_by_estimates(layout, window, head_dim, family):
    """Measured: 303 and 449 microseconds, 116 and 231, 188 and 166; long windows are sm90's by far."""
    problem = Problem(layout, 4, head_dim, window, dtype="float16")
    assert choose(problem, Target.parse("cuda:sm_90a"), "backward").config.family == family


def test_the_largest_inverse_is_that_of_all_boxes(seed):
    for _ in range(300):
        length = random.randint(1, 60)
        kernel = random.randint(1, length)
        stride, causal, extent = random.randint(1, kernel), random.random() < 0.5, random.choice([1, 2, 4, 8, 16])
        rule = (length, kernel, stride, causal)
        spans = []
        for first in range(0, length, extent):
            last = min(first + extent, length) - 1
            spans.append(query_bounds(last, *rule)[1] - query_bounds(first, *rule)[0])
        assert largest_inverse(*rule, extent) == max(spans), (length, kernel, stride, causal)


def test_plans_take_milliseconds_for_any_layout():
    problem = Problem((1 << 12, 1 << 10, 1 << 10), 4, 64, (3, 7, 7), dtype="bfloat16")
    began = time.process_time()
    assert planner.candidates(problem, TARGET.shared_memory)
    assert time.process_time() - began < 0.5
