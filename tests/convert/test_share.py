"""Joint factorization: like-shaped layers as one tensor, their cores shared."""

import copy

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import CP, TT, ConversionError, LowRank, Tucker, convert_model, plan_conversion, summarize
from tensorlayers.testing import EXACT, assert_close, relative_error
from tests.convert.support import _named, every_format

PARTS = r"re:blocks\.\d+\.(?:query|key|value)"
BLOCKWISE = r"re:blocks\.(\d+)\.(?:query|key|value)"


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def x():
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


def shared(model):
    return {name: module for name, module in model.named_modules() if getattr(module, "stack", None)}


@every_format
@pytest.mark.parametrize("key", [PARTS, BLOCKWISE], ids=["all", "a block"])
def test_full_rank_keeps_the_outputs(form, key):
    model = Net()
    converted = convert_model(model, share={key: tl.formats.get(form)(10**6)}, force=True)
    layers = shared(converted)
    assert len(layers) == 6
    count = 6 if key == PARTS else 3
    assert {layer.stack for layer in layers.values()} == {(count, k) for k in range(count)}
    assert len({id(layer.cores[0]) for layer in layers.values()}) == 6 // count
    assert relative_error(converted(x()), model(x())) <= EXACT


@every_format
def test_gradients_are_those_of_the_dense_layers(form):
    torch.manual_seed(0)
    model = convert_model(Net().double(), share={PARTS: tl.formats.get(form)(4)}, force=True)
    dense = tl.to_dense(model)
    dense_gradients = torch.autograd.grad(dense(x().double()).square().sum(), list(dense.parameters()))
    by_name = dict(zip((name for name, _ in dense.named_parameters()), dense_gradients, strict=True))
    model(x().double()).square().sum().backward()
    cores = next(iter(shared(model).values())).cores
    # The gradient of the shared cores: through every dense weight, by the dense network's gradients.
    weights = [layer.to_dense() for layer in shared(model).values()]
    expected = torch.autograd.grad(weights, list(cores), [by_name[f"{name}.weight"] for name in shared(model)])
    for core, truth in zip(cores, expected, strict=True):
        assert_close(core.grad, truth, torch.float64)


def test_parameters_are_counted_once():
    model = Net()
    plan = plan_conversion(model, share={PARTS: Tucker(0.3)})
    converted = convert_model(model, plan)
    network = next(iter(shared(converted).values())).network
    assert network.num_parameters <= 0.3 * 6 * 24 * 24
    assert sum(entry.parameters[1] for entry in plan if entry.converted) == network.num_parameters
    assert plan.parameters == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in converted.parameters()),
    )
    assert summarize(converted).parameters == plan.parameters
    assert [entry.error for entry in plan if entry.converted] == [layer.error for layer in shared(converted).values()]


def test_saved_and_loaded_the_cores_stay_shared(tmp_path):
    converted = convert_model(Net(), LowRank(0.5), share={BLOCKWISE: TT(4)})
    tl.save_pretrained(converted, tmp_path)
    loaded = tl.load_pretrained(tmp_path, Net())
    assert torch.equal(loaded(x()), converted(x()))
    assert {name: layer.stack for name, layer in shared(loaded).items()} == {
        name: layer.stack for name, layer in shared(converted).items()
    }
    for model in (loaded, copy.deepcopy(converted), convert_model(Net(), LowRank(0.5), share={BLOCKWISE: TT(4)})):
        assert len({id(core) for layer in shared(model).values() for core in layer.cores}) == 2 * len(
            shared(model)["blocks.0.query"].cores
        )
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in converted.parameters())


def test_a_plan_is_edited_and_written_for_the_whole_group():
    model = Net()
    plan = plan_conversion(model, share={PARTS: Tucker(0.3)}, errors=False)
    again = tl.ConversionPlan.from_json(plan.to_json())
    assert [(entry.stack, entry.share) for entry in again] == [(entry.stack, entry.share) for entry in plan]
    assert "1 of 6" in str(plan)
    plan["blocks.0.key"] = CP(8)
    assert {entry.format for entry in plan if entry.share} == {CP(8)}
    assert len(shared(convert_model(model, plan))) == 6
    plan["blocks.1.value"] = None
    assert not plan.converted
    broken = tl.ConversionPlan([entry for entry in again if entry.name != "blocks.0.key"], again.total)
    with pytest.raises(ConversionError, match="in order"):
        convert_model(model, broken)


def test_share_goes_before_formats():
    converted = convert_model(Net(), LowRank(0.5), share={PARTS: Tucker(0.3)})
    assert type(converted.blocks[0].out) is tl.FactorizedLinear
    assert converted.blocks[0].out.stack is None
    assert isinstance(converted.blocks[0].query.format, Tucker)


def test_economy():
    plan = plan_conversion(Net(), share={PARTS: LowRank(24)}, errors=False)
    assert not plan.converted
    assert {entry.reason.split(":")[0] for entry in plan} == {"nothing saved", "no key matches"}
    kept = plan_conversion(Net(), share={PARTS: Tucker(0.3)}, where=lambda name, _: "value" not in name, errors=False)
    assert {entry.stack[0] for entry in kept if entry.converted} == {4}


def test_embeddings_and_convolutions_are_shared_too():
    model = _named(a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1))
    converted = convert_model(model, share={"re:[ab]": Tucker(10**6)}, force=True)
    images = torch.randn(2, 4, 6, 6)
    assert_close(converted(images), model(images), torch.float32)
    tables = nn.ModuleDict({"a": nn.Embedding(30, 8), "b": nn.Embedding(30, 8)})
    converted = convert_model(tables, share={"re:[ab]": TT(10**6)}, force=True)
    ids = torch.arange(30)
    for name, table in tables.items():
        assert_close(converted[name](ids), table(ids), torch.float32)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({r"re:blocks\.0\.query": Tucker(2)}, "at least two layers; got 'blocks.0.query' alone"),
        ({r"re:nothing": Tucker(2)}, "at least two layers that can be factorized; got none"),
        ({"blocks.0.query": Tucker(2)}, "a key is 're:' and a pattern"),
        ({PARTS: None}, "its value a format; got None"),
        ({"re:(": Tucker(2)}, "not a regular expression"),
        ({PARTS: Tucker(2), r"re:.*\.query": Tucker(2)}, "is in 're:blocks"),
        ({r"re:blocks\.0\.(?:query|out)|wide": Tucker(2)}, "'wide' is unlike 'blocks.0.query'"),
        ({r"re:blocks\.0\.query|half": Tucker(2)}, "'half' differs from 'blocks.0.query'"),
        ({r"re:blocks\.0\.query|frozen": Tucker(2)}, "all weights are frozen or none; 'frozen' differs"),
        ({r"re:blocks\.0\.query|lazy": Tucker(2)}, "'lazy' cannot be converted: lazy"),
        ([PARTS], "share: a mapping"),
    ],
)
def test_bad_requests_are_refused(share, message):
    model = Net()
    model.wide = nn.Linear(24, 48)
    model.half = nn.Linear(24, 24).bfloat16()
    model.frozen = nn.Linear(24, 24).requires_grad_(False)
    model.lazy = nn.LazyLinear(24)
    with pytest.raises(ConversionError, match=message):
        convert_model(model, share=share)


def test_nothing_asked_for():
    with pytest.raises(ConversionError, match="formats: a format"):
        convert_model(Net())
