"""The layers of 0.14 and 0.15, which pad inputs that are smaller than the window."""

from __future__ import annotations

from na_compiler.compat.natten.layer import OldNeighborhoodAttention

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttention1D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` along one axis; ``bias`` is the one by relative position."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            1, dim, num_heads, kernel_size, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop, True
        )


class NeighborhoodAttention2D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` over two axes; ``bias`` is the one by relative position."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            2, dim, num_heads, kernel_size, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop, True
        )


class NeighborhoodAttention3D(OldNeighborhoodAttention):
    """`OldNeighborhoodAttention` over three axes, of which the first may have parameters of its own."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        step = 1 if dilation is None else dilation
        sizes = (kernel_size if kernel_size_d is None else kernel_size_d, kernel_size, kernel_size)
        steps = (step if dilation_d is None else dilation_d, step, step)
        super().__init__(3, dim, num_heads, sizes, steps, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop, True)
