"""Sample pictures from a flow-matching pipeline, with or without a LoRA, and measure its velocity norms.

    python sample.py --prompt "a red star" --n 16 --out runs/base
    python sample.py --lora runs/awm-sd3-pickscore-lam0.05-s0/lora --norms --out runs/guarded
    python sample.py --lora DIR --renorm match --out runs/renorm          # inference-time repair, for comparison

Writes PNGs, grid.png and samples.jsonl to OUT. Each line of samples.jsonl makes the same picture in plain diffusers (within
2/255 in fp32, as on a CPU; on a GPU diffusers keeps its latents in bf16, we in fp32):

    pipe(row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"]).images[0]

Rectified flow: x_t = (1 - t) x0 + t eps, velocity v = eps - x0, t in [0, 1], t = 1 is noise. The functions above `Args`
are what the training scripts share.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval_judge import fail, load_reward, make_dir, parse, read_prompts, reason, save_samples
from normguard import norm_ratio, reference, renormalize

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",  # as DiffusionNFT, AWM and Flow-GRPO on SD3.5
                "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


# ---------------------------------------------------------------- model

def load_pipeline(model: str, device: torch.device) -> diffusers.DiffusionPipeline:
    """A frozen pipeline from a diffusers folder or hub id: transformer and VAE on `device` (bf16 on a GPU, fp32 on a CPU),
    text encoders on the CPU until `encode_prompts` borrows the device for them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except Exception as e:  # a missing folder, no network, a gated repository, a broken file: each library raises its own
        fail(f"--model {model}: cannot be loaded ({reason(e)}); give a diffusers folder, or a hub id that you can download")
    if not isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        fail(f"--model {model}: is a {type(pipe).__name__}; StableDiffusion3Pipeline is supported")
    if pipe.scheduler.config.get("use_dynamic_shifting"):
        fail(f"--model {model}: its scheduler shifts by resolution, which is not supported")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


def max_tokens(pipe) -> int:
    """T5's padded length. Padding is attended to, so it is part of the model's input: diffusers' 256, or all a tokenizer has."""
    return min(256, pipe.tokenizer_3.model_max_length) if pipe.tokenizer_3 else 256


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each unique prompt, and "" for guidance, once: prompt -> (embeds (l, d), pooled (p,)) on the CPU."""
    unique, device, text = list(dict.fromkeys([*prompts, ""])), pipe.transformer.device, {}
    encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if e is not None]
    for e in encoders:
        e.to(device)
    for i in tqdm(range(0, len(unique), 16), desc="encode prompts", leave=False):
        embeds, _, pooled, _ = pipe.encode_prompt(unique[i:i + 16], None, None, device=device, do_classifier_free_guidance=False,
                                                  max_sequence_length=max_tokens(pipe))
        text.update(zip(unique[i:i + 16], zip(embeds.cpu(), pooled.cpu())))
    for e in encoders:
        e.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # peak_gb is to tell what training takes
    return text


def stack(text: dict[str, tuple[Tensor, Tensor]], prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Encoded prompts as a batch: embeds (b, l, d) and pooled (b, p) on `device`."""
    embeds, pooled = zip(*(text[p] for p in prompts))
    return torch.stack(embeds).to(device), torch.stack(pooled).to(device)


def velocity(model: torch.nn.Module, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], guidance: float = 1.0,
             null: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """v(x_t, t | text), fp32. x (b, c, h, w), t (b,) in [0, 1], text as from `stack`; guidance > 1 mixes in v(x_t, t | null)."""
    if guidance > 1:
        text = tuple(torch.cat(pair) for pair in zip(null, text))
        v_null, v = velocity(model, torch.cat([x, x]), torch.cat([t, t]), text).chunk(2)
        return v_null + guidance * (v - v_null)
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):  # fp32 LoRA on a bf16 base
        return model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text[0], pooled_projections=text[1],
                     return_dict=False)[0].float()


def schedule(pipe, steps: int) -> Tensor:
    """The pipeline's own noise levels, shift included: (steps + 1,), from 1 down to 0."""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.cpu()


def latent_shape(pipe, size: int | None) -> tuple[int, int, int]:
    """(c, h, w) of the latents of a square picture with `size` pixels a side (None: the model's own size)."""
    f, patch = pipe.vae_scale_factor, pipe.transformer.config.patch_size
    size, most = pipe.default_sample_size * f if size is None else size, pipe.transformer.config.pos_embed_max_size * f * patch
    if not 0 < size <= most or size % (f * patch):
        fail(f"--size {size}: must be a multiple of {f * patch}, at most {most}")
    return pipe.transformer.config.in_channels, size // f, size // f


def draw_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """(n, c, h, w), each from its own CPU generator, as diffusers draws it."""
    return torch.stack([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s))[0] for s in seeds])


@torch.no_grad()
def integrate(pipe, noise: Tensor, text: dict, prompts: list[str], sigmas: Tensor, *, guidance: float = 1.0, renorm: str = "none",
              compare: bool = False, batch: int = 64, desc: str = "sample") -> tuple[Tensor, Tensor | None]:
    """Euler from noise (n, c, h, w) down `sigmas` (steps + 1,). Returns x0 (n, c, h, w) on the CPU and, with `compare` or a
    renorm of "match" or "cap", the norm ratio to the reference at each step, (n, steps), before any renormalization."""
    model, device, out, ratios = pipe.transformer, pipe.transformer.device, [], []
    for i in tqdm(range(0, len(noise), batch), desc=desc, leave=False):
        x, inputs, steps = noise[i:i + batch].to(device), stack(text, prompts[i:i + batch], device), []
        null = stack(text, [""] * len(x), device) if guidance > 1 else None
        for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
            t = torch.full((len(x),), now, device=device)
            v = velocity(model, x, t, inputs, guidance, null)
            if compare or renorm != "none":
                with reference(model):
                    v_ref = velocity(model, x, t, inputs, guidance, null)
                steps.append(norm_ratio(v, v_ref).cpu())
                v = v if renorm == "none" else renormalize(v, v_ref, cap=renorm == "cap")
            x = x + (then - now) * v
        out.append(x.cpu())
        ratios += [torch.stack(steps, 1)] if steps else []
    return torch.cat(out), torch.cat(ratios) if ratios else None


@torch.no_grad()
def decode(pipe, x0: Tensor, batch: int = 16) -> Tensor:
    """Latents (n, c, h, w) -> pictures (n, 3, h, w) fp32 in [0, 1] on the CPU, a slice at a time."""
    z = x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pictures = [pipe.vae.decode(s.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0].float().cpu() for s in z.split(batch)]
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------- what the training scripts share

def rng(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key: a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def add_lora(model: torch.nn.Module, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """A LoRA with alpha = 2 rank on the attention projections of a diffusers transformer; returns its fp32 parameters."""
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    diffusers.training_utils.cast_training_params(model, torch.float32)
    return [p for p in model.parameters() if p.requires_grad]


def save_lora(pipe, folder: Path):
    """pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(folder)` reads back with its rank and alpha. Written here,
    not by `pipe.save_lora_weights`, whose two metadata keys come in random order: equal runs are to give equal files."""
    config = pipe.transformer.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # peft holds a set
    lora = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(pipe.transformer).items()}
    folder.mkdir(exist_ok=True)
    save_file(lora, folder / "lora.tmp", {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()}, sort_keys=True)})
    (folder / "lora.tmp").replace(folder / "pytorch_lora_weights.safetensors")


def open_run(args, name: str, **recorded) -> tuple[Path, dict | None]:
    """The run's folder and the state to resume from, if any; args.json holds the args and what else is `recorded`. A run with
    other args, an unreadable checkpoint or a folder that cannot be written ends the process before anything is touched; a
    finished run says so and exits 0."""
    reward = Path(args.reward.partition(":")[0]).name.removesuffix(".py")
    default = f"runs/{name}-{Path(args.model).name}-{reward}-lam{args.lam:g}-s{args.seed}"
    out = Path(args.out or default)
    mine, state = {k: v for k, v in asdict(args).items() if k != "out"}, None
    args_file, state_file = out / "args.json", out / "checkpoint" / "state.pt"
    if args_file.exists():
        try:
            theirs = json.loads(args_file.read_text())
        except ValueError as e:
            fail(f"{args_file}: cannot be read ({reason(e)}); restore it, or give another --out")
        differ = [f"--{k.replace('_', '-')} ({theirs.get(k)} there, {v} here)" for k, v in mine.items() if theirs.get(k) != v]
        if differ:
            fail(f"--out {out}: holds a run with other args: {', '.join(differ)}; give another --out, or the same args to resume it")
    if state_file.exists():
        try:
            state = torch.load(state_file, weights_only=True, map_location="cpu")
        except Exception as e:  # torch raises what its unpickler or zip reader raises
            fail(f"{state_file}: cannot be read ({type(e).__name__}); restore it, or delete {out} to start over")
        if state["epoch"] == args.epochs:
            print(f"{out}: this run is finished ({args.epochs} epochs); give another --out to run again")
            sys.exit(0)
        if not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < state["log_bytes"]:
            fail(f"{out}/metrics.jsonl: is shorter than the checkpoint knows it; restore it, or give another --out")
    make_dir(out / "checkpoint", "--out")
    make_dir(out / "samples", "--out")
    if not args_file.exists():
        args_file.with_suffix(".tmp").write_text(json.dumps({**mine, **recorded}, indent=2) + "\n")
        args_file.with_suffix(".tmp").replace(args_file)
    with open(out / "metrics.jsonl", "a") as log:  # lines that the checkpoint does not know are written anew
        log.truncate(state["log_bytes"] if state else 0)
    return out, state


def save_checkpoint(out: Path, pipe, opt: torch.optim.Optimizer, **counters: int):
    """lora/ and curves.png, then all that the next epoch depends on, to a temporary name and renamed: a run killed in between
    does the epochs since the checkpoint again and writes the same files."""
    save_lora(pipe, out / "lora")
    plot_curves(out)
    tmp = out / "checkpoint" / "state.tmp"
    torch.save({"lora": get_peft_model_state_dict(pipe.transformer), "opt": opt.state_dict(), **counters,
                "log_bytes": (out / "metrics.jsonl").stat().st_size}, tmp)
    tmp.replace(out / "checkpoint" / "state.pt")


def load_checkpoint(state: dict, pipe, opt: torch.optim.Optimizer):
    """Put the LoRA and the optimizer back."""
    set_peft_model_state_dict(pipe.transformer, state["lora"])
    opt.load_state_dict(state["opt"])


def log_line(out: Path, line: dict):
    """Append a line to metrics.jsonl; a non-finite number becomes null, since JSON has none."""
    line = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in line.items()}
    with open(out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")


def evaluate(pipe, reward_fn, text: dict, prompts: list[str], noise: Tensor, sigmas: Tensor, batch: int) -> tuple[dict, Tensor]:
    """eval_* numbers and pictures for fixed prompts and noise: reward with its standard error, norm ratio per step."""
    x0, ratios = integrate(pipe, noise, text, prompts, sigmas, compare=True, batch=batch, desc="evaluate")
    pictures = decode(pipe, x0)
    reward = reward_fn(pictures, prompts)
    top, low = pictures.amax(1), pictures.amin(1)
    steps = ratios.mean(0)
    return {"eval_reward": reward.mean().item(), "eval_reward_se": (reward.std() / len(reward) ** 0.5).item(),
            "eval_norm_ratio": steps.mean().item(), "eval_norm_ratio_max": steps.max().item(), "eval_norm_ratio_steps": steps.tolist(),
            "eval_saturation": ((top - low) / top.clamp_min(1e-3)).mean().item()}, pictures


def plot_curves(out: Path):
    """curves.png from metrics.jsonl: reward, norm ratio and guard over the steps, and each evaluation's norm ratio over t."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    panels = [("reward", ["reward", "eval_reward"]), ("norm ratio to the reference", ["norm_ratio", "eval_norm_ratio", "eval_norm_ratio_max"]),
              ("guard: share of samples over the reference", ["active"])]
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.4), layout="constrained")
    for axis, (title, keys) in zip(axes, panels):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points) if points else ([], []), label=key, marker="o" if key.startswith("eval") else None, markersize=3, linewidth=1)
        axis.set(title=title, xlabel="optimizer step")
        axis.legend(fontsize=8)
    evals = [line for line in lines if "eval_norm_ratio_steps" in line]
    for i, line in enumerate(evals):
        axes[3].plot(line["eval_norm_ratio_steps"], color=plt.cm.viridis(i / max(len(evals) - 1, 1)), label=f"epoch {line['epoch']}", linewidth=1)
    axes[3].set(title="norm ratio along the trajectory", xlabel="sampling step (0 is noise)")
    if evals:
        axes[3].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.tmp", dpi=110, format="png")
    plt.close(figure)
    (out / "curves.tmp").replace(out / "curves.png")


# ---------------------------------------------------------------- the script

@dataclass
class Args:
    model: str = "tiny/sd3"
    """diffusers folder or hub id"""
    lora: str | None = None
    """folder with pytorch_lora_weights.safetensors, as training writes it to OUT/lora"""
    prompts: str = "tiny/eval_prompts.txt"
    """text file, one prompt a line"""
    prompt: str | None = None
    """one prompt, instead of --prompts"""
    n: int = 1
    """pictures a prompt"""
    steps: int = 28
    """Euler steps"""
    guidance: float = 1.0
    """classifier-free guidance scale; 1 is none"""
    size: int | None = None
    """pixels a side (default: the model's own)"""
    seed: int = 0
    """picture i starts from the noise of seed + i"""
    batch: int = 64
    """pictures at once"""
    renorm: str = "none"
    """rescale each velocity to the reference's norm: none, match, or cap (only shrink)"""
    norms: bool = False
    """measure the norm ratio to the reference at each step: norms.json, norms.png"""
    reward: str | None = None
    """also score the pictures, as in training"""
    out: str = "runs/samples"
    """folder for the results"""


def write_norms(out: Path, sigmas: Tensor, ratios: Tensor):
    """norms.json and norms.png: mean, spread and extremes of (n, steps) norm ratios at each step's t."""
    t = sigmas[:-1].tolist()
    rows = {"t": t, "mean": ratios.mean(0).tolist(), "std": ratios.std(0, correction=0).tolist(), "min": ratios.amin(0).tolist(),
            "max": ratios.amax(0).tolist(), "n": len(ratios), "overall": ratios.mean().item()}
    (out / "norms.json").write_text(json.dumps(rows, indent=2) + "\n")
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.plot(t, rows["mean"], marker="o", markersize=3)
    axis.fill_between(t, *(ratios.quantile(torch.tensor([0.05, 0.95]), 0).tolist()), alpha=0.2, label="5-95 % of pictures")
    axis.set(xlabel="t (1 is noise)", ylabel="norm ratio to the reference", xlim=(1.02, -0.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out / "norms.png", dpi=130)
    plt.close(figure)
    print(f"norm ratio to the reference: mean {rows['overall']:.4f}, worst step {max(rows['mean']):.4f}")


def main(args: Args):
    """Sample, measure, write."""
    if args.renorm not in ("none", "match", "cap"):
        fail(f"--renorm {args.renorm}: none, match or cap")
    if min(args.n, args.steps, args.batch) < 1:
        fail("--n, --steps and --batch must be at least 1")
    if (args.norms or args.renorm != "none") and not args.lora:
        fail("--norms and --renorm compare a LoRA with its base: give --lora")
    prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts, "--prompts")
    prompts = [p for p in prompts for _ in range(args.n)]
    seeds = list(range(args.seed, args.seed + len(prompts)))
    if args.lora and not (Path(args.lora) / "pytorch_lora_weights.safetensors").is_file():
        fail(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors")
    make_dir(args.out, "--out")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.model, device)
    if args.lora:
        try:
            pipe.load_lora_weights(args.lora)
            pipe.transformer.active_adapters()  # raises where the file held nothing for the transformer
        except Exception as e:  # of another rank, model or library: peft, diffusers and safetensors each raise their own
            fail(f"--lora {args.lora}: does not fit --model {args.model} ({reason(e)})")
    reward_fn = load_reward(args.reward, device) if args.reward else None
    shape, sigmas, text = latent_shape(pipe, args.size), schedule(pipe, args.steps), encode_prompts(pipe, prompts)
    x0, ratios = integrate(pipe, draw_noise(seeds, shape), text, prompts, sigmas, guidance=args.guidance, renorm=args.renorm,
                           compare=args.norms, batch=args.batch)
    pictures = decode(pipe, x0)

    settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "height": pictures.shape[2], "width": pictures.shape[3],
                "max_sequence_length": max_tokens(pipe)}
    rows = [{"prompt": p, "seed": s, "model": args.model, "lora": args.lora, "renorm": args.renorm,
             "pipe": settings if args.renorm == "none" else None} for p, s in zip(prompts, seeds)]  # diffusers cannot renormalize
    if reward_fn:
        for row, r in zip(rows, reward_fn(pictures, prompts).tolist()):
            row["reward"] = r
        print(f"reward: {np.mean([row['reward'] for row in rows]):.4f}")
    save_samples(args.out, pictures, rows)
    if args.norms:
        write_norms(Path(args.out), sigmas, ratios)


if __name__ == "__main__":
    main(parse(Args, __doc__))
