"""Transformers over text and images, from a config with random weights."""

import transformers
from torch import nn

from tests.architectures.support import LOOKUP, MASK, Architecture, floats, ids, like

MHA_PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]


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
    return model(like(model, floats(2, 7, 64)), src_key_padding_mask=MASK == 0)[MASK == 1]


def _call_transformer(model):
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    source, target = like(model, floats(2, 7, 64)), like(model, floats(2, 5, 64))
    return model(source, target, tgt_mask=like(model, causal), tgt_is_causal=True)


BERT_PARTS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
T5_PARTS = ["q", "k", "v", "o"]

ARCHITECTURES = {
    "bert": Architecture(
        bert,
        lambda model: model(ids(), attention_mask=MASK).logits,
        {
            f"bert.encoder.layer.{k}.{part}"
            for k in range(2)
            for part in [*BERT_PARTS, "intermediate.dense", "output.dense"]
        }
        | {"cls.predictions.transform.dense"},
        {
            "cls.predictions.decoder": "tied with bert.embeddings.word_embeddings.weight",
            "bert.embeddings.word_embeddings": "tied with cls.predictions.decoder.weight",
            "bert.embeddings.position_embeddings": LOOKUP,
            "bert.embeddings.token_type_embeddings": LOOKUP,
        },
    ),
    "gpt2": Architecture(
        gpt2,
        lambda model: model(ids()).logits,
        {
            f"transformer.h.{k}.{part}"
            for k in range(2)
            for part in ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        },
        {
            "lm_head": "tied with transformer.wte.weight",
            "transformer.wte": "tied with lm_head.weight",
            "transformer.wpe": LOOKUP,
        },
    ),
    "llama": Architecture(
        llama,
        lambda model: model(ids()).logits,
        {f"model.layers.{k}.self_attn.{part}_proj" for k in range(2) for part in "qkvo"}
        | {f"model.layers.{k}.mlp.{part}_proj" for k in range(2) for part in ["gate", "up", "down"]}
        | {"lm_head"},
        {"model.embed_tokens": LOOKUP},
    ),
    "vit": Architecture(
        vit,
        lambda model: model(like(model, floats(2, 3, 32, 32))).logits,
        {f"vit.layers.{k}.attention.{part}_proj" for k in range(2) for part in "qkvo"}
        | {f"vit.layers.{k}.mlp.{part}" for k in range(2) for part in ["fc1", "fc2"]}
        | {"vit.embeddings.patch_embeddings.projection", "classifier"},
    ),
    "t5": Architecture(
        t5,
        lambda model: model(ids(), attention_mask=MASK, decoder_input_ids=ids(length=5)).logits,
        {f"encoder.block.{k}.layer.0.SelfAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"encoder.block.{k}.layer.1.DenseReluDense.{part}" for k in range(2) for part in ["wi", "wo"]}
        | {f"decoder.block.{k}.layer.0.SelfAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"decoder.block.{k}.layer.1.EncDecAttention.{part}" for k in range(2) for part in T5_PARTS}
        | {f"decoder.block.{k}.layer.2.DenseReluDense.{part}" for k in range(2) for part in ["wi", "wo"]},
        {
            "lm_head": "tied with shared.weight, encoder.embed_tokens.weight, decoder.embed_tokens.weight",
            **dict.fromkeys(["shared", "encoder.embed_tokens", "decoder.embed_tokens"], "tied with "),
            **{
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias": LOOKUP
                for side in ["encoder", "decoder"]
            },
        },
    ),
    "transformer": Architecture(
        transformer,
        _call_transformer,
        {f"{side}.layers.{k}.linear{n}" for side in ["encoder", "decoder"] for k in range(2) for n in [1, 2]}
        | {
            f"{side}.layers.{k}.self_attn.{part}"
            for side in ["encoder", "decoder"]
            for k in range(2)
            for part in MHA_PARTS
        }
        | {f"decoder.layers.{k}.multihead_attn.{part}" for k in range(2) for part in MHA_PARTS},
    ),
    "encoder": Architecture(
        encoder,
        _call_encoder,
        {f"layers.{k}.linear{n}" for k in range(2) for n in [1, 2]}
        | {f"layers.{k}.self_attn.{part}" for k in range(2) for part in MHA_PARTS},
    ),
}
