"""Whole models, converted by convert_model: an encoder block of BERT-base's size, and a ResNet-18."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cases
import torch
from compare import Candidate, Row, compare
from torch import Tensor, nn

from tensorlayers import BTT, TT, ConversionPlan, Format, LowRank, Tucker, convert_model, plan_conversion, to_dense
from tensorlayers.layers import layer_type
from tensorlayers.testing import assert_close

TOKENS = (8, 128)
"""Batch, and tokens of each text."""
IMAGES = {"CIFAR": (32, 32), "ImageNet": (8, 224)}
"""Batch, and pixels a side."""
FORMATS: tuple[type[Format], ...] = (LowRank, Tucker, BTT, TT)
"""Not CP: to fit it takes minutes, and here it is time that counts."""


class Block(nn.Module):
    """A residual block of two 3x3 convolutions (He et al. 2016, figure 5 left)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(pixels: int) -> nn.Sequential:
    """A ResNet-18; for small images without the first stride and pooling, as is usual for CIFAR."""
    if pixels < 64:
        stem: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 2 if b > a else 1) for a, b in pairwise(widths)]
    classes = 10 if pixels < 64 else 1000
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class EncoderBlock(nn.Module):
    """One layer of BERT-base, without dropout, so that outputs can be compared."""

    def __init__(self) -> None:
        super().__init__()
        bert = importlib.import_module("transformers.models.bert.modeling_bert")
        config = bert.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
        self.layer = bert.BertLayer(config)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        hidden: Tensor = y[0] if isinstance(y, tuple) else y
        return hidden


@dataclass(frozen=True)
class Model:
    """A dense model, the rows of its layers, which of them are converted, and what it must show."""

    title: str
    module: nn.Module
    x: Tensor
    pattern: str
    targets: dict[str, float]


def models(quick: bool) -> Iterator[Model]:
    """The models; `quick`: the smaller ones."""
    block = cases.targets(*cases.BLOCK)
    x = torch.randn(*TOKENS, 768)
    yield Model(f"an encoder block of BERT-base, {TOKENS[0]} x {TOKENS[1]} tokens", EncoderBlock(), x, ".*", block)
    resnet = cases.targets(None, cases.RESNET)
    for name, (batch, pixels) in list(IMAGES.items())[: 1 if quick else None]:
        title = f"ResNet-18, {batch} images of {name}'s size ({pixels}x{pixels})"
        yield Model(title, resnet18(pixels), torch.randn(batch, 3, pixels, pixels), r".*\.conv[12]", resnet)


def run(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """The rows of every model."""
    torch.manual_seed(0)
    for model in models(quick):
        candidates = [converted(model, format) for format in FORMATS[: 2 if quick else None]]
        yield compare(model.title, model.module, candidates, model.x, seconds)


def converted(model: Model, format: type[Format]) -> Candidate:
    """The model with each of its layers at about `cases.MIDDLE` of the FLOPs in one format, where that pays."""
    positions = output_positions(model.module, model.x)
    chosen: dict[str, Format] = {}
    for entry in plan_conversion(model.module, {f"re:{model.pattern}": format(1)}, force=True, errors=False):
        if entry.converted:
            kind = layer_type(entry.layer)
            chosen[entry.name] = cases.nearest(kind, entry.settings, positions[entry.name], cases.MIDDLE, format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says how many stay dense
        plan = plan_conversion(model.module, chosen, errors=False)
        module = convert_model(model.module, plan, progress=False)
    facts = {
        "converted": f"{len(plan.converted)} of {len(plan)}",
        "parameters": plan.parameters[1] / plan.parameters[0],
        "flops": flops(plan, positions),
    }
    asked = len(chosen)
    if 2 * len(plan.converted) < asked:  # the model is not at about `cases.MIDDLE` then
        facts["convert_model"] = f"{choice(plan, asked)}: no target; {plan.advice}"
        return Candidate(format.__name__, module, check, facts)
    return Candidate(format.__name__, module, check, facts, model.targets)


def choice(plan: ConversionPlan, asked: int) -> str:
    """How many of the layers that it was asked for a plan converts, and how many of these without an estimate."""
    unknown = sum(entry.converted and entry.seconds(training=True) is None for entry in plan)
    said = f"converts {len(plan.converted)} of the {asked} layers asked for"
    return f"{said} ({unknown} without an estimate of their time)" if unknown else said


def flops(plan: ConversionPlan, positions: Mapping[str, int]) -> float:
    """FLOPs of the layers that are converted, of dense's."""
    factorized = dense = 0
    for entry in plan:
        if entry.network is not None:
            kind, rows = layer_type(entry.layer), positions[entry.name]
            factorized += kind.factorized_cost(entry.network, entry.settings, rows).flops
            dense += kind.dense_cost(entry.settings, rows).flops
    return factorized / max(dense, 1)


def output_positions(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The rows that each layer of a model works on: tokens, or positions of its output."""
    found: dict[str, int] = {}

    names = {id(module): name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            found[names[id(module)]] = output.numel() // channels

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def check(module: nn.Module, x: Tensor) -> None:
    """Output and the gradient of the input against the model with its dense weights, in float64.

    In float64, for what is right must not depend on how errors grow over eighteen layers; on two samples.
    """
    wide = copy.deepcopy(module).double()
    x = x[:2].detach().double().requires_grad_()
    y, dense = wide(x), to_dense(wide)(x)
    assert_close(y, dense, torch.float64, "output")
    probe = torch.randn_like(y)
    ours, truth = (torch.autograd.grad(output, x, probe)[0] for output in (y, dense))
    assert_close(ours, truth, torch.float64, "gradient of input")
