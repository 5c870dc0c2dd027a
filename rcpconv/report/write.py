"""`rcpconv report` as a function: measures a finished run and writes its page."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tokenizers import Tokenizer

from rcpconv.config import DEMO
from rcpconv.evaluate import (
    FAKE_QUANT,
    GENERATION_CAPTION,
    GENERATION_HEADINGS,
    ORIGINAL,
    generation_figures,
    pick_device,
)
from rcpconv.generation import GREEDY, LARGEST_N, SAMPLED, distinct, longest_repeat
from rcpconv.heldout import Text, default_text
from rcpconv.inspection import model_size, size_json
from rcpconv.report import figures
from rcpconv.report.measure import BEFORE, Measured, Samples, measure
from rcpconv.report.page import facts, folded, image, page, paragraph, section, side_by_side, table
from rcpconv.runs import METRICS, Run, write_text
from rcpconv.scheme import WEIGHT_BITS
from rcpconv.train.progress import read_metrics
from rcpformat.errors import OutputExists

REPORT = "report.html"
"""Its name in the run folder."""
MAX_TOKENS = 4096
GENERATIONS, GENERATION_TOKENS = 8, 64


def write_report(
    run: Run,
    out: Path | None = None,
    *,
    force: bool = False,
    text: Text | None = None,
    max_tokens: int = MAX_TOKENS,
    generations: int = GENERATIONS,
    generation_tokens: int = GENERATION_TOKENS,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the page of a finished run and return its path: `out`, else report.html in the run folder.

    text: None = the bundled held-out text. max_tokens: of it, for perplexity, errors and ranges. generations: prompts
    to continue by generation_tokens each; 0 = none. `tell` hears what is being done.
    Raises BadRun for a run that is not finished, OutputExists, EvaluationFailed, and what opening the original raises.
    """
    run.require_finished()
    out = out or run.folder / REPORT
    if not force and os.path.lexists(out):
        raise OutputExists(f"{out}: expected a free path, found a file; choose another, or overwrite it with --force")
    text = text or default_text(DEMO)
    found = measure(
        run,
        run.source(),
        text,
        max_tokens=max_tokens,
        generations=generations,
        generation_tokens=generation_tokens,
        device=pick_device(device),
        tell=tell,
    )
    tell("the page")
    write_text(out, _page(run, text, found))
    return out


def _page(run: Run, text: Text, found: Measured) -> str:
    sections = [
        _overview(run, text, found),
        _curves(run),
        _errors(found, text),
        _weights(found),
        _clips(found),
        _ranges(run, found, text),
        _memory(run),
    ]
    if found.samples is not None:
        sections.append(_samples(run, found.samples, text))
    return page(f"Report of {run.name}", *sections)


def _overview(run: Run, text: Text, found: Measured) -> str:
    q = run.quantization
    rotations = [name.upper() for name in ("r1", "r2", "r3", "r4") if getattr(q, name)]
    c = run.config
    tied = run.architecture.tied_table and not run.architecture.head_matrix
    learned = [name for name in rotations if name == "R2" or (name == "R1" and not tied)]
    turned = ", ".join(rotations) or "none"
    if c.rotation_steps and learned:
        turned += f"; {' and '.join(learned)} learned in {c.rotation_steps:,} steps before training"
    groups = f"{q.group_size}" + (f", but {', '.join(c.group_size_of)}" if q.group_size_overrides else "")
    last = [{"tokens": 0, "step": 0}, *read_metrics(run.folder / METRICS)][-1]
    rows = [
        ("model", run.provenance.get("base_model", run.record["model"])),
        ("scheme", f"W2A{q.a_bits}KV{q.kv_bits}, method {q.method}, groups of {groups}"),
        ("rotations", turned),
        ("trained on", f"{last['tokens']:,} tokens in {last['step']:,} steps"),
        ("began", _readable(run.record["created"])),
        ("finished", _readable(run.record["finished"])),
    ]
    if c.progressive_bits > WEIGHT_BITS:
        first = (
            f"{c.progressive_bits} bits in the first {c.progressive_share:.0%} of the steps, {WEIGHT_BITS} after that"
        )
        rows.insert(2, ("weights in training", first))
    names = {ORIGINAL: ORIGINAL, BEFORE: f"{FAKE_QUANT}, {BEFORE}", FAKE_QUANT: f"{FAKE_QUANT}, trained"}
    base = found.perplexity[ORIGINAL]
    perplexities = [
        (names[name], f"{value:.3f}", f"{value / base - 1:+.1%}") for name, value in found.perplexity.items()
    ]
    return section(
        "Run",
        facts(rows),
        table(("model", "perplexity", "over the original"), perplexities),
        paragraph(f"On {text.name}: {found.tokens:,} tokens in windows of {found.window}; float32."),
        folded("recipe.toml", run.recipe),
    )


def _readable(time: str) -> str:
    """A time of rcpconv.runs.now, to the second."""
    return time.partition(".")[0].replace("T", " ") + " UTC"


def _curves(run: Run) -> str:
    lines = read_metrics(run.folder / METRICS)
    perplexity = run.evaluation.get("perplexity", {})
    parts = []
    if lines:
        parts.append(_image(figures.curves(lines, perplexity), "loss and perplexity over training tokens"))
    else:
        parts.append(paragraph("No step of training was logged."))
    if perplexity:
        measured = ", ".join(f"{name} {value:.3f}" for name, value in perplexity.items())
        text = Path(run.evaluation["text"]).name
        parts.append(paragraph(f"At the end, on {text} in windows of {run.evaluation['window']}: {measured}."))
    if lines and not any("perplexity" in line for line in lines):
        parts.append(paragraph("For a curve of perplexity, train with --eval-every."))
    return section("Training", *parts)


def _errors(found: Measured, text: Text) -> str:
    return section(
        "Error by layer",
        paragraph(
            "Against the rotated original: ‖quantized − original‖ / ‖original‖. Outputs are those of whole models on "
            f"{text.name}, so the errors of earlier layers are in those of later ones."
        ),
        _image(
            figures.errors(found.weights_before, found.weights_after, found.outputs_before, found.outputs_after),
            "relative error of weights and outputs by layer",
        ),
    )


def _weights(found: Measured) -> str:
    return section(
        "Levels",
        paragraph(
            "The four int8 levels of every group of weights. In each row the largest level has magnitude 127. Before "
            "training: the quantizers' first values, made anew."
        ),
        _image(figures.levels(found.weights_before, found.weights_after), "histograms of levels"),
    )


def _clips(found: Measured) -> str:
    return section(
        "Clipping and partition",
        paragraph(
            "Of every group: how far its outer levels reach, relative to the extremes of the rotated original's "
            "weights (σ(β) and σ(γ) of RCP at the start), and the distances of neighbouring levels."
        ),
        _image(figures.partitions(found.weights_before, found.weights_after), "histograms of clips and gaps"),
        paragraph("The clips of activations, keys and values: the share of a token's peak that is represented."),
        _image(figures.clips(found.clips_before, found.clips_after), "clips of activations and KV cache by layer"),
    )


def _ranges(run: Run, found: Measured, text: Text) -> str:
    def mean(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.2f}"

    rows = [
        (
            name,
            f"{max(r.largest for r in found.unrotated[site]):.2f}",
            f"{max(r.largest for r in found.rotated[site]):.2f}",
            mean([r.crest for r in found.unrotated[site]]),
            mean([r.crest for r in found.rotated[site]]),
        )
        for site, name in figures.SITE_NAMES.items()
    ]
    headings = ("", "largest, unrotated", "rotated", "peak / RMS, unrotated", "rotated")
    return section(
        "Activations and KV cache",
        paragraph(
            f"What the quantizers see on {text.name}, in the unquantized model with folded norms: magnitudes, over "
            "tokens (and heads). Peak / RMS is of a token, the median over tokens, the mean over layers: the smaller, "
            "the more of a token's values survive few bits."
        ),
        _image(figures.ranges(found.unrotated, found.rotated), "magnitudes before and after rotation, by layer"),
        table(headings, rows),
    )


def _memory(run: Run) -> str:
    sizes = size_json(model_size(run.architecture, run.quantization, run.provenance, len(run.tokenizer_json)))
    rows = [
        (kind, f"{nbytes:,}", f"{nbytes / sizes['bytes']:.1%}") for kind, nbytes in sizes["by_kind"].items() if nbytes
    ]
    rows.append(("file", f"{sizes['bytes']:,}", "100.0%"))
    rows.append(("original in FP16", f"{sizes['fp16_bytes']:,}", f"{sizes['ratio']:.2f}× the file"))
    return section(
        "Memory",
        table(("kind", "bytes", "share"), rows),
        paragraph(
            f"{sizes['linear_weights']:,} weights in 2-bit layers, {sizes['bits_per_linear_weight']:.3f} bits each "
            "with levels and scales. The file's provenance and chat template come on top."
        ),
    )


def _samples(run: Run, samples: Samples, text: Text) -> str:
    tokenizer = Tokenizer.from_str(run.tokenizer_json.decode())
    found, task = samples.found, samples.task

    def cell(tokens: Sequence[int]) -> tuple[str, str]:
        repeated = 1 - distinct(tokens, LARGEST_N)
        return tokenizer.decode(tokens), f"repeated {repeated:.0%}, longest {longest_repeat(tokens)} tokens"

    rows = [(f"{result.name} {result.decoding}", *generation_figures(result)) for result in found.results]
    parts = [
        paragraph(
            f"{found.prompts} prompts of {found.prompt_tokens} tokens from {text.name}, continued by {found.tokens}; "
            f"sampled at temperature {found.temperature}. Tokens that end a text are never chosen."
        ),
        table(("", *GENERATION_HEADINGS), rows),
        paragraph(GENERATION_CAPTION[0].upper() + GENERATION_CAPTION[1:] + "."),
        paragraph(found.verdict[0].upper() + found.verdict[1:] + "."),
    ]
    for i, prompt in enumerate(task.prompts):
        both = (samples.original, samples.quantized)
        rows_of_texts = {
            GREEDY: [cell(written.greedy[i]) for written in both],
            SAMPLED: [cell(written.sampled[i]) for written in both],
        }
        parts.append(side_by_side(tokenizer.decode(prompt), (ORIGINAL, FAKE_QUANT), rows_of_texts))
    return section("Generations", *parts)


def _image(figure: Figure, description: str) -> str:
    return image(figures.svg(figure), description)
