"""Real architectures, built from a config with random weights: converted, run, trained, saved, loaded and undone."""

import copy
import warnings

import pytest
import torch

import tensorlayers as tl
from tensorlayers import LowRank, formats
from tensorlayers.layers import FactorizedLayer
from tensorlayers.testing import TOLERANCE, relative_error
from tests.architectures import text, vision
from tests.architectures.support import NOTHING, floats, ids

AGREE = 1e-4
"""Relative error allowed between the outputs of a model and of its conversion at full rank, in float32."""

FULL = 10**6
ARCHITECTURES = {**text.ARCHITECTURES, **vision.ARCHITECTURES}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own encoder


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLayer)}


def _tied(model):
    """The groups of names that are one parameter."""
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _load(architecture, directory):
    return (
        tl.load_pretrained(directory)
        if architecture.hugging_face
        else tl.load_pretrained(directory, _new(architecture))
    )


def _new(architecture):
    torch.manual_seed(99)
    return architecture.build()


@every_architecture
@pytest.mark.parametrize("form", formats.available())
def test_full_rank_conversion_gives_the_same_outputs(name, form):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    converted = tl.convert_model(model, formats.get(form)(FULL), force=True)
    assert _factorized(converted) == architecture.convertible
    assert _factorized(model) == set()
    for mode in (True, False):
        model.train(mode)
        converted.train(mode)
        assert relative_error(architecture.call(converted), architecture.call(model)) <= AGREE
    with torch.no_grad():  # torch's fused paths
        assert relative_error(architecture.call(converted), architecture.call(model)) <= AGREE


@every_architecture
def test_at_half_the_parameters_every_layer_is_converted_but_the_blocked_ones(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    plan = tl.plan_conversion(model, LowRank(0.5), errors=False)
    assert {entry.name for entry in plan if entry.converted} == architecture.converted
    dense = {entry.name: entry.reason for entry in plan if not entry.converted}
    assert dense.keys() == architecture.dense.keys()
    for layer, reason in dense.items():
        assert reason.startswith(architecture.dense[layer])
    uneconomical = any(reason.startswith(NOTHING) for reason in dense.values())
    assert bool(plan.advice) == uneconomical
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = tl.convert_model(model, LowRank(0.5))
    assert [str(w.message).startswith(plan.advice) for w in caught] == [True] * uneconomical
    assert _factorized(converted) == architecture.converted


@pytest.mark.parametrize("name", text.ARCHITECTURES)
def test_no_large_matrix_of_a_transformer_is_missed(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    large = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and min(module.weight.shape) >= 64
    }
    assert large - set(architecture.dense) <= architecture.converted
    assert len(large) >= 4


@every_architecture
def test_a_converted_model_runs_backward(name):
    architecture = ARCHITECTURES[name]
    model = tl.convert_model(architecture.build(), LowRank(0.5)).train()
    output = architecture.call(model)
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for layer in (module for module in model.modules() if isinstance(module, FactorizedLayer)):
        for core in layer.cores:
            assert core.grad is not None
            assert torch.isfinite(core.grad).all()


@every_architecture
def test_save_and_load_give_identical_outputs(name, tmp_path):
    architecture = ARCHITECTURES[name]
    model = tl.convert_model(architecture.build(), LowRank(0.5)).eval()
    tl.save_pretrained(model, tmp_path)
    loaded = _load(architecture, tmp_path).eval()
    assert _factorized(loaded) == architecture.converted
    torch.testing.assert_close(architecture.call(loaded), architecture.call(model), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(architecture.call(loaded), architecture.call(model), rtol=0, atol=0)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@every_architecture
def test_to_dense_undoes_the_conversion(name):
    architecture = ARCHITECTURES[name]
    source = architecture.build()
    model = tl.convert_model(source, LowRank(0.5)).eval()
    dense = tl.to_dense(model)
    assert _factorized(dense) == set()
    assert _factorized(model) == architecture.converted
    assert [type(module) for module in dense.modules()] == [type(module) for module in source.modules()]
    shapes = {key: tuple(value.shape) for key, value in dense.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in source.state_dict().items()}
    assert relative_error(architecture.call(dense), architecture.call(model)) <= AGREE


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_what_is_tied_stays_tied(name, tmp_path):
    architecture = ARCHITECTURES[name]
    source = architecture.build()
    tied = _tied(source)
    assert len(tied) >= 1
    converted = tl.convert_model(source, LowRank(0.5))
    tl.save_pretrained(converted, tmp_path)
    for model in (converted, _load(architecture, tmp_path), tl.to_dense(converted), copy.deepcopy(converted)):
        assert _tied(model) == tied


@every_architecture
def test_a_forward_builds_no_dense_weight(name, monkeypatch):
    """T5 reads wo.weight for its dtype, torch's encoder reads linear1.weight for its fast path, at every forward."""
    architecture = ARCHITECTURES[name]
    model = tl.convert_model(architecture.build(), LowRank(0.5))
    built = []
    real = FactorizedLayer.to_dense
    monkeypatch.setattr(FactorizedLayer, "to_dense", lambda layer: built.append(layer) or real(layer))
    for mode in (True, False):
        architecture.call(model.train(mode))
    with torch.no_grad():
        architecture.call(model)
    assert built == []
    next(module for module in model.modules() if isinstance(module, FactorizedLayer)).weight.sum()
    assert len(built) == 1  # the counter does count


@every_architecture
def test_bfloat16(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build().eval()
    truth = architecture.call(model)
    converted = tl.convert_model(model.bfloat16(), LowRank(FULL), force=True)
    assert _factorized(converted) == architecture.convertible
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    output = architecture.call(converted)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, truth) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_t5_with_wo_in_float32(dtype, tmp_path):
    """As transformers loads T5 in half precision: it casts the input to the dtype of wo.weight."""
    architecture = ARCHITECTURES["t5"]
    model = architecture.build().eval()
    truth = architecture.call(model)
    model.to(dtype)
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    converted = tl.convert_model(model, LowRank(FULL), force=True)
    dtypes = {
        name.rpartition(".")[2]: module.cores[0].dtype
        for name, module in converted.named_modules()
        if name in architecture.converted
    }
    assert dtypes == dict.fromkeys([*text.T5_PARTS, "wi"], dtype) | {"wo": torch.float32}
    output = architecture.call(converted)
    assert relative_error(output, truth) <= TOLERANCE[dtype]
    tl.save_pretrained(converted, tmp_path)
    torch.testing.assert_close(architecture.call(tl.load_pretrained(tmp_path)), output, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation(name, tmp_path):
    model = ARCHITECTURES[name].build().eval()
    converted = tl.convert_model(model, LowRank(FULL), force=True)
    tl.save_pretrained(converted, tmp_path)
    expected = model.generate(ids(rows=1), max_new_tokens=6, do_sample=False)
    for other in (converted, tl.load_pretrained(tmp_path)):
        assert torch.equal(other.generate(ids(rows=1), max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("form", formats.available())
def test_a_converted_encoder_layer_compiles_without_a_graph_break(form):
    layer = tl.convert_model(text.bert().bert.encoder.layer[0], formats.get(form)(4), force=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = floats(2, 7, 64)
    actual, expected = compiled(x), layer(x)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("converted", ["layers.0", "layers.1"])
def test_one_converted_layer_of_a_padded_encoder(converted):
    """With a padding mask torch's encoder hands nested tensors from layer to layer, if the first layer is plain."""
    model = text.encoder().eval()
    other = tl.convert_model(model, {rf"re:{converted}\.linear.": LowRank(FULL)}, force=True)
    assert _factorized(other) == {f"{converted}.linear1", f"{converted}.linear2"}
    with torch.no_grad():
        assert relative_error(text._call_encoder(other), text._call_encoder(model)) <= AGREE


@pytest.mark.parametrize("form", formats.available())
def test_a_recommender_with_factorized_bags(form, tmp_path):
    architecture = ARCHITECTURES["recommender"]
    source = architecture.build()
    full = tl.convert_model(source, {r"re:bags\.\d": formats.get(form)(FULL)}, force=True)
    assert _factorized(full) == {"bags.0", "bags.1", "bags.2"}
    assert relative_error(architecture.call(full), architecture.call(source)) <= AGREE
    model = tl.convert_model(source, {r"re:bags\.\d": formats.get(form)(0.5), "*": LowRank(0.5)})
    assert _factorized(model) == {"bags.0", "bags.1", "bags.2"} | architecture.converted
    architecture.call(model).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    tl.save_pretrained(model, tmp_path)
    assert torch.equal(architecture.call(tl.load_pretrained(tmp_path, _new(architecture))), architecture.call(model))
    assert relative_error(architecture.call(tl.to_dense(model)), architecture.call(model)) <= AGREE


@pytest.mark.parametrize("form", formats.available())
def test_a_weight_normed_convolution_is_folded_on_request(form, tmp_path):
    architecture = ARCHITECTURES["wav2vec2"]
    source = architecture.build().eval()
    full = tl.convert_model(source, formats.get(form)(FULL), force=True, fold=True)
    assert _factorized(full) == architecture.convertible | {"encoder.pos_conv_embed.conv"}
    assert relative_error(architecture.call(full), architecture.call(source)) <= AGREE
    half = tl.convert_model(source, LowRank(0.5), fold=True)
    tl.save_pretrained(half, tmp_path)
    loaded = tl.load_pretrained(tmp_path)
    assert _factorized(loaded) == _factorized(half)
    assert torch.equal(architecture.call(loaded), architecture.call(half))
