"""Whole models of TensorLy-Torch, taken over, and what has no counterpart or does not fit."""

import copy

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import (
    CP,
    TT,
    ConversionError,
    FactorizedConv2d,
    FactorizedLinear,
    from_tltorch,
    load_tltorch_state,
)
from tensorlayers.testing import assert_close
from tests.theirs import drawn, their_backend, tltorch  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("their_backend"),
    pytest.mark.filterwarnings("ignore:Given only one int:RuntimeWarning"),
]


def model_of_theirs():
    return nn.Sequential(
        tltorch.FactorizedConv(3, 4, 3, 2, factorization="tucker", rank=2),
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.ModuleDict({"fc": tltorch.FactorizedLinear((2, 3), (2, 2), factorization="blocktt", rank=2)})["fc"],
    )


def test_a_model_is_copied_and_nothing_is_shared():
    model = drawn(model_of_theirs()).eval()
    model[3].requires_grad_(False)
    model[0].weight.factors[0].requires_grad_(False)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    ours = from_tltorch(model)
    assert [type(m) for m in ours] == [FactorizedConv2d, nn.Flatten, nn.Linear, FactorizedLinear]
    assert not any(m.training for m in ours.modules())
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in ours[3].parameters())
    assert [core.requires_grad for core in ours[0].cores] == [False, True, True, True, True]
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    calls.clear()
    assert_close(ours(x), model(x), torch.float64)
    assert len(calls) == 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert {entry.name for entry in tl.summarize(ours) if entry.converted} == {"0", "3"}


def test_within_no_grad_the_result_is_still_learned():
    with torch.no_grad():
        ours = from_tltorch(tltorch.FactorizedLinear((2, 3), (2, 2), factorization="cp", rank=50))
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_tensor_dropout_is_carried_over_and_tensor_lasso_is_not():
    theirs = tltorch.TRL((6, 5), (4,), factorization="tucker", rank=4)
    tltorch.tensor_dropout(theirs.weight, p=0.25)
    assert from_tltorch(theirs).rank_dropout == 0.25
    theirs = tltorch.TRL((6, 5), (4,), factorization="tucker", rank=4)
    tltorch.tensor_hooks._tensor_lasso.tensor_lasso("Tucker").apply(theirs.weight)
    with pytest.warns(UserWarning, match="Lasso of a TRL is not carried over"):
        from_tltorch(theirs)


class _Doubled(tltorch.FactorizedLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Named(tltorch.FactorizedLinear):
    pass


def linear(cls=tltorch.FactorizedLinear, factorization="cp", **options):
    return cls((2, 3), (2, 2), factorization=factorization, rank=2, **options)


def test_a_subclass_with_the_same_forward_is_taken():
    assert type(from_tltorch(linear(_Named))) is FactorizedLinear


def shared():
    first, second = linear(), linear()
    second.weight = first.weight
    return nn.Sequential(first, second)


def held_elsewhere():
    model = nn.Sequential(linear(), nn.Module())
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "offender"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "a layer of tltorch.*got Sequential"),
        (lambda: nn.Sequential(linear(_Doubled)), "layer '0': _Doubled replaces the forward"),
        (
            lambda: nn.Sequential(linear(factorization="complextucker", dtype=torch.cfloat)),
            "layer '0': weight: real.*ComplexTucker",
        ),
        (lambda: tltorch.FactorizedConv(2, 2, 1, 4, factorization="cp", rank=2), "order 4"),
        (lambda: tltorch.FactorizedConv(2, 2, 3, 2, factorization="cp", rank=2, n_layers=(2, 2)), r"n_layers \(2, 2\)"),
        (shared, "layer '1': a layer with parameters of its own; it shares them with '0'"),
        (held_elsewhere, "layer '0': a layer with parameters of its own; .* with another module"),
    ],
    ids=["none", "forward", "complex", "order", "tuple", "shared", "held"],
)
def test_what_has_no_counterpart_is_refused(model, offender):
    with pytest.raises(ConversionError, match=offender):
        from_tltorch(model())


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("layer", "change", "offender"),
    [
        (FactorizedLinear(6, 4, format=CP(2)), lambda s: without(s, "bias"), "bias: the layer has one"),
        (FactorizedLinear(6, 4, False, format=CP(2)), lambda s: s, "bias: the layer has none"),
        (FactorizedLinear(6, 4, format=CP(2)), lambda s: {**s, "mask": s["bias"]}, "got 'mask'"),
        (FactorizedLinear(6, 4, format=CP(2)), lambda s: {}, "a factorized weight"),
        (FactorizedLinear(6, 4, format=CP(2)), lambda s: without(s, "weight.factors.factor_2"), "factors of 2, 2"),
        (FactorizedLinear(6, 4, format=CP(1)), lambda s: s, "rank r is 1 in the layer; got 2"),
        (FactorizedLinear(6, 4, format=CP(3)), lambda s: s, "rank r is 3 in the layer; got 2"),
        (FactorizedLinear(6, 4, format=CP(2, in_modes=(3, 2))), lambda s: s, "mode i1 has size 3; got 2"),
        (FactorizedLinear(6, 4, format=TT(2)), lambda s: s, "weight: cores"),
        (FactorizedLinear(6, 3, format=CP(2, out_modes=(2, 2))), lambda s: s, r"bias: shape \(3,\); got \(4,\)"),
        (
            FactorizedLinear(6, 4, format=CP(1)),
            lambda s: {k: torch.cat([v] * 30, -1) if "weight" in k else v for k, v in s.items()},
            "rank r is 1 in the layer; got 60",
        ),
        (
            FactorizedLinear(6, 4, format=CP(2)),
            lambda s: {**s, "weight.factors.factor_1": torch.zeros(2, 3)},
            "index r has one size; got 2 and 3",
        ),
    ],
    ids=[
        "no bias",
        "a bias",
        "left over",
        "empty",
        "no factor",
        "rank 1",
        "rank 3",
        "modes",
        "format",
        "padding",
        "excess",
        "two sizes",
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(layer, change, offender):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ConversionError, match=offender):
        load_tltorch_state(layer, change(linear().state_dict()))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
