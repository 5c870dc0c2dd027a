"""Every setting of `rcpconv quantize`: one frozen dataclass, its checks, and its TOML form.

The command line and the TOML recipe are generated from these fields, so a setting is described here and nowhere else.
None stands for "decide from the model and the machine" (rcpconv/plan.py). Knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rcpconv.errors import BadOption

METHODS = ("ldp", "ldp-udq", "lc", "uniform", "seq", "r2q", "rtn")
UNTRAINED = ("rtn",)
"""Methods without training."""
NEEDS_TEXT = ("start", "rotation_steps")
"""Settings that training text is read for, beside training itself."""
TABLES = ("auto", "one", "two")
LOSSES = ("kl", "cakld", "mix")
SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("adamw", "muon")
LEVEL_GRADIENTS = ("exact", "residual")
RANGES = ("moving", "fixed")
LR_SCALES = ("absolute", "relative")
STARTS = ("weights", "data", "feedback")
HELD = ("ldp", "lc", "seq", "r2q")
"""Methods whose levels error feedback can hold."""
PRECISIONS = ("auto", "bf16", "fp32")
AUTO = "auto"
"""Stands for a value that is decided from model and machine when a run begins."""
SWITCH = ("auto", "on", "off")
STATES = ("auto", "fp32", "bf16", "int8")
TEACHERS = ("auto", "full", "int8")
MASTERS = ("auto", "fp32", "bf16")
CONTENTS = ("all", "weights")

DEMO = "demo"
"""As a model: the bundled one. As a text: what is bundled with it."""
DEFAULT_CORPUS = "default"
"""As a text: WikiText-2 and Dolly from the Hub."""
SELF = "self"
"""As a text: sampled from the model itself."""

DEFAULT_RECIPE = "default"
"""Name of the recipe that holds where no other is given, and under a file; never under `paper`, which is complete."""
RECIPES = (DEFAULT_RECIPE, DEMO, "paper")
"""Bundled recipes, by name."""
BUNDLED = resources.files("rcpconv") / "recipes"

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB]?)")
_COUNT_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of a setting beside its default."""

    help: str
    group: str
    type: Any = str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    above: float | None = None
    high: float | None = None
    count: bool = False
    """Takes 20M for 20,000,000."""
    pattern: str = ""
    """A regular expression for the whole of a string."""
    pattern_help: str = ""
    """What `pattern` asks for, in words."""
    many: int = 1
    """How many values: 1, another fixed number, or 0 for any number."""
    optional: bool = False
    free: bool = False
    """May differ when a run is resumed: it changes what is kept, not what is computed."""

    def check(self, name: str, value: Any) -> Any:
        """The value, an int made a float where a float is meant. Raises BadOption."""
        if self.many != 1:
            if isinstance(value, str) or not isinstance(value, list | tuple) or self.many not in (0, len(value)):
                expected = f"{self.many} values" if self.many else "a list"
                raise BadOption(f"{name}: expected {expected}, found {value!r}")
            return tuple(self.check_one(name, item) for item in value)
        return None if value is None and self.optional else self.check_one(name, value)

    def check_one(self, name: str, value: Any) -> Any:
        """As check, for one of several values."""
        if self.count and isinstance(value, str):
            value = parse_count(name, value)
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.type:  # a bool is no integer here
            raise BadOption(f"{name}: expected {_TYPE_NAMES[self.type]}, found {value!r}")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise BadOption(f"{name}: expected a value {self.pattern_help}; found {value!r}")
        if self.choices and value not in self.choices:
            raise BadOption(f"{name}: expected one of {', '.join(map(str, self.choices))}; found {value!r}")
        if self.type is float and not math.isfinite(value):
            raise BadOption(f"{name}: expected a finite number, found {value!r}")
        if self.low is not None and value < self.low:
            raise BadOption(f"{name}: expected at least {self.low:g}, found {value!r}")
        if self.above is not None and value <= self.above:
            raise BadOption(f"{name}: expected more than {self.above:g}, found {value!r}")
        if self.high is not None and value > self.high:
            raise BadOption(f"{name}: expected at most {self.high:g}, found {value!r}")
        return value


_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def parse_count(name: str, text: str) -> int:
    """ "20M" -> 20000000. Raises BadOption naming the option."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise BadOption(f"{name}: expected a count such as 500000, 500k or 20M; found {text!r}")
    return round(float(match[1]) * _COUNT_FACTORS[match[2].lower()])


def _option(default: Any, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(**known)})


def _required(**known: Any) -> Any:
    return field(metadata={"option": Option(**known)})


GROUPS = FORM, DATA, TRAINING, MACHINE, RUN = "Form of the file", "Texts", "Training", "Machine", "Run"


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What to quantize and how. Cannot be built wrong: raises BadOption naming the field."""

    model: str = _required(group=RUN, help="A folder, a Hub id, or demo.")
    revision: str | None = _option(
        None, optional=True, group=RUN, help="Branch, tag or commit of a Hub model. Default: main."
    )

    method: str = _option(
        "ldp",
        choices=METHODS,
        group=FORM,
        help="2-bit weight quantizer. ldp: RCP's learned levels (ldp-udq: uniform dequantization; lc: learned clip "
        "alone); uniform: BitDistiller; seq: ParetoQ; r2q: two 1-bit stages; rtn: round to nearest, no training.",
    )
    group_size: int = _option(128, type=int, choices=(64, 128), group=FORM, help="Weights that share four levels.")
    group_size_of: tuple[str, ...] = _option(
        (),
        many=0,
        group=FORM,
        pattern=r"(layers\.\d+\.)?(q|k|v|o|gate|up|down)_proj=(64|128)",
        pattern_help="such as down_proj=64 or layers.0.q_proj=64",
        help="Another group size for some linears: down_proj=64 in every layer, layers.0.down_proj=64 in one. May be "
        "repeated; where several are for the same linear, the last one holds.",
    )
    a_bits: int = _option(
        4, type=int, choices=(4, 8, 16), group=FORM, help="Bits of the activations; 16: as they are, never in a file."
    )
    kv_bits: int = _option(
        4, type=int, choices=(4, 8, 16), group=FORM, help="Bits of the KV cache; 16: as it is, never in a file."
    )
    head_bits: int = _option(8, type=int, choices=(8, 16), group=FORM, help="Bits of the output head.")
    embed_bits: int = _option(8, type=int, choices=(8, 16), group=FORM, help="Bits of the embedding.")
    tables: str = _option(
        "auto",
        choices=TABLES,
        group=FORM,
        help="Keep one table for embedding and head, or store two. auto: one where the model's are tied.",
    )
    r1: bool = _option(True, type=bool, group=FORM, help="Rotate the residual stream.")
    r2: bool = _option(True, type=bool, group=FORM, help="Rotate the value heads.")
    r3: bool = _option(True, type=bool, group=FORM, help="Rotate queries and keys.")
    r4: bool = _option(True, type=bool, group=FORM, help="Rotate down_proj's input.")

    data: tuple[str, ...] = _option(
        (),
        many=0,
        group=DATA,
        help="Training text; repeat for several: a .txt or .jsonl file (.gz and .xz too), a folder of them, "
        "hf:org/name[:config[:split]], self (sampled from the model), demo, or default (WikiText-2 and Dolly). "
        "Default: demo for the demo model, otherwise default.",
    )
    self_tokens: int = _option(
        1_000_000,
        type=int,
        count=True,
        low=1,
        group=DATA,
        help="At most so many tokens are sampled from the model for --data self; longer trainings repeat them.",
    )
    self_epochs: float = _option(
        2.0,  # serves the demo as well as once does, for half the sampling
        type=float,
        above=0,
        group=DATA,
        help="How often each sampled token is trained on: as many are sampled as that needs, up to --self-tokens.",
    )
    self_share: float = _option(
        0.5,
        type=float,
        above=0,
        high=1,
        group=DATA,
        help="Share of the sequences that are sampled, where --data names other texts beside self.",
    )
    resample: float = _option(
        0.0,
        type=float,
        low=0,
        high=1,
        group=DATA,
        help="Share of the tokens that are drawn anew from the original's predictions whenever a text is trained on "
        "again, so that it is not learned by heart.",
    )
    resample_after: int = _option(
        1,
        type=int,
        low=0,
        group=DATA,
        help="How often a text is trained on as it is before --resample changes it; with 0 it is changed from the "
        "first time on.",
    )
    eval_data: str | None = _option(
        None,
        optional=True,
        group=DATA,
        help="Text to measure perplexity on: a file, demo, or default (WikiText-2 test). Default: none.",
    )
    max_eval_tokens: int | None = _option(
        None, type=int, count=True, low=1, optional=True, group=DATA, help="Use this much of it. Default: all."
    )
    tokens: int | None = _option(
        None,
        type=int,
        count=True,
        low=1,
        optional=True,
        group=DATA,
        help="Tokens to train on, such as 20M; texts are repeated as often as needed. Default: 20M.",
    )
    steps: int | None = _option(
        None,
        type=int,
        low=0,
        optional=True,
        group=DATA,
        help="Optimizer steps to train for, instead of --tokens; 0 for no training.",
    )
    seq_len: int | None = _option(
        None,
        type=int,
        low=2,
        optional=True,
        group=DATA,
        help="Tokens of a training sequence. Default: 2048, or the model's context where that is shorter.",
    )

    step_sequences: int = _option(
        8,
        type=int,
        low=1,
        group=TRAINING,
        help="Sequences of an optimizer step, where --batch-size or --grad-accum are not given.",
    )
    batch_size: int | None = _option(
        None,
        type=int,
        low=1,
        optional=True,
        group=TRAINING,
        help="Sequences in memory at a time. Default: as many of --step-sequences as fit.",
    )
    grad_accum: int | None = _option(
        None,
        type=int,
        low=1,
        optional=True,
        group=TRAINING,
        help="Batches added up for one optimizer step. Default: what makes it --step-sequences.",
    )
    lr: float | None = _option(
        None,
        type=float,
        above=0,
        optional=True,
        group=TRAINING,
        help="Peak learning rate of the weights. Default: --lr-factor · 2e-5 · (4096 / hidden_size)^1.5.",
    )
    quantizer_lr: float | None = _option(
        None,
        type=float,
        low=0,
        optional=True,
        group=TRAINING,
        help="Peak learning rate of weight clips and partitions. Default: --quantizer-factor times --lr.",
    )
    clip_lr: float | None = _option(
        None,
        type=float,
        low=0,
        optional=True,
        group=TRAINING,
        help="Peak learning rate of the activation and KV clips. Default: --clip-factor times --lr.",
    )
    table_lr: float | None = _option(
        None,
        type=float,
        low=0,
        optional=True,
        group=TRAINING,
        help="Peak learning rate of embedding and head. Default: --lr.",
    )
    lr_factor: float = _option(
        1.0, type=float, above=0, group=TRAINING, help="Of the rate that follows from the model's size, without --lr."
    )
    quantizer_factor: float = _option(
        10.0, type=float, low=0, group=TRAINING, help="--quantizer-lr in units of --lr, where it is not given."
    )
    clip_factor: float = _option(
        10.0, type=float, low=0, group=TRAINING, help="--clip-lr in units of --lr, where it is not given."
    )
    lr_scale: str = _option(
        "absolute",
        choices=LR_SCALES,
        group=TRAINING,
        help="relative: each 2-bit layer's rate in proportion to the size of its weights, with --lr in the mean.",
    )
    optimizer: str = _option(
        "adamw", choices=OPTIMIZERS, group=TRAINING, help="Of the 2-bit layers' weights; all else learns by AdamW."
    )
    schedule: str = _option(
        "cosine", choices=SCHEDULES, group=TRAINING, help="How learning rates fall, from the peak to --lr-floor."
    )
    ema: float = _option(
        0.0,
        type=float,
        low=0,
        high=0.99999,
        group=TRAINING,
        help="Decay of a running mean of all parameters, which is what is kept in the end; 0: the last ones are.",
    )
    start: str = _option(
        "weights",
        choices=STARTS,
        group=TRAINING,
        help="What the first levels fit: the weights; with channels weighted by their inputs on training text (data); "
        "with error feedback besides (feedback: ldp, lc, seq, r2q).",
    )
    rotation_steps: int | None = _option(
        None,
        type=int,
        low=0,
        optional=True,
        group=TRAINING,
        help="Learn the rotations R1 and R2 for so many steps before training, starting from Hadamard "
        "matrices, as SpinQuant does; they are merged into the weights, and where embedding and head share a table, a "
        "matrix of hidden_size squared is in the file besides. Their tokens are part of --tokens, and come on top of "
        "--steps. 0: leave the Hadamard matrices. Default: by --rotation-share.",
    )
    rotation_share: float = _option(
        0.0,
        type=float,
        low=0,
        high=0.5,
        group=TRAINING,
        help="Share of --tokens (or --steps) that learns rotations, without --rotation-steps, but 5 million tokens at "
        "most: where each device's memory holds original and model whole meanwhile, and where it makes 20 steps.",
    )
    rotation_lr: float = _option(
        1e-2,
        type=float,
        above=0,
        high=1,
        group=TRAINING,
        help="Peak learning rate of the rotations (--rotation-steps).",
    )
    a_clip: float = _option(
        0.9,
        type=float,
        low=0.01,
        high=0.999,
        group=TRAINING,
        help="Activation clip to start from: which share of a token's largest value the integers reach.",
    )
    weight_reach: float = _option(
        0.0,
        type=float,
        low=0,
        group=TRAINING,
        help="How far beyond the outer levels a weight still learns, in steps between levels (ldp, r2q).",
    )
    level_gradient: str = _option(
        "exact",
        choices=LEVEL_GRADIENTS,
        group=TRAINING,
        help="Levels learn from all of their weights, or (residual) from what rounding changes, as in LSQ (ldp, r2q).",
    )
    weight_range: str = _option(
        "moving",
        choices=RANGES,
        group=TRAINING,
        help="What weight clips are shares of: the weights' extremes as they are, or (fixed) as they were "
        "at the start (ldp, ldp-udq, lc).",
    )
    hidden_loss: float = _option(
        0.0,
        type=float,
        low=0,
        group=TRAINING,
        help="Weight of a second loss: how far the residual stream after each layer is from the teacher's.",
    )
    hidden_end: float = _option(
        1.0,
        type=float,
        low=0,
        high=1,
        group=TRAINING,
        help="Share of --hidden-loss that is left at the end, after falling in a line.",
    )
    activations_from: float = _option(
        0.0,
        type=float,
        low=0,
        high=0.95,
        group=TRAINING,
        help="Share of the steps that pass before activations and KV cache are quantized: progressive bits.",
    )
    progressive_bits: int = _option(
        2,
        type=int,
        choices=(2, 3, 4),
        group=TRAINING,
        help="Train with weights of 3 or 4 bits (round to nearest) first, for --progressive-share of the steps, and "
        "then with 2 bits, whose levels are fitted anew. 2: with 2 bits from the first step.",
    )
    progressive_share: float = _option(
        0.2, type=float, low=0, high=0.95, group=TRAINING, help="Share of the steps, the first ones, with more bits."
    )
    freeze: float = _option(
        0.0,
        type=float,
        low=0,
        high=1,
        group=TRAINING,
        help="Share of the steps, the last ones, in which the 2-bit layers' weights keep their codes, and levels, "
        "clips and tables alone learn.",
    )
    pull: float = _option(
        0.0,
        type=float,
        low=0,
        high=1,
        group=TRAINING,
        help="Share of the way to its level that each weight is moved after an update, at the end; grows from 0 in a "
        "line, against oscillation.",
    )
    weight_decay: float = _option(
        0.0, type=float, low=0, group=TRAINING, help="Decoupled weight decay; of weights only, never of quantizers."
    )
    betas: tuple[float, float] = _option(
        (0.9, 0.95), type=float, low=0, high=0.9999999, many=2, group=TRAINING, help="AdamW's two decay rates."
    )
    warmup: float = _option(
        0.03, type=float, low=0, high=1, group=TRAINING, help="Share of the steps in which learning rates rise."
    )
    lr_floor: float = _option(
        0.05, type=float, low=0, high=1, group=TRAINING, help="Where the schedule ends, as a share of the peak."
    )
    grad_clip: float = _option(
        1.0, type=float, above=0, group=TRAINING, help="Largest norm of the gradient; larger ones are scaled down."
    )
    loss: str = _option(
        "cakld",
        choices=LOSSES,
        group=TRAINING,
        help="kl: KL(teacher ‖ student). cakld: with KL(student ‖ teacher), by the teacher's confidence. "
        "mix: kl and cross-entropy on the text (--mix-share).",
    )
    mix_share: float = _option(
        0.5, type=float, low=0, high=1, group=TRAINING, help="Cross-entropy's share of the loss mix."
    )
    temperature: float = _option(
        1.0, type=float, above=0, group=TRAINING, help="Softens both distributions of the KL terms."
    )
    teacher_temperature: float = _option(
        1.0,
        type=float,
        above=0,
        group=TRAINING,
        help="Softens the original's predictions alone, beside --temperature, where it is surer than it should be. Of "
        "cakld, beta stays as it is without.",
    )

    device: str = _option("auto", group=MACHINE, help="auto, cpu, cuda or cuda:N.")
    precision: str = _option(
        "auto",
        choices=PRECISIONS,
        group=MACHINE,
        help="bf16 multiplies integers and runs attention in bfloat16 (CUDA); see --master-weights for what learns.",
    )
    grad_checkpointing: str = _option(
        "auto",
        choices=SWITCH,
        group=MACHINE,
        help="Recompute activations in the backward pass. auto: where they would not fit.",
    )
    compile: str = _option(
        "auto", choices=SWITCH, group=MACHINE, help="Use torch.compile. auto: on a GPU, where Triton is there."
    )
    low_memory: bool = _option(
        False,
        type=bool,
        group=MACHINE,
        help="Where memory does not suffice, auto may also round what is learnt with: bf16 or int8 optimizer states, "
        "an int8 teacher, bf16 weights, as few of them as will do. Smaller chunks of logits in any case.",
    )
    step_in_backward: str = _option(
        "auto",
        choices=SWITCH,
        group=MACHINE,
        help="Update each parameter as soon as its gradient is whole, and drop it; for --grad-accum 1. Gradients are "
        "clipped by the last update's norm, or a parameter's own where that is larger. auto: where they would not fit.",
    )
    optimizer_states: str = _option(
        "auto",
        choices=STATES,
        group=MACHINE,
        help="What AdamW's two states are kept in; int8 needs torchao. auto: fp32, or see --low-memory.",
    )
    teacher_weights: str = _option(
        "auto",
        choices=TEACHERS,
        group=MACHINE,
        help="int8 keeps the teacher's weights in int8 with a scale a row. auto: full, or see --low-memory.",
    )
    master_weights: str = _option(
        "auto",
        choices=MASTERS,
        group=MACHINE,
        help="What learns: bf16 weights are rounded at random, and have bf16 gradients. auto: fp32, or see "
        "--low-memory.",
    )

    seed: int = _option(0, type=int, low=0, high=2**63 - 1, group=RUN, help="Of the rotation's signs and text order.")
    checkpoint_every: int = _option(
        100,
        type=int,
        low=0,
        group=RUN,
        free=True,
        help="Steps between checkpoints to resume from, also while rotations are learned; 0: only when stopped by "
        "Ctrl-C or SIGTERM.",
    )
    keep_checkpoints: int = _option(2, type=int, low=1, group=RUN, free=True, help="How many checkpoints to keep.")
    checkpoint_contents: str = _option(
        "all",
        choices=CONTENTS,
        group=RUN,
        free=True,
        help="weights: checkpoints without optimizer states, a third as large; a run resumed from one goes on with new "
        "states, and not to the same bits.",
    )
    log_every: int = _option(10, type=int, low=1, group=RUN, free=True, help="Steps between lines of metrics.jsonl.")
    eval_every: int | None = _option(
        None,
        type=int,
        low=1,
        optional=True,
        free=True,
        group=RUN,
        help="Steps between perplexities on --eval-data. Default: only at the end.",
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(name, getattr(self, name)))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise BadOption(f"device: expected auto, cpu, cuda or cuda:N; found {self.device!r}")
        if not self.model:
            raise BadOption('model: expected a folder, a Hub id or "demo"; found nothing')
        if self.tokens is not None and self.steps is not None:
            raise BadOption(f"steps: {self.steps}, but tokens is given too ({self.tokens}); give one of the two")
        if self.tables == "one" and self.head_bits != self.embed_bits:
            raise BadOption(
                f"head_bits: {self.head_bits}, but one table serves head and embedding (embed_bits {self.embed_bits}); "
                'make them equal, or set tables to "two"'
            )
        if self.eval_every is not None and self.eval_data is None:
            raise BadOption(f"eval_every: {self.eval_every}, but there is no eval_data to measure on")
        if self.step_in_backward == "on" and (self.grad_accum or 1) != 1:
            raise BadOption(
                f"grad_accum: {self.grad_accum}, but step_in_backward keeps no gradients to add up; leave one out"
            )
        small = {"optimizer_states": self.optimizer_states, "master_weights": self.master_weights}
        for name, value in small.items():
            if self.optimizer != "adamw" and value not in (AUTO, "fp32"):
                raise BadOption(f"{name}: {value} is for the optimizer adamw; found {self.optimizer}")
        if self.ema and self.master_weights == "bf16":
            raise BadOption(f"ema: {self.ema:g}, but a mean of bf16 weights would not move; use master_weights fp32")
        if self.pull and (self.master_weights == "bf16" or self.step_in_backward == "on"):
            raise BadOption(f"pull: {self.pull:g} needs master_weights fp32 and step_in_backward off")
        if self.progressive_bits != 2 and self.progressive_share + self.freeze > 1:
            raise BadOption(
                f"progressive_share: {self.progressive_share:g}, but weights stay as they are in the last "
                f"{self.freeze:g} of the steps (freeze), and would never "
                "learn with 2 bits; give shares that are 1 together at most"
            )
        if self.start == "feedback" and self.method not in HELD:
            raise BadOption(f"start: feedback is for {', '.join(HELD)}; found method {self.method!r}")
        untrained = "steps 0" if self.steps == 0 else f"method {self.method}" if self.method in UNTRAINED else ""
        if self.start != "weights" and untrained:
            raise BadOption(f"start: {self.start} needs training text, which {untrained} does without")
        if self.rotation_steps and untrained:
            raise BadOption(f"rotation_steps: {self.rotation_steps} need training text, which {untrained} does without")

    @property
    def starts_whole(self) -> bool:
        """Whether each of several processes makes student and teacher whole before it keeps its part of them.

        Starts from data (start other than weights) go through all layers before training. With any other setting,
        layers are shared out as they are made; where rotations are learned, after that.
        """
        return self.start != "weights"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> QuantizeConfig:
        """Build from parsed TOML. Raises BadOption naming `where` and the key."""
        known = normalise_keys(values, where)
        if "model" not in known:
            raise BadOption(f'{where}: model is missing; give a folder, a Hub id or "demo"')
        try:
            return cls(**known)
        except BadOption as error:
            raise BadOption(f"{where}: {error}") from None

    def changed(self, **values: Any) -> QuantizeConfig:
        """A copy with some fields replaced, checked like any other."""
        return dataclasses.replace(self, **values)

    def to_toml(self) -> str:
        """All settings that have a value, by group; from_mapping(tomllib.loads(...)) gives an equal configuration."""
        lines: list[str] = []
        for group in (RUN, *GROUPS[:-1]):
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
            for name, option in OPTIONS.items():
                value = getattr(self, name)
                if option.group == group and value is not None:
                    lines.append(f"{name} = {_toml_value(value)}")
        return "\n".join(lines) + "\n"


OPTIONS: dict[str, Option] = {item.name: item.metadata["option"] for item in dataclasses.fields(QuantizeConfig)}
"""Every setting by its field name, in order."""
DEFAULTS: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(QuantizeConfig)}
"""Their defaults; None where it depends on model and machine."""


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)


def normalise_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keys as field names (group-size and group_size mean the same). Raises BadOption for an unknown one."""
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in OPTIONS and isinstance(value, Mapping):
            raise BadOption(
                f"{where}: [{key}] is a table, but settings stand at the top level; remove the line [{key}]"
            )
        if name not in OPTIONS:
            nearest = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0)
            raise BadOption(f"{where}: unknown key {key!r}; did you mean {nearest[0]!r}?")
        if name in known:
            raise BadOption(f"{where}: {key!r} is given twice")
        known[name] = value
    return known


def read_recipe(recipe: Path | str) -> dict[str, Any]:
    """The settings of a TOML recipe, by field name, unchecked but for their names. Raises BadOption.

    recipe: a file; as a string, the name of a bundled one (RECIPES) comes first.
    """
    path = BUNDLED / f"{recipe}.toml" if recipe in RECIPES else Path(recipe)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"{recipe}: expected a TOML recipe, or {' or '.join(RECIPES)} ({error})") from error
    return normalise_keys(values, str(recipe))


def build_config(model: str | None, recipe: Path | str | None, given: Mapping[str, Any]) -> QuantizeConfig:
    """Merge settings: the command line's (`model`, `given`) beat the recipe's, which beat the defaults.

    Defaults are the recipe `default`, and the fields' own where that says nothing or the recipe is a bundled one. The
    demo model has some of its own (the recipe `demo`). recipe: as for read_recipe. Raises BadOption.
    """
    asked: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    settings = read_recipe(DEFAULT_RECIPE) if recipe is None or recipe not in RECIPES else {}
    if (model or asked.get("model")) == DEMO:
        settings = beating(settings, read_recipe(DEMO))
    asked = beating(asked, dict(given) | ({} if model is None else {"model": model}))
    settings = beating(settings if trains(asked) else without_text(settings), asked)
    return QuantizeConfig.from_mapping(settings, "options" if recipe is None else f"{recipe} and options")


def trains(settings: Mapping[str, Any]) -> bool:
    """Whether there is anything to train."""
    return settings.get("method") not in UNTRAINED and settings.get("steps") != 0


def without_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that suit what is not trained."""
    return {name: value for name, value in settings.items() if name not in NEEDS_TEXT}


def beating(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """All settings; steps and tokens are one setting in two forms."""
    if {"steps", "tokens"} & stronger.keys():
        weaker = {name: value for name, value in weaker.items() if name not in ("steps", "tokens")}
    return dict(weaker) | dict(stronger)
