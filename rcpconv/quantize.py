"""`rcpconv quantize` as a function: from a checkpoint to a finished run folder, or on from where a run was stopped.

Puts the pieces together: plan, checkpoint, rotations, texts, training, baking, evaluation. Each is elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rcpconv import distributed
from rcpconv.baking import bake_piece, lazy_baked, proven_hashes
from rcpconv.checkpoint import SourceModel, load_source, outline_source
from rcpconv.config import (
    AUTO,
    DEFAULT_CORPUS,
    DEMO,
    OPTIONS,
    SELF,
    QuantizeConfig,
    beating,
    build_config,
    read_recipe,
)
from rcpconv.errors import BadCompiler, BadOption, BadRun, BadTrainingData, ConversionError, TrainingDiverged
from rcpconv.evaluate import cut, lazy_perplexity, tokenize, torch_perplexity
from rcpconv.heldout import Text, default_text, read_text
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder, LazyDecoder, Piece
from rcpconv.plan import Machine, Plan, look_at_machine, make_plan, size, supposed_machine
from rcpconv.prepare import lazy_original, original_decoder
from rcpconv.proof import hash_tensor
from rcpconv.runs import (
    BAKED,
    FAILED,
    FINISHED,
    RUNNING,
    Run,
    created,
    keep_hashes,
    locked,
    new_run_folder,
    newest_unfinished,
    now,
    replacing,
    require_free,
    require_room,
    runs_root,
)
from rcpconv.scheme import ComparisonQuantization
from rcpconv.tensor_file import TensorWriter
from rcpconv.train import checkpoints
from rcpconv.train.beginning import lazy_untrained, learned_rotations, training_sequences, untrained_student
from rcpconv.train.compiling import compiled_layers
from rcpconv.train.loop import Trainer
from rcpconv.train.memory import int8_teacher, narrow_weights
from rcpconv.train.stopping import stoppable
from rcpconv.train.texts import HUB_PREFIX, read_source
from rcpconv.train.tokens import Mixture, Sequences
from rcpformat import spec
from rcpformat.accounting import account
from rcpformat.architecture import Architecture

GPU_GIB = 80.0
"""Memory of the GPUs that a dry run supposes, where it is not said."""
NEWEST = "newest"
"""As `resume`: the newest unfinished run."""
EVALUATION_WINDOW = 1024
"""Tokens, or the model's context where that is shorter."""


def quantize(
    model: str | None,
    settings: Mapping[str, Any],
    *,
    recipe: Path | str | None = None,
    resume: str | None = None,
    out: Path | None = None,
    runs: Path | None = None,
    dry_run: bool = False,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Run | None:
    """Train a quantized model and leave it in a run folder, which is returned (None after a dry run).

    settings: fields of QuantizeConfig, which beat the recipe's, which beat the defaults. recipe: a file, or as a string
    the name of a bundled one. resume: a run folder, or NEWEST; settings may then be repeated, but not changed. out: the
    run folder to make. runs: where run folders are. gpus, gpu_memory (GiB): for dry_run, what to plan for instead of
    this machine; the model may then be a folder with a configuration alone. force: start even where the plan says that
    the machine will not do.
    Raises ConversionError, or Interrupted after Ctrl-C or SIGTERM, when it was said how to go on. A new run that fails
    before it trains, for its texts or its compiler, leaves no folder. Within distributed.joined() every process calls
    this; the first one's arguments count.
    """
    console = console or Console()
    if distributed.rank():
        return _follow(console)
    root = runs_root(runs)
    if resume is not None:
        if out is not None:
            raise BadOption(f"out: {out}, but a resumed run stays in its folder; give --out or --resume, not both")
        run = newest_unfinished(root) if resume == NEWEST else Run.open(resume)
        with locked(run) as run:
            config = _same_config(run, model, settings, recipe)
            source = run.source()
            plan = _shared_plan(config, source.architecture, source.tied_embeddings, look_at_machine(config.device))
            if plan.architecture != run.architecture:
                raise BadRun(
                    f"{run.folder}: {source.name} is no longer the checkpoint that this run began with, or rcpconv no "
                    "longer the version; start a new run"
                )
            if dry_run:
                plan.show(console)
                return distributed.from_first(None)
            console.print(f"Continuing {run.folder}", highlight=False, soft_wrap=True)
            if not force:
                plan.require_machine(run.folder)
            windows = _evaluation_windows(plan, source)
            run.update(status=RUNNING, reason=None)
            return _lead(run, plan, source, windows, console)
    config = build_config(model, recipe, settings)
    folder = out or new_run_folder(root, config.model)
    if not dry_run:
        require_free(folder)
    supposed = gpus is not None or gpu_memory is not None
    if supposed and not dry_run:
        raise BadOption("gpus, gpu_memory: are what --dry-run plans for; a training takes what there is")
    machine = (
        supposed_machine(gpus or 1, (gpu_memory or GPU_GIB) * 2**30) if supposed else look_at_machine(config.device)
    )
    judged: list[Plan] = []

    def judge(architecture: Architecture, tied: bool) -> None:
        """Show the plan, before the weights of a Hub model are fetched; refuse what cannot be done here."""
        plan = _shared_plan(config, architecture, tied, machine)
        if dry_run:
            plan.show(console)
            raise _OnlyPlanned
        plan.show_summary(console)
        if not force:
            plan.require_machine(folder)
        check_texts(plan.config)
        judged.append(plan)

    try:
        if dry_run and (outline := outline_source(config.model)) is not None:
            judge(*outline)
        source = load_source(config.model, revision=config.revision, judge=judge)
        if not judged:
            judge(source.architecture, source.tied_embeddings)
    except _OnlyPlanned:
        return distributed.from_first(None)
    plan = _shared_plan(config, source.architecture, source.tied_embeddings, machine)
    windows = _evaluation_windows(plan, source)
    with new_run(folder, plan, source) as run:
        try:
            return _lead(run, plan, source, windows, console)
        except (BadTrainingData, BadCompiler):  # nothing is trained, and resuming cannot mend it
            run.delete()
            raise


def _lead(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> Run:
    """Train, in the first process: tell the others what, then do as they do."""
    distributed.from_first((run.folder.absolute(), plan, windows))
    return _train(run, plan, source, windows, console)


def _follow(console: Console) -> Run | None:
    """Train, in any other process: what the first one says, in its run folder, which it holds."""
    told: tuple[Path, Plan, list[list[int]]] | None = distributed.from_first(None)
    if told is None:
        return None
    folder, plan, windows = told
    run = Run.open(folder)
    machine = replace(plan.machine, device=distributed.own_device(plan.machine.device))
    return _train(run, replace(plan, machine=machine), run.source(), windows, console)


def _shared_plan(config: QuantizeConfig, architecture: Architecture, tied: bool, machine: Machine) -> Plan:
    """The plan, its estimates for one of the processes that train. Raises BadOption."""
    count = distributed.processes()
    plan = make_plan(config, architecture, tied, replace(machine, gpus=count) if count > 1 else machine)
    if count > 1 and plan.steps:
        assert plan.config.batch_size is not None and plan.config.grad_accum is not None
        distributed.own_sequences(0, plan.config.batch_size, plan.config.grad_accum)
    return plan


class _OnlyPlanned(ConversionError):
    """Ends a dry run; a ConversionError, because load_source lets those through."""


def new_run(folder: Path, plan: Plan, source: SourceModel) -> AbstractContextManager[Run]:
    """The folder of a run that begins, held."""
    return created(folder, _record(plan, source), _located(plan.config).to_toml(), source.tokenizer.json)


def _record(plan: Plan, source: SourceModel) -> dict[str, Any]:
    """run.json of a new run."""
    return {
        "status": RUNNING,
        "model": _located(plan.config).model,
        "revision": source.provenance["revision"],
        "created": now(),
        "finished": None,
        "architecture": plan.architecture.to_json(),
        "quantization": plan.quantization.to_json(),
        "tokenizer": source.tokenizer.info.to_json(),
        "generation": source.generation,
        "provenance": source.provenance,
        "evaluation": None,
    }


def _located(config: QuantizeConfig) -> QuantizeConfig:
    """The configuration with local files and folders by their absolute paths, so that a run can go on from anywhere."""
    local = config.model != DEMO and Path(config.model).expanduser().is_dir()
    return config.changed(
        model=_absolute(config.model) if local else config.model,
        data=tuple(map(_absolute, config.data)),
        eval_data=None if config.eval_data is None else _absolute(config.eval_data),
    )


def _absolute(source: str) -> str:
    """A path made absolute; the names of other sources stay."""
    if source in (DEFAULT_CORPUS, DEMO, SELF) or source.startswith(HUB_PREFIX):
        return source
    return str(Path(source).expanduser().absolute())


def _meant(name: str, value: Any) -> Any:
    """A value of a setting for comparison: files and folders, which have several names, by their real one."""

    def real(source: str) -> str:
        located = _absolute(source)
        return os.path.realpath(located) if os.path.isabs(located) else located

    if name == "data":
        return tuple(map(real, value))
    return real(value) if name in ("model", "eval_data") and value is not None else value


def _same_config(run: Run, model: str | None, settings: Mapping[str, Any], recipe: Path | str | None) -> QuantizeConfig:
    """The run's configuration, with what may be changed changed. Raises BadRun for a run or setting that cannot be."""
    if run.status == FINISHED:
        raise BadRun(f"{run.folder}: already finished; export it with: rcpconv export --run {run.folder}")
    asked = beating({} if recipe is None else read_recipe(recipe), settings)
    if model is not None:
        asked["model"] = model
    changes = {}
    for name, value in asked.items():
        value, before = OPTIONS[name].check(name, value), getattr(run.config, name)
        if OPTIONS[name].free:
            changes[name] = value
        elif value != AUTO and _meant(name, value) != _meant(
            name, before
        ):  # what auto stood for was decided when the run began
            raise BadRun(
                f"{name}: the run was started with {before!r}, now it is {value!r}; resume it unchanged, or start anew "
                "without --resume"
            )
    return run.config.changed(**changes)


def _train(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> Run:
    """Train, bake, evaluate on the windows and finish, in a run folder that is held; mark it where that cannot be."""
    with stoppable(lambda happened: _tell_to_resume(run, happened, console)):
        try:
            if plan.steps:
                pieces = distributed.gathered(_trained_student(run, plan, source, windows, console).pieces())
            else:
                pieces = lazy_untrained(plan, source, cut_tables=True).pieces()
        except (BadTrainingData, TrainingDiverged) as error:  # what resuming cannot mend
            if not distributed.rank():
                run.update(status=FAILED, reason=str(error))
            raise
        if distributed.rank():
            for _ in pieces:
                pass
            return run
        keep_result(run, pieces, source)
        evaluation = _evaluate(run, plan, source, windows, console) if windows else None
        run.update(status=FINISHED, finished=now(), evaluation=evaluation)  # last, so that a run is finished or not
        checkpoints.delete_all(run)
    which = "" if run.folder.parent == runs_root() else f" --run {run.folder}"
    compared = isinstance(plan.quantization, ComparisonQuantization)
    command = f"rcpconv eval{which}" if compared else f"rcpconv export{which} --out model.rcp"
    console.print(f"Finished: {run.folder}. Now type:\n  {command}", highlight=False, soft_wrap=True)
    return run


def keep_result(run: Run, pieces: Iterable[Piece], source: SourceModel) -> None:
    """Bake a decoder in training, piece by piece, and leave the tensors of the file in the run folder, with their
    hashes: "weights" by linear (baking.weight_hashes), and "tensors" by name, tokenizer.json among them.

    Each linear is decoded again and compared with what the forward pass uses; "decoded" says so, and that who finds
    tensors with these hashes has those weights. Raises ExportMismatch, NotSaved.
    """
    path, form = run.folder / BAKED, spec.expected_tensors(run.architecture, run.quantization)
    del form[spec.TOKENIZER]
    require_room(path, account(run.architecture, run.quantization).total_bytes)
    weights: dict[str, str] = {}
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = TensorWriter(file, form)
        writer.write(spec.INV_FREQ, np.array(source.inv_freq, np.float64))
        for piece in pieces:
            baked = {}
            for name, array in bake_piece(piece):
                writer.write(name, array)
                baked[name] = array
            weights |= proven_hashes(piece, baked)
            del piece, baked  # before the next one is made
        tensors = writer.finish()
    tensors[spec.TOKENIZER] = hash_tensor(np.frombuffer(source.tokenizer.json, np.uint8))
    keep_hashes(run, weights, tensors)


def _tell_to_resume(run: Run, happened: str, console: Console) -> None:
    console.print(
        f"{happened}. Continue with:\n  rcpconv quantize --resume {run.folder}", highlight=False, soft_wrap=True
    )


def _trained_student(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> Decoder:
    config, device = plan.config, torch.device(plan.machine.device)
    half = config.precision == "bf16"

    how: dict[str, Any] = {
        "source": source,
        "dtype": torch.bfloat16 if half else torch.float32,
        "options": ComputeOptions(half=half),
        "device": device,
    }
    if config.teacher_weights == "int8":
        how["change"] = int8_teacher

    @cache
    def teacher() -> Decoder:
        return original_decoder(**how)

    with distributed.first_before_others():  # before any weights are read, unless they write the texts
        sequences = training_sequences(run, plan, source, teacher, console)
    learned = learned_rotations(run, plan, source, teacher, sequences, console)
    if distributed.processes() == 1 or config.starts_whole:
        student, original = untrained_student(plan, source, learned), teacher()
    else:
        teacher.cache_clear()  # what wrote texts or learned rotations is whole
        if plan.machine.kind == "cuda":
            torch.cuda.empty_cache()
        student, original = _sharded(plan, lazy_untrained(plan, source, learned), lazy_original(**how), sequences)
    trainer = Trainer(
        student=student,
        teacher=original,
        sequences=sequences,
        steps=plan.steps,
        config=config,
        run=run,
        console=console,
        evaluate=(lambda decoder: torch_perplexity(decoder, windows, "perplexity")) if windows else None,
        zero_stage=plan.zero_stage,
        learned=learned,
    )
    trainer.train()
    if plan.machine.kind == "cuda":
        _note_peak(run, plan, console)
    return student


def _sharded(
    plan: Plan, student: LazyDecoder, teacher: LazyDecoder, sequences: Sequences | Mixture
) -> tuple[Decoder, Decoder]:
    """Both models, each of their layers ready for training, and shared out, before the next one is made.

    With ZeRO stages 1 and 2 every process has the teacher whole.
    """
    config, device = plan.config, torch.device(plan.machine.device)
    if config.master_weights == "bf16":
        student = student.each(lambda name, module: narrow_weights(module))
    if config.compile == "on":
        assert config.batch_size is not None and config.grad_accum is not None
        own = distributed.own_sequences(0, config.batch_size, config.grad_accum)
        tokens_BT = torch.from_numpy(sequences.batch(0, own[0][1])).to(device)  # the same for all, as the verdict is
        student, teacher = compiled_layers(student, tokens_BT, config.low_memory), compiled_layers(teacher)
    if plan.zero_stage < 3:
        return distributed.sharded(student, device, plan.zero_stage), teacher.whole().to(device).eval()
    return distributed.sharded(student, device), distributed.sharded(teacher, device).eval()


def _note_peak(run: Run, plan: Plan, console: Console) -> None:
    """Keep in run.json, and say, how much of its memory the GPU that needed most has needed so far."""
    peak = distributed.largest(torch.cuda.max_memory_allocated(plan.machine.device))
    if not distributed.rank():
        before = run.record.get("peak_gpu_memory", 0)  # where the run was stopped
        peak = max(peak, before)
        run.update(peak_gpu_memory=peak)
    each = f" on each of {plan.machine.gpus} GPUs" if plan.machine.gpus > 1 else ""
    console.print(f"peak of GPU memory: {size(peak)}{each}, {size(plan.memory_bytes)} estimated", highlight=False)


def _evaluate(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> dict[str, Any]:
    """Perplexities of the original and of what was baked, in float32, as run.json keeps them."""
    device = torch.device(plan.machine.device)
    baked = lazy_baked(plan.architecture, plan.quantization, run.baked)
    found = {
        name: lazy_perplexity(decoder, windows, name, device)
        for name, decoder in (("original", lazy_original(source, device=device)), ("fake-quant", baked))
    }
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    console.print(f"perplexity on {plan.config.eval_data}: {figures}", highlight=False, soft_wrap=True)
    return {
        "text": plan.config.eval_data,
        "window": len(windows[0]),
        "tokens": sum(len(window) - 1 for window in windows),
        "perplexity": found,
    }


def _evaluation_windows(plan: Plan, source: SourceModel) -> list[list[int]]:
    """Windows of the evaluation text, as `rcpconv eval` cuts them; none without eval_data."""
    c = plan.config
    if c.eval_data is None:
        return []
    text = evaluation_text(c.eval_data)
    window = min(EVALUATION_WINDOW, plan.architecture.max_position_embeddings)
    windows = cut(tokenize(source.tokenizer.json, text.content), window, c.max_eval_tokens)
    if not windows:
        raise BadTrainingData(f"eval_data: {c.eval_data}: expected at least two tokens of text")
    return windows


def evaluation_text(name: str) -> Text:
    """The text that `eval_data` names. Raises BadTrainingData."""
    if name in (DEMO, DEFAULT_CORPUS):
        return default_text(DEMO if name == DEMO else None)
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadTrainingData(f"eval_data: {name}: expected a text file, {DEMO} or {DEFAULT_CORPUS}")
    return read_text(path)


def check_texts(config: QuantizeConfig) -> None:
    """Read the beginning of every text, before anything takes time. Raises BadTrainingData for one that cannot be."""
    for name in config.data:
        for stream in read_source(name, lambda messages: "") if name != SELF else []:
            next(stream, None)
    if config.eval_data is not None:
        evaluation_text(config.eval_data)
