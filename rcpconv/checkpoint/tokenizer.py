"""Tokenizers: any checkpoint's files become the bytes of a `tokenizers` JSON file and what generation needs to know.

Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rcpconv.checkpoint.layout import read_optional_json
from rcpconv.errors import BadTokenizer
from rcpformat.architecture import TokenizerInfo

_PROBE = "probe"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """json: bytes of a Hugging Face `tokenizers` file; encoding with it adds no special tokens by itself."""

    json: bytes
    info: TokenizerInfo


def read_hf_tokenizer(folder: Path, vocab_size: int) -> TokenizerFiles:
    """The tokenizer of a folder: tokenizer.json as it is, else what transformers makes of tokenizer.model.

    tokenizer.json is read without the class that the configuration names: such a class may rebuild the tokenizer by
    its own rules. Whether plain prompts start with BOS is what the tokenizer does to a probe. Raises BadTokenizer.
    """
    loader: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its many file formats raise
        reason = " ".join(str(error).split())[:300]
        raise BadTokenizer(
            f"{folder}: no tokenizer could be read from it ({reason}); expected tokenizer.json or tokenizer.model "
            "beside the weights"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise BadTokenizer(f"{folder}: expected a tokenizer that the tokenizers library can run; add a tokenizer.json")
    generation, config = (read_optional_json(folder / name) for name in ("generation_config.json", "config.json"))
    first = tokenizer(_PROBE)["input_ids"][0]
    bos_id = tokenizer.bos_token_id
    if bos_id is None and first == config.get("bos_token_id"):
        bos_id = first
    declared = generation.get("eos_token_id") or config.get("eos_token_id")
    return make_tokenizer_files(
        backend,
        bos_id=bos_id,
        eos_ids=[*_ids(declared), *_ids(tokenizer.eos_token_id)],
        add_bos=first == bos_id,
        chat_template=_chat_template(tokenizer.chat_template)
        or _chat_template(read_optional_json(folder / "chat_template.json").get("chat_template")),
        vocab_size=vocab_size,
        where=str(folder),
    )


def make_tokenizer_files(
    tokenizer: Tokenizer,
    *,
    bos_id: int | None,
    eos_ids: Iterable[int],
    add_bos: bool,
    chat_template: str | None,
    vocab_size: int,
    where: str,
) -> TokenizerFiles:
    """Serialize a tokenizer without padding and truncation, once its ids are known to fit the embedding table."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    eos = tuple(dict.fromkeys(eos_ids))
    used = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    for what, token in (("its largest token id", used), ("bos_id", bos_id or 0), *(("an eos_id", id) for id in eos)):
        if not token < vocab_size:
            raise BadTokenizer(
                f"{where}: tokenizer: {what} is {token}, but the embedding has {vocab_size} rows; "
                "the tokenizer is not this model's"
            )
    info = TokenizerInfo(bos_id=bos_id, eos_ids=eos, add_bos=add_bos, chat_template=chat_template)
    return TokenizerFiles(json=tokenizer.to_str().encode(), info=info)


def _ids(value: int | list[int] | None) -> list[int]:
    """The ids that a configuration entry names: an id, a list of them, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _chat_template(template: Any) -> str | None:
    """A template as it is; of several named ones, the default."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template
