"""A Mistral of random weights reads a prompt: SDPA and na_compiler, interleaved.

python examples/transformers_prefill.py --tokens 1024 --window 128
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import MistralConfig, MistralForCausalLM

import na_compiler.integrations.transformers  # noqa: F401  # Registers attn_implementation="na_compiler".


def times(
    tokens: int, window: int, hidden: int, intermediate: int, heads: int, layers: int, repeats: int
) -> dict[str, float]:
    """Return the median time of a prefill in seconds, by the implementation of attention."""
    config = MistralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        num_hidden_layers=layers,
        sliding_window=window,
        vocab_size=1000,
    )
    model = MistralForCausalLM(config).eval()
    prompt = torch.randint(0, 1000, (1, tokens))
    found: dict[str, list[float]] = {"sdpa": [], "na_compiler": []}
    logits = {}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, each in found.items():
                model.set_attn_implementation(name)
                started = time.perf_counter()
                logits[name] = model(prompt, use_cache=True, logits_to_keep=1).logits
                each.append(time.perf_counter() - started)
    torch.testing.assert_close(logits["na_compiler"], logits["sdpa"], rtol=1e-3, atol=1e-4)
    return {name: statistics.median(each[1:]) for name, each in found.items()}  # The first one compiles.


def main(arguments: list[str] | None = None) -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {
        "tokens": 1024,
        "window": 128,
        "hidden": 256,
        "intermediate": 512,
        "heads": 8,
        "layers": 4,
        "repeats": 9,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args(arguments)
    found = times(**vars(options))
    milliseconds = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found.items())
    ratio = found["sdpa"] / found["na_compiler"]
    print(f"window {options.window} of {options.tokens} tokens: {milliseconds}: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
