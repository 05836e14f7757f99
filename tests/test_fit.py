"""Fitting the cores: bounded components, the backend left alone, memory, least squares."""

import itertools
import math

import numpy
import pytest
import tensorly
import tensorly.decomposition
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensorlayers import als, contraction, decompose, testing
from tensorlayers.errors import DecompositionError
from tensorlayers.formats import CP, Tucker
from tensorlayers.testing import EXACT, TOLERANCE, dense_by_hand
from tests.decomposition import FORMATS, MODES_OF, SPLIT, dense_of, true_error


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
        found = tensorly.decomposition.parafac(tensor, rank, init="random", n_iter_max=100, random_state=seed)
        theirs += 1 - (numpy.linalg.norm(tensorly.cp_to_tensor(found) - tensor) / numpy.linalg.norm(tensor)) ** 2
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
        cores, error = als.least_squares(network, dense, cores, sweeps=1)
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
    fitted, error = als.least_squares(network, dense / dense.norm(), cores)
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
