"""Runs `.rcp` models: `rcprun.load(path)` gives a Model. Needs numpy; never torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcprun.model import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """Load the interface when it is first used, so that `rcp-run --help` does not wait for numpy."""
    if name in __all__:
        from rcprun import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
