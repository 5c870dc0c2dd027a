"""Faults beside those of the committed vectors, each put into a good vector; and files too large to commit."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rcpformat import Architecture, FormatError, Quantization, RcpFile, TokenizerInfo, UnreadableFile, spec
from rcpformat.errors import (
    BadClip,
    BadJson,
    BadMetadata,
    BadScale,
    BadTensorEntry,
    BadTokenizer,
    DuplicateKey,
    FeatureMismatch,
    HashListMismatch,
    HeaderTooLarge,
    MalformedVersion,
    MetadataHashMismatch,
    Misaligned,
    MissingMetadata,
    MissingTensor,
    NotAnRcpFile,
    NotFinite,
    TensorGap,
    TensorSizeMismatch,
    TokenIdOutOfRange,
    TruncatedFile,
    UnknownDtype,
    UnknownTensor,
    UnsupportedVersion,
    WrongDtype,
    WrongShape,
)
from rcpformat.strict_json import parse_json
from tiny_rcp import random_metadata, write_random
from vectors.make_vectors import (
    FOLDER,
    HALVES,
    LAYER,
    PLAIN,
    PROVENANCE,
    SMALLEST,
    Bad,
    Q,
    element,
    entry,
    header_text,
    join,
    members,
    metadata,
    rebuilt,
    split,
    tensor,
    tokenizer,
    without_member,
)

ARCHITECTURE, QUANTIZATION, GENERATION = spec.KEY_ARCHITECTURE, spec.KEY_QUANTIZATION, spec.KEY_GENERATION


def version(text: str) -> Bad:
    error = MalformedVersion if text != "0.9" else UnsupportedVersion
    return Bad(error, f"Version {text!r}.", metadata(spec.KEY_VERSION, lambda _: text))


def architecture(**changes: object) -> Bad:
    return Bad(BadMetadata, f"Architecture with {changes}.", members(ARCHITECTURE, **changes))


def quantization(**changes: object) -> Bad:
    return Bad(BadMetadata, f"Quantization with {changes}.", members(QUANTIZATION, **changes))


def wrong_metadata_hash(file: bytes) -> bytes:
    return file.replace(b'"rcp.metadata_sha256":"', b'"rcp.metadata_sha256":"0', 1)


FAULTS = [
    Bad(NotAnRcpFile, "A pickle.", lambda file: b"\x80\x02}q\x00." + bytes(20)),
    Bad(NotAnRcpFile, "An HTML page.", lambda file: b"<!DOCTYPE html><html></html>"),
    Bad(NotAnRcpFile, "Only a length.", lambda file: file[:8]),
    Bad(NotAnRcpFile, "A JSON array.", lambda file: file[:8] + b"[" + file[9:]),
    Bad(NotAnRcpFile, "No metadata at all.", lambda file: join("{}", b"")),
    Bad(HeaderTooLarge, "One more than the limit.", lambda file: struct.pack("<Q", (32 << 20) + 1) + file[8:]),
    Bad(BadJson, "A length that ends in a string.", lambda file: struct.pack("<Q", 512) + file[8:]),
    Bad(
        Misaligned,
        "Data at an odd offset.",
        lambda file: struct.pack("<Q", int.from_bytes(file[:8], "little") + 1) + file[8:9] + b" " + file[9:],
    ),
    Bad(BadJson, "A comma before the brace.", header_text(lambda text: text[:-1] + ",}")),
    Bad(BadJson, "A second object.", header_text(lambda text: text + "{}")),
    Bad(BadJson, "A byte of zero after the object.", header_text(lambda text: text + "\0")),
    Bad(BadJson, "Half a surrogate pair as a name.", header_text(lambda text: text.replace('"embed.', '"\\udfff'))),
    Bad(BadMetadata, "A number as a value.", header_text(lambda text: text.replace('"1.0"', "1.0", 1))),
    Bad(BadMetadata, "An array of metadata.", header_text(lambda text: text.replace(":", ':[],"x":', 1))),
    Bad(DuplicateKey, "A metadata key twice.", header_text(lambda text: text.replace(':{"', ':{"rcp.sha256":"","', 1))),
    Bad(BadTensorEntry, "No dtype.", entry(f"{Q}.scale", dtype=None)),
    Bad(BadTensorEntry, "dtype 5.", entry(f"{Q}.scale", dtype=5)),
    Bad(BadTensorEntry, "A dimension of 0.", entry(f"{Q}.scale", shape=[0])),
    Bad(BadTensorEntry, "A dimension of 2^63.", entry(f"{Q}.scale", shape=[1 << 63])),
    Bad(BadTensorEntry, "A shape that is a number.", entry(f"{Q}.scale", shape=2)),
    Bad(BadTensorEntry, "Nine dimensions.", entry(f"{Q}.scale", shape=[2, 1, 1, 1, 1, 1, 1, 1, 1])),
    Bad(BadTensorEntry, "A negative offset.", entry(f"{Q}.scale", data_offsets=[-8, 0])),
    Bad(BadTensorEntry, "A floating offset.", entry(f"{Q}.scale", data_offsets=[88.0, 96])),
    Bad(BadTensorEntry, "An offset of true.", entry(f"{Q}.scale", data_offsets=[True, 9])),
    Bad(BadTensorEntry, "An offset of 2^64.", entry(f"{Q}.scale", data_offsets=[1 << 64, (1 << 64) + 8])),
    Bad(BadTensorEntry, "Three offsets.", entry(f"{Q}.scale", data_offsets=[88, 96, 96])),
    Bad(BadTensorEntry, "No offsets.", entry(f"{Q}.scale", data_offsets=[])),
    Bad(BadTensorEntry, "An entry that is a list.", header_text(lambda text: text[:-1] + ',"x.a":[]}')),
    Bad(TensorSizeMismatch, "One byte too few.", entry(f"{Q}.codes", shape=[1, 3])),
    Bad(TensorSizeMismatch, "end before begin.", entry(f"{Q}.scale", data_offsets=[96, 88])),
    Bad(TensorSizeMismatch, "A product of 2^256.", entry(f"{Q}.codes", shape=[1 << 62] * 4)),
    Bad(
        TensorGap,
        "A tensor far beyond the file.",
        entry("tokenizer.json", shape=[9], data_offsets=[1 << 40, (1 << 40) + 9]),
    ),
    Bad(UnknownDtype, "A dtype in lower case.", entry(f"{Q}.scale", dtype="f32")),
    Bad(MissingMetadata, "No version.", rebuilt(lambda draft: draft.metadata.pop(spec.KEY_VERSION))),
    Bad(MetadataHashMismatch, "A hash of 65 digits.", wrong_metadata_hash),
    Bad(BadMetadata, "A NUL in an extension.", rebuilt(lambda draft: draft.metadata.update({"a\0": "b"}))),
    *map(version, ("", "1", "1.", ".0", "1.0.0", "1.01", "+1.0", " 1.0", "1.0\n", "١.٠", "1" * 5000 + ".0", "0.9")),
    Bad(BadJson, "Infinity.", metadata(PROVENANCE, lambda _: '{"perplexity":-Infinity}')),
    Bad(BadJson, "A number beyond f64.", metadata(PROVENANCE, lambda _: '{"perplexity":1e999}')),
    Bad(BadJson, "A long integer.", metadata(PROVENANCE, lambda _: '{"steps":' + "9" * 5000 + "}")),
    Bad(BadJson, "A long fraction.", metadata(PROVENANCE, lambda _: '{"loss":0.' + "9" * 5000 + "}")),
    Bad(BadJson, "65 levels.", metadata(PROVENANCE, lambda _: f'{{"a":{"[" * 64}{"]" * 64}}}')),
    Bad(BadJson, "100,000 levels.", metadata(PROVENANCE, lambda _: '{"a":' * 100_000)),
    Bad(BadJson, "No value.", metadata(PROVENANCE, lambda _: "")),
    Bad(BadJson, "A byte order mark.", metadata(PROVENANCE, lambda text: "\ufeff" + text)),
    Bad(DuplicateKey, "A deep key twice.", metadata(PROVENANCE, lambda _: '{"a":[{"b":{"c":0,"c":0}}]}')),
    Bad(BadMetadata, "Provenance in a list.", metadata(PROVENANCE, lambda text: f"[{text}]")),
    Bad(BadMetadata, "Features in an object.", metadata(spec.KEY_REQUIRED, lambda _: "{}")),
    Bad(BadMetadata, "A feature that is a number.", metadata(spec.KEY_OPTIONAL, lambda _: "[1]")),
    Bad(FeatureMismatch, "An unused feature.", metadata(spec.KEY_REQUIRED, lambda _: '["kv8"]')),
    Bad(
        FeatureMismatch,
        "Features out of order.",
        metadata(spec.KEY_REQUIRED, lambda text: json.dumps(json.loads(text)[::-1])),
        base="biases_qk_norm_window",
    ),
    Bad(
        FeatureMismatch,
        "A feature twice.",
        metadata(spec.KEY_REQUIRED, lambda text: text.replace('"bias"', '"bias","bias"')),
        base="biases_qk_norm_window",
    ),
    architecture(model_type=5),
    architecture(num_layers=0),
    architecture(num_layers=1 << 60),
    architecture(vocab_size=4.0),
    architecture(vocab_size="4"),
    architecture(hidden_size=True),
    architecture(hidden_size=(1 << 20) + 1),
    architecture(head_dim=3),
    architecture(num_heads=1 << 15, head_dim=64),
    architecture(rms_norm_eps=0),
    architecture(rms_norm_eps=1e-60),
    architecture(rms_norm_eps="1e-5"),
    architecture(rope_attention_factor=-1.0),
    architecture(attention_window=[None, None]),
    architecture(attention_window=[0]),
    architecture(attention_window=4),
    architecture(qk_norm=1),
    architecture(max_position_embeddings=None),
    Bad(BadMetadata, "No head_dim.", without_member(ARCHITECTURE, "head_dim")),
    Bad(BadMetadata, "An architecture in a list.", metadata(ARCHITECTURE, lambda text: f"[{text}]")),
    quantization(a_bits=3),
    quantization(a_bits=16),
    quantization(a_bits=4.0),
    quantization(kv_bits=True),
    quantization(group_size=96),
    quantization(group_size_overrides=[]),
    quantization(group_size_overrides={Q: 32}),
    quantization(group_size_overrides={"layers.9.attn.q": 64}),
    quantization(head_bits=4),
    quantization(r4="yes"),
    quantization(method=None),
    Bad(BadMetadata, "One table, two widths.", members(QUANTIZATION, head_bits=16), base="tied_plain"),
    Bad(BadMetadata, "A bos_id of text.", members(spec.KEY_TOKENIZER, bos_id="<s>")),
    Bad(BadMetadata, "add_bos without one.", members(spec.KEY_TOKENIZER, bos_id=None, add_bos=True)),
    Bad(BadMetadata, "One eos id, no list.", members(spec.KEY_TOKENIZER, eos_ids=2)),
    Bad(BadMetadata, "A negative eos id.", members(spec.KEY_TOKENIZER, eos_ids=[-1])),
    Bad(BadMetadata, "A template that is a list.", members(spec.KEY_TOKENIZER, chat_template=[])),
    Bad(TokenIdOutOfRange, "bos 4 of a vocabulary of 4.", members(spec.KEY_TOKENIZER, bos_id=4)),
    Bad(BadMetadata, "top_p above 1.", members(GENERATION, top_p=1.5)),
    Bad(BadMetadata, "top_k 40.0.", members(GENERATION, top_k=40.0)),
    Bad(BadMetadata, "temperature null.", members(GENERATION, temperature=None)),
    Bad(BadMetadata, "Settings in a list.", metadata(GENERATION, lambda _: "[]")),
    Bad(BadMetadata, "Hashes in a list.", metadata(spec.KEY_SHA256, lambda _: "[]")),
    Bad(HashListMismatch, "An upper-case hash.", members(spec.KEY_SHA256, **{"embed.scale": "AB" * 32})),
    Bad(HashListMismatch, "A hash with a line end.", members(spec.KEY_SHA256, **{"embed.scale": "ab" * 32 + "\n"})),
    Bad(HashListMismatch, "A null hash.", members(spec.KEY_SHA256, **{"embed.scale": None})),
    Bad(HashListMismatch, "A hash of no tensor.", members(spec.KEY_SHA256, **{"x.ghost": "ab" * 32})),
    Bad(MissingTensor, "No clips.", rebuilt(lambda draft: draft.tensors.pop(f"{LAYER}.act_clip"))),
    Bad(
        UnknownTensor, "A second layer.", rebuilt(lambda draft: draft.put("layers.1.act_clip", np.ones(4, np.float32)))
    ),
    Bad(WrongDtype, "A float16 clip.", tensor(f"{LAYER}.kv_clip", lambda clip: clip.astype(np.float16))),
    Bad(WrongDtype, "A float16 table under int8.", tensor("embed.weight", lambda table: table.astype(np.float16))),
    Bad(WrongShape, "A table turned round.", tensor("embed.weight", lambda table: table.T)),
    Bad(WrongShape, "A tokenizer in a square.", tensor(spec.TOKENIZER, lambda text: text[None])),
    Bad(BadScale, "An infinite scale.", element("embed.scale", 3, np.inf)),
    Bad(BadScale, "A subnormal scale.", element(f"{Q}.scale", 0, 2.0**-127)),
    Bad(BadScale, "Minus zero.", element(f"{Q}.scale", 0, -0.0)),
    Bad(BadClip, "A clip of 0.", element(f"{LAYER}.kv_clip", 0, 0.0)),
    Bad(BadClip, "A clip of NaN.", element(f"{LAYER}.kv_clip", 1, np.nan)),
    Bad(NotFinite, "An infinite table entry.", element("head.weight", (1, 1), -np.inf), base="f16_tables"),
    Bad(NotFinite, "A NaN table entry.", element("embed.weight", (3, 5), np.nan), base="f16_tables"),
    Bad(NotFinite, "A NaN bias.", element(f"{Q}.bias", 1, np.nan), base="biases_qk_norm_window"),
    Bad(NotFinite, "An infinite norm.", element(f"{LAYER}.attn.q_norm", 0, np.inf), base="biases_qk_norm_window"),
    Bad(NotFinite, "A NaN gain.", element(spec.FINAL_GAIN, 7, np.nan), base="tied_rotated"),
    Bad(BadTokenizer, "No model.", tokenizer(b'{"version":"1.0"}')),
    Bad(BadTokenizer, "A model that is a list.", tokenizer(b'{"model":[]}')),
    Bad(BadTokenizer, "A list.", tokenizer(b"[]")),
    Bad(BadTokenizer, "A token twice.", tokenizer(b'{"model":{"vocab":{"a":0,"a":1}}}')),
    Bad(BadTokenizer, "Latin-1.", tokenizer('{"model":{},"a":"ü"}'.encode("latin-1"))),
    Bad(BadTokenizer, "Nested too deep.", tokenizer(b'{"model":' + b"[" * 9000)),
]


@pytest.mark.parametrize("bad", FAULTS, ids=[f"{bad.error.__name__}: {bad.sentence[:60]}" for bad in FAULTS])
def test_fault_is_refused(tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "bad.rcp"
    path.write_bytes(bad.make((FOLDER / "good" / f"{bad.base}.rcp").read_bytes()))
    with pytest.raises(FormatError) as caught:
        RcpFile.open(path, verify=True)
    assert caught.type is bad.error, caught.value
    assert len(str(caught.value)) < 1000


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(NotAnRcpFile, match="found a"):
            RcpFile.open(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        with pytest.raises(UnreadableFile, match="expected a readable"):
            RcpFile.open(path)


def opening_peak(path: Path, error: type[Exception]) -> int:
    """Refuse a file; the most memory that took, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(error):
            RcpFile.open(path, verify=True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.rcp"
    path.write_bytes(struct.pack("<Q", 1 << 31) + b"{")
    os.truncate(path, 1 << 32)
    assert opening_peak(path, HeaderTooLarge) < 1 << 20


def test_a_huge_tensor_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    text, data = split((FOLDER / "good" / "minimal.rcp").read_bytes())
    header = json.loads(text)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin = header[last]["data_offsets"][0]
    header[last] |= {"shape": [1 << 40], "data_offsets": [begin, begin + (1 << 40)]}
    path = tmp_path / "bad.rcp"
    path.write_bytes(join(json.dumps(header), data))
    assert opening_peak(path, TruncatedFile) < 1 << 20


def test_a_huge_architecture_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "bad.rcp"
    file = (FOLDER / "good" / "minimal.rcp").read_bytes()
    path.write_bytes(members(ARCHITECTURE, num_layers=1024, hidden_size=1 << 20, vocab_size=1 << 24)(file))
    assert opening_peak(path, MissingTensor) < 32 << 20


def test_a_large_tokenizer_is_refused_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.rcp"
    write_random(path, SMALLEST, HALVES)
    monkeypatch.setattr(spec, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(BadTokenizer, match="at most 100 bytes"):
        RcpFile.open(path)


def test_a_long_metadata_value_is_refused(tmp_path: Path) -> None:
    file = (FOLDER / "good" / "minimal.rcp").read_bytes()
    path = tmp_path / "bad.rcp"
    path.write_bytes(metadata(PROVENANCE, lambda _: '{"a":"' + "é" * (8 << 20) + '"}')(file))
    with pytest.raises(HeaderTooLarge, match=r"rcp\.provenance"):
        RcpFile.open(path)


def empty_lists(separators: int) -> str:
    """A JSON array with that many of `[` and `,` in it; even."""
    return "[" + ",".join(["[]"] * (separators // 2)) + "]"


def escaped_commas(file: bytes) -> bytes:
    """Too many separators in a metadata value, few in the header."""
    commas = metadata(PROVENANCE, lambda _: '{"a":[' + "true," * spec.MAX_JSON_SEPARATORS + "true]}")
    return header_text(lambda text: text.replace("true,", r"true\u002c"))(commas(file))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (header_text(lambda text: text[:-1] + f',"x.a":{empty_lists(spec.MAX_JSON_SEPARATORS)}}}'), BadJson),
        (escaped_commas, BadJson),
        (tokenizer(f'{{"model":{{"a":{empty_lists(spec.MAX_TOKENIZER_SEPARATORS)}}}}}'.encode()), BadTokenizer),
    ],
    ids=["header", "metadata", "tokenizer"],
)
def test_a_text_of_many_small_values_is_refused_before_it_is_parsed(
    tmp_path: Path, make: Callable[[bytes], bytes], error: type[FormatError]
) -> None:
    path = tmp_path / "bad.rcp"
    path.write_bytes(make((FOLDER / "good" / "minimal.rcp").read_bytes()))
    assert opening_peak(path, error) < 5 * path.stat().st_size


def test_the_most_separators() -> None:
    assert parse_json('[{"a":","},0]', "text", max_separators=4) == [{"a": ","}, 0]
    with pytest.raises(BadJson, match=r"text: .* found 4 of .* limit is 3"):
        parse_json('[{"a":","},0]', "text", max_separators=3)


def test_values_are_checked_by_every_way_to_them(tmp_path: Path) -> None:
    path = FOLDER / "bad" / "levels_decreasing.rcp"
    with RcpFile.open(path) as file:
        for _ in range(2):  # a refusal is not forgotten
            with pytest.raises(FormatError):
                file.tensor(f"{Q}.levels")
            with pytest.raises(FormatError):
                file.linear(Q)
    with RcpFile.open(FOLDER / "bad" / "tokenizer_syntax.rcp") as file, pytest.raises(BadTokenizer):
        file.tokenizer_json()


def test_arrays_are_read_only_and_outlive_the_file() -> None:
    with RcpFile.open(FOLDER / "good" / "minimal.rcp") as file:
        scale = file.tensor(f"{Q}.scale")
    assert scale.sum() > 0
    with pytest.raises(ValueError, match="read-only"):
        scale[0] = 1
    with pytest.raises(AssertionError, match="closed"):
        file.tensor(f"{Q}.scale")


def test_metadata_cannot_be_built_wrong() -> None:
    good = random_metadata(SMALLEST, PLAIN)
    with pytest.raises(BadMetadata, match="does not define"):
        type(good)(
            architecture=good.architecture,
            quantization=good.quantization,
            tokenizer=good.tokenizer,
            generation={},
            provenance={},
            extensions={spec.KEY_VERSION: "3.0"},
        )
    with pytest.raises(BadMetadata, match="eos_ids"):
        TokenizerInfo(bos_id=None, eos_ids=[1], add_bos=False)  # type: ignore[arg-type]
    for record in (SMALLEST, HALVES, good.tokenizer):
        assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record
    assert isinstance(SMALLEST, Architecture) and isinstance(HALVES, Quantization)
