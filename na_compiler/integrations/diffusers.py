"""Neighborhood attention of diffusers: a processor for the decoder of LTX-2's video autoencoder.

That decoder attends in three dimensions, to windows of 3x7x7, 3x5x5 and 11x11x11 tokens that are shifted inwards at the
ends, which is the window rule here. Its own processors are FlexAttention with a block mask, and NATTEN's kernels for
GPUs, fetched from a model hub. Nothing else in diffusers 0.42 has neighborhood attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from na_compiler.functional import na3d

__all__ = ["NeighborhoodAttnProcessor", "convert_layers"]

_LAYER = "LTX2VideoVaeNeighborhoodAttention"


class NeighborhoodAttnProcessor:
    """An attention processor of diffusers that computes neighborhood attention in `na3d`, on CPUs and GPUs.

    Examples
    --------
    >>> vae.decoder.set_attn_processor(NeighborhoodAttnProcessor())  # doctest: +SKIP
    """

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: object = None) -> Tensor:  # noqa: ARG002
        """Attend.

        Parameters
        ----------
        attn
            The layer: its ``project_qkv``, ``kernel_size`` and ``to_out``.
        hidden_states
            ``[batch, frames, height, width, channels]``.
        block_mask
            Not read. The decoder makes none for this processor.
        """
        query, key, value = attn.project_qkv(hidden_states)
        # The layer has scaled the query already.
        output = na3d(query, key, value, attn.kernel_size, scale=1.0)
        result: Tensor = attn.to_out[0](output.flatten(-2))
        return result


def convert_layers(model: nn.Module) -> dict[str, str]:
    """Set our processor in each layer of diffusers that has neighborhood attention.

    Parameters
    ----------
    model
        Changed in place: the processors are. What is no layer of diffusers is not touched.

    Returns
    -------
    dict
        ``"converted"``, or why not, by the layers' names.
    """
    report: dict[str, str] = {}
    for name, layer in model.named_modules():
        bases = [base for base in type(layer).__mro__ if base.__name__ == _LAYER]
        if not bases or bases[0].__module__.partition(".")[0] != "diffusers":
            continue
        processor = type(getattr(layer, "processor", None))
        if processor.__module__.partition(".")[0] in {"diffusers", "na_compiler"}:
            layer.set_processor(NeighborhoodAttnProcessor())
            report[name] = "converted"
        else:
            report[name] = f"it has a processor of its own, {processor.__name__}"
    return report
