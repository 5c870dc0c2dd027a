"""The training loop: updates, logging, checkpoints, interruption, and what to say when it diverges.

Nothing in it depends on chance: texts are in an order fixed by the seed, tokens that are drawn anew follow from the
seed and the sequence's number (resampling.py), and the schedule depends on the step alone. So a checkpoint holds
parameters, optimizer state and a few counters, and a resumed run does exactly what an uninterrupted one of as many
processes does. Knows nothing of run set-up, texts, or what happens after the last step.

Shape suffixes: B sequences, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from rcpconv import distributed
from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadOption, NotSaved, TrainingDiverged
from rcpconv.layers import LearnedClip, QuantLinear
from rcpconv.model import Decoder
from rcpconv.prepare import rotation_signs
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import METRICS, PLOT, Run
from rcpconv.scheme import UNQUANTIZED, WEIGHT_BITS
from rcpconv.train import checkpoints
from rcpconv.train.average import RunningMean, pull_to_levels
from rcpconv.train.compiling import compile_layers, compile_updates
from rcpconv.train.losses import Distillation, Loss, Matching, distill, teacher_confidence
from rcpconv.train.memory import StepInBackward, narrow_weights
from rcpconv.train.optimizer import Together, make_optimizer, make_state, rate_factor, set_rates
from rcpconv.train.progress import LiveProgress, Metrics, NoMetrics, Rate, plot_loss, read_metrics
from rcpconv.train.resampling import places, redraw
from rcpconv.train.start import CALIBRATION_SEQUENCES, start_from_data, start_from_weights
from rcpconv.train.stopping import Interrupted, catching_signals
from rcpconv.train.tokens import Mixture, Sequences

CONFIDENCE_BATCHES = 4
"""How many batches CAKLD's beta is measured on, before the first update."""
_PLOT_SECONDS = 60
_SMOOTHING = 0.9
_EXPLODED = (2.0, 1.0)
"""The smoothed loss has exploded when it exceeds its lowest value times the first plus the second (nats)."""


@dataclass
class Counters:
    """What a checkpoint holds beside parameters and optimizer state."""

    step: int = 0
    """Updates made. Position in the texts and in the schedule follow from it."""
    metrics_bytes: int = 0
    beta: float | None = None
    smoothed_loss: float | None = None
    lowest_loss: float = math.inf
    norm: float = 0.0
    """Of the last update's gradients."""
    unlogged: list[tuple[float, float, float]] = field(default_factory=list)
    """Loss, KL and gradient norm of the updates since the last logging step."""


class Trainer:
    """Trains a student against a teacher, inside a run folder that the caller holds."""

    def __init__(
        self,
        *,
        student: Decoder,
        teacher: Decoder,
        sequences: Sequences | Mixture,
        steps: int,
        config: QuantizeConfig,
        run: Run,
        console: Console,
        evaluate: Callable[[Decoder], float] | None = None,
        keep: bool = True,
        zero_stage: int = 3,
        learned: LearnedRotations | None = None,
    ) -> None:
        """config: with batch_size, grad_accum and rates decided. evaluate: perplexity, for config.eval_every.

        student, teacher: whole, or sharded, with layers ready for training (distributed.sharded). Whole ones are made
        so here, where several processes train.
        keep: leave a checkpoint of the last step, where there are any, and the curve of the loss.
        zero_stage: of a sharded student (Plan.zero_stage). learned: what the student was turned by, for hidden_loss.
        """
        assert config.batch_size is not None and config.grad_accum is not None
        self.student, self.teacher, self.sequences, self.steps = student, teacher, sequences, steps
        self.config, self.run, self.console, self.evaluate = config, run, console, evaluate
        self.keep, self.zero_stage = keep, zero_stage
        self.batch, self.accum = config.batch_size, config.grad_accum
        self.tokens_per_step = self.batch * self.accum * sequences.seq_len
        self.device = student.inv_freq.device
        self.two_bits_from = 0 if config.progressive_bits == WEIGHT_BITS else int(config.progressive_share * steps)
        self.frozen_from = math.ceil((1 - config.freeze) * steps)
        if self.two_bits_from and distributed.processes() > 1:
            raise BadOption(f"progressive_bits: {config.progressive_bits} is for a training in one process")
        if (config.pull or config.freeze) and config.weight_range == "fixed" and distributed.processes() > 1:
            raise BadOption("weight_range: fixed with pull or freeze is for a training in one process; use moving")
        self.optimizer = make_optimizer(student, config)
        self.counters = Counters()
        checkpoint = checkpoints.newest(run)
        r1_CC = None if learned is None else learned.r1_CC
        self.learned_CC = None if r1_CC is None else r1_CC.to(self.device, torch.float32)
        if config.start != "weights" and checkpoint is None and not self.two_bits_from:
            self._start_from_data()
        if not distributed.is_sharded(student):
            if config.master_weights == "bf16":
                narrow_weights(student)
            if config.compile == "on":
                own = distributed.own_sequences(0, self.batch, self.accum)
                compile_layers(student, teacher, self._tokens(0, own[0][1]), config.low_memory)
            distributed.shard(student, self.optimizer.param_groups)
            distributed.shard(teacher, [])
        if config.compile == "on":
            compile_updates(getattr(self.optimizer, "optimizers", [self.optimizer]))
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.stepping: StepInBackward | None = None
        if isinstance(self.optimizer, Together) and config.step_in_backward == "on":
            learning = {name: p for name, p in student.named_parameters() if p.requires_grad}
            self.stepping = StepInBackward(learning, list(self.optimizer.optimizers), config.grad_clip)
        self.bits = {m: m.bits for m in student.modules() if isinstance(m, LearnedClip)}
        self.linears = [m for m in student.modules() if isinstance(m, QuantLinear)]
        self.mean = RunningMean([p.detach() for p in self.parameters], config.ema) if config.ema else None
        if checkpoint is not None:
            self._load(checkpoint)

    def _start_from_data(self) -> None:
        batches = [self._tokens(i, self.batch) for i in range(0, CALIBRATION_SEQUENCES, self.batch)]
        with torch.compiler.set_stance("force_eager"):
            start_from_data(self.student, batches, self.config.start == "feedback")

    def _begin_two_bits(self) -> None:
        """Fit the levels to weights that have been trained with more bits so far; the loss rises, and may."""
        if self.config.start == "weights":
            start_from_weights(self.student)
        else:
            self._start_from_data()
        if self.mean is not None:
            self.mean.load(self.parameters)
        self.counters.smoothed_loss, self.counters.lowest_loss = None, math.inf

    def _hold_codes(self) -> None:
        """Move weights to where they keep their codes while levels alone learn."""
        for linear in self.linears:
            pull_to_levels(linear, 1.0)
        if self.mean is not None:
            self.mean.load(self.parameters)

    def _state(self, states: bool) -> dict[str, Any]:
        """All that a checkpoint holds. states: with the optimizer's."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict() if states else None,
            "counters": asdict(self.counters),
            "mean": None if self.mean is None else self.mean.means,
        }

    def _load(self, checkpoint: Path) -> None:
        def like(parts: Collection[str]) -> dict[str, Any]:
            states = "optimizer" in parts
            if states:
                make_state(self.optimizer)
            return self._state(states)

        state = checkpoints.load(checkpoint, like)
        self.student.load_state_dict(state["student"])
        if state["optimizer"] is None:
            self.console.print("The checkpoint holds weights alone: the optimizer's states begin anew")
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.mean is not None:
            self.mean.load(state["mean"])
        self.counters = Counters(**state["counters"])

    def _save(self, metrics: Metrics) -> None:
        """Write a checkpoint; never one with parameters that are not finite."""
        bad = [name for name, value in self.student.named_parameters() if not _finite(value)]
        if bad:
            self._diverged(f"parameter {bad[0]} is not finite")
        metrics.sync()
        self.counters.metrics_bytes = distributed.from_first(metrics.length)
        state = self._state(self.config.checkpoint_contents == "all")
        checkpoints.save(self.run, self.counters.step, state, self.config.keep_checkpoints)

    def _tokens(self, first: int, count: int) -> Tensor:
        """(B, T) sequences of the endless order."""
        return torch.from_numpy(self.sequences.batch(first, count)).to(self.device)

    def _resampled(self, tokens_BT: Tensor, first: int) -> Tensor:
        """Sequences `first` and the next ones, with changes where they have been there often enough as they are."""
        c, all_of_step = self.config, self.accum * self.batch
        if not c.resample:
            return tokens_BT
        begin = self.counters.step * all_of_step
        epochs = np.array([self.sequences.epoch(index) for index in range(begin, begin + all_of_step)])
        again = epochs >= c.resample_after
        if not again.any():  # of the whole step, because processes ask a teacher together that they share
            return tokens_BT
        indices = range(first, first + len(tokens_BT))
        chosen_BT, uniform_BT = places(indices, self.sequences.seq_len, c.resample, c.seed)
        chosen_BT &= again[first - begin :][: len(tokens_BT), None]
        chosen, uniform = (torch.from_numpy(each).to(self.device) for each in (chosen_BT, uniform_BT))
        return redraw(self.teacher, tokens_BT, chosen, uniform)

    def _matching(self) -> Matching | None:
        """How the next update matches residual streams, if at all."""
        c, a = self.config, self.student.architecture
        if not c.hidden_loss:
            return None
        signs = rotation_signs(a.hidden_size, c.seed).to(self.device, torch.float32) if c.r1 else None
        left = 1 - (1 - c.hidden_end) * self.counters.step / self.steps
        return Matching(weight=left * c.hidden_loss, signs=signs, learned_CC=self.learned_CC)

    def _loss(self) -> Loss:
        c, counters = self.config, self.counters
        if c.loss == "cakld" and counters.beta is None:
            batches = (self._tokens(i * self.batch, self.batch) for i in range(CONFIDENCE_BATCHES))
            counters.beta = teacher_confidence(self.teacher, batches)
        loss: Loss = Distillation(
            kind=c.loss,
            temperature=c.temperature,
            teacher_temperature=c.teacher_temperature,
            beta=counters.beta or 0.0,
            mix_share=c.mix_share,
        )
        return torch.compile(loss) if c.compile == "on" else loss

    def train(self) -> None:
        """Train to the last step. Raises Interrupted (state saved) or TrainingDiverged (last checkpoint stays)."""
        c, counters = self.config, self.counters
        metrics = NoMetrics() if distributed.rank() else Metrics(self.run.folder / METRICS, counters.metrics_bytes)
        rate, loss, plotted = Rate(), self._loss(), time.perf_counter()
        self.student.train()
        try:
            stepping = nullcontext() if self.stepping is None else self.stepping.attached()
            progress_bar = LiveProgress(self.console, self.steps, counters.step)
            with stepping, progress_bar as progress, catching_signals() as stopped:
                while counters.step < self.steps:
                    self._update(loss)
                    rate.add(self.tokens_per_step)
                    progress.advance(counters.step)
                    last = counters.step == self.steps
                    paused = time.perf_counter()
                    line: dict[str, Any] = {}
                    if self.evaluate is not None and c.eval_every and counters.step % c.eval_every == 0:
                        with progress.hidden(), nullcontext() if self.mean is None else self.mean.in_place():
                            line["perplexity"] = self.evaluate(self.student)
                            distributed.reshard(self.student)
                        rate.skip(paused)
                    if counters.step % c.log_every == 0 or line or last:
                        line = self._line(rate) | line
                        metrics.append(line)
                        progress.log(line, self.tokens_per_step)
                    paused = time.perf_counter()
                    kept = last and self.keep and c.checkpoint_every > 0
                    number = stopped()  # once: what comes later is the next step's, or else it would not be saved
                    if number or kept or (c.checkpoint_every and counters.step % c.checkpoint_every == 0):
                        self._save(metrics)
                        if paused - plotted > _PLOT_SECONDS:
                            self._plot()
                            plotted = paused
                        rate.skip(paused)
                    if number:
                        raise Interrupted(f"Stopped after step {counters.step} of {self.steps}", number)
        except BaseException:
            with suppress(NotSaved, ValueError):  # what ended the training may also keep the curve from being drawn
                self._plot()
            raise
        finally:
            self._quantize_activations(True)
            self._round_weights(WEIGHT_BITS)
            metrics.close()
        self._plot()
        if self.mean is not None:
            self.mean.exchange()

    def _update(self, loss: Loss) -> None:
        counters = self.counters
        c = self.config
        frozen = counters.step >= self.frozen_from
        set_rates(self.optimizer, rate_factor(counters.step, self.steps, c.warmup, c.lr_floor, c.schedule), frozen)
        self._quantize_activations(counters.step >= math.floor(c.activations_from * self.steps))
        self._round_weights(c.progressive_bits if counters.step < self.two_bits_from else WEIGHT_BITS)
        if self.two_bits_from and counters.step == self.two_bits_from:
            self._begin_two_bits()
        if counters.step == self.frozen_from:
            self._hold_codes()
        totals = torch.zeros(2, device=self.device)
        if self.stepping is not None:
            self.stepping.previous = counters.norm
        first, matching = counters.step * self.accum * self.batch, self._matching()
        parts = distributed.own_sequences(first, self.batch, self.accum)
        for i, (start, count) in enumerate(parts, start=1):
            if self.zero_stage == 1:
                distributed.stay_whole(self.student, i < len(parts))
            tokens_BT = self._resampled(self._tokens(start, count), start)
            found = distill(self.student, self.teacher, tokens_BT, loss, 1 / len(parts), matching, c.low_memory)
            totals += torch.stack(found) / len(parts)
        if self.stepping is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = self.stepping.norm()
        figures = (*distributed.mean(totals).tolist(), distributed.whole(norm).item())
        self._check(figures, tokens_BT)
        if self.stepping is None:
            nn.utils.clip_grads_with_norm_(self.parameters, c.grad_clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        counters.step += 1
        if c.pull and not frozen and counters.step > self.two_bits_from:
            for linear in self.linears:
                pull_to_levels(linear, c.pull * counters.step / self.steps)
        counters.norm = figures[-1]
        if self.mean is not None:
            self.mean.add(counters.step)
        counters.unlogged.append(figures)

    def _quantize_activations(self, on: bool) -> None:
        """Whether activations and KV cache are quantized, or pass as they are."""
        for module, bits in self.bits.items():
            module.bits = bits if on else UNQUANTIZED

    def _round_weights(self, bits: int) -> None:
        """How many bits the 2-bit layers' weights are rounded to."""
        for linear in self.linears:
            linear.bits = bits

    def _line(self, rate: Rate) -> dict[str, Any]:
        """A line of metrics.jsonl: means over the updates since the last one."""
        counters = self.counters
        means = [sum(column) / len(counters.unlogged) for column in zip(*counters.unlogged, strict=True)]
        counters.unlogged = []
        return {
            "step": counters.step,
            "tokens": counters.step * self.tokens_per_step,
            **dict(zip(("loss", "kl", "grad_norm"), means, strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": round(rate.read(), 1),
        }

    def _plot(self) -> None:
        lines = read_metrics(self.run.folder / METRICS)
        if lines and self.keep and not distributed.rank():
            plot_loss(self.run.folder / PLOT, lines, self.run.name)

    def _check(self, figures: tuple[float, ...], tokens_BT: Tensor) -> None:
        """Raises TrainingDiverged before the update is made, so that the parameters are the last good ones.

        With updates in the backward pass this comes after them; the last checkpoint is good then, too.
        """
        counters = self.counters
        value = figures[0]
        if not all(map(math.isfinite, figures)):
            gone = {} if self.stepping is None else self.stepping.norms
            where = first_not_finite(self.student, tokens_BT, gone)
            self._diverged(f"the {'gradient' if math.isfinite(value) else 'loss'} is not finite ({where})")
        previous = counters.smoothed_loss
        counters.smoothed_loss = value if previous is None else _SMOOTHING * previous + (1 - _SMOOTHING) * value
        counters.lowest_loss = min(counters.lowest_loss, counters.smoothed_loss)
        factor, margin = _EXPLODED
        if counters.smoothed_loss > factor * counters.lowest_loss + margin:
            self._diverged(
                f"the loss has risen from {counters.lowest_loss:.3f} to {counters.smoothed_loss:.3f} "
                f"(largest gradient for its size: {self._largest_gradient()})"
            )

    def _largest_gradient(self) -> str:
        if self.stepping is None:
            norms = {name: p.grad.norm() for name, p in self.student.named_parameters() if p.grad is not None}
        else:
            norms = self.stepping.norms
        return largest_gradient(self.student, norms)

    def _diverged(self, what: str) -> None:
        assert self.config.lr is not None
        raise TrainingDiverged(
            f"step {self.counters.step + 1}: {what}. Try --lr {self.config.lr / 3:.1e} (now {self.config.lr:.1e}), a "
            f"longer --warmup (now {self.config.warmup:g}) or a smaller --grad-clip (now {self.config.grad_clip:g}) "
            "in a new run"
        )


def _finite(tensor: Tensor) -> bool:
    return bool(distributed.whole(tensor.isfinite().all()))


def first_not_finite(student: Decoder, tokens_BT: Tensor, norms: Mapping[str, Tensor] | None = None) -> str:
    """Where the first value that is not finite comes up: in a forward pass, else in the gradients that are there.

    norms: of gradients that are gone, by parameter.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(x, Tensor) and not bool(x.isfinite().all()) for x in tensors):
                found.append(name)

        return hook

    for name, parameter in student.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    handles = [module.register_forward_hook(watch(name)) for name, module in student.named_modules() if name]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            student.hidden(tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"first in the output of {found[0]}"
    gone = [n for n, norm in (norms or {}).items() if not bool(norm.isfinite())]
    bad = gone or [n for n, p in student.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return f"first in the gradient of {bad[-1]}" if bad else "in the logits"


def largest_gradient(student: nn.Module, norms: Mapping[str, Tensor]) -> str:
    """The parameter whose gradient is largest in comparison with its values. norms: of gradients, by parameter."""
    ratios = {
        name: float(distributed.whole(norms[name]) / distributed.whole(p.detach().norm()).clamp(min=1e-12))
        for name, p in student.named_parameters()
        if name in norms
    }
    return max(ratios, key=lambda name: ratios[name])
