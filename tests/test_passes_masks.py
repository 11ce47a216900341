"""`na_compiler.passes.masks`: a mask is recognised when it is exactly a neighborhood, and only then."""

import dataclasses
import random
import time
from functools import reduce

import numpy as np
import pytest

from na_compiler.passes.masks import Neighborhood, Search, axis_mask, recognize


def made(layout, kernel_size, stride=None, dilation=None, is_causal=None, border=None):
    """A neighborhood; what is not said of an axis is its default."""
    ones, rank = (1,) * len(layout), len(layout)
    flags, borders = is_causal or (False,) * rank, border or ("shift",) * rank
    return Neighborhood(layout, kernel_size, stride or ones, dilation or ones, flags, borders)


def make(found):
    columns = zip(*dataclasses.astuple(found), strict=True)
    return reduce(np.kron, [axis_mask(*axis) for axis in columns])


MASKS = [
    made((24,), (7,)),
    made((24,), (6,), (4,)),
    made((25,), (3,), (2,), (4,)),
    made((24,), (5,), is_causal=(True,)),
    made((23,), (7,), (3,), (2,), (True,)),
    made((24,), (24,), is_causal=(True,)),
    made((6, 8), (3, 5)),
    made((8, 6), (4, 3), (2, 1), (2, 1), (False, True)),
    made((4, 5, 6), (3, 2, 5), (1, 2, 1), is_causal=(True, False, False)),
    made((24,), (9,), border=("cut",)),
    made((24,), (9,), border=("cut:2",)),
    made((23,), (6,), (4,), (2,), border=("cut",)),
    made((23,), (7,), (7,), is_causal=(True,), border=("cut",)),
    made((24,), (31,), border=("cut:20",)),
    made((24,), (7,), border=("wrap",)),
    made((24,), (4,), (2,), (3,), border=("wrap",)),
    made((6, 8), (3, 5), border=("cut", "wrap")),
    made((4, 5, 6), (3, 2, 5), is_causal=(True, False, False), border=("shift", "cut", "wrap")),
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
    # A band with a hole, and one that only the first half of a circle has.
    distance = np.abs(np.subtract.outer(np.arange(24), np.arange(24)))
    assert recognize((distance <= 3) & (distance != 2)) is None
    half = axis_mask(24, 5, border="wrap")
    half[12:] = axis_mask(24, 5)[12:]
    assert recognize(half) is None


def test_windows_that_are_cut_or_wrap_have_that_border():
    distance = np.subtract.outer(np.arange(24), np.arange(24))
    assert recognize(np.abs(distance) <= 3) == made((24,), (7,), border=("cut",))
    assert recognize((distance <= 3) & (distance >= -1)) == made((24,), (5,), border=("cut:3",))
    chunks = (np.arange(23)[:, None] // 7 == np.arange(23) // 7) & np.tri(23, dtype=bool)
    assert recognize(chunks) == made((23,), (7,), (7,), is_causal=(True,), border=("cut",))
    circle = np.minimum(distance % 24, -distance % 24) <= 2
    assert recognize(circle) == made((24,), (5,), border=("wrap",))
    # Where a rule that shifts does, it is that.
    assert recognize((distance >= 0) & (distance < 5)) == made((24,), (5,), is_causal=(True,))


def test_an_even_larger_mask_takes_no_time():
    mask = make(made((8, 16, 12), (3, 5, 7), dilation=(1, 2, 1), is_causal=(True, False, False)))
    found = recognize(mask)
    assert found is not None
    assert found.layout == (8, 16, 12)


def documents(tokens, ends):
    """Return the mask of causal attention inside documents that are packed one after another."""
    mask = np.tril(np.ones((tokens, tokens), bool))
    for start, end in zip((0, *ends), (*ends, tokens), strict=True):
        mask[start:end, :start] = False
    return mask


def drawn_axis(longest):
    """Tokens and parameters of an axis: any at all, strides, dilations and borders included."""
    tokens = random.randint(2, longest)
    dilation = random.randint(1, max(1, min(tokens // 2, 4)))
    border = random.choice(["shift", "shift", "cut", "cut:", "wrap"])
    if border == "wrap":
        dilation = random.choice([each for each in (1, 2, 3, 4) if tokens % each == 0])
        kernel_size = random.randint(1, tokens // dilation)
        strides = [each for each in range(1, kernel_size + 1) if (tokens // dilation) % each == 0]
        return tokens, kernel_size, random.choice(strides), dilation, False, border
    # Those that are cut may be longer than the axis; strides are told from where windows begin, if they do.
    kernel_size = random.randint(1, tokens // dilation * (2 if border == "cut:" else 1))
    if border == "cut:":
        return tokens, kernel_size, 1, dilation, False, f"cut:{random.randrange(kernel_size)}"
    stride = random.randint(1, kernel_size if border == "shift" else max(kernel_size // 2, 1))
    return tokens, kernel_size, stride, dilation, random.random() < 0.4, border


def test_recognizes_what_is_drawn(seed):
    for _ in range(400):
        rank = random.choice([1, 2, 3])
        axes = [drawn_axis({1: 200, 2: 20, 3: 8}[rank]) for _ in range(rank)]
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
            sizes = tuple(min(size, 5) for size in layout)
            mask = make(made(layout, sizes, is_causal=(is_causal,) * len(layout)))
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
    assert found == made((60,), (20,), (20,), is_causal=(True,))
    assert recognize(documents(60, [20, 41])) is None
