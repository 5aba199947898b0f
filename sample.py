"""Sample pictures from a flow-matching pipeline, with or without a LoRA, and measure its velocity norms.

    python sample.py --prompt "a red star" --n 16 --out runs/base
    python sample.py --lora runs/awm-sd3-pickscore-lam0.05-s0/lora --norms --out runs/guarded
    python sample.py --lora DIR --renorm match --out runs/renorm          # the norm repaired at inference, to compare
    torchrun --nproc-per-node 8 sample.py ...                             # the same pictures on eight GPUs

Writes PNGs (of a video its middle frame, and a GIF), grid.png and samples.jsonl to OUT. Each row of samples.jsonl makes
the same picture in plain diffusers (in fp32 within 2/255, as on a CPU; on a GPU our latents are fp32, diffusers' bf16):

    pipe = DiffusionPipeline.from_pretrained(row["model"], dtype=torch.float32)
    if row["scheduler"]:                                                   # the pipeline ships another than plain Euler
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(row["scheduler"])
    if row["lora"]:
        pipe.load_lora_weights(row["lora"])
        pipe.set_adapters(pipe.get_active_adapters(), row["lora_scale"])
    pipe(prompt=row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"])

With --renorm, which diffusers cannot do, row["pipe"] is null. --lora reads some files that diffusers does not
(docs/models.md).
--adjoint asks whether the reward gains from longer or shorter velocities: its signal is coherent if |t statistic| is
well above 2 (outside the gray band), most pictures agree in sign, and two halves of the pictures agree (cosine near 1).
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch is imported: idle threads free their core

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flow import cli, distributed, pipeline
from flow.distributed import RANK, all_gather_tensor, gather_tensor
from flow.intercept import guided
from flow.lora import add_lora, lora_layers, read_file, read_lora
from flow.pictures import earlier_samples, png, save_samples, to_bytes
from flow.prompts import read_prompts, warn_unsuitable
from flow.rewards import load_reward

FILES = "samples.jsonl", "grid.png", "norms.json", "norms.png", "adjoint.json", "adjoint.png"  # besides the pictures


@dataclass
class Args:
    model: str = "tiny/sd3"  # any flow-matching text-to-image or text-to-video pipeline: a diffusers folder or hub id
    # a LoRA of diffusers', PEFT's or kohya's: a folder (a training run writes OUT/lora), a .safetensors file, a hub id
    lora: str | None = None
    lora_scale: float = 1.0  # strength of the LoRA; 0 gives the base's pictures
    prompts: str = "tiny/eval_prompts.txt"  # .txt (one prompt a line), .jsonl, .json, .csv, .tsv, .parquet
    prompt: str | None = None  # one prompt, instead of --prompts
    n: int = 1  # pictures per prompt
    steps: int = 28  # Euler steps
    # guidance scale (None: no guidance; a model with a guidance embedding gets its default)
    guidance: float | None = None
    size: int | str | None = None  # pixels a side, or WIDTHxHEIGHT like 768x512 (None: the model's default)
    frames: int | None = None  # frames per video, for a model that makes videos (None: the model's default)
    seed: int = 0  # picture i starts from the noise of seed + i
    batch: int = 64  # pictures sampled at once
    # change each velocity v by the base's v_ref: match its norm, cap the norm at its norm, project (remove the part of
    # v - v_ref along v_ref), none
    renorm: str = "none"
    norms: bool = False  # measure norm(v) / norm(v_ref) at each step, before any --renorm: norms.json, norms.png
    # measure how --reward, and as a control the picture's energy, would change if a step's velocity were scaled:
    # adjoint.json, adjoint.png
    adjoint: bool = False
    reward: str | None = None  # score the pictures with a reward, as training does: pickscore, aesthetic, ocr, ...
    vlm_question: str | None = None  # what vlm:MODEL asks; {prompt} is the picture's (None: does it show the prompt?)
    out: str = "runs/samples"  # folder for the results


def adjoint(pipe, noise: Tensor, prompts: list[str], metadata: list[dict], sigmas: Tensor, rewards: list, *,
            guidance: float | None = None, batch: int = 8) -> list[Tensor]:
    """How each reward R would change if one step's velocity were scaled: dR/ds_k at s = 0, (n, steps) for each R, where
    x_{k+1} = x_k + dt_k (1 + s_k) v_k. The rewards are differentiable functions (images in [0, 1], prompts, metadata).

    By the discrete adjoint a_N = dR/dx_N, a_k = a_{k+1} + dt_k (dv_k/dx_k)^T a_{k+1}, dR/ds_k = <a_{k+1}, dt_k v_k>.
    Only one step's graph is held at a time, so it needs as much memory as one training step."""
    out, dts = [[] for _ in rewards], sigmas.diff().tolist()
    last = len(rewards) - 1
    for i in cli.progress(range(0, len(noise), batch), desc="adjoint", leave=False):
        chunk, path = prompts[i:i + batch], [noise[i:i + batch].to(pipe.device)]
        t = sigmas[:-1, None].expand(-1, len(chunk))  # (steps, b)
        for k, dt in enumerate(dts):
            with torch.no_grad():
                path.append(path[-1] + dt * pipeline.velocity(pipe, path[-1], t[k], chunk, guidance))
        end = path[-1].requires_grad_()
        pictures = pipeline.decode_batch(pipe, end)
        a = [torch.autograd.grad(reward(pictures, chunk, metadata[i:i + batch]).sum(), end, retain_graph=r < last)[0]
             for r, reward in enumerate(rewards)]
        s = [[] for _ in rewards]
        for k, dt in reversed(list(enumerate(dts))):
            x = path[k].detach().requires_grad_()
            v = pipeline.velocity(pipe, x, t[k], chunk, guidance)
            for r in range(len(rewards)):
                s[r].append((a[r] * dt * v.detach()).flatten(1).sum(1).cpu())
                a[r] = a[r] + torch.autograd.grad(v, x, dt * a[r], retain_graph=r < last)[0]
        for r in range(len(rewards)):
            out[r].append(torch.stack(s[r][::-1], 1))
    return [torch.cat(parts) for parts in out]


def write_norms(out: Path, sigmas: Tensor, ratios: Tensor, renormed: bool):
    """Write norms.json and norms.png: the mean, spread and extremes of norm ratios (n, steps) at each step's t."""
    t = sigmas[:-1].tolist()
    rows = {"t": t, "mean": ratios.mean(0).tolist(), "std": ratios.std(0, correction=0).tolist(),
            "min": ratios.amin(0).tolist(), "max": ratios.amax(0).tolist(), "n": len(ratios),
            "overall": ratios.mean().item()}
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.plot(t, rows["mean"], marker="o", markersize=3, label="mean")
    low, high = ratios.quantile(torch.tensor([0.05, 0.95]), 0).tolist()
    axis.fill_between(t, low, high, alpha=0.2, label="5-95 % of pictures")
    axis.set(xlabel="t (1 is noise)", ylabel="norm ratio to the reference", xlim=(1.02, -0.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    cli.write_files({out / "norms.json": cli.to_json(rows, indent=2) + "\n", out / "norms.png": png(figure, 130)})
    when = ", before --renorm" if renormed else ""
    print(f"norm ratio to the reference{when}: mean {rows['overall']:.4f}, worst step {max(rows['mean']):.4f}")


def write_adjoint(out: Path, sigmas: Tensor, sensitivity: dict[str, Tensor], prompts: list[str]):
    """Write adjoint.json and adjoint.png: for each reward, statistics of dR/ds (n, steps) over the pictures.

    These are its mean and spread, the t statistic (mean over standard error), the share of pictures with the mean's
    sign, and the cosine between the means of two halves. Pictures of one prompt are not independent: so the standard
    error is that of the prompts' means, and the halves share no prompt. With only one prompt both are over pictures."""
    units = prompts if len(set(prompts)) > 1 else list(range(len(prompts)))
    pictures_of = {unit: [i for i, other in enumerate(units) if other == unit] for unit in units}
    rows = {"t": sigmas[:-1].tolist(), "n": len(prompts), "units": len(pictures_of)}
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, s in sensitivity.items():
        s = s.double()
        mean, std = s.mean(0), s.std(0)
        by_unit = torch.stack([s[pictures].mean(0) for pictures in pictures_of.values()])  # (units, steps)
        t = by_unit.mean(0) / (by_unit.std(0) / len(by_unit) ** 0.5).clamp_min(1e-30)
        same_sign = (s.sign() == mean.sign()).double().mean(0)
        halves = by_unit[::2].mean(0), by_unit[1::2].mean(0)
        cosine = torch.nn.functional.cosine_similarity(*halves, dim=0).item()
        rows[name] = {"mean": mean.tolist(), "std": std.tolist(), "t_statistic": t.tolist(),
                      "same_sign": same_sign.tolist(), "half_batch_cosine": cosine}
        print(f"{name}: largest |t statistic| {t.abs().max():.1f}, same sign {same_sign.mean():.2f} on average, "
              f"cosine of half batches {cosine:.2f}")
        for axis, values in zip(axes, (mean / std.clamp_min(1e-30), t, same_sign)):
            axis.plot(rows["t"], values, marker="o", markersize=3, label=f"{name} (cosine {cosine:.2f})")
    titles = "mean of dR/ds over its spread", "t statistic of the batch", "share of pictures with the mean's sign"
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel="t (1 is noise)", xlim=(1.02, -0.02))
        axis.grid(alpha=0.3)
    axes[1].axhspan(-1.96, 1.96, color="gray", alpha=0.15, linewidth=0)
    axes[2].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    cli.write_files({out / "adjoint.json": cli.to_json(rows, indent=2) + "\n", out / "adjoint.png": png(figure, 130)})


def energy(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A picture's mean square, (b,): a control whose gradient is along the velocity."""
    return (2 * images - 1).square().flatten(1).mean(1)


@cli.one_line_errors()
def main(args: Args):
    """Check the flags, sample, write the pictures, measure."""
    if args.renorm not in ("none", *pipeline.REPAIRS):
        raise cli.InputError(f"--renorm {args.renorm}: give one of none, {', '.join(pipeline.REPAIRS)}")
    cli.check_flags(args, {"n": 1, "steps": 1, "batch": 1, "frames": 1, "seed": 0, "guidance": 0})
    if (args.norms or args.renorm != "none") and not args.lora:
        raise cli.InputError("--norms and --renorm compare a LoRA with its base: give --lora")
    if args.adjoint and not args.reward:
        raise cli.InputError("--adjoint measures how a reward would change: give --reward")
    if args.vlm_question and "vlm:" not in (args.reward or ""):
        raise cli.InputError("--vlm-question: --reward is no vlm:MODEL that could be asked; leave it out")
    given = [{"prompt": args.prompt, "metadata": {}}]
    if args.prompt is None:
        given = read_prompts(args.prompts, "--prompts")
    given = [row for row in given for _ in range(args.n)]
    prompts, metadata = [row["prompt"] for row in given], [row["metadata"] for row in given]
    if len(prompts) > cli.MOST["n"]:
        raise cli.InputError(f"--n {args.n}: makes {len(prompts)} pictures; at most {cli.MOST['n']}")
    if args.seed >= 2**63 - len(prompts):
        raise cli.InputError(f"--seed {args.seed}: must be below 2^63")
    seeds = list(range(args.seed, args.seed + len(prompts)))
    if args.lora:
        read_file("--lora", args.lora)  # before minutes of loading
    if len(prompts) < distributed.PROCESSES:
        raise cli.InputError(f"--n {args.n}: makes {len(prompts)} pictures, fewer than the {distributed.PROCESSES} "
                             "processes")
    cli.check_place(args.out, "--out", FILES)
    earlier_samples(args.out)  # refuses a folder with pictures from elsewhere

    device = distributed.local_device()
    local = distributed.local_slice(len(prompts))  # the pictures that this process draws
    local_prompts = prompts[local]
    reward = load_reward(args.reward, device, question=args.vlm_question) if args.reward else None
    if reward:
        reward.check_prompts(given)
    rewards = {"energy (control)": energy}
    if args.adjoint:
        rewards = {args.reward: load_reward(args.reward, device, differentiable=True), **rewards}
    pipe = pipeline.load_pipeline(args.model, device, args.size, args.frames)
    if args.adjoint and device.type == "cuda":
        pipe.transformer.enable_gradient_checkpointing()
    if args.lora:
        lora = read_lora(pipe, "--lora", args.lora)
        for p in add_lora(pipe.transformer, max(len(a) for a, _ in lora.values()), args.seed, initial=lora):
            p.requires_grad_(False)
        for layer in lora_layers(pipe.transformer):
            layer.scale_layer(args.lora_scale)
    warn_unsuitable(pipe, prompts, args.size)
    pipeline.encode_prompts(pipe, local_prompts, args.guidance)
    distributed.barrier()  # connects the processes

    sigmas = pipeline.schedule(pipe, args.steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[local]]
    noise = pipeline.draw_noise(pipe, len(generators), generators)
    x0, ratios = pipeline.integrate(pipe, noise, local_prompts, sigmas, guidance=args.guidance, renorm=args.renorm,
                                    compare=args.norms, batch=args.batch)
    pictures = pipeline.decode(pipe, x0)

    settings = None  # plain diffusers cannot do --renorm
    if args.renorm == "none":
        settings = {"num_inference_steps": args.steps, **pipe.flow.settings, **guided(pipe, args.guidance),
                    "height": pictures.shape[-2], "width": pictures.shape[-1]}
    rows = [{"prompt": prompt, "seed": seed, "model": args.model, "lora": args.lora, "lora_scale": args.lora_scale,
             "scheduler": pipe.flow.scheduler, "renorm": args.renorm, "pipe": settings,
             **({"metadata": fields} if fields else {})}
            for prompt, seed, fields in zip(prompts, seeds, metadata)]
    if reward:
        scores = all_gather_tensor(reward(pictures, local_prompts, metadata[local]))
        rows = [{**row, "reward": score} for row, score in zip(rows, scores.tolist())]
        print(f"reward: {scores.mean():.4f}")
    pictures = gather_tensor(to_bytes(pictures))  # only the first process has them, and writes
    if RANK == 0:
        save_samples(args.out, pictures, rows)

    out = Path(args.out)
    if args.adjoint:
        sensitivity = adjoint(pipe, noise, local_prompts, metadata[local], sigmas, list(rewards.values()),
                              guidance=args.guidance, batch=1 if device.type == "cuda" else max(1, args.batch // 8))
        sensitivity = dict(zip(rewards, map(all_gather_tensor, sensitivity)))
        if RANK == 0:
            write_adjoint(out, sigmas, sensitivity, prompts)
    if args.norms:
        ratios = all_gather_tensor(ratios)
        if RANK == 0:
            write_norms(out, sigmas, ratios, args.renorm != "none")
    distributed.shutdown()


if __name__ == "__main__":
    main(cli.parse(Args, __doc__))
