"""The committed vectors: reproduced byte for byte, accepted or refused as the manifest and SPEC section 12 say."""

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize, safe_open

from rcpformat import FormatError, RcpFile, errors, spec
from vectors import make_vectors

FOLDER = make_vectors.FOLDER
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
SPEC = (FOLDER.parent / "SPEC.md").read_text(encoding="utf-8")
REFUSALS = {
    match[1]: match[2]
    for match in re.finditer(r"^\| `(\w+)` \| [^|]+ \| (load|use|verify) \|$", SPEC.split("## 12.")[1], re.MULTILINE)
}
FORMAT_ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, FormatError) and value is not FormatError
]


def test_script_makes_the_committed_bytes() -> None:
    built = make_vectors.build()
    committed = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in (*FOLDER.glob("good/*"), *FOLDER.glob("bad/*"), FOLDER / "manifest.json")
    }
    assert sorted(built) == sorted(committed)
    assert [path for path in built if built[path] != committed[path]] == [], "run formats/vectors/make_vectors.py"


@pytest.mark.parametrize("name", MANIFEST["good"])
def test_good_is_accepted_and_equals_what_safetensors_reads(name: str) -> None:
    path = FOLDER / "good" / name
    with RcpFile.open(path, verify=True) as file, safe_open(path, "numpy") as library:
        assert set(library.keys()) == set(file.header_tensors)
        for tensor in library.keys():  # noqa: SIM118 - not a dict
            assert np.array_equal(library.get_tensor(tensor), file.tensor(tensor))
        for linear in spec.linear_names(file.architecture):
            file.linear(linear).check()
            assert np.isfinite(file.linear(linear).weights()).all()


def use_everything(file: RcpFile) -> None:
    for name in file.header_tensors:
        file.tensor(name)


@pytest.mark.parametrize("name", MANIFEST["bad"])
def test_bad_is_refused_at_the_right_moment(name: str) -> None:
    path = FOLDER / "bad" / name
    expected = getattr(errors, MANIFEST["bad"][name]["error"])
    moment = REFUSALS[expected.__name__]
    stages: dict[str, Callable[[RcpFile], None]] = {"use": use_everything, "verify": RcpFile.verify}
    if moment == "load":
        with pytest.raises(FormatError) as caught:
            RcpFile.open(path)
    else:
        with RcpFile.open(path) as file:
            if moment == "verify":
                use_everything(file)
            with pytest.raises(FormatError) as caught:
                stages[moment](file)
        with pytest.raises(expected):
            RcpFile.open(path, verify=True)
    assert caught.type is expected
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000


def test_every_error_has_a_row_and_a_vector() -> None:
    assert list(REFUSALS) == [error.__name__ for error in FORMAT_ERRORS]
    assert {bad["error"] for bad in MANIFEST["bad"].values()} == set(REFUSALS)
    assert all(error.__doc__ for error in FORMAT_ERRORS)


def test_vectors_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.rcp")) < 500_000


def test_worked_example_is_that_of_the_file() -> None:
    wanted = make_vectors.worked_example((FOLDER / "good" / "minimal.rcp").read_bytes())
    found = re.search(r"## 11\..*?```text\n(.*?)\n```", SPEC, re.DOTALL)
    assert found and found[1] == wanted, f"SPEC.md section 11 must hold:\n{wanted}"


def test_the_library_refuses_what_is_not_safetensors() -> None:
    """The container rules that safetensors has too are not ours alone."""
    for name in ("empty", "gguf", "header_length_overflow", "tensors_gap", "tensors_overlap", "trailing_bytes"):
        with pytest.raises(SafetensorError):
            deserialize((FOLDER / "bad" / f"{name}.rcp").read_bytes())
