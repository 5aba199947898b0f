"""Several processes, one a GPU, that together compute what one process computes:

    torchrun --nproc-per-node 8 train_awm.py ...

Every process draws the same random numbers and takes its slice of an epoch's prompts. Rewards are gathered, gradients
are summed. Only the first process writes files, prints, and shows bars. A process that fails says why and ends;
torchrun then ends the others."""
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

from flow.cli import PROCESSES, RANK, InputError

BINS = 5  # equal parts of t's range [0, 1] in norm_ratio_by_t


def local_device() -> torch.device:
    """This process's GPU, or the CPU. Only the first process goes on printing to stdout."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if PROCESSES > 1 else 0)
    return torch.device("cuda", torch.cuda.current_device())


def base_dtype(device: torch.device) -> torch.dtype:
    """The precision of frozen models, including a local judge: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def local_slice(n: int) -> slice:
    """This process's slice of n things; all of them if there is one process."""
    return slice(n * RANK // PROCESSES, n * (RANK + 1) // PROCESSES)


def barrier(**state):
    """Wait for all processes. The first call connects them. Raises InputError if their `state`, read from the run's
    folder, differs."""
    if PROCESSES > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # a judge over HTTP can be slow
    if any(other != state for other in all_gather(state)):
        raise InputError(f"the {PROCESSES} processes have read different checkpoints; --out must be one folder that "
                         "all see")


def shutdown():
    """Disconnect when the process ends. Only for a finished run: after a failure it would wait for the others."""
    if dist.is_initialized():
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)


def shard(transformer: torch.nn.Module, device: torch.device):
    """Divide a transformer's frozen blocks among the processes (PyTorch's FSDP2). A block's parts are gathered while it
    computes. A LoRA that is added later is not divided. All processes must then call it equally often."""
    barrier()
    mesh = init_device_mesh(device.type, (PROCESSES,))
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    if not lists:
        raise InputError(f"--shard: a {type(transformer).__name__} has no lists of blocks to divide")
    for block in (block for blocks in lists for block in blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


def all_gather(value) -> list:
    """Each process's value, in the order of ranks. Any value that can be pickled."""
    values = [value]
    if PROCESSES > 1:
        values = [None] * PROCESSES
        run_collective(dist.all_gather_object, values, value)
    return values


def all_gather_tensor(x: Tensor) -> Tensor:
    """All processes' slices (local n, ...) as one tensor (n, ...) on the CPU."""
    return torch.cat(all_gather(x.cpu()))


def gather_tensor(x: Tensor) -> Tensor | None:
    """As all_gather_tensor, but on the first process only, for large tensors; None on the others."""
    if PROCESSES == 1:
        return x.cpu()
    parts = [None] * PROCESSES if RANK == 0 else None
    run_collective(dist.gather_object, x.cpu(), parts)
    return torch.cat(parts) if RANK == 0 else None


def sum_gradients(params: list[torch.nn.Parameter]):
    """Replace each gradient by its sum over the processes. A gradient that no process has stays None."""
    if PROCESSES == 1:
        return
    has_grad = [float(p.grad is not None) for p in params]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([params[0].new_tensor(has_grad), *(grad.flatten() for grad in grads)])
    run_collective(dist.all_reduce, flat)
    counts, sums = flat[:len(params)].tolist(), flat[len(params):].split([p.numel() for p in params])
    for p, count, grad in zip(params, counts, sums):
        p.grad = grad.view_as(p) if count else None


def run_collective(collective, *args):
    """Call a collective of torch.distributed. Raises InputError if another process has ended."""
    try:
        collective(*args)
    except RuntimeError as e:
        time.sleep(5)  # torchrun then ends this process before it prints an error that another process caused
        raise InputError(f"process {RANK} has lost another process, whose own message says why "
                         f"({str(e).splitlines()[0][:80]})")


def move_to_cpu(models: list[torch.nn.Module]):
    """Free GPU memory. The models of a reward return to the GPU when they are called again."""
    for model in models:
        model.to("cpu")


def mean_over_rows(batches: list[dict[str, Tensor]], rows: int) -> dict:
    """Means over an update's rows on all processes, by name. batches: one dict of values (b,) per micro-batch. With
    norm_ratio there must be t (b,): it gives norm_ratio_by_t, the ratio in BINS equal bins of the noise level. Waits
    for the GPU."""
    sums = {}
    for values in batches:
        t, ratio = values.get("t"), values.get("norm_ratio")
        for k in range(BINS) if ratio is not None else ():
            in_bin = (t * BINS).long().clamp_max(BINS - 1) == k
            values = {**values, f"ratio in bin {k}": ratio * in_bin, f"rows in bin {k}": in_bin}
        for name, value in values.items():
            value = value if value.dtype == torch.float64 else value.float()
            sums[name] = sums.get(name, 0) + value.sum()
    local = dict(zip(sums, torch.stack(list(sums.values())).tolist())) if sums else {}
    totals = all_gather(local)  # of each process
    names = dict.fromkeys(name for total in totals for name in total)
    means = {name: sum(total[name] for total in totals if name in total) / rows for name in names}
    bins = [(means.pop(f"ratio in bin {k}", 0), means.pop(f"rows in bin {k}", 0)) for k in range(BINS)]
    by_t = [ratio / count if count else None for ratio, count in bins]
    means.pop("t", None)
    return {"norm_ratio": None, "active": None, **means, "norm_ratio_by_t": by_t}
