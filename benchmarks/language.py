"""A language model of the standard library's sources: trained here, then with a part of its matrices removed.

    python benchmarks/language.py train --out DIRECTORY
    python benchmarks/language.py table --model DIRECTORY --out benchmarks/language.json

`train` takes about forty minutes on one core and goes on where it stopped. `table` then removes 20, 40 and 60 % of
the parameters in the linear layers of the blocks (not the embedding, which is the head) and states the perplexity on
modules that neither the model nor a conversion has seen: by plain SVD; by SVD in the metric of the layers' inputs
(whitened); layer after layer, in the metric of inputs and of the output's gradients, at a uniform share and by one
budget for the model; the last one healed; and of a dense network of the same size that is distilled for as long.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields, replace
from pathlib import Path

from language_model import Settings, train
from language_table import METHODS, Choices, markdown, table


def main(given: list[str] | None = None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the model, from where an earlier training there stopped")
    training.add_argument("--out", type=Path, required=True, help="directory of the model, its tokenizer and its curve")
    for field in fields(Settings):
        kind = float if field.name in ("rate", "decay") else int
        training.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="N")
    tables = commands.add_parser("table", help="what its perplexity becomes; rows that are in the file stay")
    tables.add_argument("--model", type=Path, required=True, help="what `train` wrote")
    tables.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table as JSON")
    tables.add_argument("--removed", type=float, nargs="+", default=Choices.removed, metavar="SHARE")
    tables.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    tables.add_argument("--minutes", type=float, default=Choices.minutes, help="of healing and of distilling")
    tables.add_argument("--calibration", type=int, default=Choices.calibration, help="windows to fit to")
    tables.add_argument("--test", type=int, default=Choices.test, help="windows of the perplexity")
    arguments = parser.parse_args(given)
    if arguments.command == "train":
        settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
        print(f"perplexity on held-out modules: {train(arguments.out, settings)['perplexity']:.2f}")
        return
    choices = replace(
        Choices(),
        removed=tuple(arguments.removed),
        calibration=arguments.calibration,
        test=arguments.test,
        minutes=arguments.minutes,
    )
    print(markdown(table(arguments.model, arguments.out, choices, arguments.methods)))


if __name__ == "__main__":
    main()
