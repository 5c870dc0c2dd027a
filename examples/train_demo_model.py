"""Trains the small LLaMA in `rcpconv/demo/model` and cuts the texts beside it.

The model is a plain Hugging Face `LlamaForCausalLM`, made small enough to live in the repository and shaped to
exercise what quantization finds hard: grouped-query attention, tied embeddings, and widths (192 and 480) that are
neither powers of two nor multiples of the quantization group of 128.

The corpus is one UTF-8 text of public-domain books: a paragraph a line, books three blank lines apart.

    python examples/train_demo_model.py train --corpus books-train.txt.xz --heldout books-heldout.txt --out model
    python examples/train_demo_model.py texts --corpus books-train.txt.xz --heldout books-heldout.txt --out demo
    python examples/train_demo_model.py choosing --corpus books-train.txt.xz --out texts

Knows nothing of quantization. Shape suffixes: N tokens in the corpus, B windows in a batch, T tokens in a window.
"""

import dataclasses
import json
import lzma
import math
import re
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOOK_SEPARATOR = "\n\n\n\n"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# An e-text that asserts rights over its own edition, unlike the rest of the corpus, is not trained on.
ENCUMBERED_EDITION = re.compile(r"This Etext has certain copyright implications")

# Every so many books one is kept back, so that settings are chosen without a look at the held-out text.
VALIDATION_EVERY = 33

# LLaMA-3's split: contractions, words with one leading mark, up to three digits, punctuation, line ends, spaces.
PRETOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

SAMPLE_PROMPTS = ("It was a cold morning, and", "“My dear sir,” said", "The captain looked at the sea")

# The bundled passages: (a line of the book's title page, its credit). Authors and translators all died before 1950.
TRAIN_PASSAGES = (
    ("BLEAK HOUSE", "Charles Dickens, Bleak House (1853)"),
    ("Under the Lilacs", "Louisa May Alcott, Under the Lilacs (1878)"),
    ("WASHINGTON SQUARE", "Henry James, Washington Square (1880)"),
    ("“I SAY NO”", "Wilkie Collins, “I Say No” (1884)"),
    ("By Charles Darwin, M.A., F.R.S.,", "Charles Darwin, The Origin of Species, sixth edition (1872)"),
    ("His Last Bow", "Arthur Conan Doyle, His Last Bow (1917)"),
    ("Dot and Tot of Merryland", "L. Frank Baum, Dot and Tot of Merryland (1901)"),
    ("THE TALES OF CHEKHOV", "Anton Chekhov, The Darling and Other Stories, tr. Constance Garnett (1916)"),
    ("RAINBOW VALLEY", "L. M. Montgomery, Rainbow Valley (1919)"),
    ("THE MAGIC CITY", "E. Nesbit, The Magic City (1910)"),
)
HELDOUT_PASSAGES = (
    ("SPEECHES _LITERARY AND SOCIAL_", "Charles Dickens, Speeches Literary and Social (1880)"),
    ("WIT AND WISDOM OF DON QUIXOTE.", "Miguel de Cervantes, Wit and Wisdom of Don Quixote (1882)"),
    ("THE BOSTONIANS", "Henry James, The Bostonians (1886)"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything the result depends on besides the corpus and the machine's speed."""

    minutes: float | None  # wall-clock budget of the training loop ...
    steps: int | None  # ... or its exact length; one of the two
    batch: int = 128
    context: int = 1024
    lr: float = 5e-3
    warmup: float = 0.02  # fraction of the run
    weight_decay: float = 1.8  # high, because a model this small still reads its corpus some twenty times
    seed: int = 1

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise click.UsageError("give either --minutes or --steps, not both and not neither")


def read_text(path: Path) -> str:
    """A UTF-8 text, unpacked if the name ends in .xz."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def split_books(text: str) -> list[str]:
    """The corpus's books, without the editions that claim rights of their own."""
    books = [book.strip("\n") for book in text.split(BOOK_SEPARATOR)]
    return [book for book in books if book and not ENCUMBERED_EDITION.search(book[:2000])]


def train_tokenizer(books: list[str], *, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that, like LLaMA's, puts a BOS before the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without BOS."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_books(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> np.ndarray:
    """All books in one row of ids, each between a BOS and an EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return np.concatenate([np.array([bos, *ids, eos], dtype=np.int64) for ids in encode(tokenizer, books)])


def build_model(tokenizer: PreTrainedTokenizerFast, *, context: int) -> LlamaForCausalLM:
    """The untrained model: 1.9 million parameters with a vocabulary of 2,048."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,  # 12 * 16: one whole group of 128 and a half one
        intermediate_size=480,  # 60 * 8: three whole groups and a short one of 96
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Windows:
    """Random windows of the corpus, on the device. Half of each batch starts a paragraph, after a BOS."""

    def __init__(self, token_N: np.ndarray, tokenizer: PreTrainedTokenizerFast, *, config: TrainConfig, device: str):
        self.token_N = torch.from_numpy(token_N).to(device)
        self.bos = tokenizer.bos_token_id
        self.batch, self.context = config.batch, config.context
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        ends_line = [text.endswith("\n") for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
        line_end = torch.tensor(ends_line, device=device)[self.token_N].nonzero()[:, 0]
        self.line_end = line_end[line_end < self.last_start]
        self.offset = torch.arange(self.context + 1, device=device)

    @property
    def last_start(self) -> int:
        """One past the last place where a window fits."""
        return len(self.token_N) - self.context - 1

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: inputs and targets, both [B, T]."""
        device, half = self.token_N.device, self.batch // 2
        anywhere = torch.randint(self.last_start, (self.batch - half,), generator=self.generator, device=device)
        line = torch.randint(len(self.line_end), (half,), generator=self.generator, device=device)
        start_B = torch.cat([self.line_end[line], anywhere])
        window_BT = self.token_N[start_B[:, None] + self.offset]
        window_BT[:half, 0] = self.bos  # in place of the line end before the paragraph
        return window_BT[:, :-1], window_BT[:, 1:]


def head_loss(hidden_BTH: torch.Tensor, head_VH: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token; apart from the model so that it compiles into a few kernels."""
    logits_BTV = F.linear(hidden_BTH, head_VH).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if progress < warmup:
        return max(progress, 0.05 * warmup) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def fit(model: LlamaForCausalLM, windows: Windows, config: TrainConfig, *, compile_layers: bool) -> int:
    """Trains in place and returns the number of steps taken.

    Muon for the layers' matrices, AdamW for the embedding and the norm gains. Layers are compiled one by one, because
    inside a compiled model transformers would build the causal mask and so lose flash attention.
    """
    loss_of = head_loss
    if compile_layers:
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(head_loss)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    embedding = [p for name, p in model.named_parameters() if "embed_tokens" in name]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": embedding}, {"params": gains, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        ),
    ]
    device = windows.token_N.device.type
    model.train()
    step, began = 0, None
    while True:
        elapsed = 0.0 if began is None else time.monotonic() - began
        progress = step / config.steps if config.steps else elapsed / (60 * config.minutes)
        if progress >= 1:
            return step
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(progress, config.warmup)
        input_BT, target_BT = windows.draw()
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden_BTH = model.model(input_ids=input_BT, use_cache=False).last_hidden_state
            loss = loss_of(hidden_BTH, model.lm_head.weight, target_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step < 3:  # reading the loss also keeps the host from running ahead of the device
            value = loss.item()
            if began is None:  # compilation does not count against the budget
                began, counted_from = time.monotonic(), step
            elif step % 200 == 0:
                rate = (step - counted_from) * windows.batch * windows.context / (time.monotonic() - began)
                click.echo(f"step {step:6d}  progress {progress:.3f}  loss {value:.4f}  {rate / 1e6:.2f} M tokens/s")


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: list[int], window: int) -> float:
    """Over whole windows without overlap; the first token of each is not scored."""
    count = len(ids) // window
    token_BT = torch.tensor(ids[: count * window], device=model.device).view(count, window)
    total = 0.0
    for rows in token_BT.split(16):
        logits_BTV = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits_BTV.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (count * (window - 1)))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the Hugging Face folder, weights in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config_path = out / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def report(folder: Path, heldout: dict[str, str], *, window: int, device: str) -> None:
    """Prints what the saved folder does: its size, its perplexities (float32 arithmetic) and some text."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:,} bytes in {folder}")
    for name, text in heldout.items():
        (ids,) = encode(tokenizer, [text])
        value = perplexity(model, ids, window)
        click.echo(f"perplexity on {name}: {value:.3f} ({len(ids):,} tokens, {len(text.encode()):,} bytes)")
    torch.manual_seed(0)
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        output = model.generate(**inputs, max_new_tokens=120, pad_token_id=tokenizer.eos_token_id)
        click.echo(f"--- {tokenizer.decode(output[0], skip_special_tokens=True)}")


def passage(books: list[str], title_line: str, size: int) -> str:
    """Whole paragraphs of about `size` bytes from the middle of the book with that line on its first page."""
    found = [book for book in books if title_line in book[:1500].split("\n")]
    if len(found) != 1:
        raise click.UsageError(f"{len(found)} books have the line {title_line!r} on their first page; expected one")
    lines = found[0].split("\n")
    first, kept, used = len(lines) // 2, [], 0
    for line in lines[first:]:
        used += len(line.encode()) + 1
        if used > size:
            break
        kept.append(line)
    return "\n".join(kept)


def path_option(name: str, **kwargs):
    """A required click option that is a path."""
    return click.option(name, type=click.Path(path_type=Path), required=True, **kwargs)


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    """The click group."""


@main.command()
@path_option("--corpus", help="Training text (.txt or .txt.xz).")
@path_option("--heldout", help="Text never trained on.")
@path_option("--out", help="Folder to write the checkpoint to.")
@click.option("--minutes", type=float, help="Wall-clock budget of the training loop.")
@click.option("--steps", type=int, help="Length of the training loop, instead of --minutes.")
@click.option("--batch", default=TrainConfig.batch, show_default=True, help="Windows in a batch.")
@click.option("--seed", default=TrainConfig.seed, show_default=True)
@click.option("--weight-decay", default=TrainConfig.weight_decay, show_default=True)
@click.option("--vocab-size", default=2048, show_default=True)
@click.option("--corpus-limit", type=int, help="Use only this many characters of the corpus (for a trial).")
@click.option("--compile/--no-compile", "compile_layers", default=True, show_default=True)
def train(
    corpus, heldout, out, minutes, steps, batch, seed, weight_decay, vocab_size, corpus_limit, compile_layers
) -> None:
    """Train the tokenizer and the model; save and measure them."""
    config = TrainConfig(minutes=minutes, steps=steps, batch=batch, seed=seed, weight_decay=weight_decay)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    all_books = split_books(read_text(corpus)[:corpus_limit])
    validation = all_books[::VALIDATION_EVERY]
    books = [book for book in all_books if book not in validation]
    tokenizer = train_tokenizer(books, vocab_size=vocab_size, context=config.context)
    token_N = encode_books(tokenizer, books)
    click.echo(f"{len(books)} books, {len(token_N):,} tokens, {config}")
    model = build_model(tokenizer, context=config.context).to(device)
    taken = fit(model, Windows(token_N, tokenizer, config=config, device=device), config, compile_layers=compile_layers)
    click.echo(f"trained {taken} steps, {taken * config.batch * config.context / 1e6:.0f} M tokens")
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    measured = {
        "a trained-on book": books[len(books) // 2],
        "the validation books": BOOK_SEPARATOR.join(validation),
        heldout.name: read_text(heldout)[:corpus_limit],
    }
    report(out, measured, window=512, device=device)


@main.command()
@path_option("--corpus", help="Training text (.txt or .txt.xz).")
@path_option("--heldout", help="Text never trained on.")
@path_option("--out", help="Folder to write train.txt and heldout.txt to.")
def texts(corpus, heldout, out) -> None:
    """Cut the bundled passages: 32 kB of each training book, 25 kB of each held-out one."""
    for name, source, passages, size in (
        ("train.txt", corpus, TRAIN_PASSAGES, 32_000),
        ("heldout.txt", heldout, HELDOUT_PASSAGES, 25_000),
    ):
        books = split_books(read_text(source))
        text = BOOK_SEPARATOR.join(passage(books, title_line, size) for title_line, _ in passages) + "\n"
        (out / name).write_text(text, encoding="utf-8")
        click.echo(f"{name}: {len(text.encode()):,} bytes from {len(passages)} books")


@main.command()
@path_option("--corpus", help="Training text (.txt or .txt.xz).")
@path_option("--out", help="Folder to write train.txt and validation.txt to.")
def choosing(corpus, out) -> None:
    """Cut texts to choose settings on: the middle of each training book, and of each validation book."""
    all_books = split_books(read_text(corpus))
    validation = all_books[::VALIDATION_EVERY]
    training = [book for book in all_books if book not in validation]
    out.mkdir(parents=True, exist_ok=True)
    for name, books, size in (("train.txt", training, 12_000), ("validation.txt", validation, 40_000)):
        middles = [book[(len(book) - size) // 2 :][:size] for book in books if len(book) >= size]
        (out / name).write_text(BOOK_SEPARATOR.join(middles) + "\n", encoding="utf-8")
        click.echo(f"{name}: {size:,} characters from each of {len(middles)} books")


@main.command(name="report")
@path_option("--model", help="Hugging Face folder.")
@click.option("--window", default=512, show_default=True)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def report_command(model, window, files) -> None:
    """Perplexity of a saved folder on text files, and samples."""
    report(model, {path.name: read_text(path) for path in files}, window=window, device="cpu")


if __name__ == "__main__":
    main()
