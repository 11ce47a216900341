"""The descriptions of `na_compiler.schedules.cpu`, compiled as they are, without a schedule: slow and right.

Cut trivially (a query a tile, a tile a task) they say what neighborhood attention is; cut otherwise they must say
the same.
"""

import itertools

import pytest
import torch
from oracle import check_backward, check_forward, check_tangents, draw, draw_tangents, poisoned

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import make_kernel
from na_compiler.schedules.cpu.config import QueriesInLanes
from na_compiler.schedules.cpu.plan import Tiling, TilingPlan
from na_compiler.target import Target

WHOLE = Tiling()
TILED = Tiling(
    tile=(1, 2, 4), patch=(1, 1, 2), strip=(1, 2, 2), key_block=(1, 1, 2), vector=4, additional_block=4, grad_block=2
)
CHUNKED = Tiling(
    tile=(2, 1, 4), patch=(2, 1, 1), strip=(1, 2, 1), chunk=(1, 3, 4), key_block=(1, 1, 2), vector=4, additional_block=2
)

PROBLEMS = [
    Problem(37, 1, 3, 7, 3, 3, head_dim_v=5),
    Problem((9, 11), 4, 8, (3, 5), (1, 2), (2, 1), (False, True), 2, 6, additional_kv=True),
    Problem((5, 6, 7), 2, 4, (3, 2, 5), (2, 1, 3), (1, 2, 1), (True, False, False)),
]


@pytest.mark.parametrize("extents", [(1, 1, 1, 1), (2, 3, 1, 4), (3, 1, 5, 2)])
def test_the_place_after_one_is_the_next_that_loops_visit(extents):
    pytest.importorskip("tvm")
    from na_compiler.schedules.cpu.steps import following

    places = list(itertools.product(*map(range, extents)))
    for place, after in zip(places, [*places[1:], places[-1]], strict=True):
        assert tuple(following(place, extents)) == after


@pytest.mark.parametrize("direction", ["forward", "backward", "tangent"])
@pytest.mark.parametrize("tiling", [WHOLE, TILED, CHUNKED], ids=["whole", "tiled", "chunked"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_description_is_right_as_it_is(problem, tiling, direction, seed):
    tvm = pytest.importorskip("tvm")
    from na_compiler.schedules.cpu.backward import backward
    from na_compiler.schedules.cpu.forward import forward
    from na_compiler.schedules.cpu.tangent import tangent

    plan = TilingPlan.make(problem, tiling)
    description = {"forward": forward, "backward": backward, "tangent": tangent}[direction](plan)
    module = tvm.compile(description, target="llvm")
    spec = KernelSpec(problem, direction, Target.parse("llvm"), QueriesInLanes(tiling, 1))
    kernel = make_kernel(spec.info, module["main"])
    example = draw(problem, batch=2)
    if direction == "forward":
        output, lse = poisoned(example.output.float(), example.lse.float())
        kernel.function(*example.inputs, problem.head_dim**-0.5, output, lse)
        check_forward(example, output, lse)
    elif direction == "tangent":
        tangents = draw_tangents(example)
        results = poisoned(*(example.output.float(), example.lse.float()) * 2)
        kernel.function(*example.inputs, *tangents.inputs, problem.head_dim**-0.5, *results)
        check_forward(example, *results[:2])
        check_tangents(tangents, *results[2:])
    else:
        lse = example.lse.float().contiguous()
        grads = kernel(
            *example.inputs[:3], example.output.float().contiguous(), lse, example.grad_output, example.grad_lse,
            *example.additional,
        )  # fmt: skip
        check_backward(example, grads)


def test_extents_cover_what_every_tile_needs():
    """The static boxes hold every window, wherever a tile lies."""
    for layout, kernel, stride, dilation, causal in [
        (37, 7, 1, 1, False), (37, 7, 3, 1, False), (40, 6, 2, 3, False), (41, 9, 4, 2, True), (16, 16, 5, 1, False),
    ]:  # fmt: skip
        for tile in (1, 2, 4, 16):
            plan = TilingPlan.make(
                Problem(layout, 1, 8, kernel, stride, dilation, causal), Tiling(tile=(1, 1, tile), strip=(1, 1, 2))
            )
            axis = plan.axes[-1]
            from na_compiler.window import group_length, window_bounds

            for group in range(dilation):
                length = group_length(layout, dilation, group)
                bounds = [window_bounds(i, length, kernel, stride, causal) for i in range(length)]
                for first in range(0, length, tile):
                    some = bounds[first : first + tile]
                    assert max(end for _, end in some) - some[0][0] <= axis.tile_box
                for first in range(0, length, 2 * tile):
                    some = bounds[first : first + 2 * tile]
                    assert max(end for _, end in some) - some[0][0] <= axis.strip_box


def test_exponential_and_logarithm():
    """Accurate where they are used, and a weight of exactly 0 for what is hidden."""
    tvm = pytest.importorskip("tvm")
    from tvm.tirx.script import builder as T

    from na_compiler.tensorir.arithmetic import LOWEST, exp2, log2
    from na_compiler.tensorir.blocks import block, prim_func

    count = 4096

    def body(x, y, z):
        with block("all", (count,)) as (i,):
            T.buffer_store(y, exp2(x[i]), [i])
        with block("back", (count,)) as (i,):
            T.buffer_store(z, log2(T.max(y[i], T.float32(1e-30))), [i])

    tensor = {"shape": (count,), "dtype": "float32", "align": 4}
    function = tvm.compile(prim_func({"x": tensor, "y": tensor, "z": tensor}, body), target="llvm")["main"]
    x = torch.cat([torch.linspace(-100, 0, count - 4), torch.tensor([-127.0, -1000.0, LOWEST, -float("inf")])])
    y, z = poisoned(x, x)
    function(x, y, z)
    exact = torch.exp2(x.double())
    assert ((y.double() - exact).abs() / exact)[:-4].max() < 4e-7
    assert (y[-4:] == 0).all()
    assert (z[:-4].double() - torch.log2(y[:-4].double().clamp(min=1e-30))).abs().max() < 1e-5
