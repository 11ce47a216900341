"""Nodes of ONNX whose layouts no bundle lists, by the operator library in C++ and a kernel for an open layout."""

import random

import pytest
from onnx_models import Forward, feeds, one_node, run
from onnx_sessions import make_bundle, open_session, refused
from place_draws import draw_layout

from na_compiler.problem import Problem

RULES = [
    Problem((8, 9), 4, 8, (3, 4), (2, 1), (1, 2), (False, True), heads_kv=2),
    Problem(20, 2, 8, 5, additional_kv=True),
    Problem((5, 6, 7), 2, 8, 3, dilation=(1, 2, 1)),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    problems = [*(problem.opened() for problem in RULES), RULES[0]]
    return make_bundle(tmp_path_factory.mktemp("open") / "bundle", problems)


@pytest.mark.parametrize("problem", RULES, ids=str)
def test_sizes_that_are_in_no_list(problem, bundle, seed):
    made = open_session(one_node(problem, body=None, dynamic_layout=True), bundle)
    for layout in [problem.layout, *(draw_layout(problem).layout for _ in range(6))]:
        example = Forward(problem.replace(layout=layout), batch=random.randint(1, 2))
        example.check(*run(made, feeds(example.inputs)))


def test_what_is_smaller_than_a_window_is_refused(bundle, seed):
    problem = RULES[1]
    made = open_session(one_node(problem, body=None, dynamic_layout=True), bundle)
    example = Forward(problem)
    small = [tensor[:, :4] for tensor in example.inputs[:3]]
    with refused("kernel_size . dilation must be at most the layout's 4 tokens on axis 0"):
        run(made, feeds([*small, *example.inputs[3:]]))


def test_rules_that_no_kernel_has_are_refused(bundle, seed):
    problem = RULES[0].replace(kernel_size=(2, 4))
    made = open_session(one_node(problem, body=None, dynamic_layout=True), bundle)
    with refused("has 4 kernels for other problems"):
        run(made, feeds(Forward(problem).inputs))
