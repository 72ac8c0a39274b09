"""What a time was measured on: the processor or the GPU, by name."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch


def machine_key() -> str:
    """Of this machine, torch version and number of threads: times of one are no times of another."""
    facts = (platform.processor(), cpu_name(), torch.__version__, torch.get_num_threads())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's: what a time was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def cpu_name() -> str:
    """The processor's name, generation and vectors, as in "AMD EPYC (family 26, model 2), AVX512".

    Clouds call several generations "AMD EPYC": a time of one is not a time of another.
    """
    facts, vectors = _cpu_facts(), torch.backends.cpu.get_cpu_capability()
    name = facts.get("model name", platform.processor() or platform.machine())
    given = [key for key in ("cpu family", "model") if key in facts]
    generation = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in given)
    return f"{name} ({generation}), {vectors}" if generation else f"{name}, {vectors}"


def _cpu_facts() -> dict[str, str]:
    """What Linux tells of the first processor; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
