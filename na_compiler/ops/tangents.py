"""Forward mode of the operators, and second derivatives as far as there are kernels for them.

With ``J`` the derivative of output and lse by the inputs, the backward computes ``J^T`` times something, linearly in
it, and the tangent ``J`` times something. So the backward's derivative by what it is given is the tangent, and the
tangent's derivative by the tangents is the backward. The derivative of either by query, key and value is a second
derivative: the tangent of the backward, ten products, for which there is no kernel. It is refused where it is asked
for, and only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from na_compiler.operands import INPUT, Operand, differentiable, outputs
from na_compiler.ops.schema import BACKWARD, FORWARD, TANGENT, Signature
from na_compiler.runtime.kernel import zero_tangent

__all__ = [
    "SECOND",
    "Refusing",
    "differentiate_gradients",
    "differentiate_tangents",
    "move",
    "move_gradients",
    "refuse_second_tangents",
    "save_tensors",
    "split_tangents",
]

# The only level of forward mode that torch has. It is named, since forward_ad itself does not know that there is one
# where a program that Dynamo made has entered it.
_LEVEL = 0
_TENSORS = {
    signature.direction: tuple(
        place for place, o in enumerate(signature.operands) if isinstance(o, Operand) and o.role == INPUT
    )
    for signature in (BACKWARD, TANGENT)
}
# The backward's own input, in which it is linear.
_GIVEN = tuple(BACKWARD.names.index(output.gradient().name) for output in outputs())
_WHAT_IT_TAKES = (
    "It is the tangent of the backward, a kernel of ten products beside its five, which there is not yet; "
    "na_compiler.reference.neighborhood_attention has second derivatives, slowly"
)
_TWICE = (
    "neighborhood attention cannot be differentiated twice: the gradient of its gradient by query, key or value is not "
    f"there. {_WHAT_IT_TAKES}"
)
_THROUGH = (
    "the gradient through a tangent of neighborhood attention by query, key or value is not there; that of the primal "
    "beside it is, and that by tangents: detach the tangent, as losses of flow maps do. "
    f"{_WHAT_IT_TAKES}"
)
_OF_GRADIENTS = (
    "forward mode through a gradient of neighborhood attention, as in torch.func.hessian, is not there. "
    f"{_WHAT_IT_TAKES}"
)
_OF_TANGENTS = (
    "neighborhood attention has first derivatives in forward mode, and no second ones, which torch.func.jvp in another "
    "asks for: they take a kernel of their own"
)
# Of each operator: the places by which there may be no derivative, as it would be a second one; what is said of it.
SECOND = {
    "backward": (tuple(place for place in range(len(BACKWARD.names)) if place not in _GIVEN), _TWICE),
    "tangent": (tuple(TANGENT.names.index(operand.name) for operand in differentiable()), _THROUGH),
}


class Refusing(torch.autograd.function._SingleLevelFunction):
    """A number that depends on tensors by name only: who asks for its derivative by them is told that there is none.

    What has such a number among its inputs gives it a gradient where the derivative by these tensors would be needed.
    torch asks for it only if they are what is differentiated by, which an operator itself cannot know.
    """

    @staticmethod
    def forward(ctx: Any, message: str, *tensors: Tensor) -> Tensor:
        """Return the number."""
        ctx.message, ctx.count = message, len(tensors)
        ctx.set_materialize_grads(False)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Refuse.

        Raises
        ------
        NotImplementedError
            If there is a gradient: torch asks without one as well.
        """
        if any(grad is not None for grad in grads):
            raise NotImplementedError(ctx.message)
        return (None,) * (1 + ctx.count)


def split_tangents(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[int, Tensor]]:
    """Return arguments without their tangents, and these by their places; those that are 0 are left out."""
    if not torch._C._is_fwd_grad_enabled():
        return arguments, {}
    primals, tangents = list(arguments), {}
    for place, argument in enumerate(arguments):
        # Others have no tangents, and are refused by the operator.
        if isinstance(argument, Tensor) and argument.layout == torch.strided and not argument.is_nested:
            dual = forward_ad.unpack_dual(argument, level=_LEVEL)
            if dual.tangent is not None:
                primals[place] = dual.primal
                if not dual.tangent._is_zerotensor():
                    tangents[place] = dual.tangent
    return tuple(primals), tangents


def _with_tangents(results: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        forward_ad.make_dual(result, tangent, level=_LEVEL) for result, tangent in zip(results, tangents, strict=True)
    )


def move(operator: Any, arguments: tuple[Any, ...], tangents: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """Return a forward's results with their tangents, by the tangent operator."""
    given = FORWARD.by_name(arguments)
    moving = {FORWARD.names[place]: tangent for place, tangent in tangents.items()}
    results = operator(*_called_with(given, moving))
    return _with_tangents(results[: len(outputs())], results[len(outputs()) :])


def _called_with(given: dict[str, Any], tangents: dict[str, Tensor]) -> list[Any]:
    """Return the tangent operator's arguments: the forward's, and tangents by the names of what they belong to."""
    given = dict(given)
    for operand in differentiable():
        tensor = given[operand.name]
        if tensor is not None:
            found = tangents.get(operand.name)
            given[operand.tangent().name] = zero_tangent(tensor) if found is None else found
    return [given.get(name) for name in TANGENT.names]


def move_gradients(
    operator: Any,
    arguments: tuple[Any, ...],
    tangents: dict[int, Tensor],
) -> tuple[Tensor, ...]:
    """Return gradients with their tangents, where only what the backward is linear in has some.

    Raises
    ------
    NotImplementedError
        If a tensor of the forward has a tangent.
    """
    if not set(tangents) <= set(_GIVEN):
        raise NotImplementedError(_OF_GRADIENTS)
    moving = list(arguments)
    for place in _GIVEN:
        # The gradient of lse may be none.
        still = None if arguments[place] is None else torch.zeros_like(arguments[place])
        moving[place] = tangents.get(place, still)
    results, moved = operator(*arguments), operator(*moving)
    return tuple(
        forward_ad.make_dual(result, tangent, level=_LEVEL) if result.numel() else result
        for result, tangent in zip(results, moved, strict=True)
    )


def refuse_second_tangents(arguments: Any, tangents: Any) -> Any:
    """Refuse.

    Raises
    ------
    NotImplementedError
        Always.
    """
    raise NotImplementedError(_OF_TANGENTS)


def save_tensors(signature: Signature, ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    """Keep an operator's inputs, and, of the tangent, output and lse."""
    places = _TENSORS[signature.direction]
    ctx.count = len(inputs)
    inputs = signature.complete(inputs)
    kept = results[: len(outputs())] if signature is TANGENT else ()
    ctx.save_for_backward(*(inputs[place] for place in places), *kept)
    ctx.rest = [None if place in places else one for place, one in enumerate(inputs)]
    ctx.set_materialize_grads(False)


def _saved(signature: Signature, ctx: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Return an operator's arguments by name, and what else was kept."""
    places, tensors, inputs = _TENSORS[signature.direction], list(ctx.saved_tensors), list(ctx.rest)
    for place in places:
        inputs[place] = tensors.pop(0)
    return dict(zip(signature.names, inputs, strict=True)), tensors


def differentiate_gradients(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of what a backward was given, by the tangent operator."""
    gradients: list[Tensor | None] = [None] * len(BACKWARD.names)
    ctx.refuses = any(grad is not None for grad in grads)
    if ctx.refuses:
        given, _ = _saved(BACKWARD, ctx)
        pairs = zip(differentiable(), grads, strict=True)
        # An input that is not there has an empty gradient.
        moving = {operand.name: grad for operand, grad in pairs if grad is not None and given[operand.name] is not None}
        results = operator(*_called_with(given, moving))
        for place, result in zip(_GIVEN, results[len(outputs()) :], strict=True):
            gradients[place] = None if given[BACKWARD.names[place]] is None else result
    return tuple(gradients[: ctx.count])


def differentiate_tangents(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of a tangent operator's inputs: by what it moves, and by tangents of what it moves."""
    given, (output, lse) = _saved(TANGENT, ctx)
    given |= {"output": output, "lse": lse}
    count = len(outputs())
    gradients: dict[str, Tensor | None] = {}
    names = [(operand.name, operand.tangent().name) for operand in differentiable()]
    for part, which in ((grads[:count], 0), (grads[count:], 1)):
        if any(grad is not None for grad in part):
            for operand, result, grad in zip(outputs(), (output, lse), part, strict=True):
                is_needed = grad is None and not operand.gradient_is_optional
                given[operand.gradient().name] = torch.zeros_like(result) if is_needed else grad
            results = operator(*(given[name] for name in BACKWARD.names))
            gradients |= {
                name[which]: result for name, result in zip(names, results, strict=True) if given[name[0]] is not None
            }
    ctx.refuses = any(grad is not None for grad in grads[count:])
    return tuple(gradients.get(name) for name in TANGENT.names)[: ctx.count]
