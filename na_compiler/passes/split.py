"""Split neighborhood attention, scores, a softmax and weighted sums, becomes one kernel.

The operators between which weights are a tensor are those of `na_compiler.compat.natten`, as models call them that were
written for older versions of NATTEN. They are known by their names. What lies between them is followed from the sums
backwards: dropout that is off, a softmax over the window, biases by relative position, a scale.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from na_compiler.parameters import DTYPES, LONGEST_HEAD
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.effects import name_of, writes
from na_compiler.passes.graph import attempt, layer_of, operator_node, propagate, refresh, replace_node, tensor_of
from na_compiler.passes.masked import drop_unused

__all__ = ["replace_split"]

_LOG = logging.getLogger("na_compiler")
_CONVERTING = {"_to_copy", "bfloat16", "float", "half", "to", "type", "type_as"}
# What torch.export puts in front of conversions.
_CHECKING = {"_assert_tensor_metadata"}
_SAME = {"alias", "clone", "contiguous"}
_SOFTMAX = {"_softmax", "softmax", "torch.nn.functional.softmax"}
_DROPOUT = {"dropout", "torch.nn.functional.dropout"}
_MULTIPLYING, _DIVIDING = {"mul", "multiply"}, {"div", "divide", "truediv", "true_divide"}
# These copy where they have to, whatever the strides are.
_ANY_STRIDES = {"clone", "contiguous", "flatten", "linear", "reshape"}
_TURNING = {"movedim", "permute", "transpose"}


@dataclass
class _Found:
    """What is between scores and sums.

    Parameters
    ----------
    scores, query
        The node that computes them, and the query before it was scaled.
    parameters
        Kernel size, dilation and causality.
    bias
        A table by relative position, and None without.
    scale
        Of the scores.
    passed
        Nodes that read earlier what the kernel reads in the place of the sums.
    between
        Nodes from the sums' weights back to the scores.
    checks
        Nodes that check what is between at run time, and go with it.
    is_hidden
        Whether columns without a key take no part.
    has_softmax
        Whether it has been met.
    """

    parameters: tuple[list[int], list[int], list[bool]]
    scores: fx.Node | None = None
    query: fx.Node | None = None
    bias: fx.Node | None = None
    scale: float = 1.0
    passed: list[fx.Node] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)
    checks: list[fx.Node] = field(default_factory=list)
    is_hidden: bool = False
    has_softmax: bool = False


def replace_split(module: fx.GraphModule) -> int:
    """Replace split attention by neighborhood attention; returns how many there were.

    Parameters
    ----------
    module
        Changed in place. What is computed between the operators otherwise stays, with a line in the log.
    """
    count = 0
    for node in list(module.graph.nodes):
        if _operator(node) != "window_sums":
            continue
        try:
            found = _between(node)
            _check(found, node)
            with attempt(node.graph):
                output = _attend(node, found)
            _use(node, output)
            # Also dropout that is off, which is not taken for dead: it might be random.
            for unused in (*dict.fromkeys(found.checks), *found.between):
                node.graph.erase_node(unused)
        except DeclinedError as why:
            _LOG.info("%s: split attention stays as it is: %s", layer_of(node), why)
            continue
        count += 1
        _LOG.info("%s: scores, softmax and sums become one kernel", layer_of(node))
    if count:
        drop_unused(module.graph, ())
    return count


def _operator(node: object) -> str:
    """Return the name of the operator of ours over windows that a node calls; nothing where it calls another."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverloadPacket):  # noqa: SLF001
        target = target.default
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return ""
    namespace, _, name = target._schema.name.partition("::")  # noqa: SLF001
    return name if namespace == "na_compiler" and name.startswith("window_") else ""


def _parameters(node: fx.Node) -> tuple[list[int], list[int], list[bool]]:
    kernel_size, dilation, is_causal = (list(one) for one in node.args[-3:])  # type: ignore[arg-type]
    return kernel_size, dilation, [bool(one) for one in is_causal]


def _between(sums: fx.Node) -> _Found:
    """Follow weights back to the scores that they are made of."""
    found = _Found(_parameters(sums))
    node, reader = sums.args[0], sums
    while isinstance(node, fx.Node):
        others = [user for user in _readers(node, found) if user is not reader]
        need(not others, f"{node.name} is read as well, by {', '.join(user.name for user in others)}")
        found.between.append(node)
        if _operator(node) == "window_scores":
            need(found.has_softmax, "its sums are not of a softmax, but of scores")
            need(_parameters(node) == found.parameters, "its scores are of other windows than its sums")
            found.scores = node
            _read_query(found)
            return found
        node, reader = _step(node, found), node
    raise DeclinedError("its weights do not come from scores")


def _readers(node: fx.Node, found: _Found) -> list[fx.Node]:
    """Return what reads a node; what only checks it is noted."""
    checks = [user for user in node.users if name_of(user) in _CHECKING and not user.users]
    found.checks += checks
    return [user for user in node.users if user not in checks]


def _read_query(found: _Found) -> None:
    """Take query as it was before it was scaled."""
    assert found.scores is not None
    query: Any = found.scores.args[0]
    found.passed.append(found.scores)
    while (scaled := _scaled(query)) is not None:
        found.passed.append(query)
        query, factor = scaled
        found.scale *= factor
    found.query = query


def _step(node: fx.Node, found: _Found) -> fx.Node:
    """Return what a node is computed from, having noted what it does."""
    name, first = name_of(node), node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        raise DeclinedError(f"its weights come from {node.name}")
    if name in _SAME or (name in _CONVERTING and _is_floating(node)):
        return first
    if name in _DROPOUT:
        return _without_dropout(node)
    if name in _SOFTMAX and not found.has_softmax:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        need(dim in {-1, tensor_of(node).dim() - 1}, f"its softmax is over dimension {dim}")
        found.has_softmax = True
        return first
    need(found.has_softmax, f"its sums are not of a softmax, but of {node.name}")
    if _operator(node) == "window_hide":
        is_hiding = bool(node.args[1] == -math.inf) and _parameters(node) == found.parameters
        need(is_hiding and found.scale > 0, "its columns without a key take part")
        found.is_hidden = True
        return first
    if name == "add":
        return _without_bias(node, found)
    if name in _MULTIPLYING | _DIVIDING:
        return _without_scale(node, found)
    raise DeclinedError(f"{node.name} is between its scores and its softmax")


def _is_floating(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def _without_dropout(node: fx.Node) -> fx.Node:
    names, default = ("input", "p", "training", "inplace"), {"p": 0.5, "training": True}
    arguments: dict[str, Any] = default | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    is_off = arguments["p"] == 0 or arguments.get("train", arguments["training"]) is False
    need(is_off, "weights are dropped in training, which our kernels do not: split operators are exact, and slow")
    need(isinstance(arguments["input"], fx.Node), "its dropout is not known here")
    return arguments["input"]  # type: ignore[no-any-return]


def _without_bias(node: fx.Node, found: _Found) -> fx.Node:
    operands = [*node.args, *node.kwargs.values()]
    need(len(operands) == 2 and all(isinstance(each, fx.Node) for each in operands), f"{node.name} adds a number")
    for one, other in (operands, operands[::-1]):
        bias = _source(one, found)
        if isinstance(bias, fx.Node) and _operator(bias) == "window_bias":
            fits = found.bias is None and found.scale == 1.0 and _parameters(bias) == found.parameters
            need(fits, "its biases are of other windows, or not the only ones")
            found.bias = bias.args[0]  # type: ignore[assignment]
            found.passed.append(bias)
            return other  # type: ignore[return-value]
    raise DeclinedError(f"{node.name} adds something else than biases by relative position to its scores")


def _source(node: Any, found: _Found) -> Any:  # noqa: ANN401 - an argument of a node
    """Return what a node converts from another dtype, or itself."""
    while isinstance(node, fx.Node) and name_of(node) in _CONVERTING | _SAME:
        _readers(node, found)
        node = node.args[0]
    if isinstance(node, fx.Node):
        _readers(node, found)
    return node


def _without_scale(node: fx.Node, found: _Found) -> fx.Node:
    """Return what a node multiplies or divides by a number, having noted that."""
    scaled = _scaled(node)
    if scaled is None:
        raise DeclinedError(f"{node.name} scales by more than a number")
    source, factor = scaled
    found.scale *= factor
    return source


def _scaled(node: object) -> tuple[fx.Node, float] | None:
    """Return what a node multiplies by a number, and the number."""
    if not isinstance(node, fx.Node) or name_of(node) not in _MULTIPLYING | _DIVIDING:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, other = node.args
    if name_of(node) in _MULTIPLYING and not isinstance(first, fx.Node):
        first, other = other, first
    if not isinstance(first, fx.Node) or not isinstance(other, (int, float)) or isinstance(other, bool) or other == 0:
        return None
    return first, float(other) if name_of(node) in _MULTIPLYING else 1.0 / other


def _check(found: _Found, sums: fx.Node) -> None:
    """Decline what our operators could not compute."""
    assert found.scores is not None
    need(found.is_hidden or not any(found.parameters[2]), "columns of its causal windows that have no key take part")
    earliest = next(node for node in sums.graph.nodes if node in found.passed)
    while earliest is not sums:
        need(not writes(earliest), f"{earliest.name} writes into a tensor between its scores and its sums")
        earliest = earliest.next
    tensors = [tensor_of(node) for node in (*found.scores.args[:2], sums.args[1])]
    known = all(isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided for tensor in tensors)
    need(known, "the graph does not say what its query, key and value are")
    query, _, value = tensors
    dtype, device = str(query.dtype).removeprefix("torch."), query.device.type
    need(dtype in DTYPES, f"kernels compute in {', '.join(DTYPES)}, and it is in {dtype}")
    need(value.dtype == query.dtype, f"query is in {dtype}, and value in {value.dtype}")
    need(device in {"cpu", "cuda"}, f"kernels are for the CPU and CUDA, and it is on {device}")
    fixed = all(isinstance(tensor.shape[axis], int) for tensor in tensors for axis in (1, -1))
    need(fixed, "heads or head_dim are dynamic")
    width = max(query.shape[-1], value.shape[-1])
    need(width <= LONGEST_HEAD, f"head_dim is at most {LONGEST_HEAD} here, and it is {width}")
    need(math.isfinite(found.scale), f"its scale is {found.scale}")


def _attend(sums: fx.Node, found: _Found) -> fx.Node:
    """Return a node that computes the same by one kernel, and is made in front of the sums."""
    assert found.scores is not None
    kernel_size, dilation, is_causal = found.parameters
    graph, rank = sums.graph, len(kernel_size)

    def called(target: Callable[..., object], *parameters: Any) -> fx.Node:  # noqa: ANN401
        made = graph.call_function(target, parameters)
        propagate(made, sums)
        return made

    aten = torch.ops.aten
    with graph.inserting_before(sums):
        heads_last = [0, *range(2, rank + 2), 1, rank + 2]
        names = zip(("query", "key", "value"), (found.query, found.scores.args[1], sums.args[1]), strict=True)
        tensors = {name: called(aten.permute.default, node, heads_last) for name, node in names}
        if found.bias is not None:
            table = tensor_of(found.bias)
            wide = found.bias if table.dtype == torch.float32 else called(aten.to.dtype, found.bias, torch.float32)
            tensors["relative_position_bias"] = wide if table.is_contiguous() else called(aten.contiguous.default, wide)
        parameters = {
            "kernel_size": kernel_size,
            "stride": [1] * rank,
            "dilation": dilation,
            "is_causal": is_causal,
            "scale": found.scale,
        }
        attended = operator_node(graph, rank, {**tensors, **parameters})
        propagate(attended, sums)
        output = called(operator.getitem, attended, 0)
        return called(aten.permute.default, output, [0, rank + 1, *range(1, rank + 1), rank + 2])


def _use(sums: fx.Node, output: fx.Node) -> None:
    """Let what reads sums read the output, which has other strides; with a copy where something may look at them."""
    if not all(_reads_any_strides(user) for user in sums.users):
        with sums.graph.inserting_before(sums):
            options: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copy = sums.graph.call_function(torch.ops.aten.clone.default, (output,), options)
        propagate(copy, sums)
        output = copy
    users = list(sums.users)
    replace_node(sums, output)
    for user in users:
        if name_of(user) in _TURNING:
            refresh(user)


def _reads_any_strides(user: fx.Node) -> bool:
    """Return whether a node copies what it reads where it has to, or turns heads last, which is how the output lies."""
    if name_of(user) not in _TURNING or any(isinstance(each, fx.Node) for each in user.args[1:]):
        return name_of(user) in _ANY_STRIDES
    dims = tensor_of(user).dim()
    probe = torch.empty([*range(2, dims + 2)], device="meta").movedim(-2, 1)
    target: Any = getattr(torch.Tensor, str(user.target)) if user.op == "call_method" else user.target
    turned: torch.Tensor = target(probe, *user.args[1:], **user.kwargs)
    return turned.is_contiguous()
