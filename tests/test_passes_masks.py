"""`na_compiler.passes.masks`: a mask is recognised when it is exactly a neighborhood, and only then."""

import random
from functools import reduce

import numpy as np
import pytest

from na_compiler.passes.masks import Neighborhood, axis_mask, recognize


def make(found):
    columns = zip(found.layout, found.kernel_size, found.stride, found.dilation, found.is_causal, strict=True)
    return reduce(np.kron, [axis_mask(*axis) for axis in columns])


MASKS = [
    Neighborhood((24,), (7,), (1,), (1,), (False,)),
    Neighborhood((24,), (6,), (4,), (1,), (False,)),
    Neighborhood((25,), (3,), (2,), (4,), (False,)),
    Neighborhood((24,), (5,), (1,), (1,), (True,)),
    Neighborhood((23,), (7,), (3,), (2,), (True,)),
    Neighborhood((24,), (24,), (1,), (1,), (True,)),
    Neighborhood((6, 8), (3, 5), (1, 1), (1, 1), (False, False)),
    Neighborhood((8, 6), (4, 3), (2, 1), (2, 1), (False, True)),
    Neighborhood((4, 5, 6), (3, 2, 5), (1, 2, 1), (1, 1, 1), (True, False, False)),
]


@pytest.mark.parametrize("neighborhood", MASKS, ids=str)
def test_recognizes(neighborhood):
    mask = make(neighborhood)
    found = recognize(mask)
    assert found is not None
    # Other parameters may make the same mask: what counts is that these make this one.
    assert np.array_equal(make(found), mask)


@pytest.mark.parametrize("neighborhood", MASKS, ids=str)
def test_one_wrong_element_is_enough(neighborhood, seed):
    mask = make(neighborhood)
    for _ in range(3):
        wrong = mask.copy()
        query, key = random.randrange(len(mask)), random.randrange(len(mask))
        wrong[query, key] ^= True
        found = recognize(wrong)
        assert found is None or np.array_equal(make(found), wrong)
        assert found != recognize(mask)


def test_leaves_others_alone(seed):
    assert recognize(np.ones((9, 9), bool)) is None  # Dense attention.
    assert recognize(np.ones((8, 9), bool)) is None
    assert recognize(np.eye(9, k=1, dtype=bool)) is None
    assert recognize(np.random.default_rng(seed).random((24, 24)) < 0.5) is None
    # A band that is not clamped at the borders: as many masks of sliding windows are.
    distance = np.abs(np.subtract.outer(np.arange(24), np.arange(24)))
    assert recognize(distance <= 3) is None


def test_an_even_larger_mask_takes_no_time():
    mask = make(Neighborhood((8, 16, 12), (3, 5, 7), (1, 1, 1), (1, 2, 1), (True, False, False)))
    found = recognize(mask)
    assert found is not None
    assert found.layout == (8, 16, 12)
