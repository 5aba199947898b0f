"""Rewards of an epoch's pictures, and evaluation on held-out prompts."""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flow.cli import write_files
from flow.distributed import RANK, all_gather_tensor, gather_tensor, local_slice, move_to_cpu
from flow.draws import zero_std_share
from flow.pictures import grid_files, saturation, to_bytes
from flow.pipeline import decode, decode_size, draw_noise, integrate, schedule
from flow.run import log_line


def decode_and_score(pipe, reward, x0: Tensor, prompts: list[dict], others: dict = {}):
    """Yield (pictures, scores (names + others, chunk)) of latents x0 (n, ...) of rows, 16 megapixels at a time."""
    most_pictures = max(1, 16 * 3 * 2**20 // int(np.prod(pipe.flow.picture)))
    chunk = max(decode_size(pipe), most_pictures - most_pictures % decode_size(pipe))
    for rows in torch.arange(len(x0)).split(chunk):
        pictures = decode(pipe, x0[rows])
        texts, metadata = map(list, zip(*[(prompts[i]["prompt"], prompts[i]["metadata"]) for i in rows]))
        scores = [reward.scores_of(pictures, texts, metadata)]
        for other in others.values():
            scores.append(other(pictures, texts, metadata)[None])
            move_to_cpu(other.models)
        yield pictures, torch.cat(scores)
    move_to_cpu(reward.models)


def score(pipe, reward, x0: Tensor, prompts: list[dict]) -> Tensor:
    """Decode and score this process's latents x0 (local n, ...) of these rows of read_prompts. Returns the
    reward's scores_of for all processes' pictures, (names, n)."""
    return all_gather_tensor(torch.cat([scores for _, scores in decode_and_score(pipe, reward, x0, prompts)], 1).T).T


def reward_stats(reward, scores: Tensor, rewards: Tensor, group: int) -> dict[str, float]:
    """An epoch's rewards for the log: mean and deviation, also of each part of a sum, of scores (names, n); and the
    fraction of prompts whose pictures have all one of `rewards` (n,), as trained on. Prints a note if it is 1."""
    rows = {"reward": reward.weighted(scores)}
    rows |= {f"reward/{name}": row for name, row in zip(reward.names, scores)} if len(scores) > 1 else {}
    stats = {key: value for name, row in rows.items()
             for key, value in ((name, row.mean().item()), (f"{name}_std", row.std().item()))}
    stats["zero_std_share"] = zero_std_share(rewards, group)
    if stats["zero_std_share"] == 1:
        tqdm.write(f"note: all pictures of a prompt have the same reward ({rewards[0]:g}, ...): nothing to learn")
    return stats


def evaluate(out: Path, args, pipe, reward, eval_rewards: dict, eval_prompts: list[dict], step: int, epoch: int):
    """Draw the held-out prompts with the LoRA as it is, always from the same noise; write the eval_* numbers to the log
    and the pictures to OUT/samples/. eval_rewards: other rewards by name. epoch: how many epochs are done."""
    local = local_slice(args.eval_n)
    texts, seeds = [row["prompt"] for row in eval_prompts], range(args.eval_n)[local]
    noise = draw_noise(pipe, len(seeds), [torch.Generator().manual_seed(seed) for seed in seeds])
    sigmas = schedule(pipe, args.eval_steps or args.steps)
    x0, ratios = integrate(pipe, noise, texts[local], sigmas, guidance=args.guidance, compare=True,
                           batch=args.rollout_batch or args.batch, desc="evaluate")
    chunks = [(to_bytes(pictures), scores.T, saturation(pictures))
              for pictures, scores in decode_and_score(pipe, reward, x0, eval_prompts[local], eval_rewards)]
    pictures, scores, saturations = map(torch.cat, zip(*chunks))
    pictures, scores = gather_tensor(pictures), all_gather_tensor(scores).T
    saturations, ratios = all_gather_tensor(saturations), all_gather_tensor(ratios)
    if RANK > 0:
        return
    rewards, ratio_by_step = reward.weighted(scores), ratios.mean(0)
    parts = dict(zip([*reward.names, *eval_rewards], scores)) if len(scores) > 1 else {}
    grid = out / "samples" / f"{epoch:05d}.png"
    write_files(grid_files(grid, pictures, 8, texts))
    log_line(out, {
        "step": step, "epoch": epoch, "eval_guidance": args.guidance, "eval_reward": rewards.mean().item(),
        "eval_reward_se": (rewards.std() / len(rewards) ** 0.5).item(),
        **{f"eval_reward/{name}": part.mean().item() for name, part in parts.items()},
        "eval_norm_ratio": ratio_by_step.mean().item(), "eval_norm_ratio_max": ratio_by_step.max().item(),
        "eval_norm_ratio_steps": ratio_by_step.tolist(), "eval_saturation": saturations.mean().item()}, picture=grid)
