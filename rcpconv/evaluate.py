"""Perplexity of the original, of the fake-quantized run and of the `.rcp` file in the runtime, on the same windows.

And what the two torch models write, when that is asked for.

The runtime runs in a child process (`rcp-run score`): nothing of it is imported. Knows nothing of training.

Shape suffixes: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from rcpconv.baking import lazy_baked
from rcpconv.errors import EvaluationFailed
from rcpconv.generation import GenerationResult, Generations, Task, measured
from rcpconv.heldout import Text, default_text
from rcpconv.hub import file_sha256
from rcpconv.inspection import model_size
from rcpconv.model import Decoder, LazyDecoder
from rcpconv.prepare import lazy_original
from rcpconv.runs import Run
from rcpformat import spec
from rcpformat.architecture import Architecture, Quantization, TokenizerInfo
from rcpformat.reader import RcpFile

ORIGINAL, FAKE_QUANT, RCP = "original", "fake-quant", "rcp"
MODELS = (ORIGINAL, FAKE_QUANT, RCP)

DEFAULT_WINDOW = 1024
GENERATION_TOKENS = 256
GENERATION_HEADINGS = ("distinct-1 to 4 (%)", "repeated", "longest", "teacher")
GENERATION_CAPTION = (
    "repeated: share of 4-grams that came before; longest: tokens of the longest span that is repeated; "
    "teacher: share of the original's greedy tokens that this model would choose too"
)
LOGIT_FILE_BYTES = 512 << 20
"""The runtime's logits lie on disk this much at a time."""
_LOGIT_ELEMENTS = 1 << 24
"""Logits in memory at a time when only likelihoods are wanted."""
_STREAM_BYTES = 1 << 30
"""Residual streams in memory at a time where a model is gone through piece by piece."""


def tokenize(tokenizer_json: bytes, text: str) -> list[int]:
    """The whole text as one stream of ids, by the model's own tokenizer, without special tokens."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def cut(tokens: Sequence[int], window: int, max_tokens: int | None = None) -> list[list[int]]:
    """Windows of `window` tokens without overlap, of the first max_tokens tokens.

    A shorter rest at the end is left out, as the quantization papers do, unless it is all there is.
    """
    tokens = tokens[:max_tokens]
    whole = len(tokens) // window
    if not whole:
        return [list(tokens)] if len(tokens) > 1 else []
    return [list(tokens[i * window : (i + 1) * window]) for i in range(whole)]


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model's row of the table."""

    name: str
    perplexity: float
    bytes: int | None = None
    """Of its weights as FP16, or of its file."""
    ratio: float | None = None
    """FP16 bytes over `bytes`."""
    sha256: str | None = None
    """Of the file."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one model's predictions are from another's, over all scored positions."""

    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    mean_kl: float
    """KL(reference ‖ other), nats a token."""
    top1_margin: float = 0.0
    mean_kl_margin: float = 0.0
    """Of both, how much the same windows have more here than between torch's float32 and its float64: 0 for these."""
    top1_margin_error: float = 0.0
    mean_kl_margin_error: float = 0.0
    """Standard errors of the margins. Windows count as independent; positions of one do not."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `rcpconv eval` found."""

    text: str
    window: int
    tokens: int
    """Scored ones: the first of each window is not."""
    models: list[ModelResult]
    agreement: dict[str, Difference]
    """By "runtime vs. torch float32", "runtime vs. torch float64" and "torch float32 vs. torch float64"."""
    generations: Generations | None = None


def _progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)


@torch.inference_mode()
def torch_perplexity(decoder: Decoder, windows: Sequence[Sequence[int]], name: str) -> float:
    """Perplexity of a decoder, on the device that it is on; logits in float32, sums in float64."""
    total, count = 0.0, 0
    for window in _progress(windows, name):
        tokens = torch.tensor(window, device=decoder.inv_freq.device)
        total += _loss(decoder.hidden(tokens[None])[0], decoder.head, tokens)
        count += len(tokens) - 1
    return math.exp(total / count)


@torch.inference_mode()
def lazy_perplexity(
    decoder: LazyDecoder, windows: Sequence[Sequence[int]], name: str, device: torch.device | str = "cpu"
) -> float:
    """As torch_perplexity, to the bit, with one piece of the decoder in memory: each is made for many windows."""
    total, count = 0.0, 0
    a = decoder.architecture
    at_a_time = max(1, _STREAM_BYTES // (4 * a.hidden_size * max(map(len, windows))))
    tokens = [torch.tensor(window, device=device) for window in windows]
    for start in _progress(range(0, len(tokens), at_a_time), name):
        some = tokens[start : start + at_a_time]
        for tokens_T, (hidden_TC, head) in zip(some, decoder.outputs(some), strict=True):
            total += _loss(hidden_TC, head, tokens_T)
            count += len(tokens_T) - 1
    return math.exp(total / count)


def _loss(hidden_TC: Tensor, head: Any, tokens_T: Tensor) -> float:
    """The sum over all tokens but the first of their negative log-likelihood."""
    rows = max(1, _LOGIT_ELEMENTS // len(head.weight))
    parts = zip(hidden_TC[:-1].split(rows), tokens_T[1:].split(rows), strict=True)
    return sum(F.cross_entropy(head.logits(h), t, reduction="none").double().sum().item() for h, t in parts)


class Runtime:
    """A `.rcp` file in the runtime, one child process a question."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def score(self, windows: Sequence[Sequence[int]], *options: str) -> Iterator[dict[str, Any]]:
        """What `rcp-run score` says about each window, as it says it. Raises EvaluationFailed with its message."""
        with tempfile.TemporaryDirectory(prefix="rcpconv-eval-") as folder:
            tokens = Path(folder, "tokens.jsonl")
            tokens.write_text("".join(json.dumps(window) + "\n" for window in windows))
            command = [sys.executable, "-m", "rcprun", "score", str(self.path), "--tokens", str(tokens), *options]
            errors = Path(folder, "stderr")
            with (
                errors.open("w+") as stderr,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
            ):
                assert child.stdout is not None
                try:
                    for line in child.stdout:
                        yield json.loads(line)
                except BaseException:  # also when nobody asks for the next line
                    child.terminate()
                    raise
            if child.returncode:
                reason = errors.read_text().strip() or f"exit code {child.returncode}"
                raise EvaluationFailed(f"{self.path}: rcp-run could not score it: {reason}")

    def perplexity(self, windows: Sequence[Sequence[int]], name: str) -> float:
        """Perplexity of the file."""
        total, count = 0.0, 0
        scores = self.score(windows)
        for window in _progress(windows, name):
            score = next(scores)
            assert score["n"] == len(window), (score["n"], len(window))
            total, count = total + score["logprob"], count + len(window) - 1
        return math.exp(-total / count)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        """(T, V) for each window, by way of temporary files of LOGIT_FILE_BYTES, or of one window if that is more."""
        with RcpFile.open(self.path) as file:
            window_bytes = 4 * file.architecture.vocab_size * max(map(len, windows))
        at_a_time = max(1, LOGIT_FILE_BYTES // window_bytes)
        for start in range(0, len(windows), at_a_time):
            yield from self._logits_of_some(windows[start : start + at_a_time])

    def _logits_of_some(self, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
        with tempfile.TemporaryDirectory(prefix="rcpconv-logits-") as folder:
            path = Path(folder, "logits.npy")
            list(self.score(windows, "--logits", str(path)))
            rows = np.load(path, mmap_mode="r")
            start = 0
            for window in windows:
                yield np.array(rows[start : start + len(window)])
                start += len(window)


class _DifferenceMeter:
    """Collects a window at a time."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int, float]] = []
        """Positions, those at which both agree, and the sum of KL."""

    def add(self, reference_TV: Tensor, other_TV: Tensor) -> None:
        """Logits of the same positions."""
        p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (reference_TV, other_TV))
        same = int((reference_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        self.windows.append((len(p), same, float(F.kl_div(q, p, reduction="sum", log_target=True))))

    def result(self, unavoidable: _DifferenceMeter) -> Difference:
        """unavoidable: has seen the same windows."""
        found, others = np.array(self.windows), np.array(unavoidable.windows)
        (top1, kl), margins = found[:, 1:].sum(0) / found[:, 0].sum(), found[:, 1:] - others[:, 1:]
        (more_top1, more_kl), count = margins.sum(0) / found[:, 0].sum(), len(margins)
        spread = margins - found[:, :1] * [more_top1, more_kl]
        error_top1, error_kl = np.sqrt((spread**2).sum(0) * count / max(1, count - 1)) / found[:, 0].sum()
        return Difference(
            top1_agreement=float(top1),
            mean_kl=float(kl),
            top1_margin=float(more_top1),
            mean_kl_margin=float(more_kl),
            top1_margin_error=float(error_top1),
            mean_kl_margin_error=float(error_kl),
        )


@torch.inference_mode()
def agreement(decoder: Decoder, runtime: Runtime, windows: Sequence[Sequence[int]]) -> dict[str, Difference]:
    """The runtime against the same quantized model in torch, and torch's float32 against its float64 (design, 7c).

    Teacher-forced, at every scored position. The runtime is as good as can be asked when its difference is no larger.
    """
    from_single, from_double, unavoidable = _DifferenceMeter(), _DifferenceMeter(), _DifferenceMeter()
    runtime_logits = runtime.logits(windows)
    for window in _progress(windows, "agreement"):
        tokens = torch.tensor(window, device=decoder.inv_freq.device)[None]
        logits = {}
        for dtype in (torch.float32, torch.float64):
            decoder.options.dtype = dtype
            logits[dtype] = decoder(tokens)[0, :-1]
        decoder.options.dtype = torch.float32
        single, double = logits[torch.float32], logits[torch.float64]
        from_file = torch.from_numpy(next(runtime_logits)[:-1]).to(single.device)
        from_single.add(single, from_file)
        from_double.add(double, from_file)
        unavoidable.add(double, single)
    return {
        "runtime vs. torch float32": from_single.result(unavoidable),
        "runtime vs. torch float64": from_double.result(unavoidable),
        "torch float32 vs. torch float64": unavoidable.result(unavoidable),
    }


def evaluate(
    *,
    run: Run | None,
    rcp: Path | None,
    text: Text | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    skip: Sequence[str] = (),
    compare: bool = False,
    generations: int = 0,
    generation_tokens: int = GENERATION_TOKENS,
    device: str = "auto",
) -> Evaluation:
    """Perplexity of up to three MODELS: the run's original, the run, and the file; `skip` leaves some out.

    text: None = default_text. window: tokens; None = 1024, or the model's context where that is shorter.
    compare: measure the agreement too (needs `rcp`).
    generations: continue so many prompts from the text by generation_tokens tokens each, with the torch models.
    device: of the torch models: "cpu", "cuda", or "auto" (cuda where there is one).
    Raises EvaluationFailed when there is nothing to do, the window is too long, or the file is not of the run.
    """
    wanted = [name for name in MODELS if name not in skip and (rcp if name == RCP else run) is not None]
    if not wanted:
        raise EvaluationFailed("nothing to evaluate: name a run with --run or a file with --rcp, and skip less")
    if compare and RCP not in wanted:
        raise EvaluationFailed("agreement is between a file and torch: name the file with --rcp")
    if generations and not {ORIGINAL, FAKE_QUANT} & set(wanted):
        raise EvaluationFailed("generations are written by the torch models: name a run with --run, and skip less")
    target = pick_device(device)
    model = Quantized.of(run, rcp)
    context = model.architecture.max_position_embeddings
    window = window or min(DEFAULT_WINDOW, context)
    if window > context:
        raise EvaluationFailed(f"window: expected at most {context} tokens, the model's context, found {window}")
    text = text or default_text(model.base_model)
    tokens = tokenize(model.tokenizer_json, text.content)
    windows = cut(tokens, window, max_tokens)
    if not windows:
        raise EvaluationFailed(f"{text.name}: expected at least two tokens of text")
    task = None
    if generations:
        task = Task.cut(tokens, model.tokenizer, count=generations, tokens=generation_tokens, context=context)
    fp16 = model_size(model.architecture, model.quantization, model.provenance, 0).fp16_bytes
    results, differences = [], {}
    written: list[GenerationResult] = []
    teacher = None
    if ORIGINAL in wanted:
        assert run is not None
        original = lazy_original(run.source(), device=target)
        perplexity = lazy_perplexity(original, windows, ORIGINAL, target)
        results.append(ModelResult(name=ORIGINAL, perplexity=perplexity, bytes=fp16, ratio=1.0))
        if task is not None:
            teacher = task.write(original.whole().to(target))
            written += measured(ORIGINAL, teacher)
    quantized = lazy_baked(model.architecture, model.quantization, model.tensor)
    if FAKE_QUANT in wanted:
        perplexity = lazy_perplexity(quantized, windows, FAKE_QUANT, target)
        results.append(ModelResult(name=FAKE_QUANT, perplexity=perplexity))
        if task is not None:
            decoder = quantized.whole().to(target)
            share = None if teacher is None else task.agreement(decoder, teacher.greedy)
            written += measured(FAKE_QUANT, task.write(decoder), share)
    if RCP in wanted:
        assert rcp is not None
        runtime = Runtime(rcp)
        size, sha256 = rcp.stat().st_size, file_sha256(rcp)
        perplexity = runtime.perplexity(windows, RCP)
        results.append(ModelResult(name=RCP, perplexity=perplexity, bytes=size, ratio=fp16 / size, sha256=sha256))
        if compare:
            differences = agreement(quantized.whole().to(target), runtime, windows)
    return Evaluation(
        text=text.name,
        window=window,
        tokens=sum(len(tokens) - 1 for tokens in windows),
        models=results,
        agreement=differences,
        generations=None if task is None else task.generations(written, ORIGINAL),
    )


def render(evaluation: Evaluation, console: Console) -> None:
    """Print the table, and the agreement if it was measured."""
    table = Table(
        title=f"{evaluation.text}: {evaluation.tokens:,} tokens scored, windows of {evaluation.window}",
        title_justify="left",
    )
    for heading in ("model", "perplexity", "bytes", "ratio to FP16"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in evaluation.models:
        size = "" if result.bytes is None else f"{result.bytes:,}"
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(result.name, f"{result.perplexity:.3f}", size, ratio)
    console.print(table)
    if evaluation.agreement:
        headings = ("same top-1", "mean KL (nats)", "more top-1 than the last row", "more KL")
        table = Table("agreement, teacher-forced", *headings)
        for name, found in evaluation.agreement.items():
            top1 = f"{100 * found.top1_margin:+.2f} ± {100 * found.top1_margin_error:.2f} points"
            kl = f"{found.mean_kl_margin:+.4f} ± {found.mean_kl_margin_error:.4f}"
            more = (top1, kl) if found.top1_margin_error else ("", "")
            table.add_row(name, f"{found.top1_agreement:.4%}", f"{found.mean_kl:.3e}", *more)
        console.print(table)
    if evaluation.generations is not None:
        console.print(generation_table(evaluation.generations))
        console.print(f"Generations: {evaluation.generations.verdict}.", highlight=False, soft_wrap=True)


def generation_table(found: Generations) -> Table:
    """How repetitive each model's continuations are, and how far they follow the original's."""
    table = Table(
        title=f"{found.prompts} prompts of {found.prompt_tokens} tokens, continued by {found.tokens}; "
        f"sampled at temperature {found.temperature}",
        title_justify="left",
        caption=GENERATION_CAPTION,
        caption_justify="left",
    )
    headings = ("model", "decoding", *GENERATION_HEADINGS)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for result in found.results:
        table.add_row(result.name, result.decoding, *generation_figures(result))
    return table


def generation_figures(result: GenerationResult) -> list[str]:
    """The cells of a table under GENERATION_HEADINGS."""
    r, share = result.repetition, result.teacher_agreement
    distinct = " ".join(f"{100 * value:.1f}" for value in r.distinct)
    return [distinct, f"{r.rate:.1%}", f"{r.longest_repeat:.1f}", "" if share is None else f"{share:.1%}"]


def pick_device(name: str) -> torch.device:
    """ "cpu", "cuda", or "auto": cuda where there is one. Raises EvaluationFailed."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise EvaluationFailed("device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What is the same for a run and its file."""

    base_model: str | None
    provenance: Mapping[str, Any]
    architecture: Architecture
    quantization: Quantization
    tokenizer: TokenizerInfo
    tokenizer_json: bytes
    tensor: Callable[[str], NDArray[Any]]

    @classmethod
    def of(cls, run: Run | None, rcp: Path | None) -> Quantized:
        """Of a run, of a file, or of a file that was exported from the run (EvaluationFailed when it was not)."""
        of_file = of_run = None
        if rcp is not None:
            file = RcpFile.open(rcp)
            of_file = cls(
                base_model=file.metadata.provenance.get("base_model"),
                provenance=file.metadata.provenance,
                architecture=file.architecture,
                quantization=file.quantization,
                tokenizer=file.metadata.tokenizer,
                tokenizer_json=file.tokenizer_json(),
                tensor=file.tensor,
            )
        if run is not None:
            run.require_finished()
            of_run = cls(
                base_model=run.record["model"],
                provenance=run.provenance,
                architecture=run.architecture,
                quantization=run.quantization,
                tokenizer=run.tokenizer,
                tokenizer_json=run.tokenizer_json,
                tensor=run.tensor,
            )
        if of_run is not None and of_file is not None and not of_run._exported_as(of_file):
            assert run is not None
            raise EvaluationFailed(
                f"{rcp}: was not exported from {run.folder}; name the run that it is from with --run"
            )
        chosen = of_run or of_file
        assert chosen is not None
        return chosen

    def _exported_as(self, file: Quantized) -> bool:
        same = ("architecture", "quantization", "tokenizer_json")
        if any(getattr(self, key) != getattr(file, key) for key in same):
            return False
        names = spec.expected_tensors(self.architecture, self.quantization).keys() - {spec.TOKENIZER}
        return all(np.array_equal(self.tensor(name), file.tensor(name)) for name in sorted(names))
