"""`na_compiler.integrations.transformers`: models with causal windows generate the same tokens, and learn the same."""

import copy
import logging
import re
import sys
import types

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'na-compiler[transformers]'"
)

import na_compiler  # noqa: E402
from na_compiler.integrations.transformers import NAME, attention, masks, na_attention_forward, na_mask, say  # noqa: E402
from na_compiler.integrations.transformers.masks import WindowMask  # noqa: E402
from na_compiler.integrations.transformers.patterns import Window  # noqa: E402

WINDOW = 24
SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    tie_word_embeddings=False,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
# What each model is made of, beside that; how many of its two layers have a window of ours.
MODELS = {
    "Mistral": (dict(sliding_window=WINDOW), 2),
    "Qwen3": (dict(sliding_window=WINDOW, use_sliding_window=True, layer_types=MIXED), 1),
    "Gemma3Text": (dict(sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=64), 1),
    "Phi3": (dict(sliding_window=WINDOW), 2),
    "Llama4Text": (
        dict(intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=WINDOW, no_rope_layers=[1, 0]), 1,
    ),
    "GptOss": (
        dict(
            sliding_window=WINDOW, layer_types=MIXED, num_local_experts=2, num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ), 1,
    ),
    "Gemma2": (dict(sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=64), 0),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """What `na1d` is called with: shapes of queries and keys, and the rest."""
    found = []
    real = attention.na1d

    def na1d(query, key, value, *args, **kwargs):
        found.append((tuple(query.shape), tuple(key.shape), args))
        return real(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "na1d", na1d)
    monkeypatch.setattr(say, "_said", set())
    return found


def make(name, **more):
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS[name][0] | more)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        # Weights so large that layers matter: random models say the same token for ever otherwise.
        if parameter.dim() > 1 or parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(count=100, batch=2):
    return torch.randint(2, 97, (batch, count))


def generate(model, ids, **options):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
    )


def theirs(model):
    """Choose what a model has of its own, and return it: SDPA where it may, its eager attention elsewhere."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name, seed, calls):
    model, ids = theirs(make(name)), tokens()
    with torch.no_grad():
        expected, logits = generate(model, ids), model(ids).logits
        model.set_attn_implementation(NAME)
        assert torch.equal(generate(model, ids), expected)
        # The prompt runs in one call for each layer with a window, and steps in none.
        layers = MODELS[name][1]
        assert len(calls) == layers
        close(model(ids).logits, logits)
    assert len(calls) == 2 * layers
    for query, key, _ in calls:
        assert query == (2, 128, 4, 16)
        assert key[2] == 2, "keys are not repeated"
    if name not in {"Llama4Text", "Gemma2"}:
        assert len(set(expected[0, 100:].tolist())) > 1, "tokens that tell something"


@pytest.mark.parametrize("name", ["Qwen3", "GptOss"])
def test_the_same_gradients(name, seed, calls):
    model, ids = theirs(make(name)).train(), tokens(70)
    other = copy.deepcopy(model)
    other.set_attn_implementation(NAME)
    for each in (model, other):
        each(ids, labels=ids).loss.backward()
    assert len(calls) == 1
    for (path, mine), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            error = (mine.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-9)
            assert error < 1e-3, path


def test_a_static_cache_hands_over_keys_that_nobody_sees(seed, calls):
    model, ids = theirs(make("Gemma3Text")), tokens()
    with torch.no_grad():
        expected = generate(model, ids)
        model.set_attn_implementation(NAME)
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generate(model, ids, **options), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["Mistral", "GptOss", "Llama4Text"])
def test_padding_is_a_key_mask(name, seed, calls):
    """On the left, where prompts have it, and on the right, where batches in training have it."""
    model, ids = theirs(make(name)), tokens()
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :30], right[1, 80:] = 0, 0
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=left, **options)
        logits = [model(ids, attention_mask=mask).logits for mask in (left, right)]
        model.set_attn_implementation(NAME)
        assert torch.equal(model.generate(ids, attention_mask=left, **options), expected)
        for mask, wanted in zip((left, right), logits, strict=True):
            # What queries that are padding see is nobody's affair.
            close(model(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    # Chunks that begin behind each sequence's padding are no chunks of all of them.
    assert len(calls) == {"Mistral": 6, "GptOss": 3, "Llama4Text": 1}[name]
    model.train()
    model(ids, attention_mask=right, labels=ids.masked_fill(right == 0, -100)).loss.backward()
    assert all(bool(each.grad.isfinite().all()) for each in model.parameters() if each.grad is not None)


def test_a_mask_of_less_tokens_hides_the_rest(seed, calls, caplog):
    """As transformers has it, also where such a mask hides nothing itself."""
    model, ids, mask = theirs(make("Mistral")), tokens(), torch.ones(2, 80, dtype=torch.long)
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(NAME)
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert not calls
        assert "longer than the mask of their tokens" in caplog.text
        model(ids, attention_mask=torch.ones(2, 120, dtype=torch.long))
        assert len(calls) == 2


def test_conversations_and_checkpointing(seed, calls):
    """More tokens after a cache are left to SDPA; and a mask goes through torch's checkpoints."""
    model, ids = theirs(make("Mistral")), tokens(140)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(NAME)
        cache = transformers.DynamicCache(config=model.config)
        first = model(ids[:, :70], cache=cache).logits
        assert len(calls) == 2
        close(torch.cat([first, model(ids[:, 70:], cache=cache).logits], 1), expected)
    assert len(calls) == 2
    model.train().activation_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2 + 2 * 2


LEFT = {
    "packed": ("packed positions", dict(position_ids=True)),
    "short": ("at most 24 tokens, which is the window", dict(count=24)),
    "few": ("less than 64 tokens", dict(count=40)),
    "float64": ("layers in float64", dict(dtype=torch.float64)),
    "dropout": ("dropout of attention weights", dict(attention_dropout=0.5)),
    "weights": ("weights that are wanted", dict(output_attentions=True)),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_is_right_and_said_once(kind, seed, calls, caplog):
    said, options = LEFT[kind]
    options = dict(options)
    model = theirs(make("Mistral", attention_dropout=options.pop("attention_dropout", 0.0)))
    model.to(options.pop("dtype", torch.float32))
    ids = tokens(options.pop("count", 100))
    if options.pop("position_ids", False):
        options["position_ids"] = torch.cat([torch.arange(60), torch.arange(40)]).expand(2, -1)
    if kind == "dropout":
        model.train()
    results = []
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        for name in (model.config._attn_implementation, NAME, NAME):
            model.set_attn_implementation(name)
            torch.manual_seed(seed)
            results.append(model(ids, use_cache=False, **options).logits)
    assert not calls
    assert torch.equal(results[0], results[1])
    assert [record.message.count(said) for record in caplog.records if "left to" in record.message] == [1]


def two_sided(window=16):
    small = {name: value for name, value in SMALL.items() if name not in {"num_key_value_heads", "head_dim"}}
    config = transformers.ModernBertConfig(
        **small | dict(local_attention=window, layer_types=MIXED, cls_token_id=1, sep_token_id=1)
    )
    model = transformers.ModernBertForMaskedLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return theirs(model)


@pytest.mark.parametrize("count", [100, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_that_look_to_both_sides(count, padded, seed, calls):
    """ModernBERT's, token by token and in its gradients; with tokens that are added behind, and without."""
    model, ids = two_sided(), tokens(count)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :30], mask[1, 70:] = 0, 0
    other = copy.deepcopy(model)
    other.set_attn_implementation(NAME)
    labels = ids.masked_fill(mask == 0, -100)
    theirs_, ours = (each(ids, attention_mask=mask, labels=labels) for each in (model, other))
    close(ours.logits[mask.bool()].detach(), theirs_.logits[mask.bool()].detach())
    assert torch.equal(ours.logits.argmax(-1)[mask.bool()], theirs_.logits.argmax(-1)[mask.bool()])
    assert calls == [((2, 128, 4, 16), (2, 128, 4, 16), (2 * 8 + 1, 1))]
    for each in (ours, theirs_):
        each.loss.backward()
    for (path, mine), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        error = (mine.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-9)
        assert error < 1e-3, path


def test_short_sequences_of_two_sided_windows_are_left(seed, calls, caplog):
    model, ids = two_sided(window=100), tokens()
    with torch.no_grad(), caplog.at_level("INFO", "na_compiler"):
        expected = model(ids).logits
        report = {}
        na_compiler.convert(model, report=report)
        close(model(ids).logits, expected)
    assert report == {
        "model.layers.0.attn": "converted",
        "model.layers.1.attn": "full attention stays in SDPA",
    }
    assert "modernbert: left to SDPA: sequences of at most 101 tokens, which is the window" in caplog.text
    assert "modernbert: left to SDPA: full attention in both directions" in caplog.text
    assert not calls


def test_tokens_of_images_are_left(seed, calls, caplog):
    """As multimodal models make their masks: some tokens see each other in both directions."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sliding_window_overlay

    config = make("Mistral").config
    config._attn_implementation = NAME
    arguments = dict(config=config, inputs_embeds=torch.zeros(1, 80, 64), attention_mask=None, cache=None)
    blocks = torch.full((1, 80), -1)
    blocks[:, 10:40] = 0
    with caplog.at_level("INFO", "na_compiler"):
        mask = create_sliding_window_causal_mask(**arguments, block_sequence_ids=blocks)
        assert "see each other in both directions" in caplog.text
        assert type(mask) is torch.Tensor
        assert bool(mask[0, 0, 10, 39])
        custom = create_sliding_window_causal_mask(**arguments, and_mask_function=lambda b, h, q, k: k != 5)
        assert type(custom) is torch.Tensor
        assert "a mask that is not known here" in caplog.text
        either = create_causal_mask(**arguments, or_mask_function=sliding_window_overlay(9))
        assert type(either) is torch.Tensor
        # The same mask in other words is the same mask.
        assert isinstance(create_causal_mask(**arguments, and_mask_function=sliding_window_overlay(9)), WindowMask)


def window_mask(count=80, kernel_size=WINDOW):
    from transformers.masking_utils import sliding_window_causal_mask_function

    window = sliding_window_causal_mask_function(kernel_size)
    return na_mask(2, count, count, mask_function=window, local_size=kernel_size)


def test_a_mask_of_a_window_is_a_mask():
    mask = window_mask()
    assert isinstance(mask, WindowMask)
    index = torch.arange(80)
    distance = index[:, None] - index
    expected = ((distance >= 0) & (distance < WINDOW)).expand(2, 1, 80, 80)
    for result, wanted in (
        (mask.made(), expected), (mask[:, :, :7], expected[:, :, :7]), (~mask, ~expected), (mask + 0, expected + 0),
        (mask.to(torch.float32), expected.float()), (torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0)),
    ):  # fmt: skip
        assert type(result) is torch.Tensor
        assert torch.equal(result, wanted)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert isinstance(moved, WindowMask)
    assert moved.window == mask.window
    assert moved.device.type == "meta"
    assert "Window(kernel_size=24" in repr(mask)
    query = torch.randn(2, 4, 80, 16)
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    close(attended, torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=expected))


def test_a_mask_of_other_tokens_is_made(seed, calls):
    """Layers that attend to more than the tokens: their mask is not ours to interpret."""
    query, key = torch.randn(2, 4, 80, 16), torch.randn(2, 4, 90, 16)
    mask = torch.nn.functional.pad(window_mask(), (0, 10), value=True)
    output, _ = na_attention_forward(torch.nn.Module(), query, key, key, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    close(output, wanted.transpose(1, 2))
    assert not calls


def test_keys_behind_the_last_query(seed, calls):
    """As a static cache hands them over: nobody sees them."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    query, key, value = torch.randn(2, 4, 80, 16), torch.randn(2, 4, 96, 16), torch.randn(2, 4, 96, 16)
    mask = na_mask(2, 80, 96, mask_function=sliding_window_causal_mask_function(WINDOW))
    output, _ = na_attention_forward(torch.nn.Module(), query, key, value, mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.made())
    close(output, wanted.transpose(1, 2))
    assert len(calls) == 1
    with pytest.raises(RuntimeError):  # SDPA's, of shapes that do not fit.
        na_attention_forward(torch.nn.Module(), query, key[:, :, :90], value[:, :, :90], mask)
    assert len(calls) == 1


def test_while_a_graph_is_made_masks_are_made(monkeypatch):
    monkeypatch.setattr(masks, "is_tracing", lambda _: True)
    assert type(window_mask()) is torch.Tensor


def test_few_numbers_of_tokens_are_compiled_for():
    window = Window(WINDOW)
    padded = {count: window.padded(count) for count in range(64, 5000)}
    assert all(count <= more < count * 1.125 + 64 for count, more in padded.items())
    assert len(set(padded.values())) < 40
    assert padded[1024] == 1024
    assert padded[4096] == 4096


def test_compiled_models_have_masks_that_passes_read(seed, calls):
    model, ids = make("Mistral"), tokens(70)
    model.set_attn_implementation(NAME)
    program = torch.export.export(model.model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    assert not calls
    with torch.no_grad():
        close(program.module()(input_ids=ids, use_cache=False)[0], model.model(ids, use_cache=False)[0])


def test_passes_find_the_windows_of_compiled_models(seed, calls):
    from na_compiler import passes
    from na_compiler.passes.canonicalise_torch import canonicalise_torch

    found = []

    def backend(module, inputs):
        canonicalise_torch(module)
        found.extend(site.problem.kernel_size for site in passes.collect(module))
        return module.forward

    torch._dynamo.reset()
    model, ids = make("Mistral").model, tokens(70)
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        expected = model(ids, use_cache=False)[0]
        compiled = torch.compile(model, backend=backend)
        close(compiled(ids, use_cache=False)[0], expected)
    assert found == [(WINDOW,)] * 2


@pytest.mark.parametrize("batch", [None, "any"])
def test_exported_models_of_any_length(batch, seed):
    """The mask is made of positions, which passes read; each length has its kernel."""
    from na_compiler import passes

    model = make("Mistral").model
    model.set_attn_implementation(NAME)
    dims = {1: torch.export.Dim("length", max=512)} | ({0: torch.export.Dim("batch", max=8)} if batch else {})
    lengths = {"input_ids": dims, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": tokens(70), "use_cache": False}, dynamic_shapes=lengths, strict=False
    )
    passes.canonicalise(program)
    assert [site.dynamic for site in passes.collect(program)] == [(*(["batch"] if batch else []), "layout[0]")] * 2
    ids = tokens(90, batch=3 if batch else 2)
    with torch.no_grad():
        close(program.module()(input_ids=ids, use_cache=False)[0], model(ids, use_cache=False)[0])


def test_convert_chooses_and_reports(seed, calls, caplog):
    report = {}
    model = torch.nn.ModuleDict({"text": theirs(make("Qwen3")), "dense": theirs(make("Mistral", sliding_window=None))})
    with caplog.at_level("INFO", "na_compiler"):
        assert na_compiler.convert(model, report=report) is model
    assert report == {
        "text.model.layers.0.self_attn": "converted",
        "text.model.layers.1.self_attn": "full attention stays in SDPA",
        **{f"dense.model.layers.{layer}.self_attn": "full attention stays in SDPA" for layer in (0, 1)},
    }
    assert "1 layers: converted: text.model.layers.0.self_attn" in caplog.text
    assert model["text"].config._attn_implementation == NAME
    assert model["dense"].config._attn_implementation == "sdpa"
    with torch.no_grad():
        model["text"](tokens())
    assert len(calls) == 1


def test_convert_leaves_models_of_another_version(monkeypatch, caplog):
    """Where what is imported as transformers, or as diffusers, is another, NATTEN's layers are converted."""
    import natten_stub

    name = "na_compiler.integrations.transformers"
    for module in [each for each in sys.modules if each.startswith((name, "transformers"))]:
        monkeypatch.delitem(sys.modules, module)
    for library in ("transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    _, layers = natten_stub.make("another")
    report, model = {}, torch.nn.Sequential(layers[1](32, 2, 3))
    with caplog.at_level("INFO", "na_compiler"):
        na_compiler.convert(model, report=report)
    assert report == {"0": "converted"}
    said = r"models of transformers are left alone: .* needs transformers 5: pip install 'na-compiler\[transformers\]'"
    assert re.search(said, caplog.text)


def test_the_fewest_tokens_are_what_a_kernel_has():
    assert Window(3).padded(1) == masks.FEWEST_TOKENS


def test_logging_is_quiet_otherwise(seed, calls, caplog):
    model = make("Phi3")
    model.set_attn_implementation(NAME)
    with torch.no_grad(), caplog.at_level(logging.INFO, "na_compiler"):
        model(tokens())
    assert "left to" not in caplog.text
