"""Decomposing in a metric, against its matrices in float64."""

import math

import pytest
import torch

from tensorlayers import metric as metrics
from tensorlayers.errors import DecompositionError
from tensorlayers.formats import LowRank
from tensorlayers.metric import Metric, fit, relative_error
from tensorlayers.network import Axis, linear_axes
from tensorlayers.testing import dense_by_hand
from tests.decomposition import FORMATS, MODES_OF, SPLIT, form_of

AXES = linear_axes(48, 36)


def fitted(format, weight, axes, metric):
    """The network, its cores in the metric, the errors of the plain decomposition and of these, and the factors."""
    network = format.resolve(axes)[0]
    plain = format.decompose(weight, axes).cores
    dense = torch.nn.functional.pad(weight, padding(axes, network)).reshape(network.shape)
    factors = metric.factors(axes, network)
    norm = dense.norm()
    cores = fit(dense / norm, network, format._fill_groups, factors)
    cores = [cores[0] * norm, *cores[1:]]
    errors = [relative_error(dense, network, some, factors) for some in (plain, cores)]
    return network, cores, errors


def padding(axes, network):
    sizes = [math.prod(mode.size for mode in some) for some in metrics.modes_by_axis(axes, network)]
    return [n for axis, size in reversed(list(zip(axes, sizes, strict=True))) for n in (0, size - axis.size)]


def output_error(weight, found, inputs):
    """Of matrices, by hand."""

    def squared(matrix):
        return float(((matrix @ inputs) * matrix).sum())

    return math.sqrt(max(squared(weight - found), 0) / squared(weight))


@pytest.mark.parametrize("on_outputs", [False, True], ids=["inputs", "both"])
@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", FORMATS)
def test_it_is_better_than_the_plain_one(cls, out_modes, in_modes, on_outputs):
    torch.manual_seed(0)
    axes = linear_axes(math.prod(out_modes) - 1, math.prod(in_modes) - 2)  # padded
    weight = torch.randn(*(axis.size for axis in axes))
    inputs, outputs = (form_of(axis.size) for axis in reversed(axes))
    given = Metric(inputs, outputs if on_outputs else None)
    network, cores, (plain, found) = fitted(cls(3, out_modes=out_modes, in_modes=in_modes), weight, axes, given)
    assert found < plain
    if not on_outputs:
        dense = dense_by_hand(network, cores).reshape(network.features("out"), -1)[:, : axes[1].size]
        whole = torch.nn.functional.pad(weight.double(), (0, 0, 0, len(dense) - len(weight)))
        assert found == pytest.approx(output_error(whole, dense, inputs), abs=1e-6)


@pytest.mark.parametrize("on_outputs", [False, True], ids=["inputs", "both"])
def test_low_rank_is_the_whitened_svd(on_outputs):
    weight, inputs, outputs = torch.randn(48, 36), form_of(36), form_of(48)
    _, _, (_, found) = fitted(LowRank(5), weight, AXES, Metric(inputs, outputs if on_outputs else None))
    left, right = (torch.linalg.cholesky(form) for form in (outputs, inputs))
    values = torch.linalg.svdvals((left.T if on_outputs else torch.eye(48).double()) @ weight.double() @ right)
    assert found == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-6)


@pytest.mark.parametrize("cls", FORMATS)
def test_frequencies_of_rows(cls):
    axes = Axis("in", 36, split=True), Axis("out", 48, split=True)
    weight, frequencies = torch.randn(36, 48), torch.rand(36, dtype=torch.float64) ** 6
    frequencies[3] = 0  # a row that is never looked up
    _, _, (plain, found) = fitted(cls(3, **SPLIT), weight, axes, Metric(frequencies))
    assert found < plain


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution(cls, groups):
    axes = (Axis("out", 8), Axis("in", 6), Axis("kernel", 3), Axis("kernel", 3))
    lead = (Axis("group", groups),) if groups > 1 else ()
    forms = torch.stack([form_of(54) for _ in range(groups)])
    weight = torch.randn(*(axis.size for axis in (*lead, *axes)))
    given = Metric(forms if lead else forms[0])
    _, _, (plain, found) = fitted(cls(3), weight, (*lead, *axes), given)
    assert found < plain


def test_a_metric_that_sees_nothing():
    _, _, errors = fitted(LowRank(3), torch.randn(48, 36), AXES, Metric(torch.zeros(36, 36)))
    assert errors == [0.0, 0.0]


@pytest.mark.parametrize("cls", FORMATS)
def test_inputs_of_a_few_directions(cls):
    network, cores, (plain, found) = fitted(cls(3, **SPLIT), torch.randn(48, 36), AXES, Metric(form_of(36, rank=4)))
    assert found < plain
    assert all(torch.isfinite(core).all() for core in cores)
    assert dense_by_hand(network, cores).norm() < 100 * 48


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Metric(torch.eye(35)), r"inputs of shape \(36, 36\), by the axes; got \(35, 35\)"),
        (Metric(torch.ones(48)), r"inputs of shape \(36,\), by the axes; got \(48,\)"),
        (Metric(torch.eye(36), torch.eye(36)), r"outputs of shape \(48, 48\), by the axes; got \(36, 36\)"),
        (Metric(torch.full((36, 36), math.nan)), "inputs: every entry is finite"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(DecompositionError, match=message):
        given.factors(AXES, LowRank(3).resolve(AXES)[0])
