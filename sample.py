"""Sample pictures from a flow-matching pipeline, with or without a LoRA, and measure its velocity norms.

    python sample.py --prompt "a red star" --n 16 --out runs/base
    python sample.py --lora runs/awm-sd3-pickscore-lam0.05-s0/lora --norms --out runs/guarded
    python sample.py --lora DIR --renorm match --out runs/renorm          # inference-time repair, for comparison

Writes PNGs, grid.png and samples.jsonl to OUT. Each line of samples.jsonl makes the same picture in plain diffusers (within
2/255 in fp32, as on a CPU; on a GPU diffusers keeps its latents in bf16, we in fp32; with --renorm, which diffusers cannot do,
row["pipe"] is null):

    pipe = DiffusionPipeline.from_pretrained(row["model"], dtype=torch.float32)
    pipe.load_lora_weights(row["lora"])                                    # if it is not null
    pipe(row["prompt"], generator=torch.Generator("cpu").manual_seed(row["seed"]), **row["pipe"]).images[0]

Rectified flow: x_t = (1 - t) x0 + t eps, velocity v = eps - x0, t in [0, 1], t = 1 is noise. The functions above `Args`
are what the training scripts share.
"""
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval_judge import cannot_load, check_model, fail, load_reward, make_dir, parse, read_prompts, reason, save_samples
from normguard import norm_ratio, reference, renormalize

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # NFT has two adapters and means it

LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",  # as DiffusionNFT, AWM and Flow-GRPO on SD3.5
                "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
FLUX_GUIDANCE = 3.5  # what FLUX.1-dev's guidance embedding is told, as in diffusers and Flow-GRPO


# ---------------------------------------------------------------- model

def load_pipeline(model: str, device: torch.device) -> diffusers.DiffusionPipeline:
    """A frozen pipeline from a diffusers folder or hub id: transformer and VAE on `device` (bf16 on a GPU, fp32 on a CPU),
    text encoders on the CPU until `encode_prompts` borrows the device for them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    check_model("--model", model)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except Exception as e:  # no network, a gated repository, a broken file: each library raises its own
        cannot_load("--model", model, e)
    if not isinstance(pipe, (diffusers.StableDiffusion3Pipeline, diffusers.FluxPipeline)):
        fail(f"--model {model}: is a {type(pipe).__name__}; StableDiffusion3Pipeline and FluxPipeline are supported")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


def is_flux(model: torch.nn.Module) -> bool:
    """A FLUX transformer: packed latents, position ids and a guidance embedding, where SD3's takes a picture of latents."""
    return "guidance_embeds" in model.config


def max_tokens(pipe) -> int:
    """T5's padded length. Padding is attended to, so it is part of the model's input: diffusers' default, or all a tokenizer has."""
    tokenizer, most = (pipe.tokenizer_2, 512) if is_flux(pipe.transformer) else (pipe.tokenizer_3, 256)
    return min(most, tokenizer.model_max_length) if tokenizer else most


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each unique prompt, and "" for guidance, once: prompt -> (embeds (l, d), pooled (p,)) on the CPU (SD3.5: 2.7 MB each)."""
    unique, device, text = list(dict.fromkeys([*prompts, ""])), pipe.transformer.device, {}
    encoders = [e for name, e in pipe.components.items() if name.startswith("text_encoder") and e is not None]
    for part in (pipe.transformer, pipe.vae):
        part.to("cpu")  # makes room on the GPU: T5 alone takes 9 GB
    for e in encoders:
        e.to(device)
    for i in tqdm(range(0, len(unique), 16), desc="encode prompts", leave=False):
        some = (unique[i:i + 16] + [""] * 16)[:16]  # always 16: a batch's size can change its last bits, and a resumed run has others
        if is_flux(pipe.transformer):
            embeds, pooled, _ = pipe.encode_prompt(some, device=device, max_sequence_length=max_tokens(pipe))
        else:
            embeds, _, pooled, _ = pipe.encode_prompt(some, None, None, device=device, do_classifier_free_guidance=False,
                                                      max_sequence_length=max_tokens(pipe))
        text.update(zip(unique[i:i + 16], zip(embeds.cpu(), pooled.cpu())))
    for e in encoders:
        e.to("cpu")
    for part in (pipe.transformer, pipe.vae):
        part.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # peak_gb is to tell what training takes
    return text


def stack(text: dict[str, tuple[Tensor, Tensor]], prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Encoded prompts as a batch: embeds (b, l, d) and pooled (b, p) on `device`."""
    embeds, pooled = zip(*(text[p] for p in prompts))
    return torch.stack(embeds).to(device), torch.stack(pooled).to(device)


def velocity(model: torch.nn.Module, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], guidance: float | None = None,
             null: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """v(x_t, t | text), fp32. x (b, c, h, w) for both bases, t (b,) in [0, 1], text as from `stack`. guidance > 1 mixes in
    v(x_t, t | null) on SD3; on FLUX it is what its guidance embedding is told. None: no guidance on SD3, 3.5 on FLUX."""
    if is_flux(model):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        place = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).to(x)  # (h w, 3): 0, row, column
        told = torch.ones_like(t) * (FLUX_GUIDANCE if guidance is None else guidance) if model.config.guidance_embeds else None
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):  # fp32 LoRA on a bf16 base
            v = model(hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2), timestep=t, guidance=told,
                      encoder_hidden_states=text[0], pooled_projections=text[1], img_ids=place, txt_ids=place.new_zeros(text[0].shape[1], 3),
                      return_dict=False)[0].float()
        return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)
    if guidance is not None and guidance > 1:
        text = tuple(torch.cat(pair) for pair in zip(null, text))
        v_null, v = velocity(model, torch.cat([x, x]), torch.cat([t, t]), text).chunk(2)
        return v_null + guidance * (v - v_null)
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        return model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text[0], pooled_projections=text[1],
                     return_dict=False)[0].float()


def schedule(pipe, steps: int, shape: tuple[int, int, int]) -> Tensor:
    """The pipeline's own noise levels for latents (c, h, w), its shift (by resolution on FLUX) included: (steps + 1,), from 1 down to 0."""
    config, kwargs = pipe.scheduler.config, {"num_inference_steps": steps}
    if is_flux(pipe.transformer) and not config.get("use_flow_sigmas"):
        kwargs = {"sigmas": np.linspace(1, 1 / steps, steps)}
    if config.get("use_dynamic_shifting"):
        tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)  # at so many tokens; linear between and beyond
        kwargs["mu"] = shifts[0] + (shifts[1] - shifts[0]) * (shape[1] * shape[2] // 4 - tokens[0]) / (tokens[1] - tokens[0])
    pipe.scheduler.set_timesteps(**kwargs)
    return pipe.scheduler.sigmas.cpu()


def latent_shape(pipe, size: int | None) -> tuple[int, int, int]:
    """(c, h, w) of the latents of a square picture with `size` pixels a side (None: the model's own size)."""
    f, config = 2 ** (len(pipe.vae.config.block_out_channels) - 1), pipe.transformer.config
    patch = 2 if is_flux(pipe.transformer) else config.patch_size
    size, most = pipe.vae.config.sample_size if size is None else size, config.get("pos_embed_max_size", 1024) * f * patch
    if not 0 < size <= most or size % (f * patch):
        fail(f"--size {size}: must be a multiple of {f * patch}, at most {most}")
    return pipe.vae.config.latent_channels, size // f, size // f


def draw_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """(n, c, h, w), each from its own CPU generator, as diffusers draws it."""
    return torch.stack([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s))[0] for s in seeds])


@torch.no_grad()
def integrate(pipe, noise: Tensor, text: dict, prompts: list[str], sigmas: Tensor, *, guidance: float | None = None, renorm: str = "none",
              compare: bool = False, batch: int = 64, desc: str = "sample") -> tuple[Tensor, Tensor | None]:
    """Euler from noise (n, c, h, w) down `sigmas` (steps + 1,). Returns x0 (n, c, h, w) on the CPU and, with `compare` or a
    renorm of "match" or "cap", the norm ratio to the reference at each step, (n, steps), before any renormalization."""
    model, device, out, ratios = pipe.transformer, pipe.transformer.device, [], []
    for i in tqdm(range(0, len(noise), batch), desc=desc, leave=False):
        x, inputs, steps = noise[i:i + batch].to(device), stack(text, prompts[i:i + batch], device), []
        null = stack(text, [""] * len(x), device) if guidance is not None and not is_flux(model) else None
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


def decode_batch(pipe, x0: Tensor) -> Tensor:
    """Latents (b, c, h, w) -> pictures (b, 3, h, w) fp32 in [0, 1], with a gradient where it is recorded."""
    z = (x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).to(pipe.vae.device, pipe.vae.dtype)
    return (pipe.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def decode(pipe, x0: Tensor) -> Tensor:
    """Latents (n, c, h, w) -> pictures (n, 3, h, w) fp32 in [0, 1] on the CPU, a megapixel at a time."""
    batch = max(1, 2**20 // (x0.shape[2] * x0.shape[3] * 64))
    return torch.cat([decode_batch(pipe, z).cpu() for z in x0.split(batch)])


def adjoint(pipe, noise: Tensor, text: dict, prompts: list[str], sigmas: Tensor, rewards: list, *, guidance: float | None = None,
            batch: int = 8) -> list[Tensor]:
    """How each reward would change if one step's velocity were scaled: in x_{k+1} = x_k + dt_k (1 + s_k) v_k, dR/ds_k at s = 0.

    rewards: differentiable functions (images (b, 3, h, w) in [0, 1], prompts) -> (b,). Returns (n, steps) for each. By the
    discrete adjoint a_k = a_{k+1} + dt_k (dv_k/dx_k)^T a_{k+1}, a_N = dR/dx_N, and dR/ds_k = <a_{k+1}, dt_k v_k>: one
    step's graph is held at a time, so its memory is that of one training step.
    """
    model, device, out = pipe.transformer, pipe.transformer.device, [[] for _ in rewards]
    for i in tqdm(range(0, len(noise), batch), desc="adjoint", leave=False):
        said, x = prompts[i:i + batch], noise[i:i + batch].to(device)
        inputs, null = stack(text, said, device), None if guidance is None or is_flux(model) else stack(text, [""] * len(said), device)
        path = [x]
        for now, dt in zip(sigmas.tolist(), sigmas.diff().tolist()):
            with torch.no_grad():
                path.append(path[-1] + dt * velocity(model, path[-1], torch.full((len(x),), now, device=device), inputs, guidance, null))
        last = path[-1].requires_grad_()
        pictures = decode_batch(pipe, last)
        a = [torch.autograd.grad(reward(pictures, said).sum(), last, retain_graph=r + 1 < len(rewards))[0] for r, reward in enumerate(rewards)]
        s = [[] for _ in rewards]
        for x, now, dt in reversed(list(zip(path, sigmas.tolist(), sigmas.diff().tolist()))):
            x = x.detach().requires_grad_()
            v = velocity(model, x, torch.full((len(x),), now, device=device), inputs, guidance, null)
            for r in range(len(rewards)):
                s[r].append((a[r] * dt * v.detach()).flatten(1).sum(1).cpu())
                a[r] = a[r] + torch.autograd.grad(v, x, dt * a[r], retain_graph=r + 1 < len(rewards))[0]
        for r in range(len(rewards)):
            out[r].append(torch.stack(s[r][::-1], 1))
    return [torch.cat(parts) for parts in out]


# ---------------------------------------------------------------- what the training scripts share

def rng(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its key: a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def check_numbers(args):
    """Refuse numbers that cannot work, naming the flag. A flag that a script does not have is passed over."""
    for flags, least in (("epochs groups rank updates batch timesteps save_every eval_n", 1), ("group steps", 2), ("seed eval_every lam margin kl", 0)):
        for flag in flags.split():
            if not least <= getattr(args, flag) < float("inf"):
                fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")
    for flag in ("lr", "max_grad_norm", "adv_clip", "power", "clip", "nft_beta", "dpo_beta"):
        if not 0 < getattr(args, flag, 1) < float("inf"):
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")


def draw_prompts(args) -> tuple[list[str], list[str]]:
    """The run's prompts, epochs * groups of them, each pass over the file a shuffle of its own; and eval_n held-out prompts."""
    prompts, held_out = read_prompts(args.prompts, "--prompts"), read_prompts(args.eval_prompts, "--eval-prompts")
    if args.groups > len(prompts):
        fail(f"--groups {args.groups}: more than the {len(prompts)} prompts in {args.prompts}")
    n = args.epochs * args.groups
    order = torch.cat([torch.randperm(len(prompts), generator=rng(args.seed, 0, i)) for i in range(n // len(prompts) + 1)])
    return [prompts[i] for i in order[:n]], [held_out[i % len(held_out)] for i in range(args.eval_n)]


def add_lora(model: torch.nn.Module, rank: int, seed: int, name: str = "default") -> list[torch.nn.Parameter]:
    """A LoRA with alpha = 2 rank on the attention projections of a diffusers transformer; returns its fp32 parameters."""
    torch.manual_seed(seed)
    before = {id(p) for p in model.parameters()}
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS), name)
    diffusers.training_utils.cast_training_params(model, torch.float32)
    return [p for p in model.parameters() if id(p) not in before]


def group_advantages(reward: Tensor, group: int, clip: float) -> Tensor:
    """Group mean, global std, clipped at +- clip and scaled to +- 1. reward (prompts * group,), groups contiguous -> same shape."""
    by_group = rearrange(reward, "(p k) -> p k", k=group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    return (centred / (reward.std(correction=0) + 1e-4)).clamp(-clip, clip) / clip


def stratified(n: int, strata: int, usable: int, g: torch.Generator) -> Tensor:
    """One of the schedule's first `usable` steps from each stratum, for each of n pictures: (n, strata) long."""
    bounds = torch.linspace(0, usable, strata + 1).long()
    return bounds[:-1] + (torch.rand(n, strata, generator=g) * (bounds[1:] - bounds[:-1])).long()


def clipped_step(opt: torch.optim.Optimizer, loss: float, max_norm: float) -> tuple[float, bool]:
    """Clip the gradients and step, unless the loss or a gradient is not finite. Returns the norm before clipping, and whether it stepped."""
    grad_norm = torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], max_norm).item()
    if finite := bool(np.isfinite([loss, grad_norm]).all()):
        opt.step()
    opt.zero_grad()
    return grad_norm, finite


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
    reward = "+".join(Path(r).name.replace(".py:", "-").replace(":", "") for r in args.reward.split(","))
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
    elif args_file.exists():
        print(f"{out}: holds no checkpoint yet; starts over")
    make_dir(out / "checkpoint", "--out")
    make_dir(out / "samples", "--out")
    if not args_file.exists():
        args_file.with_suffix(".tmp").write_text(json.dumps({**mine, **recorded}, indent=2) + "\n")
        args_file.with_suffix(".tmp").replace(args_file)
    with open(out / "metrics.jsonl", "a") as log:  # lines that the checkpoint does not know are written anew
        log.truncate(state["log_bytes"] if state else 0)
    return out, state


def save_checkpoint(out: Path, pipe, opt: torch.optim.Optimizer, **extra):
    """lora/ and curves.png, then all that the next epoch depends on, to a temporary name and renamed: a run killed in between
    does the epochs since the checkpoint again and writes the same files."""
    save_lora(pipe, out / "lora")
    plot_curves(out)
    tmp = out / "checkpoint" / "state.tmp"
    torch.save({"lora": get_peft_model_state_dict(pipe.transformer), "opt": opt.state_dict(), **extra,
                "log_bytes": (out / "metrics.jsonl").stat().st_size}, tmp)
    tmp.replace(out / "checkpoint" / "state.pt")


def load_checkpoint(state: dict, pipe, opt: torch.optim.Optimizer):
    """Put the LoRA and the optimizer back."""
    set_peft_model_state_dict(pipe.transformer, state["lora"])
    opt.load_state_dict(state["opt"])


def log_line(out: Path, line: dict):
    """Append a line to metrics.jsonl; a non-finite number becomes null, since JSON has none. A reward that cannot teach is told."""
    if line.get("reward_std") == 0:
        tqdm.write(f"note: epoch {line['epoch']}: the reward of all pictures is {line['reward']:g}; there is nothing to learn")
    line = json.loads(json.dumps(line), parse_constant=lambda _: None)
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
    guidance: float | None = None
    """classifier-free guidance scale (default: none), or what FLUX's guidance embedding is told (default: 3.5)"""
    size: int | None = None
    """pixels a side (default: the model's own)"""
    seed: int = 0
    """picture i starts from the noise of seed + i"""
    batch: int = 64
    """pictures at once"""
    renorm: str = "none"
    """rescale each velocity to the reference's norm: none, match, or cap (only shrink)"""
    norms: bool = False
    """measure the norm ratio to the reference at each step (before any --renorm): norms.json, norms.png"""
    adjoint: bool = False
    """how --reward, and as a control the picture's energy, would change if a step's velocity were scaled: adjoint.json, adjoint.png. A
    coherent signal has a |t statistic| well above 2 (the gray band), most pictures of one sign, half batches that agree (cosine near 1)"""
    reward: str | None = None
    """also score the pictures, as in training"""
    out: str = "runs/samples"
    """folder for the results"""


def write_norms(out: Path, sigmas: Tensor, ratios: Tensor, renormed: bool):
    """norms.json and norms.png: mean, spread and extremes of (n, steps) norm ratios at each step's t, as the model gives them."""
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
    print(f"norm ratio to the reference{', before --renorm' if renormed else ''}: mean {rows['overall']:.4f}, worst step {max(rows['mean']):.4f}")


def write_adjoint(out: Path, sigmas: Tensor, sensitivity: dict[str, Tensor], prompts: list[str]):
    """adjoint.json and adjoint.png: for each reward, dR/ds (n, steps) as the batch's mean at each step, its t statistic (mean over
    standard error), the share of pictures with the mean's sign, and the cosine of the two half batches' means. Pictures of one
    prompt are alike: the error is that of the prompts' means, and the halves have no prompt in common (with one prompt: pictures)."""
    units = prompts if len(set(prompts)) > 1 else range(len(prompts))
    place = torch.tensor([list(dict.fromkeys(units)).index(unit) for unit in units])
    rows = {"t": sigmas[:-1].tolist(), "n": len(prompts), "units": int(place.max()) + 1}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for name, s in sensitivity.items():
        s = s.double()
        mean, std = s.mean(0), s.std(0)
        of_unit = torch.stack([s[place == u].mean(0) for u in range(rows["units"])])  # (units, steps)
        t = of_unit.mean(0) / (of_unit.std(0) / len(of_unit) ** 0.5).clamp_min(1e-30)
        agree = (s.sign() == mean.sign()).double().mean(0)
        cosine = torch.nn.functional.cosine_similarity(of_unit[::2].mean(0), of_unit[1::2].mean(0), dim=0).item()
        rows[name] = {"mean": mean.tolist(), "std": std.tolist(), "t_statistic": t.tolist(), "same_sign": agree.tolist(), "half_batch_cosine": cosine}
        print(f"{name}: largest |t statistic| {t.abs().max():.1f}, same sign {agree.mean():.2f} on average, cosine of half batches {cosine:.2f}")
        for axis, values in zip(axes, (mean / std.clamp_min(1e-30), t, agree)):
            axis.plot(rows["t"], values, marker="o", markersize=3, label=f"{name} (cosine {cosine:.2f})")
    for axis, title in zip(axes, ("mean of dR/ds over its spread", "t statistic of the batch", "share of pictures with the mean's sign")):
        axis.set(title=title, xlabel="t (1 is noise)", xlim=(1.02, -0.02))
        axis.grid(alpha=0.3)
    axes[1].axhspan(-1.96, 1.96, color="gray", alpha=0.15, linewidth=0)
    axes[2].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    (out / "adjoint.json").write_text(json.dumps(rows, indent=2) + "\n")
    figure.savefig(out / "adjoint.png", dpi=130)
    plt.close(figure)


def main(args: Args):
    """Sample, measure, write."""
    if args.renorm not in ("none", "match", "cap"):
        fail(f"--renorm {args.renorm}: none, match or cap")
    if min(args.n, args.steps, args.batch) < 1:
        fail("--n, --steps and --batch must be at least 1")
    if (args.norms or args.renorm != "none") and not args.lora:
        fail("--norms and --renorm compare a LoRA with its base: give --lora")
    if args.adjoint and not args.reward:
        fail("--adjoint asks how a reward would change: give --reward")
    prompts = [args.prompt] if args.prompt is not None else read_prompts(args.prompts, "--prompts")
    prompts = [p for p in prompts for _ in range(args.n)]
    seeds = list(range(args.seed, args.seed + len(prompts)))
    if args.lora and not (Path(args.lora) / "pytorch_lora_weights.safetensors").is_file():
        fail(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors; a run keeps it in its lora/ folder")
    make_dir(args.out, "--out")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.model, device)
    if args.lora:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # peft's, of weights that have no place in this model
                pipe.load_lora_weights(args.lora)
            pipe.transformer.active_adapters()  # raises where the file held nothing for the transformer
        except Exception as e:  # of another rank, model or library: peft, diffusers and safetensors each raise their own
            fail(f"--lora {args.lora}: does not fit --model {args.model} ({reason(e)})")
    reward_fn = load_reward(args.reward, device) if args.reward else None
    shape, text = latent_shape(pipe, args.size), encode_prompts(pipe, prompts)
    sigmas = schedule(pipe, args.steps, shape)
    x0, ratios = integrate(pipe, draw_noise(seeds, shape), text, prompts, sigmas, guidance=args.guidance, renorm=args.renorm,
                           compare=args.norms, batch=args.batch)
    pictures = decode(pipe, x0)

    guidance = (FLUX_GUIDANCE if is_flux(pipe.transformer) else 1.0) if args.guidance is None else args.guidance
    settings = {"num_inference_steps": args.steps, "guidance_scale": guidance, "height": pictures.shape[2], "width": pictures.shape[3],
                "max_sequence_length": max_tokens(pipe)}
    rows = [{"prompt": p, "seed": s, "model": args.model, "lora": args.lora, "renorm": args.renorm,
             "pipe": settings if args.renorm == "none" else None} for p, s in zip(prompts, seeds)]  # diffusers cannot renormalize
    if reward_fn:
        for row, r in zip(rows, reward_fn(pictures, prompts).tolist()):
            row["reward"] = r
        print(f"reward: {np.mean([row['reward'] for row in rows]):.4f}")
    save_samples(args.out, pictures, rows)
    if args.adjoint:
        sensitivity = adjoint(pipe, draw_noise(seeds, shape), text, prompts, sigmas, guidance=args.guidance, batch=max(1, args.batch // 8), rewards=[
            load_reward(args.reward, device, differentiable=True), lambda images, _: (2 * images - 1).square().mean((1, 2, 3))])
        write_adjoint(Path(args.out), sigmas, dict(zip((args.reward, "energy (control)"), sensitivity)), prompts)
    if args.norms:
        write_norms(Path(args.out), sigmas, ratios, args.renorm != "none")


if __name__ == "__main__":
    main(parse(Args, __doc__))
