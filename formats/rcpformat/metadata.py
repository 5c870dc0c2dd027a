"""The metadata of a `.rcp` file: what it says about the model, and its form as strings (SPEC sections 2 to 6).

Knows nothing of tensors' bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rcpformat import spec
from rcpformat.architecture import Architecture, Quantization, TokenizerInfo
from rcpformat.errors import (
    BadMetadata,
    FeatureMismatch,
    HashListMismatch,
    MalformedVersion,
    MetadataHashMismatch,
    MissingMetadata,
    TokenIdOutOfRange,
    UnknownRequiredFeature,
    UnsupportedVersion,
    brief,
)
from rcpformat.strict_json import dump_json, parse_json

_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class RcpMetadata:
    """Everything in a file beside tensors and hashes. Built from parts that fit each other, or not at all."""

    architecture: Architecture
    quantization: Quantization
    tokenizer: TokenizerInfo
    generation: Mapping[str, Any]
    """Default sampling settings, by the names of SPEC section 2; other keys are kept and ignored."""
    provenance: Mapping[str, Any]
    """Any JSON object: base model, licence, recipe, perplexities, tool version."""
    optional_features: tuple[str, ...] = ()
    extensions: Mapping[str, str] = field(default_factory=dict)
    """Metadata entries under keys that the format does not define."""

    def __post_init__(self) -> None:
        spec.expected_tensors(self.architecture, self.quantization)
        vocabulary = self.architecture.vocab_size
        for token in (*self.tokenizer.eos_ids, self.tokenizer.bos_id or 0):
            if token >= vocabulary:
                raise TokenIdOutOfRange(f"tokenizer: expected token ids below vocab_size {vocabulary}, found {token}")
        for name in ("generation", "provenance"):
            if not isinstance(getattr(self, name), Mapping):
                raise BadMetadata(f"{name}: expected a JSON object, found {brief(getattr(self, name))}")
        for key in self.generation.keys() & spec.GENERATION_LIMITS.keys():
            low, high = spec.GENERATION_LIMITS[key]
            value = self.generation[key]
            kinds = int if key == "top_k" else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "an integer" if kinds is int else "a number"
                raise BadMetadata(f"generation.{key}: expected {kind} from {low} to {high}, found {brief(value)}")
        _string_list("optional_features", list(self.optional_features))
        taken = self.extensions.keys() & set(spec.METADATA_KEYS)
        if taken:
            raise BadMetadata(f"extensions: expected keys that the format does not define, found {sorted(taken)}")

    @property
    def required_features(self) -> list[str]:
        """The features, sorted, that a reader must know."""
        return spec.required_features(self.architecture, self.quantization)

    def to_entries(self, sha256: Mapping[str, str]) -> dict[str, str]:
        """The strings of `__metadata__`, given each tensor's SHA-256. Raises BadJson."""
        values = {
            spec.KEY_REQUIRED: self.required_features,
            spec.KEY_OPTIONAL: list(self.optional_features),
            spec.KEY_ARCHITECTURE: self.architecture.to_json(),
            spec.KEY_QUANTIZATION: self.quantization.to_json(),
            spec.KEY_TOKENIZER: self.tokenizer.to_json(),
            spec.KEY_GENERATION: dict(self.generation),
            spec.KEY_PROVENANCE: dict(self.provenance),
            spec.KEY_SHA256: dict(sha256),
        }
        entries = {key: dump_json(value, key) for key, value in values.items()} | dict(self.extensions)
        entries[spec.KEY_VERSION] = f"{spec.FORMAT_MAJOR}.{spec.FORMAT_MINOR}"
        entries[spec.KEY_METADATA_SHA256] = metadata_sha256(entries)
        return entries

    @classmethod
    def from_entries(cls, entries: Mapping[str, str]) -> tuple[Self, dict[str, str]]:
        """(metadata, SHA-256 of each tensor), from the strings of `__metadata__` after check_entries.

        Raises BadJson, DuplicateKey, BadMetadata, FeatureMismatch, HashListMismatch or TokenIdOutOfRange.
        """
        values = {
            key: parse_json(entries[key], key)
            for key in spec.METADATA_KEYS
            if key not in (spec.KEY_VERSION, spec.KEY_METADATA_SHA256)
        }
        metadata = cls(
            architecture=Architecture.from_json(values[spec.KEY_ARCHITECTURE]),
            quantization=Quantization.from_json(values[spec.KEY_QUANTIZATION]),
            tokenizer=TokenizerInfo.from_json(values[spec.KEY_TOKENIZER]),
            generation=values[spec.KEY_GENERATION],
            provenance=values[spec.KEY_PROVENANCE],
            optional_features=tuple(_string_list(spec.KEY_OPTIONAL, values[spec.KEY_OPTIONAL])),
            extensions={key: value for key, value in entries.items() if key not in spec.METADATA_KEYS},
        )
        if values[spec.KEY_REQUIRED] != metadata.required_features:
            raise FeatureMismatch(
                f"{spec.KEY_REQUIRED}: expected {metadata.required_features} for this architecture and quantization, "
                f"found {brief(values[spec.KEY_REQUIRED])}"
            )
        sha256 = values[spec.KEY_SHA256]
        if not isinstance(sha256, dict):
            raise BadMetadata(f"{spec.KEY_SHA256}: expected a JSON object, found {brief(sha256)}")
        for name, digest in sha256.items():
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise HashListMismatch(
                    f"{spec.KEY_SHA256}: expected 64 lower-case hex digits for {brief(name)}, found {brief(digest)}"
                )
        return metadata, sha256


def metadata_sha256(entries: Mapping[str, str]) -> str:
    """Hash of all entries but its own: key, byte 0, value, byte 0, in sorted order of the keys, in UTF-8."""
    digest = hashlib.sha256()
    for key in sorted(entries.keys() - {spec.KEY_METADATA_SHA256}):
        digest.update(f"{key}\0{entries[key]}\0".encode())
    return digest.hexdigest()


def check_entries(entries: Mapping[str, str]) -> None:
    """Version, hash, presence and required features: what decides whether the rest can be read at all.

    Raises MissingMetadata, MalformedVersion, UnsupportedVersion, MetadataHashMismatch, BadMetadata or
    UnknownRequiredFeature.
    """

    def entry(key: str) -> str:
        if key not in entries:
            raise MissingMetadata(f"{key}: expected this metadata key, found none")
        return entries[key]

    version = entry(spec.KEY_VERSION)
    match = _VERSION.fullmatch(version)
    if not match:
        raise MalformedVersion(f"{spec.KEY_VERSION}: expected decimal major.minor, found {brief(version)}")
    if int(match[1]) != spec.FORMAT_MAJOR:
        raise UnsupportedVersion(
            f"{spec.KEY_VERSION}: expected {spec.FORMAT_MAJOR}.x, found {version}; use another release of rcpconv, "
            f"or convert the model again"
        )
    found, computed = entry(spec.KEY_METADATA_SHA256), metadata_sha256(entries)
    if found != computed:
        raise MetadataHashMismatch(
            f"{spec.KEY_METADATA_SHA256}: expected {computed}, found {brief(found)}; the header was changed or damaged"
        )
    for key in spec.METADATA_KEYS:
        entry(key)
    features = _string_list(spec.KEY_REQUIRED, parse_json(entry(spec.KEY_REQUIRED), spec.KEY_REQUIRED))
    unknown = sorted(set(features) - set(spec.KNOWN_FEATURES))
    if unknown:
        raise UnknownRequiredFeature(
            f"{spec.KEY_REQUIRED}: expected features of {', '.join(spec.KNOWN_FEATURES)}, found {brief(unknown)}; "
            f"a newer release may know them"
        )


def _string_list(key: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadMetadata(f"{key}: expected a list of strings, found {brief(value)}")
    return value
