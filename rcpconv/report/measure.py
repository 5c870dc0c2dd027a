"""Measures a finished run for its report: the original, the model before training, and the trained one.

"Before training" is made anew: the same rotations and the quantizers' first values. Models are loaded one after
another, two at most at a time. Knows nothing of plots and pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rcpconv.baking import bake, baked_decoder
from rcpconv.checkpoint import SourceModel
from rcpconv.errors import EvaluationFailed
from rcpconv.evaluate import FAKE_QUANT, ORIGINAL, cut, tokenize, torch_perplexity
from rcpconv.generation import Generations, Task, Written, measured
from rcpconv.heldout import Text
from rcpconv.layers import ComputeOptions
from rcpconv.prepare import Rotations, original_decoder, prepare, rotated_decoder, student_decoder
from rcpconv.report.activations import SiteRange, output_errors, ranges
from rcpconv.report.weights import WeightStatistics, clips, weight_statistics
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import ROTATIONS, Run

BEFORE = "before training"
WINDOW = 512
"""Tokens of a window, or the model's context where that is shorter."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What original and quantized model wrote, and what was counted in it."""

    task: Task
    original: Written
    quantized: Written
    found: Generations


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All figures of a report that are not in the run folder already. `before` and `after`: training."""

    tokens: int
    """Of the text that perplexity, errors and ranges are measured on."""
    window: int
    perplexity: dict[str, float]
    """By ORIGINAL, BEFORE and FAKE_QUANT."""
    weights_before: WeightStatistics
    weights_after: WeightStatistics
    clips_before: dict[str, list[float]]
    clips_after: dict[str, list[float]]
    outputs_before: dict[str, float]
    outputs_after: dict[str, float]
    unrotated: dict[str, list[SiteRange]]
    rotated: dict[str, list[SiteRange]]
    samples: Samples | None


def measure(
    run: Run,
    source: SourceModel,
    text: Text,
    *,
    max_tokens: int,
    generations: int,
    generation_tokens: int,
    device: torch.device,
    tell: Callable[[str], None],
) -> Measured:
    """Everything; `tell` hears what is being done. Raises EvaluationFailed for a text that is too short."""
    a, q = run.architecture, run.quantization
    tokens = tokenize(run.tokenizer_json, text.content)
    windows = cut(tokens, min(WINDOW, a.max_position_embeddings), max_tokens)
    if not windows:
        raise EvaluationFailed(f"{text.name}: expected at least two tokens of text")
    task = None
    if generations:
        context = a.max_position_embeddings
        task = Task.cut(tokens, run.tokenizer, count=generations, tokens=generation_tokens, context=context)

    tell("the original")
    original = original_decoder(source, device=device)
    perplexity = {ORIGINAL: torch_perplexity(original, windows, ORIGINAL)}
    teacher = None if task is None else task.write(original)
    del original

    tell("before and after rotation")
    turned = Rotations(r1=q.r1, r2=q.r2, r3=q.r3, r4=q.r4)
    unturned = Rotations(r1=False, r2=False, r3=False, r4=False)
    learned = LearnedRotations.load(run.folder / ROTATIONS) if run.config.rotation_steps else None
    plain, prepared = (
        prepare(
            source,
            rotations=rotations,
            one_table=a.tied_table,
            head_matrix=a.head_matrix,
            seed=run.config.seed,
            learned=also,
        ).on(device)
        for rotations, also in ((unturned, None), (turned, learned))
    )
    unrotated = ranges(rotated_decoder(plain), windows)
    reference = rotated_decoder(prepared)
    rotated = ranges(reference, windows)

    tell("before training")
    start = bake(student_decoder(prepared, q, ComputeOptions(), device=device, a_clip=run.config.a_clip))
    quantized = baked_decoder(a, q, start.__getitem__).to(device)
    perplexity[BEFORE] = torch_perplexity(quantized, windows, BEFORE)
    outputs_before = output_errors(reference, quantized, windows)

    tell("the trained model")
    quantized = baked_decoder(a, q, run.tensor).to(device)
    perplexity[FAKE_QUANT] = torch_perplexity(quantized, windows, FAKE_QUANT)
    outputs_after = output_errors(reference, quantized, windows)
    del reference
    samples = None
    if task is not None and teacher is not None:
        written = task.write(quantized)
        share = task.agreement(quantized, teacher.greedy)
        results = [*measured(ORIGINAL, teacher), *measured(FAKE_QUANT, written, share)]
        samples = Samples(task=task, original=teacher, quantized=written, found=task.generations(results, ORIGINAL))
    del quantized

    tell("weights")
    weights = weight_statistics(prepared, q, {BEFORE: start.__getitem__, FAKE_QUANT: run.tensor})
    return Measured(
        tokens=sum(len(window) - 1 for window in windows),
        window=len(windows[0]),
        perplexity=perplexity,
        weights_before=weights[BEFORE],
        weights_after=weights[FAKE_QUANT],
        clips_before=clips(start.__getitem__, a.num_layers),
        clips_after=clips(run.tensor, a.num_layers),
        outputs_before=outputs_before,
        outputs_after=outputs_after,
        unrotated=unrotated,
        rotated=rotated,
        samples=samples,
    )
