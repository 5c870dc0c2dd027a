"""Does the cells of a comparison one after another, and keeps between them what they share.

That is the source, forms of the teacher, tokens, learned rotations (all processes together), the last student as it
started, and (in torch) compiled graphs.
The held-out text is read when the first cell is measured on it. Knows nothing of which cells there are.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from rcpconv.baking import bake, baked_decoder
from rcpconv.checkpoint import SourceModel
from rcpconv.compare.folder import SAMPLED, TOKENS, VALIDATION, Folder, Result
from rcpconv.compare.plan import FINAL, ORIGINAL, Cell, Comparison
from rcpconv.compare.score import score
from rcpconv.config import FORM, OPTIONS, SELF, QuantizeConfig
from rcpconv.errors import BadCompiler, BadRun, BadTrainingData, NotEnoughMachine, TrainingDiverged
from rcpconv.evaluate import cut, tokenize
from rcpconv.generation import GenerationResult, Task, measured
from rcpconv.inspection import model_size
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.plan import Machine, Plan, make_plan
from rcpconv.prepare import original_decoder
from rcpconv.quantize import evaluation_text, keep_result, new_run
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import FINISHED, METRICS, ROTATIONS, RUNNING, Run, alone, copy_file, locked, now, write_text
from rcpconv.scheme import ComparisonQuantization
from rcpconv.train import checkpoints
from rcpconv.train.beginning import learned_rotations, sampled_rows, untrained_student, written_rows
from rcpconv.train.checkpoints import StateFile
from rcpconv.train.loop import Trainer
from rcpconv.train.memory import int8_teacher
from rcpconv.train.progress import read_metrics
from rcpconv.train.tokens import Mixture, Sequences, cached

_RECOMPILATIONS = 1 << 16
"""torch gives up compiling what it has compiled 8 times, without a word; every method is a time or two."""
_SMALL = 0.05
"""Share of the device's memory that a second student may take."""
_ROOM = 2
"""The validation part ends where a document does, and is at most so many times as long as asked."""
_ROTATIONS_FOLLOW_FROM = (
    *(name for name, option in OPTIONS.items() if option.group == FORM and name != "method"),
    *("seq_len", "batch_size", "grad_accum", "rotation_steps", "rotation_lr", "a_clip", "seed"),
    *("self_share", "precision", "teacher_weights", "low_memory"),
)
"""Settings that rcpconv.train.rotations knows of, beside what is the same in all of a comparison. No method is."""


def plan_cell(
    comparison: Comparison, cell: Cell, source: SourceModel, machine: Machine, shape: Mapping[str, int]
) -> Plan:
    """A cell's training. shape: seq_len, batch_size and grad_accum of variants without their own."""
    config = comparison.config(cell)
    config = config.changed(**{name: value for name, value in shape.items() if getattr(config, name) is None})
    return make_plan(config, source.architecture, source.tied_embeddings, machine)


class Workshop:
    """One process's share of a comparison."""

    def __init__(
        self,
        comparison: Comparison,
        folder: Folder,
        source: SourceModel,
        machine: Machine,
        *,
        shape: Mapping[str, int],
        keep_runs: bool = False,
        checkpoint_every: int = 0,
        console: Console | None = None,
    ) -> None:
        """shape: see plan_cell. console: shows live progress."""
        self.comparison, self.folder, self.source, self.machine = comparison, folder, source, machine
        self.shape, self.keep_runs, self.checkpoint_every = shape, keep_runs, checkpoint_every
        self.console = console or Console(quiet=True)
        self.device = torch.device(machine.device)
        self._teachers: dict[tuple[bool, bool], Decoder] = {}
        self._start: tuple[object, Decoder] | None = None
        compiler = torch._dynamo.config
        compiler.recompile_limit = compiler.accumulated_recompile_limit = _RECOMPILATIONS
        compiler.automatic_dynamic_shapes = False  # another group size is another graph, not one for all sizes

    # What cells share.

    def plan(self, cell: Cell) -> Plan:
        """A cell's training, decided down to the last setting."""
        plan = plan_cell(self.comparison, cell, self.source, self.machine, self.shape)
        config = plan.config.changed(checkpoint_every=self.checkpoint_every)
        if plan.steps and cell.kind == FINAL:
            every = max(1, round(plan.steps / self.comparison.curve_points))
            config = config.changed(eval_data=str(self.folder.file(VALIDATION)), eval_every=every)
        return dataclasses.replace(plan, config=config)

    def teacher(self, config: QuantizeConfig) -> Decoder:
        """The original model, as a teacher in training."""
        half, int8 = config.precision == "bf16", config.teacher_weights == "int8"
        key = half, int8
        if key not in self._teachers:
            dtype = torch.bfloat16 if half else torch.float32
            how = {"change": int8_teacher} if int8 else {}
            self._teachers[key] = original_decoder(self.source, dtype, ComputeOptions(half=half), self.device, **how)
        return self._teachers[key]

    @cached_property
    def original(self) -> Decoder:
        """The original model in float32, as it is measured and compared with."""
        return original_decoder(self.source, device=self.device)

    @cached_property
    def _shared(self) -> QuantizeConfig:
        """What texts are read with; the same for every variant."""
        c = self.comparison
        return self.plan(Cell(kind=FINAL, variant=c.variants[0].name, rates=c.grid[0])).config.changed(data=c.data)

    @property
    def _wanted(self) -> int:
        """Tokens of the longest training."""
        c = self.comparison
        return max(c.tokens, c.sweep_tokens if c.sweeps() else 0)

    def _tokens(self, name: str, rows: Callable[[], Iterator[list[int]]], limit: int) -> NDArray[Any]:
        return cached(self.folder.file(name), rows, self.source.architecture.vocab_size, limit)

    def _sampled_rows(self) -> Iterator[list[int]]:
        teacher = self.teacher(self._shared)
        return sampled_rows(self._shared, self.source, self._wanted, teacher, self.console)

    @cached_property
    def _sampled(self) -> NDArray[Any] | None:
        """Tokens sampled from the model, where there is other text too; none of them are kept back."""
        if not set(self.comparison.data) > {SELF}:
            return None
        return self._tokens(SAMPLED, self._sampled_rows, self._wanted + (self._shared.seq_len or 0))

    @cached_property
    def _parts(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The validation part of the training texts' tokens, and the rest."""
        c, info = self.comparison, self.source.tokenizer.info
        limit = _ROOM * c.validation_tokens + self._wanted + (self._shared.seq_len or 0)

        def rows() -> Iterator[list[int]]:
            return self._sampled_rows() if c.data == (SELF,) else written_rows(self._shared, self.source)

        token_N = self._tokens(TOKENS, rows, limit)
        if len(token_N) < limit and len(token_N) < 2 * _ROOM * c.validation_tokens:
            raise BadTrainingData(
                f"validation-tokens: {c.validation_tokens}, but the training texts hold {len(token_N)} tokens; keep "
                f"back at most {len(token_N) // (2 * _ROOM)}, or give more text"
            )
        ends = np.flatnonzero(np.isin(token_N[: _ROOM * c.validation_tokens], info.eos_ids)) + 1
        ends = ends[ends >= c.validation_tokens]
        at = int(ends[0]) if len(ends) else c.validation_tokens
        return token_N[:at], token_N[at:]

    def prepare(self) -> None:
        """Make the tokens, and a text of the validation part."""
        validation, _sampled = self._parts[0], self._sampled
        path = self.folder.file(VALIDATION)
        if not path.exists():
            tokenizer = Tokenizer.from_str(self.source.tokenizer.json.decode())
            write_text(path, tokenizer.decode(validation.tolist()))

    @cached_property
    def window(self) -> int:
        """Tokens of a window."""
        return min(self.comparison.window, self.source.architecture.max_position_embeddings)

    @cached_property
    def validation(self) -> list[list[int]]:
        """Windows of the validation part."""
        return cut(self._parts[0].tolist(), self.window)

    @cached_property
    def _heldout_tokens(self) -> list[int]:
        return tokenize(self.source.tokenizer.json, evaluation_text(self.comparison.text).content)

    @cached_property
    def heldout(self) -> list[list[int]]:
        """Windows of the held-out text."""
        windows = cut(self._heldout_tokens, self.window, self.comparison.max_eval_tokens)
        if not windows:
            raise BadTrainingData(f"text: {self.comparison.text}: expected at least two tokens of text")
        return windows

    @cached_property
    def task(self) -> Task:
        """Prompts from the held-out text."""
        return Task.cut(
            self._heldout_tokens,
            self.source.tokenizer.info,
            count=self.comparison.generations,
            tokens=self.comparison.generation_tokens,
            context=self.source.architecture.max_position_embeddings,
        )

    # Cells.

    def do(self, cell: Cell) -> Result:
        """Train and measure a cell, from where it was left, and save the result.

        Raises Interrupted, NotEnoughMachine, and BadTrainingData or EvaluationFailed for a text.
        """
        began = time.perf_counter()
        try:
            result = self._original() if cell.kind == ORIGINAL else self._variant(cell)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMachine(
                f"{cell.name}: memory of {self.machine.name} ran out; give the same command with fewer --jobs, or "
                "begin another comparison with a smaller batch (--set batch-size=N)"
            ) from error
        result = {"cell": cell.name, **dataclasses.asdict(cell), **result}
        result["seconds"] = round(time.perf_counter() - began, 2)
        self.folder.save(cell, result)
        return result

    def _original(self) -> Result:
        result: Result = {
            "validation": dataclasses.asdict(score(self.original, self.validation)),
            "heldout": dataclasses.asdict(score(self.original, self.heldout)),
            "fp16_bytes": 2 * self.source.provenance["parameters"],
        }
        if self.comparison.generations:
            written = self.task.write(self.original)
            result["generations"] = _as_json(measured("original", written))
            result["itself"] = _as_json(self.task.generations([], "original").results)
            result["greedy"] = written.greedy
        return result

    def _variant(self, cell: Cell) -> Result:
        plan = self.plan(cell)
        c = plan.config
        sizes = model_size(
            plan.architecture, plan.quantization, self.source.provenance, len(self.source.tokenizer.json)
        )
        result: Result = {
            "settings": self.comparison.variant(cell.variant).settings,
            "rates": {"lr": c.lr, "quantizer_lr": c.quantizer_lr, "clip_lr": c.clip_lr} if plan.steps else None,
            "steps": plan.steps,
            "rotation_steps": c.rotation_steps,
            "tokens": plan.rotation_tokens + plan.steps * plan.tokens_per_step,
            "bytes": sizes.total_bytes,
            "bits_per_weight": sizes.bits_per_weight,
            "training_only": isinstance(plan.quantization, ComparisonQuantization),
            "failed": None,
        }
        if not plan.steps:
            return result | self._measured(cell, plan, self._student(cell, plan), None)
        with self._run(cell, plan) as run:
            teacher, sequences = self.teacher(c), self._sequences(c)
            try:
                began = time.perf_counter()
                learned = self._rotations(run, plan, teacher, sequences)
                result["rotation_seconds"] = round(time.perf_counter() - began, 2)
                student = self._student(cell, plan, learned)
                Trainer(
                    student=student,
                    teacher=teacher,
                    sequences=sequences,
                    steps=plan.steps,
                    config=c,
                    run=run,
                    console=self.console,
                    evaluate=lambda decoder: score(decoder, self.validation).perplexity,
                    keep=False,
                    learned=learned,
                ).train()
            except (TrainingDiverged, BadCompiler) as error:
                run.delete()
                return result | {"failed": str(error)}
            result |= _progress(run, plan.rotation_tokens) | self._measured(cell, plan, student, run)
            if cell.kind == FINAL and not result["failed"] and result["curve"][-1][0] < result["tokens"]:
                result["curve"].append([result["tokens"], result["validation"]["perplexity"]])
            if not (self.keep_runs and cell.kind == FINAL):
                run.delete()
        return result

    def _sequences(self, c: QuantizeConfig) -> Sequences | Mixture:
        assert c.seq_len is not None
        rest = Sequences(self._parts[1], c.seq_len, c.seed)
        if self._sampled is None:
            return rest
        return Mixture(Sequences(self._sampled, c.seq_len, c.seed), rest, c.self_share)

    def _rotations(
        self, run: Run, plan: Plan, teacher: Decoder, sequences: Sequences | Mixture
    ) -> LearnedRotations | None:
        """As learned_rotations; learned once for all variants, rates and processes that would learn the same.

        Once, too, where that diverges.
        """
        if not plan.rotation_batch:
            return None
        settings = {name: getattr(plan.config, name) for name in _ROTATIONS_FOLLOW_FROM}
        kept, own = self.folder.rotations(settings | {"batch": plan.rotation_batch}), run.folder / ROTATIONS
        diverged, state = kept.with_suffix(".diverged"), StateFile(path=kept.with_suffix(".pt"), how="the same command")
        with alone(kept):
            if diverged.exists():
                raise TrainingDiverged(diverged.read_text(encoding="utf-8"))
            if kept.exists():
                try:
                    LearnedRotations.load(kept)
                except BadRun:  # damaged
                    kept.unlink()
            if kept.exists() and not own.exists():
                copy_file(kept, own)
            try:
                learned = learned_rotations(run, plan, self.source, lambda: teacher, sequences, self.console, state)
            except TrainingDiverged as error:
                write_text(diverged, str(error))
                state.delete()
                raise
            if not kept.exists():
                copy_file(own, kept)
        return learned

    def _student(self, cell: Cell, plan: Plan, learned: LearnedRotations | None = None) -> Decoder:
        """As it starts; the last one is kept where it is small, since the next thing that changes is the rates."""
        key = (cell.variant, cell.seed)
        if learned is not None:  # anew with every training
            return untrained_student(plan, self.source, learned)
        if self._start is not None and self._start[0] == key:
            return copy.deepcopy(self._start[1])
        self._start = None
        student = untrained_student(plan, self.source)
        if plan.steps and plan.memory["weights"] < _SMALL * self.machine.memory_bytes:
            self._start = (key, copy.deepcopy(student))
        return student

    @contextmanager
    def _run(self, cell: Cell, plan: Plan) -> Iterator[Run]:
        """The cell's run folder: a new one, or one that was left with or without a checkpoint to go on from."""
        folder = self.folder.run(cell)
        if folder.exists():
            with locked(Run.open(folder)) as run:
                if run.status == RUNNING and self._same(run.config, plan.config):
                    yield run
                    return
                run.delete()  # begun on another machine, or its result was not saved
        with new_run(folder, plan, self.source) as run:
            yield run

    def _same(self, before: QuantizeConfig, now: QuantizeConfig) -> bool:
        """Whether a training can go on; what the comparison says of its files is the same, wherever they are now."""
        elsewhere = {name: getattr(now, name) for name in ("model", "data", "eval_data", "checkpoint_every")}
        return before.changed(**elsewhere) == now

    def _measured(self, cell: Cell, plan: Plan, student: Decoder, run: Run | None) -> Result:
        """Scores of a student as it is; the held-out text is for the final ones alone."""
        validation = score(student, self.validation, self.original)
        if not validation.finite:
            return {"failed": "its perplexity is not finite"}
        found: Result = {"validation": dataclasses.asdict(validation)}
        if cell.kind != FINAL:
            return found
        found["heldout"] = dataclasses.asdict(score(student, self.heldout, self.original))
        if run is not None and self.keep_runs:
            keep_result(run, student.pieces(), self.source)
            run.update(status=FINISHED, finished=now(), evaluation=self._evaluation(plan, validation.perplexity))
            checkpoints.delete_all(run)
        if self.comparison.generations and not cell.seed:
            baked = baked_decoder(plan.architecture, plan.quantization, bake(student).__getitem__).to(self.device)
            share = self.task.agreement(baked, self._of_original["greedy"])
            found["generations"] = _as_json(measured(cell.variant, self.task.write(baked), share))
        return found

    @property
    def _of_original(self) -> Result:
        """The original's measurements, which come before all final ones."""
        result = self.folder.result(Cell(kind=ORIGINAL))
        assert result is not None
        return result

    def _evaluation(self, plan: Plan, perplexity: float) -> Result:
        """As run.json of a finished run has it: on the run's own evaluation text, the validation part."""
        original = self._of_original["validation"]
        return {
            "text": plan.config.eval_data,
            "window": self.window,
            "tokens": original["tokens"],
            "perplexity": {"original": original["perplexity"], "fake-quant": perplexity},
        }


def _progress(run: Run, before: int) -> Result:
    """Speed and curve of a training: (tokens, perplexity on the validation part). before: tokens of the rotations."""
    lines = read_metrics(run.folder / METRICS)
    speeds = [line["tokens_per_second"] for line in lines]
    return {
        "tokens_per_second": statistics.median(speeds[1:] or speeds),  # the first steps wait for the compiler
        "curve": [[before + line["tokens"], line["perplexity"]] for line in lines if "perplexity" in line],
        "training_kl": lines[-1]["kl"],
    }


def _as_json(results: list[GenerationResult]) -> list[Result]:
    return [dataclasses.asdict(result) for result in results]
