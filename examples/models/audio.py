"""An encoder of sound or text that never looks ahead: causal neighborhood attention over one axis.

Frames go through a causal convolution, then through blocks whose windows reach ever further back, by dilation, so that
the last block hears seconds while each looks at a few hundred frames at most. What is computed for a frame never
changes when more of them come.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from na_compiler import NeighborhoodAttention1D, Problem

__all__ = ["CONFIGS", "Encoder", "EncoderConfig"]


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder looks like.

    Parameters
    ----------
    features
        Of a frame: bands of a spectrogram, or the width of an embedding.
    embed_dim
        Width of a token.
    num_heads
        Heads of each block.
    kernel_size
        Frames that a token attends to, itself among them.
    dilations
        For each block.
    mlp_ratio
        Hidden width of an MLP over the width of a token.
    """

    features: int
    embed_dim: int
    num_heads: int
    kernel_size: int
    dilations: tuple[int, ...]
    mlp_ratio: float = 4.0


CONFIGS = {
    # Frames of 10 ms: windows of 0.64, 2.6 and 10 seconds.
    "small": EncoderConfig(80, 256, 4, 64, (1, 4, 16, 1, 4, 16)),
    # What tests take through every route.
    "pocket": EncoderConfig(16, 32, 2, 9, (1, 3, 1), 2.0),
}


class Block(nn.Module):
    """Attention and a gated MLP, each with a norm before and a way around."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention1D(dim, num_heads, kernel_size, dilation=dilation, is_causal=True)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.gate, self.up, self.down = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return ``[batch, frames, dim]``."""
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The encoder.

    Parameters
    ----------
    config
        Its sizes, or the name of one of `CONFIGS`.

    Examples
    --------
    >>> import torch
    >>> model = Encoder("pocket").eval()
    >>> model(torch.randn(1, 64, 16)).shape
    torch.Size([1, 64, 32])
    """

    def __init__(self, config: str | EncoderConfig = "small") -> None:
        super().__init__()
        self.config = config = CONFIGS[config] if isinstance(config, str) else config
        dim = config.embed_dim
        self.stem = nn.Linear(3 * config.features, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.kernel_size, dilation, config.mlp_ratio)
            for dilation in config.dilations
        )
        self.norm = nn.LayerNorm(dim)

    def problems(self, frames: int) -> Counter[Problem]:
        """Return the attention problems that a number of frames poses, and how many blocks pose each."""
        config = self.config
        head_dim = config.embed_dim // config.num_heads
        return Counter(
            Problem(frames, config.num_heads, head_dim, config.kernel_size, dilation=dilation, is_causal=True)
            for dilation in config.dilations
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Encode.

        Parameters
        ----------
        frames
            ``[batch, frames, features]``.

        Returns
        -------
        Tensor
            ``[batch, frames, embed_dim]``.
        """
        # A frame and the two before it, side by side: a causal convolution of three frames.
        earlier = functional.pad(frames, (0, 0, 2, 0))
        length = frames.shape[1]
        x = self.stem(torch.cat((earlier[:, 2:], earlier[:, 1 : length + 1], earlier[:, :length]), -1))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]
