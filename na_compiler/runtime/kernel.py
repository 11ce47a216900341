"""`ForwardKernel`, `BackwardKernel`, `TangentKernel`: a compiled function for one problem on one target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from na_compiler import checks, operands
from na_compiler.operands import DIRECTIONS, OUTPUT, WORKSPACE
from na_compiler.place import Place, numbers_of_call
from na_compiler.problem import Problem
from na_compiler.runtime.arrays import Array, compact_if_empty, empty_like, zero_tangent
from na_compiler.runtime.info import ABI, KernelInfo
from na_compiler.runtime.placement import MisplacedError, checking_places, strides_wanted
from na_compiler.workspace import ADDITIONAL

__all__ = [
    "ABI", "DIRECTIONS", "BackwardKernel", "ForwardKernel", "Kernel", "KernelInfo", "MisplacedError", "TangentKernel",
    "compact_if_empty", "make_kernel", "strides_wanted", "zero_tangent",
]  # fmt: skip


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
        self._function = function if function is None or is_any else checking_places(info, function)
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
        queries = {f"queries{axis}": extent for axis, extent in enumerate(query.shape[1:-2])}
        return self._spaces(query, {operands.BATCH: query.shape[0], ADDITIONAL: additional, **queries})

    def _spaces(self, like: Array, known: Mapping[str, int]) -> list[Array]:
        shapes = self.info.workspace.shapes(known[operands.BATCH], known[ADDITIONAL], known)
        return [empty_like(like, shape, "float32") for shape in shapes]

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
        given |= self._place(known, given.pop("place", None))
        same = self.problem.dtype
        for name, default in {"scale": self.problem.head_dim**-0.5, **operands.defaults()}.items():
            if given.get(name) is None:
                given[name] = default
        results: dict[str, Array] = {
            argument.name: empty_like(query, argument.sizes(known), None if argument.dtype == same else argument.dtype)
            for argument in arguments
            if argument.role == OUTPUT
        }
        given |= results
        names = (argument.name for argument in arguments if argument.role != WORKSPACE)
        for argument in arguments:
            if operands.GIVEN in argument.shape and given.get(argument.name) is None:
                given[argument.name] = empty_like(query, argument.sizes(known), argument.dtype)
        placed = [compact_if_empty(given[name]) for name in names]
        function(*placed, *map(compact_if_empty, self._spaces(query, known)))
        return tuple(results.values())

    def _place(self, known: Mapping[str, int], place: Place | None) -> dict[str, int]:
        """Return what a kernel for an open layout is told of where its tensors lie, by the names of its arguments."""
        if not self.problem.is_open:
            if place is not None:
                raise ValueError(f"a kernel for {self.problem} takes no place; one for an open layout does")
            return {}
        queries, keys = ([known[f"{kind}{axis}"] for axis in range(self.problem.rank)] for kind in ("queries", "keys"))
        numbers = numbers_of_call(self.problem, queries, keys, place)
        return dict(zip(operands.place_names(self.problem), numbers, strict=True))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.problem} {self.target}>"


def _named(
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
    scale: float | None,
    others: Mapping[str, Array | float | Place],
) -> dict[str, Any]:
    """Return what every direction is given, by the names of operands."""
    additional = {"additional_keys": additional_keys, "additional_values": additional_values}
    return {"query": query, "key": key, "value": value, **additional, "scale": scale, **others}


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
        **others: Array | float | Place,
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
            Further operands of the problem, by name; and ``place``, a `na_compiler.Place`, if its layout is open.

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
        given = _named(query, key, value, additional_keys, additional_values, scale, others)
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
        **others: Array | float | Place,
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
        given = _named(query, key, value, additional_keys, additional_values, scale, others)
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
        **others: Array | float | Place,
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
        given = _named(query, key, value, additional_keys, additional_values, scale, others)
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


def make_kernel(info: KernelInfo, function: Callable[..., None] | None, keep: object = None) -> Kernel:
    """Make the kernel of a direction."""
    return _KINDS[info.direction](info, function, keep)


_KINDS: Mapping[str, type[Kernel]] = {
    "forward": ForwardKernel,
    "backward": BackwardKernel,
    "tangent": TangentKernel,
}
