"""Whether torch's dispatcher would do nothing with some tensors but differentiate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["PLAIN", "are_plain", "is_quiet"]


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet.from_raw_repr(0)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# What the dispatcher knows of an ordinary dense tensor of a device; of one made in inference mode. Sparse, nested,
# negated, quantised, wrapped tensors have other keys, and so have those of other devices.
PLAIN = frozenset(
    keys
    for device in ("CPU", "CUDA")
    for keys in (
        _keys(device, f"Autocast{device}"),
        _keys(device, f"Autocast{device}", "ADInplaceOrView", f"Autograd{device}"),
    )
)

# torch's state that says so, looked up once: half of what asking costs.
_dispatch_keys = torch._C._dispatch_keys
_asked = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_any_autocast_enabled,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_quiet() -> bool:
    """Return whether torch is in no mode in which the dispatcher does more than to differentiate."""
    for ask in _asked:
        if ask():
            return False
    return forward_ad._current_level < 0


def are_plain(tensors: Iterable[Any]) -> bool:
    """Return whether some tensors are ordinary ones."""
    for one in tensors:  # noqa: SIM110 - a generator takes longer
        if type(one) not in _TYPES or _dispatch_keys(one).raw_repr() not in PLAIN:
            return False
    return True
