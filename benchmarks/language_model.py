"""A small language model of Python, trained here: the standard library's sources, split by module.

The tokenizer is a byte-level BPE trained on the same text. Training draws random windows of the modules for
calibration; perplexity is that of fixed windows of the modules for tests. The batch of a step depends on the seed and
the step alone, so a training that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tensorlayers.files import replaced
from tensorlayers.texts import sources

END = "<|endoftext|>"
"""Stands between two modules."""


@dataclass(frozen=True)
class Settings:
    """Of a training; a batch is `batch` windows of `window` tokens."""

    hidden: int = 256
    inner: int = 704
    layers: int = 6
    heads: int = 8
    vocabulary: int = 2048
    window: int = 128
    batch: int = 16
    tokens: int = 3_500_000
    rate: float = 2e-3
    decay: float = 0.1
    warm_up: int = 100
    seed: int = 0
    modules: int | None = None
    """Of each part, the first so many; by default all."""

    @property
    def steps(self) -> int:
        return max(self.tokens // (self.batch * self.window), 1)


def tokenizer_of(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on some texts."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, bos_token=END)


def stream(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All texts as one sequence of ids, END after each, (tokens,)."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([id for ids in encoded for id in (*ids, tokenizer.eos_token_id)])


@cache
def modules_of(part: str, count: int | None) -> tuple[str, ...]:
    """The sources of a part of the standard library."""
    return tuple(sources(part)[:count])


def streams(tokenizer: Any, modules: int | None = None) -> tuple[Tensor, Tensor]:
    """The ids of the modules for calibration and training, and of those for tests."""
    seen, held = (stream(tokenizer, modules_of(part, modules)) for part in ("calibration", "test"))
    return seen, held


def windows(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Random windows of a sequence of ids, (count, length)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


def network(settings: Settings) -> LlamaForCausalLM:
    """A transformer with the embedding tied to the head."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.window,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def matrices(model: nn.Module) -> list[str]:
    """Names of the linear layers of the blocks."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layers." in name]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of each next token, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, batch: int = 32) -> float:
    """Of the next tokens of windows, (windows, tokens)."""
    mode = model.training
    model.eval()
    total = sum(float(loss_of(model, some)) * len(some) for some in ids.split(batch))
    model.train(mode)
    return math.exp(total / len(ids))


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def cosine(step: int, steps: int, warm_up: int) -> float:
    """The share of the largest learning rate: a linear warm-up, then half a cosine to zero."""
    warm_up = min(warm_up, max(steps // 10, 1))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def train(out: Path, settings: Settings, every: int = 150, test_windows: int = 512) -> dict[str, Any]:
    """Train in the directory `out`, from where an earlier training there stopped; what training.json says."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(out, settings)
    seen, held = streams(tokenizer, settings.modules)
    fixed = windows(held, test_windows, settings.window, settings.seed)
    torch.manual_seed(settings.seed)
    model = network(settings).train()
    optimizer = torch.optim.AdamW(groups(model, settings.decay), lr=settings.rate, betas=(0.9, 0.95), fused=True)
    checkpoint = out / "training.pt"
    done: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["settings"] != asdict(settings):
            raise SystemExit(f"{out}: a training with other settings; choose another directory")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    start, before, losses = time.perf_counter(), done["seconds"], []
    bar = tqdm(range(done["step"], settings.steps), initial=done["step"], total=settings.steps, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * cosine(step, settings.steps, settings.warm_up)
        loss = loss_of(model, windows(seen, settings.batch, settings.window, settings.seed + 1 + step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            tokens = (step + 1) * settings.batch * settings.window
            point = {
                "tokens": tokens,
                "training": sum(losses) / len(losses),
                "held_out": math.log(perplexity(model, fixed[:96])),
            }
            losses.clear()
            done["curve"].append(point)
            done |= {"step": step + 1, "seconds": before + time.perf_counter() - start}
            bar.set_postfix(training=f"{point['training']:.3f}", held_out=f"{point['held_out']:.3f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
            with replaced(checkpoint) as part:
                torch.save(state | {"settings": asdict(settings)}, part)
            (out / "curve.json").write_text(json.dumps(done["curve"], indent=1) + "\n", encoding="utf-8")
    model.eval().save_pretrained(out)
    summary = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "in_matrices": sum(model.get_submodule(name).weight.numel() for name in matrices(model)),
        "training_ids": len(seen),
        "test_ids": len(held),
        "perplexity": perplexity(model, fixed),
        "seconds": done["seconds"],
        "curve": done["curve"],
    }
    write(out / "training.json", **summary)
    return summary


def _tokenizer(out: Path, settings: Settings) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, trained if there is none."""
    if not (out / "tokenizer.json").exists():
        tokenizer_of(modules_of("calibration", settings.modules), settings.vocabulary).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def load(directory: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Settings]:
    """A trained model, its tokenizer and how it was trained."""
    if not (directory / "training.json").exists():
        raise SystemExit(f"{directory}: no trained model; python benchmarks/language.py train --out {directory}")
    settings = json.loads((directory / "training.json").read_text(encoding="utf-8"))["settings"]
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(directory), Settings(**settings)
