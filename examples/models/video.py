"""Blocks of a diffusion transformer for video: neighborhood attention over time, height and width, and to a text.

Every token attends to its neighborhood and, inside the same softmax, to all tokens of the text: the additional keys
and values. The step of the diffusion shifts and scales what each block sees (adaLN: Peebles and Xie, ICCV 2023).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from na_compiler import Problem, na3d

__all__ = ["CONFIGS", "Denoiser", "DenoiserConfig"]


@dataclass(frozen=True)
class DenoiserConfig:
    """What a denoiser looks like.

    Parameters
    ----------
    channels
        Of the latent video.
    embed_dim
        Width of a token.
    num_heads
        Heads of each block.
    text_dim
        Width of a token of the text.
    kernel_size
        For each block its window in time, height and width.
    is_causal
        Whether a frame sees no frame after itself.
    mlp_ratio
        Hidden width of an MLP over the width of a token.
    """

    channels: int
    embed_dim: int
    num_heads: int
    text_dim: int
    kernel_size: tuple[tuple[int, int, int], ...]
    is_causal: bool = False
    mlp_ratio: float = 4.0


CONFIGS = {
    "small": DenoiserConfig(16, 384, 6, 512, ((4, 8, 8), (4, 16, 16), (4, 8, 8), (4, 16, 16))),
    # What tests take through every route.
    "pocket": DenoiserConfig(4, 32, 2, 24, ((2, 3, 5), (3, 4, 4)), is_causal=True, mlp_ratio=2.0),
}


class Block(nn.Module):
    """Attention to neighbors and text, and an MLP; each shifted, scaled and gated by the condition."""

    def __init__(self, config: DenoiserConfig, kernel_size: tuple[int, int, int]) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads, self.kernel_size = config.num_heads, kernel_size
        self.is_causal = (config.is_causal, False, False)
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.text_kv = nn.Linear(config.text_dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        hidden = int(dim * config.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        """Take and return ``[batch, time, height, width, dim]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition)[:, None, None, None].chunk(6, -1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, text)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]

    def attend(self, x: Tensor, text: Tensor) -> Tensor:
        """Attend to neighbors and to the text."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        text_key, text_value = self.text_kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        attended: Tensor = na3d(
            query,
            key,
            value,
            self.kernel_size,
            is_causal=self.is_causal,
            additional_keys=text_key,
            additional_values=text_value,
        )
        return self.proj(attended.flatten(-2))  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """The denoiser.

    Parameters
    ----------
    config
        Its sizes, or the name of one of `CONFIGS`.

    Examples
    --------
    >>> import torch
    >>> model = Denoiser("pocket").eval()
    >>> model(torch.randn(1, 4, 6, 5, 4), torch.randn(1, 32), torch.randn(1, 7, 24)).shape
    torch.Size([1, 4, 6, 5, 4])
    """

    def __init__(self, config: str | DenoiserConfig = "small") -> None:
        super().__init__()
        self.config = config = CONFIGS[config] if isinstance(config, str) else config
        self.stem = nn.Linear(config.channels, config.embed_dim)
        self.blocks = nn.ModuleList(Block(config, kernel_size) for kernel_size in config.kernel_size)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.channels)

    def problems(self, time: int, height: int, width: int) -> Counter[Problem]:
        """Return the attention problems that videos of a size pose, and how many blocks pose each."""
        config = self.config
        head_dim = config.embed_dim // config.num_heads
        causal = (config.is_causal, False, False)
        return Counter(
            Problem((time, height, width), config.num_heads, head_dim, window, is_causal=causal, additional_kv=True)
            for window in config.kernel_size
        )

    def forward(self, video: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        video
            Latent video, ``[batch, time, height, width, channels]``.
        condition
            What the step of the diffusion is embedded as, ``[batch, embed_dim]``.
        text
            ``[batch, tokens, text_dim]``.

        Returns
        -------
        Tensor
            ``[batch, time, height, width, channels]``.
        """
        x = self.stem(video)
        for block in self.blocks:
            x = block(x, condition, text)
        return self.head(self.norm(x))  # type: ignore[no-any-return]
