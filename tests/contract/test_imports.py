"""Imports cross packages only along rcpconv → rcpformat ← rcprun, and heavy libraries are loaded only when used."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Refuses every import outside the standard library, numpy, safetensors and rcpformat, then imports all of rcpformat.
IMPORT_RCPFORMAT_ALONE = """
import pkgutil, sys
allowed = sys.stdlib_module_names | {"numpy", "safetensors", "rcpformat"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"rcpformat must not need {name}", name=name)
sys.meta_path.insert(0, Refuse())
import rcpformat
modules = [module.name for module in pkgutil.walk_packages(rcpformat.__path__, "rcpformat.")]
assert modules
for name in modules:
    __import__(name)
"""

# argv: package, forbidden top-level names. Shows the CLI's help, then fails if any of those names was imported.
SHOW_HELP = """
import importlib, sys
package, *forbidden = sys.argv[1:]
importlib.import_module(package + ".cli").main(["--help"], standalone_mode=False)
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(forbidden))
assert not loaded, f"{package} --help imported {loaded}"
"""


def run_python(code: str, *arguments: str) -> None:
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_contracts_hold() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run_python(code, "--no-cache")


def test_rcpformat_needs_numpy_and_safetensors_only() -> None:
    run_python(IMPORT_RCPFORMAT_ALONE)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("rcpconv", ["torch", "transformers", "datasets", "matplotlib", "cupy", "rcprun"]),
        ("rcprun", ["torch", "transformers", "cupy", "rcpconv"]),
    ],
)
def test_help_is_light(package: str, forbidden: list[str]) -> None:
    run_python(SHOW_HELP, package, *forbidden)


def test_runtime_modules_never_load_torch() -> None:
    """Imports every module of rcprun but the CUDA backend, which needs cupy; the contracts cover that one."""
    run_python(
        "import pkgutil, sys, rcprun\n"
        "for module in pkgutil.walk_packages(rcprun.__path__, 'rcprun.'):\n"
        "    if not module.name.startswith('rcprun.backends.cuda') and not module.name.endswith('__main__'):\n"
        "        __import__(module.name)\n"
        "loaded = {'torch', 'transformers', 'rcpconv'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )


def test_converter_commands_say_what_to_install_without_torch() -> None:
    blocked = "import sys; sys.modules['torch'] = None; from rcpconv.cli import main; main(['quantize', 'demo'])"
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "pip install 'rcpconv[convert]'" in result.stderr
    assert "Traceback" not in result.stderr
