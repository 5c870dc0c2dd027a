"""What the current GPU is, and how fast its clocks run. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """In MHz, now."""

    multiprocessors: int
    memory: int


def name() -> str:
    """As its maker calls it."""
    return str(_properties()["name"].decode())


def describe() -> str:
    """The GPU and its highest clock, where CUDA says it."""
    rate = _properties().get("clockRate")
    return f"{name()}, {rate / 1e6:.2f} GHz" if rate else name()


def clocks() -> Clocks | None:
    """None where the driver's management library (NVML) is not to be had, or does not say."""
    try:
        from cuda.bindings import nvml
    except ImportError:  # before CUDA 13
        return None
    try:
        nvml.init_v2()
    except (RuntimeError, nvml.NvmlError):  # RuntimeError: there is no such library
        return None
    try:
        gpu = nvml.device_get_handle_by_pci_bus_id_v2(cupy.cuda.Device().pci_bus_id)
        kinds = nvml.ClockType.CLOCK_SM, nvml.ClockType.CLOCK_MEM
        sm, memory = (int(nvml.device_get_clock_info(gpu, kind)) for kind in kinds)
    except nvml.NvmlError:
        return None
    finally:
        nvml.shutdown()
    return Clocks(multiprocessors=sm, memory=memory)


def _properties() -> dict[str, Any]:
    return dict(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice()))
