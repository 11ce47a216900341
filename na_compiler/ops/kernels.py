"""Attention on torch tensors by compiled kernels, below autograd: what the operators of `na_compiler.ops.operators` do.

The kernel is found, or compiled, by what the tensors are. Tensors are read where they are, and copied only where a
kernel cannot read them. Nothing is kept of a call but which kernel it was and what shapes it made: a tensor that was
made in a user's call may belong to a CUDA graph, and must not outlive it.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from na_compiler import checks
from na_compiler.devices import CUDA
from na_compiler.operands import FREE, GIVEN, INPUT, OUTPUT, SCALAR, WORKSPACE
from na_compiler.ops.places import with_place
from na_compiler.ops.projection import side_by_side
from na_compiler.ops.schema import (
    BACKWARD,
    FORWARD,
    PART,
    PART_BACKWARD,
    TANGENT,
    Signature,
    place_of,
    problem_of,
)  # fmt: skip
from na_compiler.ops.tf32 import is_tf32_allowed
from na_compiler.runtime.kernel import Kernel, MisplacedError, compact_if_empty, strides_wanted
from na_compiler.target import target_of

__all__ = [
    "Launch", "backward", "check_rank", "find", "forget", "forward", "on_cuda", "part", "part_backward", "reading",
    "tangent",
]  # fmt: skip

_LOG = logging.getLogger("na_compiler")
_KERNELS = 4096
_PARTS = 3  # Of one projection: query, key and value.
_said: set[str] = set()

# Shape, strides and dtype of a tensor that is made for a call.
Way = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# What is called with the arguments of an operator, as tuples, and returns what the operator does, with ``None`` for the
# gradient of an input that is not there.
Launch = Callable[[tuple[Any, ...]], tuple[Any, ...]]


def _made_by_torch(device: str) -> Callable[..., Tensor]:
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


# What makes a tensor of a way on the CPU, and on the current GPU. Those that Inductor's programs call, below the
# dispatcher, take a third of the time.
_guards: Any = torch._C._dynamo.guards
_empty_on_cpu = getattr(_guards, "_empty_strided_cpu", None) or _made_by_torch("cpu")
_empty_on_cuda = getattr(_guards, "_empty_strided_cuda", None) or _made_by_torch("cuda")


@dataclass(frozen=True, slots=True)
class _Found:
    """A kernel for arguments of an operator that are like some others in all that decides how it is called.

    Parameters
    ----------
    kernel
        It.
    pick
        Takes from the operator's arguments, and the tensors of ``absent`` behind them, what the kernel reads, in its
        order.
    defaults
        Of the operator's arguments.
    absent
        How to make the tensors that stand for what is not given.
    tensors
        How many tensors are read, before the first number.
    free
        For each of these, whether it may have any strides but the last.
    made
        How to make what the kernel writes, outputs and then workspace.
    outputs
        How many of these are outputs.
    results
        For each result of the operator, which output it is; ``None`` for one that is not there.
    device
        Number of the GPU; negative for the CPU.
    is_direct
        Whether the kernel can read all of the tensors where they are, if their addresses are aligned.
    whole
        How to make the tensor that the first three outputs are parts of; ``None`` if each is made by itself.
    """

    kernel: Kernel
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    defaults: tuple[Any, ...]
    absent: tuple[Way, ...]
    tensors: int
    free: tuple[bool, ...]
    made: tuple[Way, ...]
    outputs: int
    results: tuple[int | None, ...]
    device: int
    is_direct: bool
    whole: Way | None


# By all that decides how a kernel is called. A look-up takes a microsecond, and making a Problem thirty.
_kernels: dict[tuple[Any, ...], Launch] = {}


def forget() -> None:
    """Look kernels up anew at the next call of each: what is compiled for a problem has changed."""
    _kernels.clear()


def forward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute output and lse; arguments are those of the operators."""
    return _run(FORWARD, rank, arguments)


def backward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of the inputs; empty ones where there is no input. Arguments are the operators'."""
    return _run(BACKWARD, rank, arguments)


def part(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute output and lse of a part of a layout; arguments are those of the operators."""
    return _run(PART, rank, arguments)


def part_backward(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of the inputs of `part`; empty ones where there is no input."""
    return _run(PART_BACKWARD, rank, arguments)


def tangent(rank: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute output and lse, and the tangents of both; arguments are those of the operators."""
    return _run(TANGENT, rank, arguments)


def _run(signature: Signature, rank: int, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    # The dispatcher gives lists for the parameters.
    first = signature.parameters
    arguments = (*arguments[:first], *map(tuple, arguments[first : first + 4]), *arguments[first + 4 :])
    results = find(signature, rank, arguments)(arguments)
    return tuple([arguments[0].new_empty(0) if result is None else result for result in results])


def find(signature: Signature, rank: int, arguments: tuple[Any, ...], is_one: bool = False) -> Launch:
    """Return what calls the kernel for some arguments; checks them when such ones are first seen.

    Parameters
    ----------
    signature
        Of the operator.
    rank
        Axes of the layout.
    arguments
        The operator's.
    is_one
        Of a backward, whether query, key and value are parts of one tensor, so that their gradients are to be, too.
    """
    first, at = signature.parameters, [signature.direction, rank, is_one]
    for one in arguments[:first]:
        # Of the CPU or of CUDA, by which implementation this is: the number tells which.
        at += (one.shape, one.stride(), one.dtype, one.get_device()) if one is not None else (None,)
    at.append(arguments[first : first + 4])
    for place, one in enumerate(arguments[signature.later :]):
        if one is not None:  # What is left out is the same as what is said to be.
            at += (place, _kind(one))
    if _may_round(signature, arguments):
        at.append("tf32")
    key = tuple(at)
    found = _kernels.get(key)
    if found is None:
        found = _launch(_look(signature, rank, arguments, is_one))
        if len(_kernels) >= _KERNELS:
            _kernels.clear()
        _kernels[key] = found
    return found


def _may_round(signature: Signature, arguments: tuple[Any, ...]) -> bool:
    """Return whether products may round to TF32: those of the forward on a GPU, if torch's own may."""
    query = arguments[0]
    is_asked = signature is FORWARD and query.dtype is torch.float32 and query.get_device() >= 0
    return is_asked and is_tf32_allowed()


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    # A word is part of the problem, and a number is not.
    return argument if isinstance(argument, str) else type(argument)


def _look(signature: Signature, rank: int, arguments: tuple[Any, ...], is_one: bool) -> _Found:
    from na_compiler.compiler.serving import STEP, find_kernel  # noqa: PLC0415

    given = signature.by_name(arguments)
    query = given["query"]
    check_rank(rank, query)
    problem = problem_of(given)
    wanted = problem if place_of(given) is None else problem.opened()
    named = {"rounds": _may_round(signature, arguments), "steps": math.prod(query.shape[1:-2]) <= STEP}
    kernel: Kernel = find_kernel(wanted, signature.direction, target_of(query.device), **named)
    taken = kernel.info.arguments
    known = checks.check_call(kernel.problem, taken, given)
    absent = [argument for argument in taken if GIVEN in argument.shape and given[argument.name] is None]
    names = [*signature.names, *(argument.name for argument in absent)]
    read = [argument for argument in taken if argument.role in {INPUT, SCALAR}]
    tensors = [argument for argument in read if argument.role == INPUT]
    there = [(argument, given[argument.name]) for argument in tensors if argument not in absent]
    written = [argument for argument in taken if argument.role == OUTPUT]
    made = [_way(argument.sizes(known), argument.dtype) for argument in written]
    if any(argument.role == WORKSPACE for argument in taken):
        spaces = kernel.info.workspace.shapes(known["batch"], known["additional"], known)
        made += [_way(shape, "float32") for shape in spaces]
    whole = _whole(kernel, written, made) if is_one else None
    outputs = [argument.name for argument in written]
    # From the end: where one name is twice, it is what stands for nothing.
    places = {name: place for place, name in enumerate(names)}
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]] = operator.itemgetter(*(places[one.name] for one in read))
    return _Found(
        kernel,
        with_place(pick, kernel, signature, known) if kernel.problem.is_open else pick,
        signature.defaults,
        tuple(_way(argument.sizes(known), argument.dtype) for argument in absent),
        len(tensors),
        tuple(argument.strides == FREE for argument in tensors),
        tuple(made),
        len(written),
        tuple(outputs.index(result.name) if result.name in outputs else None for result in signature.results),
        query.get_device(),
        all(_is_readable(kernel, argument, tensor) for argument, tensor in there),
        whole,
    )


def _whole(kernel: Kernel, written: list[Any], made: list[Way]) -> Way | None:
    """Return how to make one tensor of the first three outputs; ``None`` where the kernel cannot write them there."""
    first, *others = made[:_PARTS]
    if any(other != first for other in others) or any(argument.strides != FREE for argument in written[:_PARTS]):
        return None
    shape, strides = side_by_side(first[0])
    part = torch.empty(shape, dtype=first[2], device="meta").select(-3, 0)
    if strides[-3] * part.element_size() % kernel.info.alignment or strides_wanted(kernel.info, written[0], part):
        return None
    return shape, strides, first[2]


def _way(shape: tuple[int, ...], dtype: str) -> Way:
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return tuple(shape), strides, getattr(torch, dtype)


def _is_readable(kernel: Kernel, argument: Any, tensor: Tensor) -> bool:
    """Return whether a kernel can read a tensor of these strides where it is, at an aligned address."""
    if not tensor.numel() or tensor.stride(-1) != 1:
        return False
    if argument.strides != FREE:
        return tensor.is_contiguous()
    return strides_wanted(kernel.info, argument, tensor) is None


def _making(found: _Found, empty: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    """Return what makes the tensors that a kernel writes."""
    ways, whole = found.made, found.whole
    if whole is None:
        return lambda: [empty(*way) for way in ways]
    others = ways[_PARTS:]
    return lambda: [*empty(*whole).unbind(-3), *[empty(*way) for way in others]]


# torch.cuda.current_device without asking whether CUDA is initialised, which it is where there is a tensor.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _launch(found: _Found) -> Launch:
    """Return what computes the results for arguments of an operator.

    Every line of it counts where the kernel is small: what it needs is at hand without asking an object for it.
    """
    function, pick, absent, outputs = found.kernel.unchecked, found.pick, found.absent, found.outputs
    defaults, wanted, device = found.defaults, len(found.defaults), found.device
    results = None if len(found.results) == outputs else found.results
    empty = _empty_on_cpu if device < 0 else _empty_on_cuda
    alignment = found.kernel.info.alignment
    aligned = tuple(place for place, is_free in enumerate(found.free) if is_free) if alignment > 1 else ()
    is_direct = found.is_direct
    make = _making(found, empty)

    def launch(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(arguments) < wanted:
            arguments += defaults[len(arguments) :]
        if absent:
            arguments += tuple([empty(*way) for way in absent])
        read = pick(arguments)
        made = make()
        is_readable = is_direct
        for place in aligned:
            if read[place].data_ptr() % alignment:
                is_readable = False
        if is_readable:
            function(*read, *made)
        else:
            made = _carefully(found, read, made)
        if results is None:
            return tuple(made[:outputs])
        return tuple([None if place is None else made[place] for place in results])

    def launch_on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if device == _current_device():
            return launch(arguments)
        # Kernels are launched on the current one, and tensors are made there.
        with CUDA.guard(device):
            return launch(arguments)

    return launch if device < 0 else launch_on_gpu


def _carefully(found: _Found, read: tuple[Any, ...], made: list[Tensor]) -> list[Tensor]:
    """Call a kernel with copies of the tensors that it cannot read where they are; returns what it wrote."""
    tensors = [
        compact_if_empty(_with_rows(tensor if free or tensor.is_contiguous() else tensor.contiguous()))
        for tensor, free in zip(read, found.free, strict=False)
    ]
    made = [compact_if_empty(one) for one in made]
    numbers, function = read[found.tensors :], found.kernel.function
    try:
        function(*tensors, *numbers, *made)
    except MisplacedError as error:
        _say_once(error)
        function(*map(_copied, tensors), *numbers, *made)
    return made


def on_cuda(implementation: Callable[..., Any], query: Tensor, *arguments: Any) -> Any:
    """Call an implementation with the tensors' device as the current one, which launching a kernel makes it."""
    device = query.get_device()
    if device == _current_device():
        return implementation(query, *arguments)
    with CUDA.guard(device):
        return implementation(query, *arguments)


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
