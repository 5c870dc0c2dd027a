"""Tasks of lm-evaluation-harness (the extra `lm-eval`) on the original, the run and the `.rcp` file.

The torch models answer the harness here, by arithmetic that needs no harness; the runtime does so in a child process
(`rcp-run eval`). Texts begin with BOS where the model's tokenizer adds one. Knows nothing of any task.

Shape suffixes: B sequences, T positions, C hidden_size, V vocabulary, S scored tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.table import Table
from tokenizers import Tokenizer

from rcpconv.baking import baked_decoder
from rcpconv.cached import CachedDecoder, largest_batch
from rcpconv.errors import ConversionError, EvaluationFailed
from rcpconv.evaluate import FAKE_QUANT, MODELS, ORIGINAL, RCP, Quantized, pick_device
from rcpconv.model import Decoder
from rcpconv.prepare import original_decoder
from rcpconv.runs import Run
from rcpformat.architecture import TokenizerInfo

DEFAULT_MAX_TOKENS = 256
"""Of a generation whose task does not say."""
_SAMPLING = {"temperature", "top_k", "top_p", "min_p"}
"""Settings that say nothing of greedy generations."""
_BATCH_TOKENS = 1 << 14
"""Tokens that are scored side by side."""


class Request(Protocol):
    """What the harness asks (lm_eval.api.instance.Instance)."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of one question."""


class Answers:
    """The three questions of the harness, answered by a decoder on the device that it is on."""

    def __init__(self, decoder: Decoder, tokenizer_json: bytes, info: TokenizerInfo) -> None:
        super().__init__()
        self.decoder, self.info = decoder, info
        self.context = decoder.architecture.max_position_embeddings
        self.tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(context, continuation) -> log-likelihood of the continuation, and whether it is the greedy one."""
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """(text,) -> log-likelihood of all of it after one BOS, in windows of the model's context."""
        texts = [[self._prefix(), *self._encode(*request.args)] for request in requests]
        pieces = [list(windows(tokens, self.context)) for tokens in texts]
        scores = iter(self._score([piece for of_text in pieces for piece in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in pieces]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """(context, settings) -> what the model writes after it, by its likeliest tokens.

        Raises EvaluationFailed where settings ask for anything else.
        """
        prompts = [self._prompt(*request.args) for request in requests]
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].length, reverse=True)
        while order:
            count = largest_batch(self.decoder, prompts[order[0]].length)
            batch, order = order[:count], order[count:]
            for i, text in zip(batch, self._write([prompts[i] for i in batch]), strict=True):
                found[i] = text
        return found

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_begin(self, text: str) -> list[int]:
        """With BOS where the tokenizer adds one."""
        tokens, bos = self._encode(text), self.info.bos_id
        return [bos, *tokens] if self.info.add_bos and bos is not None and tokens[:1] != [bos] else tokens

    def _prefix(self) -> int:
        """What stands before a text without a context. Raises EvaluationFailed."""
        prefix = [self.info.bos_id] if self.info.bos_id is not None else list(self.info.eos_ids[:1])
        if not prefix:
            raise EvaluationFailed(
                "the model has neither BOS nor EOS, after which a text without a context could begin"
            )
        return prefix[0]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both together, and how many of them are the continuation's; spaces between go with the latter."""
        begin = context.rstrip()
        continuation = context[len(begin) :] + continuation
        if not begin:
            tokens, prefix = self._encode(continuation), self._prefix()
            tokens = tokens if tokens[:1] == [prefix] else [prefix, *tokens]
            return tokens, len(tokens) - 1
        tokens = self._encode_begin(begin + continuation)
        return tokens, len(tokens) - len(self._encode_begin(begin))

    @torch.inference_mode()
    def _score(self, pieces: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Of the last so many tokens of each piece, after as many of the others as fit."""
        found = [(0.0, True)] * len(pieces)
        kept = [list(tokens[-self.context :]) for tokens, _ in pieces]
        order = sorted(range(len(pieces)), key=lambda i: len(kept[i]), reverse=True)
        while order:
            longest = len(kept[order[0]])
            count = max(1, _BATCH_TOKENS // longest)
            batch, order = order[:count], order[count:]
            tokens_BT = torch.tensor([kept[i] + [0] * (longest - len(kept[i])) for i in batch])
            hidden_BTC = self.decoder.hidden(tokens_BT.to(self.decoder.inv_freq.device))
            for i, hidden_TC in zip(batch, hidden_BTC, strict=True):
                end = len(kept[i])
                start = end - pieces[i][1]
                if start < 1:
                    raise EvaluationFailed(
                        f"a continuation of {end - start} tokens does not fit into the context of {self.context}"
                    )
                logits_SV = self.decoder.logits(hidden_TC[start - 1 : end - 1])
                target_S = torch.tensor(kept[i][start:], dtype=torch.long, device=logits_SV.device)
                losses_S = F.cross_entropy(logits_SV, target_S, reduction="none").double()
                found[i] = -losses_S.sum().item(), bool((logits_SV.argmax(-1) == target_S).all())
        return found

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> _Prompt:
        settings = dict(settings)
        until, limit = settings.pop("until", None) or [], settings.pop("max_gen_toks", DEFAULT_MAX_TOKENS)
        if settings.pop("do_sample", settings.get("temperature", 0) > 0):
            raise EvaluationFailed(
                "a task asks for sampled generations, which only the runtime writes; evaluate the file: rcp-run eval"
            )
        if unknown := settings.keys() - _SAMPLING:
            raise EvaluationFailed(
                f"{', '.join(sorted(unknown))}: a task's setting of generations that is unknown here"
            )
        tokens = (self._encode_begin(context) or [self._prefix()])[-max(1, self.context - limit) :]
        end = min(len(tokens) + limit, self.context)
        return _Prompt(tokens, end, (until,) if isinstance(until, str) else tuple(until))

    @torch.inference_mode()
    def _write(self, prompts: Sequence[_Prompt]) -> list[str]:
        """Continue prompts side by side: each at its own position, until all have ended."""
        length, device = max(prompt.length for prompt in prompts), self.decoder.inv_freq.device
        cached = CachedDecoder(self.decoder, len(prompts), length)
        texts = [list(prompt.tokens) for prompt in prompts]
        found: list[str | None] = [None] * len(prompts)
        for t in range(length - 1):
            if all(text is not None for text in found):
                break
            here_B = torch.tensor([text[t] if t < len(text) else 0 for text in texts], device=device)
            likeliest = cached.step(here_B).argmax(-1).tolist()
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                if found[i] is None and t + 1 == len(text):
                    text.append(likeliest[i])
                    found[i] = self._ended(prompt, text)
        return ["" if text is None else text for text in found]

    def _ended(self, prompt: _Prompt, text: Sequence[int]) -> str | None:
        """The generated text, if that was its last token."""
        generated = text[len(prompt.tokens) :]
        ends = generated[-1] in self.info.eos_ids
        found: str = self.tokenizer.decode(generated[:-1] if ends else generated)
        stops = [place for stop in prompt.stop if stop and (place := found.find(stop)) >= 0]
        if stops:
            return found[: min(stops)]
        return found if ends or len(text) == prompt.length else None


@dataclass(frozen=True)
class _Prompt:
    tokens: list[int]
    length: int
    """Of prompt and generation together, at most."""
    stop: tuple[str, ...]


def windows(tokens: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], int]]:
    """Spans of at most `size` tokens, and how many at their end to score: all but the first token once.

    As the harness cuts texts: without overlap, but that the last one reaches back until it is full.
    """
    for start in range(1, len(tokens), size - 1):
        end = min(start + size - 1, len(tokens))
        yield tokens[max(0, end - size) : end], end - start


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Which tasks to run, and how."""

    names: tuple[str, ...]
    folder: Path | None = None
    """Task definitions (YAML) beside the harness's own."""
    num_fewshot: int | None = None
    limit: int | None = None
    """Questions of each task."""

    def run(self, decoder: Decoder, tokenizer_json: bytes, info: TokenizerInfo) -> dict[str, Any]:
        """The harness's results for a torch model, as JSON values.

        Raises EvaluationFailed without the harness, for unknown tasks, and where it fails.
        """
        try:
            from lm_eval import __version__
            from lm_eval.api.model import LM
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise EvaluationFailed(
                f"tasks need lm-evaluation-harness, and {error.name} is not installed: pip install 'rcpconv[lm-eval]'"
            ) from error
        folder = None if self.folder is None else str(self.folder)
        try:
            manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
            if manager is None or not set(self.names) <= set(manager.all_tasks):
                manager = TaskManager(include_path=folder)  # with thousands of the harness's own: many seconds
            if unknown := sorted(set(self.names) - set(manager.all_tasks)):
                raise EvaluationFailed(
                    f"tasks: {unknown[0]!r}: lm-evaluation-harness knows no such task; see --tasks-path"
                )
            found = simple_evaluate(
                type("Torch", (Answers, LM), {})(decoder, tokenizer_json, info),
                tasks=list(self.names),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=manager,
                log_samples=False,
            )
        except ConversionError:
            raise
        except Exception as error:  # whatever tasks, data sets and the network raise
            raise EvaluationFailed(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
        kept = {key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions") if key in found}
        plain: dict[str, Any] = json.loads(
            json.dumps(kept | {"limit": self.limit, "lm_eval": __version__}, default=str)
        )
        return plain

    def run_file(self, rcp: Path) -> dict[str, Any]:
        """The same of a file in the runtime. Raises EvaluationFailed with what it says."""
        options = {
            "tasks": ",".join(self.names),
            "tasks-path": self.folder,
            "num-fewshot": self.num_fewshot,
            "limit": self.limit,
        }
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        with tempfile.TemporaryDirectory(prefix="rcpconv-tasks-") as folder:
            target = Path(folder, "results.json")
            command = [sys.executable, "-m", "rcprun", "eval", str(rcp), *given, "--json", str(target)]
            child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if child.returncode:
                reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
                raise EvaluationFailed(f"{rcp}: rcp-run could not evaluate it: {reason}")
            results: dict[str, Any] = json.loads(target.read_text())
        return results


def evaluate_tasks(
    tasks: Tasks, *, run: Run | None, rcp: Path | None, skip: Sequence[str] = (), device: str = "auto"
) -> dict[str, dict[str, Any]]:
    """The harness's results by model: up to three MODELS, as `rcpconv.evaluate.evaluate` has them.

    Raises EvaluationFailed when there is nothing to do, and as Tasks.run.
    """
    wanted = [name for name in MODELS if name not in skip and (rcp if name == RCP else run) is not None]
    if not wanted:
        raise EvaluationFailed("nothing to evaluate: name a run with --run or a file with --rcp, and skip less")
    target = pick_device(device)
    model = Quantized.of(run, rcp)
    found = {}
    if ORIGINAL in wanted:
        assert run is not None
        decoder = original_decoder(run.source(), device=target)
        found[ORIGINAL] = tasks.run(decoder, model.tokenizer_json, model.tokenizer)
    if FAKE_QUANT in wanted:
        decoder = baked_decoder(model.architecture, model.quantization, model.tensor).to(target)
        found[FAKE_QUANT] = tasks.run(decoder, model.tokenizer_json, model.tokenizer)
    if RCP in wanted:
        assert rcp is not None
        found[RCP] = tasks.run_file(rcp)
    return found


def task_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for every metric of every task, a column for every model; ± is the harness's standard error."""
    table = Table("task", "metric")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, results in found.items():
        table.add_column(name, justify="right")
        for task, metric, value, error in rows(results["results"]):
            cell = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
            cells.setdefault((task, metric), {})[name] = cell
    for about, by_model in cells.items():
        table.add_row(*about, *(by_model.get(name, "") for name in found))
    return table


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error where there is one) of everything that was measured."""
    for task, measured in results.items():
        for key, value in measured.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = measured.get(f"{metric}_stderr,{chosen}")
                name = metric if chosen == "none" else f"{metric} ({chosen})"
                yield task, name, value, error if isinstance(error, float) else None
