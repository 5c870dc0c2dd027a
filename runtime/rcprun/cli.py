"""The command line of the runtime, `rcp-run`: a shell around rcprun.model. Heavy imports wait until a command runs."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rcprun.errors import INTERRUPTED_EXIT_CODE, BadRequest, ContextOverflow, InputOutputError, OutOfMemory, RcpRunError

if TYPE_CHECKING:
    from rcprun.engine import Generation, GenerationGroup, GenerationResult
    from rcprun.model import Model

EXIT_CODES = """\b
Exit codes:
  0  done                         5  backend cannot run here (no GPU)
  2  bad option, prompt or ids    6  download from the Hub failed
  3  bad or missing model file    7  chat template missing or failed
  4  prompt exceeds the context   8  out of memory
  9  reading or writing failed
  130  interrupted by Ctrl-C; what was generated and the summary are printed
"""


_HEADING = 72
"""Characters of a prompt that are shown above its text, where there are several."""


class _RunUnlessNamed(click.Group):
    """`rcp-run MODEL …` is `rcp-run run MODEL …`: the first word names a command only when it is one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["run", *args])


class _Run(click.Command):
    """The command that goes without its name, in usage lines too."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        return super().make_context(parent.info_name if parent else info_name, args, **extra)


_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_RunUnlessNamed, context_settings=_SETTINGS)
def main() -> None:
    """Run `.rcp` models."""


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command that loads a model takes."""
    for decorate in (
        click.option("--verify", is_flag=True, help="Check the file's hashes before running it."),
        click.option(
            "--backend",
            type=click.Choice(["auto", "numpy", "cuda"]),
            default="auto",
            show_default=True,
            help="What computes; auto takes the GPU where there is one.",
        ),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


_context_option = click.option("-c", "--context", type=click.IntRange(1), help="Tokens of prompt and reply together.")


def _integers(low: int) -> dict[str, Any]:
    """Of an option that takes integers of at least `low`, separated by commas."""
    item = click.IntRange(low)

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(item(part.strip(), param, ctx) for part in value.split(","))

    return {"callback": parse, "metavar": "N,..."}


@main.command(cls=_Run, epilog=EXIT_CODES, context_settings=_SETTINGS)
@_model_options
@_context_option
@click.option("-p", "--prompt", "prompts", multiple=True, help="The prompt; with --chat, one message. May be repeated.")
@click.option("-f", "--file", type=click.File("rb"), help="Read the prompt from a file.")
@click.option("--prompt-file", type=click.File("rb"), help="Read several prompts from a file, one a line.")
@click.option("--parallel", type=click.IntRange(1), default=1, help="Prompts a GPU computes together.  [default: 1]")
@click.option("--chat", is_flag=True, help="Use the model's chat template; without a prompt, talk turn by turn.")
@click.option("--system", help="System message, with --chat.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="Most tokens to generate.  [default: 256; chat: any]")
@click.option("--temp", "temperature", type=float, help="Temperature; 0 is greedy.  [default: the model's, else 0.8]")
@click.option("--top-k", type=int, help="Keep the k likeliest; 0 is off.  [default: the model's, else 40]")
@click.option("--top-p", type=float, help="Keep this much probability; 1 is off.  [default: the model's, else 0.95]")
@click.option("--min-p", type=float, help="Least share of the likeliest; 0 is off.  [default: the model's, else 0.05]")
@click.option("--repeat-penalty", type=float, help="On the last 64 tokens; 1 is off.  [default: the model's, else 1]")
@click.option("--seed", type=int, help="Makes sampling reproducible.  [default: random]")
@click.option("--stop", multiple=True, help="End before this text; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text as it comes.")
@click.version_option(package_name="rcpconv", prog_name="rcp-run")
def run(
    model: str,
    context: int | None,
    backend: str,
    verify: bool,
    prompts: tuple[str, ...],
    file: Any,
    prompt_file: Any,
    parallel: int,
    chat: bool,
    system: str | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with MODEL: a .rcp file, or user/repo or hf://user/repo/file.rcp on the Hugging Face Hub.

    The prompt comes from --prompt, from -f FILE, or from standard input when that is a pipe or a file; one newline at
    the end of a file or of standard input is dropped. The text goes to standard output as it is generated, a summary to
    standard error.

    Several prompts, from --prompt-file or from --prompt given repeatedly, are answered in their order, each below a
    line "==> its beginning <==", or with --json, as a line of JSON each. With --parallel N a GPU computes N of them
    together, the next one when one has ended, in N times the memory for their context; texts do not depend on which
    prompts run together. With --seed S, the first prompt has the seed S, the second S + 1, and so on.

    Tokens are chosen in this order: repeat penalty, top-k, top-p, min-p, temperature.

    `rcp-run score MODEL` computes log-likelihoods instead, `rcp-run eval MODEL` runs tasks of lm-evaluation-harness,
    and `rcp-run bench MODEL` measures speed; see their --help.
    """
    with _errors_to_exit_codes():
        if system is not None and not chat:
            raise BadRequest("--system goes with --chat")
        talk = chat and not prompts and file is None and prompt_file is None
        if talk and (as_json or parallel > 1):
            option = "--json" if as_json else "--parallel"
            raise BadRequest(f"{option} goes with a prompt; it cannot be used to talk turn by turn")
        from rcprun.model import DEFAULT_MAX_TOKENS
        from rcprun.sampling import SamplingOptions

        SamplingOptions.with_defaults({}, **sampling)  # refuses what is out of range before anything takes time
        texts = [] if talk else _read_prompts(prompts, file, prompt_file)
        loaded = _load(model, backend=backend, context=context, verify=verify, parallel=parallel)
        options = sampling | {"stop": stop, "max_tokens": max_tokens}
        if talk:
            _talk(loaded, system, options)
            return
        if not chat:
            options["max_tokens"] = max_tokens or DEFAULT_MAX_TOKENS
        if len(texts) > 1 or prompt_file is not None:
            encoded = [_as_message(loaded, system, text) for text in texts] if chat else texts
            interrupted = _show_many(loaded, loaded.stream_many(encoded, **options), texts, as_json=as_json)
        else:
            if chat:
                generation = loaded.conversation(system).send(texts[0], **options)
            else:
                generation = loaded.stream(texts[0], **options)
            interrupted = _show(generation, None if as_json else sys.stdout)
            if as_json:
                click.echo(_as_json(loaded, generation.result))
            _summarize(loaded, generation.result)
        if interrupted:
            sys.exit(INTERRUPTED_EXIT_CODE)


@main.command(epilog=EXIT_CODES)
@_model_options
@_context_option
@click.option("--tokens", "tokens_file", type=click.File("rb"), required=True, help="JSON lines; - is standard input.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write here, not to standard output.")
@click.option("--top1", is_flag=True, help="Add the likeliest next token after each token.")
@click.option("--logits", type=click.Path(dir_okay=False, path_type=Path), help="Write all logits to this .npy file.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
def score(
    model: str,
    context: int | None,
    backend: str,
    verify: bool,
    tokens_file: Any,
    out: Path | None,
    top1: bool,
    logits: Path | None,
    force: bool,
) -> None:
    """Log-likelihoods of given tokens under MODEL.

    Reads JSON lines, each a list of token ids or {"tokens": [...]}, each a sequence of its own. Writes a JSON line for
    each: n, its number of tokens; token_logprobs, the natural log-likelihoods of all but the first; logprob, their sum.
    --logits is float32, one row after every token, sequence after sequence.
    """
    with _errors_to_exit_codes():
        from rcprun.score import score_file

        loaded = _load(model, backend=backend, context=context, verify=verify)
        score_file(loaded.backend, loaded.file.architecture, tokens_file, out, top1, logits, force)


@main.command(epilog=EXIT_CODES)
@_model_options
@click.option("-p", "--prompts", **_integers(0), help="Lengths of prompts; 0: none.  [default: 512,2048]")
@click.option("-n", "--generated", **_integers(0), help="Tokens to generate; 0: none.  [default: 128]")
@click.option("-d", "--depths", **_integers(0), help="Tokens before those.  [default: 0,512,4096,16384]")
@click.option("-b", "--batch", "batches", **_integers(1), default="1", show_default=True, help="Sequences at a time.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Runs of each test.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write all of it here.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def bench(**options: Any) -> None:
    """Measure how fast MODEL runs, in tokens per second (mean ± standard deviation), as a markdown table.

    Tests are named as in llama-bench: pp512 is a prompt of 512 tokens, tg128 generates 128, and "@ d4096" says that
    4,096 tokens were there before. Defaults that exceed the model's context are left out.
    """
    with _errors_to_exit_codes():
        from rcprun.bench import bench_file

        bench_file(**options)


@main.command("eval", epilog=EXIT_CODES)
@_model_options
@_context_option
@click.option("--tasks", required=True, metavar="NAME[,NAME]", help="Tasks of lm-evaluation-harness.")
@click.option(
    "--tasks-path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="YAML of other tasks."
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question.  [default: the task's]")
@click.option("--limit", type=click.IntRange(1), help="Only so many questions of each task.  [default: all]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write all of it here.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def eval_command(
    model: str,
    context: int | None,
    backend: str,
    verify: bool,
    tasks: str,
    tasks_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    json_path: Path | None,
    force: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on MODEL; needs the extra lm-eval.

    Prints a markdown table of every task's metrics with their standard errors. Texts begin with BOS where the model's
    tokenizer adds one. --tasks-path is a folder of task definitions, searched before the harness's own.
    """
    with _errors_to_exit_codes():
        from rcprun.harness import evaluate

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        loaded = _load(model, backend=backend, context=context, verify=verify)
        evaluate(
            loaded,
            names,
            folder=tasks_path,
            num_fewshot=num_fewshot,
            limit=limit,
            json_path=json_path,
            force=force,
        )


def _load(model: str, **options: Any) -> Model:
    """The model; what it asks of a GPU's memory goes to standard error."""
    from rcprun.model import load

    loaded = load(model, **options)
    if report := getattr(loaded.backend, "memory_report", None):
        click.echo(report, err=True)
    return loaded


def _read_prompts(prompts: tuple[str, ...], file: Any, prompt_file: Any) -> list[str]:
    """The texts of --prompt, -f, --prompt-file or standard input, whichever one is given."""
    if bool(prompts) + (file is not None) + (prompt_file is not None) > 1:
        raise BadRequest("give prompts with one of --prompt, -f and --prompt-file, not both")
    texts = list(prompts)
    if prompt_file is not None:
        texts = [line for line in _decode(prompt_file.read()).splitlines() if line.strip()]
        if not texts:
            raise BadRequest("the file of prompts is empty; give one on each line")
    elif not texts:
        source = file
        if source is None:
            source = sys.stdin.buffer
            if source.isatty():
                raise BadRequest("no prompt; give one with --prompt, with -f, or on standard input")
        texts = [re.sub(r"\r?\n\Z", "", _decode(source.read()))]
    if not all(texts):
        raise BadRequest("the prompt is empty; give some text")
    return texts


def _as_message(model: Model, system: str | None, text: str) -> list[int]:
    """The token ids of a chat of one message."""
    before = [{"role": "system", "content": system}] if system else []
    return model.encode_chat([*before, {"role": "user", "content": text}])


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None


def _show(generation: Generation, out: Any) -> bool:
    """Write the text as it comes (where there is an `out`); whether Ctrl-C ended it."""
    _tolerate(out)
    try:
        for piece in generation:
            if out is not None and piece.text:
                out.write(piece.text)
                out.flush()
    except KeyboardInterrupt:
        interrupted = True
    else:
        interrupted = False
    if out is not None:
        out.write("\n")
        out.flush()
    return interrupted


def _show_many(model: Model, group: GenerationGroup, prompts: list[str], *, as_json: bool) -> bool:
    """Write texts in the order of the prompts, the first unfinished one as it comes; whether Ctrl-C ended it."""
    began, interrupted, out = time.perf_counter(), False, sys.stdout
    _tolerate(out)
    pending: list[list[str]] = [[] for _ in prompts]
    front = 0

    def write(*, everything: bool = False) -> None:
        """All that may be shown by now."""
        nonlocal front
        while front < len(prompts) and (pending[front] or group.generations[front].ended or everything):
            text = "".join(pending[front])
            pending[front].clear()
            if not as_json:
                out.write(text)
            if not (group.generations[front].ended or everything):
                break
            out.write(_as_json(model, group.generations[front].result) + "\n" if as_json else "\n")
            front += 1
            write_heading()
        out.flush()

    def write_heading() -> None:
        if not as_json and front < len(prompts):
            out.write(f"==> {_beginning(prompts[front])} <==\n")

    write_heading()
    try:
        for number, piece in group:
            pending[number].append(piece.text)
            write()
    except KeyboardInterrupt:
        interrupted = True
        write(everything=True)
    _summarize_many(model, group.results, time.perf_counter() - began)
    return interrupted


def _tolerate(out: Any) -> None:
    """A terminal that knows no UTF-8 still shows the rest."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")


def _beginning(prompt: str) -> str:
    """Of a prompt, in one short line."""
    line = " ".join(prompt.split())
    return line if len(line) <= _HEADING else line[: _HEADING - 1] + "…"


def _talk(model: Model, system: str | None, options: dict[str, Any]) -> None:
    """Turn by turn until /exit or the end of the input. Ctrl-C ends a reply; between replies, the program."""
    conversation = model.conversation(system)
    click.echo("/clear forgets the conversation, /exit ends it.", err=True)
    while True:
        click.echo("> ", err=True, nl=False)
        line = sys.stdin.buffer.readline()
        try:
            text = _decode(line).strip()
            if not line or text == "/exit":
                return
            if text == "/clear":
                conversation.clear()
            elif text:
                generation = conversation.send(text, **options)
                _show(generation, sys.stdout)
                _summarize(model, generation.result)
        except ContextOverflow as error:
            click.echo(f"{error}, or /clear", err=True)
        except BadRequest as error:
            click.echo(error, err=True)


def _as_json(model: Model, result: GenerationResult) -> str:
    import json

    timings, memory = result.timings, model.backend.memory()
    return json.dumps(
        {
            "text": result.text,
            "tokens": result.tokens,
            "prompt_tokens": result.prompt_tokens,
            "stop_reason": result.stop_reason,
            "seed": result.seed,
            "backend": model.backend.name,
            "timings": {
                "prefill_tokens": timings.prefill_tokens,
                "prefill_seconds": timings.prefill_seconds,
                "prefill_tokens_per_second": timings.prefill_rate,
                "decode_tokens": timings.decode_tokens,
                "decode_seconds": timings.decode_seconds,
                "decode_tokens_per_second": timings.decode_rate,
            },
            "memory": {"weights": memory.weights, "kv_cache": memory.kv_cache, "peak_rss": _peak_rss()},
        },
        ensure_ascii=False,
    )


def _summarize(model: Model, result: GenerationResult) -> None:
    """One line on standard error."""
    timings = result.timings
    click.echo(
        f"[{model.backend.name}] prefill {timings.prefill_tokens} tokens, {timings.prefill_rate:.1f} tokens/s | "
        f"decode {timings.decode_tokens} tokens, {timings.decode_rate:.1f} tokens/s | {result.stop_reason} | "
        + _memory_line(model),
        err=True,
    )


def _summarize_many(model: Model, results: list[GenerationResult], seconds: float) -> None:
    """One line on standard error."""
    tokens = sum(len(result.tokens) for result in results)
    together = min(getattr(model.backend, "streams", 1), len(results))
    click.echo(
        f"[{model.backend.name}] {len(results)} prompts of {sum(result.prompt_tokens for result in results)} tokens, "
        f"{together} at a time | {tokens} generated in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s | "
        + _memory_line(model),
        err=True,
    )


def _memory_line(model: Model) -> str:
    memory, peak = model.backend.memory(), _peak_rss()
    held = f"weights {memory.weights / 2**20:.1f} MiB, KV cache {memory.kv_cache / 2**20:.1f} MiB"
    return held + (f", peak RSS {peak / 2**20:.0f} MiB" if peak else "")


def _peak_rss() -> int | None:
    """Bytes of physical memory that this process had at most; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@contextmanager
def _errors_to_exit_codes() -> Iterator[None]:
    """One line on standard error and the documented exit code for everything that a user can cause."""
    try:
        yield
    except RcpRunError as error:
        _fail(error)
    except MemoryError:
        _fail(OutOfMemory("not enough memory for this model and context; try a smaller --context"))
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:  # whoever read the output has enough; click ends quietly
        raise
    except OSError as error:
        sys.stdout = io.StringIO()  # what the old one may still hold cannot be written at exit either
        _fail(InputOutputError(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}"))


def _fail(error: RcpRunError) -> NoReturn:
    click.echo(f"rcp-run: {' '.join(str(error).split())}", err=True)
    sys.exit(error.exit_code)
