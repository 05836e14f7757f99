"""A convolution network on scikit-learn's digits, made smaller without training: one budget against equal shares.

    python benchmarks/digits_budget.py --out benchmarks/digits_budget.json

The network of digits.py is trained, and its convolutions, but for the first, are converted to a share of their
parameters: fitted to the weights; to the layers' data, every layer to the same share; and to these within one budget.
No fine-tuning: accuracy on the unseen fold, and how far the logits are from the dense network's there. Means over five
folds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import write
from digits import FORMATS, accuracy, choice, fit, network
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from tensorlayers import Budget, Calibration, collect, convert_model, plan_conversion

SHARES = (0.3, 0.5, 0.7)
WAYS = ("weights", "uniform", "budget")


def converted(model: nn.Module, name: str, share: float, way: str, calibration: Calibration) -> nn.Module:
    """The trained network at a share of the parameters of three convolutions."""
    if way == "weights":
        return convert_model(model, choice(name, share), force=True)
    if way == "uniform":
        return convert_model(model, choice(name, share), force=True, calibration=calibration)
    options: dict[str, Any] = {"budget": Budget(params=share), "calibration": calibration, "errors": False}
    plan = plan_conversion(model, choice(name, 1.0), force=True, **options)
    return convert_model(model, plan, calibration=calibration)


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Of the logits, relative."""
    before, after = dense(images), model(images)
    return float((after - before).norm() / before.norm())


def run(epochs: int, rate: float) -> dict[str, Any]:
    """A row for each format, share and way."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    found: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    reference = []
    splitter = StratifiedKFold(5, shuffle=True, random_state=0)
    for fold, (train, test) in enumerate(splitter.split(digits.images, digits.target)):
        torch.manual_seed(fold)
        dense = network()
        fit(dense, (images[train], labels[train]), epochs, rate)
        dense.eval()
        unseen = images[test], labels[test]
        reference.append(accuracy(dense, unseen))
        calibration = collect(dense, list(images[train].split(64)))
        for name in FORMATS:
            for share in SHARES:
                for way in WAYS:
                    model = converted(dense, name, share, way, calibration).eval()
                    measured = accuracy(model, unseen), error(model, dense, unseen[0])
                    found.setdefault((name, share, way), []).append(measured)
        print(f"fold {fold} done", flush=True)
    rows = []
    for (name, share, way), values in found.items():
        accuracies, errors = zip(*values, strict=True)
        means = {"accuracy": statistics.mean(accuracies), "error": statistics.mean(errors)}
        rows.append({"format": name, "share": share, "way": way, **means})
    return {"dense": statistics.mean(reference), "rows": rows}


def table(content: dict[str, Any]) -> str:
    """As Markdown: accuracy, and the error of the logits, a column a share."""
    found = {(row["format"], row["way"], row["share"]): row for row in content["rows"]}
    lines = [
        f"| accuracy, error of the logits (dense: {content['dense']:.1f}) | {' | '.join(f'{s:.0%}' for s in SHARES)} |",
        "|---" * (1 + len(SHARES)) + "|",
    ]
    for name in FORMATS:
        for way in WAYS:
            cells = [f"{row['accuracy']:.1f}, {row['error']:.2f}" for s in SHARES for row in [found[name, way, s]]]
            lines.append(f"| {name}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON")
    arguments = parser.parse_args()
    content = run(arguments.epochs, arguments.rate)
    if arguments.out:
        write(arguments.out, epochs=arguments.epochs, rate=arguments.rate, **content)
    print(table(content))


if __name__ == "__main__":
    main()
