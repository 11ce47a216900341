"""Denoise a photograph by non-local means, which is neighborhood attention.

Non-local means replaces each pixel by an average of the pixels around it, weighted by how alike the patches around the
two are: by ``exp(-|p - p'|^2 / 2h^2)``, ``p`` and ``p'`` the patches as vectors. That is a softmax over a window of
21x21 pixels, with the patches as queries and keys and the colours as values. With one feature more, 1 for queries and
``-|p'|^2 / 2h^2`` for keys, the product of query and key is ``-|p - p'|^2 / 2h^2`` but for what depends on the query
alone, which the softmax takes out.

    python examples/denoise.py [FOLDER]

prints what it took and how it did, beside scikit-image's own non-local means, and saves a picture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import patches
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from skimage import data, metrics, restoration
from torch import Tensor

import na_compiler
from na_compiler.reference import neighborhood_attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIGMA = 25 / 255  # of the noise; colours are in [0, 1]
PATCH, WINDOW = 5, 21


@dataclass
class Result:
    """A denoised picture, and the seconds it took."""

    name: str
    picture: NDArray[np.float32]
    seconds: float


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Denoise a photograph by neighborhood attention.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/demo"), help="where the picture goes")
    parser.add_argument("--size", type=int, default=512, help="of a square cut out of the photograph (default: all)")
    options = parser.parse_args()
    console = Console()
    mpl.use("agg")

    photograph = cut(data.astronaut(), options.size).astype(np.float32) / 255
    noise = np.random.default_rng(0).normal(0, SIGMA, photograph.shape)
    noisy = (photograph + noise).astype(np.float32)
    height, width, channels = noisy.shape
    query, key, value = attention_inputs(torch.from_numpy(noisy))

    problem = na_compiler.Problem((height, width), 1, query.shape[-1], WINDOW, head_dim_v=channels)
    console.print(f"[bold]{problem}[/bold], {torch.get_num_threads()} threads", highlight=False)
    _, compiling = timed(lambda: na_compiler.compile(problem))
    console.print(f"compiled, or found in the cache, in {compiling:.2f} s")

    with torch.inference_mode():
        runs = [timed(lambda: na_compiler.na2d(query, key, value, WINDOW, scale=1.0)) for _ in range(5)]
    output = runs[-1][0]
    seconds = statistics.median(seconds for _, seconds in runs)
    gflops = problem.flops() / seconds / 1e9
    console.print(f"ran in {seconds:.3f} s, {gflops:.0f} GFLOP/s; {error_on_a_crop(query, key, value, output)}")

    results = [Result("na_compiler", output[0, :, :, 0].numpy(), seconds), *scikit_image(noisy)]
    console.print(table(photograph, noisy, results))
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "denoise.png"
    draw(path, photograph, noisy, results[0])
    console.print(f"saved {path}", highlight=False)


def attention_inputs(noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each ``[1, height, width, 1, ...]``, for a picture ``[height, width, channels]``."""
    height, width, channels = noisy.shape
    padded = torch.nn.functional.pad(noisy.permute(2, 0, 1)[None], [PATCH // 2] * 4, mode="reflect")
    patches = torch.nn.functional.unfold(padded, PATCH)[0].T.reshape(height, width, -1)
    # The filter's strength h: patches that differ by the noise alone weigh exp(-2).
    patches = patches / (SIGMA * (PATCH**2 * channels / 2) ** 0.5)
    half_norm = patches.square().sum(-1, keepdim=True) / 2
    query = torch.cat([patches, torch.ones_like(half_norm)], -1)
    key = torch.cat([patches, -half_norm], -1)
    return query[None, :, :, None], key[None, :, :, None], noisy[None, :, :, None]


def error_on_a_crop(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> str:
    """Compare the middle of the picture with the float64 reference."""
    size, margin = min(48, output.shape[1] - WINDOW), WINDOW // 2
    first = (output.shape[1] - size) // 2 - margin
    # Pixels a margin away from the border of a cut-out have the windows that they have in the whole picture.
    rows = slice(first, first + size + 2 * margin)
    around = [tensor[:, rows, rows].double() for tensor in (query, key, value)]
    reference, _ = neighborhood_attention(around[0], around[1], around[2], WINDOW, scale=1.0)
    inner = slice(margin, -margin)
    difference = output[:, rows, rows][:, inner, inner] - reference[:, inner, inner]
    error = (difference.norm() / reference[:, inner, inner].norm()).item()
    return f"relative error on a {size}x{size} crop {error:.0e}"


def scikit_image(noisy: NDArray[np.float32]) -> list[Result]:
    """Denoise with scikit-image's non-local means: as it is defined, and its fast mode."""
    results = []
    for name, strength, is_fast in (("scikit-image", 0.8, False), ("scikit-image, fast mode", 0.6, True)):
        picture, seconds = timed(
            lambda strength=strength, is_fast=is_fast: restoration.denoise_nl_means(
                noisy, PATCH, WINDOW // 2, strength * SIGMA, fast_mode=is_fast, sigma=SIGMA, channel_axis=-1
            )
        )
        results.append(Result(name, picture, seconds))
    return results


def table(photograph: NDArray[np.float32], noisy: NDArray[np.float32], results: list[Result]) -> Table:
    """Return times and peak signal-to-noise ratios."""
    made = Table("non-local means", title=f"{WINDOW}x{WINDOW} window, {PATCH}x{PATCH} colour patches")
    for column in ("seconds", "PSNR, dB"):
        made.add_column(column, justify="right")
    made.add_row("none: the noisy picture", "", f"{psnr(photograph, noisy):.1f}")
    for result in results:
        made.add_row(result.name, f"{result.seconds:.2f}", f"{psnr(photograph, result.picture):.1f}")
    return made


def draw(path: Path, photograph: NDArray[np.float32], noisy: NDArray[np.float32], result: Result) -> None:
    """Save noisy and denoised picture and the photograph, whole and in detail."""
    size = len(photograph)
    # The face, and the badge on the shoulder.
    left, top, extent = int(0.335 * size), int(0.09 * size), int(0.235 * size)
    panels = [
        (f"noisy, {psnr(photograph, noisy):.1f} dB", noisy),
        (
            f"neighborhood attention, {psnr(photograph, result.picture):.1f} dB in {result.seconds:.2f} s",
            result.picture,
        ),
        ("photograph", photograph),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 8.3), layout="constrained")
    for (title, picture), (whole, detail) in zip(panels, axes.T, strict=True):
        shown = picture.clip(0, 1)
        whole.imshow(shown)
        whole.set_title(title, fontsize=12)
        whole.add_patch(patches.Rectangle((left, top), extent, extent, fill=False, edgecolor="white", linewidth=1.2))
        detail.imshow(shown[top : top + extent, left : left + extent], interpolation="nearest")
        for axis in (whole, detail):
            axis.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def psnr(photograph: NDArray[np.float32], picture: NDArray[np.float32]) -> float:
    """Return the peak signal-to-noise ratio in decibels."""
    return float(metrics.peak_signal_noise_ratio(photograph, picture.clip(0, 1), data_range=1.0))


def cut(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the top middle of a picture."""
    first = (picture.shape[1] - size) // 2
    return picture[:size, first : first + size]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the seconds it took."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
