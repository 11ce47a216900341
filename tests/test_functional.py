"""`na_compiler.functional`: the functions that people call, and everything that they refuse."""

import fractions
import inspect
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import check_forward, draw

from na_compiler import functional, na1d, na2d, na3d
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def z(*shape, **options):
    return torch.zeros(*shape, **options)


def arguments(**changes):
    tensors = {"query": z(2, 8, 9, 4, 16), "key": z(2, 8, 9, 2, 16), "value": z(2, 8, 9, 2, 24), "kernel_size": 3}
    return tensors | changes


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_spellings_of_parameters(rank, seed):
    """An int, a tuple, a list, a `torch.Size`, None for a default, by place and by name: all the same."""
    tensors = torch.randn(3, 1, *(7, 8, 9)[:rank], 2, 8).unbind()
    na = FUNCTIONS[rank]
    expected = neighborhood_attention(*tensors, 3)[0]
    for output in (
        na(*tensors, 3),
        na(*tensors, (3,) * rank),
        na(*tensors, [3] * rank, [1] * rank, [1] * rank, [False] * rank),
        na(*tensors, torch.Size([3] * rank), None, None, None, None),
        na(*tensors, kernel_size=3, stride=1, dilation=1, is_causal=False, scale=8**-0.5),
    ):
        torch.testing.assert_close(output, expected)


def test_signature_is_nattens():
    for na in FUNCTIONS.values():
        names = list(inspect.signature(na).parameters)
        assert names[:10] == [
            "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale", "additional_keys",
            "additional_values",
        ]  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 2, -0.5, 1e-30])
def test_scale_is_taken_as_it_is(scale, seed):
    example = draw(Problem((5, 6), 1, 8, 3), scale=scale)
    output, lse = na2d(*example.inputs, 3, scale=scale, return_lse=True)
    check_forward(example, output, lse)


@pytest.mark.parametrize("causal", [np.bool_(True), (np.bool_(True),)])
def test_flags_of_numpys(causal, seed):
    query = torch.randn(1, 9, 2, 8)
    assert torch.equal(na1d(query, query, query, 3, is_causal=causal), na1d(query, query, query, 3, is_causal=True))


@pytest.mark.parametrize("scale", [np.float32(0.25), np.float64(0.25), np.int64(2), fractions.Fraction(1, 4)])
def test_numbers_of_other_libraries(scale, seed):
    query = torch.randn(1, 5, 6, 1, 8)
    assert torch.equal(na2d(query, query, query, 3, scale=scale), na2d(query, query, query, 3, scale=float(scale)))


@pytest.mark.full
def test_types_of_the_results(tmp_path, monkeypatch):
    """What is returned depends on return_lse, and type checkers know it."""
    mypy = pytest.importorskip("mypy.api")
    file = tmp_path / "use.py"
    file.write_text(TYPED)
    root = Path(functional.__file__).parents[1]
    monkeypatch.setenv("MYPYPATH", str(root))
    monkeypatch.chdir(tmp_path)
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(root / ".mypy_cache"), str(file)]
    said, errors, status = mypy.run(options)
    assert status == 0, said + errors


TYPED = """
import torch
from na_compiler import na1d, na2d, na3d

query = torch.empty(1)
output: torch.Tensor = na1d(query, query, query, 3)
again: torch.Tensor = na2d(query, query, query, 3, return_lse=False)
both: tuple[torch.Tensor, torch.Tensor] = na3d(query, query, query, (3, 4, 5), is_causal=True, return_lse=True)


def either(flag: bool) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return na2d(query, query, query, 3, return_lse=flag)


na1d(query, query, query, 3, return_lse=True).shape  # type: ignore[attr-defined]
"""


def test_empty_batch(seed):
    query = torch.randn(0, 8, 9, 2, 8, requires_grad=True)
    output, lse = na2d(query, query, query, 3, return_lse=True)
    assert (output.shape, lse.shape) == ((0, 8, 9, 2, 8), (0, 8, 9, 2))
    output.sum().backward()
    assert query.grad.shape == query.shape


def test_a_key_outside_the_window_has_no_influence(seed):
    """However large it is, as long as it is finite: also on the gradients."""
    query, key, value = (torch.randn(1, 30, 1, 8) for _ in range(3))
    huge_key, huge_value = key.clone(), value.clone()
    huge_key[:, 20:], huge_value[:, 20:] = 1e30, 3e38
    outputs, grads = [], []
    for k, v in ((key, value), (huge_key, huge_value)):
        inputs = [query.clone().requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        output = na1d(*inputs, 5)
        outputs.append(output[:, :18])
        grads.append(torch.autograd.grad(output[:, :18].square().sum(), inputs))
    assert torch.equal(*outputs)
    # Queries from 18 on see huge keys, and the keys from 16 on are seen by such queries.
    for ours, theirs, seen in zip(*grads, (18, 16, 16), strict=True):
        assert torch.equal(ours[:, :seen], theirs[:, :seen])


class TestTuningArguments:
    def test_are_ignored_with_one_line(self, seed, caplog, monkeypatch):
        monkeypatch.setattr(functional, "_ignored", set())
        query = torch.randn(1, 8, 9, 2, 8)
        expected = na2d(query, query, query, 3)
        with caplog.at_level(logging.WARNING, logger="na_compiler"):
            for _ in range(3):
                output = na2d(
                    query, query, query, 3, backend="cutlass-fna", q_tile_shape=(8, 8), kv_tile_shape=(8, 8),
                    backward_q_tile_shape=(8, 8), backward_kv_tile_shape=(8, 8), backward_kv_splits=(1, 1),
                    backward_use_pt_reduction=False, run_persistent_kernel=True, kernel_schedule=None,
                    torch_compile=False, attention_kwargs={},
                )  # fmt: skip
                assert torch.equal(output, expected)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert lines[0].startswith("ignoring attention_kwargs, backend, ")
        assert lines[0].endswith(": kernels are planned for each problem")

    def test_anything_else_is_an_error(self):
        with pytest.raises(TypeError, match=r"na2d\(\) got an unexpected keyword argument 'kernel'"):
            na2d(**arguments(), kernel=3)


REFUSED = [
    # Ranks.
    (
        dict(query=z(8, 9, 16)),
        "query must have 5 dimensions for na2d, [batch, X, Y, heads, head_dim], got shape (8",
    ),
    (dict(query=z(2, 8, 4, 16)), "query must have 5 dimensions for na2d"),
    (dict(key=z(2, 8, 2, 16)), "key must have query's batch and layout, (2, 8, 9), as its first dimensions"),
    (dict(query=z(())), "query must have 5 dimensions for na2d"),
    # Batch, layout, heads, head_dim.
    (dict(key=z(1, 8, 9, 2, 16)), "key must have query's batch and layout, (2, 8, 9), as its first dimensions"),
    (dict(value=z(2, 9, 8, 2, 24)), "value must have query's batch and layout, (2, 8, 9), as its first dimensions"),
    (dict(key=z(2, 8, 9, 2, 8)), "key must have query's head_dim, 16, got 8"),
    (dict(value=z(2, 8, 9, 4, 24)), "value must have as many heads as key, 2, got 4"),
    (
        dict(key=z(2, 8, 9, 3, 16), value=z(2, 8, 9, 3, 16)),
        "heads must be a multiple of heads_kv, got heads=4 and heads_kv=3; heads_kv=1 would work",
    ),
    (dict(query=z(2, 8, 9, 4, 0), key=z(2, 8, 9, 2, 0)), "head_dim must be at least 1, got 0"),
    (dict(value=z(2, 8, 9, 2, 0)), "head_dim_v must be at least 1, got 0"),
    (
        dict(query=z(2, 0, 9, 4, 16), key=z(2, 0, 9, 2, 16), value=z(2, 0, 9, 2, 16)),
        "layout must have at least one token on each axis, got (0, 9)",
    ),
    # Dtype and device.
    (dict(key=z(2, 8, 9, 2, 16).half()), "key must have query's dtype, torch.float32, got torch.float16"),
    (dict(value=z(2, 8, 9, 2, 24, device="meta")), "value must be on query's device, cpu, got meta"),
    (
        {name: tensor.double() for name, tensor in arguments().items() if name != "kernel_size"},
        "dtype must be one of float32, bfloat16, float16, got torch.float64; convert the tensors, e.g. to float32",
    ),
    (
        {name: tensor.int() for name, tensor in arguments().items() if name != "kernel_size"},
        "dtype must be one of float32, bfloat16, float16, got torch.int32",
    ),
    # Window.
    (dict(kernel_size=0), "kernel_size must be at least 1, got 0 on axis 0"),
    (dict(kernel_size=(3, -1)), "kernel_size must be at least 1, got -1 on axis 1"),
    (
        dict(kernel_size=(3, 3, 3)),
        "kernel_size must be an int or 2 ints (one per axis of the layout), got (3, 3, 3);",
    ),
    (dict(kernel_size=3.0), "kernel_size must be an int or 2 ints (one per axis of the layout), got 3.0; e.g. (3, 3)"),
    (dict(kernel_size=True), "kernel_size must be an int or 2 ints (one per axis of the layout), got True"),
    (dict(kernel_size="3"), "kernel_size must be an int or 2 ints (one per axis of the layout), got '3'"),
    (dict(kernel_size=None), "kernel_size must be an int or 2 ints (one per axis of the layout), got None"),
    (
        dict(kernel_size=9),
        "kernel_size * dilation must be at most the layout's 8 tokens on axis 0, got kernel_size=9 * dilation=1 = 9; ",
    ),
    (
        dict(dilation=(1, 4)),
        "tokens on axis 1, got kernel_size=3 * dilation=4 = 12; kernel_size=2 would work",
    ),
    (dict(dilation=0), "dilation must be at least 1, got 0 on axis 0"),
    (dict(dilation=1.5), "dilation must be an int or 2 ints"),
    (dict(stride=0), "stride must be at least 1, got 0 on axis 0"),
    (dict(stride=(3, 4)), "stride must be at most kernel_size=3 on axis 1, got 4; stride=3 would work"),
    (dict(stride=(1,)), "stride must be an int or 2 ints (one per axis of the layout), got (1,); e.g. (1, 1)"),
    (dict(is_causal=1), "is_causal must be a bool or 2 bools (one per axis of the layout), got 1; e.g. (True, True)"),
    (dict(is_causal=(True, 0)), "is_causal must be a bool or 2 bools (one per axis of the layout), got (True, 0)"),
    # Additional keys and values.
    (
        dict(additional_keys=z(2, 5, 2, 16)),
        "additional_keys and additional_values come together, and additional_values is None",
    ),
    (
        dict(additional_values=z(2, 5, 2, 24)),
        "additional_keys and additional_values come together, and additional_keys is None",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 8), additional_values=z(2, 5, 2, 24)),
        "additional_keys must have shape [batch, additional, heads_kv, head_dim], here (2, 5, 2, 16), got (2, 5, 2, 8)",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 16), additional_values=z(2, 6, 2, 24)),
        "additional_values must have shape [batch, additional, heads_kv, head_dim_v], here (2, 5, 2, 24), got (2, 6",
    ),
    (
        dict(additional_keys=z(1, 5, 2, 16), additional_values=z(1, 5, 2, 24)),
        "additional_keys must have shape [batch, additional, heads_kv, head_dim], here (2, 5, 2, 16), got (1, 5",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 16).bfloat16(), additional_values=z(2, 5, 2, 24).bfloat16()),
        "additional_keys must have query's dtype, torch.float32, got torch.bfloat16",
    ),
    (
        dict(additional_keys=z(2, 5, 2, 16, device="meta"), additional_values=z(2, 5, 2, 24, device="meta")),
        "additional_keys must be on query's device, cpu, got meta",
    ),
    # Scale.
    (dict(scale=float("nan")), "scale must be a finite number, got nan; None is head_dim ** -0.5"),
    (dict(scale=float("inf")), "scale must be a finite number, got inf"),
    (dict(scale="1"), "scale must be a finite number, got '1'"),
    (dict(scale=torch.ones(1)), "scale must be a finite number, got tensor([1.])"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refused(changes, message, mode):
    with mode(), pytest.raises(ValueError) as caught:  # noqa: PT011
        na2d(**arguments(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
def test_refused_after_a_call_that_was_right(mode, seed):
    """What was found for one call is not used for another that only looks alike."""
    good = arguments()
    with mode():
        na2d(**good)
        for name in ("query", "key", "value"):
            with pytest.raises(ValueError, match="must be on query's device"):
                na2d(**good | {name: good[name].to("meta")})
            with pytest.raises(NotImplementedError, match=r"na2d takes dense tensors, got a torch\.sparse_coo one"):
                na2d(**good | {name: good[name].to_sparse()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense(mode):
    dense = arguments()
    extra = dict(additional_keys=z(2, 5, 2, 16), additional_values=z(2, 5, 2, 24))
    kinds = {
        r"got a torch\.sparse_coo one; use \.to_dense\(\)": torch.Tensor.to_sparse,
        r"got a torch\.sparse_csr one; use \.to_dense\(\)": lambda t: t.flatten(1).to_sparse_csr(),
        "got a nested one; pad it": lambda t: torch.nested.nested_tensor(list(t)),
        "got a nested one; pad it, or": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        r"got a torch\.quint8; use \.dequantize\(\)": lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.quint8),
    }
    for message, make in kinds.items():
        for name in ("query", "key", "value", "additional_keys", "additional_values"):
            given = dense | (extra if name in extra else {})
            with mode(), pytest.raises(NotImplementedError, match=message):
                na2d(**given | {name: make(given[name])})


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_tensor(name):
    for wrong in (None, z(2, 8, 9, 2, 16).numpy(), [1.0]):
        with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got {type(wrong).__name__}"):
            na2d(**arguments(**{name: wrong}))


@pytest.mark.parametrize(("rank", "shape"), [(1, (2, 8, 9, 2, 8)), (3, (2, 8, 9, 2, 8)), (1, (8, 2, 8))])
def test_a_layout_of_another_rank(rank, shape):
    with pytest.raises(ValueError, match=f"query must have {rank + 3} dimensions for na{rank}d"):
        FUNCTIONS[rank](z(shape), z(shape), z(shape), 3)
