"""What tests of the passes over torch's graphs share: a model, what a graph calls, and how close results are."""

import torch
from torch import nn

from na_compiler import NeighborhoodAttention2D


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


class Encoder(nn.Module):
    """Layers of two problems, one of them twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NeighborhoodAttention2D(32, 2, 3, dilation=d) for d in (1, 2, 1)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
