"""Measures how much of a model's sampled text is English words.

Samples from any Hugging Face causal language model through transformers, from several short prompts, and looks every
word up in word lists that have nothing to do with the model's training text: by default Debian's `wamerican` and
`wbritish` (`apt-get install wamerican wbritish`), else any file with a word a line.

    python examples/measure_english.py --model rcpconv/demo/model
    python examples/measure_english.py --text rcpconv/demo/heldout.txt     # what real text scores by the same rule

The rule. A word is an unbroken run of letters, with apostrophes inside it allowed; "well-known" is two words; digits
and underscores are no part of a word. The prompt's words do not count, nor does the last word of a sample, which may
be cut off. A word is found if the list has it as written, in lower case, or (for a word in capitals) capitalised, or
if that holds without a final 's. The lists also have every single letter as an entry: here only a, A, I, o and O are
words. Two figures are printed:

  words            found as above
  common words     the same without the list's capitalised entries, so that every name is a miss, and with the names
                   also Mr, English, Sunday and the like (I, I'm, I'll, I've and I'd stay)
"""

import collections
import dataclasses
import re
from pathlib import Path

import click

DEFAULT_WORD_LISTS = ("/usr/share/dict/american-english", "/usr/share/dict/british-english")
PROMPTS = (
    "The old man",
    "It was late in the evening when",
    "She looked at him and said",
    "There was once a",
    "In the spring of that year",
    "My dear friend,",
    "The ship",
    "I have often thought that",
)
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
ONE_LETTER_WORDS = {"a", "A", "I", "o", "O"}
CAPITALISED_COMMON = {"I", "I'm", "I'll", "I've", "I'd"}


@dataclasses.dataclass(kw_only=True)
class Count:
    """Words seen, and those not found by either of the two rules."""

    words: int = 0
    missing: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    not_common: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class WordList:
    """The two sets of words, and the rule that looks a word up in them."""

    def __init__(self, paths: tuple[str, ...]):
        entries = {line.strip() for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()}
        self.all = {word for word in entries if len(word) > 1} | ONE_LETTER_WORDS
        self.common = {word for word in self.all if word == word.lower()} | CAPITALISED_COMMON

    @staticmethod
    def _found(word: str, entries: set[str]) -> bool:
        forms = {word, word.lower()} | ({word.capitalize()} if word.isupper() else set())
        if not forms.isdisjoint(entries):
            return True
        return word.lower().endswith("'s") and WordList._found(word[:-2], entries)

    def count(self, text: str, *, begin: int, skip_last: bool, into: Count) -> None:
        """Adds the words of text[begin:] to `into`."""
        text = text.replace("’", "'")
        found = [m for m in WORD.finditer(text) if m.start() >= begin]
        if skip_last and found and found[-1].end() == len(text):
            found.pop()
        for word in (m.group() for m in found):
            into.words += 1
            if not self._found(word, self.all):
                into.missing[word] += 1
            if not self._found(word, self.common):
                into.not_common[word] += 1


def sample(model_path: str, *, tokens: int, temperature: float, top_p: float, seed: int) -> list[tuple[str, str]]:
    """(prompt, prompt with its continuation) for each prompt, `tokens` sampled tokens in all; no end before that."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    share, samples = tokens // len(PROMPTS), []
    for i, prompt in enumerate(PROMPTS):
        length = share + (tokens % len(PROMPTS) if i == 0 else 0)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=tokenizer.eos_token_id,
        )
        samples.append((prompt, tokenizer.decode(output[0], skip_special_tokens=True)))
    return samples


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", help="Hugging Face folder or repository to sample from.")
@click.option("--text", type=click.Path(path_type=Path), help="Measure this text file instead of a model.")
@click.option("--tokens", default=2000, show_default=True)
@click.option("--temperature", default=0.8, show_default=True)
@click.option("--top-p", default=0.95, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--word-list", "word_lists", multiple=True, default=DEFAULT_WORD_LISTS, show_default=True)
@click.option("--show/--no-show", default=False, help="Print the sampled text.")
def main(model, text, tokens, temperature, top_p, seed, word_lists, show) -> None:
    """The click command."""
    if (model is None) == (text is None):
        raise click.UsageError("give either --model or --text")
    for path in word_lists:
        if not Path(path).exists():
            raise click.UsageError(f"no word list at {path}; apt-get install wamerican wbritish, or name a --word-list")
    words, count = WordList(word_lists), Count()
    if text is not None:
        words.count(text.read_text(encoding="utf-8"), begin=0, skip_last=False, into=count)
        click.echo(f"{text}: {count.words} words")
    else:
        for prompt, continued in sample(model, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed):
            words.count(continued, begin=len(prompt), skip_last=True, into=count)
            if show:
                click.echo(f"--- {continued}")
        click.echo(
            f"{model}: {tokens} tokens at temperature {temperature}, top-p {top_p}, seed {seed}, "
            f"from {len(PROMPTS)} prompts: {count.words} words"
        )
    for name, misses in (("words", count.missing), ("common words", count.not_common)):
        share = 1 - misses.total() / max(1, count.words)
        click.echo(f"{name:14s} {100 * share:.2f}%  not found: {', '.join(w for w, _ in misses.most_common(40))}")


if __name__ == "__main__":
    main()
