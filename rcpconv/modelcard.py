"""Writes the README.md of a published `.rcp` file: origin, licence and its duties, scheme, quality, how to run it.

Knows nothing of the Hub's API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcpformat.architecture import Architecture
from rcpformat.metadata import RcpMetadata

MARK = "<!-- written by rcpconv push; a README.md without this line is never replaced -->"


@dataclass(frozen=True)
class Licence:
    """What a licence asks of somebody who passes on a converted model. Not legal advice."""

    name: str
    url: str
    duties: tuple[str, ...]
    banner: str | None = None
    """A line that has to be shown prominently."""
    name_prefix: str | None = None
    """How the name of a published model has to begin."""


_USE_POLICY = "pass on the acceptable use policy, which binds every user, and keep to it;"
_LARGE_USERS = "ask Meta for a licence, with more than 700 million monthly users;"
_NO_RIVALS = "not use the model or its output to improve any other large language model."


def _llama_community(
    agreement: str, product: str, url: str, *, banner: str | None, prefix: str | None, rivals: bool
) -> Licence:
    notice = f"{product} is licensed under the {agreement}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    duties = ["pass on a copy of the agreement;", f'keep this notice in a text file named "Notice": "{notice}";']
    if banner is not None:
        duties.append(f'show "{banner}" prominently wherever the model, or a product made with it, is offered;')
    if prefix is not None:
        duties.append(f'begin the name of a derived model with "{prefix}";')
    duties += [_USE_POLICY, _LARGE_USERS]
    return Licence(agreement, url, (*duties, *(() if rivals else (_NO_RIVALS,))), banner, prefix)


def _llama3(minor: int) -> Licence:
    return _llama_community(
        f"Llama 3.{minor} Community License",
        f"Llama 3.{minor}",
        f"https://www.llama.com/llama3_{minor}/license/",
        banner="Built with Llama",
        prefix="Llama",
        rivals=True,
    )


LICENCES = {
    "apache-2.0": Licence(
        "Apache License 2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        (
            "pass on a copy of the licence, and the NOTICE file if the base model has one;",
            "say that the weights were changed: they were rotated, trained further and quantized to 2 bits.",
        ),
    ),
    "mit": Licence(
        "MIT License",
        "https://opensource.org/license/mit",
        ("pass on the copyright notice and the licence text of the base model.",),
    ),
    "llama2": _llama_community(
        "LLAMA 2 Community License",
        "Llama 2",
        "https://ai.meta.com/llama/license/",
        banner=None,
        prefix=None,
        rivals=False,
    ),
    "llama3": _llama_community(
        "Meta Llama 3 Community License",
        "Meta Llama 3",
        "https://www.llama.com/llama3/license/",
        banner="Built with Meta Llama 3",
        prefix="Llama 3",
        rivals=False,
    ),
    "llama3.1": _llama3(1),
    "llama3.2": _llama3(2),
    "llama3.3": _llama3(3),
}
"""By the Hub's licence identifier."""


def _licence_of(provenance: Mapping[str, Any]) -> str | None:
    """The Hub's identifier of the base model's licence, whatever else a README said, or None."""
    stated = provenance.get("license")
    return stated.lower() if isinstance(stated, str) and stated.lower() in LICENCES else stated


def model_card(
    repository: str,
    filename: str,
    metadata: RcpMetadata,
    *,
    file_bytes: int,
    fp16_bytes: int,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """The text of README.md. evaluation: what `rcpconv eval --json` wrote, if anything."""
    provenance, quantization = metadata.provenance, metadata.quantization
    base, revision, licence = provenance.get("base_model"), provenance.get("revision"), _licence_of(provenance)
    front_matter: dict[str, Any] = {}
    if licence is not None:
        front_matter |= {"license": licence} if licence in LICENCES else {"license": "other", "license_name": licence}
    if revision is not None:  # from the Hub
        front_matter |= {"base_model": base, "base_model_relation": "quantized"}
    front_matter |= {
        "library_name": "rcpconv",
        "pipeline_tag": "text-generation",
        "tags": ["rcp", "2-bit", f"W2A{quantization.a_bits}KV{quantization.kv_bits}"],
    }
    # Each value is JSON, which is YAML too.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front_matter.items())
    page = None if revision is None else f"https://huggingface.co/{base}"
    origin = f"`{base}`" if page is None else f"[{base}]({page})"
    sections = [
        f"---\n{yaml}\n---\n{MARK}\n\n# {repository.rpartition('/')[2]}",
        f"{origin} with 2-bit weights, {quantization.a_bits}-bit activations and a {quantization.kv_bits}-bit KV "
        f"cache, in one file of {file_bytes / 1e6:,.1f} MB: {fp16_bytes / file_bytes:.2f} times smaller than FP16. "
        "Converted with rcpconv by rotation and quantization-aware training "
        "([RCP, arXiv 2502.15779](https://arxiv.org/abs/2502.15779), reconstructed).",
        f'## Run it\n\n```sh\nrcp-run {repository} --prompt "Once upon a time"\n```\n\n'
        "`rcp-run` is rcpconv's runtime, for a CPU or an NVIDIA GPU, without torch. "
        f"`hf://{repository}/{filename}` names the file itself.",
        _recipe(metadata),
        _quality(evaluation or _of_training(provenance)),
        _licence(licence, page),
    ]
    return "\n\n".join(sections) + "\n"


def _one_table(architecture: Architecture) -> str:
    matrix = " and a matrix for the head" if architecture.head_matrix else ""
    return f", one table{matrix}" if architecture.tied_table else ""


def _recipe(metadata: RcpMetadata) -> str:
    a, q = metadata.architecture, metadata.quantization
    rows: dict[str, Any] = {
        "architecture": f"{a.model_type}, {a.num_layers} layers, hidden {a.hidden_size}, vocabulary {a.vocab_size}",
        "weights": f"2 bits ({q.method}), four int8 levels for each {' or '.join(map(str, q.group_sizes))}",
        "embedding and head": f"{q.embed_bits} and {q.head_bits} bits" + _one_table(a),
        "rotations": ", ".join(name.upper() for name in ("r1", "r2", "r3", "r4") if getattr(q, name)) or "none",
    }
    recipe = metadata.provenance.get("recipe")
    if isinstance(recipe, Mapping):
        rows |= {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in recipe.items()}
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## Recipe", "", "| | |", "| --- | --- |", *lines])


def _of_training(provenance: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured at the end of the training, in the form of `rcpconv eval`, if anything was."""
    found = provenance.get("evaluation")
    if not isinstance(found, Mapping) or not isinstance(found.get("perplexity"), Mapping):
        return None
    rows = [{"name": name, "perplexity": value, "bytes": None} for name, value in found["perplexity"].items()]
    return {**found, "models": rows}


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Quality\n\nNot measured. `rcpconv eval` measures perplexity."
    lines = [
        f"| {row['name']} | {row['perplexity']:.2f} | {_megabytes(row['bytes'])} |" for row in evaluation["models"]
    ]
    return "\n".join(
        [
            "## Quality",
            "",
            f"Perplexity on {evaluation['text']}: {evaluation['tokens']:,} tokens in windows of "
            f"{evaluation['window']}, without overlap; the first token of each window is not scored.",
            "",
            "| | perplexity | size |",
            "| --- | --- | --- |",
            *lines,
        ]
    )


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"


def _licence(identifier: str | None, page: str | None) -> str:
    see = f" See [the base model's page]({page})." if page else ""
    licence = LICENCES.get(identifier or "")
    if identifier is None:
        body = f"The licence of the base model is unknown. Find it out before you use or pass on this file.{see}"
    elif licence is None:
        body = (
            f"The licence of the base model (`{identifier}`) holds for this file too. Read what it asks of you before "
            f"you use or pass on this file.{see}"
        )
    else:
        duties = "\n".join(f"- {duty}" for duty in licence.duties)
        body = f"[{licence.name}]({licence.url}), as the base model.{see} Who passes this file on has to:\n\n{duties}"
        if licence.banner is not None:
            body = f"**{licence.banner}**\n\n{body}"
    return f"## Licence\n\n{body}"


def naming_duty(repository: str, provenance: Mapping[str, Any]) -> str | None:
    """A warning when the licence prescribes how a published model's name begins and this one begins otherwise."""
    licence = LICENCES.get(_licence_of(provenance) or "")
    if licence is None or licence.name_prefix is None:
        return None
    words = re.sub(r"[^a-z0-9]+", " ", repository.partition("/")[2].lower())
    if words.startswith(licence.name_prefix.lower()):
        return None
    return f'{repository}: the {licence.name} asks for a name that begins with "{licence.name_prefix}"'
