"""An optimizer that goes over to the converted model: groups mended, state kept or dropped, never stale."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import tensorlayers as tl
from tensorlayers import ConversionError, LowRank, Tucker, convert_model
from tests.convert.support import _named, both_ways

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "AdamW amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "LBFGS": lambda groups: torch.optim.LBFGS([p for group in groups for p in group["params"]], lr=0.1),
}


def net():
    return _named(
        first=nn.Linear(16, 24),
        act=nn.Tanh(),
        second=nn.Linear(24, 16),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, 16),
    )


def groups(model):
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    return [{"params": decayed}, {"params": others}]


def train(model, optimizer, steps=3):
    x, y = torch.randn(32, 16), torch.randn(32, 16)

    def loss():
        optimizer.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        return value

    losses = [float(optimizer.step(loss)) for _ in range(steps)]
    return [*losses, float(loss())]


@pytest.mark.parametrize("name", OPTIMIZERS)
@both_ways
def test_training_goes_on(name, inplace):
    model = net()
    optimizer = OPTIMIZERS[name](groups(model))
    train(model, optimizer)
    formats = {"first": LowRank(4), "second": Tucker(4)}
    converted = convert_model(model, formats, inplace=inplace, optimizer=optimizer, force=True)
    mine = {id(p) for p in converted.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == mine
    assert len(trained) == len(mine)
    assert {id(p) for p in optimizer.state} <= mine
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    losses = train(converted, optimizer, 20)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(value, before[key]) for key, value in converted.state_dict().items())


@both_ways
def test_groups_and_state(inplace):
    model = net()
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.param_groups[1]["weight_decay"] = 0.0
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer)
    schedule.step()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    converted = convert_model(model, {"first": LowRank(4)}, inplace=inplace, optimizer=optimizer, force=True)
    names = {id(p): name for name, p in converted.named_parameters()}
    members = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert members == [
        ["first.cores.0", "first.cores.1", "second.weight", "norm.weight", "head.weight"],
        ["first.bias", "second.bias", "norm.bias", "head.bias"],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in converted.named_parameters():
        if "cores" in name or (name == "first.bias" and inplace and parameter not in optimizer.state):
            assert parameter not in optimizer.state
        else:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
    schedule.step()
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_the_moments_of_a_weight_are_dropped_even_where_a_core_has_its_shape():
    model = _named(layer=nn.Linear(8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    converted = convert_model(model, LowRank(8), force=True, optimizer=optimizer)
    assert [tuple(core.shape) for core in converted.layer.cores] == [(8, 8), (8, 8)]
    assert not any(core in optimizer.state for core in converted.layer.cores)


def test_shared_cores_are_trained_once():
    model = net()
    model.third = nn.Linear(16, 24)
    optimizer = torch.optim.Adam(model.parameters())
    converted = convert_model(model, share={"re:first|third": LowRank(4)}, optimizer=optimizer)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(converted.parameters()))


def test_the_projections_of_attention():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for name, p in model.named_parameters() if "bias" not in name], "weight_decay": 0.1},
            {"params": [p for name, p in model.named_parameters() if "bias" in name]},
        ]
    )
    converted = convert_model(model, LowRank(0.5), optimizer=optimizer)
    names = {id(p): name for name, p in converted.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert members[0] | members[1] == set(names.values())
    assert all("bias" in name for name in members[1])
    assert not any("bias" in name for name in members[0])


def test_each_projection_of_attention_follows_its_own_weight():
    model = nn.MultiheadAttention(16, 4, kdim=8, vdim=12)
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    owners = [name for name, _ in model.named_parameters()]
    converted = convert_model(model, LowRank(4), force=True, optimizer=optimizer)
    names = {id(p): name for name, p in converted.named_parameters()}
    for owner, group in zip(owners, optimizer.param_groups, strict=True):
        cores = {names[id(p)] for p in group["params"] if "cores" in names[id(p)]}
        part = owner.removesuffix("_weight").removesuffix(".weight")
        assert cores == (set() if "bias" in owner else {f"{part}.cores.0", f"{part}.cores.1"})


def _doubled():
    layer = nn.Linear(16, 16)
    parametrize.register_parametrization(layer, "bias", nn.Softplus(), unsafe=True)
    parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True)
    return layer


def _pruned():
    layer = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
    return prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.parametrize("build", [_doubled, _pruned])
@both_ways
def test_weights_and_biases_that_were_computed_stay_in_their_groups(build, inplace):
    model = nn.Sequential(build(), nn.Tanh(), nn.Linear(16, 16))
    named = list(model.named_parameters())
    both = [[p for name, p in named if ("bias" in name) == bias] for bias in (False, True)]
    optimizer = torch.optim.SGD([{"params": group} for group in both], lr=0.1)
    converted = convert_model(model, {"0": LowRank(4)}, fold=True, force=True, optimizer=optimizer, inplace=inplace)
    names = {id(p): name for name, p in converted.named_parameters()}
    assert [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups] == [
        {"0.cores.0", "0.cores.1", "2.weight"},
        {"0.bias", "2.bias"},
    ]


def test_an_optimizer_of_named_parameters_knows_the_new_names():
    model, other = net(), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([*model.named_parameters(), ("other", other)])
    train(model, optimizer)
    converted = convert_model(model, {"first": LowRank(4)}, force=True, optimizer=optimizer)
    names = {id(p): name for name, p in converted.named_parameters()} | {id(other): "other"}
    (group,) = optimizer.param_groups
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    optimizer.load_state_dict(optimizer.state_dict())


def test_what_the_optimizer_does_not_train_it_does_not_train_afterwards():
    model = net()
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model.first.parameters(), other], lr=0.1)
    converted = convert_model(model, {"re:first|second": LowRank(4)}, optimizer=optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*converted.first.parameters(), other]}


def test_a_wrong_optimizer_is_refused_and_nothing_is_changed():
    model = net()
    with pytest.raises(ConversionError, match="none of its parameters are the model's"):
        convert_model(model, LowRank(4), inplace=True, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(ConversionError, match=r"a torch.optim.Optimizer; got dict"):
        convert_model(model, LowRank(4), inplace=True, optimizer={})
    assert not any(isinstance(module, tl.FactorizedLinear) for module in model.modules())
    bad = net()
    optimizer = torch.optim.SGD(bad.parameters(), lr=0.1)
    before = [list(group["params"]) for group in optimizer.param_groups]
    with torch.no_grad():
        bad.head.weight[0, 0] = float("nan")
    with pytest.raises(ConversionError, match="head"):
        convert_model(bad, LowRank(4), inplace=True, optimizer=optimizer, force=True)
    after = [list(group["params"]) for group in optimizer.param_groups]
    assert [[id(p) for p in group] for group in after] == [[id(p) for p in group] for group in before]
