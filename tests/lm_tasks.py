"""Tasks for lm-evaluation-harness that need no network: definitions in YAML and their data, all in one folder."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = [
    {"question": "The rain had", "choices": [" stopped before", " eaten the", " nine"], "answer": 0},
    {"question": "He counted 12 stones, then", "choices": [" sang.", " 345, and wrote", " she"], "answer": 1},
    {"question": "Are you certain?”", "choices": [" she asked", " x > 0", " captain sea"], "answer": 0},
    {"question": "Ein Vogel sang über", "choices": [" grey", " 12 stones", " den Dächern"], "answer": 2},
]
TEXTS = ["The rain had stopped before the carriage reached the gate.", "He wrote the sum in a small grey book. " * 12]

_DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
_CHOICE = """\
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_TEXT = """\
task: tiny_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
_GENERATE = """\
task: tiny_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
NAMES = "tiny_choice,tiny_text,tiny_generate"


def write_tasks(folder: Path) -> Path:
    """The folder, with tasks tiny_choice (CHOICES), tiny_text (perplexity of TEXTS) and tiny_generate in it."""
    folder.mkdir(parents=True, exist_ok=True)
    choices, texts = folder / "choices.jsonl", folder / "texts.jsonl"
    choices.write_text("".join(json.dumps(question) + "\n" for question in CHOICES), encoding="utf-8")
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    for definition, file in ((_CHOICE, choices), (_TEXT, texts), (_GENERATE, choices)):
        name = definition.partition("\n")[0].removeprefix("task: ")
        (folder / f"{name}.yaml").write_text(definition + _DATA.format(file=file), encoding="utf-8")
    return folder
