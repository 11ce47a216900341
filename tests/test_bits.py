"""Words of bits in kernels: right whatever the numbers are, since CUDA leaves a wrong shift undefined."""

import random

import pytest
from tvm import tirx

from na_compiler.schedules.shared.bits import stretch
from na_compiler.schedules.shared.mask import columns_before

# The largest number, the word, and the bit of a number.
WORDS = [
    (31, "uint32", None),
    (32, "uint32", None),
    (32, "uint64", None),
    (64, "uint64", None),
    (32, "int64", None),
    (128, "uint64", columns_before),
    (256, "uint64", columns_before),
    (8, "uint32", lambda number: number * 4),
]


def computed(word, width):
    """Compute a word as CUDA does; no shift may be by a negative number, or by all bits or more."""
    if isinstance(word, tirx.IntImm):
        return int(word)
    if isinstance(word, tirx.Cast):
        return computed(word.value, width)
    if isinstance(word, tirx.Sub):
        return computed(word.a, width) - computed(word.b, width)
    assert type(word).__name__ == "LShift"
    number, by = (computed(one, width) for one in (word.a, word.b))
    assert 0 <= by < width
    return (number << by) % (1 << width)


@pytest.mark.parametrize(("most", "dtype", "place"), WORDS)
def test_bits_of_any_numbers(most, dtype, place, seed):
    width, bit = int(dtype.lstrip("uint")), place or (lambda number: number)
    for _ in range(40):
        first, end = sorted(random.choice([random.randint(-300, 600), 0, most]) for _ in range(2))
        word = computed(stretch(first, end, most, dtype, place), width)
        inside = [min(max(number, 0), most) for number in (first, end)]
        expected = sum(1 << at for at in range(bit(inside[0]), bit(inside[1])))
        assert word % (1 << width) == expected, (first, end)


def test_more_bits_than_a_word_has():
    with pytest.raises(AssertionError, match="33 bits do not fit uint32"):
        stretch(0, 1, 33, "uint32")
