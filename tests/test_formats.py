"""Every format x order x dtype against the dense layer in float64: the conformance suite, and gradcheck."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import FactorizedLinear, FormatError, ModeError, RankError, TensorlayersError
from tensorlayers.formats import available, from_dict
from tensorlayers.testing import EXACT, INITIAL_STD, check_format, check_linear

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _variants():
    """One small instance of every format at every order, and with unequal numbers of in and out modes."""
    for name, cls in sorted(available().items()):
        if "order" in {field.name for field in dataclasses.fields(cls)}:
            for order in (2, 3, 4):
                yield pytest.param(cls(2, order), id=f"{name}-{order}")
            yield pytest.param(cls(2, in_modes=(2, 3, 3), out_modes=(4, 4)), id=f"{name}-3x2")
            yield pytest.param(cls(2, in_modes=(18,), out_modes=(3, 5)), id=f"{name}-1x2")
        else:
            yield pytest.param(cls(3), id=name)
            yield pytest.param(cls(3, in_modes=(3, 6), out_modes=(3, 5)), id=f"{name}-modes")


VARIANTS = list(_variants())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", VARIANTS)
def test_conformance(format, dtype):
    check_format(format, 15, 18, dtype)


@pytest.mark.parametrize("format", VARIANTS)
def test_conformance_padded(format):
    check_format(format, 13, 17)


@pytest.mark.parametrize("format", VARIANTS)
def test_gradcheck(format):
    layer = FactorizedLinear(
        5, 4, dtype=torch.float64, format=dataclasses.replace(format, in_modes=None, out_modes=None)
    )
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(forward, (x, *layer.parameters()))


@pytest.mark.parametrize("format", VARIANTS)
def test_exact_at_full_rank(format):
    weight = torch.randn(15, 18)
    assert dataclasses.replace(format, rank=10**6).decompose(weight).error <= EXACT


@st.composite
def formats(draw):
    """A random format that fits a random shape, modes chosen or given, odd and prime sizes among them."""
    cls = draw(st.sampled_from(sorted(available().values(), key=lambda cls: cls.name)))
    options = {}
    if "order" in {field.name for field in dataclasses.fields(cls)}:
        options["order"] = draw(st.integers(2, 4))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    for side, size in zip(("out_modes", "in_modes"), shape, strict=True):
        if draw(st.booleans()):
            first = draw(st.integers(1, size))
            options[side] = (first, -(-size // first))
    rank = draw(st.one_of(st.integers(1, 6), st.floats(0.3, 1.0)))
    return cls, rank, options, shape


@given(formats(), st.integers(0, 4))
def test_any_shape_modes_and_rank(drawn, rows):
    cls, rank, options, (out_features, in_features) = drawn
    try:
        layer = FactorizedLinear(in_features, out_features, format=cls(rank, **options))
    except RankError as error:
        if not (isinstance(rank, float) and "smallest" in str(error)):
            raise
        return
    check_linear(layer, rows)
    if isinstance(rank, float):
        assert layer.network.num_parameters <= rank * out_features * in_features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", VARIANTS)
@pytest.mark.parametrize("shape", [(64, 48), (60, 77)])
def test_every_draw_has_the_deviation_of_torch(format, shape, dtype):
    format = dataclasses.replace(format, in_modes=None, out_modes=None)
    for seed in range(5):
        torch.manual_seed(seed)
        layer = FactorizedLinear(*shape, dtype=dtype, format=format)
        std = float(layer.to_dense().detach().double().std()) * math.sqrt(3 * shape[0])
        assert abs(std - 1) <= INITIAL_STD


@pytest.mark.parametrize("format", VARIANTS)
def test_dictionary_round_trip_and_pin(format):
    assert from_dict(format.to_dict()) == format
    network = format.network(15, 18)
    assert format.pin(network).network(15, 18) == network
    assert str(format).startswith(type(format).__name__)


@pytest.mark.parametrize("name", sorted(available()))
def test_the_parameter_fraction_is_kept_and_used(name):
    for fraction in (0.5, 0.1):
        network = available()[name](fraction).network(768, 3072)
        assert network.num_parameters <= fraction * 768 * 3072
        # A raise of one rank costs at most a tenth of the weight in any of these formats.
        assert network.num_parameters >= (fraction - 0.1) * 768 * 3072


@pytest.mark.parametrize(
    ("data", "error", "offender"),
    [
        ({"name": "nonsense", "rank": 2}, FormatError, "nonsense"),
        ({"name": "tt"}, FormatError, "rank"),
        ({"name": "tt", "rank": 2, "colour": 1}, FormatError, "colour"),
        ({"name": "lowrank", "rank": 2, "order": 3}, FormatError, "order"),
        ("tt", FormatError, "tt"),
        ({"name": "tt", "rank": 2, "order": 0}, FormatError, "order"),
        ({"name": "tt", "rank": 2, "order": 2.0}, FormatError, "order"),
        ({"name": "tt", "rank": 2, "order": True}, FormatError, "order"),
        ({"name": "cp", "rank": 2, "order": 30}, FormatError, "from 1 to 10"),
        ({"name": "cp", "rank": 2, "in_modes": [2] * 11}, ModeError, "at most 10"),
        ({"name": "tt", "rank": 2, "in_modes": [0, 3]}, ModeError, "in_modes"),
        ({"name": "tt", "rank": 2, "in_modes": []}, ModeError, "in_modes"),
        ({"name": "tt", "rank": 2, "in_modes": 4}, ModeError, "in_modes"),
        ({"name": "tt", "rank": 0}, RankError, "0"),
        ({"name": "tt", "rank": "8"}, RankError, "8"),
    ],
)
def test_bad_choices_are_refused(data, error, offender):
    with pytest.raises(error, match=offender):
        from_dict(data)


def test_modes_that_do_not_hold_the_dimension_are_refused():
    with pytest.raises(ModeError, match=r"in_modes \(4, 4\).*at least 17"):
        available()["tt"](2, in_modes=(4, 4)).network(16, 17)


def test_a_network_without_a_bond_is_refused():
    with pytest.raises(FormatError, match="without a bond"):
        available()["btt"](2, order=1).network(16, 16)


def test_every_error_is_one_family():
    assert issubclass(RankError, TensorlayersError)
    assert issubclass(RankError, ValueError)
