"""What a conversion cost and gained: quality kept on real text, latency, and bytes, dense against converted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import named_output
from .errors import ConversionError

_BATCH = 32


@dataclass(frozen=True)
class Quality:
    """How close a converted model is to its source, on the same texts.

    Parameters
    ----------
    texts : int
        How many were compared.
    error : float
        Relative error of the outputs over all tokens that are not padding, ``||y - y_hat|| / ||y||``.
    similarity : float or None
        Spearman correlation of the pairwise cosine similarities of mean-pooled sentences; None for language models.
    perplexity : tuple of float or None
        Of the source and of the converted language model; None for encoders.
    """

    texts: int
    error: float
    similarity: float | None = None
    perplexity: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = [f"texts: {self.texts}", f"relative output error: {self.error:.4f}"]
        if self.similarity is not None:
            lines.append(f"sentence similarities, Spearman correlation with the source: {self.similarity:.4f}")
        if self.perplexity is not None:
            lines.append(f"perplexity: source {self.perplexity[0]:.3f}, converted {self.perplexity[1]:.3f}")
        return "\n".join(lines)


def quality(dense: nn.Module, converted: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Quality:
    """Compare a converted Hugging Face model with its source on texts, both in evaluation mode.

    Parameters
    ----------
    dense, converted : nn.Module
        Encoders (``last_hidden_state``), causal language models, or others with ``logits``, which are compared by
        `Quality.error` alone.
    tokenizer : transformers tokenizer
    texts : sequence of str
        At least 3 for an encoder.

    Returns
    -------
    Quality

    Raises
    ------
    ConversionError
        If there are too few texts, a model gives neither output, or the two give outputs of different shapes.
    """
    if isinstance(texts, str):
        raise ConversionError(f"texts: a sequence of texts; got one string, {texts[:20]!r}...")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConversionError("texts: at least one that is not empty; got none")
    models = (dense, converted)
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        return _quality(models, tokenizer, texts)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _quality(models: tuple[nn.Module, nn.Module], tokenizer: Any, texts: Sequence[str]) -> Quality:
    causal = type(models[0]).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    difference = norm = 0.0
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    losses, tokens = [0.0, 0.0], 0
    hidden = False
    for inputs in batches_of(tokenizer, texts):
        mask = inputs["attention_mask"].bool()
        outputs = []
        for model in models:
            name, output = _output(model, inputs)
            hidden = name == "last_hidden_state"
            outputs.append(output)
        if outputs[0].shape != outputs[1].shape:
            shapes = f"{tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}"
            raise ConversionError(f"outputs: a model and its source give the same shape; got {shapes}")
        # Logits of a whole text have no tokens to mask.
        wanted = mask if outputs[0].shape[:2] == mask.shape else ...
        difference += float((outputs[0] - outputs[1])[wanted].square().sum())
        norm += float(outputs[0][wanted].square().sum())
        for k, output in enumerate(outputs):
            if causal:
                losses[k] += _loss(output, inputs["input_ids"], mask)
            elif hidden:
                weights = mask[..., None].double()
                pooled[k].append((output * weights).sum(1) / weights.sum(1))
        tokens += int((mask[:, 1:]).sum())
    error = (difference / norm) ** 0.5
    if causal:
        perplexity = [float(torch.tensor(loss / max(tokens, 1)).exp()) for loss in losses]
        return Quality(len(texts), error, perplexity=(perplexity[0], perplexity[1]))
    if not hidden:
        return Quality(len(texts), error)
    if len(texts) < 3:
        raise ConversionError(f"texts: at least 3, so that similarities can be ranked; got {len(texts)}")
    return Quality(len(texts), error, similarity=_rank_correlation(torch.cat(pooled[0]), torch.cat(pooled[1])))


def batches_of(tokenizer: Any, texts: Sequence[str], size: int = _BATCH) -> Iterator[dict[str, Tensor]]:
    """Texts, tokenized and padded, so many at a time, as a model takes them.

    A tokenizer without a padding token pads with its last, and is left as it was.
    """
    for start in range(0, len(texts), size):
        before = tokenizer.pad_token
        try:
            if before is None:
                tokenizer.pad_token = tokenizer.eos_token
            batch = tokenizer(list(texts[start : start + size]), padding=True, truncation=True, return_tensors="pt")
        finally:
            if before is None:
                tokenizer.pad_token = None
        yield dict(batch)


def _output(model: nn.Module, inputs: Any) -> tuple[str, Tensor]:
    """The name of the model's output that is compared, and it in float64 on the CPU."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConversionError(f"{type(model).__name__}: an encoder-decoder has no output for a text alone")
    device = next(model.parameters()).device
    with torch.inference_mode():
        try:
            result = model(**{name: value.to(device) for name, value in inputs.items()})
        except IndexError:
            raise ConversionError(f"{type(model).__name__}: the tokenizer's ids fit the model's vocabulary") from None
    named = named_output(result)
    if named is None:
        raise ConversionError(f"{type(model).__name__}: a model with logits or last_hidden_state can be compared")
    return named[0], named[1].cpu().double()


def _loss(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """The summed negative log likelihood of each next token that is not padding."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return float(loss[mask[:, 1:].flatten()].sum())


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of the pairwise cosine similarities of two sets of embeddings, (sentences, features)."""
    from scipy.stats import spearmanr  # not at import: it takes long

    rows, columns = torch.triu_indices(len(first), len(first), 1)
    similarities = []
    for embeddings in (first, second):
        unit = torch.nn.functional.normalize(embeddings, dim=1)
        similarities.append((unit @ unit.T)[rows, columns].numpy())
    return float(spearmanr(*similarities).statistic)


def latency(runs: Mapping[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """Time several callables in turn, so that their ratios hold on a noisy machine.

    Parameters
    ----------
    runs : mapping of name to callable
    repeats : int
        Timed calls of each, after one warm-up.

    Returns
    -------
    dict of str to float
        Median milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def weight_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
