"""The forward and its derivative in one direction, in one pass: the formula of a Jacobian-vector product.

Let the inputs move along their tangents ``query', key', value'``. With ``P`` the softmax's weights and, of each pair of
query and key, ``S' = scale * (query' . key + query . key')``, what the score changes by::

    lse'    = sum_key P S'
    P'      = P (S' - lse')
    output' = sum_key (P' value + P value')

The first line is the derivative of ``log sum exp S``, the second of ``P = exp(S - lse)``, the third that of a product.
These are six products where the forward has two: scores, output, and the derivative of each by either factor.
The additional keys and values are keys and values like the others.

``S'`` may be large where all keys of a query have much in common, and what counts are its differences: sums are taken
of ``S' - mean``, never of ``S'`` itself. The mean is ``lse'`` where all keys are at hand at once. Where they come in
chunks it is that of the keys so far, and the sum so far moves with it::

    sum_key P (S' - new) value = sum_key P (S' - old) value + (old - new) sum_key P value

A kernel's parameters are ``query, key, value, [additional_keys, additional_values,] tangent_query, tangent_key,
tangent_value, [tangent_additional_keys, tangent_additional_values,] scale, output, lse, tangent_output, tangent_lse``.
What is before the scale may have any strides but the last one, which is 1; the rest is contiguous.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as T

__all__ = ["mean_so_far", "natural_mean", "with_tangents"]

Expr = Any  # tvm.ir.Expr, which has no types.


def with_tangents(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that a forward writes, and after them as many for their tangents.

    Examples
    --------
    >>> list(with_tangents({"output": None, "lse": None}))
    ['output', 'lse', 'tangent_output', 'tangent_lse']
    """
    return outputs | {f"tangent_{name}": kind for name, kind in outputs.items()}


def mean_so_far(before: Expr, mean: Expr, weighed: Expr, total: Expr) -> Expr:
    """Return the mean of ``S'`` over a chunk's keys and those before.

    Parameters
    ----------
    before, mean
        Sum of the weights of the keys before, and their mean.
    weighed
        Sum of ``P S'`` over the chunk's keys.
    total
        Sum of the weights of all.
    """
    # A query may see none of the keys so far. A NaN stays one.
    return T.Select(total == T.float32(0), T.float32(0), (before * mean + weighed) / total)


def natural_mean(mean: Expr, total: Expr) -> Expr:
    """Return the mean of ``S'`` over all keys, NaN where there is no softmax: see `log2_sum`, which is lse's."""
    return T.Select(total > T.float32(0), mean, T.float32(math.nan))
