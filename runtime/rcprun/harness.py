"""A model for lm-evaluation-harness (the extra `lm-eval`), and its tasks run on one: what `rcp-run eval` does.

The answers are the harness's own arithmetic over Model.score and Model.generate, and need no harness. Texts begin with
BOS where the model's tokenizer says so, as prompts do. Knows nothing of any task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from rcprun.errors import BadRequest, RcpRunError
from rcprun.model import DEFAULT_MAX_TOKENS, Model
from rcprun.output import replacing

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""A task's sampling is what it says, and not the model's defaults."""


class Request(Protocol):
    """What the harness asks (lm_eval.api.instance.Instance)."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of one question."""


class Answers:
    """The three questions of the harness, answered by the runtime."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(context, continuation) -> log-likelihood of the continuation, and whether it is the greedy one."""
        return [self._score(*self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """(text,) -> log-likelihood of all of it after one BOS, in windows of the model's context."""
        found = []
        for request in requests:
            tokens = [self._prefix(), *self.model.tokenizer.encode_raw(*request.args)]
            found.append(sum(self._score(*window)[0] for window in windows(tokens, self.model.context)))
        return found

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """(context, settings) -> what the model writes after it."""
        return [self._write(seed, *request.args) for seed, request in enumerate(requests)]

    def _prefix(self) -> int:
        """What stands before a text without a context. Raises BadRequest."""
        info = self.model.tokenizer.info
        prefix = [info.bos_id] if info.bos_id is not None else list(info.eos_ids[:1])
        if not prefix:
            raise BadRequest("the model has neither BOS nor EOS, after which a text without a context could begin")
        return prefix[0]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both together, and how many of them are the continuation's; spaces between go with the latter."""
        begin = context.rstrip()
        continuation = context[len(begin) :] + continuation
        tokenizer = self.model.tokenizer
        if not begin:
            tokens = tokenizer.encode_raw(continuation)
            prefix = self._prefix()
            tokens = tokens if tokens[:1] == [prefix] else [prefix, *tokens]
            return tokens, len(tokens) - 1
        tokens = tokenizer.encode(begin + continuation)
        return tokens, len(tokens) - len(tokenizer.encode(begin))

    def _score(self, tokens: Sequence[int], count: int) -> tuple[float, bool]:
        """Of the last `count` tokens, after as many of the others as fit."""
        tokens = list(tokens[-self.model.context :])
        start = len(tokens) - count
        if start < 1:
            raise BadRequest(f"a continuation of {count} tokens does not fit into the context of {self.model.context}")
        score = self.model.score(tokens)
        return sum(score.token_logprobs[start - 1 :]), score.top1[start - 1 : -1] == tokens[start:]

    def _write(self, seed: int, context: str, settings: Mapping[str, Any]) -> str:
        settings = dict(settings)
        until, limit = settings.pop("until", None) or [], settings.pop("max_gen_toks", DEFAULT_MAX_TOKENS)
        sampling = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if not settings.pop("do_sample", sampling.get("temperature", 0) > 0):
            sampling = {"temperature": 0.0}
        if settings:
            raise BadRequest(f"{', '.join(settings)}: a task's setting of generations that is unknown here")
        tokens = self.model.tokenizer.encode(context) or [self._prefix()]
        result = self.model.generate(
            tokens[-max(1, self.model.context - limit) :],
            max_tokens=limit,
            stop=[until] if isinstance(until, str) else until,
            **_OFF | {"temperature": 1.0, "seed": seed} | sampling,
        )
        return result.text


def windows(tokens: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], int]]:
    """Spans of at most `size` tokens, and how many at their end to score: all but the first token once.

    As the harness cuts texts: without overlap, but that the last one reaches back until it is full.
    """
    for start in range(1, len(tokens), size - 1):
        end = min(start + size - 1, len(tokens))
        yield tokens[max(0, end - size) : end], end - start


def run_tasks(
    model: Model, tasks: Sequence[str], *, folder: Path | None = None, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """The harness's results by task, and what they depend on, as JSON values.

    folder: task definitions (YAML) beside the harness's own. Raises BadRequest without the harness, for unknown tasks,
    and where the harness fails.
    """
    try:
        from lm_eval import __version__
        from lm_eval.api.model import LM
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise BadRequest(
            f"tasks need lm-evaluation-harness, and {error.name} is not installed: pip install 'rcpconv[lm-eval]'"
        ) from error
    try:
        own = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
        # Finding the thousands of the harness's own takes many seconds.
        manager = own if own and set(tasks) <= set(own.all_tasks) else TaskManager(include_path=folder and str(folder))
        if unknown := sorted(set(tasks) - set(manager.all_tasks)):
            raise BadRequest(f"tasks: {unknown[0]!r}: lm-evaluation-harness knows no such task; see --tasks-path")
        found = simple_evaluate(
            type("Runtime", (Answers, LM), {})(model),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            torch_random_seed=None,
        )
    except RcpRunError:
        raise
    except Exception as error:  # whatever tasks, data sets and the network raise
        raise BadRequest(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
    kept = {key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions") if key in found}
    plain: dict[str, Any] = json.loads(json.dumps(kept | {"limit": limit, "lm_eval": __version__}, default=str))
    return plain


def evaluate(model: Model, tasks: Sequence[str], *, json_path: Path | None, force: bool, **options: Any) -> None:
    """Run tasks, print their table, and write the results to a file where one is named."""
    with ExitStack() as stack:
        temporary = None if json_path is None else stack.enter_context(replacing(json_path, force=force))
        found = run_tasks(model, tasks, **options)
        print("| task | metric | value | ± |\n| --- | --- | ---: | ---: |")
        for task, metric, value, error in rows(found["results"]):
            print(f"| {task} | {metric} | {value:.4f} | {'' if error is None else f'{error:.4f}'} |")
        if temporary is not None:
            temporary.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error where there is one) of everything that was measured."""
    for task, measured in results.items():
        for key, value in measured.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = measured.get(f"{metric}_stderr,{chosen}")
                name = metric if chosen == "none" else f"{metric} ({chosen})"
                yield task, name, value, error if isinstance(error, float) else None
