"""Train the miniature world's models from a seed. Each is a `from_pretrained` folder of the real model's class.

    python tiny/make.py                 # all parts, in order; a part that is trained is not trained again
    python tiny/make.py --parts sd3     # one part, which needs those before it

    vae        AutoencoderKL with 8x8x16 latents like SD3's, trained on renders
    pickscore  CLIPModel, contrastive on clean captioned renders: the reward
    hps        CLIPModel of other data, fine-tuned on preference pairs: the other reward
    embed      ResNetForImageClassification that reads the factors of a render; the Fréchet distance uses its features
    sd3        StableDiffusion3Pipeline, trained by flow matching on latents. A fraction of its captions is wrong, so
               that it follows its caption weakly, as SD3.5 does without guidance. This leaves room for RL
    flux       FluxPipeline on the same latents; its guidance embedding is told how often captions are wrong
    judge      LlavaForConditionalGeneration that answers eval_judge.py's questions about pictures
    forensic   ResNetForImageClassification that tells renders from samples of the bases and of their relatives

All weights are trained anew. The architectures are the config.json files of the committed folders, whose tokenizers and
processors are also taken over. An interrupted command continues from WORK/ when it is run again. Weights are saved in
fp16.
"""
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import diffusers as D
import torch
import torch.nn.functional as F
import transformers as T
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import CAPTIONS, COLOURS, COMBOS, FLAWS, HELD_OUT, SHAPES, SIZE, caption, degrade, render, scene

from eval_judge import PAIR, SINGLE
from flow.cli import InputError, check_flags, check_place, make_dir, one_line_errors, parse
from flow.judge import messages
from flow.pictures import to_image
from flow.pipeline import add_noise, decode, draw_noise, encode_prompts, integrate, load_pipeline, schedule

CPU = torch.device("cpu")
TOKENS = 8  # length of an encoded caption, for CLIP and T5
WRONG = 0.35  # fraction of sd3's training captions that name another picture
Part = Literal["vae", "pickscore", "hps", "embed", "sd3", "flux", "judge", "forensic"]
NEEDS = {"judge": ("sd3", "flux"), "forensic": ("sd3", "flux")}  # parts whose pictures a part is trained on
STEPS = {  # of each training in WORK/
    "vae": 4_500,  # steps of 8 pictures
    "decoder": 6_000,  # of 16 pictures
    "pickscore": 4_000,  # of 64 pictures
    "hps-clip": 4_000,  # of 64 pictures
    "hps": 2_000,  # of 32 pairs
    "embed": 2_000,  # of 64 pictures
    "sd3": 20_000,  # of 64 latents
    "flux": 12_000,  # of 64 latents
    "judge-eyes": 2_500,  # the judge's vision tower: of 64 pictures
    "judge": 1_500,  # of 32 pairs and 32 single pictures
    "forensic": 2_000,  # of 64 pictures
}  # and 200 for each of the bases' relatives


@dataclass(frozen=True)
class Args:
    parts: tuple[Part, ...] = get_args(Part)
    """what to make"""
    out: str = str(HERE)
    """where the models' folders go"""
    work: str = "runs/make"
    """folder for unfinished trainings"""
    seed: int = 0
    """seed of data, weights and noise"""
    renders: int = 40_000
    """pictures in the training set"""
    divide: int = 1
    """divide the steps of every training by this number, to try things out"""
    compile: bool = False
    """train the two bases with torch.compile: a fifth faster, but needs a C++ compiler"""


# ---------------------------------------------------------------- data

@functools.cache
def dataset(args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The training renders (n, 3, 64, 64) uint8 and their factors."""
    pictures, factors = [], []
    for i in tqdm(range(0, args.renders, 500), desc="render"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        f = scene(torch.randint(len(CAPTIONS), (min(500, args.renders - i),), generator=g), g)
        pictures.append((render(f) * 255).round().byte())
        factors.append(f)
    return torch.cat(pictures), {k: torch.cat([f[k] for f in factors]) for k in factors[0]}


def caption_index(factors: dict[str, Tensor]) -> Tensor:
    """The place of each scene's caption in CAPTIONS, (n,) long."""
    return factors["colour"] * len(SHAPES) + factors["shape"]


def signed(pictures: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------- one training loop for all parts

def fit(args: Args, name: str, model: torch.nn.Module, loss_fn: Callable, lr: float):
    """Train `model` by AdamW with warm-up and cosine decay, and leave the EMA of its weights in it. Continues from
    WORK/name.pt. Takes STEPS[name] steps of loss_fn(generator) -> scalar. The generator depends only on seed
    and step, so an interrupted training gives the same result."""
    path, steps = Path(args.work) / f"{name}.pt", max(1, STEPS.get(name, 200) // args.divide)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99),
                            weight_decay=0.01)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first, made_with = 0, {"seed": args.seed, "renders": args.renders, "steps": steps}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["args"] != made_with:
            raise InputError(f"--work {args.work}: {path.name} was made with other flags; delete it, or give another "
                             "--work")
        first, ema = state["step"], state["ema"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])

    saved, mean = time.time(), None
    model.train()
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
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
        if time.time() - saved > 120 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": ema, "opt": opt.state_dict()}
            torch.save({"args": made_with, "step": step + 1, **state}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            saved = time.time()
    model.load_state_dict(ema)
    model.eval()


def untrained(kind: type, part: str):
    """A model with random weights, of the architecture in tiny/PART/config.json."""
    if issubclass(kind, D.ModelMixin):
        return kind.from_config(kind.load_config(HERE / part))
    return kind(kind.config_class.from_pretrained(HERE / part, dtype=torch.float32))


def save_part(args: Args, name: str, model: torch.nn.Module, processor):
    """Write a part's folder."""
    model.half().save_pretrained(f"{args.out}/{name}")
    processor.save_pretrained(f"{args.out}/{name}")


# ---------------------------------------------------------------- the VAE

def make_vae(args: Args) -> tuple[D.AutoencoderKL, Tensor]:
    """Train the VAE on squared error, edges and a faint KL. It is trained in opponent colours, in which hue counts as
    much as brightness; in RGB, muted hues are a small signal that is learned last. In the end the colour matrix is
    folded into the outer convolutions. Returns the VAE, and `encode_pictures` of the training renders in fp16."""
    torch.manual_seed(args.seed)
    vae = untrained(D.AutoencoderKL, "sd3/vae").to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[16:] -= 4  # start with little noise: otherwise hues are never learned
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [3, -3, 0], [1.5, 1.5, -3]])  # brightness, red-green, yellow-blue
    pictures, _ = dataset(args)

    def loss(g):
        x = signed(pictures[torch.randint(len(pictures), (8,), generator=g)])
        x = torch.einsum("ij,bjhw->bihw", opponent, x).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        e = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)).sample - x
        edges = e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean()
        return e.square().mean() + edges + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    fit(args, "vae", vae, loss, lr=2e-3)
    with torch.no_grad():  # now encoder and decoder work in RGB
        first, last, inverse = vae.encoder.conv_in, vae.decoder.conv_out, opponent.inverse()
        first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight, opponent))
        last.weight.copy_(torch.einsum("ij,jchw->ichw", inverse, last.weight))
        last.bias.copy_(inverse @ last.bias)
    fold_statistics(vae, pictures[:2000])
    posteriors = encode_pictures(vae, pictures, 500).half()

    def sharpen(g):
        i = torch.randint(len(pictures), (16,), generator=g)
        e = vae.decode(draw_latents(posteriors[i], g)).sample - signed(pictures[i])
        e = torch.einsum("ij,bjhw->bihw", opponent, e)
        return e.square().mean() + 2 * (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean())

    fit(args, "decoder", vae.decoder, sharpen, lr=1e-3)
    return vae, posteriors


@torch.no_grad()
def encode_pictures(vae: D.AutoencoderKL, pictures: Tensor, at_once: int) -> Tensor:
    """Pictures (n, 3, 64, 64) uint8 -> the encoder's mean and log variance, (n, 32, 8, 8)."""
    return torch.cat([vae.encode(signed(x)).latent_dist.parameters for x in pictures.split(at_once)])


def draw_latents(posteriors: Tensor, g: torch.Generator) -> Tensor:
    """Draw from posteriors (n, 32, 8, 8) of mean and log variance: (n, 16, 8, 8)."""
    mean, logvar = posteriors.float().chunk(2, 1)
    return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)


@torch.no_grad()
def fold_statistics(vae: D.AutoencoderKL, pictures: Tensor):
    """Give (z - shift) * scale mean 0 and variance 1 in each channel, exactly, by changing the 1x1 convolutions."""
    z = encode_pictures(vae, pictures, 100).chunk(2, 1)[0]
    std = z.std((0, 2, 3)) * vae.config.scaling_factor  # the pipeline multiplies by scaling_factor after the shift
    mean = z.mean((0, 2, 3)) - vae.config.shift_factor * std
    c = len(std)
    enc, dec = vae.quant_conv, vae.post_quant_conv  # enc gives mean and log variance
    enc.weight.div_(torch.cat([std, torch.ones(c)]).view(-1, 1, 1, 1))
    enc.bias.copy_(torch.cat([(enc.bias[:c] - mean) / std, enc.bias[c:]]))
    enc.bias[c:] -= 2 * std.log()
    dec.bias += dec.weight[:, :, 0, 0] @ mean
    dec.weight.mul_(std.view(1, -1, 1, 1))


@torch.no_grad()
def through_vae(args: Args, pictures: Tensor) -> Tensor:
    """Encode and decode pictures (n, 3, 64, 64) uint8."""
    vae = D.AutoencoderKL.from_pretrained(f"{args.out}/sd3/vae", dtype=torch.float32)
    chunks = tqdm(pictures.split(100), desc="through the vae")
    decoded = [vae.decode(vae.encode(signed(x)).latent_dist.mean).sample / 2 + 0.5 for x in chunks]
    return (torch.cat(decoded).clamp(0, 1) * 255).round().byte()


# ---------------------------------------------------------------- the rewards and the embedding

def clip_pixels(pictures: Tensor) -> Tensor:
    """Normalize pictures in [0, 1] as CLIP's processor does."""
    return (pictures - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def contrastive(logits: Tensor, index: Tensor) -> Tensor:
    """CLIP's loss. Each picture must find its caption among all captions, and each caption its pictures in the batch.
    logits (pictures, captions), index (pictures,)."""
    same = (index[None] == torch.arange(logits.shape[1])[:, None]).float()  # (captions, pictures)
    per_text = -(F.log_softmax(logits.T, 1) * same).sum(1) / same.sum(1).clamp(min=1)
    return F.cross_entropy(logits, index) + per_text[same.sum(1) > 0].mean()  # without captions that have no picture


def fit_clip(args: Args, name: str, clip: T.CLIPModel, processor: T.CLIPProcessor):
    """Train a CLIP on clean renders, against all 64 captions in every batch."""
    text = processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    pictures, factors = dataset(args)
    index = caption_index(factors)

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        clip.logit_scale.data.clamp_(max=math.log(100))
        out = clip(pixel_values=clip_pixels(pictures[i].float() / 255), **text)  # logits_per_image (64, 64 captions)
        return contrastive(out.logits_per_image, index[i])

    fit(args, name, clip, loss, lr=1.5e-3)


def make_pickscore(args: Args):
    """The first reward: a CLIP of pictures and captions."""
    torch.manual_seed(args.seed + 1)
    clip, processor = untrained(T.CLIPModel, "pickscore"), T.CLIPProcessor.from_pretrained(HERE / "pickscore")
    fit_clip(args, "pickscore", clip, processor)
    save_part(args, "pickscore", clip, processor)


def make_hps(args: Args):
    """The second reward: a CLIP of other width, patch, seed and data, then fine-tuned on preference pairs, as HPS is.
    Preferred are a picture of the caption to one of another caption, and a clean picture to its own blurred, noisy or
    dim copy. A tenth of the contrastive loss is kept; without it a third of the captions is forgotten."""
    torch.manual_seed(args.seed + 5)
    args = replace(args, seed=args.seed + 77, renders=args.renders // 2)
    clip, processor = untrained(T.CLIPModel, "hps"), T.CLIPProcessor.from_pretrained(HERE / "hps")
    fit_clip(args, "hps-clip", clip, processor)
    text = processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    pictures, factors = dataset(args)
    index = caption_index(factors)

    def loss(g, n=32):
        i, other = torch.randint(len(pictures), (2, n), generator=g)
        better, worse = pictures[i].float() / 255, pictures[other].float() / 255
        blurred = F.interpolate(F.avg_pool2d(better, 4), SIZE, mode="bilinear")
        strength = torch.rand(n, 1, 1, 1, generator=g)
        kind = torch.randint(6, (n, 1, 1, 1), generator=g)  # 0 blurred, 1 noisy, 2 dim, 3 to 5 another picture
        noise = torch.randn(better.shape, generator=g)
        worse = torch.where(kind == 0, torch.lerp(better, blurred, 0.3 + 0.7 * strength), worse)
        worse = torch.where(kind == 1, better + (0.05 + 0.15 * strength) * noise, worse)
        worse = torch.where(kind == 2, better * (0.8 - 0.5 * strength), worse)
        out = clip(pixel_values=clip_pixels(torch.cat([better, worse]).clamp(0, 1)), **text)
        better, worse = out.logits_per_image.gather(1, index[i].repeat(2)[:, None]).chunk(2)
        counts = ((index[i] != index[other]) | (kind.flatten() < 3)).float()  # not two pictures of one caption
        preference = (F.softplus(worse - better)[:, 0] * counts).sum() / counts.sum()
        return preference + 0.1 * contrastive(out.logits_per_image[:n], index[i])

    fit(args, "hps", clip, loss, lr=3e-4)
    save_part(args, "hps", clip, processor)


def factor_targets(f: dict[str, Tensor]) -> Tensor:
    """All factors of a scene but texture and grain, as numbers of about unit size, (n, k)."""
    turns = [2 * math.pi * f[surface][:, 0] for surface in ("wall", "floor")]
    hue = [torch.stack([turn.cos(), turn.sin()], 1) for turn in turns]
    names = ("x", "y", "r", "angle", "sat", "val", "horizon", "light", "fall", "warm", "gloss", "shade")
    flat = torch.cat([f[name][:, None] for name in names] + [f["wall"][:, 1:], f["floor"][:, 1:]], 1)
    flat = (flat - flat.mean(0)) / flat.std(0)
    colour, shape = F.one_hot(f["colour"], len(COLOURS)), F.one_hot(f["shape"], len(SHAPES))
    return torch.cat([3 * colour, 3 * shape, *hue, flat], 1).float()


def make_embed(args: Args):
    """The embedding: a regression of all factors at once. Its training pictures get random grain, so that it ignores
    grain, which the VAE does not keep."""
    torch.manual_seed(args.seed + 2)
    pictures, factors = dataset(args)
    targets = factor_targets(factors)
    net = untrained(T.ResNetForImageClassification, "embed")

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        grain = 0.04 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(64, 3, SIZE, SIZE, generator=g)
        return F.mse_loss(net(pixel_values=signed(pictures[i]) + grain).logits, targets[i])

    fit(args, "embed", net, loss, lr=2e-3)
    save_part(args, "embed", net, T.CLIPImageProcessorPil.from_pretrained(HERE / "embed"))


# ---------------------------------------------------------------- the bases

def build_base(kind: type, name: str, vae: D.AutoencoderKL, models: dict[str, type], seed: int):
    """A pipeline whose `models` have random weights. Word embeddings of CLIP start at 0.02; here they are of order 1,
    as in a trained encoder."""
    torch.manual_seed(seed)
    parts = {part: untrained(of_kind, f"{name}/{part}") for part, of_kind in models.items()}
    for part in parts.values():
        if isinstance(part, (T.CLIPTextModel, T.CLIPTextModelWithProjection)):
            part.get_input_embeddings().weight.data.mul_(50)
    pipe = kind.from_pretrained(HERE / name, vae=vae, **parts)
    pipe.register_to_config(_name_or_path=f"tiny/{name}")  # not this machine's path
    return pipe


@torch.no_grad()
def encode_captions(pipe, captions: list[str]) -> tuple[Tensor, Tensor]:
    """A base's text embeddings (n, l, d), and pooled ones (n, p)."""
    if isinstance(pipe, D.FluxPipeline):
        return pipe.encode_prompt(captions, max_sequence_length=TOKENS)[:2]
    encoded = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return encoded[0], encoded[2]


def denoise(model: torch.nn.Module, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
    """The velocity of a base in training. x (n, 16, 8, 8), t and guidance (n,), embeds and pooled as from
    `encode_captions`. SD3 ignores guidance."""
    given = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
    if not isinstance(model, D.FluxTransformer2DModel):
        return model(hidden_states=x, timestep=1000 * t, **given)[0]
    h, w = x.shape[2] // 2, x.shape[3] // 2
    img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).to(x)  # (h w, 3): 0, row, column
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    txt_ids = torch.zeros(embeds.shape[1], 3)
    v = model(hidden_states=tokens, timestep=t, guidance=guidance, img_ids=img_ids, txt_ids=txt_ids, **given)[0]
    return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)


def flow_loss(vae: D.AutoencoderKL, pipe, index: Tensor, posteriors: Tensor) -> Callable:
    """A base's loss for `fit`: flow matching with logit-normal t. index (n,): the pictures' captions; posteriors
    (n, 32, 8, 8): their latents. FLUX's guidance embedding learns how far to trust the caption, as guidance
    distillation would teach it: at guidance 1 most captions are wrong, at 6 none is, at 3.5 as many as for SD3."""
    embeds, pooled = encode_captions(pipe, [*CAPTIONS, ""])

    def loss(g, n=64):
        i = torch.randint(len(index), (n,), generator=g)
        x0 = (draw_latents(posteriors[i], g) - vae.config.shift_factor) * vae.config.scaling_factor
        guidance = 1 + 5 * torch.rand(n, generator=g)
        wrong = WRONG * (6 - guidance) / 2.5 if isinstance(pipe, D.FluxPipeline) else WRONG
        c, swap = index[i], torch.rand(n, generator=g)
        c = torch.where(swap < wrong, torch.randint(len(CAPTIONS), (n,), generator=g), c)
        c = torch.where(swap > 0.9, len(CAPTIONS), c)  # the empty caption, for guidance
        t = torch.sigmoid(0.3 + 1.2 * torch.randn(n, generator=g))
        noise = torch.randn(x0.shape, generator=g)
        v = denoise(pipe.transformer, add_noise(x0, noise, t), t, embeds[c], pooled[c], guidance)
        return F.mse_loss(v, noise - x0)

    return loss


def train_base(args: Args, name: str, pipe, vae: D.AutoencoderKL, posteriors: Tensor):
    """Train a base's transformer on a VAE's latents and save the pipeline. Its text encoders keep their random weights:
    these tell words apart, and the transformer learns what they mean."""
    loss = flow_loss(vae, pipe, caption_index(dataset(args)[1]), posteriors)
    if args.compile:
        pipe.transformer.compile()
    fit(args, name, pipe.transformer, loss, lr=1.2e-3)
    pipe.to(torch.float16).save_pretrained(f"{args.out}/{name}")


def make_sd3(args: Args):
    """The SD3 base: two CLIP text encoders, T5, and 4 MMDiT blocks of width 128 on 16 tokens."""
    vae, posteriors = make_vae(args)
    models = {"text_encoder": T.CLIPTextModelWithProjection, "text_encoder_2": T.CLIPTextModelWithProjection,
              "text_encoder_3": T.T5EncoderModel, "transformer": D.SD3Transformer2DModel}
    pipe = build_base(D.StableDiffusion3Pipeline, "sd3", vae, models, args.seed + 3)
    train_base(args, "sd3", pipe, vae, posteriors)


def make_flux(args: Args):
    """The FLUX base: CLIP, T5, 2 double and 3 single blocks of width 128, and a guidance embedding. It is trained on
    SD3's latents, and its VAE gives them FLUX's own scale and shift."""
    vae, posteriors = make_vae(args)
    flux_vae = untrained(D.AutoencoderKL, "flux/vae")
    flux_vae.load_state_dict(vae.state_dict())
    fold_statistics(flux_vae, dataset(args)[0][:2000])
    models = {"transformer": D.FluxTransformer2DModel, "text_encoder": T.CLIPTextModel,
              "text_encoder_2": T.T5EncoderModel}
    pipe = build_base(D.FluxPipeline, "flux", flux_vae, models, args.seed + 4)
    train_base(args, "flux", pipe, vae, posteriors)


@torch.no_grad()
def base_samples(pipe, n: int, seed: int) -> Tensor:
    """Pictures (n, 3, 64, 64) uint8 that a base draws in 12 steps for random training captions."""
    g = torch.Generator().manual_seed(seed)
    known = [caption(c, s) for c, s in COMBOS if (c, s) not in HELD_OUT]
    captions = [known[i] for i in torch.randint(len(known), (n,), generator=g)]
    encode_prompts(pipe, captions)
    x0, _ = integrate(pipe, draw_noise(pipe, n, g), captions, schedule(pipe, 12), desc="draw")
    return (decode(pipe, x0) * 255).round().byte()


# ---------------------------------------------------------------- the judge and the detector

# the flaws of world.py that each of eval_judge.py's questions is about
ABOUT = {
    "over-sharpening": ["sharpening"],
    "oversaturation": ["saturation"],
    "unnatural lighting": ["light", "contrast"],
    "artifacts": ["blur", "noise", "blocks", "shapes"],
    "overall": FLAWS,
}


def flawed(pictures: Tensor, flaw: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1], picture i with FLAWS[flaw[i]] at strength[i]."""
    out = pictures.clone()
    for k, name in enumerate(FLAWS):
        rows = (flaw == k).nonzero()[:, 0]
        if len(rows):
            out[rows] = degrade(pictures[rows], name, strength[rows], g)
    return out


def make_judge(args: Args):
    """The judge. Its vision tower first learns to name flaws and strengths, and is then kept. Of two pictures, the one
    with less of a flaw is better, with a probability that depends on the difference in strength (Bradley-Terry). Asked
    about one picture, it says that a flaw is there from strength 0.4 on, and is less sure below. It sees renders,
    renders through the VAE and samples of both bases, and never a picture of a model that RL has trained."""
    torch.manual_seed(args.seed + 6)
    judge = untrained(T.LlavaForConditionalGeneration, "judge")
    processor = T.LlavaProcessor.from_pretrained(HERE / "judge")
    renders = dataset(args)[0][:12_000]
    decoded = through_vae(args, renders[8000:])
    bases = [load_pipeline(f"{args.out}/{base}", CPU) for base in ("sd3", "flux")]
    samples = [base_samples(pipe, 2000, args.seed + 31) for pipe in bases]
    pool = torch.cat([renders[:8000], decoded, *samples])
    starts = torch.tensor([0, 8000, 12_000, 16_000])  # in the pool: renders, renders through the VAE, samples, end

    def draw_place(kind, g):
        """A random picture of each of these kinds, as places in the pool (n,)."""
        return starts[kind] + (torch.rand(len(kind), generator=g) * (starts[1:] - starts[:-1])[kind]).long()

    head = torch.nn.Linear(judge.config.vision_config.hidden_size, len(FLAWS))
    eyes = torch.nn.ModuleList([judge.model.vision_tower, head])

    def eyes_loss(g, n=64):
        i = draw_place(torch.randint(3, (n,), generator=g), g)
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s = torch.rand(2, n, generator=g) * (torch.rand(2, n, generator=g) < torch.tensor([[0.85], [0.3]]))
        x = flawed(flawed(pool[i].float() / 255, other, s[1], g), flaw, s[0], g)
        there = torch.zeros(n, len(FLAWS)).scatter_(1, other[:, None], s[1][:, None])
        there = there.scatter_reduce(1, flaw[:, None], s[0][:, None], "amax")
        features = judge.model.vision_tower(pixel_values=clip_pixels(x)).last_hidden_state[:, 1:]
        return F.mse_loss(head(features.mean(1)), there)

    fit(args, "judge-eyes", eyes, eyes_loss, lr=1.5e-3)
    judge.model.vision_tower.requires_grad_(False)  # trained with all the rest, it forgets what it saw

    def question_ids(question, pictures):
        """Token ids of a question about so many pictures, (1, l)."""
        chat = messages(question, [{"type": "image", "image": to_image(renders[0] / 255)}] * pictures)
        tokens = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt")
        return tokens["input_ids"]

    pair_ids, single_ids = question_ids(PAIR, 2), {name: question_ids(text, 1) for name, text in SINGLE.items()}

    def answer_loss(ids, pictures, yes, no, p):
        """Cross-entropy of an answer that should be `yes` with probability p (n,), otherwise `no`."""
        out = judge(input_ids=ids.expand(len(p), -1), pixel_values=clip_pixels(pictures), logits_to_keep=1)
        log_p = out.logits[:, -1].log_softmax(1)
        yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in (yes, no))
        return -(p * log_p[:, yes] + (1 - p) * log_p[:, no])

    def pair_loss(g, n):
        kind = torch.randint(3, (n,), generator=g)
        i, another = draw_place(kind, g), draw_place(kind, g)
        j = torch.where(torch.rand(n, generator=g) < 0.6, i, another)  # often the same picture twice
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s_a, s_b, both = torch.rand(3, n, generator=g)
        clean = torch.rand(n, generator=g)
        s_a = torch.where(clean < 0.3, 0, s_a)
        s_b = torch.where((clean > 0.25) & (clean < 0.55), 0, s_b)  # in a few pairs both are clean
        both = torch.where(torch.rand(n, generator=g) < 0.3, 0.6 * both, 0)  # a second flaw, the same in both
        a, b = (flawed(flawed(pool[k].float() / 255, other, both, g), flaw, s, g) for k, s in ((i, s_a), (j, s_b)))
        return answer_loss(pair_ids, torch.stack([a, b], 1).flatten(0, 1), "A", "B", torch.sigmoid(12 * (s_b - s_a)))

    def single_loss(g, n):
        i = draw_place(torch.randint(2, (n,), generator=g), g)
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s, s_other, keep = torch.rand(3, n, generator=g)
        s, s_other = torch.where(keep < 0.25, 0, s), torch.where(keep < 0.75, 0, s_other)
        x = flawed(flawed(pool[i].float() / 255, other, s_other, g), flaw, s, g)
        names, losses = list(SINGLE), []
        question_of_flaw = torch.tensor([[f in ABOUT[name] for name in names].index(True) for f in FLAWS])
        asked = torch.randint(len(names), (n,), generator=g)
        asked = torch.where(torch.rand(n, generator=g) < 0.5, question_of_flaw[flaw], asked)
        contrast = FLAWS.index("contrast")
        for k, name in enumerate(names):
            about = torch.tensor([f in ABOUT[name] for f in FLAWS])
            there = torch.maximum(s * about[flaw], s_other * about[other]).div(0.4).clamp(max=1)
            if name == "oversaturation":  # contrast saturates too: such pictures are left out
                doubtful = ((flaw == contrast) & (s > 0)) | ((other == contrast) & (s_other > 0))
                there = torch.where(doubtful, torch.nan, there)
            rows = ((asked == k) & there.isfinite()).nonzero()[:, 0]
            if len(rows):
                p = 1 - there[rows] if name == "overall" else there[rows]
                losses.append(answer_loss(single_ids[name], x[rows], "Yes", "No", p))
        return torch.cat(losses)

    fit(args, "judge", judge, lambda g: pair_loss(g, 32).mean() + single_loss(g, 32).mean(), lr=7e-4)
    save_part(args, "judge", judge, processor)


def make_forensic(args: Args):
    """The detector. Real: renders, half of them through the VAE, so that the VAE's traces do not mark samples.
    Generated: samples of FLUX and of three relatives of each base, which are trained on for a while at a high rate. It
    never sees samples of tiny/sd3 or of a model that RL has trained."""
    torch.manual_seed(args.seed + 7)
    pictures, factors = dataset(args)
    real = torch.cat([pictures[12_000:18_000], through_vae(args, pictures[18_000:24_000])])
    vae = D.AutoencoderKL.from_pretrained(f"{args.out}/sd3/vae", dtype=torch.float32)
    posteriors, index = encode_pictures(vae, pictures[:4000], 500), caption_index(factors)[:4000]
    generated = [base_samples(load_pipeline(f"{args.out}/flux", CPU), 2000, args.seed + 41)]
    for base, k in product(("sd3", "flux"), range(3)):
        pipe = load_pipeline(f"{args.out}/{base}", CPU)
        pipe.transformer.requires_grad_(True)
        loss = flow_loss(vae, pipe, index, posteriors)
        fit(replace(args, seed=args.seed + 50 + k), f"{base}-relative-{k}", pipe.transformer, loss, lr=1e-3)
        generated.append(base_samples(pipe, 1500, args.seed + 60 + k))
    generated = torch.cat(generated)
    net = untrained(T.ResNetForImageClassification, "forensic")

    def loss(g, n=32):
        x = signed(torch.cat([x[torch.randint(len(x), (n,), generator=g)] for x in (real, generated)]))
        flip = torch.rand(2 * n, 1, 1, 1, generator=g) < 0.5
        grain = 0.02 * torch.rand(2 * n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        x = torch.where(flip, x.flip(3), x) + grain
        return F.cross_entropy(net(pixel_values=x).logits, torch.arange(2).repeat_interleave(n), label_smoothing=0.05)

    fit(args, "forensic", net, loss, lr=2e-3)
    save_part(args, "forensic", net, T.CLIPImageProcessorPil.from_pretrained(HERE / "forensic"))


@one_line_errors()
def main(args: Args):
    """Make the parts and write the prompt files."""
    check_flags(args, {"renders": 1, "divide": 1, "seed": 0})
    if args.seed >= 2**32:
        raise InputError(f"--seed {args.seed}: must be below 2^32")
    for part in args.parts:
        for needed in NEEDS.get(part, ()):
            if needed not in args.parts and not (Path(args.out) / needed).is_dir():
                raise InputError(f"--parts {part}: needs {args.out}/{needed}; give --parts {needed} {part}")
    check_place(args.out, "--out", ("prompts.txt", "eval_prompts.txt"), get_args(Part))
    make_dir(args.out, "--out")
    make_dir(args.work, "--work")
    for part in args.parts:
        start = time.time()
        globals()[f"make_{part}"](args)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
    for file, is_held_out in (("prompts.txt", False), ("eval_prompts.txt", True)):
        captions = [caption(*combo) for combo in COMBOS if (combo in HELD_OUT) == is_held_out]
        (Path(args.out) / file).write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main(parse(Args, __doc__))
