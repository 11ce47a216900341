"""`na_compiler.passes.masks`: a mask is recognised when it is exactly a neighborhood, and only then."""

import random
import time
from functools import reduce

import numpy as np
import pytest

from na_compiler.passes.masks import Neighborhood, Search, axis_mask, recognize


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


def documents(tokens, ends):
    """Return the mask of causal attention inside documents that are packed one after another."""
    mask = np.tril(np.ones((tokens, tokens), bool))
    for start, end in zip((0, *ends), (*ends, tokens), strict=True):
        mask[start:end, :start] = False
    return mask


def test_recognizes_what_is_drawn(seed):
    """Any parameters at all, strides and dilations included."""
    for _ in range(300):
        rank = random.choice([1, 2, 3])
        axes = []
        for _ in range(rank):
            tokens = random.randint(2, {1: 200, 2: 20, 3: 8}[rank])
            dilation = random.randint(1, max(1, min(tokens // 2, 4)))
            kernel_size = random.randint(1, tokens // dilation)
            axes.append((tokens, kernel_size, random.randint(1, kernel_size), dilation, random.random() < 0.4))
        mask = make(Neighborhood(*zip(*axes, strict=True)))
        if not mask.all():
            found = recognize(mask)
            assert found is not None, axes
            assert np.array_equal(make(found), mask), axes


@pytest.mark.parametrize("tokens", [256, 2520])
def test_the_search_is_linear_in_the_mask(tokens, seed):
    """Masks that look like neighborhoods for long: packed documents, and neighborhoods with a wrong element."""
    cuts = sorted(random.sample(range(1, tokens), 3))
    masks = [documents(tokens, cuts), documents(tokens, [tokens // 3, tokens // 2 + 1])]
    for layout in ((tokens,), (tokens // 8, 8), (tokens // 24, 3, 8) if tokens % 24 == 0 else (tokens // 8, 2, 4)):
        for is_causal in (False, True):
            ones = (1,) * len(layout)
            mask = make(
                Neighborhood(layout, tuple(min(size, 5) for size in layout), ones, ones, (is_causal,) * len(layout))
            )
            mask[random.randrange(tokens), random.randrange(tokens)] ^= True
            masks.append(mask)
    for mask in masks:
        search = Search(mask)
        started = time.perf_counter()
        found = search.run()
        # Some tenths of a second for the larger ones, where the search for a stride took minutes.
        assert time.perf_counter() - started < 10
        assert found is None or np.array_equal(make(found), mask)
        assert search.compared < 20 * mask.size


def test_packed_documents_of_one_length_are_a_neighborhood():
    found = recognize(documents(60, [20, 40]))
    assert found == Neighborhood((60,), (20,), (20,), (1,), (True,))
    assert recognize(documents(60, [20, 41])) is None
