"""A training run that can be interrupted and continued, bit for bit: steps, schedule, held-out loss, checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .errors import CheckpointError, ConversionError
from .files import replaced
from .randomness import seeded
from .schedule import Schedule

_VERSION = 1
_BETAS = (0.9, 0.99)


@dataclass
class State:
    """Where a run is, beside its tensors."""

    step: int = 0
    stage: int = 0
    elapsed: float = 0.0
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    waited: int = 0
    ended: str = ""


class Training:
    """One run over batches.

    Parameters
    ----------
    model : nn.Module
        Its modes are those of the run, and stay.
    parameters : mapping of str to nn.Parameter
        Those to train; they require gradients.
    rates : sequence of float
        The learning rate of each.
    stages : sequence of callables
        (number of a batch) -> the loss to be made small; one after another.
    measure : callable
        Likewise, of the held-out batches.
    batches, held_out : sequence of int
        The numbers of the batches to train on, and of those to measure by.
    schedule : Schedule
    about : mapping
        What a checkpoint must agree with, plain data for JSON.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        rates: Sequence[float],
        stages: Sequence[Callable[[int], Tensor]],
        measure: Callable[[int], Tensor],
        batches: Sequence[int],
        held_out: Sequence[int],
        schedule: Schedule,
        about: Mapping[str, Any],
    ) -> None:
        self.model, self.parameters, self.stages, self.measure = model, dict(parameters), stages, measure
        self.batches, self.held_out, self.schedule, self.about = batches, held_out, schedule, dict(about)
        self.state = State(rates=list(rates))
        # All that training changes.
        self.tensors: dict[str, Tensor] = {**self.parameters, **dict(model.named_buffers())}
        self.device = next(iter(self.parameters.values())).device
        self.best = self._copied()
        self.optimizer = self._new_optimizer()

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path | None, every: int, progress: bool | None) -> State:
        """Train to the end of the plan, or until nothing is gained; the best weights are the model's then.

        Raises
        ------
        ConversionError
            If a loss or a gradient is NaN or infinite; the best weights are the model's then.
        CheckpointError
            If the checkpoint is damaged, or of another model, data or options.
        """
        state, schedule = self.state, self.schedule
        with seeded(schedule.seed, [self.device]), self._restoring_best():
            if checkpoint is not None and checkpoint.exists():
                state = self.state = self._load(checkpoint)
            start = time.monotonic() - state.elapsed
            if not state.step:
                self._check()
            with tqdm(
                total=schedule.steps,
                initial=state.step,
                desc="healing",
                disable=None if progress is None else not progress,
                delay=1,
                unit="step",
            ) as bar:
                while not state.ended:
                    state.elapsed = time.monotonic() - start
                    self._step()
                    bar.update(state.step - bar.n)
                    bar.set_postfix(self._shown(), refresh=False)
                    if checkpoint is not None and (state.step % every == 0 or state.ended):
                        self._save(checkpoint)
        return state

    def _step(self) -> None:
        state, schedule = self.state, self.schedule
        stage, done = schedule.place(state.step, state.elapsed)
        if stage > state.stage:
            state.stage, state.waited, self.optimizer = stage, 0, self._new_optimizer()
        if stage == len(self.stages):
            self._end("time")
            return
        # The middle of the step: the first one is not wasted.
        done = min(done + 0.5 / (schedule.steps * schedule.shares[stage]), 1.0) if schedule.steps is not None else done
        scale = schedule.scale(done)
        for group, rate in zip(self.optimizer.param_groups, state.rates, strict=True):
            group["lr"] = rate * scale
        loss = self.stages[stage](self._next())
        value = float(loss.detach())
        self._check_finite("loss", value, scale)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), schedule.clip)
        self._check_finite("gradient", float(norm), scale)
        self.optimizer.step()
        state.step += 1
        state.losses.append(value)
        last = state.step == schedule.steps
        if state.step % schedule.check == 0 or last:
            self._check()
        if last:
            self._end("steps")
        elif schedule.patience is not None and state.waited >= schedule.patience and stage == len(self.stages) - 1:
            self._end("patience")

    def _next(self) -> int:
        """The number of the batch of this step: a new order at each pass, which depends on nothing but the seed."""
        turn, place = divmod(self.state.step, len(self.batches))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.schedule.seed + turn))
        return self.batches[int(order[place])]

    def _check(self) -> None:
        """Measure, and keep the weights if they are the best so far; without held-out batches, the last are."""
        state = self.state
        if not self.held_out:
            self.best, state.best = self._copied(), state.step
            return
        with _evaluating(self.model), torch.no_grad():
            loss = sum(float(self.measure(k)) for k in self.held_out) / len(self.held_out)
        self._check_finite("held-out loss", loss, 1.0)
        state.held_out.append((state.step, loss))
        if len(state.held_out) == 1 or loss < min(value for _, value in state.held_out[:-1]):
            self.best, state.best, state.waited = self._copied(), state.step, 0
        else:
            state.waited += 1

    def _end(self, why: str) -> None:
        if self.state.step and (not self.state.held_out or self.state.held_out[-1][0] < self.state.step):
            self._check()
        self.state.ended = why

    def _check_finite(self, what: str, value: float, scale: float) -> None:
        if not math.isfinite(value):
            rate = max(self.state.rates) * scale
            raise ConversionError(
                f"heal: a finite {what}; got {value} at step {self.state.step + 1}, learning rate {rate:.3g}; "
                f"the weights are those of step {self.state.best}"
            )

    def _shown(self) -> dict[str, str]:
        recent = self.state.losses[-20:]
        shown = {"loss": f"{sum(recent) / max(len(recent), 1):.4g}"}
        if self.state.held_out:
            shown["held out"] = f"{self.state.held_out[-1][1]:.4g}"
        return shown

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _new_optimizer(self) -> torch.optim.Optimizer:
        pairs = zip(self.parameters.values(), self.state.rates, strict=True)
        groups = [{"params": [parameter], "lr": rate} for parameter, rate in pairs]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=self.schedule.decay, fused=fused)

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(values[name])

    @contextmanager
    def _restoring_best(self) -> Any:
        """The best weights, once all steps are done, or where a step has failed; not where the user interrupts."""
        try:
            yield
        except Exception:
            self._put(self.best)
            raise
        self._put(self.best)

    # -- the checkpoint ---------------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        shapes = {name: f"{tuple(one.shape)} {one.dtype}" for name, one in self.tensors.items()}
        plan = {key: value for key, value in asdict(self.schedule).items() if key != "check"}
        return json.loads(json.dumps({**self.about, **plan, "tensors": shapes}))  # type: ignore[no-any-return]

    def _save(self, path: Path) -> None:
        tensors = {f"now/{name}": value for name, value in self._copied().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for k, parameter in enumerate(self.parameters.values()):
            tensors |= {f"optimizer/{k}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        about = {"version": _VERSION, "run": self._described(), "state": asdict(self.state)}
        with replaced(path) as temporary:
            save_file(
                {name: one.contiguous() for name, one in tensors.items()},
                temporary,
                {"tensorlayers": json.dumps(about)},
            )

    def _load(self, path: Path) -> State:
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("tensorlayers", "null"))
                if about["version"] != _VERSION:
                    raise CheckpointError(f"{path}: version {_VERSION} of a checkpoint; got {about['version']}")
                self._agree(path, about["run"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            state = replace(State(), **about["state"])
            state.held_out = [(int(step), float(loss)) for step, loss in state.held_out]
            now, best = (
                {name: tensors[f"{part}/{name}"].to(one.device) for name, one in self.tensors.items()}
                for part in ("now", "best")
            )
            optimizer = self._new_optimizer()
            for k, (parameter, group) in enumerate(zip(self.parameters.values(), optimizer.param_groups, strict=True)):
                found = {key: one for key, one in tensors.items() if key.startswith(f"optimizer/{k}/")}
                for key, one in found.items():
                    # torch counts steps on the CPU, but where a fused step reads them on the GPU.
                    there = one.to(parameter.device) if one.dim() or group["fused"] else one
                    optimizer.state[parameter][key.rsplit("/", 1)[1]] = there
            torch.set_rng_state(tensors["random/cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: no checkpoint ({type(error).__name__}: {error})") from None
        self._put(now)
        self.best, self.optimizer = best, optimizer
        return state

    def _agree(self, path: Path, theirs: Mapping[str, Any]) -> None:
        ours = self._described()
        for key in sorted({*ours, *theirs}):
            one, other = ours.get(key), theirs.get(key)
            if one == other:
                continue
            if isinstance(one, dict) and isinstance(other, dict):
                key = next(name for name in sorted({*one, *other}) if one.get(name) != other.get(name))
                one, other = one.get(key), other.get(key)
            raise CheckpointError(f"{path}: a checkpoint of another run: {key} is {other} there, {one} here")


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """All modules in evaluation mode; each in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
