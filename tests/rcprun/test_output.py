"""Output files: whole or not there, with the usual mode; a refusal names the user's path."""

import os
from pathlib import Path

import pytest

from rcprun.errors import BadRequest, InputOutputError
from rcprun.output import replacing


def test_a_file_appears_when_it_is_whole_with_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a", force=False) as temporary:
            temporary.write_text("new")
            assert not (tmp_path / "a").exists()
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    with pytest.raises(BadRequest, match="--force"), replacing(tmp_path / "a", force=False):
        pass


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a", force=True) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_refusal_names_the_path_and_not_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputOutputError) as found, replacing(tmp_path / "a", force=False):
        pass
    assert str(found.value) == (
        f"{tmp_path / 'a'}: expected a place that can be written, found: Permission denied; choose another path"
    )
