"""Describes the machine that a benchmark runs on."""

from __future__ import annotations

import platform

_ZEN = (
    (23, range(0x30), "Zen"),
    (23, range(0x30, 0x100), "Zen 2"),
    (25, range(0x10), "Zen 3"),
    (25, range(0x10, 0x20), "Zen 4"),
    (25, range(0x20, 0x60), "Zen 3"),
    (25, range(0x60, 0xB0), "Zen 4"),
    (26, range(0x50), "Zen 5"),
    (26, range(0x60, 0x80), "Zen 5"),
)
"""Generations of AMD processors by family and models, as in Linux (arch/x86/kernel/cpu/amd.c)."""


def cpu_name() -> str:
    """Returns the name of the processor, or of its architecture if the name is unknown.

    Appends the generation of AMD processors, because virtual machines often call every generation
    "AMD EPYC".
    """
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    break  # the first processor ends here
                name, _, value = line.partition(":")
                fields[name.strip()] = value.strip()
    except OSError:
        pass
    if "model name" in fields:
        return fields["model name"] + _generation(fields)
    try:
        from cpuinfo import get_cpu_info  # installed with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine() or "unknown CPU"
    return str(get_cpu_info().get("brand_raw", "unknown CPU"))


def _generation(fields: dict[str, str]) -> str:
    """Returns the generation of an AMD processor in parentheses; an empty string if unknown."""
    if fields.get("vendor_id") == "AuthenticAMD":
        family, model = int(fields["cpu family"]), int(fields["model"])
        for of_family, models, generation in _ZEN:
            if family == of_family and model in models:
                return f" ({generation})"
    return ""
