"""The torch operators: ``torch.ops.na_compiler.na1d``, ``na2d``, ``na3d``, and the backward and the tangent of each.

One implementation serves the three: the rank is the tensors'. The operators read query, key and value where they are
and return contiguous tensors. What they take and return is said in `na_compiler.operands`; what they do below autograd
is in `na_compiler.ops.kernels`; everything else that torch wants to know of an operator (shapes, gradients, autocast,
batching, FLOPs) is registered here, for whatever operands there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from na_compiler.operands import SAME, Operand, differentiable, outputs
from na_compiler.ops.batching import batched
from na_compiler.ops.kernels import backward, check_rank, forward, tangent
from na_compiler.ops.schema import BACKWARD, FORWARD, PLACE, TANGENT, Signature, flags, place_of, problem_of
from na_compiler.ops.tangents import (
    SECOND,
    Refusing,
    differentiate_gradients,
    differentiate_tangents,
    move,
    move_gradients,
    refuse_second_tangents,
    save_tensors,
    split_tangents,
)
from na_compiler.problem import Problem

__all__ = [
    "OPERATORS",
    "Rules",
    "backward_fake",
    "cast",
    "define",
    "differentiate",
    "differentiate_operator",
    "flops",
    "forward_fake",
    "implement",
    "implement_autocast",
    "refuse_unless_dense",
    "save_for_backward",
]

if hasattr(torch.ops.na_compiler, "na1d"):
    raise ImportError(
        "libna_compiler_torch.so has defined na_compiler's operators in this process: import torch and na_compiler "
        "before it is loaded, or do not load it, since Python does not need it"
    )
_library = torch.library.Library("na_compiler", "DEF")

# Of the arguments, where those with gradients are, and whether each batch entry has its own.
_DIFFERENTIABLE = [(FORWARD.names.index(operand.name), operand.is_batched) for operand in differentiable()]
_OUTPUTS = len(outputs())
# Of these, those whose gradients kernels have to be given.
_NEEDED = tuple(place for place, operand in enumerate(outputs()) if not operand.gradient_is_optional)


def _unsupported(rank: int, *arguments: Any) -> Any:
    """Refuse tensors that no kernel takes."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for tensor in tensors:
        refuse_unless_dense(rank, tensor)
    devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
    raise NotImplementedError(
        f"na_compiler has kernels for the CPU and for CUDA, got tensors on {devices}; move them, e.g. with .cpu()"
    )


def refuse_unless_dense(rank: int, tensor: Tensor) -> None:
    """Refuse nested, sparse and quantised tensors.

    Raises
    ------
    NotImplementedError
        If it is one of these.
    """
    if tensor.is_nested:
        raise NotImplementedError(f"na{rank}d takes dense tensors, got a nested one; pad it, or call per component")
    if tensor.layout is not torch.strided:
        raise NotImplementedError(f"na{rank}d takes dense tensors, got a {tensor.layout} one; use .to_dense()")
    if tensor.is_quantized:
        raise NotImplementedError(f"na{rank}d takes floating-point tensors, got a {tensor.dtype}; use .dequantize()")


# ---- Shapes --------------------------------------------------------------------------------------------------------


def forward_fake(rank: int, signature: Signature, *arguments: Any) -> tuple[Tensor, ...]:
    """Return results of the shapes that a forward's have, or a tangent's."""
    given = signature.by_name(arguments)
    query, value = given["query"], given["value"]
    check_rank(rank, query)
    sizes = [size for name in ("query", "key", "value") for size in given[name].shape]
    sizes += [size for name in ("kernel_size", "stride", "dilation") for size in given[name]]
    sizes += given.get(PLACE, ())
    if all(isinstance(size, int) for size in sizes):  # A problem cannot be made of symbols.
        problem_of(given)
    terms = {"batch": query.shape[:1], "layout": query.shape[1:-2], "heads": query.shape[-2:-1]}
    terms |= {"head_dim": query.shape[-1:], "head_dim_v": value.shape[-1:]}
    return tuple(
        query.new_empty(
            [size for term in operand.shape for size in terms[term]],
            dtype=query.dtype if operand.dtype == SAME else getattr(torch, operand.dtype),
        )
        for operand in signature.results
    )


def backward_fake(signature: Signature, *arguments: Any) -> tuple[Tensor, ...]:
    """Return results of the shapes that a backward's have."""
    given = signature.by_name(arguments)
    query = given["query"]

    def gradient(operand: Operand) -> Tensor:
        tensor: Tensor | None = given[operand.name]
        if tensor is None:
            return query.new_empty(0)  # type: ignore[no-any-return]
        if operand.is_batched:
            return tensor.new_empty(tensor.shape)
        return tensor.new_empty((query.shape[0], *tensor.shape), dtype=torch.float32)

    return tuple(map(gradient, differentiable()))


# ---- Gradients -----------------------------------------------------------------------------------------------------


def save_for_backward(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    """Keep what the backward needs of a forward's arguments and results."""
    first = FORWARD.parameters
    rest = arguments[first:]
    places: tuple[int, ...] = ()
    if len(arguments) > FORWARD.later:
        places = tuple(place for place, one in enumerate(rest) if isinstance(one, Tensor))
    if places:
        # Tensors are kept nowhere but where autograd keeps them: they would never be freed.
        ctx.save_for_backward(*arguments[:first], *results, *[rest[place] for place in places])
        rest = tuple(None if place in places else one for place, one in enumerate(rest))
    else:
        ctx.save_for_backward(*arguments[:first], *results)
    ctx.rest, ctx.places = rest, places
    ctx.set_materialize_grads(False)


def differentiate(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a forward's arguments, by what computes the backward operator.

    They are those of query, key and value only, where nothing that may be left out was given.
    """
    first, saved = FORWARD.parameters, ctx.saved_tensors
    if [place for place in _NEEDED if grads[place] is None]:
        if all(grad is None for grad in grads):
            return (None,) * first
        grads = tuple(
            torch.zeros_like(saved[first + place]) if place in _NEEDED and grad is None else grad
            for place, grad in enumerate(grads)
        )
    if not ctx.places:
        return tuple(operator(*grads, *saved, *ctx.rest)[:first])
    given, rest = first + _OUTPUTS, list(ctx.rest)
    for place, tensor in zip(ctx.places, saved[given:], strict=True):
        rest[place] = tensor
    made = operator(*grads, *saved[:given], *rest)
    gradients: list[Tensor | None] = [None] * (first + len(rest))
    for (place, is_batched), gradient in zip(_DIFFERENTIABLE, made, strict=True):
        if place < first or place - first in ctx.places:
            # What all batch entries share has what each adds to its gradient.
            shared = None if is_batched else rest[place - first]
            gradients[place] = gradient if shared is None else gradient.sum(0).to(shared.dtype)
    return tuple(gradients)


def differentiate_operator(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of an operator's arguments, by its backward operator."""
    gradients = differentiate(operator, ctx, *grads)
    return (*gradients, *[None] * (FORWARD.parameters + len(ctx.rest) - len(gradients)))


class _Differentiable(torch.autograd.function._SingleLevelFunction):
    """An operator with a derivative, at the level of ``torch.func``'s transforms that it is called at, if any.

    torch's own way to give an operator of Python a derivative is a ``torch.autograd.Function``, which refuses such
    levels. This class is what ``torch.func`` makes of one for each level.
    """

    @staticmethod
    def forward(
        ctx: Any,
        modes: Any,
        keyset: Any,
        operator: Any,
        rules: Rules,
        guard: Tensor | None,
        *arguments: Any,
    ) -> Any:
        ctx.derivative, ctx.has_guard, ctx.refuses = rules.derivative, guard is not None, False
        # The modes that torch switches off in here are those of the levels further out as well.
        with_grad, with_tangents = modes
        with (
            torch.set_grad_enabled(with_grad),
            forward_ad._set_fwd_grad_enabled(with_tangents),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            results = operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        rules.setup(ctx, arguments, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients = ctx.derivative(ctx, *grads)
        asked = next((grad for grad in grads if grad is not None), None) if ctx.has_guard and ctx.refuses else None
        return (None, None, None, None, None if asked is None else asked.new_zeros(()), *gradients)


@dataclass(frozen=True)
class Rules:
    """How an operator is differentiated.

    Parameters
    ----------
    setup
        Keeps what the derivative needs: ``setup(ctx, inputs, results)``.
    derivative
        Returns the gradients of the inputs: ``derivative(ctx, *gradients of the results)``. Where it sets
        ``ctx.refuses``, those by guarded inputs would be needed too, and there are none.
    moves
        Returns the results with tangents: ``moves(inputs, tangents by place)``.
    guarded
        Places of the inputs by which there may be no derivative.
    message
        What is said of it.
    """

    setup: Callable[..., None]
    derivative: Callable[..., tuple[Any, ...]]
    moves: Callable[..., tuple[Tensor, ...]]
    guarded: tuple[int, ...] = ()
    message: str = ""


def _autograd(operator: Any, rules: Rules, keyset: Any, *arguments: Any) -> Any:
    """Call an operator, and note how it is differentiated; torch would drop tangents in silence."""
    arguments, tangents = split_tangents(arguments)
    if tangents:
        return rules.moves(arguments, tangents)
    if not (torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in arguments)):
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    modes = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
    given = [arguments[place] for place in rules.guarded if place < len(arguments)]
    guarded = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
    with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
        guard = Refusing.apply(rules.message, *guarded) if guarded else None  # type: ignore[attr-defined]
        return _Differentiable.apply(  # type: ignore[attr-defined]
            modes, keyset, operator, rules, guard, *arguments
        )


# ---- Autocast, FLOPs -----------------------------------------------------------------------------------------------


def _autocast(operator: Any, device: str, keyset: Any, *arguments: Any) -> Any:
    """Cast to the dtype that autocast has now; torch's own registration would fix one."""
    key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return operator(*cast(device, arguments))


def cast(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a forward's arguments as autocast has them: those whose dtype is the problem's."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        argument.to(dtype)
        if isinstance(argument, Tensor) and argument.is_floating_point() and _has_problems_dtype(place)
        else argument
        for place, argument in enumerate(arguments)
    )


def _has_problems_dtype(place: int) -> bool:
    operand = FORWARD.operands[place]
    return isinstance(operand, Operand) and operand.dtype == SAME


def flops(signature: Signature, *arguments: Any, **named: Any) -> int:
    """Return the useful operations of a call; of tensors the arguments have the shapes."""
    given = signature.by_name(arguments)
    given |= {name: value for name, value in named.items() if name in given}
    query, key, value = (given[name] for name in ("query", "key", "value"))
    additional, place = given["additional_keys"], place_of(given)
    layout = tuple(query[1:-2])
    problem = Problem(
        layout=layout if place is None else place.layout,
        heads=query[-2],
        head_dim=query[-1],
        kernel_size=given["kernel_size"],
        stride=given["stride"],
        dilation=given["dilation"],
        is_causal=flags(given["is_causal"]),
        heads_kv=key[-2],
        head_dim_v=value[-1],
        border=given["border"],
    )
    whole = problem.flops(query[0], 0 if additional is None else additional[1], signature.direction)
    # Of a part as many as its queries have on average: windows at the ends of an axis may be shorter.
    return whole if place is None else whole * math.prod(layout) // problem.tokens


def define(rank: int, name: str, signature: Signature) -> Any:
    """Define an operator; returns it."""
    # Inductor must hand the strides over as they are: it would copy views of a fused projection otherwise.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(f"na{rank}d{name}{signature.text()}", tags=tags)
    return getattr(torch.ops.na_compiler, f"na{rank}d{name}").default


def implement(
    rank: int, operator: Any, signature: Signature, compute: Callable[..., Any], fake: Callable[..., Any], rules: Rules
) -> None:
    """Tell torch what an operator computes, its shapes, its derivatives, and what it is under transforms."""
    name = operator.name().partition("::")[2]
    for device in ("CPU", "CUDA"):
        _library.impl(name, functools.partial(compute, rank), device)
    _library.impl(name, functools.partial(_unsupported, rank), "CompositeExplicitAutograd")
    torch.library.register_fake(f"na_compiler::{name}", fake, lib=_library)
    _library.impl(name, functools.partial(_autograd, operator, rules), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"na_compiler::{name}", functools.partial(batched, operator, signature), lib=_library)
    register_flop_formula(operator.overloadpacket)(functools.partial(flops, signature))


def implement_autocast(operator: Any) -> None:
    """Tell torch what autocast does with an operator."""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        name = operator.name().partition("::")[2]
        _library.impl(name, functools.partial(_autocast, operator, device), key, with_keyset=True)


def _register(rank: int) -> Any:
    """Define an operator, its backward and its tangent, and tell torch about them; returns the operator."""
    signatures = {"": FORWARD, "_backward": BACKWARD, "_tangent": TANGENT}
    operators = [define(rank, name, signature) for name, signature in signatures.items()]
    _, gradient, moved = operators
    # What computes each, its shapes, and its derivatives.
    computed = (forward, backward, tangent)
    plain, with_tangents = (functools.partial(forward_fake, rank, signature) for signature in (FORWARD, TANGENT))
    fakes: tuple[Callable[..., Any], ...] = (plain, functools.partial(backward_fake, BACKWARD), with_tangents)
    rules = (
        Rules(
            save_for_backward, functools.partial(differentiate_operator, gradient), functools.partial(move, moved)
        ),
        Rules(
            functools.partial(save_tensors, BACKWARD), functools.partial(differentiate_gradients, moved),
            functools.partial(move_gradients, gradient), *SECOND["backward"],
        ),
        Rules(
            functools.partial(save_tensors, TANGENT), functools.partial(differentiate_tangents, gradient),
            refuse_second_tangents, *SECOND["tangent"],
        ),
    )  # fmt: skip
    for operator, signature, compute, fake, rule in zip(
        operators, signatures.values(), computed, fakes, rules, strict=True
    ):
        implement(rank, operator, signature, compute, fake, rule)
    implement_autocast(operators[0])
    return operators[0]


OPERATORS = {rank: _register(rank) for rank in (1, 2, 3)}
