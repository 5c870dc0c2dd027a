"""The tables of SPEC.md say what rcpformat does: each is parsed and compared."""

import dataclasses
import itertools
import re

import pytest

from rcpformat import Architecture, Quantization, TokenizerInfo, spec
from rcpformat.errors import BadMetadata
from tiny_rcp import LDP, TINY, random_metadata
from vectors.make_vectors import FOLDER

TEXT = (FOLDER.parent / "SPEC.md").read_text(encoding="utf-8")


def table(header: str) -> list[list[str]]:
    """The rows of the table whose first column is called `header`: the stripped cells."""
    start = TEXT.index(f"| {header} |")
    lines = itertools.takewhile(lambda line: line.startswith("|"), TEXT[start:].splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in list(lines)[2:]]


def section_keys(number: int) -> dict[str, str]:
    """Each `key` in the first column of a section's tables to the text beside it."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)[number]
    assert section.startswith(f"{number}. ")
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    return {key: row[2] for row in rows for key in re.findall(r"`([^`]+)`", row[1])}


def test_version() -> None:
    assert f"version {spec.FORMAT_MAJOR}.{spec.FORMAT_MINOR}" in TEXT.splitlines()[0]


def test_limits() -> None:
    limits = [int(row[1]) for row in table("limit")]
    assert limits == [
        spec.MAX_HEADER_BYTES,
        spec.MAX_METADATA_VALUE_BYTES,
        spec.MAX_TOKENIZER_BYTES,
        spec.MAX_NAME,
        spec.MAX_JSON_SEPARATORS,
        spec.MAX_TOKENIZER_SEPARATORS,
    ]
    assert f"nest at most {spec.MAX_JSON_DEPTH} deep" in TEXT
    assert f"has at most {spec.MAX_JSON_NUMBER} characters" in TEXT
    assert f"at most {spec.MAX_DIMENSIONS} integers" in TEXT


def test_dtypes() -> None:
    sizes = re.findall(r"`([FUI]\d+)` (\d)", re.sub(r"\n", " ", TEXT.split("dtypes in use")[1].split(". The shape")[0]))
    assert {name: int(size) for name, size in sizes} == {name: dtype.itemsize for name, dtype in spec.DTYPES.items()}


def test_metadata_keys() -> None:
    assert tuple(re.findall(r"`(rcp\.\w+)`", " ".join(row[0] for row in table("key")))) == spec.METADATA_KEYS


def test_sampling_defaults() -> None:
    rows = table("sampling default")
    assert [row[0].strip("`") for row in rows] == list(spec.GENERATION_LIMITS)
    for row in rows:
        numbers = re.findall(r"from ([\d.]+)|to ([\d.]+)", row[1])
        assert tuple(float("".join(number)) for number in numbers) == spec.GENERATION_LIMITS[row[0].strip("`")]
        assert row[1].startswith("integer") == (row[0] == "`top_k`")


def test_features() -> None:
    assert tuple(row[0].strip("`") for row in table("required feature")) == spec.KNOWN_FEATURES


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"qkv_bias": True}, "bias"),
        ({"o_bias": True}, "bias"),
        ({"mlp_bias": True}, "bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"attention_window": (3,)}, "sliding_window"),
        ({"attention_window": (None,)}, "sliding_window"),
        ({"tied_table": True}, "tied_table"),
        ({"tied_table": True, "head_matrix": True}, "head_matrix tied_table"),
        ({"a_bits": 8}, "a8"),
        ({"kv_bits": 8}, "kv8"),
    ],
)
def test_each_feature_is_listed_when_the_table_says(change: dict[str, object], feature: str) -> None:
    of_quantization = any(key.endswith("_bits") for key in change)
    architecture = TINY if of_quantization else dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    quantization = dataclasses.replace(LDP, **change) if of_quantization else LDP  # type: ignore[arg-type]
    assert spec.required_features(TINY, LDP) == []
    assert spec.required_features(architecture, quantization) == feature.split()
    assert random_metadata(architecture, quantization).required_features == feature.split()


@pytest.mark.parametrize(("number", "record"), [(4, Architecture), (5, Quantization), (6, TokenizerInfo)])
def test_records(number: int, record: type) -> None:
    fields = {field.name: field for field in dataclasses.fields(record)}
    keys = section_keys(number)
    assert set(keys) == set(fields)
    for key, text in keys.items():
        optional = {fields[key].default, fields[key].default_factory} != {dataclasses.MISSING}
        assert optional == ("absent" in text), key


def evaluate(text: str, names: dict[str, object]) -> object:
    """A shape, width or condition of section 7."""
    text = text.replace("·", " * ").replace(" / ", " // ").replace(" = ", " == ")
    return eval(text, {"__builtins__": {}}, names)


def tensors_of_the_text(architecture: Architecture, quantization: Quantization) -> dict[str, spec.TensorSpec]:
    """expected_tensors, from the tables of section 7 alone."""
    names: dict[str, object] = {
        **dataclasses.asdict(architecture),
        **dataclasses.asdict(quantization),
        "always": True,
        "bytes": None,
    }
    out = {}
    layers = range(architecture.num_layers)
    for layer, (name, rows, columns, bias) in itertools.product(layers, table("linear layer")):
        linear = name.strip("`").replace("L", str(layer))
        group = quantization.group_size_overrides.get(linear, quantization.group_size)
        k = evaluate(columns, names)
        assert isinstance(k, int)
        sizes = {"N": evaluate(rows, names), "K": k, "G": -(-k // group)}
        for part, dtype, shape, when in table("tensor of a linear layer"):
            if when == "always" or evaluate(bias, names):
                packed = shape.replace("ceil(K / 4)", str(-(-k // 4)))
                out[linear + part.strip("`")] = spec.TensorSpec(dtype, tuple(evaluate(packed, sizes)))  # type: ignore[arg-type]
    for name, dtype, shape, when in table("other tensor"):
        if evaluate(when, names):
            for layer in layers if "L" in name else [0]:
                key = name.strip("`").replace("layers.L", f"layers.{layer}")
                out[key] = spec.TensorSpec(dtype, tuple(evaluate(shape, names)))  # type: ignore[arg-type]
    return out


GROUPED = dataclasses.replace(
    TINY, num_layers=2, hidden_size=130, num_heads=6, num_kv_heads=3, head_dim=10, intermediate_size=321
)
BIASED = dataclasses.replace(GROUPED, qkv_bias=True, qk_norm=True)
OTHER_BIASES = dataclasses.replace(GROUPED, o_bias=True, mlp_bias=True, tied_table=True)
TURNED = dataclasses.replace(TINY, tied_table=True, head_matrix=True)
OVERRIDDEN = dataclasses.replace(LDP, group_size_overrides={"layers.1.mlp.down": 64, "layers.0.attn.k": 64})
HALVES = dataclasses.replace(LDP, embed_bits=16, head_bits=16, r1=False, group_size=64)
MIXED = dataclasses.replace(LDP, embed_bits=16, head_bits=8)


@pytest.mark.parametrize("architecture", [TINY, GROUPED, BIASED, OTHER_BIASES, TURNED])
@pytest.mark.parametrize("quantization", [LDP, OVERRIDDEN, HALVES, MIXED])
def test_tensors(architecture: Architecture, quantization: Quantization) -> None:
    if quantization is OVERRIDDEN and architecture.num_layers == 1:
        with pytest.raises(BadMetadata, match=r"layers\.1\.mlp\.down"):
            spec.expected_tensors(architecture, quantization)
    elif quantization is MIXED and architecture.tied_table:
        with pytest.raises(BadMetadata, match="head_bits 8 must equal embed_bits 16"):
            spec.expected_tensors(architecture, quantization)
    else:
        found = spec.expected_tensors(architecture, quantization)
        assert found == tensors_of_the_text(architecture, quantization)
