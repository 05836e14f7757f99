"""heal: train a converted model until it gives again what the dense one gave."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Mask, attention_mask, checked, evaluating
from .distillation import Distillation, LayerRegression, Loss, Objective, blocks_of
from .errors import ConversionError
from .healing import (
    balance_cores,
    check_models,
    check_options,
    described,
    digest,
    factorized_layers,
    learning_rates,
    split,
    trained_parameters,
)
from .schedule import Schedule
from .training import Training

_PASSES = 10
"""Over the batches, where nothing is said."""


@dataclass(frozen=True)
class Healing:
    """How a model was healed.

    Parameters
    ----------
    losses : tuple of float
        Of the batch of each step.
    held_out : tuple of (int, float)
        Steps done, and the loss of the held-out batches then; empty without such batches.
    steps : int
        How many were done.
    best : int
        After how many the weights were as they are now.
    seconds : float
        That it took, interruptions left out.
    ended : {"steps", "time", "patience"}
        What ended it.
    parameters : int
        How many were trained.
    """

    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    steps: int
    best: int
    seconds: float
    ended: str
    parameters: int

    def __str__(self) -> str:
        ends = {
            "steps": "all steps done",
            "time": "the time was up",
            "patience": "the held-out loss did not improve any more",
        }
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s on {self.parameters:,} parameters: {ends[self.ended]}",
            f"weights: those after step {self.best}",
        ]
        if self.losses:
            few = max(1, len(self.losses) // 20)
            first, last = (sum(some) / few for some in (self.losses[:few], self.losses[-few:]))
            lines.append(f"loss of a batch: {first:.4g} at first, {last:.4g} at last")
        if self.held_out:
            kept = dict(self.held_out)[self.best]
            lines.append(f"loss of the held-out batches: {self.held_out[0][1]:.4g} before, {kept:.4g} after")
        return "\n".join(lines)


def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    layerwise: float = 0.0,
    lr: float = 0.003,
    warmup: float = 0.05,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    train: Callable[[str, nn.Parameter], bool] | None = None,
    training: bool = False,
    output: Callable[..., Tensor] | None = None,
    loss: Loss | None = None,
    temperature: float = 1.0,
    hidden: float = 0.0,
    hidden_at: Sequence[str] | None = None,
    labels: float = 0.0,
    mask: Mask = attention_mask,
    held_out: float = 0.05,
    patience: int | None = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    seed: int = 0,
    max_bytes: int = 2**31,
    progress: bool | None = None,
) -> Healing:
    r"""Train a converted model, in place, until its outputs are those of the dense model again.

    Adam on the cores of the factorized layers and on small parameters beside them, each at a learning rate relative to
    its size, which grows in a warm-up and then falls to 0 along a cosine. Outputs are compared in logits by the
    Kullback-Leibler divergence of the probabilities, in all else by the relative squared error; masked positions do not
    count. The teacher is run in evaluation mode and left as it was; of the model only what is trained changes.

    Parameters
    ----------
    model : nn.Module
        What `convert_model` made, or any model with parameters to train.
    teacher : nn.Module
        The dense model. It shares no parameter with those that are trained.
    batches : iterable
        Of what the models take, as of `collect`; kept in a list. Each step takes one of them, in a new order at each
        pass. Of texts, batches of like length waste less on padding.
    steps : int, optional
        How many are done; by default ten passes over the batches.
    minutes : float, optional
        After which the run ends, unless `steps` ends it first. Where it ends, and so the result, then depends on the
        machine: two runs are bit for bit the same by `steps` alone.
    layerwise : float
        The share of the run, in [0, 1), that comes first and fits each layer by itself to what the dense layer of its
        name gives, on what that one takes. Worth it where the layers were not fitted to data when they were converted.
    lr : float
        The largest learning rate, relative to the root mean square of each parameter's entries: each step changes it by
        about this share.
    warmup : float
        The share of the run, in [0, 1), in which the learning rate grows.
    clip : float
        Gradients whose norm, all together, is larger are scaled down to it.
    weight_decay : float
        AdamW's.
    train : callable, optional
        (name, parameter) -> bool: whether it is trained, whatever its ``requires_grad``. By default the cores, and the
        vectors (biases, norms).
    training : bool
        Run the model in training mode, with dropout, rank dropout and statistics of batches. By default it is in
        evaluation mode, as the teacher is.
    output : callable, optional
        What of the models' outputs is compared: (output) -> tensor, as of `collect`, or (output, batch) -> tensor (a
        mean over a mask, say). By default logits, the last hidden state, or the first tensor of floating point.
    loss : callable, optional
        (what the model gives, what the teacher gives) -> scalar, in place of the losses above.
    temperature : float
        Of the divergence of logits.
    hidden : float
        Weight of the relative squared error of hidden states, beside the loss of the outputs.
    hidden_at : sequence of str, optional
        The modules that give them. By default the members of the model's outermost lists of modules (a transformer's
        blocks).
    labels : float
        Weight of the model's own loss, for batches that hold labels.
    mask : callable
        (batch) -> (batch, positions) or None: the positions that count. By default its ``attention_mask``.
    held_out : float
        The share of the batches, in [0, 1), that is not trained on but measured by, once a pass or at each tenth of
        the run; at least one of several. 0: none; the weights are then the last.
    patience : int, optional
        After so many measurements without a lower loss the run ends; None: never.
    checkpoint : path, optional
        A safetensors file. Where it exists, the run goes on from it, to the same weights bit for bit as without the
        interruption (by `steps`, on the same machine); a finished run is not repeated. The model given then may be as
        it was at first, or as the interrupted run left it.
    every : int
        Steps after which the checkpoint is written, each time whole or not at all.
    seed : int
        Of the order of batches, the choice of those held out, and dropout; the generators of torch are left as they
        were.
    max_bytes : int
        What the teacher gives is kept for the next passes as far as it takes no more than this.
    progress : bool, optional
        A progress bar with the loss; by default where the output is a terminal.

    Returns
    -------
    Healing
        The model has the weights with the lowest held-out loss, those before the first step included.

    Raises
    ------
    ConversionError
        If an option is out of its range, there are no batches or nothing to train, or the two models give tensors of
        different shapes: the model is then unchanged. If a loss or a gradient is NaN or infinite: it then has the best
        weights so far.
    CheckpointError
        If the checkpoint is damaged, or of another model, other batches or other options; it names the first.

    Notes
    -----
    Balanced cores, and a learning rate relative to their size, make one default do for every format: a core's scale is
    arbitrary (another core can take it over), and an optimizer with one rate for all would move the small ones by much
    and the large ones by little.

    References
    ----------
    Hinton, Vinyals and Dean 2015, Distilling the knowledge in a neural network; Shazeer and Stern 2018, Adafactor
    (section 8: relative step sizes).

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> _ = torch.manual_seed(0)
    >>> teacher = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    >>> model = tl.convert_model(teacher, tl.LowRank(8), force=True)
    >>> healing = heal(model, teacher, [torch.randn(64, 32) for _ in range(8)], steps=40)
    >>> healing.held_out[-1][1] < healing.held_out[0][1]
    True
    """
    given = dict(locals())
    check_models(model, teacher)
    check_options(given)
    held = list(checked(batches, "heal"))
    if not held:
        raise ConversionError("heal: at least one batch; got none")
    trained = trained_parameters(model, teacher, train)
    names = blocks_of(model) if hidden_at is None else tuple(hidden_at)
    objective = Objective(output, loss, temperature, hidden, names if hidden else (), labels, mask)
    numbers, measured = split(len(held), held_out, seed)
    if steps is None and minutes is None:
        steps = _PASSES * len(numbers)
    schedule = Schedule(
        steps,
        None if minutes is None else 60 * minutes,
        (layerwise, 1 - layerwise) if layerwise else (1.0,),
        warmup,
        clip,
        weight_decay,
        patience,
        min(len(numbers), len(numbers) if steps is None else math.ceil(steps / 10)),
        seed,
    )
    about = {"model": type(model).__name__, "batches": digest(held), **described(given)}
    with evaluating(teacher), _only_training(model, trained, training):
        distillation = Distillation(model, teacher, held, objective, max_bytes)
        stages: list[Callable[[int], Tensor]] = [distillation]
        if layerwise:
            stages.insert(0, LayerRegression(model, teacher, held, mask))
        with torch.no_grad(), evaluating(model):
            distillation(numbers[0])  # what does not fit together is found before anything changes
        with _unless_begun(trained) as begun:
            balance_cores(model, trained)
            rates = learning_rates(model, trained, lr)
            run = Training(model, trained, rates, stages, distillation, numbers, measured, schedule, about)
            begun.append(run)
            state = run.run(None if checkpoint is None else Path(checkpoint), every, progress)
    count = sum(parameter.numel() for parameter in trained.values())
    held_out_losses = tuple(state.held_out)
    return Healing(tuple(state.losses), held_out_losses, state.step, state.best, state.elapsed, state.ended, count)


@contextmanager
def _unless_begun(trained: Mapping[str, nn.Parameter]) -> Iterator[list[Training]]:
    """Undo what was done to parameters where an error comes before the first step."""
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    begun: list[Training] = []
    try:
        yield begun
    except BaseException:
        if not begun or not begun[0].state.step:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(before[name])
        raise


@contextmanager
def _only_training(model: nn.Module, trained: Mapping[str, nn.Parameter], training: bool) -> Iterator[None]:
    """Only what is trained requires gradients; modes, gradients, ``requires_grad`` and frozen layers as they were."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [layer for layer in factorized_layers(model) if layer.frozen]
    for layer in frozen:
        layer.unfreeze()
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    mine = {id(parameter) for parameter in trained.values()}
    try:
        model.train(training)
        for parameter, _, _ in wanted:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in mine)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wants, grad in wanted:
            parameter.requires_grad_(wants)
            parameter.grad = grad
        for layer in frozen:
            layer.freeze()
