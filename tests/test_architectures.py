"""Real architectures, built from a config with random weights: converted, run, trained, saved, loaded and undone."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, formats
from tensorlayers.testing import TOLERANCE, relative_error

AGREE = 1e-4
"""Relative error allowed between the outputs of a model and of its conversion at full rank, in float32."""

FULL = 10**6
MHA = "nn.MultiheadAttention reads its weight itself"


@dataclass(frozen=True)
class Architecture:
    """A model, how it is called, and the two lists: what LowRank(0.5) converts, and what stays dense and why."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], torch.Tensor]
    converted: set[str]
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def hugging_face(self) -> bool:
        return isinstance(self.build(), transformers.PreTrainedModel)


def _ids(rows=2, length=7, vocabulary=100):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def _floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _like(model, values):
    return values.to(next(model.parameters()).dtype)


MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def bert():
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=112,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def vit():
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def transformer():
    return nn.Transformer(64, 4, 2, 2, dim_feedforward=128, dropout=0.0, batch_first=True)


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _call_encoder(model):
    # What stands at padded positions is arbitrary: torch's nested fast path puts zeros there.
    return model(_like(model, _floats(2, 7, 64)), src_key_padding_mask=MASK == 0)[MASK == 1]


def _call_transformer(model):
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    source, target = _like(model, _floats(2, 7, 64)), _like(model, _floats(2, 5, 64))
    return model(source, target, tgt_mask=_like(model, causal), tgt_is_causal=True)


BERT_PARTS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
T5_PARTS = ["q", "k", "v", "o"]

ARCHITECTURES = {
    "bert": Architecture(
        bert,
        lambda model: model(_ids(), attention_mask=MASK).logits,
        {
            f"bert.encoder.layer.{k}.{part}"
            for k in range(2)
            for part in [*BERT_PARTS, "intermediate.dense", "output.dense"]
        }
        | {"cls.predictions.transform.dense"},
        {"cls.predictions.decoder": "tied with bert.embeddings.word_embeddings.weight"},
    ),
    "gpt2": Architecture(
        gpt2,
        lambda model: model(_ids()).logits,
        {
            f"transformer.h.{k}.{part}"
            for k in range(2)
            for part in ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        },
        {"lm_head": "tied with transformer.wte.weight"},
    ),
    "llama": Architecture(
        llama,
        lambda model: model(_ids()).logits,
        {f"model.layers.{k}.self_attn.{part}_proj" for k in range(2) for part in "qkvo"}
        | {f"model.layers.{k}.mlp.{part}_proj" for k in range(2) for part in ["gate", "up", "down"]}
        | {"lm_head"},
    ),
    "vit": Architecture(
        vit,
        lambda model: model(_like(model, _floats(2, 3, 32, 32))).logits,
        {f"vit.layers.{k}.attention.{part}_proj" for k in range(2) for part in "qkvo"}
        | {f"vit.layers.{k}.mlp.{part}" for k in range(2) for part in ["fc1", "fc2"]}
        | {"classifier"},
    ),
    "t5": Architecture(
        t5,
        lambda model: model(_ids(), attention_mask=MASK, decoder_input_ids=_ids(length=5)).logits,
        {f"encoder.block.{k}.layer.0.SelfAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"encoder.block.{k}.layer.1.DenseReluDense.{part}" for k in range(2) for part in ["wi", "wo"]}
        | {f"decoder.block.{k}.layer.0.SelfAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"decoder.block.{k}.layer.1.EncDecAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"decoder.block.{k}.layer.2.DenseReluDense.{part}" for k in range(2) for part in ["wi", "wo"]},
        {"lm_head": "tied with shared.weight, encoder.embed_tokens.weight, decoder.embed_tokens.weight"},
    ),
    "transformer": Architecture(
        transformer,
        _call_transformer,
        {f"{side}.layers.{k}.linear{n}" for side in ["encoder", "decoder"] for k in range(2) for n in [1, 2]},
        {f"encoder.layers.{k}.self_attn.out_proj": MHA for k in range(2)}
        | {f"decoder.layers.{k}.{part}.out_proj": MHA for k in range(2) for part in ["self_attn", "multihead_attn"]},
    ),
    "encoder": Architecture(
        encoder,
        _call_encoder,
        {f"layers.{k}.linear{n}" for k in range(2) for n in [1, 2]},
        {f"layers.{k}.self_attn.out_proj": MHA for k in range(2)},
    ),
}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own encoder


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


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
    assert _factorized(converted) == architecture.converted
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
    assert {entry.name: entry.reason for entry in plan if not entry.converted} == architecture.dense
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays dense for economy: nothing to warn of
        converted = tl.convert_model(model, LowRank(0.5))
    assert _factorized(converted) == architecture.converted
    large = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and min(module.weight.shape) >= 64
    }
    assert large - set(architecture.dense) <= _factorized(converted)
    assert len(large) >= 4


@every_architecture
def test_a_converted_model_runs_backward(name):
    architecture = ARCHITECTURES[name]
    model = tl.convert_model(architecture.build(), LowRank(0.5)).train()
    output = architecture.call(model)
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for layer in (module for module in model.modules() if isinstance(module, FactorizedLinear)):
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
    real = FactorizedLinear.to_dense
    monkeypatch.setattr(FactorizedLinear, "to_dense", lambda layer: built.append(layer) or real(layer))
    for mode in (True, False):
        architecture.call(model.train(mode))
    with torch.no_grad():
        architecture.call(model)
    assert built == []
    next(module for module in model.modules() if isinstance(module, FactorizedLinear)).weight.sum()
    assert len(built) == 1  # the counter does count


@every_architecture
def test_bfloat16(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build().eval()
    truth = architecture.call(model)
    converted = tl.convert_model(model.bfloat16(), LowRank(FULL), force=True)
    assert _factorized(converted) == architecture.converted
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
    assert dtypes == dict.fromkeys([*T5_PARTS, "wi"], dtype) | {"wo": torch.float32}
    output = architecture.call(converted)
    assert relative_error(output, truth) <= TOLERANCE[dtype]
    tl.save_pretrained(converted, tmp_path)
    torch.testing.assert_close(architecture.call(tl.load_pretrained(tmp_path)), output, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation(name, tmp_path):
    model = ARCHITECTURES[name].build().eval()
    converted = tl.convert_model(model, LowRank(FULL), force=True)
    tl.save_pretrained(converted, tmp_path)
    expected = model.generate(_ids(rows=1), max_new_tokens=6, do_sample=False)
    for other in (converted, tl.load_pretrained(tmp_path)):
        assert torch.equal(other.generate(_ids(rows=1), max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("form", formats.available())
def test_a_converted_encoder_layer_compiles_without_a_graph_break(form):
    layer = tl.convert_model(bert().bert.encoder.layer[0], formats.get(form)(4), force=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = _floats(2, 7, 64)
    actual, expected = compiled(x), layer(x)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("converted", ["layers.0", "layers.1"])
def test_one_converted_layer_of_a_padded_encoder(converted):
    """With a padding mask torch's encoder hands nested tensors from layer to layer, if the first layer is plain."""
    model = encoder().eval()
    other = tl.convert_model(model, {rf"re:{converted}\.linear.": LowRank(FULL)}, force=True)
    assert _factorized(other) == {f"{converted}.linear1", f"{converted}.linear2"}
    with torch.no_grad():
        assert relative_error(_call_encoder(other), _call_encoder(model)) <= AGREE
