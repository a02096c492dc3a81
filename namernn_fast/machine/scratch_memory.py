"""The scratch memory of calls on a CPU, which stays reserved between calls."""

import torch

from . import availability


def memory_reserved() -> int:
    """Returns how much scratch memory is reserved for later calls on a CPU, in bytes.

    Calls need scratch memory for packed weights and other intermediate values. Getting it from the
    system takes time, so up to 256 MiB stay reserved in a process, for all threads and layers
    together. The number excludes the results of calls, memory that running calls use, and up to
    1 MiB for each thread that calls layers.
    """
    if not availability.HAS_EXTENSION:
        return 0
    return torch.ops.namernn_fast.memory_reserved()  # type: ignore[no-any-return]


def empty_cache() -> None:
    """Frees the scratch memory that is reserved for later calls on a CPU.

    The next large call takes longer, because it needs new memory from the system. Results do not
    change. Any thread may call this function at any time. Memory that calls no longer need also
    returns to the system after some calls, without this function.
    """
    if availability.HAS_EXTENSION:
        torch.ops.namernn_fast.empty_cache()
