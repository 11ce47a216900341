"""How tensors must lie in memory for a GPU to read them, which is asked before a kernel is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from na_compiler.operands import FREE, Argument
from na_compiler.runtime.info import KernelInfo

if TYPE_CHECKING:
    import torch

__all__ = ["MisplacedError", "checking_places", "strides_wanted"]

# Strides of one tensor that are known to be right, beyond which they are forgotten.
_STRIDES_KEPT = 256


class MisplacedError(ValueError):
    """A tensor does not lie in memory as a GPU has to read it; a contiguous copy would."""


def checking_places(info: KernelInfo, function: Callable[..., None]) -> Callable[..., None]:
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
