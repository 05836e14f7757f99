"""Least squares over the cores in a metric. The truth is the dense tensor, and the metric's matrix, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tensorlayers import normal_equations
from tensorlayers.als import least_squares
from tensorlayers.decompose import balance
from tensorlayers.errors import FormatError
from tensorlayers.formats import LowRank, available
from tensorlayers.network import Mode, Network
from tensorlayers.normal_equations import Factor
from tensorlayers.testing import dense_by_hand
from tests.decomposition import FORMATS, MODES_OF, SPLIT, form_of

DTYPE = torch.float64
NOISE = 1e-12  # of a squared error, which is computed as a difference of numbers near 1


def names_of(network, role):
    return tuple(mode.name for mode in network.modes if mode.role == role)


def factor_of(network, form, modes):
    shape = [network.size[name] for name in modes]
    return Factor(form.reshape(*shape, *shape), modes)


def squared(network, difference, metric):
    """The squared norm of a dense tensor, by one einsum."""
    letters = {}

    def written(indices):
        return "".join(letters.setdefault(index, chr(ord("a") + len(letters))) for index in indices)

    coupled = {name for factor in metric for name in factor.modes}
    free = [mode.name for mode in network.modes]
    turned = [f"{name}'" if name in coupled else name for name in free]
    terms = [written(free), written(turned), *(written(factor.names) for factor in metric)]
    return float(torch.einsum(",".join(terms) + "->", difference, difference, *(factor.values for factor in metric)))


def unit(network, dense, metric):
    return dense / math.sqrt(squared(network, dense, metric))


def error_of(network, dense, cores, metric):
    return math.sqrt(max(squared(network, dense - dense_by_hand(network, cores), metric), 0))


def case(cls, out_modes, in_modes, rank=3, **form):
    """A network, a random weight of norm 1 in the metric of its inputs, and the cores of the plain decomposition."""
    format = cls(rank, out_modes=out_modes, in_modes=in_modes)
    network = format.network(math.prod(out_modes), math.prod(in_modes))
    ins = names_of(network, "in")
    metric = [factor_of(network, form_of(network.features("in"), **form), ins)]
    dense = unit(network, torch.randn(network.shape, dtype=DTYPE), metric)
    norm = dense.norm()
    start = format.fill(dense / norm, network)
    return network, dense, balance(network, [start[0] * norm, *start[1:]]), metric


def sweeps_of(network, dense, cores, metric, count):
    """The errors of one sweep after another, which are checked against the truth."""
    errors = [error_of(network, dense, cores, metric)]
    for _ in range(count):
        cores, error = least_squares(network, dense, cores, metric=metric, anchored=True, sweeps=1)
        errors.append(error_of(network, dense, cores, metric))
        assert error == pytest.approx(errors[-1], abs=1e-6)
    return errors, cores


def never_rises(errors):
    return all(after**2 <= before**2 + NOISE * max(1, errors[0] ** 2) for before, after in itertools.pairwise(errors))


@pytest.fixture(params=["direct", "gradients"])
def _solver(request, monkeypatch):
    if request.param == "gradients":
        monkeypatch.setattr(normal_equations, "_LARGEST", 0)


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", FORMATS)
def test_never_rises_and_beats_the_plain_fit(cls, out_modes, in_modes):
    network, dense, cores, metric = case(cls, out_modes, in_modes)
    errors, _ = sweeps_of(network, dense, cores, metric, 5)
    assert never_rises(errors)
    assert errors[-1] < errors[0]


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize("cls", FORMATS)
def test_inputs_that_fill_no_space(cls):
    network, dense, cores, _ = case(cls, *SPLIT.values())
    ins = names_of(network, "in")
    metric = [factor_of(network, form_of(network.features("in"), rank=3), ins)]
    dense = unit(network, dense, metric)
    errors, cores = sweeps_of(network, dense, cores, metric, 10)
    assert never_rises(errors)
    assert all(torch.isfinite(core).all() for core in cores)


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize("cls", FORMATS)
def test_an_exact_weight_is_recovered(cls):
    network = cls(2, **SPLIT).network(48, 36)
    metric = [factor_of(network, form_of(36, decay=1.0), names_of(network, "in"))]
    planted = [torch.randn(shape, dtype=DTYPE) for shape in network.core_shapes]
    dense = dense_by_hand(network, planted)
    planted = [core / math.sqrt(squared(network, dense, metric)) ** (1 / len(planted)) for core in planted]
    dense = unit(network, dense, metric)
    start = [core + 0.02 * core.abs().mean() * torch.randn_like(core) for core in planted]
    cores, _ = least_squares(network, dense, start, metric=metric, anchored=True, sweeps=3000, tolerance=0.0)
    assert error_of(network, dense, cores, metric) <= 1e-8


def test_low_rank_reaches_the_whitened_svd():
    torch.manual_seed(0)
    network, dense, cores, metric = case(LowRank, (48,), (36,), rank=5)
    form = metric[0].values
    values = torch.linalg.svdvals(dense @ torch.linalg.cholesky(form + 1e-15 * torch.eye(36, dtype=DTYPE)))
    best = float(values[5:].square().sum().sqrt())
    for sweeps, distance in ((30, 1e-4), (300, 1e-6)):
        fitted, error = least_squares(
            network, dense, cores, metric=metric, anchored=True, sweeps=sweeps, tolerance=0.0, ridge=1e-12
        )
        assert best - 1e-9 <= error <= best + distance
        assert error_of(network, dense, fitted, metric) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("cls", FORMATS)
def test_weights_of_rows(cls):
    """As of lookups: a form without couplings."""
    network, dense, cores, _ = case(cls, *SPLIT.values())
    ins = names_of(network, "in")
    frequencies = torch.rand([network.size[name] for name in ins], dtype=DTYPE) ** 4
    metric = [Factor(frequencies, (), ins)]
    dense = unit(network, dense, metric)
    errors, _ = sweeps_of(network, dense, cores, metric, 4)
    assert never_rises(errors)
    as_forms = [Factor(torch.diag(frequencies.flatten()).reshape(frequencies.shape * 2), ins)]
    again, _ = sweeps_of(network, dense, cores, as_forms, 4)
    assert errors == pytest.approx(again, rel=1e-4)


@pytest.mark.parametrize("cls", FORMATS)
def test_a_form_for_each_group(cls):
    network = cls(2, **SPLIT).network(48, 36)
    grouped = Network(
        tuple(("g", *core) for core in network.cores),
        tuple((bond, network.size[bond]) for bond in network.bonds),
        (Mode("g", 3, "group"), *network.modes),
    )
    ins = names_of(network, "in")
    shape = [network.size[name] for name in ins]
    forms = torch.stack([form_of(36) for _ in range(3)])
    metric = [Factor(forms.reshape(3, *shape, *shape), ins, ("g",))]
    dense = unit(grouped, torch.randn(grouped.shape, dtype=DTYPE), metric)
    start = [torch.randn(shape, dtype=DTYPE) for shape in grouped.core_shapes]
    errors, cores = sweeps_of(grouped, dense, start, metric, 3)
    assert never_rises(errors)
    # Each group is a problem of its own.
    total = 0.0
    for g in range(3):
        own = [Factor(forms[g].reshape(*shape, *shape), ins)]
        total += squared(network, dense[g] - dense_by_hand(network, [core[g] for core in cores]), own)
    assert math.sqrt(total) == pytest.approx(errors[-1], abs=1e-9)


modes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(
    st.sampled_from(sorted(available())),
    modes,
    modes,
    st.integers(1, 5),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
)
def test_any_network_and_metric(name, outs, ins, rank, full, gradients, on_outputs):
    format = available()[name](rank, out_modes=tuple(outs), in_modes=tuple(ins))
    try:
        network = format.network(math.prod(outs), math.prod(ins))
    except FormatError:  # without a bond
        assume(False)
    metric = []
    for role in ("in", "out") if on_outputs else ("in",):
        size = network.features(role)
        metric.append(factor_of(network, form_of(size, min(full, size)), names_of(network, role)))
    dense = torch.randn(network.shape, dtype=DTYPE)
    assume(squared(network, dense, metric) > 1e-6)
    dense = unit(network, dense, metric)
    cores = [torch.randn(shape, dtype=DTYPE) for shape in network.core_shapes]
    with pytest.MonkeyPatch.context() as patch:
        if gradients:
            patch.setattr(normal_equations, "_LARGEST", 0)
        errors, _ = sweeps_of(network, dense, cores, metric, 3)
    assert never_rises(errors)
