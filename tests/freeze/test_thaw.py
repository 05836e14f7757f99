"""What thaws a layer: whatever may change its cores."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import tensorlayers as tl
from tensorlayers import TT
from tests.freeze.support import OF_EACH_KIND, build, check_thawed, each_kind, flags


def unfreeze(layer):
    layer.unfreeze()


def load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def load_into_the_parent(layer):
    load(nn.ModuleDict({"child": nn.Sequential(layer)}))


def load_some(layer):
    layer.load_state_dict({"cores.0": layer.cores[0] + 1}, strict=False)


def load_by_assignment(layer):
    state = {name: value + 1 for name, value in layer.state_dict().items()}
    nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)


def load_the_cores(layer):
    layer.cores.load_state_dict({name: value + 1 for name, value in layer.cores.state_dict().items()}, assign=True)


def convert_dtype(layer):
    nn.Sequential(layer).to(torch.bfloat16).to(torch.float32)


def convert_cores(layer):
    layer.cores.bfloat16().float()


def move_nowhere(layer):
    layer.cpu()


def share_memory(layer):
    layer.share_memory()


def reset(layer):
    layer.reset_parameters()


def write_in_place(layer):
    with torch.no_grad():
        layer.cores[-1].mul_(2)


def write_in_inference_mode(layer):
    with torch.inference_mode():
        layer.cores[0].mul_(2)


def write_through_a_view(layer):
    with torch.no_grad():
        layer.cores[0].view(-1)[0] = 7


def set_data(layer):
    layer.cores[0].data = layer.cores[0].data + 1


def set_data_at_the_same_address(layer):
    core = layer.cores[0]
    values = core.data.flatten().clone()
    core.data = torch.empty(0)
    core.data = (values + 1).view(layer.network.core_shapes[0])


def set_strides(layer):
    core = layer.cores[0]
    core.data = core.data.as_strided(core.shape, (0,) * core.dim())


def replace_a_core(layer):
    layer.cores[0] = nn.Parameter(layer.cores[0].data + 1)


def replace_the_cores(layer):
    layer.cores = type(layer.cores)(nn.Parameter(core.data + 1) for core in layer.cores)


def want_gradients(layer):
    layer.requires_grad_(True)


def want_one_gradient(layer):
    layer.cores[0].requires_grad_()


EVENTS = [
    unfreeze,
    load,
    load_into_the_parent,
    load_some,
    load_by_assignment,
    load_the_cores,
    convert_dtype,
    convert_cores,
    move_nowhere,
    share_memory,
    reset,
    write_in_place,
    write_in_inference_mode,
    write_through_a_view,
    set_data,
    set_data_at_the_same_address,
    set_strides,
    replace_a_core,
    replace_the_cores,
    want_gradients,
    want_one_gradient,
]


@each_kind
@pytest.mark.parametrize("event", EVENTS, ids=[event.__name__ for event in EVENTS])
def test_a_layer_is_thawed_by(event, kind):
    layer, args = build(kind)
    before = flags(layer)
    layer.freeze()
    event(layer)
    # These swap parameters where the layer cannot see it: the new ones take over the flag of the frozen ones.
    if event is load_the_cores:
        before[-len(layer.cores) :] = [False] * len(layer.cores)
    check_thawed(layer, args, before)


@each_kind
def test_flags_are_given_back_as_they_were(kind):
    layer, args = build(kind)
    layer.cores[0].requires_grad_(False)
    before = flags(layer)
    for _ in range(2):
        assert not any(flags(layer.freeze()))
    check_thawed(layer.unfreeze(), args, before)


TRUNCATED = [kind for kind in OF_EACH_KIND if kind != "contraction"]


@pytest.mark.parametrize("kind", TRUNCATED)
@pytest.mark.parametrize("of_the_model", [False, True], ids=["method", "function"])
def test_a_layer_is_thawed_by_truncation(kind, of_the_model):
    layer, args = build(kind)
    before = flags(layer)
    layer.freeze()
    (tl.truncate if of_the_model else type(layer).truncate)(layer, 1)
    check_thawed(layer, args, before)


@pytest.mark.parametrize("kind", ["embedding", "embedding_bag"])
def test_a_table_is_thawed_by_its_row_of_padding(kind):
    layer, args = build(kind)
    before = flags(layer)
    layer.freeze().padding_row.fill_(5)
    check_thawed(layer, args, before)
    layer.freeze().padding_row = torch.ones(12)
    check_thawed(layer, args, before)


def test_a_layer_is_thawed_by_another_setting():
    layer, args = build("conv2d")
    before = flags(layer)
    for name, value in {"stride": (1, 1), "padding_mode": "circular"}.items():
        setattr(layer.freeze(), name, value)
        check_thawed(layer, args, before)
    layer.freeze().train().eval()
    assert layer.frozen


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"foreach": False}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-foreach": (torch.optim.SGD, {"foreach": True}),
    "sgd-fused": (torch.optim.SGD, {"fused": True}),
    "adam": (torch.optim.Adam, {"foreach": False}),
    "adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_a_step_that_reaches_a_core_thaws(name, kind):
    cls, options = OPTIMIZERS[name]
    layer, args = build(kind)
    before = flags(layer)
    optimizer = cls(layer.parameters(), lr=0.1, **options)
    layer(*args).square().sum().backward()
    other = tl.FactorizedLinear(12, 10, format=TT(2)).freeze()
    layer.freeze()
    optimizer.step()
    check_thawed(layer, args, before)
    assert other.frozen
    optimizer.zero_grad()
    layer.freeze()
    optimizer.step()  # no gradient: nothing changes
    assert layer.frozen
    assert torch.equal(layer(*args), layer.to_module()(*args))


def test_one_hook_serves_all_layers():
    before = len(_global_optimizer_post_hooks)
    for _ in range(3):
        build("linear-tt")[0].freeze()
    assert len(_global_optimizer_post_hooks) - before <= 1
