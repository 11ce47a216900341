"""A hierarchical image classifier of neighborhood attention, in the manner of NAT and DiNAT.

Four levels of ever fewer and wider tokens, each a row of blocks: neighborhood attention, then a small MLP. Blocks of a
level differ in their dilation, so the model poses a good number of different attention problems.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from na_compiler import NeighborhoodAttention2D, Problem

__all__ = ["CONFIGS", "Classifier", "ClassifierConfig"]


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier looks like.

    Parameters
    ----------
    embed_dim
        Width of a token on the first level; each further level doubles it.
    num_heads
        Heads on each level.
    kernel_size
        Window on each level, along both axes.
    dilations
        For each level the dilations of its blocks, one after the other.
    mlp_ratio
        Hidden width of an MLP over the width of a token.
    classes
        What to tell apart.
    """

    embed_dim: int
    num_heads: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    mlp_ratio: float = 3.0
    classes: int = 1000


# For images of 224 x 224, which the levels see as 56 x 56, 28 x 28, 14 x 14 and 7 x 7 tokens. The sizes of NAT-Mini
# and DiNAT-Mini are those of the papers (Hassani et al., CVPR 2023 and arXiv:2209.15001).
CONFIGS = {
    "nat_mini": ClassifierConfig(64, (2, 4, 8, 16), (7, 7, 7, 7), ((1,) * 3, (1,) * 4, (1,) * 6, (1,) * 5)),
    "dinat_mini": ClassifierConfig(
        64, (2, 4, 8, 16), (7, 7, 7, 7), ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1,) * 5)
    ),
    # For images of 64 x 64, which make 16 x 16, 8 x 8, 4 x 4 and 2 x 2 tokens: what tests take through every route.
    "dinat_pocket": ClassifierConfig(16, (1, 2, 4, 8), (5, 3, 3, 2), ((1, 3), (1, 2), (1,), (1,)), 2.0, 10),
    # Small, and with several windows.
    "dinat_femto": ClassifierConfig(32, (1, 2, 4, 8), (13, 9, 7, 7), ((1, 4), (1, 3), (1, 2), (1,)), 2.0),
}


class Block(nn.Module):
    """Attention and MLP, each with a norm before and a way around."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2D(dim, num_heads, kernel_size, dilation=dilation)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return ``[batch, height, width, dim]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """A strided convolution of tokens that keep their channels last."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Take ``[batch, height, width, dim]``, return ``[batch, height / 2, width / 2, out_dim]``."""
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """The classifier.

    Parameters
    ----------
    config
        Its sizes, or the name of one of `CONFIGS`.

    Examples
    --------
    >>> import torch
    >>> model = Classifier("dinat_femto").eval()
    >>> model(torch.randn(1, 3, 224, 224)).shape  # doctest: +SKIP
    torch.Size([1, 1000])
    """

    def __init__(self, config: str | ClassifierConfig = "dinat_femto") -> None:
        super().__init__()
        self.config = config = CONFIGS[config] if isinstance(config, str) else config
        dim = config.embed_dim
        self.stem = nn.Sequential(Convolution(3, dim // 2), Convolution(dim // 2, dim), nn.LayerNorm(dim))
        levels: list[nn.Module] = []
        sizes = zip(config.num_heads, config.kernel_size, config.dilations, strict=True)
        for level, (num_heads, kernel_size, dilations) in enumerate(sizes):
            if level:
                levels.append(nn.Sequential(Convolution(dim, 2 * dim), nn.LayerNorm(2 * dim)))
                dim *= 2
            blocks = (Block(dim, num_heads, kernel_size, dilation, config.mlp_ratio) for dilation in dilations)
            levels.append(nn.Sequential(*blocks))
        self.levels = nn.Sequential(*levels)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)

    def problems(self, height: int, width: int) -> Counter[Problem]:
        """Return the attention problems that images of a size pose, and how many blocks pose each."""
        found: Counter[Problem] = Counter()
        config = self.config
        for level, num_heads in enumerate(config.num_heads):
            layout = height // (4 << level), width // (4 << level)
            head_dim = (config.embed_dim << level) // num_heads
            for dilation in config.dilations[level]:
                found[Problem(layout, num_heads, head_dim, config.kernel_size[level], dilation=dilation)] += 1
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Classify.

        Parameters
        ----------
        image
            ``[batch, 3, height, width]``, normalised.

        Returns
        -------
        Tensor
            Scores before the softmax, ``[batch, classes]``.
        """
        tokens = self.levels(self.stem(image.permute(0, 2, 3, 1)))
        return self.head(self.norm(tokens).mean((1, 2)))  # type: ignore[no-any-return]
