"""Learning rates of cores: fan-ins by the Jacobian, steps that change outputs as dense ones do, whole partitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

import tensorlayers as tl
from tensorlayers import CP, TT, FactorizedLinear, LowRank, NetworkError
from tensorlayers.formats import available
from tensorlayers.learning_rates import fan_in, multipliers, parameter_groups
from tests.decomposition import FORMATS, MODES_OF
from tests.ranks.support import FORMATS as FORMATS_OF_ORDERS
from tests.ranks.support import formats

LR = 1e-3
LAYERS = {
    "linear": lambda format: tl.FactorizedLinear(24, 30, format=format),
    "conv": lambda format: tl.FactorizedConv2d(8, 12, 3, format=format),
    "grouped": lambda format: tl.FactorizedConv1d(8, 12, 3, groups=2, format=format),
    "transposed": lambda format: tl.FactorizedConvTranspose1d(8, 12, 3, format=format),
    "embedding": lambda format: tl.FactorizedEmbedding(50, 16, format=format),
    "bag": lambda format: tl.FactorizedEmbeddingBag(50, 16, format=format),
    "regression": lambda format: tl.TensorRegression((4, 5), (6,), format=format),
    "mlp": lambda format: tl.FactorizedMLP(12, 24, format=format),
}


def members(groups):
    return [parameter for group in groups for parameter in group["params"]]


def rates(groups):
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def jacobian_rank(layer, core, *inputs):
    """The rank of the map from a change of a core to the outputs."""
    held = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    jacobian = jacrev(lambda values: functional_call(layer, held | {f"cores.{core}": values}, inputs))
    matrix = jacobian(held[f"cores.{core}"])
    return int(torch.linalg.matrix_rank(matrix.reshape(-1, held[f"cores.{core}"].numel()), rtol=1e-9))


# -- fan-ins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize(("out_modes", "in_modes"), MODES_OF)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_fan_in_is_the_entries_over_the_rank_of_the_jacobian(cls, out_modes, in_modes, rows):
    format = cls(3, out_modes=out_modes, in_modes=in_modes)
    layer = FactorizedLinear(math.prod(in_modes), math.prod(out_modes), dtype=torch.float64, format=format)
    x = torch.randn(rows, layer.in_features, dtype=torch.float64)
    for k, core in enumerate(layer.cores):
        rank = jacobian_rank(layer, k, x)
        assert core.numel() / fan_in(layer.network, k, rows) == pytest.approx(rank)


@pytest.mark.parametrize("cls", FORMATS)
def test_a_fan_in_of_a_convolution_at_one_position(cls):
    layer = tl.FactorizedConv2d(4, 6, 3, groups=2, dtype=torch.float64, format=cls(2))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    for k, core in enumerate(layer.cores):
        assert core.numel() / fan_in(layer.network, k, 1) == pytest.approx(jacobian_rank(layer, k, x))


@pytest.mark.parametrize("cls", FORMATS)
def test_a_fan_in_of_a_lookup_of_one_row(cls):
    layer = tl.FactorizedEmbedding(20, 12, dtype=torch.float64, format=cls(3))
    ids = torch.tensor([7])
    ins = set(layer.network.names("in"))
    for k, (core, names) in enumerate(zip(layer.cores, layer.network.cores, strict=True)):
        entries = core.numel() / math.prod(layer.network.size[name] for name in ins & set(names))
        assert entries / fan_in(layer.network, k, 1, lookup=True) == pytest.approx(jacobian_rank(layer, k, ids))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
def test_a_dense_matrix_has_its_own(out_features, in_features, rows):
    network = tl.Network((("o1", "i1"),), (), tl.network.linear_modes([out_features], [in_features]))
    assert fan_in(network, 0, rows) == pytest.approx(max(in_features / rows, 1))


@given(st.sampled_from(sorted(available())), st.integers(2, 4), st.integers(1, 20), st.integers(1, 64))
def test_fan_ins_are_from_one_to_all_and_fall_with_rows(name, order, rank, rows):
    cls = available()[name]
    network = (cls(rank, order=order) if order in (2, 3, 4) and name != "lowrank" else cls(rank)).network(64, 96)
    for k, shape in enumerate(network.core_shapes):
        several = fan_in(network, k, rows)
        assert 1 <= several * (1 + 1e-9) <= math.prod(shape) * (1 + 2e-9)
        assert several <= fan_in(network, k, 1) * (1 + 1e-9)


# -- steps ------------------------------------------------------------------------------------------------------------


def change(layer, rates, x, dy):
    """How much a step of Adam's size, along the gradient's signs, changes the output, relative to its size."""
    layer.bias.requires_grad_(False)
    y = layer(x)
    y.backward(dy)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter -= rates[id(parameter)] * parameter.grad.sign()
        return float((layer(x) - y).norm() / y.norm())


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("format", FORMATS_OF_ORDERS)
def test_a_step_changes_the_output_as_the_dense_step_does(format, rows, width):
    x, dy = torch.randn(rows, width), torch.randn(rows, width)
    dense = nn.Linear(width, width)
    wanted = change(dense, {id(dense.weight): 1e-5}, x, dy) / 2
    layer = FactorizedLinear(width, width, format=format)
    got = change(layer, rates(parameter_groups(layer, 1e-5, rows=rows)), x, dy)
    # Steps of K cores that have nothing to do with each other, as with many rows, add up to 1 / sqrt(K) of this.
    assert 0.9 / math.sqrt(2 * len(layer.cores)) < got / wanted < 1.6


@pytest.mark.parametrize("cls", FORMATS)
def test_a_converted_layer_takes_steps_of_the_same_size(cls):
    dense = nn.Linear(64, 96)
    with torch.no_grad():  # a weight as training leaves it: a few directions matter most
        dense.weight.copy_((torch.randn(96, 96) * torch.logspace(0, -2, 96)) @ torch.randn(96, 64) / 20)
    x, dy = torch.randn(4, 64), torch.randn(4, 96)
    layer = FactorizedLinear.from_dense(dense, cls(0.5))
    small = parameter_groups(layer, 1e-5, rows=4)
    wanted = change(dense, {id(dense.weight): 1e-5}, x, dy) / 2
    assert 0.25 < change(layer, rates(small), x, dy) / wanted < 2


def losses(width, make, lr, steps=40):
    """The loss of a network of three layers that learns what another one does, with AdamW, at each step."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 16))
    x = torch.randn(256, 16)
    with torch.no_grad():
        y = teacher(x)
        y = y / y.std()
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), make(), nn.ReLU(), make(), nn.ReLU(), nn.Linear(width, 16))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, weight_decay=0.01))
    found = []
    for step in range(steps):
        rows = slice(step % 4 * 64, step % 4 * 64 + 64)
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.fixture(scope="module")
def best():
    """The learning rate that suits the dense network best."""
    ends = {lr: losses(64, lambda: nn.Linear(64, 64), lr)[-1] for lr in (1e-3, 3e-3, 1e-2)}
    return min(ends, key=ends.__getitem__)


@pytest.mark.parametrize("format", list(formats(8)))
def test_a_network_trains_from_scratch_at_the_rate_of_the_dense_one(format, best):
    found = losses(64, lambda: FactorizedLinear(64, 64, format=format), best)
    assert max(found) < 1.2 * found[0]
    assert found[-1] < found[0] / 2


# -- groups -----------------------------------------------------------------------------------------------------------


def check_partition(model, groups):
    wanted = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, members(groups))) == sorted(wanted)
    torch.optim.AdamW(groups)  # which refuses parameters that are in two groups


@given(
    st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.sampled_from(sorted(available()))), min_size=1, max_size=3),
    st.integers(0, 7),
    st.sampled_from([None, 0.0, 0.1]),
    st.sampled_from([1, 16]),
)
def test_every_parameter_is_in_one_group(parts, frozen, weight_decay, rows):
    model = nn.ModuleList([LAYERS[kind](available()[name](2)) for kind, name in parts])
    model.append(nn.LayerNorm(4))
    parameters = list(model.parameters())
    for parameter in parameters[: frozen % len(parameters)]:
        parameter.requires_grad_(False)
    groups = parameter_groups(model, LR, weight_decay=weight_decay, rows=rows)
    check_partition(model, groups)
    keys = [(group["lr"], group.get("weight_decay")) for group in groups]
    assert len(set(keys)) == len(keys)
    cores = {id(core) for layer in model.modules() if hasattr(layer, "cores") for core in layer.cores}
    assert all(rate == LR for key, rate in rates(groups).items() if key not in cores)


def test_dense_models_have_one_rate():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.LayerNorm(4))
    (group,) = parameter_groups(model, LR)
    assert group == {"params": list(model.parameters()), "lr": LR}
    weights, others = parameter_groups(model, LR, weight_decay=0.1)
    assert [p.dim() for p in weights["params"]] == [2, 3, 2]
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0)


@pytest.mark.parametrize("cls", FORMATS)
def test_shared_cores_have_the_rate_of_one_layer(cls):
    dense = [nn.Linear(12, 16) for _ in range(3)]
    model = nn.ModuleList(FactorizedLinear.from_dense_jointly(dense, cls(2)))
    model.append(model[0])
    groups = parameter_groups(model, LR)
    check_partition(model, groups)
    own = dict(zip(map(id, model[0].cores), multipliers(model[0]), strict=True))
    assert {key: rate for key, rate in rates(groups).items() if key in own} == {k: LR * m for k, m in own.items()}


def test_the_product_decays_as_the_dense_weight_does():
    layer = FactorizedLinear(32, 32, bias=False, dtype=torch.float64, format=TT(4, order=3))
    dense = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
    for model in (layer, dense):
        optimizer = torch.optim.AdamW(parameter_groups(model, LR, weight_decay=0.1))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(100):
            optimizer.step()
    torch.testing.assert_close(layer.to_dense(), dense.weight.detach(), rtol=1e-6, atol=0)


def test_rates_follow_the_cores_as_they_are():
    layer = FactorizedLinear(32, 32, format=LowRank(4))
    left, right = multipliers(layer)
    with torch.no_grad():
        layer.cores[0].mul_(4)
        layer.cores[1].mul_(1 / 4)
    assert multipliers(layer) == [4 * left, right / 4]


@pytest.mark.parametrize("values", [torch.zeros_like, lambda core: torch.full_like(core, math.inf)])
def test_cores_without_a_size_have_the_rates_of_a_draw(values):
    layer = FactorizedLinear(32, 32, format=LowRank(4))
    meta = FactorizedLinear(32, 32, format=LowRank(4), device="meta")
    for core in layer.cores:
        core.data = values(core)
    assert multipliers(layer) == multipliers(meta)
    assert multipliers(meta) == pytest.approx(multipliers(FactorizedLinear(32, 32, format=LowRank(4))), rel=0.2)


def test_rates_are_the_same_at_any_scale():
    layer = FactorizedLinear(32, 32, format=CP(4))
    before = multipliers(layer)
    for core in layer.cores:
        core.data *= 1e-30
    assert multipliers(layer) == pytest.approx([m * 1e90 for m in before], rel=0.2)


def test_groups_print_and_keep_names():
    model = nn.Sequential(FactorizedLinear(64, 64, format=LowRank(4)), nn.LayerNorm(64))
    groups = parameter_groups(model, LR, weight_decay=0.1, named=True)
    lines = str(groups).splitlines()
    assert lines[0].split() == ["lr", "x", "weight", "decay", "tensors", "parameters", "names"]
    rest = ["0.bias", "1.weight", "1.bias"]
    assert f"0.001 1 0 3 192 {', '.join(rest)}" in [" ".join(line.split()) for line in lines]
    optimizer = torch.optim.AdamW(groups)
    assert rest in [group["param_names"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: above 0; got 0.0"),
        ({"lr": True}, "lr: a finite number; got True"),
        ({"lr": math.nan}, "lr: a finite number; got nan"),
        ({"weight_decay": -1}, "weight_decay: at least 0; got -1"),
        ({"weight_decay": "0.1"}, "weight_decay: a finite number; got '0.1'"),
        ({"rows": 0}, "rows: an integer of at least 1; got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(NetworkError, match=message):
        parameter_groups(nn.Linear(2, 2), **{"lr": LR, **options})


def test_a_model_without_parameters_to_train_is_refused():
    with pytest.raises(NetworkError, match="Linear: a parameter that requires a gradient; there is none"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), LR)
