"""What bonds cut off, against decompositions by hand; and ranks that are chosen by it."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import BTT, CP, EVBMF, TT, Energy, FactorizedConv2d, FactorizedLinear, LowRank, RelativeError, Tucker
from tensorlayers.errors import DecompositionError, RankError
from tensorlayers.metric import Metric
from tensorlayers.network import linear_axes
from tensorlayers.rules import evbmf_rank
from tensorlayers.spectra import spectra, spend
from tests.decomposition import FORMATS, form_of

SPLIT = {"out_modes": (4, 6), "in_modes": (5, 6)}
AXES = linear_axes(24, 30)


def weight_of(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tails_of(matrix):
    """Of the squared norm, what is lost at each rank."""
    values = torch.linalg.svdvals(matrix).square()
    return [float(values[k:].sum() / values.sum()) for k in range(len(values) + 1)]


@pytest.mark.parametrize(
    ("format", "unfoldings"),
    [
        (LowRank(4), [lambda w: w.reshape(24, 30)]),
        (TT(4, **SPLIT), [lambda w: w.permute(0, 2, 1, 3).reshape(20, 36)]),
        (Tucker(3, **SPLIT), [lambda w, k=k: w.movedim(k, 0).flatten(1) for k in range(4)]),
    ],
    ids=["lowrank", "tt", "tucker"],
)
def test_tails_are_those_of_the_unfoldings(format, unfoldings):
    weight = weight_of(24, 30)
    found = format.spectra(weight, AXES)
    for spectrum, unfold in zip(found.values(), unfoldings, strict=True):
        expected = tails_of(unfold(weight.reshape(4, 6, 5, 6)))
        assert [spectrum.tail(rank) for rank in range(len(expected))] == pytest.approx(expected, abs=1e-9)


def test_modes_on_both_sides_are_a_batch():
    weight = weight_of(24, 30)
    found = BTT(2, **SPLIT).spectra(weight, AXES)["r1"]
    # C1 has i1, i2, o2; C2 has i1, o1, o2: a matrix (o1, i2) for each (o2, i1).
    matrices = weight.reshape(4, 6, 5, 6).permute(1, 2, 0, 3).reshape(-1, 4, 6)
    shares = matrices.square().sum((1, 2)) / matrices.square().sum()
    expected = (shares[:, None] * torch.tensor([tails_of(one) for one in matrices], dtype=torch.float64)).sum(0)
    assert [found.tail(rank) for rank in range(5)] == pytest.approx(expected.tolist(), abs=1e-9)


def test_hyperedges_and_loops_have_none():
    assert CP(4, **SPLIT).spectra(weight_of(24, 30), AXES) == {}


@pytest.mark.parametrize("cls", [LowRank, TT])
def test_the_tail_of_one_bond_is_the_error_of_a_fit_in_a_metric(cls):
    """Exactly so for a matrix, and for modes that a Kronecker product weighs one by one; else no fit is worse."""
    coupled = Metric(form_of(30), form_of(24))
    product = Metric(torch.kron(form_of(5), form_of(6)), torch.kron(form_of(4), form_of(6)))
    weight = weight_of(24, 30)
    format = cls(5) if cls is LowRank else cls(5, **SPLIT)
    for metric in (coupled, product):
        (spectrum,) = format.spectra(weight, AXES, metric).values()
        lost = spectrum.tail(5) / spectrum.tail(0)
        found = format.decompose(weight, AXES, metric).output_error ** 2
        if cls is LowRank or metric is product:
            assert found == pytest.approx(lost, rel=1e-5)
        else:
            assert found < lost


def test_what_is_kept_makes_good_for_what_is_dropped():
    """A mode whose values hardly vary independently costs little to drop, however much each of them varies."""
    shared = torch.ones(6, 6, dtype=torch.float64) + 1e-4 * torch.eye(6, dtype=torch.float64)
    metric = Metric(torch.kron(form_of(5), shared) + 1e-6 * torch.eye(30, dtype=torch.float64))
    weight = weight_of(24, 30)
    found = Tucker(2, **SPLIT).spectra(weight, AXES, metric)["r_i2"]
    assert found.tail(1) / found.tail(0) < 1e-2
    exact = Tucker((4, 6, 5, 1), **SPLIT).decompose(weight, AXES, metric).output_error ** 2
    assert found.tail(1) / found.tail(0) >= 0.99 * exact


def test_tails_of_a_coupled_mode_bound_the_error():
    metric = Metric(form_of(30))
    weight = weight_of(24, 30)
    found = Tucker(2, **SPLIT).spectra(weight, AXES, metric)["r_i2"]
    for rank in range(1, 6):
        error = Tucker((4, 6, 5, rank), **SPLIT).decompose(weight, AXES, metric).output_error ** 2
        assert error <= found.tail(rank) / found.tail(0) * 1.001


# Spending


@given(st.integers(60, 700))
def test_as_many_parameters_as_there_are(parameters):
    torch.manual_seed(0)
    largest = Tucker(100, **SPLIT).network(24, 30)
    measured = spectra(weight_of(4, 6, 5, 6), largest)
    found = spend(largest, measured, parameters)
    assert found.num_parameters <= parameters
    for k, bond in enumerate(found.bonds):
        more = found.with_ranks([rank + (j == k) for j, rank in enumerate(found.ranks)])
        assert more.num_parameters > parameters or more.size[bond] > min(largest.size[bond], found.rank_limit(bond))


def test_little_more_is_lost_than_by_the_best_ranks():
    torch.manual_seed(0)
    largest = Tucker(100, **SPLIT).network(24, 30)
    for _ in range(5):
        weight = weight_of(4, 6, 5, 6) * torch.logspace(0, -2, 6)[:, None, None] * torch.logspace(0, -1, 5)[:, None]
        measured = spectra(weight, largest)

        def lost(ranks, measured=measured):
            return sum(one.tail(rank) for one, rank in zip(measured.values(), ranks, strict=True))

        every = [largest.with_ranks(ranks) for ranks in itertools.product(*(range(1, n + 1) for n in largest.ranks))]
        for parameters in (150, 300, 450):
            best = min(lost(some.ranks) for some in every if some.num_parameters <= parameters)
            assert lost(spend(largest, measured, parameters).ranks) <= 1.25 * best


def test_too_few_or_unmeasured():
    largest = Tucker(100, **SPLIT).network(24, 30)
    measured = spectra(weight_of(4, 6, 5, 6), largest)
    assert spend(largest, measured, 10) is None
    assert spend(largest, {}, 300) is None


def test_a_fraction_is_spent_where_data_need_it():
    """Outputs that no data reach need no rank; the parameters stay within the fraction."""
    torch.manual_seed(0)
    weight = weight_of(24, 30)
    inputs = torch.kron(torch.eye(5, dtype=torch.float64), form_of(6, rank=2, decay=0.1))
    metric = Metric(inputs + 1e-8 * torch.eye(30, dtype=torch.float64))
    format = Tucker(0.4, **SPLIT)
    plain, spent = format.resolve(AXES)[0], format.chosen(weight, AXES, metric)
    assert spent.resolve(AXES)[0].num_parameters <= 0.4 * 720
    assert spent.rank[3] <= 3
    errors = [one.decompose(weight, AXES, metric).output_error for one in (format.pin(plain), spent)]
    assert errors[1] < 0.6 * errors[0]
    assert format.chosen(weight, AXES) is format
    assert Tucker(3, **SPLIT).chosen(weight, AXES, metric).rank == 3


# Rules


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("error", [0.3, 0.7])
def test_errors_are_never_above_what_was_asked(cls, error):
    format = cls(RelativeError(error), **SPLIT)
    weight = weight_of(24, 30)
    if cls is CP:
        with pytest.raises(RankError, match="bonds that alone join two halves of the network; r does not"):
            format.decompose(weight, AXES)
        return
    found = format.decompose(weight, AXES)
    assert found.error <= error
    energy = cls(Energy(1 - error**2), **SPLIT).decompose(weight, AXES)
    assert energy.network == found.network


def test_the_lowest_rank_that_keeps_the_energy():
    weight = weight_of(24, 30)
    tails = tails_of(weight)
    for share in (0.5, 0.9, 1.0):
        (rank,) = LowRank(Energy(share)).decompose(weight).network.ranks
        assert tails[rank] <= 1 - share + 1e-9
        assert tails[rank - 1] > 1 - share


def test_in_a_metric_the_error_is_that_of_the_outputs():
    metric = Metric(form_of(30, decay=6))
    found = LowRank(RelativeError(0.1)).decompose(weight_of(24, 30), AXES, metric)
    assert found.output_error <= 0.1 < found.error
    assert LowRank(EVBMF()).chosen(weight_of(24, 30), AXES, metric).rank == (1,)


@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 200), (100, 130)])
@pytest.mark.parametrize("rank", [0, 1, 7, 15])
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_evbmf_recovers_the_rank(rows, columns, rank, noise):
    signal = weight_of(rows, rank) @ weight_of(rank, columns)
    matrix = signal + noise * weight_of(rows, columns)
    assert evbmf_rank(torch.linalg.svdvals(matrix).square(), rows, columns) == rank
    found = LowRank(EVBMF()).decompose(matrix).network.ranks
    assert found == (max(rank, 1),)
    assert LowRank(EVBMF()).decompose(1e-6 * matrix.T.contiguous()).network.ranks == found


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4, 100, 3), (10, 10, 4), (3, 100, 2), (1, 5, 0)])
def test_evbmf_finds_the_largest_rank_there_can_be(rows, columns, rank):
    """Of a few values all but noise stand out: at most ceil(L / (1 + L / M)) - 1 of them."""
    energies = torch.full((rows,), 1e-6, dtype=torch.float64)
    energies[:rank] = 100.0
    assert evbmf_rank(energies, rows, columns) == rank


def test_evbmf_is_the_global_minimum_of_its_free_energy():
    """Against the free energy of every rank and variance on a grid, written down from the theorem."""
    rows, columns, rank = 30, 50, 4
    matrix = weight_of(rows, rank) @ weight_of(rank, columns) + weight_of(rows, columns)
    energies = torch.linalg.svdvals(matrix).square().tolist()
    ratio = rows / columns
    floor = 2.5129 * math.sqrt(ratio)

    def cost(variance):
        total, kept = rows * columns * math.log(variance) + sum(energies) / variance, 0
        for energy in energies:
            x = energy / (columns * variance)
            if x > (1 + floor) * (1 + ratio / floor):
                tau = (x - 1 - ratio + math.sqrt((x - 1 - ratio) ** 2 - 4 * ratio)) / 2
                gain = columns * math.log(tau + 1) + rows * math.log(tau / ratio + 1) - columns * tau
                total, kept = total + gain, kept + (gain < 0)
        return total, kept

    grid = torch.logspace(-1, 1, 400).tolist()
    assert evbmf_rank(torch.tensor(energies), rows, columns) == min(map(cost, grid))[1]


def test_evbmf_of_a_convolution():
    """As Kim et al. use it: by the unfoldings of the output and of the input channels."""
    factors = [weight_of(32, 5), weight_of(24, 3)]
    kernel = torch.einsum("or,is,rshw->oihw", *factors, weight_of(5, 3, 3, 3)) + 1e-2 * weight_of(32, 24, 3, 3)
    conv = torch.nn.Conv2d(24, 32, 3, dtype=torch.float64)
    conv.weight.data = kernel
    assert FactorizedConv2d.from_dense(conv, Tucker(EVBMF())).network.ranks == (5, 3)


def test_weaker_keeps_some_of_the_noise():
    matrix = weight_of(40, 5) @ weight_of(5, 60) + 0.1 * weight_of(40, 60)
    assert LowRank(EVBMF(0.8)).chosen(matrix, linear_axes(40, 60)).rank == (5 + 7,)


def test_a_rule_needs_a_weight():
    with pytest.raises(RankError, match=r"rank Energy\(share=0.9\): a weight to choose it by"):
        FactorizedLinear(8, 8, format=LowRank(Energy(0.9)))
    with pytest.raises(DecompositionError, match="every entry is finite; 1 are NaN or infinite"):
        LowRank(Energy(0.9)).decompose(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("make", [Energy, RelativeError, EVBMF])
@pytest.mark.parametrize("value", [0, -0.5, 1.5, True, "all", math.nan])
def test_bad_shares_are_refused(make, value):
    with pytest.raises(RankError, match="a number above 0 and at most 1; got"):
        make(value)


def test_a_layer_without_energy_keeps_one():
    assert LowRank(Energy(0.5)).decompose(torch.zeros(6, 8)).network.ranks == (1,)
    assert LowRank(EVBMF()).decompose(torch.zeros(6, 8)).network.ranks == (1,)
