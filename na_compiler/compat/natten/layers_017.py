"""The layers of 0.17, which are causal where asked, and refuse inputs that are smaller than the window."""

from __future__ import annotations

from na_compiler.compat.natten.layer import OldNeighborhoodAttention
from na_compiler.compat.natten.split import Flags, Ints

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttention1D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` along one axis."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            1,
            dim,
            num_heads,
            kernel_size,
            dilation,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            attn_drop,
            proj_drop,
            pads=False,
        )
        # One kernel serves both.
        self.use_experimental_ops = use_experimental_ops


class NeighborhoodAttention2D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` over two axes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            2,
            dim,
            num_heads,
            kernel_size,
            dilation,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            attn_drop,
            proj_drop,
            pads=False,
        )
        # One kernel serves both.
        self.use_experimental_ops = use_experimental_ops


class NeighborhoodAttention3D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` over three axes."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            3,
            dim,
            num_heads,
            kernel_size,
            dilation,
            is_causal,
            rel_pos_bias,
            qkv_bias,
            qk_scale,
            attn_drop,
            proj_drop,
            pads=False,
        )
        # One kernel serves both.
        self.use_experimental_ops = use_experimental_ops
