"""What a training begins with: texts as sequences of tokens, rotations that are learned, the student as it starts.

For `rcpconv quantize` and for comparisons. Knows nothing of the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from rcpconv import distributed
from rcpconv.checkpoint import SourceModel
from rcpconv.config import SELF, QuantizeConfig
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder, LazyDecoder
from rcpconv.plan import Plan
from rcpconv.prepare import Rotations, lazy_student, prepare
from rcpconv.quantizers import Learning
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import CHECKPOINTS, ROTATIONS, Run
from rcpconv.train.chats import ChatRenderer
from rcpconv.train.checkpoints import StateFile
from rcpconv.train.rotations import Keeping, learn_rotations
from rcpconv.train.sampling import sample
from rcpconv.train.texts import read_source
from rcpconv.train.tokens import Mixture, Sequences, cached, interleave
from rcpconv.train.tokens import tokenize as tokenize_pieces


def training_sequences(
    run: Run, plan: Plan, source: SourceModel, teacher: Callable[[], Decoder], console: Console
) -> Sequences | Mixture:
    """The training texts as tokens, from the run's cache or into it; sampled ones apart where there are others too."""
    c = plan.config
    assert c.seq_len is not None
    seq_len, wanted = c.seq_len, plan.steps * plan.tokens_per_step
    share = c.self_share if set(c.data) > {SELF} else 1.0

    def sampled() -> Iterator[list[int]]:
        return sampled_rows(c, source, share * wanted, teacher(), console)

    def sequences(name: str, rows: Callable[[], Iterator[list[int]]]) -> Sequences:
        path = run.folder / "tokens" / name
        return Sequences(cached(path, rows, plan.architecture.vocab_size, wanted + seq_len), seq_len, c.seed)

    if SELF not in c.data:
        return sequences("train.npy", lambda: written_rows(c, source))
    if share == 1.0:
        return sequences("train.npy", sampled)
    return Mixture(sequences("self.npy", sampled), sequences("train.npy", lambda: written_rows(c, source)), share)


def written_rows(config: QuantizeConfig, source: SourceModel) -> Iterator[list[int]]:
    """Rows of tokens of the training texts that somebody wrote."""
    info, tokenizer = source.tokenizer.info, Tokenizer.from_str(source.tokenizer.json.decode())
    with ChatRenderer(source.name, tokenizer, info) as render:
        streams = [stream for name in config.data if name != SELF for stream in read_source(name, render)]
        yield from tokenize_pieces(interleave(streams), tokenizer, info)


def sampled_rows(
    config: QuantizeConfig, source: SourceModel, wanted: float, teacher: Decoder, console: Console
) -> Iterator[list[int]]:
    """Rows of tokens sampled from the teacher, for a training on `wanted` of them."""
    assert config.seq_len is not None
    tokens = min(math.ceil(wanted / config.self_epochs), config.self_tokens)
    yield from _sampled(teacher, source, tokens, config.seq_len, config.seed, console)


def _sampled(
    teacher: Decoder, source: SourceModel, tokens: int, seq_len: int, seed: int, console: Console
) -> Iterable[list[int]]:
    def tell(done: int) -> None:
        console.print(f"sampled {done:,} of {tokens:,} tokens from the model", highlight=False)

    return sample(teacher, source.tokenizer.info, tokens=tokens, seq_len=seq_len, seed=seed, tell=tell)


def learned_rotations(
    run: Run,
    plan: Plan,
    source: SourceModel,
    teacher: Callable[[], Decoder],
    sequences: Sequences | Mixture,
    console: Console,
    state: StateFile | None = None,
) -> LearnedRotations | None:
    """What the run folder has, learned now where it has none; None where the plan wants none.

    teacher: gives the original, whole. Until the rotations are learned, so is the student in every process, its layers
    computed twice. state: where learning goes on from; by default in the run folder.
    """
    c, path = plan.config, run.folder / ROTATIONS
    if not plan.rotation_batch:
        return None
    if state is None:
        how = f"rcpconv quantize --resume {run.folder}"
        state = StateFile(path=run.folder / CHECKPOINTS / "rotations.pt", how=how)
    if not distributed.from_first(path.exists()):
        assert c.batch_size is not None and c.grad_accum is not None and c.rotation_steps is not None
        student = lazy_untrained(plan, source, initialise=False).whole().to(plan.machine.device)
        student.options = replace(student.options, checkpoint_layers=True)
        size, all_of_step = plan.rotation_batch, c.batch_size * c.grad_accum

        def batches(step: int) -> list[Tensor]:
            own = distributed.own_sequences(step * all_of_step, size, all_of_step // size)
            return [torch.from_numpy(sequences.batch(*each)).to(plan.machine.device) for each in own]

        # A tenth of them at most is lost, where anything is saved before a stop.
        every = min(c.checkpoint_every, math.ceil(c.rotation_steps / 10))
        learned = learn_rotations(
            student,
            teacher(),
            batches,
            steps=c.rotation_steps,
            rate=c.rotation_lr,
            r1=c.r1,
            r2=c.r2,
            tell=lambda text: console.print(text, highlight=False),
            keeping=Keeping(file=state, every=every),
            low_memory=c.low_memory,
        )
        if not distributed.rank():
            learned.save(path)
        del student, learned
        distributed.wait_for_all()
    if not distributed.rank():
        state.delete()
    return LearnedRotations.load(path)


def untrained_student(plan: Plan, source: SourceModel, learned: LearnedRotations | None = None) -> Decoder:
    """The model that a plan trains, as it starts; learned: see learned_rotations."""
    return lazy_untrained(plan, source, learned).whole().to(plan.machine.device)


def lazy_untrained(plan: Plan, source: SourceModel, learned: LearnedRotations | None = None, **how: Any) -> LazyDecoder:
    """As untrained_student, piece by piece; how: see lazy_student."""
    c, a = plan.config, plan.architecture
    rotations = Rotations(r1=c.r1, r2=c.r2, r3=c.r3, r4=c.r4)
    prepared = prepare(
        source,
        rotations=rotations,
        one_table=a.tied_table,
        head_matrix=a.head_matrix,
        seed=c.seed,
        learned=learned,
    )
    options = ComputeOptions(half=c.precision == "bf16", checkpoint_layers=c.grad_checkpointing == "on")
    learning = Learning(
        reach=c.weight_reach,
        residual_levels=c.level_gradient == "residual",
        fixed_range=c.weight_range == "fixed",
    )
    return lazy_student(
        prepared,
        plan.quantization,
        options,
        device=plan.machine.device,
        learning=learning,
        a_clip=c.a_clip,
        **how,
    )
