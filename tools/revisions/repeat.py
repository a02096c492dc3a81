"""The program that `speed` runs for each revision: python -m tools.revisions.repeat THREADS

Each line of standard input is a JSON request. An object holds the fields of a probe, and prepares
the probe's call. A number N runs the call N times. An empty line of output confirms a request.
"""

import functools
import json
import sys
from collections.abc import Callable

import torch

from tools.revisions.digest import Draws, named_results, prepare_input, prepare_layer
from tools.revisions.probes import Probe, Sizes

# Slightly below 32 MiB, the size of the largest block that glibc keeps when it is freed.
LARGEST_KEPT_BYTES = 31 * 2**20


def call_of(probe: Probe) -> Callable[[], object]:
    """Returns a forward pass or, if gradients of weights are wanted, a training step.

    In training, all results get fixed random gradients, which do not fade to subnormal numbers.
    """
    draws = Draws(probe)
    layer = prepare_layer(probe, draws)
    _, input, _ = prepare_input(probe, draws)
    if probe.wanted == "nothing":
        return torch.inference_mode()(functools.partial(layer, input))
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    gradients = [draws.normal(*r.shape) for r in named_results(probe, layer(input)).values()]

    def train() -> object:
        found = named_results(probe, layer(input))
        return torch.autograd.grad([*found.values()], weights, gradients)

    return train


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    # After a block of this size has been freed, glibc keeps all freed blocks up to this size.
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, dict):
            call = None  # free the previous call's memory first
            call = call_of(Probe(**asked | {"sizes": Sizes(*asked["sizes"])}))
            call()  # the first call takes longer
        else:
            for _ in range(asked):
                call()
        print(flush=True)


if __name__ == "__main__":
    main()
