"""Trains a model in several processes, each on its own slice of every batch.

    torchrun --standalone --nproc-per-node 2 examples/train_torchrun.py

`DistributedDataParallel` wraps the layer like any other module. The first process then trains a
second model alone, from the same initial weights and on whole batches. It prints the losses of both
training runs, which differ only by rounding. The script takes a few seconds.
"""

import copy
import os

import torch
import torch.distributed as dist

# Import this before a process group exists, because its functions store the current group as a
# default argument. If the first optimizer step imported it, these functions would keep the group
# and its threads alive until the interpreter shuts down, which may abort the process.
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from namernn_fast import FusedRNN

SYMBOLS, STEPS, SHARE, UPDATES = 4, 8, 64, 200


class Classifier(nn.Module):
    """Reads one-hot symbols (batch, STEPS, SYMBOLS) and predicts the first one."""

    def __init__(self):
        super().__init__()
        self.rnn = FusedRNN(SYMBOLS, 32, batch_first=True)
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, x):
        return self.head(self.rnn.last_state(x)[-1])


def train(model, batch, mine):
    """Trains on one slice of each batch, and returns the loss at each update.

    Args:
        model: The model of this process.
        batch: The number of sequences in a whole batch, shared by all processes.
        mine: The slice of each batch that this process trains on.
    """
    generator = torch.Generator().manual_seed(1)  # every process draws the whole batch
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(UPDATES):
        symbols = torch.randint(SYMBOLS, (batch, STEPS), generator=generator)[mine]
        scores = model(nn.functional.one_hot(symbols, SYMBOLS).float())
        loss = nn.functional.cross_entropy(scores, symbols[:, 0])
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel averages the gradients of all processes here
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    """Trains a model in all processes, then a second model only in the first process."""
    if "RANK" not in os.environ:
        command = "torchrun --standalone --nproc-per-node 2 examples/train_torchrun.py"
        raise SystemExit(f"several processes run this program; start them with: {command}")
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Classifier()
    alone = copy.deepcopy(model)

    batch = SHARE * processes
    share = slice(SHARE * rank, SHARE * (rank + 1))
    together = train(DistributedDataParallel(model), batch, share)
    dist.all_reduce(together)
    together /= processes  # the mean over processes: the losses of whole batches
    if rank == 0:
        single = train(alone, batch, slice(None))
        for update in range(0, UPDATES, 40):
            losses = together[update], processes, single[update]
            print("update {:3}: loss {:.4f} by {} processes, {:.4f} by one".format(update, *losses))
        torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-4)
        distance = (together - single).abs().max()
        print(f"last loss {together[-1]:.4f}; largest difference of all losses {distance:.1e}")
    dist.barrier()  # keeps the connections open until the first process is done
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
