"""What the operators are called, what they take, and what a node of one says: the one place that knows.

Everything here works on plain Python data (shapes, attribute values), so that the schemas, the exporter, the bodies
and whoever reads a model agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from na_compiler.problem import Problem, shown

__all__ = [
    "ATTRIBUTES",
    "DOMAIN",
    "DTYPES",
    "INPUTS",
    "OPERATORS",
    "OUTPUTS",
    "VERSION",
    "Signature",
    "default_attribute",
]

DOMAIN = "na_compiler"
VERSION = 1
# Operator to the rank of its layout.
OPERATORS = {"NA1D": 1, "NA2D": 2, "NA3D": 3}
INPUTS = ("query", "key", "value", "additional_keys", "additional_values")
OUTPUTS = ("output", "lse")
ATTRIBUTES = ("kernel_size", "stride", "dilation", "is_causal", "scale")
# Problem's name of a dtype to ONNX's of a tensor of it.
DTYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}

# A size: known, or not (a symbol, or nothing at all).
Size = int | None
Shape = Sequence[Size]


def default_attribute(name: str, rank: int) -> list[int]:
    """Return the value that an attribute has where a node does not give it.

    Raises
    ------
    ValueError
        For kernel_size, which has none, and scale, whose default depends on head_dim.
    """
    if name in {"stride", "dilation"}:
        return [1] * rank
    if name == "is_causal":
        return [0] * rank
    raise ValueError(f"{name} has no default of its own")


@dataclass(frozen=True)
class Signature:
    """A node's attributes and the shapes and dtypes of its inputs, as far as they are known.

    Parameters
    ----------
    operator
        ``"NA1D"``, ``"NA2D"`` or ``"NA3D"``.
    shapes
        Of the inputs in their order, ``None`` for a size that is not known, or for a whole shape.
    dtypes
        Of the inputs, as `Problem` names them; ``None`` where it is not known.
    attributes
        As the node has them.
    """

    operator: str
    shapes: tuple[Shape | None, ...]
    dtypes: tuple[str | None, ...]
    attributes: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Axes of the layout."""
        return OPERATORS[self.operator]

    def problem(self) -> Problem | None:
        """Return the problem that the node poses; ``None`` where the layout, a head count or a width is not known.

        An input additional_keys without a single key poses the problem that there is without it.

        Raises
        ------
        ValueError
            If attributes and inputs do not fit each other, whatever the sizes are that are not known.
        """
        shapes = self._check_inputs()
        known = all(None not in (shape or (None,))[1:] for shape in shapes[:3])
        parameters = self._parameters()
        stand_ins = _complete(self.rank, shapes, parameters["kernel_size"], parameters["dilation"])
        dtype = next((dtype for dtype in self.dtypes if dtype is not None), "float32")
        tensors = [
            SimpleNamespace(shape=shape, dtype=own or dtype, device="one")
            for shape, own in zip(stand_ins, self.dtypes, strict=True)
        ]
        named: dict[str, Any] = {**dict(zip(INPUTS, tensors, strict=False)), **parameters}
        problem = Problem.of_tensors(**named)
        if problem.additional_kv and stand_ins[3][1] == 0 and (shapes[3] or (0, 1))[1] == 0:
            problem = problem.replace(additional_kv=False)
        return problem if known else None

    def scale(self) -> float | None:
        """Return the scale; ``None`` where it depends on a head_dim that is not known."""
        given = self.attributes.get("scale")
        if given is not None:
            return float(given)
        head_dims = [shape[-1] for shape in self.shapes[:2] if shape]
        return next((float(dim) ** -0.5 for dim in head_dims if dim is not None), None)

    def _check_inputs(self) -> list[Shape | None]:
        if len(self.shapes) not in {3, 5} or len(self.shapes) != len(self.dtypes):
            raise ValueError(
                f"{self.operator} takes 3 inputs (query, key, value) or 5 (and additional_keys, additional_values), "
                f"got {len(self.shapes)}"
            )
        for name, shape, dtype in zip(INPUTS, self.shapes, self.dtypes, strict=False):
            rank = 4 if name.startswith("additional") else self.rank + 3
            if shape is not None and len(shape) != rank:
                axes = "additional" if rank == 4 and name.startswith("additional") else ", ".join("XYZ"[: self.rank])
                raise ValueError(
                    f"{name} must have {rank} dimensions for {self.operator}, [batch, {axes}, heads, width], "
                    f"got {len(shape)}"
                )
            if dtype is not None and dtype not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype}")
        return list(self.shapes)

    def _parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for name in ATTRIBUTES[:4]:
            value = self.attributes.get(name)
            if value is None:
                if name == "kernel_size":
                    raise ValueError(f"{self.operator} needs the attribute kernel_size, {self.rank} ints")
                value = default_attribute(name, self.rank)
            if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
                raise ValueError(f"{name} must be {self.rank} ints, got {shown(value)}")
            parameters[name] = tuple(value)
        flags = parameters["is_causal"]
        if any(flag not in {0, 1} for flag in flags):
            raise ValueError(f"is_causal must be {self.rank} ints that are 0 or 1, got {shown(list(flags))}")
        parameters["is_causal"] = tuple(map(bool, flags))
        scale = self.attributes.get("scale")
        if scale is not None and not isinstance(scale, (int, float)):
            raise ValueError(f"scale must be a float, got {shown(scale)}")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        return parameters


def _complete(rank: int, shapes: list[Shape | None], kernel_size: Any, dilation: Any) -> list[tuple[int, ...]]:
    """Return shapes in which what is not known is what it must be for the rest to fit, or else something that fits."""
    full: list[list[Size]] = [
        list(shape) if shape is not None else [None] * (4 if i >= 3 else rank + 3) for i, shape in enumerate(shapes)
    ]
    layout = range(1, rank + 1)
    # Sizes that are one and the same: places (input, axis), and what to take where none of them is known.
    same: list[tuple[list[tuple[int, int]], int]] = [([(i, 0) for i in range(len(full))], 1)]
    for axis in layout:
        window = [kernel_size[axis - 1], dilation[axis - 1]] if len(kernel_size) == len(dilation) == rank else [1]
        fits = math.prod(extent for extent in window if isinstance(extent, int))
        same.append(([(i, axis) for i in range(3)], max(fits, 1)))
    heads, heads_kv = full[0][-2], next((shape[-2] for shape in full[1:] if shape[-2] is not None), None)
    same.append(([(0, -2)], heads_kv or 1))
    same.append(([(i, -2) for i in range(1, len(full))], heads or 1))
    same.append(([(0, -1), (1, -1), *([(3, -1)] if len(full) == 5 else [])], 1))
    same.append(([(2, -1), *([(4, -1)] if len(full) == 5 else [])], 1))
    if len(full) == 5:
        same.append(([(3, 1), (4, 1)], 1))
    for places, otherwise in same:
        given = next((size for i, axis in places if (size := full[i][axis]) is not None), otherwise)
        for i, axis in places:
            if full[i][axis] is None:
                full[i][axis] = given
    return [tuple(size for size in shape if size is not None) for shape in full]
