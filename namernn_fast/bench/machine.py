"""Describes the machine that a benchmark runs on."""

import platform


def cpu_name() -> str:
    """Returns the name of the processor, or of its architecture if the name is unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    try:
        from cpuinfo import get_cpu_info  # installed with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine() or "unknown CPU"
    return str(get_cpu_info().get("brand_raw", "unknown CPU"))
