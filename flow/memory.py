"""GPU memory: room made, peaks noted."""
import torch


def to_cpu(reward):
    """A reward's models make room on the GPU until they are asked again."""
    for model in reward.models:
        model.to("cpu")


def mark_peak(run, phase: str):
    """Note how many GiB of GPU memory a phase has taken at most, and count anew."""
    if torch.cuda.is_available():
        run.peaks[f"peak_gb_{phase}"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
