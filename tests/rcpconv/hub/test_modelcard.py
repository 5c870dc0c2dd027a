"""The generated model card: what the licence asks, what was measured, and metadata that the Hub can read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from rcpconv.modelcard import LICENCES, model_card, naming_duty
from tiny_rcp import LDP, TINY, random_metadata


def card(measured: dict[str, Any] | None = None, **provenance: Any) -> str:
    metadata = dataclasses.replace(random_metadata(TINY, LDP), provenance=provenance)
    return model_card(
        "user/tiny", "tiny.rcp", metadata, file_bytes=2_500_000, fp16_bytes=10_000_000, evaluation=measured
    )


def front_matter(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return parsed


def test_card_of_a_hub_model_links_base_and_licence() -> None:
    text = card(
        base_model="org/base", revision="0" * 40, license="apache-2.0", recipe={"tokens": 1000, "data": ["a", "b"]}
    )
    assert front_matter(text) == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "rcpconv",
        "pipeline_tag": "text-generation",
        "tags": ["rcp", "2-bit", "W2A4KV4"],
    }
    assert "4.00 times smaller" in text
    assert 'rcp-run user/tiny --prompt "' in text
    assert "hf://user/tiny/tiny.rcp" in text
    assert "| data | a, b |" in text
    assert "say that the weights were changed" in text


def test_card_of_a_local_model_claims_no_base_on_the_hub() -> None:
    text = card(base_model="my-llama", revision=None, license=None)
    assert not {"base_model", "license"} & front_matter(text).keys()
    assert "`my-llama`" in text
    assert "licence of the base model is unknown" in text
    assert "huggingface.co/my-llama" not in text


def test_other_licences_are_named_as_such() -> None:
    text = card(base_model="org/base", revision="1", license="some-research-license")
    assert front_matter(text)["license"] == "other"
    assert front_matter(text)["license_name"] == "some-research-license"
    assert "Read what it asks of you" in text


@pytest.mark.parametrize("identifier", LICENCES)
def test_duties_of_each_known_licence_are_stated(identifier: str) -> None:
    text = card(base_model="org/base", revision="1", license=identifier)
    for duty in LICENCES[identifier].duties:
        assert f"- {duty}\n" in text
    assert ("**Built with" in text) == (identifier in ("llama3", "llama3.1", "llama3.2", "llama3.3"))


@pytest.mark.parametrize(
    ("repository", "license", "warned"),
    [
        ("user/tiny", "llama3.1", True),
        ("user/Llama-tiny", "llama3.1", False),
        ("user/my-llama", "llama3.2", True),
        ("user/Llama-8B", "llama3", True),
        ("user/llama_3-8b", "llama3", False),
        ("user/tiny", "llama2", False),
        ("user/tiny", None, False),
    ],
)
def test_names_that_a_licence_prescribes(repository: str, license: str | None, warned: bool) -> None:
    assert (naming_duty(repository, {"license": license}) is not None) == warned


def test_measured_perplexities_are_shown() -> None:
    rows = [
        {"name": "original", "perplexity": 20.0, "bytes": 10_000_000},
        {"name": "fake-quant", "perplexity": 24.126, "bytes": None},
    ]
    text = card({"text": "a text", "tokens": 12345, "window": 512, "models": rows}, base_model="demo")
    assert "Perplexity on a text: 12,345 tokens in windows of 512" in text
    assert "| original | 20.00 | 10.0 MB |" in text
    assert "| fake-quant | 24.13 |  |" in text
    measured = {"text": "demo", "window": 512, "tokens": 1234, "perplexity": {"original": 31.0, "fake-quant": 42.0}}
    assert "| fake-quant | 42.00 |" in card(base_model="demo", evaluation=measured)
    assert "Not measured" in card(base_model="demo")
