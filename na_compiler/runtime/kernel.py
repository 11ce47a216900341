"""`ForwardKernel`, `BackwardKernel`, `TangentKernel`: a compiled function for one problem on one target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from na_compiler import checks, operands
from na_compiler.operands import DIRECTIONS, FREE, OUTPUT, WORKSPACE, Argument
from na_compiler.problem import Problem
from na_compiler.workspace import ADDITIONAL, Workspace

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "ABI", "DIRECTIONS", "BackwardKernel", "ForwardKernel", "Kernel", "KernelInfo", "MisplacedError", "TangentKernel",
    "compact_if_empty", "make_kernel", "strides_wanted", "zero_tangent",
]  # fmt: skip

# What a call is given and returns: tensors of one library, torch's or NumPy's.
Array = TypeVar("Array", "torch.Tensor", "NDArray[np.generic]")

# Changed whenever the compiled functions' arguments do.
ABI = 3


@dataclass(frozen=True)
class KernelInfo:
    """What a library computes, as its manifest says.

    Parameters
    ----------
    problem
        What it computes.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    target
        Name of the target that it was compiled for.
    workspace
        What it needs beside its inputs and outputs.
    alignment
        Bytes that the addresses and strides of query, key, value and the like are multiples of, on a GPU.
    adjacent_heads
        Whether the heads of a token must lie one after another in query, key, value and the like.
    """

    problem: Problem
    direction: str
    target: str
    workspace: Workspace = field(default_factory=Workspace)
    alignment: int = 1
    adjacent_heads: bool = False

    @functools.cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """What the compiled function is called with, in order."""
        return operands.arguments(self.problem, self.direction, self.workspace)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON."""
        return {
            "problem": self.problem.to_dict(),
            "direction": self.direction,
            "target": self.target,
            "workspace": self.workspace.to_dict(),
            "operands": [argument.to_dict() for argument in self.arguments],
            "alignment": self.alignment,
            "adjacent_heads": self.adjacent_heads,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KernelInfo:
        """Make an info of what `to_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the data is none, or a kernel's that takes other operands than this version gives it.
        """
        workspace = Workspace.from_dict(data["workspace"])
        problem = Problem.from_dict(data["problem"])
        wants = (data["alignment"], data["adjacent_heads"])
        info = cls(problem, data["direction"], data["target"], workspace, *wants)
        if data["operands"] != info.to_dict()["operands"]:
            raise ValueError(
                f"its kernel for {problem} {info.direction} takes other operands than those of this version"
            )
        return info


class MisplacedError(ValueError):
    """A tensor does not lie in memory as a GPU has to read it; a contiguous copy would."""


class Kernel:
    """A compiled function. Make one with `na_compiler.compile` or `na_compiler.load_bundle`.

    Parameters
    ----------
    info
        What it computes.
    function
        The compiled function, with the outputs among its arguments; ``None`` where this machine cannot run it.
    keep
        Kept alive as long as the kernel.
    """

    def __init__(self, info: KernelInfo, function: Callable[..., None] | None, keep: object = None) -> None:
        self.info = info
        self._unchecked = function
        is_any = info.alignment == 1 and not info.adjacent_heads
        self._function = function if function is None or is_any else _checking_places(info, function)
        self._keep = keep

    @property
    def problem(self) -> Problem:
        """What the kernel computes."""
        return self.info.problem

    @property
    def target(self) -> str:
        """Name of the target that it was compiled for."""
        return self.info.target

    @property
    def function(self) -> Callable[..., None]:
        """The compiled function itself; it checks its arguments, and allocates nothing.

        Raises
        ------
        RuntimeError
            If this machine cannot run it.
        """
        return self._there(self._function)

    @property
    def unchecked(self) -> Callable[..., None]:
        """As `function`, for tensors that are known to lie where the kernel can read them."""
        return self._there(self._unchecked)

    def _there(self, function: Callable[..., None] | None) -> Callable[..., None]:
        if function is None:
            raise RuntimeError(
                f"this kernel was compiled for {self.target}, which this machine cannot run; "
                f"compile it for {self.target.partition(':')[0]!r}, the one that is here"
            )
        return function

    def spaces(self, query: Array, additional_keys: Array | None = None) -> list[Array]:
        """Allocate the workspace that comes last among the function's arguments, where query is."""
        if not self.info.workspace.buffers:
            return []
        additional = 0 if additional_keys is None else int(additional_keys.shape[1])
        return self._spaces(query, {operands.BATCH: query.shape[0], ADDITIONAL: additional})

    def _spaces(self, like: Array, known: Mapping[str, int]) -> list[Array]:
        shapes = self.info.workspace.shapes(known[operands.BATCH], known[ADDITIONAL])
        return [_empty(like, shape, "float32") for shape in shapes]

    def _call(self, query: Array, given: dict[str, Any]) -> tuple[Array, ...]:
        """Call the function with operands by name, and outputs and workspace that are made for it; returns the outputs.

        Raises
        ------
        ValueError
            If an operand does not fit the problem.
        RuntimeError
            If this machine cannot run the kernel.
        """
        function, arguments = self.function, self.info.arguments
        known = checks.check_call(self.problem, arguments, given)
        same = self.problem.dtype
        for name, default in {"scale": self.problem.head_dim**-0.5, **operands.defaults()}.items():
            if given.get(name) is None:
                given[name] = default
        results: dict[str, Array] = {
            argument.name: _empty(query, argument.sizes(known), None if argument.dtype == same else argument.dtype)
            for argument in arguments
            if argument.role == OUTPUT
        }
        given |= results
        names = (argument.name for argument in arguments if argument.role != WORKSPACE)
        for argument in arguments:
            if operands.GIVEN in argument.shape and given.get(argument.name) is None:
                given[argument.name] = _empty(query, argument.sizes(known), argument.dtype)
        placed = [compact_if_empty(given[name]) for name in names]
        function(*placed, *map(compact_if_empty, self._spaces(query, known)))
        return tuple(results.values())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.problem} {self.target}>"


class ForwardKernel(Kernel):
    """A compiled forward.

    Notes
    -----
    On the CPU, a call takes at most 3 MiB a thread beside its outputs, whatever the problem: keys and values that a
    task keeps together, and the scores of some queries. With a bias by relative position half a MiB more.

    Examples
    --------
    >>> kernel = compile(Problem((56, 56), heads=4, head_dim=32, kernel_size=7))  # doctest: +SKIP
    >>> output, lse = kernel(query, key, value)  # doctest: +SKIP
    """

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        scale: float | None = None,
        **others: Array | float,
    ) -> tuple[Array, Array]:
        """Compute output and lse.

        Parameters
        ----------
        query
            ``[batch, *layout, heads, head_dim]``, a torch tensor on the CPU or a NumPy array; any strides but the last
            one, which is 1. Nothing is copied.
        key, value
            ``[batch, *layout, heads_kv, head_dim]`` and ``[..., head_dim_v]``, likewise.
        additional_keys, additional_values
            ``[batch, additional, heads_kv, head_dim]`` and ``[..., head_dim_v]``, if the problem has them.
        scale
            Of the scores; default ``head_dim ** -0.5``.
        **others
            Further operands of the problem, by name.

        Returns
        -------
        output
            ``[batch, *layout, heads, head_dim_v]``, in the inputs' dtype.
        lse
            ``[batch, *layout, heads]``, float32: the natural logarithm of the sum of exponentials of scaled scores.

        Raises
        ------
        ValueError
            If a tensor does not fit the problem.
        RuntimeError
            If this machine cannot run the kernel.
        """
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "additional_keys": additional_keys}
        given |= {"additional_values": additional_values, "scale": scale, **others}
        output, lse = self._call(query, given)
        return output, lse


class BackwardKernel(Kernel):
    """A compiled backward.

    Notes
    -----
    On the CPU, tasks keep their parts of the gradients of keys and values in a workspace of float32, so that they add
    up in one order whatever the number of threads: ``info.workspace.shapes(batch)``. It is at most 9 times the size of
    query, key and value together (in float32, head_dim rounded up to whole vectors), whatever the window; mostly 1
    to 6 times. Tasks have a part of the gradient of a bias by relative position as well: a table each.
    """

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        output: Array,
        lse: Array,
        grad_output: Array,
        grad_lse: Array | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        scale: float | None = None,
        **others: Array | float,
    ) -> tuple[Array, ...]:
        """Compute the gradients of query, key, value and, if the problem has them, the additional keys and values.

        Parameters
        ----------
        query, key, value, additional_keys, additional_values, scale, **others
            As the forward was given them.
        output, lse
            What the forward returned; contiguous.
        grad_output
            Gradient of the output; any strides but the last one, which is 1.
        grad_lse
            Gradient of lse, contiguous; default none, which is 0.

        Returns
        -------
        tuple
            ``(grad_query, grad_key, grad_value)`` or ``(..., grad_additional_keys, grad_additional_values)``. Of an
            operand without a batch, what each batch entry adds to its gradient.

        Raises
        ------
        ValueError
            If a tensor does not fit the problem.
        RuntimeError
            If this machine cannot run the kernel.
        """
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "additional_keys": additional_keys}
        given |= {"additional_values": additional_values, "scale": scale, **others}
        given |= {"output": output, "lse": lse, "grad_output": grad_output}
        return self._call(query, {**given, "grad_lse": grad_lse})


class TangentKernel(Kernel):
    """A compiled forward together with its derivative in one direction (a Jacobian-vector product).

    Notes
    -----
    On the CPU, a call takes at most 6 MiB a thread beside its results.

    Examples
    --------
    >>> kernel = compile(Problem((56, 56), heads=4, head_dim=32, kernel_size=7), direction="tangent")  # doctest: +SKIP
    >>> output, lse, tangent_output, tangent_lse = kernel(query, key, value, tangent_query)  # doctest: +SKIP
    """

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        tangent_query: Array | None = None,
        tangent_key: Array | None = None,
        tangent_value: Array | None = None,
        additional_keys: Array | None = None,
        additional_values: Array | None = None,
        tangent_additional_keys: Array | None = None,
        tangent_additional_values: Array | None = None,
        scale: float | None = None,
        **others: Array | float,
    ) -> tuple[Array, Array, Array, Array]:
        """Compute output and lse, and how they change as the inputs move along their tangents.

        Parameters
        ----------
        query, key, value, additional_keys, additional_values, scale, **others
            As for `ForwardKernel`.
        tangent_query, tangent_key, tangent_value, tangent_additional_keys, tangent_additional_values
            Of the shape and dtype of what each belongs to; any strides but the last one, which is 1. Default 0, of
            which one row is kept in memory: it is multiplied with as any other.

        Returns
        -------
        output, lse
            As `ForwardKernel` returns them.
        tangent_output
            ``[batch, *layout, heads, head_dim_v]``, in the inputs' dtype.
        tangent_lse
            ``[batch, *layout, heads]``, float32.

        Raises
        ------
        ValueError
            If a tensor does not fit the problem.
        RuntimeError
            If this machine cannot run the kernel.
        """
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "additional_keys": additional_keys}
        given |= {"additional_values": additional_values, "scale": scale, **others}
        given |= {"tangent_query": tangent_query, "tangent_key": tangent_key, "tangent_value": tangent_value}
        given |= {"tangent_additional_keys": tangent_additional_keys}
        given |= {"tangent_additional_values": tangent_additional_values}
        for operand in operands.differentiable():
            name, tensor = operand.tangent().name, given.get(operand.name)
            if tensor is None and given.get(name) is not None:
                raise ValueError(f"{name} is given, and {operand.name} is None: leave both out, or give both")
            if tensor is not None and given.get(name) is None:
                given[name] = zero_tangent(tensor)
        output, lse, tangent_output, tangent_lse = self._call(query, given)
        return output, lse, tangent_output, tangent_lse


# Strides of one tensor that are known to be right, beyond which they are forgotten.
_STRIDES_KEPT = 256


def _checking_places(info: KernelInfo, function: Callable[..., None]) -> Callable[..., None]:
    """Refuse tensors that a GPU would fault on; TVM does not check addresses.

    Strides are looked at once: what was right is known by them, which takes a tenth of the time.
    """
    known: dict[int, set[tuple[int, ...]]] = {}
    taken = {place: argument for place, argument in enumerate(info.arguments) if argument.strides == FREE}
    places = [(place, known.setdefault(place, set())) for place in taken]
    alignment = info.alignment

    def check(place: int, tensor: torch.Tensor) -> None:
        wanted = strides_wanted(info, taken[place], tensor)
        if wanted is None and tensor.data_ptr() % alignment:
            rest = tensor.data_ptr() % alignment
            wanted = f"lie at a multiple of {alignment} bytes; its address modulo that is {rest}"
        if wanted is not None:
            name = taken[place].name
            raise MisplacedError(
                f"{name} must {wanted}; {name}.clone(memory_format=torch.contiguous_format) would work"
            )
        if len(known[place]) >= _STRIDES_KEPT:
            known[place].clear()
        known[place].add(tensor.stride())

    def run(*arguments: Any) -> None:  # noqa: ANN401 - tensors and numbers, each by its place
        for place, right in places:
            tensor = arguments[place]
            if tensor.stride() not in right or tensor.data_ptr() % alignment:
                check(place, tensor)
        function(*arguments)

    return run


def strides_wanted(info: KernelInfo, argument: Argument, tensor: torch.Tensor) -> str | None:
    """Return which strides a tensor would have to have for a GPU to read it; ``None`` if they are right."""
    strides = tensor.stride()
    elements = max(info.alignment // info.problem.element_bytes, 1)
    if any(stride % elements for stride in strides[:-1]):
        return f"have strides that are multiples of {elements}; they are {strides}"
    # Where there is one axis of tokens only, heads have a stride of their own in a tensor map.
    if info.adjacent_heads and argument.has_layout and tensor.dim() > 4 and strides[-2] != tensor.shape[-1]:
        return f"have heads that lie {tensor.shape[-1]} elements apart; its strides are {strides}"
    return None


def make_kernel(info: KernelInfo, function: Callable[..., None] | None, keep: object = None) -> Kernel:
    """Make the kernel of a direction."""
    return _KINDS[info.direction](info, function, keep)


_KINDS: Mapping[str, type[Kernel]] = {
    "forward": ForwardKernel,
    "backward": BackwardKernel,
    "tangent": TangentKernel,
}


def _is_torch(tensor: object) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torch"


def compact_if_empty(tensor: Any) -> Any:  # noqa: ANN401 - a number, or a tensor of either library
    """Return a tensor without elements with the strides that TVM's check expects, which are not torch's nor NumPy's.

    Numbers, and tensors with elements, are returned as they are.
    """
    shape = getattr(tensor, "shape", ())
    if math.prod(shape):
        return tensor
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if _is_torch(tensor):
        return tensor.as_strided(shape, strides)
    import numpy as np  # noqa: PLC0415

    return np.lib.stride_tricks.as_strided(tensor, strides=[stride * tensor.itemsize for stride in strides])


def _empty(like: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:  # noqa: ANN401 - of like's library
    if _is_torch(like):
        import torch  # noqa: PLC0415

        return torch.empty(shape, dtype=getattr(torch, dtype) if dtype else like.dtype, device=like.device)
    import numpy as np  # noqa: PLC0415

    return np.empty(shape, dtype or like.dtype)


def zero_tangent(like: Any) -> Any:  # noqa: ANN401 - of like's library
    """Return a tensor of zeros of a tensor's shape, all of whose rows are one row in memory."""
    row = like.shape[-1:]
    if _is_torch(like):
        return like.new_zeros(row).expand(like.shape)
    import numpy as np  # noqa: PLC0415

    # Not broadcast_to, whose result cannot be written, and which a kernel therefore does not take.
    strides = (0,) * (len(like.shape) - 1) + (like.itemsize,)
    return np.lib.stride_tricks.as_strided(np.zeros(row, like.dtype), like.shape, strides)
