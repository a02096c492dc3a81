"""Describes the machine that a benchmark runs on."""

from __future__ import annotations

import platform

import torch

_AMD, _INTEL = "AuthenticAMD", "GenuineIntel"
_GENERATIONS = (
    (_AMD, 23, range(0x30), "Zen"),
    (_AMD, 23, range(0x30, 0x100), "Zen 2"),
    (_AMD, 25, range(0x10), "Zen 3"),
    (_AMD, 25, range(0x10, 0x20), "Zen 4"),
    (_AMD, 25, range(0x20, 0x60), "Zen 3"),
    (_AMD, 25, range(0x60, 0xB0), "Zen 4"),
    (_AMD, 26, range(0x50), "Zen 5"),
    (_AMD, 26, range(0x60, 0x80), "Zen 5"),
    (_INTEL, 6, (0x6A, 0x6C), "Ice Lake"),
    (_INTEL, 6, (0x8F,), "Sapphire Rapids"),
    (_INTEL, 6, (0xCF,), "Emerald Rapids"),
    (_INTEL, 6, (0xAD, 0xAE), "Granite Rapids"),
)
"""Processor generations by vendor, family and models, from Linux (arch/x86: kernel/cpu/amd.c and
include/asm/intel-family.h). For Intel, only servers with AVX-512 since Ice Lake are listed."""


def cpu_name() -> str:
    """Returns the name of the processor, or of its architecture if the name is unknown.

    Appends the generation if it is known, because many virtual machines report every generation
    as "AMD EPYC" or "Intel(R) Xeon(R) Processor". Also appends the result of `held_to`.
    """
    fields = _fields()
    held = held_to()
    suffix = f", held to {held}" if held else ""
    if "model name" in fields:
        return fields["model name"] + _generation(fields) + suffix
    try:
        from cpuinfo import get_cpu_info  # installed with pytest-benchmark
    except ImportError:
        return (platform.processor() or platform.machine() or "unknown CPU") + suffix
    return str(get_cpu_info().get("brand_raw", "unknown CPU")) + suffix


def held_to() -> str | None:
    """Returns "AVX2" if `ATEN_CPU_CAPABILITY` keeps torch and the kernels from using AVX-512.

    Otherwise, or if the processor has no AVX-512, returns None.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    has_more = "avx512f" in _fields().get("flags", "").split()
    return capability if has_more and capability == "AVX2" else None


def _fields() -> dict[str, str]:
    """Returns what Linux says of the first processor; nothing on other systems."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    break  # end of the first processor's fields
                name, _, value = line.partition(":")
                fields[name.strip()] = value.strip()
    except OSError:
        pass
    return fields


def _generation(fields: dict[str, str]) -> str:
    """Returns the generation of a processor in parentheses; an empty string if unknown."""
    found = fields.get("vendor_id"), fields.get("cpu family")
    for vendor, family, models, generation in _GENERATIONS:
        if found == (vendor, str(family)) and int(fields["model"]) in models:
            return f" ({generation})"
    return ""
