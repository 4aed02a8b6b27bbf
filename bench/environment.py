"""What a benchmark ran on: versions, device and instruction set."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "diffusers", "nflows", "zuko", "dgm_kernels")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of_others() -> float:
    """CPU seconds that all other processes have used since the machine started (0 where Linux's /proc is missing)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return models[0] if models else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and device, as written next to every result."""
    capability = torch.backends.cpu.get_cpu_capability()
    info: dict[str, Any] = {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "torch": torch.__version__,  # its metadata may lack the build
        "cpu": _cpu_name(),
        "cpu_capability": capability,
        "cores": available_cores(),
        "device": _cpu_name(),
        "slug": f"cpu-{capability.lower()}-{available_cores()}t",
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
        info |= {"device": name, "slug": slug, "cuda": torch.version.cuda}
    return info
