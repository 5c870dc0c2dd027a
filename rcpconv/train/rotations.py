"""Learns rotations before training: those that cost the least when the model is quantized as it stands.

After SpinQuant (arXiv 2405.16406), reconstructed for 2-bit weights: R1 and R2 start as Hadamard matrices and move on
the orthogonal group by Cayley's map (torch's parametrization), down the divergence from the teacher. Weights,
activations and KV cache are quantized meanwhile, and no weight learns. Departures: Adam takes the steps; weights have
Lloyd-Max levels, whatever the method, which follow the rotation by an iteration a step; gradients reach a weight
straight through the rounding, and by its level too, the mean of the weights that share it. They also go through a
token's largest value, which its activation scale is taken from. Learning that is stopped goes on from where it was.

Shape suffixes: B sequences, T positions, C hidden_size, L layers, D head_dim, N out-features, K in-features, G groups,
g weights of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from rcpconv import distributed
from rcpconv.errors import BadRun, TrainingDiverged
from rcpconv.layers import ActivationQuantizer, HeadMatrix, QuantLinear, QuantTable
from rcpconv.model import Decoder
from rcpconv.quantizers.base import WeightQuantizer, channel_weights, to_groups
from rcpconv.quantizers.functional import ZERO_TOKEN, Quantized, quantize_activations
from rcpconv.quantizers.levels import assign, lloyd_max, select_nearest, sums_by_code
from rcpconv.rotations import LearnedRotations
from rcpconv.train.checkpoints import StateFile
from rcpconv.train.losses import Distillation, distill
from rcpconv.train.optimizer import rate_factor
from rcpconv.train.stopping import Interrupted, catching_signals

BETAS = (0.9, 0.95)
_WARMUP = 0.05
_LINES = 10
"""How often it is said how far it is."""


class _Rotation(nn.Module):
    """One orthogonal matrix, or several, from the identity on."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(shape[-1], device=device).expand(shape).clone())
        orthogonal(self, orthogonal_map="cayley")


class _Turned(nn.Module):
    """Gives a parameter as it is with the rotations of the moment."""

    def __init__(self, name: str, now: Callable[[], LearnedRotations]) -> None:
        super().__init__()
        self.name, self.now = name, now

    def forward(self, value: Tensor) -> Tensor:
        return self.now().turned(self.name, value)


class _FollowingLevels(WeightQuantizer):
    """Lloyd-Max levels of a weight that turns: means of the weights nearest to the levels of the step before."""

    def __init__(self, weight_NK: Tensor, group_size: int) -> None:
        n, k = weight_NK.shape
        super().__init__(n, k, group_size)
        self.counts_Gg = channel_weights(k, group_size, None, weight_NK.device)
        self.before_NG4 = self.next_NG4 = lloyd_max(to_groups(weight_NK.detach().float(), group_size), self.counts_Gg)

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        code = assign(grouped_NGg.detach(), self.before_NG4)
        mass_NG4 = sums_by_code(self.counts_Gg.expand_as(grouped_NGg), code)
        mean_NG4 = sums_by_code(grouped_NGg * self.counts_Gg, code) / mass_NG4.clamp(min=1)
        levels_NG4 = torch.where(mass_NG4 > 0, mean_NG4, self.before_NG4)
        self.next_NG4 = levels_NG4.detach()
        return levels_NG4

    def select(self, grouped_NGg: Tensor, levels_NG4: Tensor, rounded_NG4: Tensor, scale_N: Tensor) -> Tensor:
        """See WeightQuantizer."""
        return select_nearest(grouped_NGg, levels_NG4, rounded_NG4, scale_N)

    def follow(self) -> None:
        """End a step. Not in `levels`, since a layer may be computed twice."""
        self.before_NG4 = self.next_NG4


class _ByPeak(nn.Module):
    """An activation quantizer whose scale has a gradient by the token's largest value."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.bits, self.clip = quantizer.bits, quantizer.clip.detach()

    def forward(self, x: Tensor) -> Quantized:
        peak = x.abs().amax(dim=-1, keepdim=True).clamp(min=ZERO_TOKEN)
        return quantize_activations(x, self.clip * (peak / peak.detach()), self.bits)


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Where learning that is stopped goes on, in as many processes or others."""

    file: StateFile
    every: int
    """Steps from one save to the next; 0 = only when stopped."""


def learn_rotations(
    student: Decoder,
    teacher: Decoder,
    batches: Callable[[int], Sequence[Tensor]],
    *,
    steps: int,
    rate: float,
    r1: bool,
    r2: bool,
    tell: Callable[[str], None],
    keeping: Keeping | None = None,
    low_memory: bool = False,
) -> LearnedRotations:
    """Learn R1, R2 of every layer, both or neither; the student is as it was in the end. Returns float64 matrices.

    batches: step -> (B, T) ids of this process's batches, as many and of one size in all processes. rate: the largest
    one, of Adam, for the entries of Cayley's skew matrices. r1: a model with one table needs a head matrix for it, as
    its head turns back by Hadamard otherwise. Quantizers need not be initialised. tell: hears of the divergence, in
    nats. keeping: with it, Ctrl-C and SIGTERM raise Interrupted once all is saved. Raises TrainingDiverged where the
    divergence is not finite.
    """
    a, device = student.architecture, student.inv_freq.device
    assert not (r1 and a.tied_table and not a.head_matrix), "one table knows of Hadamard rotations alone"
    found: dict[str, _Rotation] = {}
    if r1:
        found["r1_CC"] = _Rotation(a.hidden_size, a.hidden_size, device=device)
    if r2:
        found["r2_LDD"] = _Rotation(a.num_layers, a.head_dim, a.head_dim, device=device)
    if not found:
        return LearnedRotations()
    parameters = [parameter for each in found.values() for parameter in each.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=BETAS)
    now, loss, begin = LearnedRotations(), Distillation(kind="kl"), 0
    turning, signals = _turning(student, lambda: now), catching_signals() if keeping else nullcontext(lambda: 0)
    with turning as quantizers, _fast_products(device), signals as stopped:
        if keeping and (state := keeping.file.load()):
            with _fitting(keeping.file):
                begin = _go_on(state, found, optimizer, quantizers)
            tell(f"rotations: going on after step {begin} of {steps}")
        for step in range(begin, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps, _WARMUP, 0.0, "linear")
            parts = batches(step)
            kl = torch.zeros((), device=device)
            for tokens_BT in parts:
                now = LearnedRotations(**{name: each.weight for name, each in found.items()})
                kl += distill(student, teacher, tokens_BT, loss, 1 / len(parts), low_memory=low_memory)[1] / len(parts)
            for parameter in parameters:
                if parameter.grad is not None:
                    distributed.mean(parameter.grad)
            kl = distributed.mean(kl)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for quantizer in quantizers:
                quantizer.follow()
            done = step + 1
            if done in (1, steps) or done % max(1, steps // _LINES) == 0:
                _require_finite(kl, done, rate)
                tell(f"rotations: step {done} of {steps}, KL {float(kl):.4f}")
            number = stopped()
            if keeping and (number or (keeping.every and done % keeping.every == 0)):
                _require_finite(kl, done, rate)
                if not distributed.rank():
                    keeping.file.save(_state(done, found, optimizer, quantizers))
                distributed.wait_for_all()  # a process that ends early ends the others, too
            if number:
                raise Interrupted(f"Stopped after step {done} of {steps} of the rotations", number)
    with torch.no_grad():
        return LearnedRotations(**{name: each.double().weight.detach() for name, each in found.items()})


def _require_finite(kl: Tensor, step: int, rate: float) -> None:
    if not math.isfinite(float(kl)):
        raise TrainingDiverged(
            f"rotations: step {step}: KL is not finite. Try --rotation-lr {rate / 3:.1e} (now {rate:.1e}), or "
            "--rotation-steps 0, in a new run"
        )


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Within, a GPU multiplies float32 matrices, as it turns weights, in TF32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _turning(student: Decoder, now: Callable[[], LearnedRotations]) -> Iterator[list[_FollowingLevels]]:
    """Within, the student's weights are turned, quantized to the levels that are given, and do not learn."""
    learning = {p: p.requires_grad for p in student.parameters()}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    turned: list[tuple[nn.Module, str]] = []
    quantizers: list[_FollowingLevels] = []
    for module in list(student.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ActivationQuantizer):
                swapped.append((module, name, child))
                setattr(module, name, _ByPeak(child))
        if isinstance(module, QuantLinear):
            swapped.append((module, "quantizer", module.quantizer))
            quantizers.append(_FollowingLevels(module.weight, module.quantizer.group_size))
            module.quantizer = quantizers[-1]
        if isinstance(module, QuantLinear | QuantTable | HeadMatrix):
            turned += [(module, part) for part, _ in module.named_parameters(recurse=False)]
    names = {module: name for name, module in student.named_modules()}
    for module, part in turned:
        if not isinstance(module, QuantTable):  # losses.distill wants the table's gradient, turned or not
            getattr(module, part).requires_grad_(False)
        parametrize.register_parametrization(module, part, _Turned(f"{names[module]}.{part}", now), unsafe=True)
    try:
        yield quantizers
    finally:
        for module, part in turned:
            parametrize.remove_parametrizations(module, part, leave_parametrized=False)
        for module, name, child in swapped:
            setattr(module, name, child)
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
            parameter.grad = None


def _state(
    step: int, found: dict[str, _Rotation], optimizer: torch.optim.Optimizer, quantizers: list[_FollowingLevels]
) -> dict[str, Any]:
    """All that learning goes on from after `step` steps."""
    return {
        "step": step,
        "rotations": {name: each.state_dict() for name, each in found.items()},
        "optimizer": optimizer.state_dict(),
        "levels": [quantizer.before_NG4 for quantizer in quantizers],
    }


@contextmanager
def _fitting(file: StateFile) -> Iterator[None]:
    """Within, what does not fit the model is the file's fault."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BadRun(f"{file.path}: is of another model or version ({error}); {file.remedy}") from error


def _go_on(
    state: dict[str, Any],
    found: dict[str, _Rotation],
    optimizer: torch.optim.Optimizer,
    quantizers: list[_FollowingLevels],
) -> int:
    """As it was when `_state` gave the state; returns how many steps were made."""
    for name, each in found.items():
        each.load_state_dict(state["rotations"][name])
    optimizer.load_state_dict(state["optimizer"])
    for quantizer, levels_NG4 in zip(quantizers, state["levels"], strict=True):
        quantizer.before_NG4 = quantizer.next_NG4 = levels_NG4.to(quantizer.before_NG4.device)
    return int(state["step"])
