"""What windows do at the ends of axes, as arguments say it: checks, and the form in which equal rules are equal.

The rule itself is in `na_compiler.window`. Beside its borders there is ``"clamp"``, which is none of them: where a
window is larger than the axis it is made as long as the axis, and then shifted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from na_compiler.counting import group_lengths
from na_compiler.window import BORDERS, CUT, SHIFT, WRAP, border_kind, keys_before

__all__ = [
    "CLAMP",
    "Rule",
    "borders_per_axis",
    "canonical_rule",
    "check_rule",
    "clamped",
    "joined",
    "middle_of_bias",
    "without_clamp",
]

CLAMP = "clamp"
# kernel_size, stride, is_causal and border of an axis.
Rule = tuple[int, int, bool, str]
_KNOWN = (*BORDERS, CLAMP)
_WANTED = "one of 'shift', 'cut', 'cut:LEFT' (with LEFT keys before a query), 'wrap' and 'clamp'"


def borders_per_axis(value: object, rank: int) -> tuple[str, ...]:
    """Return borders given as a word, as words with commas between them, or as a sequence of them, as a tuple.

    Raises
    ------
    ValueError
        If they are something else.

    Examples
    --------
    >>> borders_per_axis("cut", 2), borders_per_axis("cut:5,wrap", 2)
    (('cut', 'cut'), ('cut:5', 'wrap'))
    """
    words: object = tuple(value.split(",")) if isinstance(value, str) else value
    if isinstance(value, str) and len(value.split(",")) == 1:
        words = (value,) * rank
    if not isinstance(words, Sequence) or len(words) != rank or not all(map(_is_border, words)):
        raise ValueError(
            f"border must be {_WANTED}, or {rank} of these (one per axis of the layout), got {reprlib.repr(value)}; "
            f"e.g. {('cut',) * rank}"
        )
    return tuple(words)


def _is_border(word: object) -> bool:
    if not isinstance(word, str):
        return False
    kind, colon, left = word.partition(":")
    if not colon:
        return kind in _KNOWN
    return kind == CUT and left.isascii() and left.isdigit() and left == str(int(left)) and int(left) < 2**63


def joined(borders: Sequence[str]) -> str:
    """Return borders as one word, or several with commas between them where axes differ: as operators take them.

    Examples
    --------
    >>> joined(("cut", "cut")), joined(("shift", "wrap"))
    ('cut', 'shift,wrap')
    """
    return borders[0] if len(set(borders)) == 1 else ",".join(borders)


def without_clamp(axis: int, tokens: int, dilation: int, rule: Rule) -> Rule:
    """Return the rule of an axis with a window that fits it, where it is to be clamped.

    Raises
    ------
    ValueError
        If no window fits: there are fewer tokens than the dilation.
    """
    kernel_size, stride, is_causal, border = rule
    if border != CLAMP:
        return rule
    if tokens < dilation:
        raise ValueError(
            f"dilation must be at most the layout's {tokens} tokens on axis {axis}, also with border='clamp', got "
            f"{dilation}; dilation={tokens} would work"
        )
    kernel_size = min(kernel_size, tokens // dilation)
    return kernel_size, min(stride, kernel_size), is_causal, SHIFT


def clamped(
    layout: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    border: Sequence[str],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Return kernel sizes, strides and borders in which windows fit the axes where they are to be clamped.

    Examples
    --------
    >>> clamped((5, 9), (7, 7), (1, 6), (1, 3), ("clamp", "clamp"))
    ((5, 3), (1, 3), ('shift', 'shift'))
    """
    axes = zip(kernel_size, stride, [False] * len(layout), border, strict=True)
    sizes = zip(layout, dilation, strict=True)
    made = [without_clamp(axis, *size, rule) for axis, (size, rule) in enumerate(zip(sizes, axes, strict=True))]
    kernels, strides, _, borders = zip(*made, strict=True)
    return kernels, strides, borders


def middle_of_bias(given: Sequence[int], kernel_size: Sequence[int]) -> tuple[slice, ...]:
    """Return where in a table of biases for given windows that for smaller ones lies: the same differences.

    Examples
    --------
    >>> middle_of_bias((7,), (3,))
    (slice(None, None, None), slice(4, 9, None))
    """
    places = zip(given, kernel_size, strict=True)
    return (slice(None), *(slice(before - after, before + after - 1) for before, after in places))


def check_rule(axis: int, tokens: int, dilation: int, rule: Rule) -> None:
    """Check that the rule of an axis is one.

    Raises
    ------
    ValueError
        Naming the argument, the value given, the limit, and a value that would work.
    """
    kernel_size, stride, is_causal, border = rule
    kind, where = border_kind(border), f"on axis {axis}"
    if kind == CUT and dilation > tokens:
        raise ValueError(
            f"dilation must be at most the layout's {tokens} tokens {where}, got {dilation}; "
            f"dilation={tokens} would work"
        )
    if border not in {SHIFT, CUT, WRAP}:
        before = keys_before(kernel_size, border)
        if before >= kernel_size:
            raise ValueError(
                f"border='cut:LEFT' must have LEFT less than kernel_size={kernel_size} {where}, got {before}; "
                f"border='cut:{kernel_size - 1}' would work"
            )
        if stride != 1 or is_causal:
            given = f"stride={stride}" if stride != 1 else "is_causal=True"
            raise ValueError(f"border={border!r} must have stride=1 and no causality {where}, got {given}; "
                             "border='cut' would work")  # fmt: skip
    if kind == WRAP:
        _check_wrap(where, tokens, dilation, rule)


def _check_wrap(where: str, tokens: int, dilation: int, rule: Rule) -> None:
    _, stride, is_causal, _ = rule
    if is_causal:
        raise ValueError(f"border='wrap' must have is_causal=False {where}, a circle has no first token; got True; "
                         "border='cut' would work")  # fmt: skip
    if tokens % dilation:
        near = max(divisor for divisor in range(1, min(dilation, tokens) + 1) if tokens % divisor == 0)
        raise ValueError(
            f"dilation must divide the layout's {tokens} tokens {where} with border='wrap', got {dilation}; "
            f"dilation={near} would work"
        )
    length = tokens // dilation
    if length % stride:
        near = max(divisor for divisor in range(1, stride + 1) if length % divisor == 0)
        raise ValueError(
            f"stride must divide the {length} tokens of a dilation group {where} with border='wrap', got {stride}; "
            f"stride={near} would work"
        )


def canonical_rule(tokens: int, dilation: int, rule: Rule, *, has_bias: bool = False) -> Rule:
    """Return the form in which rules that give all queries the same keys are equal: with ``"shift"`` where they may be.

    With a bias by relative position, the differences between a query and its keys have to be the same as well.

    Examples
    --------
    >>> canonical_rule(9, 1, (4, 1, True, "cut")), canonical_rule(9, 1, (4, 1, False, "cut:3"))
    ((4, 1, True, 'shift'), (4, 1, True, 'shift'))
    """
    kernel_size, stride, is_causal, border = rule
    if border == SHIFT:
        return rule
    if border_kind(border) == WRAP:
        is_same = kernel_size == 1 or (kernel_size * dilation == tokens and not has_bias)
        return (kernel_size, stride, is_causal, SHIFT) if is_same else rule
    before = keys_before(kernel_size, border)
    if border == CUT and is_causal:
        fits = kernel_size * dilation <= tokens
        is_whole = all(length % stride == 0 for length in group_lengths(tokens, dilation))
        return (kernel_size, stride, True, SHIFT) if fits and is_whole else rule
    if kernel_size == 1:
        return 1, 1, False, SHIFT
    if before == kernel_size - 1 and stride == 1:
        return canonical_rule(tokens, dilation, (kernel_size, 1, True, CUT))
    return (kernel_size, stride, is_causal, CUT) if before == kernel_size // 2 else rule
