"""The README's file tree, one clause a file, is the repository's.

A folder with a clause and nothing listed below it stands for all it holds; outside tests/ it may hold no source code.
Run as a script, this prints the lines to add and to remove.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_SUFFIXES = (".py", ".cu", ".cuh")
TREE = re.compile(r"^## File tree\n.*?^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?P<indent>(?:  )*)(?P<name>\S+)(?:\s{2,}(?P<clause>\S.*))?$")


def tracked_files() -> set[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.split("\0") if name and (ROOT / name).exists()}


def read_tree(readme: str) -> dict[str, str]:
    """Each path of the tree to its clause ("" when it has none); folders end in a slash."""
    match = TREE.search(readme)
    assert match, "README.md has no ```text block under '## File tree'"
    tree: dict[str, str] = {}
    folders: list[str] = []
    for text in match.group(1).splitlines():
        line = LINE.match(text)
        assert line, f"not a line of a tree (two spaces a level, name, two spaces, clause): {text!r}"
        depth = len(line["indent"]) // 2
        assert depth <= len(folders), f"indented too far: {text!r}"
        path = "".join(folders[:depth]) + line["name"]
        assert path not in tree, f"listed twice: {path}"
        tree[path] = line["clause"] or ""
        if path.endswith("/"):
            folders = [*folders[:depth], line["name"]]
    return tree


def problems(tree: dict[str, str], files: set[str]) -> list[str]:
    """What is missing from the tree, in it without a file, or without a clause."""
    listed_folders = {path for path in tree if path.endswith("/")}
    leaves = {
        folder for folder in listed_folders if not any(path != folder and path.startswith(folder) for path in tree)
    }

    def is_covered(file: str) -> bool:
        within = any(file.startswith(leaf) for leaf in leaves)
        return file in tree or (within and (file.startswith("tests/") or not file.endswith(SOURCE_SUFFIXES)))

    missing = [f"missing from the README's tree: {file}" for file in sorted(files) if not is_covered(file)]
    extra = [
        f"in the README's tree, but no such file: {path}"
        for path in tree
        if not (any(file.startswith(path) for file in files) if path in listed_folders else path in files)
    ]
    silent = [
        f"no clause in the README's tree: {path}"
        for path in tree
        if not tree[path] and path not in listed_folders - leaves
    ]
    return missing + extra + silent


def current_problems() -> list[str]:
    return problems(read_tree((ROOT / "README.md").read_text(encoding="utf-8")), tracked_files())


def test_readme_lists_every_file() -> None:
    found = current_problems()
    assert not found, "\n".join(["", *found])


def test_every_kind_of_drift_is_found() -> None:
    readme = "## File tree\n\n```text\nsrc/\n  a.py  first\n  gone.py  was here\n  b.py\ndata/  numbers\n```\n"
    found = problems(read_tree(readme), {"src/a.py", "src/b.py", "src/new.py", "data/x.json", "data/code.py"})
    assert [line.rpartition(" ")[2] for line in found] == ["data/code.py", "src/new.py", "src/gone.py", "src/b.py"]


if __name__ == "__main__":
    print("\n".join(current_problems()) or "README.md lists every file.")
