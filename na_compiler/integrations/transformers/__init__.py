"""``attn_implementation="na_compiler"``: sliding windows and chunks of Hugging Face's models, in `na1d`."""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface

    # These import what not all versions have.
    from na_compiler.integrations.transformers.attention import na_attention_forward
    from na_compiler.integrations.transformers.layers import convert_layers
    from na_compiler.integrations.transformers.masks import na_mask
except ImportError as error:
    raise ImportError(
        f"na_compiler.integrations.transformers needs transformers 5: pip install 'na-compiler[transformers]' ({error})"
    ) from error

__all__ = ["NAME", "convert_layers", "na_attention_forward", "na_mask", "register"]

NAME = "na_compiler"


def register() -> None:
    """Make ``"na_compiler"`` the name of an attention implementation of transformers; importing this does it.

    The mask function goes by the same name: without one, transformers gives a model no masks at all.
    """
    AttentionInterface.register(NAME, na_attention_forward)
    AttentionMaskInterface.register(NAME, na_mask)


register()
