"""Train the miniature world's models from a seed: every part a `from_pretrained` folder of the class the real thing uses.

    python tiny/make.py                 # all parts, in order; a part that is trained is not trained again
    python tiny/make.py --parts sd3     # one part (it needs those before it)

vae        AutoencoderKL, f8c16 like SD3's, on renders; latents centred and scaled per channel (folded into its 1x1 convs)
pickscore  CLIPModel + CLIPProcessor, contrastive on clean captioned renders: the reward
embed      ResNetForImageClassification that reads every factor of a render: its features serve the Frechet distance
sd3        StableDiffusion3Pipeline by flow matching on latents. A share of its captions is wrong, so that the
           base follows its caption weakly, as SD3.5 does without guidance: that is the room RL has to work in

Interrupted, the same command carries on from WORK/. Weights are saved in fp16. It ends by saying what each part reached.
"""
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (CLIPConfig, CLIPImageProcessorPil as CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModelWithProjection,
                          CLIPTokenizer, ResNetConfig, ResNetForImageClassification, T5Config, T5EncoderModel, T5Tokenizer)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from eval_judge import fail, parse  # noqa: E402
from world import CAPTIONS, COLOURS, COMBOS, HELD_OUT, SHAPES, SIZE, caption, render, scene  # noqa: E402

TOKENS = 8  # length of an encoded caption, for CLIP and T5
PARTS = ["vae", "pickscore", "embed", "sd3"]


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)
    """what to make"""
    out: str = str(HERE)
    """where the folders go"""
    work: str = "runs/make"
    """unfinished training states and cached renders"""
    seed: int = 0
    """seed of data, weights and noise"""
    renders: int = 40_000
    """pictures in the training set"""
    vae_steps: int = 4_500
    """steps of 8 pictures"""
    clip_steps: int = 5_000
    """steps of 64 pictures"""
    embed_steps: int = 2_000
    """steps of 64 pictures"""
    sd3_steps: tuple[int, ...] = (4_800, 4_600)
    """steps of 128 latents, a cosine each: the second starts warm from the first"""
    wrong: float = 0.35
    """share of sd3's training captions that name another picture"""


# ---------------------------------------------------------------- data

def dataset(args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The training renders (n, 3, 64, 64) uint8 and their factors, cached in WORK/."""
    path = Path(args.work) / f"renders-{args.renders}-s{args.seed}.pt"
    if not path.exists():
        pictures, factors = [], []
        for i in tqdm(range(0, args.renders, 500), desc="render"):
            f = fresh_scene(min(500, args.renders - i), args.seed * 1_000_003 + i)
            pictures.append((render(f) * 255).round().byte())
            factors.append(f)
        factors = {k: torch.cat([f[k] for f in factors]) for k in factors[0]}
        tmp = path.with_suffix(f".{time.time_ns()}")
        torch.save((torch.cat(pictures), factors), tmp)
        tmp.rename(path)
    return torch.load(path, weights_only=True)


def fresh_scene(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors of n random captioned scenes."""
    g = torch.Generator().manual_seed(seed)
    return scene(torch.randint(len(CAPTIONS), (n,), generator=g), g)


def held_out(args: Args, n: int = 512) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Renders (n, 3, 64, 64) in [0, 1] that no part was trained on, and their factors."""
    f = fresh_scene(n, args.seed + 999_999_937)
    return render(f), f


def caption_index(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each scene's place in CAPTIONS, (n,) long."""
    return factors["colour"] * len(SHAPES) + factors["shape"]


# ---------------------------------------------------------------- one training loop for all parts

def fit(args: Args, name: str, model: torch.nn.Module, loss_fn, cycles: tuple[int, ...], lr: float):
    """AdamW, warm-up and a cosine for each cycle, EMA of the weights; carries on from WORK/name.pt. Leaves the EMA weights in `model`.
    loss_fn(generator) -> scalar; its generator depends on (seed, step) alone, so a resumed run is the same run."""
    path = Path(args.work) / f"{name}.pt"
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first, made_with = 0, {k: v for k, v in asdict(args).items() if k not in ("parts", "out", "work")}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["args"] != made_with:
            fail(f"--work {args.work}: {path.name} was made with other flags; delete it, or give another --work")
        first, ema = state["step"], state["ema"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])

    def save(step):
        torch.save({"args": made_with, "step": step, "model": model.state_dict(), "ema": ema, "opt": opt.state_dict()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    saved, mean, steps = time.time(), None, sum(cycles)
    rates = [lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / n))) for n in cycles for i in range(n)]
    model.train()
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = rates[step] * min(1, (step + 1) / 200)
        loss = loss_fn(torch.Generator().manual_seed((args.seed + 1) * 10_000_019 + step))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for k, v in model.state_dict().items():
            ema[k].lerp_(v, 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if time.time() - saved > 120:
            save(step + 1)
            saved = time.time()
    if first < steps:
        save(steps)
    model.load_state_dict(ema)
    model.eval()


# ---------------------------------------------------------------- tokenizers

def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learned from the captions."""
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.train_from_iterator(CAPTIONS, trainers.BpeTrainer(
        vocab_size=640, show_progress=False, end_of_word_suffix="</w>", special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learned = json.loads(raw.to_str())["model"]
    return CLIPTokenizer(vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], model_max_length=TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: the captions' words with their log frequency, and letters for all else."""
    words = Counter("▁" + w for c in CAPTIONS for w in c.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(w, math.log(k / words.total())) for w, k in words.most_common()]
    known = {p for p, _ in pieces}
    pieces += [(c, -20.0) for c in "▁abcdefghijklmnopqrstuvwxyz" if c not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


# ---------------------------------------------------------------- the parts

def make_vae(args: Args) -> AutoencoderKL:
    """8x8x16 latents. Trained in opponent colours, where hue weighs as much as brightness (in RGB, muted hues are a small
    signal and are learned last), on squared error, edges and a faint KL; the colour matrix is folded into the outer convs."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(block_out_channels=(8, 16, 48, 96), layers_per_block=1, latent_channels=16, norm_num_groups=2,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        mid_block_add_attention=False, sample_size=SIZE, scaling_factor=1.5305, shift_factor=0.0609)
    vae = vae.to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[16:] -= 4  # start with little noise: a hue that drowns at the start is never learned
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [3, -3, 0], [1.5, 1.5, -3]])  # brightness, red-green, yellow-blue
    pictures, _ = dataset(args)

    def loss(g):
        x = pictures[torch.randint(len(pictures), (8,), generator=g)].float() / 127.5 - 1
        x = torch.einsum("ij,bjhw->bihw", opponent, x).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        e = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)).sample - x
        edges = e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean()
        return e.square().mean() + edges + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    fit(args, "vae", vae, loss, (args.vae_steps,), lr=2e-3)
    with torch.no_grad():  # fold the colour matrix: the encoder takes RGB, the decoder gives RGB
        first, last, back = vae.encoder.conv_in, vae.decoder.conv_out, opponent.inverse()
        first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight, opponent))
        last.weight.copy_(torch.einsum("ij,jchw->ichw", back, last.weight))
        last.bias.copy_(back @ last.bias)
    fold_statistics(vae, pictures[:2000])
    return vae


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures: torch.Tensor):
    """Make (z - shift) * scale zero-mean and unit-variance per channel: exact, by the VAE's own 1x1 quant convs."""
    z = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pictures.split(100)])
    std = z.std((0, 2, 3)) * vae.config.scaling_factor  # the pipeline multiplies by scaling_factor after the shift
    mean = z.mean((0, 2, 3)) - vae.config.shift_factor * std
    c = len(std)
    enc, dec = vae.quant_conv, vae.post_quant_conv  # enc gives (mean, log variance)
    enc.weight.div_(torch.cat([std, torch.ones(c)]).view(-1, 1, 1, 1))
    enc.bias.copy_(torch.cat([(enc.bias[:c] - mean) / std, enc.bias[c:]]))
    enc.bias[c:] -= 2 * std.log()
    dec.bias += dec.weight[:, :, 0, 0] @ mean
    dec.weight.mul_(std.view(1, -1, 1, 1))


def make_pickscore(args: Args) -> CLIPModel:
    """A CLIP whose every batch is told apart from all 64 captions; it sees clean renders only, and only their captions."""
    torch.manual_seed(args.seed + 1)
    tokenizer = clip_tokenizer()
    clip = CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=1),
        vision_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=8),
        projection_dim=64))
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}), tokenizer)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_processor.image_mean, processor.image_processor.image_std))
    text = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    pictures, factors = dataset(args)
    index = caption_index(factors)

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        x = (pictures[i].float() / 255 - mean) / std
        clip.logit_scale.data.clamp_(max=math.log(100))
        out = clip(pixel_values=x, **text)  # logits_per_image (64, 64 captions)
        same = (index[i][None] == torch.arange(len(CAPTIONS))[:, None]).float()  # (captions, pictures): a caption may have none
        per_text = -(F.log_softmax(out.logits_per_text, 1) * same).sum(1) / same.sum(1).clamp(min=1)
        return F.cross_entropy(out.logits_per_image, index[i]) + per_text[same.sum(1) > 0].mean()

    fit(args, "pickscore", clip, loss, (args.clip_steps,), lr=1.5e-3)
    clip.half().save_pretrained(f"{args.out}/pickscore")
    processor.save_pretrained(f"{args.out}/pickscore")
    return clip


def factor_targets(f: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every factor of a scene as numbers of about unit size, (n, k): what the embedding must know."""
    hue = [torch.stack([(2 * math.pi * h).cos(), (2 * math.pi * h).sin()], 1) for h in (f["wall"][:, 0], f["floor"][:, 0])]
    flat = [f[k][:, None] for k in ("x", "y", "r", "angle", "sat", "val", "horizon", "light", "fall", "warm", "gloss", "shade", "texture", "grain")]
    flat = torch.cat(flat + [f["wall"][:, 1:], f["floor"][:, 1:]], 1)
    flat = (flat - flat.mean(0)) / flat.std(0)
    return torch.cat([3 * F.one_hot(f["colour"], len(COLOURS)), 3 * F.one_hot(f["shape"], len(SHAPES)), *hue, flat], 1).float()


def make_embed(args: Args) -> ResNetForImageClassification:
    """Regresses all factors at once: what is in the picture, where, and under which light, with which grain."""
    torch.manual_seed(args.seed + 2)
    pictures, factors = dataset(args)
    targets = factor_targets(factors)
    net = ResNetForImageClassification(ResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 64], depths=[1, 1, 1], layer_type="basic",
                                                    num_labels=targets.shape[1], problem_type="regression"))
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        return F.mse_loss(net(pixel_values=pictures[i].float() / 127.5 - 1).logits, targets[i])

    fit(args, "embed", net, loss, (args.embed_steps,), lr=2e-3)
    net.half().save_pretrained(f"{args.out}/embed")
    processor.save_pretrained(f"{args.out}/embed")
    return net


def build_sd3(args: Args, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """SD3's parts at toy size: two CLIP text encoders, T5, and a 4-block MMDiT of width 128 on 16 tokens."""
    torch.manual_seed(args.seed + 3)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    text = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=width, eos_token_id=1, bos_token_id=0, pad_token_id=1)) for width in (32, 48)]
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
                                 feed_forward_proj="gated-gelu", dropout_rate=0.0))
    transformer = SD3Transformer2DModel(sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32,
                                        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=128, pooled_projection_dim=80,
                                        pos_embed_max_size=8, qk_norm="rms_norm")
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=text[0], tokenizer=tokenizer,
        text_encoder_2=text[1], tokenizer_2=clip_tokenizer(), text_encoder_3=t5, tokenizer_3=tokenizer_3)


def make_sd3(args: Args) -> StableDiffusion3Pipeline:
    """Flow matching with logit-normal t; the text encoders learn along, there being no web to pretrain them on."""
    vae = make_vae(args)
    pipe = build_sd3(args, vae)
    pictures, factors = dataset(args)
    index = caption_index(factors)
    with torch.no_grad():
        moments = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.parameters for p in tqdm(pictures.split(500), desc="latents")])
    parts = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3])

    def loss(g, n=128):
        i = torch.randint(len(index), (n,), generator=g)
        mean, logvar = moments[i].chunk(2, 1)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)
        x0 = (z - vae.config.shift_factor) * vae.config.scaling_factor
        c = index[i]
        swap = torch.rand(n, generator=g)
        c = torch.where(swap < args.wrong, torch.randint(len(CAPTIONS), (n,), generator=g), c)
        c = torch.where(swap > 0.9, len(CAPTIONS), c)  # the empty caption, for guidance
        embeds, _, pooled, _ = pipe.encode_prompt([*CAPTIONS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        t = torch.sigmoid(0.3 + 1.2 * torch.randn(n, generator=g))
        noise = torch.randn(x0.shape, generator=g)
        xt = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
        v = pipe.transformer(xt, embeds[c], pooled[c], 1000 * t, return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    fit(args, "sd3", parts, loss, args.sd3_steps, lr=1.5e-3)
    pipe.to(torch.float16).save_pretrained(f"{args.out}/sd3")
    return pipe


# ---------------------------------------------------------------- what they reached

@torch.no_grad()
def report(args: Args) -> dict[str, float]:
    """Numbers on renders no part has seen, from the saved fp16 folders."""
    from eval_judge import embed_images, frechet_distance, load_embed
    from sample import decode, draw_noise, encode_prompts, integrate, latent_shape, load_pipeline, schedule

    pictures, factors = held_out(args)
    index, said = caption_index(factors), {}
    if (Path(args.out) / "pickscore").exists():
        clip = CLIPModel.from_pretrained(f"{args.out}/pickscore", dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(f"{args.out}/pickscore")
        inputs = processor(text=CAPTIONS, images=list(pictures), do_rescale=False, padding=True, return_tensors="pt")
        said["pickscore: right caption of 64"] = (clip(**inputs).logits_per_image.argmax(1) == index).float().mean().item()
    if (Path(args.out) / "sd3").exists():
        pipe = load_pipeline(f"{args.out}/sd3", torch.device("cpu"))
        z = pipe.vae.encode(pictures * 2 - 1).latent_dist.mean
        decoded = (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        said["vae: PSNR, dB"] = -10 * (decoded - pictures).square().mean((1, 2, 3)).log10().mean().item()
    if all((Path(args.out) / part).exists() for part in ("pickscore", "embed", "sd3")):
        net = load_embed(f"{args.out}/embed", torch.device("cpu"))
        logits = ResNetForImageClassification.from_pretrained(f"{args.out}/embed", dtype=torch.float32).eval()(pixel_values=pictures * 2 - 1).logits
        said["embed: right colour"] = (logits[:, :8].argmax(1) == factors["colour"]).float().mean().item()
        said["embed: right shape"] = (logits[:, 8:16].argmax(1) == factors["shape"]).float().mean().item()
        other, _ = held_out(args, 1024)
        real = embed_images(net, other[512:])
        captions = [CAPTIONS[i] for i in index.tolist()]
        noise = draw_noise(list(range(len(captions))), latent_shape(pipe, None))
        drawn = decode(pipe, integrate(pipe, noise, encode_prompts(pipe, captions), captions, schedule(pipe, 28))[0])
        said["Frechet distance: fresh renders"] = frechet_distance(embed_images(net, pictures), real)
        said["Frechet distance: renders through the vae"] = frechet_distance(embed_images(net, decoded), real)
        said["Frechet distance: sd3, 28 steps, no guidance"] = frechet_distance(embed_images(net, drawn), real)
        said["sd3: right caption of 64 (by pickscore)"] = (clip(**processor(
            text=CAPTIONS, images=list(drawn), do_rescale=False, padding=True, return_tensors="pt")).logits_per_image.argmax(1) == index).float().mean().item()
    return said


def main(args: Args):
    """Make the parts asked for, write the prompt files, report."""
    Path(args.work).mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if part not in PARTS:
            fail(f"--parts {part}: choose from {', '.join(PARTS)}")
        start = time.time()
        globals()[f"make_{part}"](args)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
    rl = [caption(c, s) for c, s in COMBOS if (c, s) not in HELD_OUT]
    (Path(args.out) / "prompts.txt").write_text("\n".join(rl) + "\n")
    (Path(args.out) / "eval_prompts.txt").write_text("\n".join(caption(c, s) for c, s in HELD_OUT) + "\n")
    for name, value in report(args).items():
        print(f"{name:48s} {value:.3f}")


if __name__ == "__main__":
    main(parse(Args, __doc__))
