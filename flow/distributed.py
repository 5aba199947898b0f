"""Several processes, one a GPU, that compute what one computes:

    torchrun --nproc-per-node 8 train_awm.py ...

Every process draws the same random numbers and takes its share of an epoch's prompts; rewards are all_gather, gradients
summed. The first process alone writes files, prints and shows bars. One that fails says why and ends, and torchrun then
ends the others."""
import atexit
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flow.cli import InputError

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun tells them


def local_device() -> torch.device:
    """This process's GPU, or the CPU. All processes but the first fall silent, but for their errors."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def barrier(**state):
    """Wait for all processes, the first time and again. Ends them if their `state` differs, which is what each has read
    from the run's folder."""
    if PROCESSES > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # a judge over HTTP may take its time
    if any(other != state for other in all_gather(state)):
        raise InputError(f"the {PROCESSES} processes have read different checkpoints; --out must be one folder that "
                         "all see")


def shutdown():
    """The run is over: let the processes' end be an orderly one. (Not when one has failed: it would wait for the
    others.)"""
    if dist.is_initialized():
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)


def shard(transformer: torch.nn.Module, device: torch.device):
    """Divide a transformer's frozen blocks among the processes (PyTorch's FSDP2): each holds its part of a block, which
    is all_gather when it is at work. A LoRA that is added later every process holds whole. All processes must then make
    equally many calls."""
    barrier()
    mesh = init_device_mesh(device.type, (PROCESSES,))
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    if not lists:
        raise InputError(f"--shard: a {type(transformer).__name__} has no lists of blocks to divide")
    for block in (block for blocks in lists for block in blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def local_slice(n: int) -> slice:
    """This process's part of n things in a row; all of them, if it is the only one."""
    return slice(n * RANK // PROCESSES, n * (RANK + 1) // PROCESSES)


def all_gather(value) -> list:
    """Each process's value, in order."""
    values = [value]
    if PROCESSES > 1:
        values = [None] * PROCESSES
        run_collective(dist.all_gather_object, values, value)
    return values


def all_gather_tensor(x: Tensor) -> Tensor:
    """All processes' tensors (share, ...) as one, (n, ...), on the CPU."""
    return torch.cat(all_gather(x.cpu()))


def gather_tensor(x: Tensor) -> Tensor | None:
    """The same on the first process, for what is large; None on the others."""
    if PROCESSES == 1:
        return x.cpu()
    parts = [None] * PROCESSES if RANK == 0 else None
    run_collective(dist.gather_object, x.cpu(), parts)
    return torch.cat(parts) if RANK == 0 else None


def sum_gradients(params: list[torch.nn.Parameter]):
    """Each gradient becomes its sum over the processes. Where no process has one, there is none."""
    if PROCESSES == 1:
        return
    has = [float(p.grad is not None) for p in params]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([params[0].new_tensor(has), *(grad.flatten() for grad in grads)])
    run_collective(dist.all_reduce, flat)
    has, sums = flat[:len(has)].tolist(), flat[len(has):].split([p.numel() for p in params])
    for p, anyone, grad in zip(params, has, sums):
        p.grad = grad.view_as(p) if anyone else None


def run_collective(collective, *args):
    """A collective of torch.distributed. If another process has ended, so does this one; the other has said why."""
    try:
        collective(*args)
    except RuntimeError as e:
        time.sleep(5)  # torchrun ends this process before it says what only follows
        raise InputError(f"process {RANK} has lost another process, whose own message says why "
                         f"({str(e).splitlines()[0][:80]})")


# ---------------------------------------------------------------- GPU memory

def to_cpu(reward):
    """A reward's models make room on the GPU until they are asked again."""
    for model in reward.models:
        model.to("cpu")


def mark_peak(run, phase: str):
    """Note how many GiB of GPU memory a phase has taken at most, and count anew."""
    if torch.cuda.is_available():
        run.peaks[f"peak_gb_{phase}"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------- precision

def base_dtype(device: torch.device) -> torch.dtype:
    """The precision of frozen models, including a local judge: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
