"""Attention with factorized projections computes what nn.MultiheadAttention computes."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensorlayers import FactorizedLinear, LowRank, formats
from tensorlayers.errors import NetworkError, ReadOnlyWeightError
from tensorlayers.testing import assert_close
from tests.attention import FULL, PARTS, _attention, _convert, _factorized, _inputs

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@dataclass
class Case:
    form: str
    build: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    training: bool = False


@st.composite
def _cases(draw):
    flag = lambda: draw(st.booleans())  # noqa: E731
    embed, heads = draw(st.sampled_from([(8, 2), (12, 3), (6, 6), (5, 1)]))
    same = flag()
    build = {"embed": embed, "heads": heads, "bias": flag(), "batch_first": flag(), "dropout": 0.3 * flag()}
    build |= {"add_bias_kv": flag(), "add_zero_attn": flag()}
    if not same and flag():
        build |= {"kdim": draw(st.integers(1, 9)), "vdim": draw(st.integers(1, 9))}
    batch = draw(st.sampled_from([None, 1, 3]))
    rows = draw(st.integers(1, 5))
    columns = rows if same else draw(st.integers(1, 5))
    call = {"need_weights": flag(), "average_attn_weights": flag()}
    masks = st.sampled_from([None, torch.bool, torch.float64])
    count = batch or 1
    for name, shape in [
        ("attn_mask", (rows, columns) if flag() else (count * heads, rows, columns)),
        ("key_padding_mask", (columns,) if batch is None else (batch, columns)),
    ]:
        kind = draw(masks)
        if kind == torch.bool:
            call[name] = torch.rand(shape) < 0.5
            call[name][..., 0] = False  # what attends to nothing is not a number
        elif kind is not None:
            call[name] = torch.randn(shape, dtype=kind)
    if flag():
        causal = torch.ones(rows, columns, dtype=torch.bool).triu(1)
        call |= {"is_causal": True, "attn_mask": causal}
    sizes = {"rows": rows, "columns": columns, "batch": batch, "same": same}
    return Case(draw(st.sampled_from([*formats.available()])), build, call, sizes, flag())


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # torch's, of the dense module
@settings(max_examples=100)
@given(case=_cases())
def test_every_option_is_as_in_torch(case):
    truth = _attention(dtype=torch.float64, **case.build).train(case.training)
    ours = _convert(truth, formats.get(case.form)(FULL))
    assert _factorized(ours) == set(PARTS)
    inputs = _inputs(truth, **case.sizes)
    results = []
    for module in (ours, truth):
        torch.manual_seed(3)  # dropout
        results.append(module(*inputs, **case.call))
    (output, weights), (expected, expected_weights) = results
    assert_close(output, expected, torch.float64, "output")
    assert (weights is None) is (expected_weights is None)
    if weights is not None:
        assert_close(weights, expected_weights, torch.float64, "weights")
    probe = torch.randn_like(output)
    leaves = list({id(x): x for x in inputs}.values())
    actual, wanted = ((output * probe).sum(), (expected * probe).sum())
    if weights is not None:
        probe = torch.randn_like(weights)
        actual, wanted = actual + (weights * probe).sum(), wanted + (expected_weights * probe).sum()
    names = [name for name, _ in truth.named_parameters()]
    found = torch.autograd.grad(actual, [*leaves, *ours.parameters()], materialize_grads=True)
    values = torch.autograd.grad(wanted, [*leaves, *truth.parameters()], materialize_grads=True)
    scale = max(float(value.norm()) for value in values)
    for one, other in zip(found, values[: len(leaves)], strict=False):
        assert_close(one, other, torch.float64, "gradient of an input", scale)
    by_name = dict(zip(names, values[len(leaves) :], strict=True))
    ours_by_name = dict(zip((name for name, _ in ours.named_parameters()), found[len(leaves) :], strict=True))
    for part, (weight, bias) in _gradients(by_name).items():
        layer = getattr(ours, part)
        cores = torch.autograd.grad(layer.to_dense(), list(layer.cores), weight)
        for k, core in enumerate(cores):
            assert_close(ours_by_name[f"{part}.cores.{k}"], core, torch.float64, f"{part} core {k}", scale)
        if bias is not None:
            assert_close(ours_by_name[f"{part}.bias"], bias, torch.float64, f"{part} bias", scale)
    for name in {"bias_k", "bias_v"} & by_name.keys():
        assert_close(ours_by_name[name], by_name[name], torch.float64, name, scale)


def _gradients(by_name):
    """The gradients of nn.MultiheadAttention's parameters, a (weight, bias) for each projection."""
    if "in_proj_weight" in by_name:
        weights = by_name["in_proj_weight"].chunk(3)
    else:
        weights = [by_name[f"{part}_weight"] for part in PARTS[:3]]
    biases = by_name["in_proj_bias"].chunk(3) if "in_proj_bias" in by_name else [None] * 3
    parts = dict(zip(PARTS[:3], zip(weights, biases, strict=True), strict=True))
    return parts | {"out_proj": (by_name["out_proj.weight"], by_name.get("out_proj.bias"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_other_dtypes(dtype, need_weights):
    truth = _attention(batch_first=True).eval()
    inputs = _inputs(truth, dtype=torch.float32)
    mask = torch.zeros(5, 6).masked_fill(torch.ones(5, 6).triu(1) > 0, -torch.inf)
    expected, _ = truth(*inputs, attn_mask=mask)
    ours = _convert(truth.to(dtype))
    output, _ = ours(*(x.to(dtype) for x in inputs), attn_mask=mask.to(dtype), need_weights=need_weights)
    assert output.dtype == dtype
    assert_close(output, expected, dtype)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_autocast(need_weights, options):
    truth = _attention(**options)
    ours = _convert(truth)
    inputs = _inputs(truth, dtype=torch.float32)
    expected, _ = truth(*inputs)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(*inputs, key_padding_mask=padding, need_weights=need_weights)
        dense, _ = truth(*inputs, key_padding_mask=padding, need_weights=need_weights)
    assert output.dtype == dense.dtype == torch.bfloat16
    assert_close(output, expected, torch.bfloat16)
    output.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in ours.parameters())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("only", [None, "q_proj"])
def test_nested_tensors_are_taken_sequence_by_sequence(layout, only):
    truth = _attention(dtype=torch.float64, batch_first=True)
    ours = _convert(truth, {only: LowRank(FULL)} if only else None)
    rows = [torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (4, 1, 7)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    output, weights = ours(nested, nested, nested, average_attn_weights=False)
    assert output.is_nested
    assert output.layout == layout
    assert weights.shape == (3, 4, 7, 7)
    parts = output.unbind()
    expected = [truth(row, row, row)[0] for row in rows]
    for part, other in zip(parts, expected, strict=True):
        assert_close(part, other, torch.float64)
    probe = [torch.randn_like(part) for part in expected]
    grads = [
        torch.autograd.grad(sum((y * p).sum() for y, p in zip(y, probe, strict=True)), rows) for y in (parts, expected)
    ]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, torch.float64, "gradient")


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "batch_first": True, "add_bias_kv": True}], ids=str)
def test_compile_and_export_without_a_graph_break(options):
    ours = _convert(_attention(**options), LowRank(4))
    inputs, padding = _inputs(ours, dtype=torch.float32), torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 4:] = True
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        expected = ours.train(mode)(*inputs, key_padding_mask=padding, need_weights=mode)
        actual = compiled(*inputs, key_padding_mask=padding, need_weights=mode)
        torch.testing.assert_close(actual, expected)
    actual[0].sum().backward()
    assert all(torch.isfinite(core.grad).all() for core in ours.q_proj.cores)
    torch._dynamo.reset()
    call = {"key_padding_mask": padding, "need_weights": False}
    exported = torch.export.export(ours, tuple(inputs), call).module()
    torch.testing.assert_close(exported(*inputs, **call), expected)


# Inside torch's encoder


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not options.get("norm_first")).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "key", ["*", r"re:layers\.0.*", r"re:layers\.1.*", r"re:.*k_proj", r"re:layers\.[02].*out_proj"]
)
def test_the_encoder_leaves_its_fast_path_without_a_dense_weight(key, padded, norm_first, monkeypatch):
    truth = _encoder(norm_first=norm_first)
    ours = _convert(truth, {key: LowRank(FULL)})
    assert _factorized(ours)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3]) if padded else None
    keep = torch.ones(2, 7, dtype=torch.bool) if mask is None else ~mask
    built = []
    real = FactorizedLinear.to_dense
    monkeypatch.setattr(FactorizedLinear, "to_dense", lambda layer: built.append(layer) or real(layer))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output, expected = (model(x, src_key_padding_mask=mask) for model in (ours, truth))
        assert_close(output[keep], expected[keep], torch.float64)
    with torch.no_grad():
        causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        output, expected = (model(x, mask=causal, is_causal=True) for model in (ours, truth))
        assert_close(output, expected, torch.float64)
    assert built == []


def test_a_compiled_encoder_leaves_its_fast_path_too():
    ours, operations = _convert(_encoder().layers[0]), []

    def backend(graph, _):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.compile(ours, fullgraph=True, backend=backend)(x), ours(x), torch.float64)
    assert any("scaled_dot_product" in name for name in operations)
    assert not [name for name in operations if "_transformer_encoder_layer_fwd" in name]
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}], ids=str)
def test_the_attributes_of_multihead_attention(options):
    truth = _attention(dropout=0.25, dtype=torch.float64, **options)
    ours = _convert(truth, {"v_proj": LowRank(FULL)})
    names = ["embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"]
    assert [getattr(ours, name) for name in names] == [getattr(truth, name) for name in names]
    assert ours.bias_k is ours.bias_v is None
    for name in ("in_proj_weight", "in_proj_bias"):
        packed, expected = getattr(ours, name), getattr(truth, name)
        assert (packed is None) is (expected is None)
        if packed is not None:
            assert (packed.shape, packed.dtype, packed.requires_grad) == (expected.shape, expected.dtype, True)
            assert_close(packed * 1, expected, torch.float64)
            with pytest.raises(ReadOnlyWeightError):
                nn.init.zeros_(packed)


@pytest.mark.parametrize(
    ("shapes", "call", "message"),
    [
        ([(5, 3, 16), (5, 16), (5, 16)], {}, "3 dimensions, or of 2"),
        ([(5,)] * 3, {}, "3 dimensions, or of 2"),
        ([(5, 3, 16), (6, 3, 16), (5, 3, 16)], {}, "key and value alike"),
        ([(5, 1, 16), (5, 3, 16), (5, 3, 16)], {}, "one batch size; got 1 and 3"),
        ([(5, 3, 16)] * 3, {"is_causal": True}, "no attn_mask"),
        ([(5, 3, 16)] * 3, {"attn_mask": torch.zeros(5, 4)}, r"\(5, 5\) or \(12, 5, 5\); got \(5, 4\)"),
        ([(5, 3, 16)] * 3, {"attn_mask": torch.zeros(4, 5, 5)}, r"got \(4, 5, 5\)"),
        ([(5, 3, 16)] * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "attn_mask: boolean or floating"),
        ([(5, 3, 16)] * 3, {"key_padding_mask": torch.zeros(5, 3)}, r"of shape \(3, 5\); got \(5, 3\)"),
        ([(5, 3, 12)] * 3, {}, "in_features = 16"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(shapes, call, message):
    ours = _convert(_attention())
    with pytest.raises(NetworkError, match=message):
        ours(*(torch.randn(shape) for shape in shapes), **call)
