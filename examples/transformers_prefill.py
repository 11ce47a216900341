"""A model of random weights reads a text: SDPA and na_compiler, interleaved.

python examples/transformers_prefill.py --tokens 1024 --window 128
python examples/transformers_prefill.py --model modernbert --intermediate 256
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import MistralConfig, MistralForCausalLM, ModernBertConfig, ModernBertModel

import na_compiler.integrations.transformers  # noqa: F401  # Registers attn_implementation="na_compiler".

# What its configuration must have among the vocabulary.
_TOKENS = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id")


def make(model: str, window: int, hidden: int, intermediate: int, heads: int, layers: int) -> torch.nn.Module:
    """Return a Mistral, of causal windows, or a ModernBERT, of windows as long that look to both sides."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 1000,
    }
    if model == "modernbert":
        kinds = {"layer_types": ["sliding_attention"] * layers, "pad_token_id": 0} | dict.fromkeys(_TOKENS, 1)
        return ModernBertModel(ModernBertConfig(**sizes, **kinds, local_attention=window)).eval()
    config = MistralConfig(**sizes, num_key_value_heads=max(heads // 4, 1), sliding_window=window)
    return MistralForCausalLM(config).eval()


def times(model: torch.nn.Module, tokens: int, repeats: int) -> dict[str, float]:
    """Return the median time of a prefill in seconds, by the implementation of attention."""
    prompt = torch.randint(0, 1000, (1, tokens))
    found: dict[str, list[float]] = {"sdpa": [], "na_compiler": []}
    outputs = {}
    options = {"logits_to_keep": 1} if isinstance(model, MistralForCausalLM) else {}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, each in found.items():
                model.set_attn_implementation(name)
                started = time.perf_counter()
                outputs[name] = model(prompt, **options)[0]
                each.append(time.perf_counter() - started)
    torch.testing.assert_close(outputs["na_compiler"], outputs["sdpa"], rtol=1e-3, atol=1e-4)
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
    parser.add_argument("--model", choices=["mistral", "modernbert"], default="mistral")
    options = vars(parser.parse_args(arguments))
    tokens, repeats = options.pop("tokens"), options.pop("repeats")
    found = times(make(**options), tokens, repeats)
    milliseconds = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found.items())
    ratio = found["sdpa"] / found["na_compiler"]
    print(
        f"{options['model']}, window {options['window']} of {tokens} tokens: {milliseconds}: {ratio:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
