"""Freezing: torch's own layer with a cached weight, and all that thaws it."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.optimizer import _global_optimizer_post_hooks

import tensorlayers as tl
from tensorlayers import CP, TT, LowRank, NetworkError, Tucker
from tensorlayers.formats import available
from tensorlayers.layers import frozen as freezing
from tensorlayers.layers import layer_types
from tensorlayers.testing import assert_close

LINEAR = {f"linear-{name}": cls(2) for name, cls in sorted(available().items())}

CONVOLUTIONS = {
    "conv1d": (tl.FactorizedConv1d, Tucker(3), (8,)),
    "conv2d": (tl.FactorizedConv2d, CP(3), (5, 6)),
    "conv3d": (tl.FactorizedConv3d, TT(3), (4, 5, 3)),
    "conv_transpose1d": (tl.FactorizedConvTranspose1d, TT(3), (8,)),
    "conv_transpose2d": (tl.FactorizedConvTranspose2d, LowRank(3), (5, 6)),
    "conv_transpose3d": (tl.FactorizedConvTranspose3d, CP(3), (4, 3, 4)),
}

KINDS = sorted(LINEAR) + [cls.kind for cls in layer_types() if cls.kind != "linear"]
OF_EACH_KIND = ["linear-tt", *KINDS[len(LINEAR) :]]
every_kind = pytest.mark.parametrize("kind", KINDS)
each_kind = pytest.mark.parametrize("kind", OF_EACH_KIND)


def build(kind):
    """A small layer, and the arguments of a forward."""
    if kind in LINEAR:
        return tl.FactorizedLinear(12, 10, format=LINEAR[kind]), (torch.randn(4, 12),)
    if kind in CONVOLUTIONS:
        cls, format, spatial = CONVOLUTIONS[kind]
        layer = cls(4, 6, 3, stride=2, padding=1, groups=2, format=format)
        return layer, (torch.randn(2, 4, *spatial),)
    if kind == "embedding":
        return tl.FactorizedEmbedding(20, 12, padding_idx=3, format=TT(3)), (torch.tensor([[0, 3, 19], [4, 4, 3]]),)
    if kind == "embedding_bag":
        weights = torch.randn(2, 3)
        layer = tl.FactorizedEmbeddingBag(20, 12, padding_idx=3, mode="sum", format=TT(3))
        return layer, (torch.tensor([[0, 3, 19], [4, 4, 3]]), None, weights)
    if kind == "regression":
        return tl.TensorRegression((4, 3, 5), (2, 6), format=Tucker(3)), (torch.randn(4, 4, 3, 5),)
    assert kind == "contraction"
    return tl.TensorContraction((4, 3, 5), (2, 6, 3), bias=True), (torch.randn(4, 4, 3, 5),)


def flags(layer):
    return [parameter.requires_grad for parameter in layer.parameters()]


def spoil(layer):
    """Make the cached weight recognizable: NaN in every output that it is used for."""
    freezing._frozen[layer].dense.weight.data.fill_(torch.nan)


def check_thawed(layer, args, expected_flags):
    """The layer computes with its cores as they are now, and trains."""
    assert not layer.frozen
    assert layer.cached_bytes == 0
    assert flags(layer) == expected_flags
    assert_close(layer(*args), copy.deepcopy(layer).to_module()(*args), layer.cores[0].dtype)


# -- a frozen layer -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_input_gradients_are_torchs(kind, training):
    layer, args = build(kind)
    layer.train(training)
    before = layer.eval()(*args)
    layer.train(training).rank_dropout = 0.5
    dense = layer.to_module()
    assert layer.freeze() is layer
    assert layer.frozen
    assert layer.cached_bytes == dense.weight.nbytes
    assert flags(layer) == [False] * len(flags(layer))
    assert_close(layer(*args), before, torch.float32)
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    for arg in wanted:
        arg.requires_grad_()
    ours, truth = layer(*args), dense.requires_grad_(False)(*args)
    assert torch.equal(ours, truth)
    assert ours.requires_grad == bool(wanted)
    if wanted:
        probe = torch.randn_like(ours)
        for mine, theirs in zip(*(torch.autograd.grad(y, wanted, probe) for y in (ours, truth)), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", sorted(available()))
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), st.booleans(), st.sampled_from([1, 2, 0.9, 1.0]))
def test_linear_layers_of_any_shape(name, into, out, rows, bias, rank):
    try:
        layer = tl.FactorizedLinear(into, out, bias, dtype=torch.float64, format=available()[name](rank))
    except tl.RankError:  # a fraction that a small layer has no network for
        return
    x = torch.randn(rows, into, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.freeze()(x), expected, torch.float64)
    assert torch.equal(layer(x), layer.to_module()(x))


@given(st.booleans(), st.sampled_from([1, 2]), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_convolutions_of_any_options(transposed, groups, stride, padding, dilation, bias):
    cls = tl.FactorizedConvTranspose2d if transposed else tl.FactorizedConv2d
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    layer = cls(4, 6, (3, 2), **options, dtype=torch.float64, format=TT(3))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.freeze()(x), expected, torch.float64)
    assert_close(layer(x[0]), expected[0], torch.float64)


def test_an_output_size_is_followed():
    layer = tl.FactorizedConvTranspose1d(4, 6, 3, stride=2, format=LowRank(2))
    x = torch.randn(2, 4, 5)
    expected = layer(x, [12])
    assert_close(layer.freeze()(x, output_size=[12]), expected, torch.float32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_taken_as_before():
    rows = [torch.randn(2, 12), torch.randn(1, 12)]
    layer = tl.FactorizedLinear(12, 10, format=TT(2)).freeze()
    for layout in (torch.strided, torch.jagged):
        nested = layer(torch.nested.nested_tensor(rows, layout=layout))
        assert_close(torch.cat(nested.unbind()), layer(torch.cat(rows)), torch.float32)
    table = torch.randint(0, 20, (3, 5))
    starts, lengths = torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1])
    view = torch.nested.narrow(table, 1, starts, lengths, layout=torch.jagged)  # with holes
    for last in (False, True):
        bag = tl.FactorizedEmbeddingBag(20, 6, mode="sum", include_last_offset=last, format=TT(2))
        expected = bag(view)
        assert_close(bag.freeze()(view), expected, torch.float32)
    embedding = tl.FactorizedEmbedding(20, 6, format=TT(2))
    expected = embedding(view).values()
    assert_close(embedding.freeze()(view).values(), expected, torch.float32)


def test_a_norm_that_is_limited():
    layer = tl.FactorizedEmbedding(20, 6, max_norm=0.5, format=TT(2))
    ids = torch.arange(20)
    expected, weight = layer(ids), layer.to_dense()
    for _ in range(2):
        assert_close(layer.freeze()(ids), expected, torch.float32)
    assert torch.equal(layer.to_dense(), weight)


def test_autocast_is_followed():
    layer, (x,) = build("linear-tt")
    layer.freeze()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, layer.to_module()(x))
    assert y.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_freezing_in_inference_mode_leaves_a_weight_for_training():
    layer, (x,) = build("linear-tt")
    with torch.inference_mode():
        layer.freeze()
        assert torch.equal(layer(x), layer.to_module()(x))
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_wrong_shapes_are_refused_as_before():
    with pytest.raises(NetworkError, match="in_features = 12"):
        build("linear-tt")[0].freeze()(torch.randn(2, 11))


def test_the_bias_is_the_layers_own():
    layer, (x,) = build("linear-tt")
    layer.freeze()
    spoiled = layer(x)
    with torch.no_grad():
        layer.bias += 1
    assert layer.frozen
    assert_close(layer(x), spoiled + 1, torch.float32)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.frozen
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert layer.frozen
    assert_close(layer(x), layer.to_module()(x), torch.float32)


def test_freezing_again_builds_anew():
    layer, (x,) = build("linear-tt")
    before = flags(layer.freeze())
    y = layer(x)
    layer.cores[0].data.mul_(2)  # which torch does not count
    assert torch.equal(layer(x), y)
    layer.freeze()
    assert torch.equal(layer(x), layer.to_module()(x))
    assert flags(layer) == before
    assert all(flags(layer.unfreeze()))


def test_the_cached_weight_is_the_layers_alone():
    layer = tl.TensorContraction((4,), (3,))  # whose one core is the weight
    assert layer.to_module().weight.data_ptr() != layer.cores[0].data_ptr()
    cached = freezing._frozen[layer.freeze()].dense.weight
    assert cached.data_ptr() != layer.cores[0].data_ptr()


def test_a_frozen_layer_can_be_collected():
    layer, _ = build("conv2d")
    layer.freeze()
    watch, count = weakref.ref(freezing._frozen[layer].dense), len(freezing._frozen)
    del layer
    gc.collect()
    assert watch() is None
    assert len(freezing._frozen) < count


def test_what_cannot_be_frozen():
    meta = tl.FactorizedLinear(12, 10, device="meta", format=TT(2))
    with pytest.raises(NetworkError, match=r"freeze: .*meta device"):
        meta.freeze()
    model = nn.Sequential(build("linear-tt")[0], meta)
    with pytest.raises(NetworkError, match=r"layer '1': freeze: .*meta device"):
        tl.freeze(model)
    assert not model[0].frozen
    assert all(flags(model))
    with torch.inference_mode():
        made = tl.FactorizedLinear(12, 10, format=TT(2))
    with pytest.raises(NetworkError, match="inference mode"):
        made.freeze()
    computed, _ = build("linear-tt")
    nn.utils.parametrize.register_parametrization(computed.cores, "0", nn.Identity())
    with pytest.raises(NetworkError, match="parametrization"):
        computed.freeze()


# -- what thaws a layer -------------------------------------------------------------------------------------------


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


# -- where the cached weight is not used --------------------------------------------------------------------------

TRACED = ["linear-tt", "conv2d", "conv_transpose1d", "embedding", "embedding_bag", "regression"]


def compiled(layer, args):
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)(*args)


def exported(layer, args):
    return torch.export.export(layer, args).module()(*args)


def mapped(layer, args):
    return torch.vmap(lambda _: layer(*args))(torch.zeros(1))[0]


def differentiated(layer, args):
    def function(scale):
        y = layer(*args)
        return (y * scale).sum(), y

    return torch.func.grad(function, has_aux=True)(torch.ones(()))[1]


def traced(layer, args):
    return make_fx(layer)(*args)(*args)


WAYS = [compiled, exported, mapped, differentiated, traced]


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_the_cores_are_computed_with_when(way, kind):
    layer, args = build(kind)
    layer.eval()
    expected = layer(*args)
    spoil(layer.freeze())
    assert layer(*args).isnan().any()
    assert_close(way(layer, args), expected, torch.float32)
    assert layer.frozen


@pytest.mark.parametrize("size", [12, 300])  # a small product, and one that is an operator
def test_a_graph_does_not_depend_on_the_frozen_layers_that_are_alive(size):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = tl.FactorizedLinear(size, size, format=TT(2))
    graph = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, size)
    for _ in range(3):
        others = [build("linear-tt")[0].freeze() for _ in range(2)]
        assert_close(graph(x), layer(x), torch.float32)
        del others
        gc.collect()
        assert_close(graph(x), layer(x), torch.float32)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_cores():
    layer, args = build("linear-tt")
    expected = layer(*args)
    spoil(layer.freeze())
    assert_close(torch.jit.trace(layer, args)(*args), expected, torch.float32)


@each_kind
def test_functional_calls_with_other_cores(kind):
    layer, args = build(kind)
    other = build(kind)[0]
    expected = other(*args)
    state = {name: value.detach().requires_grad_() for name, value in other.named_parameters()}
    spoil(layer.freeze())
    y = torch.func.functional_call(layer, state, args)
    assert_close(y, expected, torch.float32)
    gradients = torch.autograd.grad(y.sum(), list(state.values()))
    truth = torch.autograd.grad(expected.sum(), list(other.parameters()))
    for mine, theirs in zip(gradients, truth, strict=True):
        assert_close(mine, theirs, torch.float32)
    assert layer.frozen
    assert layer(*args).isnan().any()


# -- copies and files ---------------------------------------------------------------------------------------------


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


@each_kind
@pytest.mark.parametrize("duplicate", COPIES, ids=[duplicate.__name__ for duplicate in COPIES])
def test_copies_are_not_frozen_and_train_as_before(duplicate, kind):
    layer, args = build(kind)
    layer.cores[0].requires_grad_(False)
    before, expected = flags(layer), layer(*args)
    spoil(layer.freeze())
    other = duplicate(nn.ModuleList([layer]))[0]
    assert_close(other(*args), expected, torch.float32)
    check_thawed(other, args, before)
    assert layer.frozen


def test_a_shallow_copy_shares_the_parameters_as_they_are():
    layer, (x,) = build("linear-tt")
    expected = layer(x)
    spoil(layer.freeze())
    other = copy.copy(layer)
    assert not other.frozen
    assert_close(other(x), expected, torch.float32)
    assert layer.frozen
    assert not any(flags(other))
    layer.unfreeze()
    assert all(flags(other))


def test_states_and_pickles_hold_no_dense_weight():
    layer = tl.FactorizedLinear(64, 64, format=TT(2))
    keys, size = list(layer.state_dict()), len(pickle.dumps(layer))
    modules, tensors = list(layer.modules()), [*layer.parameters(), *layer.buffers()]
    layer.freeze()
    assert list(layer.state_dict()) == keys
    assert list(layer.modules()) == modules
    assert all(a is b for a, b in zip([*layer.parameters(), *layer.buffers()], tensors, strict=True))
    assert len(pickle.dumps(layer)) - size < 100


def test_a_saved_model_is_not_frozen(tmp_path):
    model = nn.Sequential(tl.FactorizedLinear(12, 10, format=TT(2)))
    x = torch.randn(3, 12)
    expected = model(x)
    tl.save_pretrained(tl.freeze(model), tmp_path)
    assert model[0].frozen
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(nn.Linear(12, 10)))
    assert not loaded[0].frozen
    assert_close(loaded(x), expected, torch.float32)


# -- shared cores, whole models -----------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Two layers that share their cores."""
    dense = [nn.Linear(12, 10), nn.Linear(12, 10)]
    return nn.ModuleList(tl.FactorizedLinear.from_dense_jointly(dense, TT(3)))


def check_pair(pair, frozen):
    assert [layer.frozen for layer in pair] == frozen
    assert [core.requires_grad for core in pair[0].cores] == [not any(frozen)] * len(pair[0].cores)
    assert [layer.bias.requires_grad for layer in pair] == [not one for one in frozen]
    x = torch.randn(3, 12)
    for layer in pair:
        assert_close(layer(x), copy.deepcopy(layer).to_module()(x), torch.float32)


def test_shared_cores_train_again_once_the_last_layer_is_thawed(pair):
    for position, frozen in ((0, [True, False]), (1, [True, True])):
        pair[position].freeze()
        check_pair(pair, frozen)
    pair[0].unfreeze()
    check_pair(pair, [False, True])
    pair[0].freeze()
    pair[1].unfreeze()
    check_pair(pair, [True, False])
    assert all(flags(copy.deepcopy(pair)))
    pair[0].unfreeze()
    check_pair(pair, [False, False])


def assign(pair):
    pair.load_state_dict({name: value + 1 for name, value in pair.state_dict().items()}, assign=True)


def step(pair):
    for core in pair[0].cores:
        core.grad = torch.ones_like(core)
    torch.optim.SGD(pair[0].cores.parameters(), lr=0.1, fused=True).step()


def write(pair):
    with torch.no_grad():
        pair[0].cores[0].add_(1)


def convert(pair):
    pair.to(torch.bfloat16).to(torch.float32)


SHARED = [assign, step, write, convert, tl.unfreeze]


@pytest.mark.parametrize("event", SHARED, ids=[event.__name__ for event in SHARED])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_what_changes_shared_cores_thaws_all(pair, event, which):
    for position in which:
        pair[position].freeze()
    event(pair)
    check_pair(pair, [False, False])


def test_a_gradient_wanted_for_shared_cores_stays_wanted(pair):
    pair[0].cores.requires_grad_(False)
    pair[0].freeze()
    pair[0].cores.requires_grad_(True)
    pair[1].freeze()
    check_pair(pair, [True, True])
    tl.unfreeze(pair)
    check_pair(pair, [False, False])


def test_a_layer_in_two_places_is_one_layer():
    layer, (x,) = build("linear-tt")
    second = tl.FactorizedLinear(10, 12, format=TT(2))
    model = nn.Sequential(layer, second, layer)
    expected = model(x)
    assert tl.freeze(model) is model
    assert_close(model(x), expected, torch.float32)
    assert not any(flags(model))
    assert tl.unfreeze(model) is model
    assert all(flags(model))


def test_models_without_a_factorized_layer():
    for function in (tl.freeze, tl.unfreeze):
        with pytest.raises(NetworkError, match="Linear: a factorized layer, or a model with one; it has none"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("model", [3, None], ids=str)
def test_what_is_no_module_is_refused(model):
    for function in (tl.freeze, tl.unfreeze):
        with pytest.raises(NetworkError, match=f"model: an nn.Module; got {type(model).__name__}"):
            function(model)


def test_an_attention_model():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = tl.convert_model(encoder, LowRank(4), force=True)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    assert_close(tl.freeze(model)(x), expected, torch.float32)
    assert model.self_attn.q_proj.frozen
    dense = tl.to_dense(model)
    assert all(flags(dense))
    assert_close(dense(x), expected, torch.float32)


def test_summaries_count_the_cached_weight():
    model = nn.Sequential(tl.FactorizedLinear(64, 64, format=TT(4)), nn.ReLU(), tl.FactorizedLinear(64, 32))
    before = tl.summarize(model)
    model[0].freeze()
    after = tl.summarize(model)
    assert after["0"].parameters == (4096, before["0"].parameters[1] + 4096)
    assert after["0"].macs == (before["0"].macs[0],) * 2
    assert after["2"] == before["2"]
    assert after.parameters == (before.parameters[0], before.parameters[1] + 4096)
    assert "note: frozen" in str(after)
    assert "frozen" in repr(model[0])
    assert "frozen" not in str(before) + repr(model[2])
    assert str(tl.summarize(tl.unfreeze(model))) == str(before)
