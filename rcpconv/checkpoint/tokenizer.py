"""Tokenizers: any checkpoint's files become the bytes of a `tokenizers` JSON file and what generation needs to know.

Knows nothing of weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from rcpconv.checkpoint.layout import read_optional_json
from rcpconv.checkpoint.tokenizer_model import STOP_TOKENS, convert_tokenizer_model
from rcpconv.errors import BadTokenizer
from rcpformat.architecture import TokenizerInfo
from rcpformat.errors import BadMetadata

_PROBE = "probe"
_SIDE_FILES = ("special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """json: bytes of a Hugging Face `tokenizers` file, without padding or truncation."""

    json: bytes
    info: TokenizerInfo


def read_hf_tokenizer(folder: Path, vocab_size: int) -> TokenizerFiles:
    """The tokenizer of a Hugging Face folder: tokenizer.json as it is, else tokenizer.model converted.

    tokenizer.json is read without the class that the configuration names, for such a class may rebuild the tokenizer
    by its own rules. Whether plain prompts start with BOS is what the tokenizer does to a probe. Raises BadTokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load(folder)
    elif (folder / "tokenizer.model").is_file():
        with tempfile.TemporaryDirectory() as converted:
            _convert_folder(folder, Path(converted))
            tokenizer = _load(Path(converted))
    else:
        raise BadTokenizer(f"{folder}: expected tokenizer.json or tokenizer.model beside the weights, found neither")
    generation, config = (read_optional_json(folder / name) for name in ("generation_config.json", "config.json"))
    first = next(iter(tokenizer(_PROBE)["input_ids"]), None)
    bos_id = tokenizer.bos_token_id
    if bos_id is None and first == config.get("bos_token_id"):
        bos_id = first
    stops = generation.get("eos_token_id")
    return _make_files(
        tokenizer.backend_tokenizer,
        bos_id=bos_id,
        eos_ids=[*_ids(config.get("eos_token_id") if stops is None else stops), *_ids(tokenizer.eos_token_id)],
        add_bos=first is not None and first == bos_id,
        chat_template=_default_template(tokenizer.chat_template)
        or _default_template(read_optional_json(folder / "chat_template.json").get("chat_template")),
        vocab_size=vocab_size,
        where=folder,
    )


def read_meta_tokenizer(folder: Path, vocab_size: int, *, llama31: bool) -> TokenizerFiles:
    """The tokenizer.model of Meta's layout, from the folder or (as LLaMA-1 came) the one above it.

    Meta's files hold no chat template. Raises BadTokenizer.
    """
    path = next((p for p in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if p.is_file()), None)
    if path is None:
        raise BadTokenizer(f"{folder}: expected tokenizer.model beside the weights or one folder above, found none")
    tokenizer = convert_tokenizer_model(path, llama31=llama31)
    return _make_files(
        tokenizer,
        bos_id=tokenizer.encode("").ids[0],
        eos_ids=[id for stop in STOP_TOKENS if (id := tokenizer.token_to_id(stop)) is not None],
        add_bos=True,
        chat_template=None,
        vocab_size=vocab_size,
        where=path,
    )


def _load(folder: Path) -> Any:
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = " ".join(str(error).split())[:300]
        raise BadTokenizer(f"{folder}: the tokenizer cannot be read ({reason}); download it again") from error


def _convert_folder(folder: Path, converted: Path) -> None:
    """Write what `folder` would hold if it had a tokenizer.json: that file, and the settings beside it."""
    tokenizer = convert_tokenizer_model(folder / "tokenizer.model", llama31=True)
    settings = read_optional_json(folder / "tokenizer_config.json")
    added = {id: token for token, id in read_optional_json(folder / "added_tokens.json").items()}
    declared = {int(id): token for id, token in settings.pop("added_tokens_decoder", {}).items()}
    for id, token in sorted((added | declared).items()):
        if tokenizer.id_to_token(id) is None:
            flags = token if isinstance(token, dict) else {"content": token, "normalized": False}
            tokenizer.add_tokens([AddedToken(**{k: v for k, v in flags.items() if k != "__type"})])
            if tokenizer.id_to_token(id) != flags["content"]:
                raise BadTokenizer(
                    f"{folder}: added token {flags['content']!r} has id {id}, which does not follow the "
                    f"{tokenizer.get_vocab_size()} others; add the tokenizer.json of this model"
                )
    defaults = {"bos_token": tokenizer.id_to_token(tokenizer.encode("").ids[0])}
    if settings.get("add_bos_token") is False:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.save(str(converted / "tokenizer.json"))
    settings.pop("tokenizer_class", None)
    (converted / "tokenizer_config.json").write_text(json.dumps(defaults | settings), encoding="utf-8")
    for name in _SIDE_FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, converted)


def _make_files(
    tokenizer: Tokenizer,
    *,
    bos_id: int | None,
    eos_ids: Iterable[int],
    add_bos: bool,
    chat_template: str | None,
    vocab_size: int,
    where: Path,
) -> TokenizerFiles:
    """Serialize a tokenizer without padding and truncation, and without added tokens that have no embedding.

    (Padding tokens are often added to a tokenizer and not to the model; a model cannot be given such a token.)
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    try:
        info = TokenizerInfo(
            bos_id=bos_id, eos_ids=tuple(dict.fromkeys(eos_ids)), add_bos=add_bos, chat_template=chat_template
        )
    except BadMetadata as error:
        raise BadTokenizer(f"{where}: {error}; correct generation_config.json or tokenizer_config.json") from error
    named = {"the largest id of its vocabulary": largest, "bos_id": bos_id or 0, "eos id": max(info.eos_ids, default=0)}
    for what, token in named.items():
        if token >= vocab_size:
            raise BadTokenizer(
                f"{where}: the tokenizer does not fit the model: {what} is {token}, the embedding has {vocab_size} rows"
            )
    return TokenizerFiles(json=json.dumps(content, ensure_ascii=False).encode(), info=info)


def _ids(value: Any) -> list[int]:
    """The ids that a configuration entry names: an id, a list of them, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _default_template(template: Any) -> str | None:
    """A template as it is; of several named ones, the default."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template
