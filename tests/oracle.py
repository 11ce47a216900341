"""Comparing with the float64 reference: inputs, expected results, and the error that counts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

# Relative errors, ``|x - reference| / |reference|``.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# Inputs, in order.
NAMES = ("query", "key", "value", "additional_keys", "additional_values")


@dataclasses.dataclass
class Example:
    """Inputs of a problem, and what the reference makes of them in float64."""

    problem: Problem
    # Query, key, value, and the additional keys and values that the problem has.
    inputs: list[torch.Tensor]
    grad_output: torch.Tensor
    grad_lse: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor
    grads: list[torch.Tensor]
    magnitudes: list[float]
    tokens: torch.Tensor | None = None
    # Other operands of the problem, by name, in the order in which kernels take them.
    others: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def read(self) -> list[torch.Tensor]:
        """What a kernel reads first."""
        return [*self.inputs, *self.others.values()]

    @property
    def additional(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (self.inputs[3], self.inputs[4]) if len(self.inputs) > 3 else (None, None)

    @property
    def parameters(self) -> tuple[Any, ...]:
        p = self.problem
        return p.kernel_size, p.stride, p.dilation, p.is_causal


def draw(
    problem: Problem,
    *,
    batch: int = 1,
    additional: int = 5,
    scale: float | None = None,
    tokens: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    spoiled: dict[str, float] | None = None,
    lse_has_grad: bool = True,
) -> Example:
    """Draw inputs in the problem's dtype; the reference sees them as they are rounded to it.

    ``spoiled`` has names of tensors (`NAMES`), and what is written into a random element of each. A gradient of the
    bias by relative position is one for each batch entry, as kernels return it.

    Without ``lse_has_grad`` the gradient of lse has no batch entries, as kernels take it where it is 0.

    With ``tokens`` the reference is computed for these queries only, and only they have a gradient of the output:
    the gradients of everything are still exact.
    """
    dtype = getattr(torch, problem.dtype)
    layout = (batch, *problem.layout)
    shapes = [
        (*layout, problem.heads, problem.head_dim),
        (*layout, problem.heads_kv, problem.head_dim),
        (*layout, problem.heads_kv, problem.head_dim_v),
    ]
    if problem.additional_kv:
        shapes += [
            (batch, additional, problem.heads_kv, problem.head_dim),
            (batch, additional, problem.heads_kv, problem.head_dim_v),
        ]
    inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    grad_output = torch.randn(*layout, problem.heads, problem.head_dim_v, device=device).to(dtype)
    grad_lse = torch.randn(*layout, problem.heads, device=device)
    others = draw_others(problem, batch, device)
    for name, number in (spoiled or {}).items():
        named = {"grad_output": grad_output, "grad_lse": grad_lse, **others}
        spoil(named[name] if name in named else inputs[NAMES.index(name)], number)
    some_output, some_lse = grad_output, grad_lse
    if tokens is not None:
        rest = torch.ones(problem.tokens, dtype=torch.bool, device=device).index_fill(0, tokens, value=False)
        grad_output.flatten(1, -3)[:, rest] = 0
        grad_lse.flatten(1, -2)[:, rest] = 0
        some_output, some_lse = grad_output.flatten(1, -3)[:, tokens], grad_lse.flatten(1, -2)[:, tokens]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, scale)
    named = {"key_mask": others.get("key_mask"), "border": problem.border}
    bias = others.get("relative_position_bias")
    if not lse_has_grad:
        grad_lse, some_lse = grad_lse[:0], torch.zeros_like(some_lse)
    if bias is None:
        output, lse = neighborhood_attention(*exact[:3], *parameters, *exact[3:], tokens=tokens, **named)
        grads = torch.autograd.grad((output, lse), exact, (some_output.double(), some_lse.double()))
    else:
        biases = [bias.double().requires_grad_() for _ in range(batch)]
        parts = []
        for i, own in enumerate(biases):
            each = [tensor[i : i + 1] for tensor in exact]
            masked = None if named["key_mask"] is None else named["key_mask"][i : i + 1]
            parts.append(
                neighborhood_attention(
                    *each[:3],
                    *parameters,
                    *each[3:],
                    tokens=tokens,
                    relative_position_bias=own,
                    key_mask=masked,
                    border=problem.border,
                )
            )
        output, lse = (torch.cat(one) for one in zip(*parts, strict=True))
        found = torch.autograd.grad((output, lse), [*exact, *biases], (some_output.double(), some_lse.double()))
        grads = (*found[: len(exact)], torch.stack(found[len(exact) :]))
    rounded = (some_output.double() * output.detach()).nan_to_num(0.0, 0.0, 0.0).norm().item()
    magnitudes = _magnitudes(problem, exact, grad_output, rounded)
    return Example(
        problem, inputs, grad_output, grad_lse, output.detach(), lse.detach(), list(grads), magnitudes, tokens, others
    )


def draw_others(problem: Problem, batch: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Draw a bias by relative position and a key mask, where the problem has them.

    A mask hides what pads batch entries to one size, so that some queries may see nothing, and some keys beside.
    """
    found: dict[str, torch.Tensor] = {}
    if problem.has("relative_position_bias"):
        shape = (problem.heads, *(2 * extent - 1 for extent in problem.kernel_size))
        found["relative_position_bias"] = torch.randn(shape, device=device)
    if problem.has("key_mask"):
        mask = torch.rand(batch, *problem.layout, device=device) < 0.9
        for entry in mask:
            for axis, extent in enumerate(problem.layout):
                entry.narrow(axis, size := int(torch.randint(extent, ())) + 1, extent - size).fill_(False)
        found["key_mask"] = mask
    return found


@dataclasses.dataclass
class Tangents:
    """Tangents of an example's inputs, and what the reference makes of them in float64."""

    example: Example
    inputs: list[torch.Tensor]
    output: torch.Tensor
    lse: torch.Tensor


def draw_tangents(
    example: Example, *, scale: float | None = None, spoiled: dict[str, float] | None = None, only: str | None = None
) -> Tangents:
    """Draw tangents of an example's inputs, in its dtype.

    ``spoiled`` is as for `draw`, of tangents. With ``only``, the name of an input, the others have tangents of 0.
    """
    inputs = [torch.randn_like(tensor.float()).to(tensor.dtype) for tensor in example.inputs]
    for name, number in (spoiled or {}).items():
        spoil(inputs[NAMES.index(name)], number)
    if only is not None:
        inputs = [
            tensor if name == only else torch.zeros_like(tensor) for name, tensor in zip(NAMES, inputs, strict=False)
        ]

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return neighborhood_attention(
            *tensors[:3], *example.parameters, scale, *tensors[3:], tokens=example.tokens, border=example.problem.border
        )

    exact = (tuple(tensor.detach().double() for tensor in tensors) for tensors in (example.inputs, inputs))
    _, (output, lse) = torch.func.jvp(attend, *exact)
    return Tangents(example, inputs, output, lse)


def spoil(tensor: torch.Tensor, number: float) -> None:
    """Write a number into a random element; a NaN with random bits, as memory that nobody wrote may have."""
    place = torch.randint(tensor.numel(), ()).item()
    element = tensor.view(-1)[place : place + 1]
    element.fill_(number)
    if math.isnan(number):
        bits = element.view({2: torch.int16, 4: torch.int32}[element.element_size()])
        mantissa = {torch.float32: 22, torch.bfloat16: 6, torch.float16: 9}[tensor.dtype]  # Without its first bit.
        bits += torch.randint(2**mantissa, (), device=tensor.device).to(bits.dtype)
        assert element.isnan().all()


def _magnitudes(problem: Problem, exact: list[torch.Tensor], grad_output: torch.Tensor, rounded: float) -> list[float]:
    """Return, per gradient, the norm of the same sum over absolute values, where the exact result vanishes; else 0.

    A gradient of biases is a few sums over all queries, of terms of both signs. Each query's has the rounding of
    ``grad_output . output``, with the output as it is stored: the norm of these products, ``rounded``, is
    what it is relative to where the sums come to less.

    With one key in every window the softmax is constant: the gradients of query and key are 0, and what a kernel
    returns for them is the rounding of ``grad_output . value - grad_output . output``.
    """
    if problem.additional_kv or any(extent > 1 for extent in problem.kernel_size):
        # It comes after the gradients of additional keys and values.
        place = 5 if problem.additional_kv else 3
        return [rounded if at == place else 0.0 for at in range(6)]
    query, key, value = (tensor.detach().nan_to_num(0.0, 0.0, 0.0).abs() for tensor in exact[:3])
    key, value = (t.repeat_interleave(problem.group_size, -2) for t in (key, value))
    grad_output = grad_output.double().nan_to_num(0.0, 0.0, 0.0).abs()
    steep = 2 * problem.head_dim**-0.5 * (grad_output * value).sum(-1, keepdim=True)
    by_key = (steep * query).unflatten(-2, (problem.heads_kv, problem.group_size)).sum(-2)
    # A batch entry's gradient of the bias is a number for each head.
    by_head = (steep / (2 * problem.head_dim**-0.5)).flatten(1, -3).sum(1)
    return [(steep * key).norm().item(), by_key.norm().item(), 0.0, by_head.norm().item(), 0.0, 0.0]


def check(
    name: str,
    result: torch.Tensor,
    reference: torch.Tensor,
    dtype: str,
    *,
    floor: float = 0.0,
    spreads: bool = False,
    repeats: bool = False,
) -> float:
    """Assert that a result is as near to the reference as its dtype allows; returns the relative error.

    NaN and infinities are where they are in the reference, rounded to the result's dtype, and the rest is compared
    without them. With ``spreads`` there may be NaN elsewhere too, which hidden numbers that are not finite may cause,
    and with ``repeats`` in place of infinities: see ``docs/numerics.md``.
    """
    assert result.shape == reference.shape, f"{name}: shape {tuple(result.shape)}, not {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    given, expected = result.double(), reference.to(result.dtype).double()
    finite = expected.isfinite()
    excused = given.isnan() & (torch.full_like(finite, spreads) | (expected.isinf() & repeats))
    finite &= ~excused
    for kind, found in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = found(given) & finite, found(expected) & ~found(given) & ~excused
        counts = [int(each.sum()) for each in differ]
        assert not any(counts), (
            f"{name}: not finite as the reference is: {counts[0]} of {given.numel()} are {kind} and should be finite "
            f"(not written, or overflowed), {counts[1]} should be {kind} and are not"
        )
    given, expected = given[finite], reference.double()[finite]
    norm = max(expected.norm().item(), floor)
    error = (given - expected).norm().item()
    relative = error / norm if norm else error
    assert relative < TOLERANCE[dtype], f"{name}: relative error {relative:.2e}"
    return relative


def check_forward(
    example: Example, output: torch.Tensor, lse: torch.Tensor, *, spreads: bool = False, repeats: bool = False
) -> dict[str, float]:
    """Check output and lse; returns their errors."""
    if example.tokens is not None:
        assert torch.isfinite(output).all(), "output: not finite: not written, or overflowed"
        fine = torch.isfinite(lse) | (torch.isneginf(lse) & example.problem.has("key_mask"))
        assert fine.all(), "lse: not finite: not written, or overflowed"
        output, lse = output.flatten(1, -3)[:, example.tokens], lse.flatten(1, -2)[:, example.tokens]
    error = check("output", output, example.output, example.problem.dtype, spreads=spreads, repeats=repeats)
    # lse is float32 whatever the inputs are; it may pass through 0, so its scale is at least 1 an element.
    return {
        "output": error,
        "lse": check("lse", lse, example.lse, "float32", floor=math.sqrt(max(example.lse.numel(), 1))),
    }


def check_backward(example: Example, grads, *, spreads: bool = False, repeats: bool = False) -> dict[str, float]:
    """Check gradients; returns their errors."""
    more = ("grad_additional_keys", "grad_additional_values") if example.problem.additional_kv else ()
    names = ("grad_query", "grad_key", "grad_value", *more, "grad_relative_position_bias")
    assert len(grads) == len(example.grads)
    each = zip(names, grads, example.grads, example.magnitudes, strict=False)
    return {
        name: check(name, grad, reference, example.problem.dtype, floor=magnitude, spreads=spreads, repeats=repeats)
        for name, grad, reference, magnitude in each
    }


def check_tangents(
    tangents: Tangents, output: torch.Tensor, lse: torch.Tensor, *, spreads: bool = False, repeats: bool = False
) -> dict[str, float]:
    """Check the tangents of output and lse; returns their errors."""
    example = tangents.example
    if example.tokens is not None:
        assert torch.isfinite(output).all(), "tangent_output: not finite: not written, or overflowed"
        assert torch.isfinite(lse).all(), "tangent_lse: not finite: not written, or overflowed"
        output, lse = output.flatten(1, -3)[:, example.tokens], lse.flatten(1, -2)[:, example.tokens]
    dtype = example.problem.dtype
    return {
        "tangent_output": check("tangent_output", output, tangents.output, dtype, spreads=spreads, repeats=repeats),
        "tangent_lse": check("tangent_lse", lse, tangents.lse, "float32", repeats=repeats),
    }


_GUARD = 1 << 14


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy with NaN before and behind it, which whoever reads out of bounds finds."""
    # Of a mask: keys that are seen, where there are none.
    flat = torch.full((tensor.numel() + 2 * _GUARD,), math.nan).to(tensor.dtype)
    return flat[_GUARD : _GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)


def guards_are_whole(*tensors: torch.Tensor) -> bool:
    """Return whether nothing was written around tensors that `guarded` made."""
    for tensor in tensors:
        flat = tensor.as_strided((tensor.numel() + 2 * _GUARD,), (1,), 0)
        if not (flat[:_GUARD].isnan().all() and flat[-_GUARD:].isnan().all()):
            return False
    return True


def poisoned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return contiguous tensors of these shapes and dtypes, full of NaN."""
    return [torch.full(tensor.shape, math.nan, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]


def poisoned_parts(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return tensors of one shape, full of NaN, as parts of one; and one more part, which nothing may be written to."""
    *parts, rest = torch.stack(poisoned(*tensors, tensors[0]), dim=-3).unbind(-3)
    return parts, rest


@contextlib.contextmanager
def copies() -> Iterator[list[str]]:
    """Yield a list which after the block has torch's operators that copied a tensor in it.

    By the profiler: a dispatch mode does not see what an operator calls.
    """
    made: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield made
    made += [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::_to_copy")]
