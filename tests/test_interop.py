"""TensorLy-Torch's layers and states, taken over with the same weight. The truth is tltorch's weight in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import (
    ConversionError,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    TensorContraction,
    TensorLinear,
    TensorRegression,
    Tucker,
    from_tltorch,
    load_tltorch_state,
)
from tensorlayers.layers import FactorizedLayer
from tensorlayers.testing import assert_close
from tests.theirs import drawn, their_backend, tltorch  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("their_backend"),
    pytest.mark.filterwarnings("ignore:Given only one int:RuntimeWarning"),
]


def kernel(module):
    """The dense kernel of a convolution: a train has the out channels last."""
    weight, joint = module.weight.to_tensor(), module.n_layers > 1
    return weight.movedim(-1, int(joint)) if type(module.weight).__name__ == "TTTensor" else weight


def matrix(module):
    """The dense matrix of a linear layer or of a table; `to_matrix` of a dense one has the modes."""
    rows, columns = (
        torch.Size([sizes]) if isinstance(sizes, int) else sizes for sizes in module.weight.tensorized_shape[-2:]
    )
    return module.weight.to_tensor().reshape(-1, torch.Size(rows).numel(), torch.Size(columns).numel()).squeeze(0)


def dense(layer):
    return layer.to_dense() if isinstance(layer, FactorizedLayer) else layer.weight


def check_state(ours, theirs):
    """What is read from the state_dict alone, into a layer of the same settings, is the same."""
    if isinstance(ours, FactorizedLayer):
        dtype = ours.cores[0].dtype
        other = type(ours)(**ours.settings_of(ours), format=ours.format, dtype=dtype)
        state = {f"some.layer.{name}": value for name, value in theirs.state_dict().items()}
        load_tltorch_state(other, {**state, "head.bias": torch.zeros(1)}, "some.layer.")
        assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(other.parameters(), ours.parameters()))
        again = type(ours).from_config(ours.config())
        assert again.network == ours.network


modes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)
formats = st.sampled_from(["cp", "tucker", "blocktt", "dense"])
ranks = st.integers(1, 7)  # beyond what is useful, often


@given(modes, formats, ranks, st.booleans())
def test_linear(pairs, factorization, rank, bias):
    into, out = map(tuple, zip(*pairs, strict=True))
    theirs = drawn(tltorch.FactorizedLinear(into, out, bias, factorization=factorization, rank=rank))
    ours = from_tltorch(theirs)
    assert_close(dense(ours), matrix(theirs), torch.float64)
    x = torch.randn(3, theirs.in_features, dtype=torch.float64)
    assert_close(ours(x), F.linear(x, matrix(theirs), theirs.bias), torch.float64)
    check_state(ours, theirs)


@pytest.mark.parametrize("factorization", ["cp", "tucker"])
def test_linear_with_unequal_numbers_of_modes(factorization):
    theirs = drawn(tltorch.FactorizedLinear((12,), (2, 3, 4), factorization=factorization, rank=3))
    ours = from_tltorch(theirs)
    assert (ours.network.mode_sizes("in"), ours.network.mode_sizes("out")) == ((12,), (2, 3, 4))
    assert_close(ours.to_dense(), matrix(theirs), torch.float64)
    check_state(ours, theirs)


@given(modes, formats, ranks)
def test_embedding(pairs, factorization, rank):
    rows, columns = map(tuple, zip(*pairs, strict=True))
    count, width = (int(torch.tensor(sizes).prod()) for sizes in (rows, columns))
    theirs = tltorch.FactorizedEmbedding(
        count,
        width,
        auto_tensorize=False,
        tensorized_num_embeddings=rows,
        tensorized_embedding_dim=columns,
        factorization=factorization,
        rank=rank,
    )
    theirs = drawn(theirs)
    ours = from_tltorch(theirs)
    table = matrix(theirs)
    assert_close(dense(ours), table, torch.float64)
    ids = torch.randint(count, (2, 4))
    assert_close(ours(ids), table[ids], torch.float64)
    check_state(ours, theirs)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt", "dense"])
def test_a_vocabulary_that_is_padded(factorization):
    theirs = drawn(tltorch.FactorizedEmbedding(32, 12, factorization=factorization, rank=3, n_tensorized_modes=2))
    theirs.num_embeddings = 29
    ours = from_tltorch(theirs)
    assert dense(ours).shape == (29, 12)
    assert_close(dense(ours), matrix(theirs)[:29], torch.float64)
    check_state(ours, theirs)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from(["cp", "tucker", "tt", "dense"]),
    st.one_of(ranks, st.lists(ranks, min_size=5, max_size=5)),
    st.booleans(),
    st.booleans(),
    st.tuples(*[st.integers(1, 2)] * 3),
)
def test_convolution(sizes, factorization, rank, spatial, bias, options):
    order = len(sizes)
    if isinstance(rank, list):
        rank = {"tucker": tuple(rank[: order + 2]), "tt": (1, *rank[: order + 1], 1)}.get(factorization, rank[0])
    stride, padding, dilation = options
    theirs = tltorch.FactorizedConv(
        4,
        5,
        tuple(sizes),
        order=order,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=bias,
        factorization=factorization,
        rank=rank,
        fixed_rank_modes="spatial" if spatial and factorization == "tucker" and isinstance(rank, int) else None,
        implementation="reconstructed",
    )
    theirs = drawn(theirs)
    ours = from_tltorch(theirs)
    assert_close(dense(ours), kernel(theirs), torch.float64)
    x = torch.randn(2, 4, *(9,) * order, dtype=torch.float64)
    conv = (F.conv1d, F.conv2d, F.conv3d)[order - 1]
    assert_close(ours(x), conv(x, kernel(theirs), theirs.bias, stride, padding, dilation), torch.float64)
    check_state(ours, theirs)


def test_an_asymmetric_stride_means_what_it_says():
    theirs = drawn(tltorch.FactorizedConv(4, 5, 3, 2, stride=(1, 2), factorization="cp", rank=3))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert_close(from_tltorch(theirs)(x), F.conv2d(x, kernel(theirs), theirs.bias, (1, 2)), torch.float64)


def test_kernels_that_tucker_does_not_compress_stay_whole():
    fixed = tltorch.FactorizedConv(8, 8, 3, 2, factorization="tucker", rank=0.5, fixed_rank_modes="spatial")
    ours = from_tltorch(drawn(fixed))
    assert not ours.format.spatial
    assert len(ours.cores) == 3
    small = tltorch.FactorizedConv(8, 8, 3, 2, factorization="tucker", rank=(4, 4, 3, 2))
    assert from_tltorch(drawn(small)).format == Tucker((4, 4, 3, 2), spatial=True)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt", "dense"])
@pytest.mark.parametrize(("into", "out"), [((6,), (5,)), ((3, 4), (2,)), ((2, 3, 2), (3, 2))], ids=str)
def test_regression(factorization, into, out):
    theirs = drawn(tltorch.TRL(into, out, bias=True, factorization=factorization, rank=3))
    if factorization == "tt" and len(into) > 1:
        with pytest.raises(ConversionError, match="a tensor train of three or more modes has a format in convolutions"):
            from_tltorch(theirs)
        return
    ours = from_tltorch(theirs)
    assert type(ours) is (TensorLinear if factorization == "dense" else TensorRegression)
    x = torch.randn(2, *into, dtype=torch.float64)
    assert_close(ours(x), theirs(x), torch.float64)
    check_state(ours, theirs)


def test_contraction():
    theirs = drawn(tltorch.TCL((3, 4, 5), (2, 6, 3)))
    ours = from_tltorch(theirs)
    assert type(ours) is TensorContraction
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_close(ours(x), theirs(x), torch.float64)
    check_state(ours, theirs)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_only_permuted_is_copied_bit_by_bit(dtype):
    for factorization, axes in (("blocktt", [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2)]), ("tucker", None)):
        theirs = tltorch.FactorizedLinear((4, 4, 4), (4, 4, 4), factorization=factorization, rank=3)
        theirs = drawn(theirs, dtype)
        ours = from_tltorch(theirs)
        values = torch.cat([parameter.detach().flatten().sort()[0] for parameter in ours.cores]).sort()[0]
        factors = [value.flatten() for name, value in theirs.state_dict().items() if name != "bias"]
        assert torch.equal(values, torch.cat(factors).sort()[0])
        assert all(core.dtype == dtype for core in ours.cores)
        if axes:
            squeezed = [theirs.weight.factors[0][0], theirs.weight.factors[1], theirs.weight.factors[2][..., 0]]
            assert all(torch.equal(core, factor) for core, factor in zip(ours.cores, squeezed, strict=True))


@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt"])
def test_ranks_without_use_are_removed_without_loss(factorization, tmp_path):
    theirs = drawn(tltorch.FactorizedLinear((2, 2), (2, 3), factorization=factorization, rank=12))
    ours = from_tltorch(theirs)
    assert all(ours.network.size[bond] == ours.network.rank_limit(bond) for bond in ours.network.bonds)
    assert_close(ours.to_dense(), matrix(theirs), torch.float64)
    assert all(core.requires_grad for core in ours.cores)
    tl.save_pretrained(nn.Sequential(ours), tmp_path)
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(nn.Linear(4, 6, dtype=torch.float64)))
    assert torch.equal(loaded[0].to_dense(), ours.to_dense())


# -- joint layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt", "dense"])
def test_joint_linear_layers(factorization):
    main = drawn(tltorch.FactorizedLinear((3, 4), (6, 2), factorization=factorization, rank=3, n_layers=3))
    weights = matrix(main)
    ours = from_tltorch(main)
    assert isinstance(ours, nn.ModuleList)
    for layer, weight, bias in zip(ours, weights, main.bias, strict=True):
        assert_close(dense(layer), weight, torch.float64)
        assert torch.equal(layer.bias, bias)
    if factorization in ("cp", "tucker"):
        assert ours[0].cores is ours[1].cores
        assert [layer.stack for layer in ours] == [(3, 0), (3, 1), (3, 2)]
        other = FactorizedLinear(12, 12, dtype=torch.float64, format=ours[1].format, stack=(3, 1))
        load_tltorch_state(other, main.state_dict())
        assert torch.equal(other.to_dense(), ours[1].to_dense())
        assert torch.equal(other.bias, ours[1].bias)
    model = nn.Sequential(main[2], nn.Tanh(), main[0], main[2])
    model.main = main
    x = torch.randn(2, 12, dtype=torch.float64)
    copied = from_tltorch(model)
    assert copied[0] is copied[3] is copied.main[2]
    h = torch.tanh(F.linear(x, weights[2], main.bias[2]))
    expected = F.linear(F.linear(h, weights[0], main.bias[0]), weights[2], main.bias[2])
    assert_close(nn.Sequential(*list(copied)[:4])(x), expected, torch.float64)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt"])
def test_joint_convolutions_keep_each_their_options(factorization):
    convs = [nn.Conv2d(4, 5, 3, stride=(1, 1)), nn.Conv2d(4, 5, 3, stride=(2, 2), padding=(1, 1), bias=False)]
    main = tltorch.FactorizedConv.from_conv_list(convs, rank=3, factorization=factorization, decompose_weights=False)
    for position, conv in enumerate(convs):
        main.set(position, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, bias=conv.bias)
    main.has_bias[1] = 0
    main = drawn(main)
    ours = from_tltorch(nn.ModuleList([main[0], main[1]]))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    for layer, conv, weight in zip(ours, convs, kernel(main), strict=True):
        assert type(layer) is FactorizedConv2d
        assert (layer.stride, layer.padding, layer.bias is None) == (conv.stride, conv.padding, conv.bias is None)
        assert_close(layer.to_dense(), weight, torch.float64)
        assert_close(layer(x), F.conv2d(x, weight, layer.bias, layer.stride, layer.padding), torch.float64)


def test_joint_embeddings():
    main = drawn(tltorch.FactorizedEmbedding(12, 8, n_tensorized_modes=2, factorization="blocktt", rank=3, n_layers=2))
    ours = from_tltorch(nn.ModuleList([main.get_embedding(1)]))[0]
    assert type(ours) is FactorizedEmbedding
    assert_close(ours.to_dense(), matrix(main)[1], torch.float64)


def test_joint_layers_that_are_called_with_an_index_are_refused():
    model = nn.ModuleDict({"fc": tltorch.FactorizedLinear((2, 2), (2, 2), rank=2, n_layers=2)})
    with pytest.raises(ConversionError, match=r"layer 'fc': of 2 joint layers a model uses each as main\[k\]"):
        from_tltorch(model)
