"""Decomposing: the optimum where it is known, what TensorLy gets wrong, what is refused."""

import itertools
import math

import numpy
import pytest
import torch

from tensorlayers.formats import BTT, CP, TT, LowRank, Tucker
from tensorlayers.testing import EXACT, TOLERANCE, dense_by_hand
from tests.decomposition import FORMATS, MODES_OF, SPLIT, true_error


def tail(weight, rank):
    """The relative error of the best approximation of a rank to a matrix, or to each of a batch of blocks."""
    values = numpy.linalg.svd(weight.double().numpy(), compute_uv=False)
    return math.sqrt((values[..., rank:] ** 2).sum() / (values**2).sum())


def planted(format, shape, dtype=torch.float32):
    """A weight that a format represents exactly."""
    network = format.network(*shape)
    return dense_by_hand(network, [torch.randn(s) for s in network.core_shapes]).reshape(shape).to(dtype)


# Exactness, optimality, the error


@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", FORMATS)
def test_full_rank_is_exact(cls, out_modes, in_modes):
    weight = torch.randn(math.prod(out_modes), math.prod(in_modes))
    decomposition = cls(10**6, out_modes=out_modes, in_modes=in_modes).decompose(weight)
    assert decomposition.error <= EXACT
    assert true_error(decomposition, weight) <= EXACT


@pytest.mark.parametrize("shape", [(17, 23), (31, 36), (48, 13), (1, 1), (1, 7), (7, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("cls", [BTT, CP, TT, Tucker])
def test_full_rank_is_exact_on_primes_and_slivers(cls, order, shape):
    weight = torch.randn(shape)
    assert true_error(cls(10**6, order=order).decompose(weight), weight) <= EXACT


@pytest.mark.parametrize("shape", [(17, 23), (48, 13), (1, 1), (1, 7), (7, 1)], ids=str)
def test_full_rank_low_rank_is_exact(shape):
    weight = torch.randn(shape)
    assert true_error(LowRank(10**6).decompose(weight), weight) <= EXACT


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_the_error_is_the_true_one(cls, dtype):
    # 47 x 35: padding is no part of it. Rounding of the cores to the weight's dtype is.
    weight = torch.randn(47, 35).to(dtype)
    decomposition = cls(5, **SPLIT).decompose(weight)
    allowed = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    assert abs(decomposition.error - true_error(decomposition, weight)) <= allowed
    assert 0.1 < decomposition.error < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_is_the_optimum(dtype):
    weight = torch.randn(48, 36, dtype=dtype)
    for rank in (1, 5, 20):
        assert LowRank(rank).decompose(weight).error == pytest.approx(tail(weight, rank), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 80), (80, 9)], ids=str)
def test_low_rank_of_a_sliver_whose_singular_values_fall_is_the_optimum(shape, dtype):
    (rows, _), (columns, _) = (torch.linalg.qr(torch.randn(size, 9, dtype=torch.float64)) for size in shape)
    weight = ((rows * 10.0 ** -torch.arange(9)) @ columns.T).to(dtype)
    for rank in (1, 3, 9):
        error = LowRank(rank).decompose(weight).error
        assert error == pytest.approx(tail(weight, rank), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tt_of_order_2_is_the_optimum(dtype):
    weight = torch.randn(48, 36, dtype=dtype)
    pairs = weight.reshape(6, 8, 4, 9).permute(0, 2, 1, 3).reshape(24, 72)
    for rank in (1, 5, 20):
        assert TT(rank, **SPLIT).decompose(weight).error == pytest.approx(tail(pairs, rank), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_btt_of_order_2_is_the_optimum_of_every_block(dtype):
    weight = torch.randn(48, 36, dtype=dtype)
    blocks = weight.reshape(6, 8, 4, 9).permute(1, 2, 0, 3)  # o_2, i_1: a batch of o_1 x i_2
    for rank in (1, 3, 5):
        assert BTT(rank, **SPLIT).decompose(weight).error == pytest.approx(tail(blocks, rank), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("cls", [LowRank, TT, BTT])
def test_the_error_never_rises_with_the_rank(cls):
    weight = torch.randn(48, 36)
    errors = [cls(rank, **SPLIT).decompose(weight).error for rank in range(1, 40)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", [LowRank, TT, Tucker, BTT])
def test_planted_weights_are_recovered(cls, out_modes, in_modes):
    format = cls(2, out_modes=out_modes, in_modes=in_modes)
    weight = planted(format, (math.prod(out_modes), math.prod(in_modes)))
    assert true_error(format.decompose(weight), weight) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_planted_cp_weights_are_found(seed):
    # The best fit of a CP rank is NP-hard to find; of random factors of low rank least squares does find it.
    torch.manual_seed(seed)
    format = CP(3, **SPLIT)
    weight = planted(format, (48, 36))
    assert true_error(format.decompose(weight), weight) < 0.01


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("cls", FORMATS)
def test_weights_of_few_entries_are_exact_at_any_rank(cls, rank):
    # Rank one in every format, with most singular values zero.
    ones, spike, row = torch.ones(48, 36), torch.zeros(48, 36), torch.zeros(48, 36)
    spike[5, 7], row[3] = 2.0, -1.0
    for weight in (ones, spike, row):
        assert true_error(cls(rank, **SPLIT).decompose(weight), weight) <= EXACT


# TensorLy's defects


@pytest.mark.parametrize("rank", [9, 100, (100, 8, 4, 9), (6, 8, 4, 100)], ids=str)
def test_tucker_rank_above_the_dimension(rank):
    # TensorLy 0.10 returns garbage (relative error 12) without a word.
    weight = torch.randn(48, 36)
    decomposition = Tucker(rank, **SPLIT).decompose(weight)
    assert decomposition.network.ranks == (6, 8, 4, 9)
    assert true_error(decomposition, weight) <= EXACT


def test_tucker_rank_above_the_product_of_the_others():
    weight = torch.randn(48, 36)
    decomposition = Tucker((6, 1, 1, 2), **SPLIT).decompose(weight)
    assert decomposition.network.ranks == (2, 1, 1, 2)
    assert true_error(decomposition, weight) < 1


@pytest.mark.parametrize("rank", [6 * 8 * 4, 6 * 8 * 4 + 1, 10**4])
def test_cp_rank_above_the_smallest_product(rank):
    # TensorLy 0.10 raises.
    weight = torch.randn(48, 36)
    decomposition = CP(rank, **SPLIT).decompose(weight)
    assert decomposition.network.ranks == (192,)
    assert true_error(decomposition, weight) <= EXACT


@pytest.mark.parametrize("rank", [2, 5, 12, 60, 150])
def test_cp_excess_rank_is_finite(rank):
    # parafac gives NaN in float32 where components are left over.
    weight = planted(CP(1, **SPLIT), (48, 36))
    decomposition = CP(rank, **SPLIT).decompose(weight)
    assert all(bool(torch.isfinite(core).all()) for core in decomposition.cores)
    assert true_error(decomposition, weight) <= 1e-3


@pytest.mark.parametrize("power", [-100, -20, -10, 20, 100])
@pytest.mark.parametrize("cls", FORMATS)
def test_scale_does_not_matter(cls, power):
    # An absolute l2_reg sends weights of 1e-3 to zero; squares of 1e-30 underflow in float32, of 1e30 overflow.
    # 2^10 is about 1e3; powers of 2 change no digit, so that an iteration takes the same course.
    weight, scale = torch.randn(48, 36), 2.0**power
    torch.manual_seed(1)
    plain = cls(5, **SPLIT).decompose(weight)
    torch.manual_seed(1)
    scaled = cls(5, **SPLIT).decompose(weight * scale)
    assert scaled.error == pytest.approx(plain.error, rel=1e-5)
    assert true_error(scaled, weight * scale) == pytest.approx(plain.error, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_half_precision(cls, dtype):
    weight = torch.randn(48, 36).to(dtype)
    decomposition = cls(10**6, **SPLIT).decompose(weight)
    assert all(core.dtype == dtype for core in decomposition.cores)
    assert true_error(decomposition, weight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("cls", FORMATS)
def test_double_precision(cls):
    weight = torch.randn(48, 36, dtype=torch.float64)
    decomposition = cls(10**6, **SPLIT).decompose(weight)
    assert all(core.dtype == torch.float64 for core in decomposition.cores)
    assert true_error(decomposition, weight) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("rank", [5, 12])
@pytest.mark.parametrize("cls", FORMATS)
def test_torch_manual_seed_alone_decides(cls, rank):
    # TensorLy takes a seed of its own, or NumPy's generator.
    weight, runs = torch.randn(48, 36), []
    for seed in (1, 2):
        numpy.random.seed(seed)  # noqa: NPY002
        before = numpy.random.get_state()[1].tolist()  # noqa: NPY002
        torch.manual_seed(0)
        runs.append(cls(rank, **SPLIT).decompose(weight).cores)
        assert numpy.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("rank", [4, 10**6])
@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", FORMATS)
def test_cores_are_balanced(cls, out_modes, in_modes, rank):
    # Unbalanced CP factors (norms 4 to 29) make fine-tuning diverge.
    weight = torch.randn(math.prod(out_modes), math.prod(in_modes))
    decomposition = cls(rank, out_modes=out_modes, in_modes=in_modes).decompose(weight)
    network = decomposition.network
    for bond in network.bonds:
        norms = torch.stack(
            [
                torch.linalg.vector_norm(core.double().movedim(names.index(bond), 0).flatten(1), dim=1)
                for names, core in zip(network.cores, decomposition.cores, strict=True)
                if bond in names
            ]
        )
        assert float(norms.amin()) > 0
        assert float((norms.amax(dim=0) / norms.amin(dim=0)).max()) <= 1.01, bond
