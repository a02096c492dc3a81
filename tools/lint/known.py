"""What breaks a rule and has not been mended: the lint names it, and fails for anything else."""

import re
from typing import NamedTuple

from tools.lint.events import Finding


class Known(NamedTuple):
    """Kernels that break rules."""

    kernels: str
    """A regular expression that finds their names."""
    rules: frozenset[str]
    why: str


KNOWN = (
    Known(
        r"float32 H\d+ cooperative \S+w16 forward",
        frozenset({"local"}),
        "a thread of 512 has 128 registers, of which 64 hold weights: it spills some in a step",
    ),
    Known(
        r"sm_(86|100|120) bfloat16 .* backward",
        frozenset({"local"}),
        "a few kernels in 16 bits spill some bytes on GPUs that gpu-report does not compile for, "
        "or with rows that it does not compile",
    ),
    Known(
        r"bfloat16 .* backward unaligned",
        frozenset({"wait", "acquire", "arrival"}),
        "predicates are spilled, so that the lint cannot tell who arrives and what is awaited",
    ),
)


def find(kernel: str, finding: Finding) -> Known | None:
    """Returns what is known of a finding in a kernel, or None."""
    return next(
        (one for one in KNOWN if finding.rule in one.rules and re.search(one.kernels, kernel)), None
    )
