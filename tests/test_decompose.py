"""Decomposing: the optimum where it is known, what TensorLy gets wrong, what is refused."""

import itertools
import math

import numpy
import pytest
import tensorly
import tensorly.decomposition
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorlayers import contraction, decompose, testing
from tensorlayers.errors import DecompositionError
from tensorlayers.formats import BTT, CP, TT, LowRank, Tucker, available
from tensorlayers.testing import EXACT, TOLERANCE, dense_by_hand

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]

MODES = {
    "2": ((6, 8), (4, 9)),
    "3": ((3, 4, 4), (4, 3, 3)),
    "4": ((2, 3, 2, 4), (3, 2, 2, 3)),
    "2x1": ((6, 8), (36,)),
    "1x2": ((48,), (4, 9)),
    "3x2": ((3, 4, 4), (4, 9)),
    "2x3": ((6, 8), (4, 3, 3)),
    "odd": ((5, 7), (3, 11)),
}
MODES_OF = [pytest.param(*modes, id=name) for name, modes in MODES.items()]
SPLIT = {"out_modes": (6, 8), "in_modes": (4, 9)}


def dense_of(decomposition, weight):
    """The dense weight of a decomposition in float64, by hand, padding cut off."""
    network = decomposition.network
    dense = dense_by_hand(network, decomposition.cores).reshape(network.features("out"), network.features("in"))
    return dense[: weight.shape[0], : weight.shape[1]]


def true_error(decomposition, weight):
    return testing.relative_error(dense_of(decomposition, weight), weight)


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


def degenerate(rotation_seed=None):
    """a a b + a b a + b a a: of CP rank 3, yet a limit of tensors of rank 2, whose components grow without bound."""
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    tensor = sum(torch.einsum("i,j,k->ijk", *vectors) for vectors in ((a, a, b), (a, b, a), (b, a, a)))
    if rotation_seed is not None:
        torch.manual_seed(rotation_seed)
        turns = [torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0] for _ in range(3)]
        tensor = torch.einsum("ijk,ai,bj,ck->abc", tensor, *turns)
    return tensor.reshape(4, 16)


def component_norm(cores):
    """The root of the sum of the squared norms of the components."""
    return float(torch.stack([torch.linalg.vector_norm(core.double(), dim=0) for core in cores]).prod(dim=0).norm())


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_cp_components_are_bounded(seed, rank):
    weight = degenerate(seed)
    decomposition = CP(rank, out_modes=(4,), in_modes=(4, 4)).decompose(weight)
    assert component_norm(decomposition.cores) <= 3.0 * float(weight.norm()) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [6, 30, 100])
def test_cp_components_of_noise_are_bounded(rank):
    weight = torch.randn(48, 36)
    assert component_norm(CP(rank, **SPLIT).decompose(weight).cores) <= 3.0 * float(weight.norm()) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_cp_is_no_worse_than_its_best_single_component(seed, rank):
    # Of the degenerate tensor (norm sqrt 3) the best single component explains 4 / 9.
    weight = degenerate(seed)
    error = true_error(CP(rank, out_modes=(4,), in_modes=(4, 4)).decompose(weight), weight)
    assert error <= math.sqrt(5) / 3 + 1e-3


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
def test_cp_of_the_identity_is_no_worse_than_its_best_single_component(rank):
    # The unfoldings' singular vectors are not unique here, and a start from them may be orthogonal to the weight.
    weight = torch.eye(16)
    error = true_error(CP(rank).decompose(weight), weight)
    assert error <= math.sqrt(15 / 16) + 1e-3


@pytest.mark.parametrize("rank", [2, 4, 6, 16])
def test_cp_explains_what_parafac_explains(rank):
    # Compressing to the rank first (where the modes are larger) must not cost the fit. Local optima differ: the mean.
    ours, theirs = 0.0, 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        weight = torch.randn(64, 64)
        tensor = weight.reshape(8, 8, 8, 8).double().numpy()
        fit = tensorly.decomposition.parafac(tensor, rank, init="random", n_iter_max=100, random_state=seed)
        theirs += 1 - (numpy.linalg.norm(tensorly.cp_to_tensor(fit) - tensor) / numpy.linalg.norm(tensor)) ** 2
        ours += 1 - true_error(CP(rank).decompose(weight), weight) ** 2
    assert ours >= 0.9 * theirs


def test_the_backend_of_tensorly_stays_as_it_is():
    assert tensorly.get_backend() == "numpy"
    inside = []

    class Spy(Tucker):
        def fill(self, dense, network):
            cores = super().fill(dense, network)
            inside.append(tensorly.get_backend())
            return cores

    Spy(3, **SPLIT).decompose(torch.randn(48, 36))
    CP(3, **SPLIT).decompose(torch.randn(48, 36))
    assert inside == ["numpy"]
    assert tensorly.get_backend() == "numpy"


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("rank", [4, 40, 10**6])
@pytest.mark.parametrize(("out_modes", "in_modes"), [((8, 8), (8, 8)), ((2, 8), (2, 128))])
@pytest.mark.parametrize("cls", FORMATS)
def test_memory_is_that_of_the_weight_and_the_cores(cls, out_modes, in_modes, rank):
    # tltorch #32: terabytes for one Conv3d. The Khatri-Rao product of all modes but one is 5 times this weight at rank
    # 40, the full SVD of one unfolding 64 times. (That of half the modes is needed to form the dense weight of a CP.)
    weight = torch.randn(math.prod(out_modes), math.prod(in_modes))
    format = cls(rank, out_modes=out_modes, in_modes=in_modes)
    with Largest() as largest:
        decomposition = format.decompose(weight)
    dense = contraction.dense_plan(decomposition.network)
    parts = (weight.numel(), dense.largest, *(core.numel() for core in decomposition.cores))
    assert largest.elements <= 2 * max(parts)


# Least squares


@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("cls", FORMATS)
def test_least_squares_never_rises(cls, out_modes, in_modes):
    network = cls(3, out_modes=out_modes, in_modes=in_modes).network(math.prod(out_modes), math.prod(in_modes))
    dense = torch.randn(network.shape, dtype=torch.float64)
    dense = dense / dense.norm()
    cores = [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]
    errors = []
    for _ in range(6):
        cores, error = decompose.least_squares(network, dense, cores, sweeps=1)
        truth = testing.relative_error(dense_by_hand(network, cores), dense)
        assert error == pytest.approx(truth, abs=1e-6)
        errors.append(truth)
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1


@pytest.mark.parametrize("cls", FORMATS)
def test_least_squares_keeps_an_exact_fit(cls):
    network = cls(2, **SPLIT).network(48, 36)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]
    dense = dense_by_hand(network, cores)
    fitted, error = decompose.least_squares(network, dense / dense.norm(), cores)
    assert error <= 1e-6
    testing.assert_close(contraction.to_dense(network, fitted), dense / dense.norm(), torch.float32)


@pytest.mark.parametrize("cls", FORMATS)
def test_balance_leaves_the_dense_weight(cls):
    network = cls(3, out_modes=(3, 4, 4), in_modes=(4, 3, 3)).network(48, 36)
    cores = [torch.randn(shape, dtype=torch.float64) * 10.0**k for k, shape in enumerate(network.core_shapes)]
    balanced = decompose.balance(network, cores)
    testing.assert_close(dense_by_hand(network, balanced), dense_by_hand(network, cores), torch.float64)
    norms = [float(core.norm()) for core in balanced]
    assert max(norms) <= 1.5 * min(norms)


# The weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), r"weight \(1, 2\): every entry is finite; 1 are NaN or infinite"),
        (torch.tensor([[math.inf, -math.inf]]), r"weight \(1, 2\): every entry is finite; 2 are NaN or infinite"),
        (torch.full((2, 2), math.nan, dtype=torch.float16), r"weight \(2, 2\): every entry is finite; 4 are"),
        (torch.zeros(0, 3), r"weight \(0, 3\): a non-empty matrix"),
        (torch.zeros(3, 0), r"weight \(3, 0\): a non-empty matrix"),
        (torch.zeros(3), r"weight \(3,\): a non-empty matrix"),
        (torch.zeros(2, 2, 2), r"weight \(2, 2, 2\): a non-empty matrix"),
        (torch.tensor(1.0), r"weight \(\): a non-empty matrix"),
        (torch.ones(2, 2, dtype=torch.int64), r"weight: a floating-point dtype; got torch.int64"),
        (torch.ones(2, 2, dtype=torch.bool), r"weight: a floating-point dtype; got torch.bool"),
        (torch.ones(2, 2, dtype=torch.complex64), r"weight: a floating-point dtype; got torch.complex64"),
        (torch.ones(2, 2, device="meta"), r"weight: it is on the meta device"),
    ],
    ids=["nan", "inf", "nan16", "no rows", "no columns", "1-d", "3-d", "0-d", "int", "bool", "complex", "meta"],
)
@pytest.mark.parametrize("cls", FORMATS)
def test_weights_are_refused(cls, weight, message):
    with pytest.raises(DecompositionError, match=message):
        cls(1).decompose(weight)


def test_decomposition_error_is_a_value_error():
    assert issubclass(DecompositionError, ValueError)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_a_zero_weight_is_zero_and_can_learn(cls, dtype):
    weight = torch.zeros(48, 36, dtype=dtype)
    decomposition = cls(3, **SPLIT).decompose(weight)
    assert decomposition.error == 0
    assert not dense_of(decomposition, weight).any()
    cores = [core.requires_grad_() for core in decomposition.cores]
    assert all(core.dtype == dtype for core in cores)
    dense = contraction.to_dense(decomposition.network, cores)
    gradients = torch.autograd.grad(dense, cores, torch.randn_like(dense))
    assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("cls", FORMATS)
def test_strides_do_not_matter(cls):
    weight = torch.randn(48, 36)
    for strided in (weight.T.contiguous().T, torch.stack([weight, -weight], dim=2)[..., 0], weight.T[:, ::2]):
        assert not strided.is_contiguous()
        exact = cls(10**6).decompose(strided)
        assert true_error(exact, strided) <= EXACT
        assert all(core.is_contiguous() for core in exact.cores)
        decomposition = cls(4).decompose(strided)
        assert decomposition.error == pytest.approx(true_error(decomposition, strided), abs=1e-5)


@pytest.mark.parametrize("rank", [3, 10**6])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_the_source_is_neither_changed_nor_aliased(cls, dtype, rank):
    weight = torch.randn(48, 36).to(dtype)
    kept = weight.clone()
    decomposition = cls(rank, **SPLIT).decompose(weight)
    assert torch.equal(weight, kept)
    storages = {core.untyped_storage().data_ptr() for core in decomposition.cores}
    assert len(storages) == len(decomposition.cores)
    assert weight.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("rank", [3, 10**6])
@pytest.mark.parametrize("cls", FORMATS)
def test_no_gradient_is_recorded(cls, rank):
    weight = torch.nn.Parameter(torch.randn(48, 36))
    for source in (weight, weight * 2):
        cores = cls(rank, **SPLIT).decompose(source).cores
        assert not any(core.requires_grad or isinstance(core, torch.nn.Parameter) for core in cores)
    assert weight.grad is None


@pytest.mark.parametrize("cls", FORMATS)
def test_decomposing_under_inference_and_no_grad(cls):
    weight = torch.randn(48, 36)
    torch.manual_seed(0)
    plain = cls(3, **SPLIT).decompose(weight).error
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            assert cls(3, **SPLIT).decompose(weight).error == pytest.approx(plain, rel=1e-5)
