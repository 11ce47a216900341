"""`reference_ops`: the operators for ``onnx.reference``, for models without bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from na_compiler import operands
from na_compiler.onnx.signature import DOMAIN, INPUTS, OPERATORS, Signature
from na_compiler.operands import PARAMETERS
from na_compiler.reference import neighborhood_attention

__all__ = ["reference_ops"]


def reference_ops() -> list[type[OpRun]]:
    """Return classes for ``ReferenceEvaluator(model, new_ops=...)``; they compute in float64.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> evaluator = ReferenceEvaluator("model.onnx", new_ops=reference_ops())  # doctest: +SKIP
    """
    return [type(operator, (_NeighborhoodAttention,), {"op_domain": DOMAIN}) for operator in OPERATORS]


class _NeighborhoodAttention(OpRun):
    """Evaluates a node. The evaluator finds a class by its name."""

    def _run(
        self,
        *inputs: NDArray[np.generic] | None,
        **attributes: list[int] | float | None,
    ) -> tuple[NDArray[np.generic], ...]:
        given = {name: tensor for name, tensor in zip(INPUTS, inputs, strict=False) if tensor is not None}
        signature = Signature(
            type(self).__name__,
            tuple(tensor.shape for tensor in given.values()),
            tuple(tensor.dtype.name for tensor in given.values()),
            attributes,
            tuple(given),
        )
        problem = signature.problem()
        assert problem is not None
        named: dict[str, Any] = {name: torch.from_numpy(_exact(tensor)) for name, tensor in given.items()}
        named |= {name: getattr(problem, name) for name in PARAMETERS}
        named |= {o.name: attributes[o.name] for o in operands.scalars() if attributes.get(o.name) is not None}
        named["border"] = problem.border
        output, lse = neighborhood_attention(**{**named, "scale": signature.scale()})
        results = (output.numpy().astype(given["query"].dtype), lse.numpy().astype(np.float32))
        return results[: len(self.onnx_node.output)]


def _exact(tensor: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return numbers in float64; flags as they are."""
    return tensor if tensor.dtype == np.bool_ else tensor.astype(np.float64)
