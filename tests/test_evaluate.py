"""Quality: what is compared, and in which mode; latency in turn."""

import pytest
import torch
import transformers

from tensorlayers import ConversionError, LowRank, convert_model, evaluate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "file", "is", "read", "written", "not", "when"]
TEXTS = ["the file is read", "a file is written", "not a file", "when is the file read"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return transformers.BertTokenizer(str(path))


def bert(kind):
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    return getattr(transformers, kind)(config)


def test_a_model_is_itself_also_in_training_mode(tokenizer):
    model = bert("BertModel").train()
    result = evaluate.quality(model, model, tokenizer, TEXTS)
    assert result.error == 0
    assert result.similarity == pytest.approx(1)
    assert model.training


def test_a_converted_encoder_loses_something(tokenizer):
    model = bert("BertModel")
    result = evaluate.quality(model, convert_model(model, LowRank(0.25)), tokenizer, TEXTS)
    assert 0 < result.error < 1
    assert "Spearman" in str(result)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification", "BertForSequenceClassification"])
def test_other_models_are_compared_by_their_logits_alone(tokenizer, kind):
    model = bert(kind)
    converted = convert_model(model, {r"re:bert\.encoder\..*": LowRank(0.25)})
    result = evaluate.quality(model, converted, tokenizer, TEXTS)
    assert result.error > 0
    assert result.perplexity is None
    assert result.similarity is None


def test_a_language_model_has_a_perplexity_and_the_tokenizer_is_left_alone(tokenizer):
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    result = evaluate.quality(model, model, tokenizer, TEXTS)
    assert result.perplexity[0] == result.perplexity[1] > 1
    assert tokenizer.pad_token == "[PAD]"


def test_what_cannot_be_compared_is_refused(tokenizer):
    model = bert("BertModel")
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=64, d_ff=64, num_layers=1, num_heads=2, d_kv=32)
    other = transformers.T5Model(config)
    for pair, texts, message in [
        ((model, model), "a b c", "one string"),
        ((model, model), ["  "], "at least one"),
        ((model, model), TEXTS[:2], "at least 3"),
        ((other, other), TEXTS, "encoder-decoder"),
        ((model, bert("BertForMaskedLM")), TEXTS, "same shape"),
    ]:
        with pytest.raises(ConversionError, match=message):
            evaluate.quality(*pair, tokenizer, texts)


def test_latency_runs_all_in_turn():
    order = []
    times = evaluate.latency({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == list("ab" * 4)
    assert set(times) == {"a", "b"}
    assert all(isinstance(value, float) and torch.tensor(value) >= 0 for value in times.values())
