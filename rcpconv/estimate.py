"""What a training takes of each GPU's memory, and its time: a sum of explicit terms, scaled by what was measured.

The terms are theory. calibration.json holds factors between them and measurements, and says what was measured; none of
it is needed to read the terms. examples/benchmarks/measure_training.py measures, and writes that file. Knows nothing
of weights, texts, or which settings are best.

Over several GPUs, weights, states and teacher are cut into equal shares; every layer is put together where it is used,
and tables for all of a step. The sequences of a step are divided, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from rcpconv.config import SELF, QuantizeConfig
from rcpconv.train.losses import chunk_logits
from rcpconv.train.update import eight_bit_bytes
from rcpformat import spec
from rcpformat.architecture import Architecture, Quantization

_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 256}
"""Of a number in each form; 8-bit ones with their scales."""
_FLOAT32, _BFLOAT16 = 4, 2
_QUANTIZER_PARAMETERS = 4
"""Of each group: beta, gamma, s1, s2."""
_MOMENTS = 2
_LAYERS_TOGETHER = 2
"""Layers that are whole at a time when weights are spread over GPUs: the one in use, and the next on its way."""

# What a step costs. Matmuls: this share of the measured rate; on a CPU with all that goes with them. On CUDA beside
# them: seconds a byte that the backward pass keeps, a measure of a layer's elementwise work, a quarter of it when
# compiled. For each batch: quantizing a weight, forward and backward. Launching a layer's operations takes so long that
# small batches of small models take no less (48 ms for 6 layers of wiki-llama-22m, docs/log.md, 2026-11-29).
_EFFICIENCY = {"cpu": 0.45, "cuda": 0.6}
_SECONDS_PER_SAVED_BYTE = {"cpu": 0.0, "cuda": 1.2e-11}
_COMPILED = 0.25
_SECONDS_PER_WEIGHT = {"cpu": 5e-8, "cuda": 4e-11}
_SECONDS_PER_LAYER = {"cpu": 0.0, "cuda": 8e-3}
# For each step: the bytes that an update moves, at this share of an H200's 4e12 a second. Without torch.compile, small
# states move many more: 8-bit ones took 5.0 s beyond the rest of a step for 6.7e9 weights, those of others are counted.
_UPDATE_RATE = {"cpu": math.inf, "cuda": 2.5e12}
_EAGER_BYTES = {"fp32": 150.0, "bf16": 150.0, "int8": 1900.0}
_NOISE_BYTES = 4
"""Of the random number that a bfloat16 weight is rounded by."""
_LINK_BYTES = 3e11
"""A second, into each GPU from the others, of one host."""

_SAVED_HIDDEN, _SAVED_ATTENTION, _SAVED_KV, _SAVED_MLP = 26, 17, 33, 21
"""Bytes that the backward pass of a layer keeps of a token: for each channel of the residual stream, of the queries, of
keys and values together, and of the MLP. Measured with saved-tensor hooks, as tests/rcpconv/train/test_plan.py does."""


# Fitted to what compiled training takes at its peak, of 22 M, 1 B, 3 B and 7 B weights (docs/log.md, 2026-11-29).
# Without torch.compile nothing was measured on a GPU.
_COMPILED_SAVES = 0.55
"""What a compiled layer keeps, as a share of an eager one's."""
_PASSING = 0.2
"""What a layer's backward pass takes beside, as a share of what an eager one keeps."""
_EAGER_WEIGHTS = 6
"""Copies of the largest weight that its quantization makes, one operation after another."""
_TURNED, _TURNING, _CAYLEY = 5, 4, 12
"""Where rotations are learned: bytes that a layer keeps of a turned weight besides; copies of the largest weight that
turning makes; and those of R1 that Cayley's map does. The first is 4.5 by count of what autograd saves; the others were
supposed, and memory came out within 1% of the estimate at 7B and 1B, on an H200."""
_ROTATING = 1.37
"""Time of such a step, as a share of one of training whose layers are computed twice and not compiled: 1.39 at 7B and
1.35 at 1B, on an H200."""
_CHUNKS = 4
"""Arrays of a chunk's logits."""
_HEADS_IN_LOSS, _HEADS = 3, 2
"""Arrays of the head's size: its integers, their gradient, and for a while what rounding keeps. A table that is
embedding and head has a second gradient in the end."""

EAGER, COMPILED = "eager", "compiled"
SCALED = ("activations", "working space")
"""The terms that a measurement corrects: the others follow from shapes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured over estimated, for training without and with torch.compile."""

    device: str | None = None
    """What was measured on; None for theory alone."""
    memory: Mapping[str, float] = field(default_factory=lambda: {EAGER: 1.0, COMPILED: 1.0})
    """Of the terms in SCALED."""
    seconds: Mapping[str, float] = field(default_factory=lambda: {EAGER: 1.0, COMPILED: 1.0})
    measured: tuple[Mapping[str, Any], ...] = ()
    """What the factors come from, as measure_training.py wrote it."""

    def says(self) -> str:
        """Where an estimate comes from, in a few words."""
        if self.device is None:
            return "uncalibrated: theory alone"
        return f"calibrated by {len(self.measured)} measurements on {self.device}"


@cache
def calibration() -> Calibration:
    """The package's."""
    values = json.loads((resources.files("rcpconv") / "calibration.json").read_text(encoding="utf-8"))
    return Calibration(**values | {"measured": tuple(values["measured"])})


def linear_weights(architecture: Architecture) -> int:
    """How many weights all 2-bit layers have."""
    return architecture.num_layers * sum(math.prod(spec.linear_shape(architecture, kind)) for kind in spec.LINEARS)


def parameters(architecture: Architecture, quantization: Quantization) -> tuple[int, int]:
    """(numbers that are weights, numbers that are weight quantizers') of what is trained."""
    a = architecture
    groups = 0
    for name in spec.linear_names(a):
        n, k = spec.linear_shape(a, spec.linear_kind(name))
        groups += n * spec.ceil_div(k, quantization.group_of(name))
    tables = a.vocab_size * a.hidden_size * (1 if a.tied_table else 2) + a.head_matrix * a.hidden_size**2
    return linear_weights(a) + tables, _QUANTIZER_PARAMETERS * groups


def _weight_bytes(config: QuantizeConfig) -> float:
    return _BYTES["bf16" if config.master_weights == "bf16" else "fp32"]


def _states(config: QuantizeConfig) -> str:
    return "fp32" if config.optimizer_states == "auto" else config.optimizer_states


def _state_bytes(config: QuantizeConfig) -> float:
    """Of a parameter: AdamW's two states (Muon has one, for weights), and a running mean."""
    return _MOMENTS * _BYTES[_states(config)] + (_FLOAT32 if config.ema else 0)


def _optimizer_bytes(config: QuantizeConfig, architecture: Architecture, quantization: Quantization) -> float:
    """Of all states and the running mean. 8-bit ones have blocks within the rows of a parameter, or are float32."""
    a = architecture
    weights, quantizers = parameters(a, quantization)
    if _states(config) != "int8":
        return _state_bytes(config) * (weights + quantizers)
    tables = weights - linear_weights(a)
    total = tables * eight_bit_bytes(a.hidden_size)
    for name in spec.linear_names(a):
        n, k = spec.linear_shape(a, spec.linear_kind(name))
        groups = spec.ceil_div(k, quantization.group_of(name))
        total += n * k * eight_bit_bytes(k) + _QUANTIZER_PARAMETERS * n * groups * eight_bit_bytes(groups)
    return _MOMENTS * total + (_FLOAT32 if config.ema else 0) * (weights + quantizers)


def update_bytes(config: QuantizeConfig) -> float:
    """What an update moves for a weight: its gradient, read for the norm, scaled, and read; itself; its states."""
    early, narrow, states = config.step_in_backward == "on", config.master_weights == "bf16", _states(config)
    clipped = (6 if early else 4) * _weight_bytes(config)  # an early one's infinities are taken out, too
    if config.compile != "on" and (narrow or states != "fp32"):
        return clipped + _EAGER_BYTES[states]
    noise = 2 * _NOISE_BYTES if narrow else 0
    return clipped + 2 * (_weight_bytes(config) + _state_bytes(config)) + noise


def checkpoint_bytes(config: QuantizeConfig, architecture: Architecture, quantization: Quantization) -> int:
    """Of one checkpoint of a training, on disk."""
    weights, quantizers = parameters(architecture, quantization)
    if config.checkpoint_contents == "all":
        states = _optimizer_bytes(config, architecture, quantization)
    else:
        states = (_FLOAT32 if config.ema else 0) * (weights + quantizers)
    return round(_weight_bytes(config) * weights + _FLOAT32 * quantizers + states)


def own_batches(config: QuantizeConfig, gpus: int) -> tuple[int, int]:
    """(sequences of a batch, batches of a step) of each GPU."""
    assert config.batch_size is not None and config.grad_accum is not None
    own = math.ceil(config.batch_size * config.grad_accum / gpus)
    sequences = min(config.batch_size, own)
    return sequences, math.ceil(own / sequences)


def memory(
    config: QuantizeConfig,
    architecture: Architecture,
    quantization: Quantization,
    kind: str,
    gpus: int = 1,
    factors: Calibration | None = None,
    zero_stage: int = 3,
) -> dict[str, int]:
    """Bytes of each device's memory by what they are for. kind: cpu or cuda. gpus: that weights are spread over, in the
    way of Plan.zero_stage.

    At the largest: in training, or over several GPUs before it, where models are whole then (with what training's
    working space and activations take, which is more than the start needs). They are for settings that
    start so (QuantizeConfig.starts_whole); and one GPU has the whole teacher where that writes texts. Otherwise layers
    are shared out as they are made, which takes less than training.
    """
    a = architecture
    linear, table = linear_weights(a), a.vocab_size * a.hidden_size
    weights, quantizers = parameters(a, quantization)
    learnt = _weight_bytes(config)
    layer, largest_weight = linear // a.num_layers, _largest_weight(a)
    layer_quantizers = quantizers // a.num_layers
    teacher = _teacher_bytes(config)
    gathered = 0.0
    if gpus > 1:  # layers put together, and what is computed of them before it is spread
        whole, tables = learnt * layer + _FLOAT32 * layer_quantizers, weights - linear
        gathered = _LAYERS_TOGETHER * (whole + teacher * layer) + whole + 2 * learnt * tables + 2 * teacher * table
        if zero_stage < 3:  # all weights are put together, and the gradients of some layers, or of all
            gathered = learnt * (weights + tables) + _FLOAT32 * quantizers + _LAYERS_TOGETHER * whole
        if zero_stage == 1:
            gathered += learnt * weights + _FLOAT32 * quantizers
    factor = (factors or calibration()).memory[COMPILED if config.compile == "on" else EAGER]
    peak = max(_moments(config, a, quantization, kind, gpus), key=sum)
    whole_teacher = teacher * (linear + 2 * table)
    needs = {
        "weights": learnt * weights / gpus,
        "quantizers": _FLOAT32 * quantizers / gpus,
        "gradients": peak.gradients,
        "optimizer": _optimizer_bytes(config, a, quantization) / gpus,
        "original model": whole_teacher / (gpus if zero_stage == 3 else 1),
        "activations": factor * peak.activations,
        "working space": factor * peak.working + gathered,
    }
    if gpus > 1:
        before = {"gradients": 0.0, "optimizer": 0.0, "original model": whole_teacher}
        before["working space"] = factor * peak.working
        starts = [needs]
        if config.starts_whole:
            starts.append(needs | before | {"weights": _FLOAT32 * weights, "quantizers": _FLOAT32 * quantizers})
        if SELF in config.data:
            starts.append(needs | before | {"weights": 0.0, "quantizers": 0.0})
        needs = max(starts, key=lambda each: sum(each.values()))
    if config.steps == 0:  # a layer at a time; beside it a matrix in float64, and one with its codes as int64
        needs = {"weights": _FLOAT32 * layer, "quantizers": _FLOAT32 * layer_quantizers}
        needs["working space"] = 7 * _FLOAT32 * largest_weight
    return {name: round(nbytes) for name, nbytes in needs.items()}


def rotation_memory(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, kind: str, sequences: int
) -> dict[str, int]:
    """As `memory`, of each device while rotations are learned in batches of so many sequences.

    Every device has both models whole. Layers are computed twice and not compiled, and no weight has a gradient.
    """
    a, how = architecture, _rotating(config, sequences)
    linear, table = linear_weights(a), a.vocab_size * a.hidden_size
    weights, quantizers = parameters(a, quantization)
    factor = calibration().memory[EAGER]
    peak = max(_moments(how, a, quantization, kind, 1), key=lambda moment: moment.activations + moment.working)
    turning = _TURNING * _FLOAT32 * _largest_weight(a) + _CAYLEY * _FLOAT32 * a.hidden_size**2
    needs = {
        "weights": _FLOAT32 * weights,
        "quantizers": 2 * _FLOAT32 * quantizers,  # the levels of this step and the next
        "gradients": _FLOAT32 * (weights - linear),
        "optimizer": _MOMENTS * _FLOAT32 * a.hidden_size**2,
        "original model": _teacher_bytes(config) * (linear + 2 * table),
        "activations": factor * peak.activations + _TURNED * (linear // a.num_layers),
        "working space": factor * peak.working + turning + 2 * _FLOAT32 * table,  # turned where it is used
    }
    return {name: round(nbytes) for name, nbytes in needs.items()}


def rotation_seconds(
    config: QuantizeConfig, architecture: Architecture, kind: str, flops: float, gpus: int, sequences: int
) -> float:
    """Time of a step of learning rotations, with as many tokens as one of training, in batches of so many sequences."""
    own, batches = own_batches(config, gpus)
    return _ROTATING * step_seconds(_rotating(config, sequences, own * batches // sequences), architecture, kind, flops)


def _rotating(config: QuantizeConfig, sequences: int, batches: int = 1) -> QuantizeConfig:
    """As it is while rotations are learned, of one device; an update like that of plain training is counted."""
    plain = {"optimizer_states": "fp32", "master_weights": "fp32", "ema": 0.0, "pull": 0.0}
    left_out = {"resample": 0.0, "hidden_loss": 0.0, "step_in_backward": "off", "compile": "off"}
    return config.changed(grad_checkpointing="on", batch_size=sequences, grad_accum=batches, **plain, **left_out)


def _kept_bytes(config: QuantizeConfig) -> int:
    """Of a number that is multiplied by, in the forward pass and for the backward pass."""
    return _BFLOAT16 if config.precision == "bf16" else _FLOAT32


def _teacher_bytes(config: QuantizeConfig) -> float:
    """Of a number of the original model."""
    return _BYTES["int8"] if config.teacher_weights == "int8" else _kept_bytes(config)


def _largest_weight(architecture: Architecture) -> int:
    return max(math.prod(spec.linear_shape(architecture, kind)) for kind in spec.LINEARS)


class _Moment(NamedTuple):
    """What there is in one moment of a step beside what is always there, in bytes of each device."""

    gradients: float
    activations: float
    working: float


def _moments(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, kind: str, gpus: int
) -> list[_Moment]:
    """Those of a step that may need most: in the loss, and when the layers' backward pass begins and ends."""
    a = architecture
    weights, quantizers = parameters(a, quantization)
    layer, table = linear_weights(a) // a.num_layers, a.vocab_size * a.hidden_size
    learnt, compiled = _weight_bytes(config), config.compile == "on"
    assert config.seq_len is not None
    sequences, batches = own_batches(config, gpus)
    tokens = sequences * config.seq_len

    every = (learnt * weights + _FLOAT32 * quantizers) / gpus
    few = (learnt * max(layer, table) + _FLOAT32 * (quantizers // a.num_layers)) / gpus
    early = config.step_in_backward == "on"  # only those of a compiled layer, or of a table, are there together
    before = every if batches > 1 and not early else 0.0

    saved = (_COMPILED_SAVES if compiled else 1.0) * tokens * saved_bytes(a)
    of_layer = saved + (_kept_bytes(config) + 1) * layer  # with the weights' integers and codes
    live = of_layer if config.grad_checkpointing == "on" else a.num_layers * of_layer
    one_stream = tokens * _FLOAT32 * a.hidden_size
    streams = (1 + 2 * bool(config.hidden_loss)) * a.num_layers * one_stream

    chunk = min(tokens * a.vocab_size, chunk_logits(kind, a.vocab_size, config.low_memory))
    passing = _PASSING * tokens * saved_bytes(a)
    if not compiled:
        passing += _EAGER_WEIGHTS * _FLOAT32 * _largest_weight(a)
    tables = _FLOAT32 * table
    in_loss = 0.0 if config.grad_checkpointing == "on" else live
    return [
        _Moment(before, in_loss + streams, _HEADS_IN_LOSS * tables + _CHUNKS * _FLOAT32 * chunk),
        _Moment(max(before, few), live + streams, passing + _HEADS * tables),
        _Moment(few if early else every, of_layer + one_stream, passing + (_HEADS + a.tied_table) * tables),
    ]


def saved_bytes(architecture: Architecture) -> int:
    """What the backward pass of a layer keeps of a token."""
    a = architecture
    attention = _SAVED_ATTENTION * a.attention_size + _SAVED_KV * a.kv_size
    return _SAVED_HIDDEN * a.hidden_size + attention + _SAVED_MLP * a.intermediate_size


def step_seconds(
    config: QuantizeConfig,
    architecture: Architecture,
    kind: str,
    flops: float,
    gpus: int = 1,
    factors: Calibration | None = None,
    zero_stage: int = 3,
) -> float:
    """Time of an optimizer step: 6 operations a weight and token for the student, 2 for the teacher, and the rest.

    flops: of each device, in large matmuls. Over several GPUs, layers travel while others compute: what takes longer.
    """
    assert config.seq_len is not None
    sequences, batches = own_batches(config, gpus)
    a = architecture
    linear, table = linear_weights(a), a.vocab_size * a.hidden_size
    attention = a.num_layers * a.attention_size * config.seq_len  # as many weights as its products count for
    again = config.grad_checkpointing == "on"
    passes = 8 + (2 if again else 0) + (2 if config.resample else 0)  # which asks the teacher once more, at the most
    tokens = sequences * config.seq_len
    products = passes * tokens * (linear + table + attention) / (flops * _EFFICIENCY[kind])
    elementwise = _SECONDS_PER_SAVED_BYTE[kind] * tokens * a.num_layers * saved_bytes(a)
    if config.compile == "on":
        elementwise *= _COMPILED
    computing = products + elementwise + _SECONDS_PER_WEIGHT[kind] * (linear + table)
    computing = max(computing, _SECONDS_PER_LAYER[kind] * a.num_layers)
    if gpus > 1:  # the student's weights come forward and backward, and its gradients go; the teacher's come once
        teacher = _teacher_bytes(config) * (2 if config.resample else 1)
        passing = 3 * _weight_bytes(config) + teacher
        if zero_stage < 3:  # weights come forward alone, and everybody has the teacher
            passing = 2 * _weight_bytes(config) / (batches if zero_stage == 1 else 1)
        travelling = passing * linear / _LINK_BYTES
        computing = max(computing, travelling)
    updating = update_bytes(config) * (linear + table) / gpus / _UPDATE_RATE[kind]
    factor = (factors or calibration()).seconds[COMPILED if config.compile == "on" else EAGER]
    return (batches * computing + updating) * factor
