"""TensorRegression and TensorContraction against the dense map between tensors in float64."""

import copy
import json
import math
import pickle

import numpy
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import (
    CP,
    TT,
    ConversionError,
    FactorizedLinear,
    FormatError,
    LowRank,
    NetworkError,
    RankError,
    TensorContraction,
    TensorLinear,
    TensorRegression,
    Tucker,
    contraction,
    layers,
)
from tensorlayers.formats import available, from_dict
from tensorlayers.formats.mode_products import ModeProducts
from tensorlayers.network import modes_by_axis
from tensorlayers.plan import ConversionPlan
from tensorlayers.testing import EXACT, INITIAL_STD, assert_close, check_layer, dense_by_hand, relative_error

IN, OUT = (4, 3, 5), (2, 6)


def regression(format, **options):
    return TensorRegression(IN, OUT, format=format, **options)


def contracting(**options):
    return TensorContraction(IN, (2, 6, 3), bias=True, **options)


KINDS = {name: lambda cls=cls, **options: regression(cls(3), **options) for name, cls in sorted(available().items())}
KINDS["contraction"] = contracting
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
batches = st.lists(st.integers(0, 3), max_size=2).map(tuple)
ranks = st.one_of(st.integers(1, 4), st.floats(0.5, 1.0))


@given(st.sampled_from(sorted(available())), shapes, shapes, batches, ranks, st.booleans())
def test_a_regression_equals_the_dense_map(name, into, out, batch, rank, bias):
    try:
        layer = TensorRegression(into, out, bias, dtype=torch.float64, format=available()[name](rank))
    except (FormatError, RankError):  # no bond; or a fraction that so small a weight cannot reach
        assume(False)
    check_layer(layer, torch.randn(*batch, *into, dtype=torch.float64))
    joined = [math.prod(mode.size for mode in modes) for modes in modes_by_axis(layer.axes, layer.network)]
    by_hand = dense_by_hand(layer.network, list(layer.cores)).reshape(joined)
    assert_close(layer.to_dense(), by_hand[tuple(slice(size) for size in (*out, *into))], torch.float64)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4), batches, st.booleans())
def test_a_contraction_equals_the_dense_map(pairs, batch, bias):
    into, out = zip(*pairs, strict=True)
    layer = TensorContraction(into, out, bias, dtype=torch.float64)
    x = torch.randn(*batch, *into, dtype=torch.float64)
    check_layer(layer, x)
    y = x
    for matrix in layer.cores:  # each product moves its mode to the end
        y = torch.tensordot(y, matrix, dims=([len(batch)], [1]))
    assert_close(layer(x), y + layer.bias if bias else y, torch.float64)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(build, dtype):
    check_layer(build(dtype=dtype), torch.randn(3, *IN, dtype=dtype))


@given(shapes, shapes, batches, st.booleans())
def test_the_dense_map_is_a_tensor_product(into, out, batch, bias):
    layer = TensorLinear(into, out, bias, dtype=torch.float64)
    x = torch.randn(*batch, *into, dtype=torch.float64)
    weight = layer.weight.permute(*range(len(out), len(out) + len(into)), *range(len(out)))
    y = torch.tensordot(x, weight, dims=len(into))
    assert_close(layer(x), y + layer.bias if bias else y, torch.float64)


@every_kind
def test_the_drawn_weight_has_the_deviation_of_linear(build):
    for seed in range(5):
        torch.manual_seed(seed)
        layer = build()
        std = float(layer.to_dense().detach().double().std()) * math.sqrt(3 * math.prod(IN))
        assert abs(std - 1) <= INITIAL_STD
        assert float(layer.bias.detach().abs().max()) <= math.prod(IN) ** -0.5
        assert layer.bias.shape == layer.out_shape


def test_an_integer_is_a_shape_of_one_dimension():
    layer = TensorRegression(6, 10, format=CP(2))
    assert (layer.in_shape, layer.out_shape, layer(torch.zeros(3, 6)).shape) == ((6,), (10,), (3, 10))
    split = TensorRegression(6, 10, format=TT(2, in_modes=(2, 4), out_modes=(5, 2)))
    check_layer(split, torch.randn(3, 6))
    for number in (numpy.int64(6), [numpy.int32(6)]):
        assert json.dumps(TensorContraction(number, number).config()) == json.dumps(TensorContraction(6, 6).config())


# -- what is computed --------------------------------------------------------------------------------------------------


@every_kind
def test_the_weight_is_not_formed(build, monkeypatch):
    layer, x = build(), torch.randn(3, *IN)

    def refuse(*arguments):
        raise AssertionError("the dense weight was formed")

    for module, name in ((contraction, "to_dense"), (contraction, "dense_weight"), (type(layer), "to_dense")):
        monkeypatch.setattr(module, name, refuse)
    layer(x).sum().backward()
    assert not any(
        {*layer.network.names("in"), *layer.network.names("out")} <= set(step.result)
        for step in contraction.linear_plan(layer.network, 1).steps
    )


@pytest.mark.parametrize("cls", [CP, Tucker, LowRank])
def test_a_head_has_a_fraction_of_the_dense_flops(cls):
    # The last activation of a ResNet, 512 x 7 x 7, to 1000 classes.
    layer = TensorRegression((512, 7, 7), 1000, device="meta", format=cls(16))
    settings = layer.settings_of(layer)
    ours, dense = layer.factorized_cost(layer.network, settings, 256), layer.dense_cost(settings, 256)
    assert ours == contraction.linear_plan(layer.network, 256).cost
    assert ours.flops < 0.1 * dense.flops
    assert dense.flops == 2 * 256 * 512 * 49 * 1000


def test_the_cheapest_order_of_mode_products_is_taken():
    # The mode that shrinks most comes first, those that grow come last.
    layer = TensorContraction((8, 64, 8), (32, 2, 8))
    plan = contraction.linear_plan(layer.network, 256)
    contracted = [next(index for index in step.operands[0] if index not in step.result) for step in plan.steps]
    assert contracted == ["i2", "i3", "i1"]
    assert plan.flops == 2 * 256 * (8 * 64 * 8 * 2 + 8 * 2 * 8 * 8 + 8 * 2 * 8 * 32)


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cp", "tucker", "contraction"])
def test_dropout_acts_in_training_and_leaves_the_expected_weight(name):
    layer = KINDS[name](dropout=0.3, dtype=torch.float64)
    x = torch.randn(2, *IN, dtype=torch.float64)
    plain = layer.eval()(x).detach()
    assert_close(plain, layer.to_module()(x), torch.float64)
    layer.train()
    draws = torch.stack([layer(x).detach() for _ in range(1000)])
    assert (draws[0] != plain).any()
    spread = float(draws.var(dim=0).sum().sqrt()) / math.sqrt(len(draws))
    assert float((draws.mean(dim=0) - plain).norm()) < 4 * spread


def test_dropout_of_a_contraction_drops_slices_of_the_output():
    layer = TensorContraction(IN, (2, 6, 3), dropout=0.4, dtype=torch.float64)
    x = torch.randn(7, *IN, dtype=torch.float64)
    ratio = (layer(x) / layer.eval()(x)).detach()
    alive = ratio.abs() > 0.5
    assert_close(ratio, alive[:1] * torch.full_like(ratio, 0.6**-3), torch.float64)  # one draw for the whole batch
    first, second, third = (alive[0].movedim(d, 0).flatten(1).any(dim=1) for d in range(3))
    assert torch.equal(alive[0], first[:, None, None] & second[:, None] & third)
    assert 0 < int(alive.sum()) < alive.numel()


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, True, "0.1", None, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(NetworkError, match=r"below 1; got"):
        TensorContraction(IN, IN, dropout=dropout)


# -- plain data, dense layers, models ----------------------------------------------------------------------------------


@every_kind
def test_config_and_copies(build):
    layer = build(dropout=0.25)
    again = type(layer).from_config(json.loads(json.dumps(layer.config())))
    assert (again.settings_of(again), again.network, again.rank_dropout) == (
        layer.settings_of(layer),
        layer.network,
        0.25,
    )
    assert type(layer).read_settings(json.loads(json.dumps(layer.settings_of(layer)))) == layer.settings_of(layer)
    x = torch.randn(2, *IN)
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_a_model_is_summarized_saved_and_made_dense(tmp_path):
    model = nn.Sequential(contracting(dropout=0.5), nn.ReLU(), TensorRegression((2, 6, 3), 4, format=CP(2))).eval()
    x = torch.randn(3, *IN)
    summary = tl.summarize(model)
    assert [entry.layer for entry in summary] == ["contraction", "regression"]
    read = ConversionPlan.from_json(summary.to_json())
    assert [(entry.network, entry.format) for entry in read] == [(entry.network, entry.format) for entry in summary]
    tl.save_pretrained(model, tmp_path)
    dense = tl.to_dense(model)
    assert [type(layer) for layer in dense] == [TensorLinear, nn.ReLU, TensorLinear]
    assert_close(dense(x), model(x), torch.float32)
    other = nn.Sequential(contracting(), nn.ReLU(), TensorRegression((2, 6, 3), 4, format=CP(2))).eval()
    for architecture in (dense, other):
        loaded = tl.load_pretrained(tmp_path, architecture)
        assert torch.equal(loaded(x), model(x))
        assert loaded[0].rank_dropout == 0.5


@pytest.mark.parametrize("form", available())
def test_dense_maps_are_converted_exactly_at_full_rank(form):
    model = nn.Sequential(TensorLinear(IN, OUT), nn.Flatten())
    converted = tl.convert_model(model, available()[form](10**6), force=True)
    assert isinstance(converted[0], TensorRegression)
    assert converted[0].error <= EXACT
    x = torch.randn(2, *IN)
    assert relative_error(converted(x), model(x)) <= EXACT


def test_jointly_factorized_layers_share_their_cores():
    dense = [TensorLinear(IN, OUT, dtype=torch.float64) for _ in range(3)]
    first, *others = TensorRegression.from_dense_jointly(dense, Tucker(10**6))
    assert all(other.cores is first.cores for other in others)
    x = torch.randn(2, *IN, dtype=torch.float64)
    for layer, module in zip([first, *others], dense, strict=True):
        assert_close(layer(x), module(x), torch.float64)
    check_layer(TensorContraction(IN, IN, dtype=torch.float64, stack=(3, 1)), x)


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(bias):
    linear = nn.Linear(60, 12, bias=bias).eval()
    x = torch.randn(5, *IN)
    layer = TensorRegression.from_linear(linear, IN, Tucker(10**6), OUT)
    assert not layer.training
    assert relative_error(layer(x).flatten(1), linear(x.flatten(1))) <= EXACT
    assert TensorRegression.from_linear(linear, IN, CP(2)).out_shape == (12,)
    assert not {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in linear.parameters()}
    factors = [torch.randn(2, 4), torch.randn(2, 3), torch.randn(3, 5)]
    with torch.no_grad():
        linear.weight.copy_(torch.kron(torch.kron(factors[0], factors[1]), factors[2]))
    nearest = TensorContraction.from_linear(linear, IN, (2, 2, 3))
    assert nearest.error <= EXACT
    assert relative_error(nearest(x).flatten(1), linear(x.flatten(1))) <= EXACT
    norms = [float(core.detach().norm()) for core in nearest.cores]
    assert max(norms) <= 1.5 * min(norms)


def test_from_linear_refuses_what_does_not_fit():
    linear = nn.Linear(60, 12)
    with pytest.raises(ConversionError, match=r"in_shape \(4, 4\): its product is in_features = 60; got 16"):
        TensorRegression.from_linear(linear, (4, 4), CP(2))
    with pytest.raises(ConversionError, match=r"out_shape \(5,\): its product is out_features = 12; got 5"):
        TensorRegression.from_linear(linear, IN, CP(2), 5)
    with pytest.raises(ConversionError, match=r"an nn.Linear; got Conv1d"):
        TensorRegression.from_linear(nn.Conv1d(3, 3, 1), IN, CP(2))


# -- compilers and transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lowrank", "contraction"])
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    layer = KINDS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        x = torch.randn(rows, *IN, requires_grad=True)
        expected, actual = layer(x), compiled(x)
        assert_close(actual, expected, torch.float32)
        gradients = (torch.autograd.grad(y.sum(), [x, *layer.parameters()]) for y in (actual, expected))
        for ours, truth in zip(*gradients, strict=True):
            assert_close(ours, truth, torch.float32)


@every_kind
def test_export_with_any_batch(build):
    layer, batch = build().eval(), torch.export.Dim("batch")
    exported = torch.export.export(layer, (torch.randn(4, *IN),), dynamic_shapes=({0: batch},)).module()
    for rows in (4, 600):
        x = torch.randn(rows, *IN)
        assert_close(exported(x), layer(x), torch.float32)


@every_kind
def test_functional_transforms(build):
    layer, x = build(), torch.randn(6, *IN)
    assert_close(torch.func.vmap(layer)(x), layer(x), torch.float32)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(per_row[name].sum(0), parameter.grad, torch.float32)


@every_kind
def test_autocast(build):
    layer, x = build(), torch.randn(5, *IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.to_module()(x).dtype == torch.bfloat16
    assert_close(y, layer(x), torch.bfloat16)
    y.sum().backward()
    assert all(core.grad.dtype == torch.float32 for core in layer.cores)


# -- refusals ----------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 5), (2, 60), (), (2, 4, 3, 6)])
def test_a_wrong_input_is_refused(build, shape):
    layer = build()
    for module in (layer, layer.to_module()):
        with pytest.raises(NetworkError) as error:
            module(torch.zeros(shape))
        assert str(error.value) == f"input: the last dimensions are in_shape = (4, 3, 5); got {shape}"


@pytest.mark.parametrize("shape", [(), 0, (3, 0), (3, -1), "34", (2.0,), (True,), None, (1,) * 11])
def test_a_bad_shape_is_refused(shape):
    for build in (TensorRegression, TensorContraction, TensorLinear):
        with pytest.raises(NetworkError, match=r"in_shape.*integer.*got"):
            build(shape, (2,))
        with pytest.raises(NetworkError, match=r"out_shape.*integer.*got"):
            build((2,), shape)


def test_a_contraction_has_mode_products_only():
    with pytest.raises(FormatError, match=r"as many out modes as in modes.*2 of \(2, 6\) and 3 of \(4, 3, 5\)"):
        TensorContraction(IN, OUT)
    with pytest.raises(FormatError, match=r"CP.*a tensor contraction has no bond; got r"):
        TensorContraction(IN, IN, format=CP(2))
    with pytest.raises(RankError, match="rank 3: mode products"):
        ModeProducts(3)
    assert "mode_products" not in available()
    assert from_dict(ModeProducts().to_dict()) == ModeProducts()
    with pytest.raises(FormatError, match=r"no others.*and kernel modes"):
        layers.FactorizedConv2d(2, 2, 3, format=ModeProducts())


def test_mode_products_are_a_kronecker_product_on_a_linear_layer():
    format = ModeProducts(in_modes=(3, 4), out_modes=(2, 3))
    layer = FactorizedLinear(11, 6, dtype=torch.float64, format=format)  # one column of padding
    assert_close(layer.to_dense(), torch.kron(*layer.cores)[:, :11], torch.float64)
    check_layer(layer, torch.randn(5, 11, dtype=torch.float64))


def test_settings_that_no_layer_has_are_refused():
    with pytest.raises(NetworkError, match="TensorLinear cannot be built: in_shape"):
        TensorRegression.read_settings({"in_shape": [0], "out_shape": [2]})
