"""`na_compiler.window`: the rule against its published form, and what else must hold of it."""

import pytest

from na_compiler.window import group_length, window_bounds


def published(index, length, kernel_size, stride, is_causal):
    """The rule as NATTEN's documentation states it, case by case."""
    if is_causal:
        leader = min((index // stride) * stride + stride - 1, length - 1)
        return max(leader - kernel_size + 1, 0), min(index + 1, length)
    leader = min((index // stride) * stride + stride // 2, length - 1)
    left, right = kernel_size // 2, kernel_size // 2 + kernel_size % 2 - 1
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return start, start + kernel_size


@pytest.mark.parametrize("is_causal", [False, True])
def test_agrees_with_the_published_rule_everywhere(is_causal):
    checked = 0
    for length in range(1, 20):
        for kernel_size in range(1, length + 1):
            for stride in range(1, kernel_size + 1):
                bounds = [window_bounds(i, length, kernel_size, stride, is_causal) for i in range(length)]
                assert bounds == [published(i, length, kernel_size, stride, is_causal) for i in range(length)]
                checked += length
    assert checked > 10_000


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_are_in_range_ordered_and_never_empty(is_causal):
    for length in range(1, 16):
        for kernel_size in range(1, length + 1):
            for stride in range(1, kernel_size + 1):
                previous = (0, 0)
                for index in range(length):
                    start, end = window_bounds(index, length, kernel_size, stride, is_causal)
                    assert 0 <= start < end <= length
                    assert start >= previous[0]
                    assert end >= previous[1]
                    assert end - start == kernel_size or is_causal
                    previous = start, end


def test_stride_equal_to_kernel_size_is_blocked_attention():
    bounds = [window_bounds(index, 12, 4, 4) for index in range(12)]
    assert bounds == [(0, 4)] * 4 + [(4, 8)] * 4 + [(8, 12)] * 4


def test_groups_share_the_tokens():
    for layout in range(1, 20):
        for dilation in range(1, layout + 1):
            lengths = [group_length(layout, dilation, group) for group in range(dilation)]
            assert lengths == [len(range(group, layout, dilation)) for group in range(dilation)]
