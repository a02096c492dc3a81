"""Tests that training on two processes gives the same weights as training on one process."""

import os

import pytest
import torch
import torch.distributed as dist
from kinds import EVERY, KINDS, flat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
WORLD = 2


def train(kind, wrap, x):
    """Returns the weights of a layer after three training steps on `x`.

    Every call starts from the same weights.
    """
    torch.manual_seed(0)
    module = kind.layer(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    wrapped = wrap(module)
    optimizer = torch.optim.Adam(wrapped.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        output, *last = flat(wrapped(x))
        (output.square().mean() + sum(state.mean() for state in last)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def shard(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))


def worker(rank, folder):
    """Trains each kind of layer alone, data-parallel and sharded, and compares the weights.

    The worker trains all kinds, because starting a process takes longer than training.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    x = torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    local_x = x.chunk(WORLD, dim=1)[rank]
    for kind in (*KINDS.values(), EVERY["leaky_equation"]):
        alone = train(kind, lambda module: module, x)
        parallel = train(kind, DistributedDataParallel, local_x)
        sharded = train(kind, shard, local_x)
        assert all(p.to_local().numel() < p.numel() for p in sharded.values())
        torch.testing.assert_close(parallel, alone)
        torch.testing.assert_close({name: p.full_tensor() for name, p in sharded.items()}, alone)
    # No rank may close its connections while another rank is still waiting for a collective.
    dist.barrier()
    dist.destroy_process_group()
    # DTensor's caches keep the group's threads alive. A thread that frees a Python tensor during
    # interpreter shutdown aborts the process, so exit without shutting down the interpreter.
    os._exit(0)


@pytest.mark.slow
def test_parallel_and_sharded_training_match_one_process(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=WORLD)
