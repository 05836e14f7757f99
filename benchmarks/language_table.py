"""The trained language model with a part of its matrices' parameters removed: held-out perplexity by each method.

Rows are written as they are computed, and those that are there are not computed again.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write
from language_model import Settings, cosine, groups, load, matrices, network, perplexity, streams, windows
from torch import Tensor, nn
from tqdm import tqdm

from tensorlayers import Budget, Calibration, LowRank, collect, convert_model, heal, plan_conversion

LINEAR = r"re:model\.layers\.\d+\..*_proj"
"""The linear layers of the blocks; the embedding, which is the head, stays."""


@dataclass(frozen=True)
class Choices:
    """How the table is computed.

    Parameters
    ----------
    removed : tuple of float
        Of the parameters of the matrices.
    calibration, test : int
        Windows of text.
    minutes : float
        Of healing, and of distilling a smaller network.
    batches : int
        Of training text, as in training, to heal on; more than there is time for.
    rate : float
        Of healing, relative to the size of each parameter.
    distilling_rate : float
    """

    removed: tuple[float, ...] = (0.2, 0.4, 0.6)
    calibration: int = 128
    test: int = 512
    minutes: float = 2.0
    batches: int = 300
    rate: float = 0.003
    distilling_rate: float = 2e-3
    seed: int = 0


class Study:
    """A trained model, its text, and what each method makes of it."""

    def __init__(self, directory: Path, choices: Choices) -> None:
        self.choices = choices
        self.dense, tokenizer, self.settings = load(directory)
        self.seen, held = streams(tokenizer, self.settings.modules)
        self.test = windows(held, choices.test, self.settings.window, choices.seed)
        ids = windows(self.seen, choices.calibration, self.settings.window, choices.seed + 1)
        self.batches = [{"input_ids": some} for some in ids.split(16)]
        self.named = set(matrices(self.dense))

    @cached_property
    def inputs(self) -> Calibration:
        """Moments of the inputs alone."""
        return collect(self.dense, self.batches, where=self._is_matrix, gradients=0)

    @cached_property
    def calibration(self) -> Calibration:
        """Moments of the inputs and of the gradients of the outputs."""
        return collect(self.dense, self.batches, where=self._is_matrix, gradients=4)

    def _is_matrix(self, name: str, module: nn.Module) -> bool:
        return name in self.named

    def plain(self, share: float) -> nn.Module:
        return convert_model(self.dense, {LINEAR: LowRank(share)}, force=True)

    def whitened(self, share: float) -> nn.Module:
        return convert_model(self.dense, {LINEAR: LowRank(share)}, force=True, calibration=self.inputs)

    def sequential(self, share: float) -> nn.Module:
        data = {"calibration": self.calibration, "batches": self.batches}
        return convert_model(self.dense, {LINEAR: LowRank(share)}, force=True, **data)

    @cache  # noqa: B019 - healed too
    def budgeted(self, share: float) -> nn.Module:
        choice = {LINEAR: LowRank(1.0)}
        options: dict[str, Any] = {"budget": Budget(params=share), "calibration": self.calibration, "errors": False}
        plan = plan_conversion(self.dense, choice, force=True, **options)
        return convert_model(self.dense, plan, calibration=self.calibration, batches=self.batches)

    def healed(self, share: float) -> nn.Module:
        model = copy.deepcopy(self.budgeted(share))
        batches = list(itertools.islice(self.training(), self.choices.batches))
        options: dict[str, Any] = {"minutes": self.choices.minutes, "lr": self.choices.rate, "seed": self.choices.seed}
        done = heal(model, self.dense, batches, train=in_blocks, held_out=0.01, max_bytes=2**28, **options)
        print(done, file=sys.stderr)
        return model

    def smaller(self, share: float) -> nn.Module:
        """A dense network with as many parameters in its matrices, distilled for as long as others are healed."""
        torch.manual_seed(self.choices.seed)
        student = network(smaller_settings(self.settings, share))
        steps = distil(student, self.dense, self.training(), self.choices.minutes, self.choices.distilling_rate)
        print(f"distilled in {steps} steps", file=sys.stderr)
        return student

    def training(self) -> Iterator[dict[str, Tensor]]:
        """Random batches of the training text, without an end."""
        for step in itertools.count(self.choices.seed + 10_000_000):
            yield {"input_ids": windows(self.seen, self.settings.batch, self.settings.window, step)}


METHODS: dict[str, Callable[[Study, float], nn.Module]] = {
    "plain SVD": Study.plain,
    "whitened SVD": Study.whitened,
    "sequential, uniform": Study.sequential,
    "sequential, budget": Study.budgeted,
    "the same, healed": Study.healed,
    "a smaller dense network, distilled as long": Study.smaller,
}


TRAINED = ("the same, healed", "a smaller dense network, distilled as long")
"""Those that take as many minutes as is said."""


def in_blocks(name: str, parameter: nn.Parameter) -> bool:
    """What is healed: cores, norms, and the layers that a budget leaves dense."""
    return ".layers." in name


def smaller_settings(settings: Settings, share: float) -> Settings:
    """Those of a network whose matrices have at most a share of the parameters: narrower, of as many layers."""
    wanted = share * settings.layers * settings.hidden * (4 * settings.hidden + 3 * settings.inner)
    step = 2 * settings.heads  # positions are rotated by pairs
    hidden = max(int(settings.hidden * math.sqrt(share)) // step, 1) * step
    inner = int((wanted / settings.layers - 4 * hidden**2) / (3 * hidden))
    return replace(settings, hidden=hidden, inner=max(inner, 1))


def distil(student: nn.Module, teacher: nn.Module, batches: Iterator[Any], minutes: float, rate: float) -> int:
    """Train a network on the teacher's distributions under a cosine schedule in time; how many steps that were."""
    optimizer = torch.optim.AdamW(groups(student, 0.1), lr=rate, betas=(0.9, 0.95), fused=True)
    start, steps, bar = time.perf_counter(), 0, tqdm(desc="distilling", unit="step")
    student.train()
    while (spent := (time.perf_counter() - start) / (60 * minutes)) < 1:
        batch = next(batches)
        with torch.no_grad():
            wanted = teacher(**batch, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        given = student(**batch, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(int(1000 * spent), 1000, 50)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        steps += 1
        bar.update()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    bar.close()
    student.eval()
    return steps


def share_kept(model: nn.Module, dense: nn.Module) -> float:
    """Parameters in the layers of the blocks, biases and norms included, as a fraction of the dense model's."""
    sizes = [sum(p.numel() for name, p in one.named_parameters() if ".layers." in name) for one in (model, dense)]
    return sizes[0] / sizes[1]


def table(directory: Path, out: Path, choices: Choices, methods: list[str]) -> dict[str, Any]:
    """Compute the rows that are not yet in the file, a method after the other."""
    study = Study(directory, choices)
    content = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    trained = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    keys = ("settings", "parameters", "in_matrices", "seconds", "curve")
    chosen = {key: value for key, value in asdict(choices).items() if key not in ("removed", "minutes")}
    about = {"choices": chosen, "model": {key: trained[key] for key in keys}}
    if any(content.get(key) != json.loads(json.dumps(value)) for key, value in about.items()):
        content = {"dense": perplexity(study.dense, study.test), "rows": []}
    dense, rows = content["dense"], content["rows"]
    for method in methods:
        for removed in choices.removed:
            key = {"removed": removed, "method": method}
            if method in TRAINED:
                key["minutes"] = choices.minutes
            if any(key.items() <= row.items() for row in rows):
                continue
            start = time.perf_counter()
            model = METHODS[method](study, 1 - removed)
            seconds = time.perf_counter() - start
            found = perplexity(model, study.test)
            values = {"perplexity": found, "of_dense": found / dense, "kept": share_kept(model, study.dense)}
            rows.append({**key, **values, "seconds": seconds})
            rows.sort(key=lambda row: (list(METHODS).index(row["method"]), row["removed"]))
            write(out, **about, dense=dense, rows=rows)
    return {**about, "dense": dense, "rows": rows}


def markdown(content: dict[str, Any]) -> str:
    """Perplexities as a table, a column a ratio."""
    ratios = sorted({row["removed"] for row in content["rows"]})
    found = {(row["removed"], row["method"]): row for row in content["rows"]}
    heads = " | ".join(f"{ratio:.0%} removed" for ratio in ratios)
    lines = [
        f"| held-out perplexity (of the dense model's) | {heads} |",
        "|---" * (1 + len(ratios)) + "|",
        f"| dense | {content['dense']:.2f} |" + " |" * (len(ratios) - 1),
    ]
    for method in METHODS:
        cells = [found.get((ratio, method)) for ratio in ratios]
        if any(cells):
            texts = [f"{row['perplexity']:.2f} ({row['of_dense']:.3f})" if row else "-" for row in cells]
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
