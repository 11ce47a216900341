"""Masks that are made for a length which is dynamic: what they are for every length up to a bound.

A mask whose elements do not depend on the length, but for how many of them there are, is for each length the corner of
one large mask. So one of the bound's size tells what all shorter ones are. Which nodes keep that property is listed
here: those that look at elements one by one, that make numbers from 0 on, that insert, swap or expand dimensions, that
pick elements by their numbers, and sums and differences of an element and those before it. A length that is used as a
number, or is counted from its end, is declined.

Another size that is dynamic, the batch's, is taken to be 1. That tells what all others are where nothing differs along
it: such dimensions are expanded, and what counts along one may pick from one of as many, and no more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from na_compiler.passes.constants import Constants
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.effects import asks_for_dtype, asks_only, name_of
from na_compiler.passes.graph import tensor_of
from na_compiler.passes.masks import LARGEST

__all__ = ["LONGEST", "corner"]

# Looking at a mask of so many tokens takes half a second.
LONGEST = 4096
_ELEMENTWISE = {
    "__and__", "__or__", "__xor__", "_to_copy", "abs", "add", "alias", "and_", "bitwise_and", "bitwise_not",
    "bitwise_or", "bitwise_xor", "bool", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "detach", "div",
    "eq", "float", "floor_divide", "floordiv", "ge", "gt", "half", "int", "invert", "le", "logical_and", "logical_not",
    "logical_or", "logical_xor", "long", "lt", "masked_fill", "maximum", "minimum", "mod", "mul", "ne", "neg", "or_",
    "remainder", "rsub", "sub", "to", "truediv", "where", "xor",
}  # fmt: skip
_TURNING = {"mT", "permute", "swapaxes", "t", "transpose", "tril", "triu", "unsqueeze"}
# Each element is made of those before it: of a sum, or a difference.
_RUNNING = {"cumprod", "cumsum"}
# Numbers stay which they are, and along a dimension of as many.
_KEEPING = {"alias", "clone", "contiguous", "detach", "expand", "getitem", "reshape", "unsqueeze", "view"}
_SIZED = {"expand", "new_ones", "new_zeros", "ones", "zeros"}
_FILLED = {"full": 1, "new_full": 2}  # Which argument they are filled with.


def corner(
    constants: Constants, mask: fx.Node, at: fx.Node, length: torch.SymInt | None, bound: int = 0
) -> torch.Tensor:
    """Return a mask as it is for a bound of its length; for shorter ones it is the corner of that.

    Parameters
    ----------
    constants
        Values of what does not depend on inputs.
    mask, at
        The mask's node, and the node that reads it.
    length
        The size that is dynamic; None where only others are.
    bound
        What it is taken to be; tensors that are sliced may be smaller, and the mask is then.

    Raises
    ------
    DeclinedError
        If the mask is made in another way; says of which node that is.
    """
    _check_inputs(constants, mask)
    made = _Corner(constants, at, length, bound)
    value = made.tensor(mask)
    need(mask not in made.counting, f"{mask.name} counts along a dimension of another dynamic size")
    return value


class _Corner:
    def __init__(self, constants: Constants, at: fx.Node, length: torch.SymInt | None, bound: int) -> None:
        self.constants, self.at, self.bound = constants, at, bound
        self.length = None if length is None else length.node.expr
        self.said = "a size is dynamic" if length is None else "its length is dynamic"
        self.known: dict[fx.Node, torch.Tensor] = {}
        # What counts from 0 to another size that is dynamic, by node: that size.
        self.counting: dict[fx.Node, Any] = {}

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """Return what a node is for the bound."""
        if node not in self.known:
            described = tensor_of(node)
            if not isinstance(described, torch.Tensor):
                raise DeclinedError(f"its mask depends on {node.name}, of which the size is not known")
            is_fixed = all(_is_fixed(each) for each in self.constants.needed(node, self.at))
            is_written = any(node in memory for memory in self.constants.writes.values())
            value = self.constants.value(node, self.at) if is_fixed or is_written else self._made(node)
            self.known[node] = value
        return self.known[node]

    def _made(self, node: fx.Node) -> torch.Tensor:
        asked = node.args[0] if asks_only(node) else None
        for each in node.all_input_nodes:
            if each is not asked and not _is_size(each):
                self.tensor(each)
        self._check_counting(node)
        self._check_along(node)
        self._check(node)
        is_expanded = name_of(node) == "expand"  # Which takes no memory.
        sizes = [size if isinstance(size, int) else self._taken(size) for size in tensor_of(node).shape]
        need(is_expanded or math.prod(sizes) <= LARGEST, f"its mask is too large to look at, in {node.name}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self._value(each, node))
        target: Any = node.target
        if node.op == "call_method":
            target = getattr(torch.Tensor, target)
        try:
            with torch.no_grad():
                made = target(*args, **kwargs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise DeclinedError(f"its mask cannot be computed here: {str(error).partition(chr(10))[0]}") from error
        if not isinstance(made, torch.Tensor):
            raise DeclinedError(f"its mask depends on {node.name}, which is no tensor")
        return made

    def _value(self, each: fx.Node, user: fx.Node) -> Any:  # noqa: ANN401 - what a node is called with
        if asks_only(user) and each is user.args[0]:
            need(asks_for_dtype(user), f"{self.said}, and {user.name} has that of {each.name}")
            described = tensor_of(each)
            return torch.zeros((), dtype=described.dtype, device=described.device)
        return self._size(each) if _is_size(each) else self.tensor(each)

    def _size(self, node: fx.Node) -> int:
        """Return what a size is taken to be: the bound for the length, and 1 for others, which only expand."""
        value = tensor_of(node)
        return value if isinstance(value, int) else self._taken(value)

    def _taken(self, size: torch.SymInt) -> int:
        expression = size.node.expr
        if self.length is None:
            return 1
        if expression == self.length:
            return self.bound
        need(not expression.has(self.length), f"its mask has a size of {expression}, which is computed from its length")
        return 1

    def _check(self, node: fx.Node) -> None:
        """Decline a node whose elements may depend on the length."""
        name, said = name_of(node), self.said
        if name == "arange":
            need(self._counted(node) is not None, f"{said}, and {node.name} does not count to it from 0")
        elif name == "index" or (name == "getitem" and _picks(node)):
            for numbers in node.args[1]:  # type: ignore[union-attr]
                if not isinstance(numbers, fx.Node):
                    continue
                found = self.tensor(numbers)
                need(found.dtype in {torch.int32, torch.int64}, f"{said}, and {node.name} picks by {found.dtype}")
                need(bool((found >= 0).all()), f"{said}, and {node.name} may count from its end")
        elif name in {"getitem", "slice"}:
            need(self._begins(node, name), f"{said}, and {node.name} may count from its end")
        elif name in {"reshape", "view"}:
            source, result = (
                [str(size) for size in tensor_of(each).shape if str(size) != "1"] for each in (node.args[0], node)
            )
            need(source == result, f"{said}, and {node.name} may change the order of elements")
        elif name in _FILLED:
            values = [node.kwargs.get("fill_value"), *node.args[_FILLED[name] :]]
            need(not any(isinstance(each, fx.Node) for each in values), f"{said}, and {node.name} has it inside")
        elif name in _ELEMENTWISE | _TURNING:
            numbers = [each for each in node.all_input_nodes if _is_size(each)]
            need(not numbers, f"{said}, and {node.name} computes with a size")
        elif name == "diff":
            # Of one difference, with something in front, and nothing at the end.
            arguments = dict(zip(("self", "n", "dim", "prepend", "append"), node.args, strict=False)) | node.kwargs
            fits = bool(arguments.get("n", 1) == 1) and arguments.get("prepend") is not None
            need(fits and arguments.get("append") is None, f"{said}, and {node.name} may count from its end")
        else:
            need(name in _SIZED | _RUNNING, f"{said}, and {node.name} may depend on it otherwise than in size")

    def _check_counting(self, node: fx.Node) -> None:
        """Decline a node that does more with numbers along a dimension than to pick what is the same for all."""
        name, end = name_of(node), self._counted(node)
        if end is not None and end != self.length:
            self.counting[node] = end
        if not any(each in self.counting for each in node.all_input_nodes):
            return
        source: Any = node.args[0]
        if source in self.counting:
            need(name in _KEEPING, f"{self.said}, and {node.name} computes with numbers along a dimension of it")
            self.counting[node] = self.counting[source]
            return
        picks = name == "index" or (name == "getitem" and _picks(node))
        need(picks, f"{self.said}, and {node.name} computes with numbers along a dimension of it")
        picked: Any = node.args[1]
        for size, numbers in zip(tensor_of(source).shape, picked, strict=False):
            if numbers in self.counting:
                is_same = isinstance(size, torch.SymInt) and size.node.expr == self.counting[numbers]
                need(is_same, f"{self.said}, and {node.name} picks by numbers of another dimension")

    def _check_along(self, node: fx.Node) -> None:
        """Decline what makes elements different along a dimension of another dynamic size."""
        name = name_of(node)
        if name not in _RUNNING | {"diff", "tril", "triu"}:
            return
        sizes = tensor_of(node.args[0]).shape[-2:]
        if name not in {"tril", "triu"}:
            names = ("self", "n", "dim") if name == "diff" else ("self", "dim")
            arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
            dim: Any = arguments.get("dim", -1 if name == "diff" and "axis" not in arguments else None)
            need(type(dim) is int, f"{self.said}, and {node.name} is along a dimension that is not known")
            sizes = (tensor_of(node.args[0]).shape[dim],)
        others = [size for size in sizes if isinstance(size, torch.SymInt) and size.node.expr != self.length]
        need(not others, f"{self.said}, and {node.name} differs along a dimension of {others}")

    def _counted(self, node: fx.Node) -> Any:  # noqa: ANN401 - a symbol
        """Return the dynamic size to which a node has the numbers from 0; None where it has others."""
        if name_of(node) != "arange":
            return None
        numbers = [*node.args, *(node.kwargs[each] for each in ("start", "end", "step") if each in node.kwargs)]
        first, end, step = {1: (0, *numbers, 1), 2: (*numbers, 1), 3: tuple(numbers)}.get(len(numbers), (1, 1, 1))
        size = tensor_of(end)
        is_plain = isinstance(first, int) and isinstance(step, int) and first == 0 and step == 1
        if not is_plain or not isinstance(size, torch.SymInt):
            return None
        expression = size.node.expr
        is_other = self.length is None or not expression.has(self.length)
        return expression if is_other or expression == self.length else None

    def _begins(self, node: fx.Node, name: str) -> bool:
        """Return whether only dimensions are inserted, and slices taken of all or from the beginning to the length."""
        index: Any = node.args[1] if name == "getitem" else slice(*(*node.args[2:], None, None, None)[:3])
        for item in index if isinstance(index, tuple) else (index,):
            if not isinstance(item, slice):
                if item is not None and item is not Ellipsis:
                    return False
                continue
            is_whole = item.stop is None or (isinstance(item.stop, int) and item.stop >= 0)
            is_length = isinstance(item.stop, fx.Node) and self._size(item.stop) == self.bound
            if item.start not in {None, 0} or item.step not in {None, 1} or not (is_whole or is_length):
                return False
        return True


def _check_inputs(constants: Constants, mask: fx.Node) -> None:
    """Decline a mask that depends on elements of an input, and not only on how many they are."""
    found, pending = set(), [mask]
    while pending:
        node = pending.pop()
        if node in found or _is_size(node):
            continue
        found.add(node)
        is_input = node.op == "placeholder" and node.name not in constants.held
        need(not is_input, f"its mask depends on the input {node.name}")
        asked = node.args[0] if asks_only(node) else None
        pending += [each for each in node.all_input_nodes if each is not asked]


def _is_fixed(node: fx.Node) -> bool:
    """Return whether a node is a tensor of a size that is known, or none at all."""
    described = tensor_of(node)
    if not isinstance(described, torch.Tensor):
        return not isinstance(described, torch.SymInt)
    return all(isinstance(size, int) for size in described.shape)


def _picks(node: fx.Node) -> bool:
    """Return whether a node picks elements by tensors of their numbers."""
    index = node.args[1]
    return isinstance(index, tuple) and all(isinstance(tensor_of(each), torch.Tensor) for each in index)


def _is_size(node: fx.Node) -> bool:
    return isinstance(tensor_of(node), (int, torch.SymInt))
