"""Makes the test vectors: small `.rcp` files that every reader must accept (good/) or refuse (bad/), and manifest.json.

    PYTHONPATH=formats:tests python formats/vectors/make_vectors.py

The same bytes each time; a test compares them with the committed ones. A bad file has one fault and is otherwise
good: its hashes are made again after the fault is put in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rcpformat import Architecture, Quantization, TokenizerInfo, spec, write_rcp
from rcpformat.errors import (
    BadClip,
    BadJson,
    BadMetadata,
    BadScale,
    BadSign,
    BadTensorEntry,
    BadTokenizer,
    CodesShapeMismatch,
    DecreasingLevels,
    DuplicateKey,
    FeatureMismatch,
    FormatError,
    HashListMismatch,
    HeaderTooLarge,
    LevelOutOfRange,
    LevelsShapeMismatch,
    MalformedVersion,
    MetadataHashMismatch,
    Misaligned,
    MissingMetadata,
    MissingTensor,
    NegativeFrequency,
    NonZeroPadding,
    NotAnRcpFile,
    NotFinite,
    ScaleShapeMismatch,
    TableEntryOutOfRange,
    TensorGap,
    TensorHashMismatch,
    TensorOverlap,
    TensorSizeMismatch,
    TokenIdOutOfRange,
    TrailingBytes,
    TruncatedFile,
    UnknownDtype,
    UnknownRequiredFeature,
    UnknownTensor,
    UnsupportedVersion,
    WrongDtype,
    WrongShape,
)
from rcpformat.header import lay_out, serialize_header
from rcpformat.metadata import metadata_sha256
from tiny_rcp import TINY, random_model, sources

FOLDER = Path(__file__).parent

SMALLEST = replace(
    TINY, vocab_size=4, hidden_size=6, intermediate_size=5, num_heads=1, head_dim=2, max_position_embeddings=8
)
PLAIN = Quantization(method="rtn", r1=False, r2=False, r3=False, r4=False)
LDP = Quantization(method="ldp")
ROTATED = replace(SMALLEST, hidden_size=16, intermediate_size=12, num_heads=2, head_dim=4)
TIED = replace(SMALLEST, hidden_size=8, intermediate_size=12, tied_table=True)
TURNED = replace(TIED, head_matrix=True)
BIASED = replace(SMALLEST, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, attention_window=(4,))
HALVES = replace(PLAIN, embed_bits=16, head_bits=16)

LAYER = "layers.0"
Q = f"{LAYER}.attn.q"
ARCHITECTURE, FEATURES, PROVENANCE = spec.KEY_ARCHITECTURE, spec.KEY_REQUIRED, spec.KEY_PROVENANCE


@dataclass
class Draft:
    """A file taken apart: metadata strings, and (dtype, shape, bytes) of each tensor."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]

    def array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A writable copy of a tensor; put it back with `put`."""
        dtype, shape, data = self.tensors[name]
        return np.frombuffer(data, spec.DTYPES[dtype]).reshape(shape).copy()

    def put(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Set or replace a tensor."""
        dtype = next(key for key, known in spec.DTYPES.items() if known == array.dtype)
        self.tensors[name] = (dtype, array.shape, array.tobytes())

    def hash_metadata(self) -> None:
        """Make the metadata hash fit again."""
        self.metadata[spec.KEY_METADATA_SHA256] = metadata_sha256(self.metadata)

    def hash_tensors(self) -> None:
        """Make all hashes fit again."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, (_, _, data) in self.tensors.items()}
        self.metadata[spec.KEY_SHA256] = json.dumps(digests, sort_keys=True, separators=(",", ":"))
        self.hash_metadata()

    def to_bytes(self) -> bytes:
        """The canonical file."""
        entries = lay_out({name: spec.TensorSpec(dtype, shape) for name, (dtype, shape, _) in self.tensors.items()})
        return serialize_header(self.metadata, entries) + b"".join(self.tensors[name][2] for name in entries)


def split(file: bytes) -> tuple[str, bytes]:
    """(header text without its padding, tensor data)."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length].decode().rstrip(" "), file[8 + length :]


def join(header: str | bytes, data: bytes) -> bytes:
    """Inverse of split."""
    raw = header.encode() if isinstance(header, str) else header
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def take_apart(file: bytes) -> Draft:
    """A good file as a Draft."""
    text, data = split(file)
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    return Draft(
        metadata,
        {
            name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        },
    )


def model(
    architecture: Architecture,
    quantization: Quantization,
    seed: int,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> bytes:
    """A file with a random model. extra: further tensors; changes: fields of RcpMetadata to replace."""
    metadata, tensors = random_model(architecture, quantization, seed)
    metadata = replace(metadata, **changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.rcp"
        write_rcp(path, metadata, sources(tensors | (extra or {})))
        return path.read_bytes()


# Good files.


def newer_minor() -> bytes:
    """Version 1.7, with keys and an optional feature that this version does not know."""
    draft = take_apart(model(SMALLEST, PLAIN, 11))
    draft.metadata[spec.KEY_VERSION] = "1.7"
    draft.metadata[spec.KEY_OPTIONAL] = '["speculative_head"]'
    architecture = json.loads(draft.metadata[spec.KEY_ARCHITECTURE])
    draft.metadata[spec.KEY_ARCHITECTURE] = json.dumps(architecture | {"favourite_colour": "green"})
    draft.metadata["rcp.something_new"] = "not even JSON"
    draft.hash_metadata()
    return draft.to_bytes()


def not_canonical() -> bytes:
    """Tensors in another order, metadata last, white space, escapes."""
    draft = take_apart(model(SMALLEST, PLAIN, 12))
    draft.metadata["example.key"] = "ünïcode"
    draft.hash_metadata()
    header: dict[str, Any] = {}
    data = b""
    names = sorted(draft.tensors, reverse=True)
    for name in sorted(names, key=lambda name: -spec.DTYPES[draft.tensors[name][0]].itemsize):
        dtype, shape, content = draft.tensors[name]
        header[name] = {"data_offsets": [len(data), len(data) + len(content)], "shape": shape, "dtype": dtype}
        data += content
    return join(json.dumps(header | {"__metadata__": draft.metadata}, indent=1), data)


GOOD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "minimal": (
        "One layer of width 6, no rotations; rows of codes end in padding bits.",
        lambda: model(SMALLEST, PLAIN, 0),
    ),
    "rotated": ("All four rotations, grouped-query attention.", lambda: model(ROTATED, LDP, 1)),
    "tied_rotated": ("One table for embedding and head, rotated: gain and signs.", lambda: model(TIED, LDP, 2)),
    "tied_plain": ("One table, not rotated: a gain, no signs.", lambda: model(TIED, PLAIN, 3)),
    "biases_qk_norm_window": (
        "Every bias, per-head norms, a sliding window.",
        lambda: model(BIASED, PLAIN, 4),
    ),
    "mixed_windows": (
        "Two layers, of which one has a sliding window.",
        lambda: model(replace(SMALLEST, num_layers=2, attention_window=(None, 3)), PLAIN, 5),
    ),
    "short_groups": (
        "Width 130: a last group of 2 weights, and a last byte of 2 codes.",
        lambda: model(replace(SMALLEST, hidden_size=130), PLAIN, 6),
    ),
    "group_overrides": (
        "Group 128, but 64 in two layers.",
        lambda: model(
            replace(SMALLEST, hidden_size=66),
            replace(PLAIN, group_size_overrides={Q: 64, "layers.0.mlp.up": 64}),
            7,
        ),
    ),
    "f16_tables": ("Embedding and head in float16.", lambda: model(SMALLEST, HALVES, 8)),
    "a8_kv8": ("8-bit activations and KV cache.", lambda: model(SMALLEST, replace(PLAIN, a_bits=8, kv_bits=8), 9)),
    "tied_matrix": ("One table, and a matrix that turns what the head takes.", lambda: model(TURNED, LDP, 11)),
    "extensions": (
        "Extension tensors, an optional feature and a metadata key that no reader knows; a chat template in Unicode.",
        lambda: model(
            SMALLEST,
            PLAIN,
            10,
            extra={"x.scalar": np.float64(0.5).reshape(()), "x.notes": np.frombuffer(b"hello", np.uint8)},
            optional_features=("notes",),
            extensions={"example.key": "any text"},
            tokenizer=TokenizerInfo(
                bos_id=None, eos_ids=(2, 3), add_bos=False, chat_template='{{ "«" + messages[0].content + "»\n" }}'
            ),
        ),
    ),
    "newer_minor": ("A newer minor version, with keys that this one does not know.", newer_minor),
    "not_canonical": ("Another order, white space and escapes: valid, though no writer makes it.", not_canonical),
}


# Bad files.

Fault = Callable[[bytes], bytes]
"""From a good file to the file with the fault in it."""


def rebuilt(change: Callable[[Draft], object], *, rehash: bool = True) -> Fault:
    """Take apart, change, put together again with fitting hashes."""

    def make(file: bytes) -> bytes:
        draft = take_apart(file)
        change(draft)
        if rehash:
            draft.hash_tensors()
        return draft.to_bytes()

    return make


def element(name: str, index: int | tuple[int, ...], value: float, *, rehash: bool = True) -> Fault:
    """Set one element of a tensor."""

    def change(draft: Draft) -> None:
        array = draft.array(name)
        array[index] = value
        draft.put(name, array)

    return rebuilt(change, rehash=rehash)


def tensor(name: str, convert: Callable[[Any], Any]) -> Fault:
    """Replace a tensor by a function of it."""
    return rebuilt(lambda draft: draft.put(name, np.ascontiguousarray(convert(draft.array(name)))))


def tokenizer(text: bytes) -> Fault:
    """Replace tokenizer.json."""
    return tensor(spec.TOKENIZER, lambda _: np.frombuffer(text, np.uint8))


def metadata(key: str, change: Callable[[str], str]) -> Fault:
    """Replace a metadata string, and make the metadata hash fit."""

    def make(file: bytes) -> bytes:
        draft = take_apart(file)
        draft.metadata[key] = change(draft.metadata[key])
        draft.hash_metadata()
        return draft.to_bytes()

    return make


def members(key: str, **changes: object) -> Fault:
    """Set members of a JSON object in the metadata."""
    return metadata(key, lambda text: json.dumps(json.loads(text) | changes, separators=(",", ":")))


def without_member(key: str, name: str) -> Fault:
    """Remove a member of a JSON object in the metadata."""

    def change(text: str) -> str:
        value = json.loads(text)
        del value[name]
        return json.dumps(value, separators=(",", ":"))

    return metadata(key, change)


def header_text(change: Callable[[str], str | bytes]) -> Fault:
    """Edit the header's text."""

    def make(file: bytes) -> bytes:
        text, data = split(file)
        changed = change(text)
        assert changed != text, "the fault was not put in"
        return join(changed, data)

    return make


def entry(name: str, **changes: object) -> Fault:
    """Change members of a tensor's entry; None removes one."""

    def change(text: str) -> str:
        header = json.loads(text)
        header[name] = {key: value for key, value in (header[name] | changes).items() if value is not None}
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False)

    return header_text(change)


def second_entry(text: str) -> str:
    """The header with embed.weight twice."""
    start = text.index('"embed.weight":{')
    return f"{text[:-1]},{text[start : text.index('}', start) + 1]}}}"


def shifted(gap: int, after: str) -> Fault:
    """Move all tensors that follow `after` by `gap` bytes, and the data with them."""

    def make(file: bytes) -> bytes:
        text, data = split(file)
        header = json.loads(text)
        border = header[after]["data_offsets"][1]
        for name, value in header.items():
            if name != "__metadata__" and value["data_offsets"][0] >= border:
                value["data_offsets"] = [offset + gap for offset in value["data_offsets"]]
        data = data[:border] + bytes(max(gap, 0)) + data[border + max(-gap, 0) :]
        return join(json.dumps(header, separators=(",", ":")), data)

    return make


def misaligned_tensor(file: bytes) -> bytes:
    """A 1-byte extension tensor in front of everything else."""
    text, data = split(file)
    header = json.loads(text)
    for name, value in header.items():
        if name != "__metadata__":
            value["data_offsets"] = [offset + 1 for offset in value["data_offsets"]]
    header["x.first"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    digests = json.loads(header["__metadata__"][spec.KEY_SHA256]) | {"x.first": hashlib.sha256(b"\0").hexdigest()}
    header["__metadata__"][spec.KEY_SHA256] = json.dumps(digests)
    header["__metadata__"][spec.KEY_METADATA_SHA256] = metadata_sha256(header["__metadata__"])
    return join(json.dumps(header, separators=(",", ":")), b"\0" + data)


def plain_safetensors(file: bytes) -> bytes:
    """A checkpoint as transformers saves it."""
    header = {
        "__metadata__": {"format": "pt"},
        "lm_head.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    }
    return join(json.dumps(header), bytes(4))


@dataclass(frozen=True)
class Bad:
    """A file to refuse: the error, why, the fault, and the good file that it is put into."""

    error: type[FormatError]
    sentence: str
    make: Fault
    base: str = "minimal"


BAD: dict[str, Bad] = {
    "empty": Bad(NotAnRcpFile, "No bytes.", lambda file: b""),
    "gguf": Bad(NotAnRcpFile, "A GGUF file.", lambda file: b"GGUF" + struct.pack("<IQQ", 3, 123, 0)),
    "pytorch_zip": Bad(NotAnRcpFile, "A zip archive.", lambda file: b"PK\x03\x04" + bytes(26)),
    "git_lfs_pointer": Bad(
        NotAnRcpFile, "A Git LFS pointer.", lambda file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    ),
    "plain_safetensors": Bad(NotAnRcpFile, "A checkpoint without rcp metadata.", plain_safetensors),
    "truncated_in_length": Bad(NotAnRcpFile, "Ends in the header length.", lambda file: file[:5]),
    "truncated_in_header": Bad(TruncatedFile, "Ends in the header.", lambda file: file[:1000]),
    "truncated_in_data": Bad(TruncatedFile, "The last byte is missing.", lambda file: file[:-1]),
    "trailing_bytes": Bad(TrailingBytes, "A byte after the last tensor.", lambda file: file + b"\0"),
    "header_oversized": Bad(
        HeaderTooLarge, "A header length over the limit.", lambda file: struct.pack("<Q", (32 << 20) + 8) + file[8:64]
    ),
    "header_length_overflow": Bad(
        HeaderTooLarge, "A header length of 2^64 - 1.", lambda file: struct.pack("<Q", (1 << 64) - 1) + file[8:64]
    ),
    "header_not_utf8": Bad(
        BadJson, "Metadata in Latin-1.", header_text(lambda text: text.replace("llama", "lläma").encode("latin-1"))
    ),
    "header_nested": Bad(
        BadJson, "2000 arrays.", header_text(lambda text: f'{text[:-1]},"x.a":{"[" * 2000}{"]" * 2000}}}')
    ),
    "header_huge_integer": Bad(
        BadJson, "A shape of 5001 digits.", header_text(lambda text: text.replace("[4]", f"[1{'0' * 5000}]", 1))
    ),
    "duplicate_tensor": Bad(DuplicateKey, "embed.weight twice.", header_text(second_entry)),
    "entry_unknown_key": Bad(BadTensorEntry, "A fourth key.", entry(f"{Q}.scale", comment="hello")),
    "shape_negative": Bad(BadTensorEntry, "Two negative dimensions.", entry(f"{Q}.codes", shape=[-2, -2])),
    "shape_float": Bad(BadTensorEntry, "A dimension of 2.0.", entry(f"{Q}.codes", shape=[2.0, 2])),
    "shape_bool": Bad(BadTensorEntry, "A dimension of true.", entry(f"{Q}.codes", shape=[True, 4])),
    "shape_overflow": Bad(TensorSizeMismatch, "A product of 2^64 + 4.", entry(f"{Q}.codes", shape=[4, (1 << 62) + 1])),
    "dtype_unknown": Bad(UnknownDtype, "A scale in bfloat16.", entry(f"{Q}.scale", dtype="BF16", shape=[4])),
    "tensors_overlap": Bad(TensorOverlap, "Two tensors share 4 bytes.", shifted(-4, f"{Q}.scale")),
    "tensors_gap": Bad(TensorGap, "8 bytes belong to no tensor.", shifted(8, f"{Q}.scale")),
    "tensor_misaligned": Bad(Misaligned, "float64 data at an odd offset.", misaligned_tensor),
    "metadata_missing": Bad(
        MissingMetadata, "No provenance.", rebuilt(lambda draft: draft.metadata.pop(spec.KEY_PROVENANCE))
    ),
    "metadata_hash": Bad(
        MetadataHashMismatch, "A changed name of the method.", header_text(lambda text: text.replace("rtn", "ldp"))
    ),
    "metadata_duplicate_key": Bad(
        DuplicateKey, "Two values for hidden_size.", metadata(ARCHITECTURE, lambda text: '{"hidden_size":8,' + text[1:])
    ),
    "metadata_nan": Bad(
        BadJson, "NaN and Infinity.", metadata(PROVENANCE, lambda text: '{"loss":NaN,"perplexity":Infinity}')
    ),
    "metadata_lone_surrogate": Bad(
        BadJson, "Half a surrogate pair.", metadata(PROVENANCE, lambda text: r'{"licence":"\ud800"}')
    ),
    "version_malformed": Bad(MalformedVersion, "A leading zero.", metadata(spec.KEY_VERSION, lambda text: "01.0")),
    "version_major": Bad(UnsupportedVersion, "Version 2.0.", metadata(spec.KEY_VERSION, lambda text: "2.0")),
    "feature_unknown": Bad(
        UnknownRequiredFeature, "A feature from the future.", metadata(FEATURES, lambda text: '["mixture_of_experts"]')
    ),
    "feature_missing": Bad(
        FeatureMismatch,
        "A sliding window that is not announced.",
        metadata(FEATURES, lambda text: text.replace(',"sliding_window"', "")),
        base="biases_qk_norm_window",
    ),
    "head_matrix_of_two_tables": Bad(
        BadMetadata, "A matrix for one table, and two tables.", members(ARCHITECTURE, head_matrix=True)
    ),
    "architecture_heads": Bad(BadMetadata, "3 heads share 2.", members(ARCHITECTURE, num_heads=3, num_kv_heads=2)),
    "eos_beyond_vocabulary": Bad(
        TokenIdOutOfRange, "eos 4 of a vocabulary of 4.", members(spec.KEY_TOKENIZER, eos_ids=[2, 4])
    ),
    "hash_list_short": Bad(HashListMismatch, "No hash for one tensor.", without_member(spec.KEY_SHA256, "embed.scale")),
    "tensor_missing": Bad(
        MissingTensor, "No final gain.", rebuilt(lambda draft: draft.tensors.pop(spec.FINAL_GAIN)), base="tied_plain"
    ),
    "tensor_unknown": Bad(
        UnknownTensor,
        "A bias that the architecture does not have.",
        rebuilt(lambda draft: draft.put(f"{Q}.bias", np.zeros(2, np.float32))),
    ),
    "dtype_wrong": Bad(WrongDtype, "Scales in float64.", tensor(f"{Q}.scale", lambda scale: scale.astype(np.float64))),
    "shape_wrong": Bad(WrongShape, "Three activation clips.", tensor(f"{LAYER}.act_clip", lambda clip: clip[:3])),
    "codes_shape": Bad(
        CodesShapeMismatch, "8 columns too many.", tensor(f"{Q}.codes", lambda codes: np.pad(codes, ((0, 0), (0, 2))))
    ),
    "levels_shape": Bad(
        LevelsShapeMismatch, "Two groups for one.", tensor(f"{Q}.levels", lambda level: np.repeat(level, 2, axis=1))
    ),
    "scale_shape": Bad(ScaleShapeMismatch, "One scale for two rows.", tensor(f"{Q}.scale", lambda scale: scale[:1])),
    "tensor_hash": Bad(TensorHashMismatch, "A changed clip.", element(f"{LAYER}.act_clip", 0, 0.5, rehash=False)),
    "padding": Bad(NonZeroPadding, "A padding bit is set.", tensor(f"{Q}.codes", lambda codes: codes | 0x80)),
    "levels_decreasing": Bad(
        DecreasingLevels, "Levels in falling order.", tensor(f"{Q}.levels", lambda level: level[:, :, ::-1])
    ),
    "level_minus_128": Bad(LevelOutOfRange, "A level of -128.", element(f"{Q}.levels", (1, 0, 0), -128)),
    "scale_nan": Bad(BadScale, "A scale that is no number.", element(f"{Q}.scale", 1, np.nan)),
    "scale_negative": Bad(BadScale, "A negative scale.", element(f"{Q}.scale", 0, -0.01)),
    "scale_zero": Bad(BadScale, "A scale of zero.", element("head.scale", 0, 0.0)),
    "clip_above_one": Bad(BadClip, "An activation clip of 1.5.", element(f"{LAYER}.act_clip", 3, 1.5)),
    "table_minus_128": Bad(TableEntryOutOfRange, "An entry of -128.", element("embed.weight", (2, 5), -128)),
    "inv_freq_infinite": Bad(NotFinite, "An infinite frequency.", element(spec.INV_FREQ, 0, np.inf)),
    "inv_freq_negative": Bad(NegativeFrequency, "A negative frequency.", element(spec.INV_FREQ, 0, -1.0)),
    "sign_zero": Bad(BadSign, "A sign of 0.", element(spec.ROTATION_SIGNS, 2, 0), base="tied_rotated"),
    "tokenizer_syntax": Bad(BadTokenizer, "Not JSON.", tokenizer(b'{"model":{}')),
}


def worked_example(file: bytes) -> str:
    """The block of SPEC.md section 11, from good/minimal.rcp."""
    text, data = split(file)
    start = len(file) - len(data)
    entries = json.loads(text)
    lines = [
        f"{0:06x}  {file[:8].hex(' ')}  L = {start - 8}: the data begins at {start:#x}",
        f"{8:06x}  {file[8:24].hex(' ')}  {file[8:24].decode()}",
    ]
    for part in ("codes", "levels", "scale"):
        item = entries[f"{Q}.{part}"]
        begin, end = item["data_offsets"]
        place, content = start + begin, data[begin:end].hex(" ")
        lines.append(
            f"{place:06x}  {content}  {Q}.{part}, {item['dtype']} {item['shape']}, data_offsets {[begin, end]}"
        )
    draft = take_apart(file)
    codes, levels, scale = (draft.array(f"{Q}.{part}") for part in ("codes", "levels", "scale"))
    for row in range(2):
        code = [int(codes[row, k // 4]) >> (2 * (k % 4)) & 3 for k in range(6)]
        chosen = [int(levels[row, 0, c]) for c in code]
        weights = [f"{scale[row] * np.float32(level):.9g}" for level in chosen]
        lines += [
            f"row {row}: scale {scale[row]:.9g}, levels {' '.join(map(str, levels[row, 0]))}",
            f"  codes    {' '.join(map(str, code))}",
            f"  integers {' '.join(map(str, chosen))}",
            f"  weights  {' '.join(weights)}",
        ]
    return "\n".join(lines)


def build() -> dict[str, bytes]:
    """Every file, by its path below this folder."""
    good = {name: make() for name, (_, make) in GOOD.items()}
    files = {f"good/{name}.rcp": file for name, file in good.items()}
    files |= {f"bad/{name}.rcp": bad.make(good[bad.base]) for name, bad in BAD.items()}
    manifest = {
        "good": {f"{name}.rcp": sentence for name, (sentence, _) in GOOD.items()},
        "bad": {f"{name}.rcp": {"error": bad.error.__name__, "sentence": bad.sentence} for name, bad in BAD.items()},
    }
    files["manifest.json"] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def main() -> None:
    """Write every file, and nothing else into good/ and bad/."""
    for folder in ("good", "bad"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
        (FOLDER / folder).mkdir()
    for path, content in build().items():
        (FOLDER / path).write_bytes(content)


if __name__ == "__main__":
    main()
