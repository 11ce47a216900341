"""Attention on torch tensors by compiled kernels, below autograd: what the operators of `na_compiler.ops.operators` do.

The kernel is found, or compiled, by what the tensors are. Tensors are read where they are, and copied only where a
kernel cannot read them. Nothing is kept of a call but which kernel it was and what shapes it made: a tensor that was
made in a user's call may belong to a CUDA graph, and must not outlive it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from na_compiler import checks
from na_compiler.devices import CUDA
from na_compiler.operands import FREE, INPUT, OUTPUT, SCALAR, WORKSPACE
from na_compiler.ops.schema import BACKWARD, FORWARD, Signature, problem_of
from na_compiler.runtime.kernel import Kernel, MisplacedError, compact_if_empty
from na_compiler.target import target_of

__all__ = ["backward", "check_rank", "forward", "on_cuda", "reading", "run", "run_on_cuda"]

_LOG = logging.getLogger("na_compiler")
_KERNELS = 4096
_empty_like, _CONTIGUOUS = torch.empty_like, torch.contiguous_format
_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class _Found:
    """A kernel for arguments of an operator that are like some others in all that decides which kernel it is.

    Parameters
    ----------
    function
        What the kernel calls.
    pick
        Takes from the operator's arguments what the function reads, in its order.
    tensors
        How many of these are tensors, before the first number.
    free
        For each of these, whether it may have any strides but the last.
    made
        What the function writes, outputs and then workspace: which tensor that is read it is like, or ``None``; shape
        and dtype. To make one like another takes two thirds of the time.
    outputs
        How many of these are outputs.
    results
        For each result of the operator, which output it is; ``None`` for one that is not there.
    is_empty
        Whether one of the tensors has no elements.
    """

    function: Callable[..., None]
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    tensors: int
    free: tuple[bool, ...]
    made: tuple[tuple[int | None, tuple[int, ...], torch.dtype], ...]
    outputs: int
    results: tuple[int | None, ...]
    is_empty: bool


# By all that decides which kernel it is. A look-up takes a microsecond, and making a Problem thirty.
_kernels: dict[tuple[Any, ...], Callable[[tuple[Any, ...]], tuple[Tensor, ...]]] = {}


def forward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute output and lse; arguments are those of the operators."""
    return run(FORWARD, rank, _with_tuples(FORWARD, arguments))


def backward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of the inputs; empty ones where there is no input. Arguments are the operators'."""
    return run(BACKWARD, rank, _with_tuples(BACKWARD, arguments))


def _with_tuples(signature: Signature, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments as `run` takes them: the dispatcher gives lists for the parameters."""
    first = signature.parameters
    return (*arguments[:first], *map(tuple, arguments[first : first + 4]), *arguments[first + 4 :])


def run(signature: Signature, rank: int, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compute what an operator returns; the parameters are tuples."""
    found = _find(signature, rank, arguments)
    if len(arguments) < len(signature.names):
        arguments = signature.complete(arguments)
    return found(arguments)


def _caller(found: _Found) -> Callable[[tuple[Any, ...]], tuple[Tensor, ...]]:
    """Return what computes the results for complete arguments of an operator.

    Every line of it counts where the kernel is small: what it needs is at hand without asking an object for it.
    """
    function, pick, free, ways, outputs = found.function, found.pick, found.free, found.made, found.outputs
    results = None if len(found.results) == outputs else found.results
    is_empty = found.is_empty

    def run(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        read = pick(arguments)
        new_empty = read[0].new_empty
        made = [
            new_empty(shape, dtype=dtype) if like is None else _empty_like(read[like], memory_format=_CONTIGUOUS)
            for like, shape, dtype in ways
        ]
        for tensor, is_free in zip(read, free):  # noqa: B905 - numbers follow the tensors
            if tensor.stride()[-1] != 1 or not (is_free or tensor.is_contiguous()):
                read = _readable(found, read)
                break
        if is_empty:
            read, made = _readable(found, read), list(map(compact_if_empty, made))
        try:
            function(*read, *made)
        except MisplacedError as error:
            _say_once(error)
            function(*(_copied(one) if i < found.tensors else one for i, one in enumerate(read)), *made)
        if results is None:
            return tuple(made[:outputs])
        return tuple(new_empty(0) if place is None else made[place] for place in results)

    return run


def _readable(found: _Found, read: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a kernel reads, copied where it is not as the kernel takes it."""
    tensors = [
        compact_if_empty(_with_rows(tensor if free or tensor.is_contiguous() else tensor.contiguous()))
        for tensor, free in zip(read, found.free, strict=False)
    ]
    return (*tensors, *read[found.tensors :])


# torch.cuda.current_device without asking whether CUDA is initialised, which it is where there is a tensor.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def on_cuda(implementation: Callable[..., Any], query: Tensor, *arguments: Any) -> Any:
    """Call an implementation with the tensors' device as the current one, which launching a kernel makes it."""
    device = query.get_device()
    if device == _current_device():
        return implementation(query, *arguments)
    with CUDA.guard(device):
        return implementation(query, *arguments)


def run_on_cuda(signature: Signature, rank: int, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compute what an operator returns, on the GPU of its first tensor; otherwise as `run`."""
    device = arguments[0].get_device()
    if device == _current_device():
        return run(signature, rank, arguments)
    with CUDA.guard(device):
        return run(signature, rank, arguments)


def reading(run: Callable[..., Any], tensors: Iterable[Tensor | None]) -> Any:
    """Call what runs a kernel with the tensors that there are, or copies that the kernel can read."""
    given = [None if tensor is None else _with_rows(tensor) for tensor in tensors]
    try:
        return run(*given)
    except MisplacedError as error:
        _say_once(error)
    return run(*[None if tensor is None else _copied(tensor) for tensor in given])


def _say_once(error: MisplacedError) -> None:
    if str(error) not in _said:
        _said.add(str(error))
        _LOG.warning("copying what the operator was given: %s", error)


def _with_rows(tensor: Tensor) -> Tensor:
    """Kernels take any strides but the last: rows of head_dim elements lie together in anything that is usual."""
    # Not contiguous(): it returns a tensor as it is whose last dimension has one element, at whatever stride.
    return tensor if tensor.stride(-1) == 1 else _copied(tensor)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def check_rank(rank: int, query: Tensor) -> None:
    """Refuse a query of another number of axes.

    Raises
    ------
    ValueError
        If it has another.
    """
    if query.dim() != rank + 3:
        axes = ", ".join("XYZ"[:rank])
        raise ValueError(
            f"query must have {rank + 3} dimensions for na{rank}d, [batch, {axes}, heads, head_dim], "
            f"got shape {tuple(query.shape)}"
        )


def _find(
    signature: Signature, rank: int, arguments: tuple[Any, ...]
) -> Callable[[tuple[Any, ...]], tuple[Tensor, ...]]:
    """Return what calls the kernel for some arguments; checks them when such ones are first seen."""
    first, at = signature.parameters, [signature.direction, rank]
    for tensor in arguments[:first]:
        # Of the CPU or of CUDA, by which implementation this is: the number tells which.
        at += (tensor.shape, tensor.dtype, tensor.get_device())
    at.append(arguments[first : first + 4])
    for place, one in enumerate(arguments[signature.later :]):
        if one is not None:  # What is left out is the same as what is said to be.
            at += (place, _kind(one))
    key = tuple(at)
    found = _kernels.get(key)
    if found is None:
        found = _caller(_look(signature, rank, arguments))
        if len(_kernels) >= _KERNELS:
            _kernels.clear()
        _kernels[key] = found
    return found


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device
    return type(argument)


def _look(signature: Signature, rank: int, arguments: tuple[Any, ...]) -> _Found:
    from na_compiler.compiler.kernels import find_kernel  # noqa: PLC0415

    given = signature.by_name(arguments)
    query = given["query"]
    check_rank(rank, query)
    problem = problem_of(given)
    kernel: Kernel = find_kernel(problem, signature.direction, target_of(query.device))
    taken = kernel.info.arguments
    known = checks.check_call(problem, taken, given)
    read = [argument for argument in taken if argument.role in {INPUT, SCALAR}]
    written = [argument for argument in taken if argument.role == OUTPUT]
    shapes = [(argument.sizes(known), getattr(torch, argument.dtype)) for argument in written]
    if any(argument.role == WORKSPACE for argument in taken):
        spaces = kernel.info.workspace.shapes(known["batch"], known["additional"])
        shapes += [(shape, torch.float32) for shape in spaces]
    names = [argument.name for argument in written]
    tensors = [argument for argument in read if argument.role == INPUT]
    kinds = [(tuple(given[argument.name].shape), given[argument.name].dtype) for argument in tensors]
    made = [(kinds.index(one) if one in kinds else None, *one) for one in shapes]
    return _Found(
        kernel.function,
        operator.itemgetter(*(signature.names.index(argument.name) for argument in read)),
        len(tensors),
        tuple(argument.strides == FREE for argument in tensors),
        tuple(made),
        len(written),
        tuple(names.index(result.name) if result.name in names else None for result in signature.results),
        any(not given[argument.name].numel() for argument in tensors),
    )
