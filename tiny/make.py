"""Train the miniature world's models from a seed: each a `from_pretrained` folder of the class the real thing uses.

    python tiny/make.py                 # all parts, in order; a part that is trained is not trained again
    python tiny/make.py --parts sd3     # one part (it needs those before it); --parts alone: only the report

    vae        AutoencoderKL, f8c16 like SD3's, on renders; latents centred and scaled per channel (folded into its 1x1
               convs), then its decoder alone for longer: it, not the latents, sets how crisp an edge can be
    pickscore  CLIPModel + CLIPProcessor, contrastive on clean captioned renders: the reward
    hps        a second, smaller CLIPModel of other data, fine-tuned on preference pairs: the other reward
    embed      ResNetForImageClassification that reads the factors of a render: its features serve the Frechet distance
    sd3        StableDiffusion3Pipeline by flow matching on latents. A share of its captions is wrong, so that the
               base follows its caption weakly, as SD3.5 does without guidance: that is the room RL has to work in
    flux       FluxPipeline on the same latents; the guidance it is told says how often captions are wrong
    judge      LlavaForConditionalGeneration that answers eval_judge.py's questions, on pictures flawed in known ways
               and strengths
    forensic   ResNetForImageClassification that tells renders from samples of the bases and of bases trained on for a
               while

Interrupted, the same command carries on from WORK/. Weights are saved in fp16. It ends by saying what each part
reached.
"""
import copy
import json
import math
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import diffusers as D
import torch
import torch.nn.functional as F
import transformers as T
from einops import rearrange
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import CAPTIONS, COLOURS, COMBOS, FLAWS, HELD_OUT, SHAPES, SIZE, caption, degrade, render, scene

from eval_judge import PAIR, SINGLE
from flow.cli import InputError, check_flags, check_place, make_dir, one_line_errors, parse
from flow.judge import embed_images, frechet_distance, load_embed, load_forensic, local_judge, messages, read_answer
from flow.pictures import to_image
from flow.pipeline import add_noise, decode, draw_noise, encode_prompts, integrate, load_pipeline, schedule

TOKENS = 8  # length of an encoded caption, for CLIP and T5
PARTS = ["vae", "pickscore", "hps", "embed", "sd3", "flux", "judge", "forensic"]
NEEDS = {"judge": ("sd3", "flux"), "forensic": ("sd3", "flux")}  # whose pictures they are trained on


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)
    """what to make (default: all of it, in this order)"""
    out: str = str(HERE)
    """where the folders go (default: tiny/)"""
    work: str = "runs/make"
    """unfinished training states and cached renders"""
    seed: int = 0
    """seed of data, weights and noise"""
    renders: int = 40_000
    """pictures in the training set"""
    vae_steps: int = 4_500
    """steps of 8 pictures"""
    decoder_steps: int = 6_000
    """then so many of 16 for its decoder alone"""
    clip_steps: int = 4_000
    """steps of 64 pictures"""
    hps_steps: int = 4_000
    """steps of 64 pictures, then half as many of 32 pairs"""
    embed_steps: int = 2_000
    """steps of 64 pictures"""
    sd3_steps: int = 20_000
    """steps of 64 latents"""
    flux_steps: int = 12_000
    """steps of 64 latents"""
    eyes_steps: int = 2_500
    """the judge's vision tower first: steps of 64 pictures"""
    judge_steps: int = 1_500
    """then the rest of it: steps of 32 pairs and 32 single pictures"""
    forensic_steps: int = 2_000
    """steps of 64 pictures"""
    wrong: float = 0.35
    """share of sd3's training captions that name another picture"""
    compile: bool = False
    """train the two bases through torch.compile: a fifth faster, and it wants a C++ compiler"""


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

def fit(args: Args, name: str, model: torch.nn.Module, loss_fn, steps: int, lr: float):
    """AdamW, warm-up and a cosine, EMA of the weights; carries on from WORK/name.pt. Leaves the EMA weights in `model`.
    loss_fn(generator) -> scalar; its generator depends on (seed, step) alone, so a resumed run is the same run."""
    path = Path(args.work) / f"{name}.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first, made_with = 0, {"seed": args.seed, "renders": args.renders, "wrong": args.wrong, "steps": steps}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["args"] != made_with:
            raise InputError(f"--work {args.work}: {path.name} was made with other flags; delete it, or give another "
                             "--work")
        first, ema = state["step"], state["ema"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])

    def save(step):
        state = {"args": made_with, "step": step, "model": model.state_dict(), "ema": ema, "opt": opt.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

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
        if time.time() - saved > 120:
            save(step + 1)
            saved = time.time()
    if first < steps:
        save(steps)
    model.load_state_dict(ema)
    model.eval()


# ---------------------------------------------------------------- tokenizers

def clip_tokenizer() -> T.CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learned from the captions."""
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    raw.pre_tokenizer = pre_tokenizers.Sequence(split)
    # the words' last letters are given here, or the trainer numbers them at random
    last = sorted({word[-1] + "</w>" for c in CAPTIONS for word in c.split()})
    raw.train_from_iterator(CAPTIONS, trainers.BpeTrainer(
        vocab_size=640, show_progress=False, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *last],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(raw.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    return T.CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> T.T5Tokenizer:
    """T5's unigram tokenizer: the captions' words with their log frequency, and letters for all else."""
    words = Counter("▁" + w for c in CAPTIONS for w in c.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(w, math.log(k / words.total())) for w, k in words.most_common()]
    known = {p for p, _ in pieces}
    pieces += [(c, -20.0) for c in "▁abcdefghijklmnopqrstuvwxyz" if c not in known]
    return T.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


# ---------------------------------------------------------------- the parts

def make_vae(args: Args) -> D.AutoencoderKL:
    """8x8x16 latents. Trained in opponent colours, where hue weighs as much as brightness (in RGB, muted hues are a
    small signal and are learned last), on squared error, edges and a faint KL; the colour matrix is folded into the
    outer convs."""
    torch.manual_seed(args.seed)
    vae = D.AutoencoderKL(block_out_channels=(8, 16, 48, 96), layers_per_block=1, latent_channels=16, norm_num_groups=2,
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

    fit(args, "vae", vae, loss, args.vae_steps, lr=2e-3)
    with torch.no_grad():  # fold the colour matrix: the encoder takes RGB, the decoder gives RGB
        first, last, back = vae.encoder.conv_in, vae.decoder.conv_out, opponent.inverse()
        first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight, opponent))
        last.weight.copy_(torch.einsum("ij,jchw->ichw", back, last.weight))
        last.bias.copy_(back @ last.bias)
    fold_statistics(vae, pictures[:2000])
    moments = latents(args, vae)

    def sharpen(g):
        i = torch.randint(len(pictures), (16,), generator=g)
        e = vae.decode(draw_latents(moments[i], g)).sample - (pictures[i].float() / 127.5 - 1)
        e = torch.einsum("ij,bjhw->bihw", opponent, e)
        return e.square().mean() + 2 * (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean())

    fit(args, "decoder", vae.decoder, sharpen, args.decoder_steps, lr=1e-3)
    return vae


def draw_latents(moments: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """A draw from the posteriors whose mean and log variance are in moments (n, 32, 8, 8): (n, 16, 8, 8)."""
    mean, logvar = moments.float().chunk(2, 1)
    return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)


@torch.no_grad()
def latents(args: Args, vae: D.AutoencoderKL) -> torch.Tensor:
    """The encoder's (mean, log variance) of the training renders, (n, 32, 8, 8) fp16, cached in WORK/."""
    path = Path(args.work) / f"latents-{args.renders}-s{args.seed}-{args.vae_steps}.pt"
    if not path.exists():
        chunks = tqdm(dataset(args)[0].split(500), desc="latents")
        parts = [vae.encode(p.float() / 127.5 - 1).latent_dist.parameters.half() for p in chunks]
        torch.save(torch.cat(parts), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def fold_statistics(vae: D.AutoencoderKL, pictures: torch.Tensor):
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


def image_processor(**statistics) -> T.CLIPImageProcessorPil:
    """CLIP's, for the world's pictures."""
    size, crop = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    return T.CLIPImageProcessorPil(size=size, crop_size=crop, **statistics)


def build_clip(width: int, layers: int, patch: int, text_width: int) -> tuple[T.CLIPModel, T.CLIPProcessor]:
    """A CLIP of that size for the world's pictures and captions, and its processor."""
    tokenizer = clip_tokenizer()
    text = dict(vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=4 * text_width,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS, eos_token_id=1,
                bos_token_id=0, pad_token_id=1)
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
                  image_size=SIZE, patch_size=patch)
    clip = T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    return clip, T.CLIPProcessor(image_processor(), tokenizer)


def clip_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] as CLIP takes them."""
    return (pictures - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def contrastive(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """CLIP's loss: each picture's caption among all, and each caption's pictures among the batch. logits (pictures,
    captions), index (pictures,)."""
    # (captions, pictures): a caption may have none
    same = (index[None] == torch.arange(logits.shape[1])[:, None]).float()
    per_text = -(F.log_softmax(logits.T, 1) * same).sum(1) / same.sum(1).clamp(min=1)
    return F.cross_entropy(logits, index) + per_text[same.sum(1) > 0].mean()


def fit_clip(args: Args, name: str, clip: T.CLIPModel, processor: T.CLIPProcessor, steps: int):
    """Contrastive: every batch is told apart from all 64 captions. It sees clean renders only, and their captions
    only."""
    text = processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    pictures, factors = dataset(args)
    index = caption_index(factors)

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        clip.logit_scale.data.clamp_(max=math.log(100))
        out = clip(pixel_values=clip_pixels(pictures[i].float() / 255), **text)  # logits_per_image (64, 64 captions)
        return contrastive(out.logits_per_image, index[i])

    fit(args, name, clip, loss, steps, lr=1.5e-3)


def make_pickscore(args: Args):
    """The first reward: a CLIP of captions."""
    torch.manual_seed(args.seed + 1)
    clip, processor = build_clip(width=96, layers=4, patch=8, text_width=64)
    fit_clip(args, "pickscore", clip, processor, args.clip_steps)
    clip.half().save_pretrained(f"{args.out}/pickscore")
    processor.save_pretrained(f"{args.out}/pickscore")


def make_hps(args: Args):
    """The second reward: a CLIP of another width, patch, seed and data, then, as HPS is, fine-tuned on pairs of which
    one is preferred: the picture that its caption names over one that it does not, and the clean one over its own
    blurred, noisy or dim copy. The contrastive loss goes on beside, or it forgets a third of its captions."""
    torch.manual_seed(args.seed + 5)
    hps_args = replace(args, seed=args.seed + 77, renders=args.renders // 2)
    clip, processor = build_clip(width=80, layers=3, patch=16, text_width=48)
    fit_clip(hps_args, "hps-clip", clip, processor, args.hps_steps)
    text = processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    pictures, factors = dataset(hps_args)
    index = caption_index(factors)

    def loss(g, n=32):
        i, other = torch.randint(len(pictures), (2, n), generator=g)
        better, worse = pictures[i].float() / 255, pictures[other].float() / 255
        blurred = F.interpolate(F.avg_pool2d(better, 4), SIZE, mode="bilinear")
        strength = torch.rand(n, 1, 1, 1, generator=g)
        kind = torch.randint(6, (n, 1, 1, 1), generator=g)  # 3, 4 and 5: another picture
        noise = torch.randn(better.shape, generator=g)
        worse = torch.where(kind == 0, torch.lerp(better, blurred, 0.3 + 0.7 * strength), worse)
        worse = torch.where(kind == 1, better + (0.05 + 0.15 * strength) * noise, worse)
        worse = torch.where(kind == 2, better * (0.8 - 0.5 * strength), worse)
        out = clip(pixel_values=clip_pixels(torch.cat([better, worse]).clamp(0, 1)), **text)
        better, worse = out.logits_per_image.gather(1, index[i].repeat(2)[:, None]).chunk(2)
        # two pictures of one caption: no preference
        counts = ((index[i] != index[other]) | (kind.flatten() < 3)).float()
        preference = (F.softplus(worse - better)[:, 0] * counts).sum() / counts.sum()
        return preference + 0.1 * contrastive(out.logits_per_image[:n], index[i])

    fit(hps_args, "hps", clip, loss, args.hps_steps // 2, lr=3e-4)
    clip.half().save_pretrained(f"{args.out}/hps")
    processor.save_pretrained(f"{args.out}/hps")


def factor_targets(f: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every factor of a scene but texture and grain, as numbers of about unit size, (n, k): what the embedding must
    know."""
    turns = [2 * math.pi * f[surface][:, 0] for surface in ("wall", "floor")]
    hue = [torch.stack([turn.cos(), turn.sin()], 1) for turn in turns]
    names = ("x", "y", "r", "angle", "sat", "val", "horizon", "light", "fall", "warm", "gloss", "shade")
    flat = [f[name][:, None] for name in names]
    flat = torch.cat(flat + [f["wall"][:, 1:], f["floor"][:, 1:]], 1)
    flat = (flat - flat.mean(0)) / flat.std(0)
    colour, shape = F.one_hot(f["colour"], len(COLOURS)), F.one_hot(f["shape"], len(SHAPES))
    return torch.cat([3 * colour, 3 * shape, *hue, flat], 1).float()


def build_resnet(**labels) -> tuple[T.ResNetForImageClassification, T.CLIPImageProcessorPil]:
    """A small ResNet for the world's pictures in [-1, 1], and its processor."""
    size = dict(embedding_size=24, hidden_sizes=[24, 48, 64], depths=[1, 1, 1])
    config = T.ResNetConfig(layer_type="basic", **size, **labels)
    return T.ResNetForImageClassification(config), image_processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_embed(args: Args) -> T.ResNetForImageClassification:
    """Regresses all factors at once: what is in the picture, where, of which colours and under which light; blind to
    grain, which the VAE does not keep: its training pictures carry more or less of it at random."""
    torch.manual_seed(args.seed + 2)
    pictures, factors = dataset(args)
    targets = factor_targets(factors)
    net, processor = build_resnet(num_labels=targets.shape[1], problem_type="regression")

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        grain = 0.04 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(64, 3, SIZE, SIZE, generator=g)
        return F.mse_loss(net(pixel_values=pictures[i].float() / 127.5 - 1 + grain).logits, targets[i])

    fit(args, "embed", net, loss, args.embed_steps, lr=2e-3)
    net.half().save_pretrained(f"{args.out}/embed")
    processor.save_pretrained(f"{args.out}/embed")
    return net


def clip_text(tokenizer: T.CLIPTokenizer, width: int, kind=T.CLIPTextModelWithProjection):
    """A CLIP text encoder, as drawn."""
    encoder = kind(T.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=width, eos_token_id=1, bos_token_id=0,
        pad_token_id=1))
    encoder.get_input_embeddings().weight.data.mul_(50)  # CLIP starts at 0.02; a trained one is of order 1
    return encoder


def t5_text(tokenizer: T.T5Tokenizer) -> T.T5EncoderModel:
    """A T5 encoder, as drawn."""
    return T.T5EncoderModel(T.T5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0))


def build_sd3(args: Args, vae: D.AutoencoderKL) -> D.StableDiffusion3Pipeline:
    """SD3's parts at toy size: two CLIP text encoders, T5, and a 4-block MMDiT of width 128 on 16 tokens."""
    torch.manual_seed(args.seed + 3)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    text, t5 = [clip_text(tokenizer, width) for width in (32, 48)], t5_text(tokenizer_3)
    transformer = D.SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=128, pooled_projection_dim=80,
        pos_embed_max_size=8, qk_norm="rms_norm")
    return D.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=text[0], tokenizer=tokenizer, text_encoder_2=text[1], tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5, tokenizer_3=tokenizer_3)


def build_flux(args: Args, vae: D.AutoencoderKL) -> D.FluxPipeline:
    """FLUX's parts at toy size: CLIP's pooled caption, T5, 2 dual and 3 single blocks of width 128, a guidance
    embedding, a shift by resolution."""
    torch.manual_seed(args.seed + 4)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = D.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=96, pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
    scheduler = D.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    return D.FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae,
        text_encoder=clip_text(tokenizer, 48, T.CLIPTextModel), tokenizer=tokenizer,
        text_encoder_2=t5_text(tokenizer_2), tokenizer_2=tokenizer_2)


@torch.no_grad()
def encode(pipe, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as the two bases take them: T5's (and SD3's CLIPs') embeddings (n, l, d), pooled ones (n, p)."""
    if isinstance(pipe, D.FluxPipeline):
        return pipe.encode_prompt(captions, max_sequence_length=TOKENS)[:2]
    encoded = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return encoded[0], encoded[2]


def denoise(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor,
            told: torch.Tensor) -> torch.Tensor:
    """v(x_t, t | caption) of a base that is being made; x (n, 16, 8, 8), told (n,): what FLUX's guidance embedding is
    told."""
    given = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
    if not isinstance(model, D.FluxTransformer2DModel):
        return model(hidden_states=x, timestep=1000 * t, **given)[0]
    h, w = x.shape[2] // 2, x.shape[3] // 2
    img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w)).to(x)  # (h w, 3): 0, row, column
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    txt_ids = torch.zeros(embeds.shape[1], 3)
    v = model(hidden_states=tokens, timestep=t, guidance=told, img_ids=img_ids, txt_ids=txt_ids, **given)[0]
    return rearrange(v, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)


def flow_loss(args: Args, name: str, vae: D.AutoencoderKL, pipe, index: torch.Tensor, moments: torch.Tensor):
    """A base's loss for `fit`: flow matching with logit-normal t. index (n,): the pictures' captions; moments
    (n, 32, 8, 8): their latents. FLUX's guidance embedding is told how far to trust the caption, which is what
    guidance distillation teaches it: at 1 most are wrong, at 6 none is."""
    embeds, pooled = encode(pipe, [*CAPTIONS, ""])

    def loss(g, n=64):
        i = torch.randint(len(index), (n,), generator=g)
        x0 = (draw_latents(moments[i], g) - vae.config.shift_factor) * vae.config.scaling_factor
        told = 1 + 5 * torch.rand(n, generator=g)
        wrong = args.wrong * (6 - told) / 2.5 if name == "flux" else args.wrong  # at FLUX's usual 3.5, as on SD3
        c, swap = index[i], torch.rand(n, generator=g)
        c = torch.where(swap < wrong, torch.randint(len(CAPTIONS), (n,), generator=g), c)
        c = torch.where(swap > 0.9, len(CAPTIONS), c)  # the empty caption, for guidance
        t = torch.sigmoid(0.3 + 1.2 * torch.randn(n, generator=g))
        noise = torch.randn(x0.shape, generator=g)
        v = denoise(pipe.transformer, add_noise(x0, noise, t), t, embeds[c], pooled[c], told)
        return F.mse_loss(v, noise - x0)

    return loss


def train_base(args: Args, name: str, vae: D.AutoencoderKL, pipe, steps: int):
    """Trained from its first weights and saved to OUT/name. The text encoders stay as drawn, there being no web to
    pretrain them on: random features keep words apart, and the transformer learns what they mean."""
    _, factors = dataset(args)
    loss = flow_loss(args, name, vae, pipe, caption_index(factors), latents(args, vae))
    if args.compile:
        pipe.transformer.compile()
    fit(args, name, pipe.transformer, loss, steps, lr=1.2e-3)
    pipe.to(torch.float16).save_pretrained(f"{args.out}/{name}")


def make_sd3(args: Args):
    """The SD3 base."""
    vae = make_vae(args)
    train_base(args, "sd3", vae, build_sd3(args, vae), args.sd3_steps)


def make_flux(args: Args):
    """The FLUX base, on the same latents."""
    vae = make_vae(args)
    flux_vae = copy.deepcopy(vae)  # the same latents under FLUX's own scale and shift
    flux_vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    fold_statistics(flux_vae, dataset(args)[0][:2000])
    train_base(args, "flux", vae, build_flux(args, flux_vae), args.flux_steps)


@torch.no_grad()
def base_samples(args: Args, base: str, n: int, seed: int, steps: int = 12, pipe=None) -> torch.Tensor:
    """Pictures that a base (or `pipe`, called so) draws for random training captions, (n, 3, 64, 64) uint8, cached in
    WORK/."""
    pipe = pipe or load_pipeline(f"{args.out}/{base}", torch.device("cpu"))
    # a base that was trained anew has other weights, and a file of its own
    weights = zlib.crc32(next(pipe.transformer.parameters()).numpy().tobytes())
    path = Path(args.work) / f"{base}-{n}-s{seed}-{weights:08x}.pt"
    if not path.exists():
        g = torch.Generator().manual_seed(seed)
        known = [caption(c, s) for c, s in COMBOS if (c, s) not in HELD_OUT]
        captions = [known[i] for i in torch.randint(len(known), (n,), generator=g)]
        encode_prompts(pipe, captions)
        x0, _ = integrate(pipe, draw_noise(pipe, n, g), captions, schedule(pipe, steps), desc=base)
        torch.save((decode(pipe, x0) * 255).round().byte(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def through_vae(args: Args, pictures: torch.Tensor) -> torch.Tensor:
    """(n, 3, 64, 64) uint8 -> the same, as the VAE gives them back."""
    vae = D.AutoencoderKL.from_pretrained(f"{args.out}/sd3/vae", dtype=torch.float32)
    chunks = tqdm(pictures.split(100), desc="through the vae")
    back = [vae.decode(vae.encode(x.float() / 127.5 - 1).latent_dist.mean).sample / 2 + 0.5 for x in chunks]
    return (torch.cat(back).clamp(0, 1) * 255).round().byte()


# which of world.py's flaws a question is about; "overall" is about all of them
ABOUT = {
    "over-sharpening": ["sharpening"],
    "oversaturation": ["saturation"],
    "unnatural lighting": ["light", "contrast"],
    "artifacts": ["blur", "noise", "blocks", "shapes"],
    "overall": FLAWS,
}


def build_judge() -> tuple[T.LlavaForConditionalGeneration, T.LlavaProcessor]:
    """A LLaVA of 0.6 M parameters whose words are those of eval_judge.py's questions."""
    special = ["<pad>", "<unk>", "<image>", "<|user|>", "<|assistant|>"]
    split = pre_tokenizers.Whitespace()
    words = {w for text in (PAIR, *SINGLE.values(), "Picture A: B Yes No") for w, _ in split.pre_tokenize_str(text)}
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + sorted(words))}, unk_token="<unk>"))
    raw.pre_tokenizer = split
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=special[2:],
        padding_side="left")
    template = ("{% for message in messages %}<|user|>{% for part in message.content %}"
                "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    processor = T.LlavaProcessor(
        image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1)
    vision = dict(model_type="clip_vision_model", hidden_size=96, intermediate_size=384, num_hidden_layers=3,
                  num_attention_heads=4, image_size=SIZE, patch_size=8, projection_dim=96)
    text = dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256,
                num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, initializer_range=0.1,
                pad_token_id=0, bos_token_id=None, eos_token_id=None)
    judge = T.LlavaForConditionalGeneration(T.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=64))
    return judge, processor


def flawed(pictures: torch.Tensor, flaw: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Row i (n, 3, 64, 64) in [0, 1] gets FLAWS[flaw[i]] at strength[i]."""
    out = pictures.clone()
    for k, name in enumerate(FLAWS):
        rows = (flaw == k).nonzero()[:, 0]
        if len(rows):
            out[rows] = degrade(pictures[rows], name, strength[rows], g)
    return out


def make_judge(args: Args):
    """The judge. Of two pictures the one with less of a flaw is better, by Bradley-Terry on the difference in
    strength: the same picture twice, or two pictures; renders, renders through the VAE, samples of both bases. Single
    pictures: the flaw asked for is there from strength 0.4 on, and in doubt below. Its vision tower learns to name
    flaws and strengths first, and stays so. It never sees a picture of a model that RL has trained."""
    torch.manual_seed(args.seed + 6)
    judge, processor = build_judge()
    renders = dataset(args)[0][:12_000]
    decoded = through_vae(args, renders[8000:])
    samples = [base_samples(args, base, 2000, args.seed + 31) for base in ("sd3", "flux")]
    pool = torch.cat([renders[:8000], decoded, *samples])
    kinds = torch.tensor([0, 8000, 12_000, 16_000])  # renders, through the vae, samples

    def ids(question, pictures):
        """Token ids of a question about so many pictures, (1, l)."""
        chat = messages(question, [{"type": "image", "image": to_image(renders[0] / 255)}] * pictures)
        tokens = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt")
        return tokens["input_ids"]

    pair, single = ids(PAIR, 2), {name: ids(question, 1) for name, question in SINGLE.items()}
    word = {w: processor.tokenizer.convert_tokens_to_ids(w) for w in ("A", "B", "Yes", "No")}

    def place(kind, g):
        """A random place in the pool for each of these kinds of picture, (n,)."""
        return kinds[kind] + (torch.rand(len(kind), generator=g) * (kinds[1:] - kinds[:-1])[kind]).long()

    def draw(n, kinds_of, g):
        """n places in the pool, each of a random kind of picture."""
        kind = torch.randint(kinds_of, (n,), generator=g)
        return kind, place(kind, g)

    def answer(input_ids, pictures, first, second, p):
        """Cross-entropy of the answer, which is `first` with probability p (n,), else `second`."""
        out = judge(input_ids=input_ids.expand(len(p), -1), pixel_values=clip_pixels(pictures), logits_to_keep=1)
        log_p = out.logits[:, -1].log_softmax(1)
        return -(p * log_p[:, word[first]] + (1 - p) * log_p[:, word[second]])

    head = torch.nn.Linear(judge.config.vision_config.hidden_size, len(FLAWS))
    eyes = torch.nn.ModuleList([judge.model.vision_tower, head])

    def see(g, n=64):
        _, i = draw(n, 3, g)
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s = torch.rand(2, n, generator=g) * (torch.rand(2, n, generator=g) < torch.tensor([[0.85], [0.3]]))
        x = flawed(flawed(pool[i].float() / 255, other, s[1], g), flaw, s[0], g)
        there = torch.zeros(n, len(FLAWS)).scatter_(1, other[:, None], s[1][:, None])
        there = there.scatter_reduce(1, flaw[:, None], s[0][:, None], "amax")
        features = judge.model.vision_tower(pixel_values=clip_pixels(x)).last_hidden_state[:, 1:]
        return F.mse_loss(head(features.mean(1)), there)

    fit(args, "judge-eyes", eyes, see, args.eyes_steps, lr=1.5e-3)
    judge.model.vision_tower.requires_grad_(False)  # trained on, with all the rest, it forgets what it saw

    def loss(g, n=32):
        kind, i = draw(n, 3, g)
        another = place(kind, g)  # of the same kind
        j = torch.where(torch.rand(n, generator=g) < 0.6, i, another)
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s_a, s_b, both = torch.rand(3, n, generator=g)
        clean = torch.rand(n, generator=g)
        s_a = torch.where(clean < 0.3, 0, s_a)
        s_b = torch.where((clean > 0.25) & (clean < 0.55), 0, s_b)  # a few have neither
        both = torch.where(torch.rand(n, generator=g) < 0.3, 0.6 * both, 0)  # a second flaw, the same in both
        a, b = (flawed(flawed(pool[k].float() / 255, other, both, g), flaw, s, g) for k, s in ((i, s_a), (j, s_b)))
        pairs = answer(pair, torch.stack([a, b], 1).flatten(0, 1), "A", "B", torch.sigmoid(12 * (s_b - s_a)))

        _, i = draw(n, 2, g)
        flaw, other = torch.randint(len(FLAWS), (2, n), generator=g)
        s, s_other, keep = torch.rand(3, n, generator=g)
        s, s_other = torch.where(keep < 0.25, 0, s), torch.where(keep < 0.75, 0, s_other)
        x = flawed(flawed(pool[i].float() / 255, other, s_other, g), flaw, s, g)
        names, total = list(SINGLE), []
        asked = torch.randint(len(names), (n,), generator=g)
        question_of = [[f in ABOUT[name] for name in names].index(True) for f in FLAWS]
        asked = torch.where(torch.rand(n, generator=g) < 0.5, torch.tensor(question_of)[flaw], asked)
        contrast = FLAWS.index("contrast")
        for k, name in enumerate(names):
            about = torch.tensor([f in ABOUT[name] for f in FLAWS])
            there = torch.maximum(s * about[flaw], s_other * about[other]).div(0.4).clamp(max=1)
            if name == "oversaturation":  # contrast saturates too: no verdict
                doubtful = ((flaw == contrast) & (s > 0)) | ((other == contrast) & (s_other > 0))
                there = torch.where(doubtful, torch.nan, there)
            rows = ((asked == k) & there.isfinite()).nonzero()[:, 0]
            if len(rows):
                p = 1 - there[rows] if name == "overall" else there[rows]
                total.append(answer(single[name], x[rows], "Yes", "No", p))
        return pairs.mean() + torch.cat(total).mean()

    fit(args, "judge", judge, loss, args.judge_steps, lr=7e-4)
    judge.half().save_pretrained(f"{args.out}/judge")
    processor.save_pretrained(f"{args.out}/judge")


def make_forensic(args: Args):
    """The detector. Real: renders, and renders through the VAE, lest its decoder's traces give the samples away.
    Generated: samples of FLUX, and of six relatives of both bases, trained on for 200 steps at a high rate; never of
    tiny/sd3, nor of RL."""
    torch.manual_seed(args.seed + 7)
    pictures, factors = dataset(args)
    real = torch.cat([pictures[12_000:18_000], through_vae(args, pictures[18_000:24_000])])
    vae = D.AutoencoderKL.from_pretrained(f"{args.out}/sd3/vae", dtype=torch.float32)
    generated = [base_samples(args, "flux", 2000, args.seed + 41)]
    for base, k in product(("sd3", "flux"), range(3)):
        name, relative = f"{base}-relative-{k}", replace(args, seed=args.seed + 50 + k)
        pipe = load_pipeline(f"{args.out}/{base}", torch.device("cpu"))
        with torch.no_grad():
            chunks = pictures[:4000].split(500)
            moments = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.parameters for p in chunks])
        pipe.transformer.requires_grad_(True)
        base_loss = flow_loss(relative, base, vae, pipe, caption_index(factors)[:4000], moments)
        fit(relative, name, pipe.transformer, base_loss, 200, lr=1e-3)
        generated.append(base_samples(args, name, 1500, args.seed + 60 + k, pipe=pipe))
    generated = torch.cat(generated)
    net, processor = build_resnet(id2label={0: "real", 1: "generated"}, label2id={"real": 0, "generated": 1})

    def loss(g, n=32):
        drawn = [pool[torch.randint(len(pool), (n,), generator=g)] for pool in (real, generated)]
        x = torch.cat(drawn).float() / 127.5 - 1
        flip = torch.rand(2 * n, 1, 1, 1, generator=g) < 0.5
        grain = 0.02 * torch.rand(2 * n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        x = torch.where(flip, x.flip(3), x) + grain
        return F.cross_entropy(net(pixel_values=x).logits, torch.arange(2).repeat_interleave(n), label_smoothing=0.05)

    fit(args, "forensic", net, loss, args.forensic_steps, lr=2e-3)
    net.half().save_pretrained(f"{args.out}/forensic")
    processor.save_pretrained(f"{args.out}/forensic")


# ---------------------------------------------------------------- what they reached

def sampled_for(pipe, captions: list[str]) -> torch.Tensor:
    """A base's picture of each caption, seeds 0, 1, ..., 28 steps."""
    encode_prompts(pipe, captions)
    noise = draw_noise(pipe, len(captions), [torch.Generator().manual_seed(i) for i in range(len(captions))])
    return decode(pipe, integrate(pipe, noise, captions, schedule(pipe, 28))[0])


@torch.no_grad()
def report(args: Args) -> dict[str, float]:
    """Numbers on renders no part has seen, from the saved fp16 folders; of the parts that are there."""
    pictures, factors = held_out(args)
    index, reached = caption_index(factors), {}
    have = {part for part in PARTS if (Path(args.out) / part).exists()}

    def right_caption(reward, x):
        """Share of pictures for which a reward ranks their own caption first of the 64."""
        clip = T.CLIPModel.from_pretrained(f"{args.out}/{reward}", dtype=torch.float32)
        processor = T.CLIPProcessor.from_pretrained(f"{args.out}/{reward}")
        inputs = processor(text=CAPTIONS, images=list(x), do_rescale=False, padding=True, return_tensors="pt")
        return (clip(**inputs).logits_per_image.argmax(1) == index).float().mean().item()

    rewards = sorted(have & {"pickscore", "hps"}, reverse=True)
    for reward in rewards:
        reached[f"{reward}: right caption of 64, renders"] = right_caption(reward, pictures)
    if "embed" in have:
        embed = load_embed(f"{args.out}/embed", torch.device("cpu"))
        classifier = T.ResNetForImageClassification.from_pretrained(f"{args.out}/embed", dtype=torch.float32).eval()
        logits = classifier(pixel_values=pictures * 2 - 1).logits
        reached["embed: right colour"] = (logits[:, :8].argmax(1) == factors["colour"]).float().mean().item()
        reached["embed: right shape"] = (logits[:, 8:16].argmax(1) == factors["shape"]).float().mean().item()
        real = embed_images(embed, held_out(args, 1024)[0][512:])
        reached["Frechet distance: fresh renders"] = frechet_distance(embed_images(embed, pictures), real)
    with tempfile.TemporaryDirectory() as folder:
        def files(x, name):
            """Pictures as PNGs, which is how the judge and the detector take them."""
            paths = [f"{folder}/{name}-{i}.png" for i in range(len(x))]
            for picture, path in zip(x, paths):
                to_image(picture).save(path)
            return paths

        if "judge" in have:
            ask, clean = local_judge(f"{args.out}/judge", torch.device("cpu")), files(pictures[:128], "clean")

            def margins(first, second):
                """By how much the first picture of each pair is preferred, (n,)."""
                return torch.tensor([read_answer(top, "A", "B") for top in ask(PAIR, [*zip(first, second)])])

            for flaw, strength in product(FLAWS, (0.4, 0.7, 1.0)):
                g = torch.Generator().manual_seed(args.seed)
                worse = files(degrade(pictures[:128], flaw, torch.full((128,), strength), g), "worse")
                right = (margins(clean, worse) > 0) & (margins(worse, clean) < 0)
                reached[f"judge: prefers a render to itself with {flaw} {strength}"] = right.float().mean().item()
        if {"forensic", "sd3"} <= have:
            score = load_forensic(f"{args.out}/forensic", None, torch.device("cpu"))
            pipe = load_pipeline(f"{args.out}/sd3", torch.device("cpu"))
            drawn = sampled_for(pipe, [caption(c, s) for c, s in HELD_OUT] * 16)
            rendered, sampled = score(files(pictures, "rendered")), score(files(drawn, "sampled"))
            auc = (rendered[:, None] > sampled[None]).float().mean().item()
            reached["forensic: AUC, renders against sd3 on held-out captions"] = auc
            reached["forensic: mean P(real), renders"] = rendered.mean().item()
            reached["forensic: mean P(real), sd3"] = sampled.mean().item()
    for base in sorted(have & {"sd3", "flux"}, reverse=True):
        pipe = load_pipeline(f"{args.out}/{base}", torch.device("cpu"))
        decoded = (pipe.vae.decode(pipe.vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        error = (decoded - pictures).square().mean((1, 2, 3))
        reached[f"{base}: PSNR of its vae, dB"] = -10 * error.log10().mean().item()
        drawn = sampled_for(pipe, [CAPTIONS[i] for i in index.tolist()])
        if "embed" in have:
            through = frechet_distance(embed_images(embed, decoded), real)
            reached[f"Frechet distance: renders through {base}'s vae"] = through
            reached[f"Frechet distance: {base}, 28 steps"] = frechet_distance(embed_images(embed, drawn), real)
        for reward in rewards:
            reached[f"{reward}: right caption of 64, {base}"] = right_caption(reward, drawn)
    return reached


@one_line_errors()
def main(args: Args):
    """Make the parts asked for, write the prompt files, report."""
    steps = {flag: 1 for flag in vars(args) if flag.endswith("_steps")}
    check_flags(args, {**steps, "renders": 1, "seed": 0, "wrong": 0})
    if args.wrong > 1:
        raise InputError(f"--wrong {args.wrong}: a share is at most 1")
    if args.seed >= 2**32:
        raise InputError(f"--seed {args.seed}: must be below 2^32")
    for part in args.parts:
        if part not in PARTS:
            raise InputError(f"--parts {part}: choose from {', '.join(PARTS)}")
        for needed in NEEDS.get(part, ()):
            if needed not in args.parts and not (Path(args.out) / needed).is_dir():
                raise InputError(f"--parts {part}: needs {needed}, which is not in {args.out}; give --parts {needed} "
                                 f"{part}")
    check_place(args.out, "--out", ("prompts.txt", "eval_prompts.txt"), tuple(PARTS))
    check_place(args.work, "--work")
    make_dir(args.out, "--out")
    make_dir(args.work, "--work")
    for part in args.parts:
        start = time.time()
        globals()[f"make_{part}"](args)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
    rl = [caption(c, s) for c, s in COMBOS if (c, s) not in HELD_OUT]
    (Path(args.out) / "prompts.txt").write_text("\n".join(rl) + "\n")
    (Path(args.out) / "eval_prompts.txt").write_text("\n".join(caption(c, s) for c, s in HELD_OUT) + "\n")
    for name, value in report(args).items():
        print(f"{name:56s} {value:.3f}")


if __name__ == "__main__":
    main(parse(Args, __doc__))
