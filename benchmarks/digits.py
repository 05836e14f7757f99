"""Accuracy of a convolution network at a quarter of its convolution MACs: scikit-learn's handwritten digits.

    python benchmarks/digits.py --out benchmarks/digits.json

A dense network is trained, converted to each format at a quarter of its convolution MACs, and fine-tuned for as many
epochs. Beside them stand the dense network fine-tuned as long, and the dense network made narrower to the same MACs and
trained as long in all. Five folds, three seeds; mean and standard deviation over the fifteen. MACs are counted by
torch in a forward, not taken from the plan.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from common import write
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tensorlayers import CP, TT, Format, LowRank, Tucker, convert_model, plan_conversion

SHARE = 0.25
BATCH = 64
POSITIONS = {"conv2": 64, "conv3": 16, "conv4": 16}
FORMATS = {
    "LowRank": lambda share: LowRank(share),
    "LowRank, spatial": lambda share: LowRank(share, split="spatial"),
    "Tucker": lambda share: Tucker(share),
    "CP": lambda share: CP(share),
    "TT": lambda share: TT(share),
}
Data = tuple[Tensor, Tensor]


def network(width: int = 64) -> nn.Sequential:
    """Four 3x3 convolutions, with `width` channels but for the first, which has half of them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = [1, max(width // 2, 1), width, width, width]
    for k in range(1, 5):
        layers[f"conv{k}"] = nn.Conv2d(channels[k - 1], channels[k], 3, padding=1, bias=False)
        layers[f"norm{k}"] = nn.BatchNorm2d(channels[k])
        layers[f"relu{k}"] = nn.ReLU()
        if k == 2:
            layers["pool"] = nn.MaxPool2d(2)
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(width, 10)
    return nn.Sequential(layers)


def convolution_macs(model: nn.Sequential) -> float:
    """Multiply-accumulates an image of all convolutions, those that multiply cores with each other included."""
    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model[:-1](torch.zeros(BATCH, 1, 8, 8))
    return counter.get_total_flops() / 2 / BATCH


def choice(name: str, share: float) -> dict[str, Format | None]:
    """The format of each layer; the first convolution has one input channel and stays dense."""
    return {"conv1": None, "head": None, "*": FORMATS[name](share)}


def share_of_parameters(name: str) -> float:
    """The largest share of the parameters whose network has at most `SHARE` of the convolutions' MACs."""
    model = network()
    budget = SHARE * convolution_macs(model)
    for percent in range(60, 2, -1):
        plan = plan_conversion(model, choice(name, percent / 100), errors=False, force=True)
        macs = [plan[layer].macs[1] * positions for layer, positions in POSITIONS.items()]
        if sum(macs) <= budget * 0.99 - 64 * 32 * 9:  # conv1; and room for products of cores
            return percent / 100
    raise SystemExit(f"{name}: no share is small enough")


def narrow_width() -> int:
    """The largest width of a dense network with at most `SHARE` of the convolutions' MACs."""
    budget = SHARE * convolution_macs(network())
    return max(width for width in range(4, 64) if convolution_macs(network(width)) <= budget)


def fit(model: nn.Module, data: Data, epochs: int, rate: float) -> float:
    """Train in place by AdamW under a cosine schedule; seconds."""
    images, labels = data
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for k in range(len(images) // BATCH):
            rows = order[k * BATCH : (k + 1) * BATCH]
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the images that are recognised."""
    model.eval()
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())


@torch.no_grad()
def latencies(models: dict[str, nn.Module], images: Tensor, repeats: int = 30) -> dict[str, float]:
    """Seconds a batch, the least of many, the models in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            model.eval()
            start = time.perf_counter()
            model(images)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def run(folds: int, seeds: int, epochs: int, rate: float) -> list[dict[str, object]]:
    """One row a model, over all folds and seeds."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    shares = {name: share_of_parameters(name) for name in FORMATS}
    width = narrow_width()
    rows: dict[str, dict[str, list[float]]] = {}

    def note(name: str, **values: float) -> None:
        for key, value in values.items():
            rows.setdefault(name, {}).setdefault(key, []).append(value)

    for seed in range(seeds):
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        for fold, (train, test) in enumerate(splitter.split(digits.images, digits.target)):
            torch.manual_seed(1000 * seed + fold)
            seen, unseen = (images[train], labels[train]), (images[test], labels[test])
            dense = network()
            seconds = fit(dense, seen, epochs, rate)
            models = {"dense": dense, "dense, fine-tuned alike": copy.deepcopy(dense)}
            narrow = models[f"dense of width {width}, trained as long"] = network(width)
            note("dense", accuracy=accuracy(dense, unseen), seconds=seconds)
            for name, share in shares.items():
                models[name] = convert_model(dense, choice(name, share), force=True, progress=False)
            for name, model in models.items():
                if model is not dense:
                    before = accuracy(model, unseen)
                    seconds = fit(model, seen, 2 * epochs if model is narrow else epochs, rate)
                    note(name, before=before, accuracy=accuracy(model, unseen), seconds=seconds)
            for name, latency in latencies(models, unseen[0][:BATCH]).items():
                note(name, latency=latency)
            for name, model in models.items():
                note(name, macs=convolution_macs(model), parameters=sum(p.numel() for p in model.parameters()))
            print(f"seed {seed} fold {fold} done", file=sys.stderr, flush=True)

    table = []
    reference = {key: rows["dense"][key] for key in ("macs", "parameters", "latency", "accuracy")}
    for name, values in rows.items():
        mean = {key: statistics.mean(numbers) for key, numbers in values.items()}
        paired = [a - b for a, b in zip(values["accuracy"], reference["accuracy"], strict=True)]
        table.append(
            {
                "model": name,
                "macs": mean["macs"] / statistics.mean(reference["macs"]),
                "parameters": mean["parameters"] / statistics.mean(reference["parameters"]),
                "before": mean.get("before"),
                "accuracy": mean["accuracy"],
                "deviation": statistics.stdev(values["accuracy"]) if len(paired) > 1 else 0.0,
                "against_dense": statistics.mean(paired),
                "training_seconds": mean["seconds"],
                "latency": statistics.median(values["latency"]) / statistics.median(reference["latency"]),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25, help="of training, and again of fine-tuning")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    table = run(arguments.folds, arguments.seeds, arguments.epochs, arguments.rate)
    print(f"{'model':36} MACs  params  before  accuracy          - dense  training  latency")
    for row in table:
        before = "     -" if row["before"] is None else f"{row['before']:6.2f}"
        size = f"{row['macs']:.2f}  {row['parameters']:.2f}    {before}"
        quality = f"{row['accuracy']:.2f} +- {row['deviation']:.2f}   {row['against_dense']:+.2f}"
        print(f"{row['model']:36} {size}  {quality}    {row['training_seconds']:5.1f} s   {row['latency']:.2f}")
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("folds", "seeds", "epochs", "rate")}
        write(arguments.out, **settings, rows=table)


if __name__ == "__main__":
    main()
