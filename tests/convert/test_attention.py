"""nn.MultiheadAttention in a model: its four projections are layers like any other, and it is put together again."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, formats, testing
from tensorlayers.errors import CheckpointError, ConversionError
from tensorlayers.layers import ProjectedAttention
from tensorlayers.testing import assert_close
from tests.attention import FULL, PARTS, _attention, _convert, _factorized, _inputs
from tests.convert.support import both_ways, every_format


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.attention = _attention(**options)
        self.last = nn.Linear(16, 16)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


NAMES = [f"attention.{part}" for part in PARTS]


@both_ways
@every_format
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "batch_first": True}], ids=str)
def test_to_dense_gives_back_the_module(options, form, inplace):
    source = Net(dtype=torch.float64, dropout=0.1, **options).double().eval()
    before = copy.deepcopy(source.state_dict())
    ours = _convert(source, formats.get(form)(FULL))
    assert isinstance(ours.attention, ProjectedAttention)
    assert [entry.name for entry in tl.summarize(ours)] == ["first", *NAMES, "last"]
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    expected = ours(x)
    dense = tl.to_dense(ours, inplace=inplace)
    assert (dense is ours) is inplace
    assert [type(module) for module in dense.modules()] == [type(module) for module in source.modules()]
    assert list(dense.state_dict()) == list(before)
    for name, value in dense.state_dict().items():
        assert_close(value, before[name], torch.float64, name)
        assert torch.equal(source.state_dict()[name], before[name])
    assert vars(dense.attention).keys() == vars(source.attention).keys()
    assert dense.attention.dropout == 0.1
    assert not dense.attention.training
    assert_close(dense(x), expected, torch.float64)


@both_ways
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 12, "add_bias_kv": True}], ids=str)
def test_one_projection_converted_the_others_are_copies(part, options, inplace):
    source = nn.ModuleDict({"attention": _attention(dtype=torch.float64, **options).train()})
    source.attention.out_proj.bias.requires_grad_(False)
    truth = copy.deepcopy(source)
    packed, kept = source.attention, source.attention.out_proj
    ours = _convert(source, {f"attention.{part}": LowRank(FULL), "*": None}, inplace=inplace)
    assert (ours is source) is inplace
    assert _factorized(ours) == {f"attention.{part}"}
    assert {name for name, _ in ours.attention.named_children()} == set(PARTS)
    inputs = _inputs(ours.attention)
    assert_close(ours.attention(*inputs)[0], truth.attention(*inputs)[0], torch.float64)
    storages = [parameter.untyped_storage().data_ptr() for parameter in ours.parameters()]
    assert len(set(storages)) == len(storages)
    if not inplace:
        assert not {p.untyped_storage().data_ptr() for p in source.parameters()} & set(storages)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in ours.parameters())
    assert (ours.attention.out_proj is kept) is (inplace and part != "out_proj")
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["attention.out_proj.bias"]
    assert type(packed.out_proj) is type(kept)  # who holds the old module holds it whole
    assert torch.equal(packed(*inputs)[0], truth.attention(*inputs)[0])
    again = _convert(ours, LowRank(FULL))  # the rest
    assert _factorized(again) == set(NAMES)
    assert_close(again.attention(*inputs)[0], truth.attention(*inputs)[0], torch.float64)
    dense = tl.to_dense(again)
    assert type(dense.attention) is nn.MultiheadAttention
    assert [name for name, p in dense.named_parameters() if not p.requires_grad] == ["attention.out_proj.bias"]
    assert dense.state_dict().keys() == truth.state_dict().keys()


@both_ways
def test_a_model_that_is_attention_itself(inplace, tmp_path):
    source = _attention(dtype=torch.float64)
    plan = tl.plan_conversion(source, {"re:[qk]_proj": LowRank(2), "*": None})
    assert [entry.name for entry in plan] == PARTS
    assert plan.converted == ("q_proj", "k_proj")
    assert plan.total == sum(parameter.numel() for parameter in source.parameters())
    ours = tl.convert_model(source, plan, inplace=inplace)
    assert type(source) is nn.MultiheadAttention
    assert [entry.name for entry in tl.summarize(ours)] == PARTS
    assert sum(p.numel() for p in ours.parameters()) == plan.parameters[1] == tl.summarize(ours).parameters[1]
    assert tl.summarize(ours).total == plan.total
    assert type(tl.to_dense(ours)) is nn.MultiheadAttention
    tl.save_pretrained(ours, tmp_path)
    loaded, inputs = tl.load_pretrained(tmp_path, source), _inputs(source)
    assert torch.equal(loaded(*inputs)[0], ours(*inputs)[0])


def test_plans_are_edited_and_economical():
    plan = tl.plan_conversion(Net(), LowRank(0.5))
    assert plan.converted == ("first", *NAMES, "last")
    assert {entry.kind for entry in plan} == {"Linear"}
    assert all(0 < entry.error < 1 for entry in plan)
    plan["attention.q_proj"] = None
    plan["attention.v_proj"] = LowRank(3)
    model = Net()
    state = torch.get_rng_state()
    again = tl.ConversionPlan.from_json(plan.to_json())
    ours = tl.convert_model(model, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert _factorized(ours) == {"first", "last", *NAMES[1:]}
    assert ours.attention.v_proj.network.ranks == (3,)
    assert torch.equal(ours.attention.q_proj.weight, model.attention.in_proj_weight[:16])
    with pytest.raises(ConversionError, match=r"'attention\.q_proj'.* not dense any more"):
        tl.convert_model(tl.convert_model(model, {"attention.q_proj": LowRank(2)}), plan)
    with pytest.raises(ConversionError, match="'attention' is a MultiheadAttention"):
        tl.plan_conversion(model, {"attention": LowRank(2)})
    with pytest.warns(UserWarning, match="of 6 layers stay dense"):
        assert type(tl.convert_model(model, LowRank(16)).attention) is nn.MultiheadAttention
    seen = []
    tl.plan_conversion(model, LowRank(2), where=lambda name, module: seen.append((name, type(module).__name__)))
    assert [name for name, _ in seen] == ["first", *NAMES, "last"]
    meta = tl.plan_conversion(Net().to("meta"), LowRank(0.5))
    assert meta.converted == ("first", *NAMES, "last")


@both_ways
def test_hooks_and_modes_are_kept(inplace):
    model, called = Net().eval(), []
    model.attention.train()
    model.attention.out_proj.eval()
    model.attention.register_forward_hook(lambda *_: called.append("attention"))
    model.attention.register_forward_pre_hook(lambda *_: called.append("before"))
    model.attention.out_proj.register_forward_hook(lambda *_: called.append("out"))
    for parameter in (model.attention.in_proj_weight, model.attention.out_proj.bias):
        parameter.requires_grad_(False)
    ours = _convert(model, LowRank(2), inplace=inplace)
    ours(torch.randn(5, 3, 16))
    assert called == ["before", "out", "attention"]
    assert [module.training for module in (ours.attention, *(getattr(ours.attention, p) for p in PARTS))] == [
        *(True, True, True, True, False)
    ]
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    cores = {f"attention.{part}.cores.{k}" for part in PARTS[:3] for k in range(2)}
    assert frozen == cores | {"attention.out_proj.bias"}
    dense = tl.to_dense(ours, inplace=inplace)
    assert {name for name, p in dense.named_parameters() if not p.requires_grad} == {
        *("attention.in_proj_weight", "attention.out_proj.bias")
    }
    dense(torch.randn(5, 3, 16))
    assert called.count("attention") == 2
    assert called.count("before") == 2


@both_ways
def test_shared_attention_and_shared_output_projections(inplace):
    first, second = _attention(), _attention()
    second.out_proj = first.out_proj
    model = nn.ModuleList([first, second, first])
    plan = tl.plan_conversion(model, {"2.q_proj": LowRank(2), "1.out_proj": LowRank(3), "*": None})
    assert [entry.name for entry in plan] == [*(f"0.{part}" for part in PARTS), *(f"1.{part}" for part in PARTS[:3])]
    assert plan.converted == ("0.q_proj", "0.out_proj")
    ours = tl.convert_model(model, plan, inplace=inplace)
    assert [type(module) for module in ours] == [ProjectedAttention] * 3
    assert ours[0] is ours[2]
    assert ours[0].out_proj is ours[1].out_proj
    assert isinstance(ours[0].out_proj, FactorizedLinear)
    assert type(ours[1].q_proj) is nn.Linear
    dense = tl.to_dense(ours, inplace=inplace)
    assert [type(module) for module in dense] == [nn.MultiheadAttention] * 3
    assert dense[0] is dense[2]
    assert dense[0].out_proj is dense[1].out_proj


# What stays packed


class Other(nn.MultiheadAttention):
    pass


def _tied():
    model = nn.ModuleDict({"attention": _attention(), "other": _attention()})
    model.other.in_proj_weight = model.attention.in_proj_weight
    return model


def _changed(change):
    model = nn.ModuleDict({"attention": _attention()})
    change(model.attention)
    return model


def _replace_forward(module):
    module.forward = lambda *args, **kwargs: nn.MultiheadAttention.forward(module, *args, **kwargs)


BLOCKED = {
    "tied": (_tied, "tied with other.in_proj_weight"),
    "parametrized": (lambda: _changed(lambda m: parametrizations.weight_norm(m, "in_proj_weight")), "parametrized"),
    "pruned": (lambda: _changed(lambda m: prune.random_unstructured(m, "in_proj_weight", 0.5)), "parametrized"),
    "a buffer": (lambda: _changed(lambda m: m.register_buffer("extra", torch.ones(2))), "parametrized: it has extra"),
    "a module": (lambda: _changed(lambda m: m.add_module("lora", nn.Identity())), "parametrized: it has lora"),
    "a forward": (lambda: _changed(_replace_forward), "parametrized: MultiheadAttention replaces the forward"),
    "float8": (lambda: _changed(lambda m: m.to(torch.float8_e4m3fn)), "quantized"),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_all_four_projections_are_blocked_together(case):
    build, reason = BLOCKED[case]
    model = build()
    plan = tl.plan_conversion(model, LowRank(2), force=True)
    for name in NAMES:
        assert plan[name].blocked
        assert plan[name].reason.startswith(reason), plan[name].reason
        assert plan[name].shape == (16, 16)
    ours = _convert(model, LowRank(2), inplace=True)
    assert not {name for name in _factorized(ours) if name.startswith("attention")}
    assert type(ours.attention) is type(model.attention)


def test_a_subclass_stays_as_it_is():
    plan = tl.plan_conversion(nn.Sequential(Other(16, 4)), LowRank(2))
    assert {entry.name: entry.reason for entry in plan} == {
        "0.out_proj": "nn.MultiheadAttention reads its weight itself"
    }
    with pytest.raises(ConversionError, match="Other"):
        ProjectedAttention.unpack(Other(16, 4))


@both_ways
def test_what_is_tied_beside_the_packed_weights_stays_tied(inplace):
    model = nn.ModuleDict({"attention": _attention(add_bias_kv=True), "linear": nn.Linear(16, 16)})
    model.linear.weight = model.attention.out_proj.weight
    model.attention.bias_v = model.attention.bias_k
    ours = _convert(model, LowRank(2), inplace=inplace)
    assert _factorized(ours) == set(NAMES[:3])
    assert ours.attention.out_proj.weight is ours.linear.weight
    assert ours.attention.bias_k is ours.attention.bias_v
    dense = tl.to_dense(ours, inplace=inplace)
    assert dense.attention.out_proj.weight is dense.linear.weight
    assert dense.attention.bias_k is dense.attention.bias_v


def test_pack_and_unpack():
    source = _attention(kdim=6, vdim=7, add_zero_attn=True)
    ours = ProjectedAttention.unpack(source)
    assert not {p.data_ptr() for p in source.parameters()} & {p.data_ptr() for p in ours.parameters()}
    packed = ours.pack()
    assert type(packed) is nn.MultiheadAttention
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in packed.state_dict().items())
    ours.q_proj.bias = None
    with pytest.raises(ConversionError, match="have a bias, or none"):
        ours.pack()
    ours.k_proj = nn.Tanh()
    with pytest.raises(ConversionError, match=r"k_proj .* Tanh"):
        ours.pack()


# Saving


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("key", ["*", "attention.k_proj", "first"])
def test_save_and_load(key, options, tmp_path):
    source = Net(**options)
    ours = tl.convert_model(source, {key: LowRank(3)}, force=True).eval()
    tl.save_pretrained(ours, tmp_path)
    x = torch.randn(5, 3, 16)
    for target in (Net(**options), source, ours, Net(**options).to("meta")):
        before = copy.deepcopy(target)
        loaded = tl.load_pretrained(tmp_path, target).eval()
        assert torch.equal(loaded(x), ours(x))
        assert [type(module) for module in loaded.modules()] == [type(module) for module in ours.modules()]
        assert [type(module) for module in target.modules()] == [type(module) for module in before.modules()]
    index = json.loads((tmp_path / "tensorlayers.json").read_text())
    assert index["unpacked"] == ([] if key == "first" else ["attention"])
    assert tl.serialize.inspect(tmp_path).total == sum(parameter.numel() for parameter in source.parameters())


@pytest.mark.parametrize(
    ("unpacked", "named"),
    [
        (["attention", "first"], "'first'; the model has a Linear"),
        (["nowhere"], "'nowhere'; the model has nothing"),
        ([5], "5"),
        ([["attention"]], "attention"),
        ([{}], "{}"),
        ([None], "None"),
        ("attention", "unpacked"),
        (None, "unpacked"),
        ([], "attention.q_proj"),
    ],
    ids=str,
)
def test_a_wrong_list_of_unpacked_modules_is_refused(unpacked, named, tmp_path):
    tl.save_pretrained(_convert(Net(), LowRank(3)), tmp_path)
    path = tmp_path / "tensorlayers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unpacked": unpacked}))
    with pytest.raises(CheckpointError) as caught:
        tl.load_pretrained(tmp_path, Net())
    assert named in str(caught.value)


def test_attention_of_another_shape_is_refused(tmp_path):
    tl.save_pretrained(_convert(Net(), LowRank(3)), tmp_path)
    with pytest.raises(CheckpointError, match=r"'attention.k_proj'.*\(16, 16\).*\(16, 6\)"):
        tl.load_pretrained(tmp_path, Net(kdim=6))
    with pytest.raises(CheckpointError, match=r"'attention.q_proj'.*bias"):
        tl.load_pretrained(tmp_path, Net(bias=False))


def test_the_error_of_each_projection_is_that_of_its_weight():
    source = _attention(dtype=torch.float64)
    ours = _convert(source, LowRank(3))
    for part, weight in zip(PARTS, [*source.in_proj_weight.chunk(3), source.out_proj.weight], strict=True):
        layer = getattr(ours, part)
        error = testing.relative_error(layer.to_dense(), weight)
        assert abs(layer.error - error) <= testing.TOLERANCE[torch.float64]
