"""`na_compiler.modules`: the layers, the published examples of them, and checkpoints."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from na_compiler.reference import neighborhood_attention

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


def expected(layer, x):
    """What the layer is defined to be, in float64."""
    parameters = {name: parameter.double() for name, parameter in layer.state_dict().items()}
    x = x.double()
    projected = nn.functional.linear(x, parameters["qkv.weight"], parameters.get("qkv.bias"))
    width = layer.embed_dim // layer.num_heads
    # Columns are query's heads, key's heads, value's heads.
    query, key, value = (
        part.reshape(*x.shape[:-1], layer.num_heads, width) for part in projected.split(layer.embed_dim, -1)
    )
    output, _ = neighborhood_attention(
        query, key, value, layer.kernel_size, layer.stride, layer.dilation, layer.is_causal, layer.scale
    )
    return nn.functional.linear(output.reshape(x.shape), parameters["proj.weight"], parameters["proj.bias"])


def check(layer, x):
    layer = layer.eval()
    with torch.no_grad():
        output, reference = layer(x), expected(layer, x)
    assert output.shape == x.shape
    assert ((output - reference).norm() / reference.norm()) < 1e-5


class TestPublishedExamples:
    """The examples in NATTEN's documentation of its modules: 4 heads of 128."""

    def test_2d(self, seed):
        layer = NeighborhoodAttention2D(
            embed_dim=512, num_heads=4, kernel_size=(8, 16), stride=(1, 2), dilation=(2, 1), is_causal=False
        )
        check(layer, torch.randn(1, 16, 32, 512))

    def test_3d(self, seed):
        layer = NeighborhoodAttention3D(
            embed_dim=512, num_heads=4, kernel_size=(4, 8, 12), stride=(1, 1, 4), dilation=(1, 2, 1),
            is_causal=(True, False, False),
        )  # fmt: skip
        check(layer, torch.randn(1, 12, 16, 20, 512))

    def test_1d_with_a_dilation_that_fits(self, seed):
        layer = NeighborhoodAttention1D(
            embed_dim=512, num_heads=4, kernel_size=2048, stride=2, dilation=2, is_causal=True
        )
        check(layer, torch.randn(1, 4096, 512))

    def test_1d_as_printed_does_not_fit_its_own_sequence(self):
        layer = NeighborhoodAttention1D(
            embed_dim=512, num_heads=4, kernel_size=2048, stride=2, dilation=4, is_causal=True
        )
        message = (
            r"kernel_size \* dilation must be at most the layout's 4096 tokens on axis 0, "
            r"got kernel_size=2048 \* dilation=4 = 8192; kernel_size=1024 would work"
        )
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(1, 4096, 512))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_signature_and_names_are_nattens(rank):
    layer = LAYERS[rank]
    assert list(inspect.signature(layer).parameters) == [
        "embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop",
        "rel_pos_bias",  # Ours: NATTEN had it up to 0.17.
        "border",  # Ours.
    ]  # fmt: skip
    made = layer(12, 3, 3)
    assert {name: tuple(p.shape) for name, p in made.state_dict().items()} == {
        "qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,),
    }  # fmt: skip
    assert "qkv.bias" not in layer(12, 3, 3, qkv_bias=False).state_dict()


def test_a_checkpoint_loads_strictly_and_means_the_same(seed, tmp_path):
    """A checkpoint of a model with NATTEN's layers: the keys and shapes of its qkv and proj."""
    model = nn.ModuleDict({"0": NeighborhoodAttention2D(12, 3, 3), "1": NeighborhoodAttention2D(12, 3, 5)})
    checkpoint = {
        f"{layer}.{name}": torch.randn(shape)
        for layer in "01"
        for name, shape in {"qkv.weight": (36, 12), "qkv.bias": 36, "proj.weight": (12, 12), "proj.bias": 12}.items()
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    result = model.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    check(model["1"], torch.randn(2, 6, 7, 12))


@pytest.mark.parametrize("options", [dict(qkv_bias=False), dict(qk_scale=0.0), dict(qk_scale=0.7)], ids=str)
def test_options(options, seed):
    check(NeighborhoodAttention2D(16, 2, (3, 5), **options), torch.randn(2, 6, 7, 16))


def test_defaults_may_be_none(seed):
    check(NeighborhoodAttention1D(16, 2, [5], stride=None, dilation=None, is_causal=None), torch.randn(2, 9, 16))


def test_dropout_is_after_the_projection_and_in_training_only(seed):
    layer = NeighborhoodAttention1D(64, 2, 3, proj_drop=0.5)
    x = torch.randn(4, 32, 64)
    assert 0.4 < (layer(x) == 0).float().mean() < 0.6
    assert torch.equal(layer.eval()(x), layer(x))


def test_learns(seed):
    """Copy the token two places before: a layer with a causal window of 3 can."""
    x = torch.randn(16, 20, 8)
    target = torch.nn.functional.pad(x, (0, 0, 2, 0))[:, :-2]
    place = torch.nn.functional.one_hot(torch.arange(20) % 3, 3).float().expand(16, -1, -1)
    layer = NeighborhoodAttention1D(11, 1, 3, is_causal=True)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(150):
        output = layer(torch.cat([x, place], -1))[..., :8]
        loss = (output - target)[:, 2:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses[::30]


def test_copies_and_pickles(seed):
    layer = NeighborhoodAttention2D(16, 2, 3)
    x = torch.randn(1, 6, 7, 16)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_half_precision(seed):
    layer = NeighborhoodAttention2D(16, 2, 3).bfloat16()
    x = torch.randn(1, 6, 7, 16).bfloat16()
    output = layer(x)
    assert output.dtype == torch.bfloat16
    reference = expected(layer, x)
    assert ((output - reference).norm() / reference.norm()) < 2e-2


def test_representation():
    assert "kernel_size=(3, 5), stride=(1, 1), dilation=(2, 1), is_causal=(False, False)" in repr(
        NeighborhoodAttention2D(16, 2, (3, 5), dilation=(2, 1))
    )


REFUSED = [
    (dict(num_heads=3), "embed_dim must be a multiple of num_heads, both at least 1, got embed_dim=16 and num_heads=3"),
    (dict(num_heads=3), "; embed_dim=15 with num_heads=3 would work"),
    (dict(num_heads=0), "embed_dim must be a multiple of num_heads, both at least 1, got embed_dim=16 and num_heads=0"),
    (dict(kernel_size=0), "kernel_size must be at least 1, got 0 on axis 0"),
    (dict(kernel_size=(3,)), "kernel_size must be an int or 2 ints"),
    (dict(stride=4), "stride must be at most kernel_size=3 on axis 0, got 4; stride=3 would work"),
    (dict(dilation=-1), "dilation must be at least 1, got -1 on axis 0"),
    (dict(is_causal="yes"), "is_causal must be a bool or 2 bools"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refused_when_made(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        NeighborhoodAttention2D(**dict(embed_dim=16, num_heads=2, kernel_size=3) | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 16), "the input of NeighborhoodAttention2D must have 4 dimensions, [batch, *layout, embed_dim], got"),
        ((1, 6, 7, 2, 16), "the input of NeighborhoodAttention2D must have 4 dimensions"),
        ((1, 6, 7, 8), "the input's last dimension must be embed_dim=16, got 8"),
        ((1, 6, 2, 16), "kernel_size * dilation must be at most the layout's 2 tokens on axis 1, got kernel_size=3 * "),
    ],
)
def test_refused_when_called(shape, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        NeighborhoodAttention2D(16, 2, 3)(torch.zeros(shape))
    assert message in str(caught.value)


def test_double_precision_is_refused_clearly():
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16, got torch\.float64"):
        NeighborhoodAttention2D(16, 2, 3).double()(torch.zeros(1, 6, 7, 16).double())
