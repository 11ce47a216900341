"""`reference_ops`: the operators for ``onnx.reference``, for models without bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun

from na_compiler.onnx.signature import DOMAIN, OPERATORS, Signature
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
        *inputs: np.ndarray[Any, Any] | None,
        kernel_size: list[int] | None = None,
        stride: list[int] | None = None,
        dilation: list[int] | None = None,
        is_causal: list[int] | None = None,
        scale: float | None = None,
    ) -> tuple[np.ndarray[Any, Any], ...]:
        given = [tensor for tensor in inputs if tensor is not None]
        attributes = {
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
            "is_causal": is_causal,
            "scale": scale,
        }
        signature = Signature(
            type(self).__name__,
            tuple(tensor.shape for tensor in given),
            tuple(tensor.dtype.name for tensor in given),
            attributes,
        )
        problem = signature.problem()
        assert problem is not None
        query, key, value, *additional = (torch.from_numpy(tensor.astype(np.float64)) for tensor in given)
        output, lse = neighborhood_attention(
            query,
            key,
            value,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            signature.scale(),
            *additional,
        )
        results = (output.numpy().astype(given[0].dtype), lse.numpy().astype(np.float32))
        return results[: len(self.onnx_node.output)]
