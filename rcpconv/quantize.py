"""`rcpconv quantize` as a function: from a checkpoint to a finished run folder, or on from where a run was stopped.

Puts the pieces together: plan, checkpoint, rotations, texts, training, baking, evaluation. Each is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from rcpconv.baking import Array, bake, baked_decoder, hashes
from rcpconv.checkpoint import SourceModel, load_source
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
from rcpconv.errors import BadOption, BadRun, BadTrainingData, ConversionError, TrainingDiverged
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.heldout import Text, default_text, read_text
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.plan import Plan, look_at_machine, make_plan
from rcpconv.prepare import Rotations, original_decoder, prepare, student_decoder
from rcpconv.runs import (
    BAKED,
    FAILED,
    FINISHED,
    RUNNING,
    WEIGHT_HASHES,
    Run,
    already_there,
    created,
    locked,
    new_run_folder,
    newest_unfinished,
    now,
    replacing,
    runs_root,
    write_json,
)
from rcpconv.train import checkpoints
from rcpconv.train.loop import Interrupted, Trainer
from rcpconv.train.sampling import SELF_EPOCHS, SELF_TOKENS, sample
from rcpconv.train.texts import Piece, read_source
from rcpconv.train.tokens import Sequences, cached, chat_renderer, interleave
from rcpconv.train.tokens import tokenize as tokenize_pieces
from rcpformat.architecture import Architecture

NEWEST = "newest"
"""As `resume`: the newest unfinished run."""
EVALUATION_WINDOW = 1024
"""Tokens, or the model's context where that is shorter."""


def quantize(
    model: str | None,
    settings: Mapping[str, Any],
    *,
    recipe: Path | None = None,
    resume: str | None = None,
    out: Path | None = None,
    runs: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Run | None:
    """Train a quantized model and leave it in a run folder, which is returned (None after a dry run).

    settings: fields of QuantizeConfig, which beat the recipe's, which beat the defaults. resume: a run folder, or
    NEWEST; settings may then be repeated, but not changed. out: the run folder to make. runs: where run folders are.
    force: start even where the plan says that the machine will not do.
    Raises ConversionError, or Interrupted after Ctrl-C or SIGTERM, when everything is saved.
    """
    console = console or Console()
    root = runs_root(runs)
    if resume is not None:
        if out is not None:
            raise BadOption(f"out: {out}, but a resumed run stays in its folder; give --out or --resume, not both")
        run = newest_unfinished(root) if resume == NEWEST else Run.open(resume)
        with locked(run) as run:
            config = _same_config(run, model, settings, recipe)
            source = run.source()
            plan = make_plan(config, source.architecture, source.tied_embeddings, look_at_machine(config.device))
            if plan.architecture != run.architecture:
                raise BadRun(f"{run.folder}: {source.name} is no longer the checkpoint that this run began with")
            if dry_run:
                plan.show(console)
                return None
            console.print(f"Continuing {run.folder}", highlight=False, soft_wrap=True)
            if not force:
                plan.require_machine(run.folder)
            windows = _evaluation_windows(plan, source)
            run.update(status=RUNNING, reason=None)
            return _train(run, plan, source, windows, console)
    config = build_config(model, recipe, settings)
    folder = out or new_run_folder(root, config.model)
    if folder.exists():
        raise already_there(folder)
    machine = look_at_machine(config.device)
    judged: list[Plan] = []

    def judge(architecture: Architecture, tied: bool) -> None:
        """Show the plan, before the weights of a Hub model are fetched; refuse what this machine cannot do."""
        plan = make_plan(config, architecture, tied, machine)
        if dry_run:
            plan.show(console)
            raise _OnlyPlanned
        plan.show_summary(console)
        if not force:
            plan.require_machine(folder)
        judged.append(plan)

    try:
        source = load_source(config.model, revision=config.revision, judge=judge)
        if not judged:
            judge(source.architecture, source.tied_embeddings)
    except _OnlyPlanned:
        return None
    plan = make_plan(config, source.architecture, source.tied_embeddings, machine)
    windows = _evaluation_windows(plan, source)
    _streams(plan, source)
    with created(folder, _record(plan, source), plan.config.to_toml(), source.tokenizer.json) as run:
        return _train(run, plan, source, windows, console)


class _OnlyPlanned(ConversionError):
    """Ends a dry run; a ConversionError, because load_source lets those through."""


def _record(plan: Plan, source: SourceModel) -> dict[str, Any]:
    """run.json of a new run."""
    local = Path(source.name).expanduser().is_dir() and source.name != DEMO
    return {
        "status": RUNNING,
        "model": str(Path(source.name).expanduser().absolute()) if local else source.name,
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


def _same_config(run: Run, model: str | None, settings: Mapping[str, Any], recipe: Path | None) -> QuantizeConfig:
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
        elif value not in (before, AUTO):  # what auto stood for was decided when the run began
            raise BadRun(
                f"{name}: the run was started with {before!r}, now it is {value!r}; resume it unchanged, or start anew "
                "without --resume"
            )
    return run.config.changed(**changes)


def _train(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> Run:
    """Train, bake, evaluate on the windows and finish, in a run folder that is held; mark it where that cannot be."""
    try:
        student = _trained_student(run, plan, source, windows, console)
    except (BadTrainingData, TrainingDiverged) as error:  # what resuming cannot mend
        run.update(status=FAILED, reason=str(error))
        raise
    tensors = bake(student)
    with replacing(run.folder / BAKED) as temporary:
        save_file(tensors, temporary)
    write_json(run.folder / WEIGHT_HASHES, hashes(student, tensors, source.tokenizer.json))
    evaluation = _evaluate(plan, source, tensors, windows, console) if windows else None
    run.update(status=FINISHED, finished=now(), evaluation=evaluation)  # last, so that a run is finished or not
    checkpoints.delete_all(run)
    which = "" if run.folder.parent == runs_root() else f" --run {run.folder}"
    console.print(
        f"Finished: {run.folder}. Now type:\n  rcpconv export{which} --out model.rcp", highlight=False, soft_wrap=True
    )
    return run


def _trained_student(run: Run, plan: Plan, source: SourceModel, windows: list[list[int]], console: Console) -> Decoder:
    config, device = plan.config, torch.device(plan.machine.device)
    half = config.precision == "bf16"
    teacher = original_decoder(source, torch.bfloat16 if half else torch.float32, ComputeOptions(half=half)).to(device)
    sequences = _sequences(run, plan, source, teacher, console)
    rotations = Rotations(r1=config.r1, r2=config.r2, r3=config.r3, r4=config.r4)
    prepared = prepare(source, rotations=rotations, one_table=config.tables == "one", seed=config.seed)
    options = ComputeOptions(half=half, checkpoint_layers=config.grad_checkpointing == "on")
    student = student_decoder(prepared, plan.quantization, options, device=device)
    trainer = Trainer(
        student=student,
        teacher=teacher,
        sequences=sequences,
        steps=plan.steps,
        config=config,
        run=run,
        console=console,
        evaluate=(lambda decoder: torch_perplexity(decoder, windows, "perplexity")) if windows else None,
    )
    try:
        trainer.train()
    except Interrupted:
        console.print(
            f"Stopped after step {trainer.counters.step} of {plan.steps}; everything is saved. Continue with:\n"
            f"  rcpconv quantize --resume {run.folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise
    return student


def _evaluate(
    plan: Plan, source: SourceModel, tensors: dict[str, Array], windows: list[list[int]], console: Console
) -> dict[str, Any]:
    """Perplexities of the original and of what was baked, in float32, as run.json keeps them."""
    device = torch.device(plan.machine.device)
    baked = baked_decoder(plan.architecture, plan.quantization, tensors.__getitem__)
    found = {
        name: torch_perplexity(decoder.to(device), windows, name)
        for name, decoder in (("original", original_decoder(source)), ("fake-quant", baked))
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
    text = _evaluation_text(c.eval_data)
    window = min(EVALUATION_WINDOW, plan.architecture.max_position_embeddings)
    windows = cut(tokenize(source.tokenizer.json, text.content), window, c.max_eval_tokens)
    if not windows:
        raise BadTrainingData(f"eval_data: {c.eval_data}: expected at least two tokens of text")
    return windows


def _evaluation_text(name: str) -> Text:
    if name in (DEMO, DEFAULT_CORPUS):
        return default_text(DEMO if name == DEMO else None)
    path = Path(name).expanduser()
    if not path.is_file():
        raise BadTrainingData(f"eval_data: {name}: expected a text file, {DEMO} or {DEFAULT_CORPUS}")
    return read_text(path)


def _sequences(run: Run, plan: Plan, source: SourceModel, teacher: Decoder, console: Console) -> Sequences:
    """The training texts as tokens, from the run's cache or into it."""
    c = plan.config
    assert c.seq_len is not None
    seq_len, wanted = c.seq_len, plan.steps * plan.tokens_per_step

    def rows() -> Iterable[list[int]]:
        if SELF in c.data:
            sampled = min(-(-wanted // SELF_EPOCHS), SELF_TOKENS)
            return _sampled(teacher, source, sampled, seq_len, c.seed, console)
        tokenizer, streams = _streams(plan, source)
        return tokenize_pieces(interleave(streams), tokenizer, source.tokenizer.info)

    token_N: NDArray[np.generic] = cached(
        run.folder / "tokens" / "train.npy", rows, plan.architecture.vocab_size, wanted + seq_len
    )
    return Sequences(token_N, seq_len, c.seed)


def _streams(plan: Plan, source: SourceModel) -> tuple[Tokenizer, list[Iterator[Piece]]]:
    """The tokenizer and the training texts, not read yet. Raises BadTrainingData for one that is not there."""
    tokenizer = Tokenizer.from_str(source.tokenizer.json.decode())
    render = chat_renderer(tokenizer, source.tokenizer.info)
    return tokenizer, [stream for name in plan.config.data if name != SELF for stream in read_source(name, render)]


def _sampled(
    teacher: Decoder, source: SourceModel, tokens: int, seq_len: int, seed: int, console: Console
) -> Iterable[list[int]]:
    def tell(done: int) -> None:
        console.print(f"sampled {done:,} of {tokens:,} tokens from the model", highlight=False)

    return sample(teacher, source.tokenizer.info, tokens=tokens, seq_len=seq_len, seed=seed, tell=tell)
