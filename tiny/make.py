"""Train the miniature world's models from a seed. Each is a `from_pretrained` folder of the same class as the real model.

    python tiny/make.py                 # all parts, in order; a part that is trained is not trained again
    python tiny/make.py --parts sd3     # one part, which needs those before it
    python tiny/make.py --parts         # no part: only the report of how good the parts are

    vae        AutoencoderKL with 8x8x16 latents like SD3's, trained on renders. Latents have mean 0 and deviation 1 in
               each channel (folded into its 1x1 convolutions). Then its decoder alone is trained for longer, because it
               limits how sharp an edge can be
    pickscore  CLIPModel + CLIPProcessor, contrastive on clean captioned renders: the reward
    hps        a smaller CLIPModel of other data, fine-tuned on preference pairs: the other reward
    embed      ResNetForImageClassification that reads the factors of a render; the Fréchet distance uses its features
    sd3        StableDiffusion3Pipeline, trained by flow matching on latents. A fraction of its captions is wrong, so
               that it follows its caption weakly, as SD3.5 does without guidance. This leaves room for RL
    flux       FluxPipeline on the same latents; its guidance embedding is told how often captions are wrong
    judge      LlavaForConditionalGeneration that answers eval_judge.py's questions, trained on pictures with known flaws
    forensic   ResNetForImageClassification that tells renders from samples of the bases and of their relatives

An interrupted command continues from WORK/ when it is run again. Weights are saved in fp16.
"""
import copy
import json
import math
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
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
from torch import Tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import CAPTIONS, COLOURS, COMBOS, FLAWS, HELD_OUT, SHAPES, SIZE, caption, degrade, render, scene

from eval_judge import PAIR, SINGLE
from flow.cli import InputError, check_flags, check_place, make_dir, one_line_errors, parse
from flow.judge import embed_images, frechet_distance, load_embed, load_forensic, local_judge, messages, read_answer
from flow.pictures import to_image
from flow.pipeline import add_noise, decode, draw_noise, encode_prompts, integrate, load_pipeline, schedule

TOKENS = 8  # length of an encoded caption, for CLIP and T5
WRONG = 0.35  # fraction of sd3's training captions that name another picture
PARTS = ["vae", "pickscore", "hps", "embed", "sd3", "flux", "judge", "forensic"]
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
    "relative": 200,  # of 64 latents, for each of the bases' relatives
}


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)
    """what to make"""
    out: str = str(HERE)
    """where the models' folders go"""
    work: str = "runs/make"
    """folder for unfinished trainings and cached renders"""
    seed: int = 0
    """seed of data, weights and noise"""
    renders: int = 40_000
    """pictures in the training set"""
    divide: int = 1
    """divide the steps of every training by this number, to try things out"""
    compile: bool = False
    """train the two bases with torch.compile: a fifth faster, but needs a C++ compiler"""


# ---------------------------------------------------------------- data

def cached(path: Path, make: Callable):
    """The tensors that make() returns, kept in a file."""
    if not path.exists():
        temporary = path.with_suffix(f".{time.time_ns()}")
        torch.save(make(), temporary)
        temporary.rename(path)
    return torch.load(path, weights_only=True)


def dataset(args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The training renders (n, 3, 64, 64) uint8 and their factors."""
    def make():
        pictures, factors = [], []
        for i in tqdm(range(0, args.renders, 500), desc="render"):
            f = random_scenes(min(500, args.renders - i), args.seed * 1_000_003 + i)
            pictures.append(to_bytes(render(f)))
            factors.append(f)
        return torch.cat(pictures), {k: torch.cat([f[k] for f in factors]) for k in factors[0]}

    return cached(Path(args.work) / f"renders-{args.renders}-s{args.seed}.pt", make)


def random_scenes(n: int, seed: int) -> dict[str, Tensor]:
    """Factors of n scenes with random captions."""
    g = torch.Generator().manual_seed(seed)
    return scene(torch.randint(len(CAPTIONS), (n,), generator=g), g)


def held_out(args: Args, n: int = 512) -> tuple[Tensor, dict[str, Tensor]]:
    """Renders (n, 3, 64, 64) in [0, 1] that no part was trained on, and their factors."""
    f = random_scenes(n, args.seed + 999_999_937)
    return render(f), f


def caption_index(factors: dict[str, Tensor]) -> Tensor:
    """The place of each scene's caption in CAPTIONS, (n,) long."""
    return factors["colour"] * len(SHAPES) + factors["shape"]


def to_bytes(pictures: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return (pictures * 255).round().byte()


def signed(pictures: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------- one training loop for all parts

def fit(args: Args, name: str, model: torch.nn.Module, loss_fn: Callable, lr: float, kind: str | None = None):
    """Train `model` by AdamW with warm-up and cosine decay, and leave the EMA of its weights in it. Continues from
    WORK/name.pt. Takes STEPS[kind or name] steps of loss_fn(generator) -> scalar. The generator depends only on seed
    and step, so an interrupted training gives the same result."""
    path, steps = Path(args.work) / f"{name}.pt", max(1, STEPS[kind or name] // args.divide)
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


def save_part(args: Args, name: str, model: torch.nn.Module, processor):
    """Write a part's folder."""
    model.half().save_pretrained(f"{args.out}/{name}")
    processor.save_pretrained(f"{args.out}/{name}")


# ---------------------------------------------------------------- tokenizers

def clip_tokenizer() -> T.CLIPTokenizer:
    """CLIP's byte-level BPE; its merges are learned from the captions."""
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    raw.pre_tokenizer = pre_tokenizers.Sequence(split)
    # the trainer would number the words' last letters in random order
    last_letters = sorted({word[-1] + "</w>" for c in CAPTIONS for word in c.split()})
    raw.train_from_iterator(CAPTIONS, trainers.BpeTrainer(
        vocab_size=640, show_progress=False, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>", *last_letters],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(raw.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    return T.CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> T.T5Tokenizer:
    """T5's unigram tokenizer: the captions' words with their log frequency, and letters for everything else."""
    words = Counter("▁" + w for c in CAPTIONS for w in c.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(w, math.log(k / words.total())) for w, k in words.most_common()]
    known = {p for p, _ in pieces}
    pieces += [(c, -20.0) for c in "▁abcdefghijklmnopqrstuvwxyz" if c not in known]
    return T.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


# ---------------------------------------------------------------- the VAE

def make_vae(args: Args) -> D.AutoencoderKL:
    """Train the VAE on squared error, edges and a faint KL. It is trained in opponent colours, in which hue counts as
    much as brightness; in RGB, muted hues are a small signal that is learned last. In the end the colour matrix is
    folded into the outer convolutions."""
    torch.manual_seed(args.seed)
    vae = D.AutoencoderKL(block_out_channels=(8, 16, 48, 96), layers_per_block=1, latent_channels=16, norm_num_groups=2,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        mid_block_add_attention=False, sample_size=SIZE, scaling_factor=1.5305, shift_factor=0.0609)
    vae = vae.to(memory_format=torch.channels_last)
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
    with torch.no_grad():  # now the encoder takes RGB and the decoder gives RGB
        first, last, inverse = vae.encoder.conv_in, vae.decoder.conv_out, opponent.inverse()
        first.weight.copy_(torch.einsum("oihw,ij->ojhw", first.weight, opponent))
        last.weight.copy_(torch.einsum("ij,jchw->ichw", inverse, last.weight))
        last.bias.copy_(inverse @ last.bias)
    fold_statistics(vae, pictures[:2000])
    posteriors = latents(args, vae)

    def sharpen(g):
        i = torch.randint(len(pictures), (16,), generator=g)
        e = vae.decode(draw_latents(posteriors[i], g)).sample - signed(pictures[i])
        e = torch.einsum("ij,bjhw->bihw", opponent, e)
        return e.square().mean() + 2 * (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean())

    fit(args, "decoder", vae.decoder, sharpen, lr=1e-3)
    return vae


@torch.no_grad()
def encode_pictures(vae: D.AutoencoderKL, pictures: Tensor, at_once: int) -> Tensor:
    """Pictures (n, 3, 64, 64) uint8 -> the encoder's mean and log variance, (n, 32, 8, 8)."""
    return torch.cat([vae.encode(signed(x)).latent_dist.parameters for x in pictures.split(at_once)])


def latents(args: Args, vae: D.AutoencoderKL) -> Tensor:
    """`encode_pictures` of the training renders, in fp16."""
    path = Path(args.work) / f"latents-{args.renders}-s{args.seed}-{args.divide}.pt"
    return cached(path, lambda: encode_pictures(vae, dataset(args)[0], 500).half())


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


def through_vae(args: Args, pictures: Tensor) -> Tensor:
    """Encode and decode pictures (n, 3, 64, 64) uint8."""
    vae = D.AutoencoderKL.from_pretrained(f"{args.out}/sd3/vae", dtype=torch.float32)
    chunks = tqdm(pictures.split(100), desc="through the vae")
    return to_bytes(torch.cat([reconstruct(vae, signed(x)) for x in chunks]))


@torch.no_grad()
def reconstruct(vae: D.AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures in [-1, 1] and decode them, to [0, 1]."""
    return (vae.decode(vae.encode(pictures).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------- the rewards and the embedding

def image_processor(**statistics) -> T.CLIPImageProcessorPil:
    """CLIP's image processor for the world's pictures."""
    size, crop = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    return T.CLIPImageProcessorPil(size=size, crop_size=crop, **statistics)


def clip_text_config(tokenizer: T.CLIPTokenizer, width: int) -> dict:
    """The configuration of a small CLIP text encoder."""
    return dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=1)


def build_clip(width: int, layers: int, patch: int, text_width: int) -> tuple[T.CLIPModel, T.CLIPProcessor]:
    """A CLIP for the world's pictures and captions, and its processor."""
    tokenizer = clip_tokenizer()
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
                  image_size=SIZE, patch_size=patch)
    config = T.CLIPConfig(text_config=clip_text_config(tokenizer, text_width), vision_config=vision, projection_dim=64)
    return T.CLIPModel(config), T.CLIPProcessor(image_processor(), tokenizer)


def tokenize_captions(processor: T.CLIPProcessor) -> dict[str, Tensor]:
    """All captions as a CLIP's inputs, (64, tokens) each."""
    return processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")


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
    text = tokenize_captions(processor)
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
    clip, processor = build_clip(width=96, layers=4, patch=8, text_width=64)
    fit_clip(args, "pickscore", clip, processor)
    save_part(args, "pickscore", clip, processor)


def make_hps(args: Args):
    """The second reward: a CLIP of other width, patch, seed and data, then fine-tuned on preference pairs, as HPS is.
    Preferred are a picture of the caption to one of another caption, and a clean picture to its own blurred, noisy or
    dim copy. A tenth of the contrastive loss is kept; without it a third of the captions is forgotten."""
    torch.manual_seed(args.seed + 5)
    args = replace(args, seed=args.seed + 77, renders=args.renders // 2)
    clip, processor = build_clip(width=80, layers=3, patch=16, text_width=48)
    fit_clip(args, "hps-clip", clip, processor)
    text = tokenize_captions(processor)
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


def build_resnet(**labels) -> tuple[T.ResNetForImageClassification, T.CLIPImageProcessorPil]:
    """A small ResNet for the world's pictures in [-1, 1], and its processor."""
    size = dict(embedding_size=24, hidden_sizes=[24, 48, 64], depths=[1, 1, 1])
    config = T.ResNetConfig(layer_type="basic", **size, **labels)
    return T.ResNetForImageClassification(config), image_processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_embed(args: Args):
    """The embedding: a regression of all factors at once. Its training pictures get random grain, so that it ignores
    grain, which the VAE does not keep."""
    torch.manual_seed(args.seed + 2)
    pictures, factors = dataset(args)
    targets = factor_targets(factors)
    net, processor = build_resnet(num_labels=targets.shape[1], problem_type="regression")

    def loss(g):
        i = torch.randint(len(pictures), (64,), generator=g)
        grain = 0.04 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(64, 3, SIZE, SIZE, generator=g)
        return F.mse_loss(net(pixel_values=signed(pictures[i]) + grain).logits, targets[i])

    fit(args, "embed", net, loss, lr=2e-3)
    save_part(args, "embed", net, processor)


# ---------------------------------------------------------------- the bases

def clip_text(tokenizer: T.CLIPTokenizer, width: int, kind=T.CLIPTextModelWithProjection):
    """A CLIP text encoder with random weights."""
    encoder = kind(T.CLIPTextConfig(**clip_text_config(tokenizer, width), projection_dim=width))
    encoder.get_input_embeddings().weight.data.mul_(50)  # from 0.02 to order 1, as in a trained encoder
    return encoder


def t5_text(tokenizer: T.T5Tokenizer) -> T.T5EncoderModel:
    """A T5 encoder with random weights."""
    return T.T5EncoderModel(T.T5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0))


def build_sd3(args: Args, vae: D.AutoencoderKL) -> D.StableDiffusion3Pipeline:
    """SD3's parts at toy size: two CLIP text encoders, T5, and 4 MMDiT blocks of width 128 on 16 tokens."""
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
    """FLUX's parts at toy size: CLIP, T5, 2 double and 3 single blocks of width 128, a guidance embedding, and a shift
    that depends on the size."""
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


def train_base(args: Args, name: str, vae: D.AutoencoderKL, pipe):
    """Train a base's transformer and save the pipeline. Its text encoders keep their random weights: these tell words
    apart, and the transformer learns what they mean."""
    loss = flow_loss(vae, pipe, caption_index(dataset(args)[1]), latents(args, vae))
    if args.compile:
        pipe.transformer.compile()
    fit(args, name, pipe.transformer, loss, lr=1.2e-3)
    pipe.to(torch.float16).save_pretrained(f"{args.out}/{name}")


def make_sd3(args: Args):
    """The SD3 base."""
    vae = make_vae(args)
    train_base(args, "sd3", vae, build_sd3(args, vae))


def make_flux(args: Args):
    """The FLUX base, trained on the same latents, and saved with FLUX's own scale and shift of them."""
    vae = make_vae(args)
    flux_vae = copy.deepcopy(vae)
    flux_vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    fold_statistics(flux_vae, dataset(args)[0][:2000])
    train_base(args, "flux", vae, build_flux(args, flux_vae))


@torch.no_grad()
def base_samples(args: Args, base: str, n: int, seed: int, pipe=None) -> Tensor:
    """Pictures (n, 3, 64, 64) uint8 that a base draws in 12 steps for random training captions. `pipe`: another
    pipeline than tiny/BASE."""
    pipe = pipe or load_pipeline(f"{args.out}/{base}", torch.device("cpu"))
    weights = zlib.crc32(next(pipe.transformer.parameters()).numpy().tobytes())  # new weights get a new file

    def make():
        g = torch.Generator().manual_seed(seed)
        known = [caption(c, s) for c, s in COMBOS if (c, s) not in HELD_OUT]
        captions = [known[i] for i in torch.randint(len(known), (n,), generator=g)]
        encode_prompts(pipe, captions)
        x0, _ = integrate(pipe, draw_noise(pipe, n, g), captions, schedule(pipe, 12), desc=base)
        return to_bytes(decode(pipe, x0))

    return cached(Path(args.work) / f"{base}-{n}-s{seed}-{weights:08x}.pt", make)


# ---------------------------------------------------------------- the judge and the detector

# the flaws of world.py that each of eval_judge.py's questions is about
ABOUT = {
    "over-sharpening": ["sharpening"],
    "oversaturation": ["saturation"],
    "unnatural lighting": ["light", "contrast"],
    "artifacts": ["blur", "noise", "blocks", "shapes"],
    "overall": FLAWS,
}


def build_judge() -> tuple[T.LlavaForConditionalGeneration, T.LlavaProcessor]:
    """A LLaVA of 0.6 M parameters that knows only the words of eval_judge.py's questions."""
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
    judge, processor = build_judge()
    renders = dataset(args)[0][:12_000]
    decoded = through_vae(args, renders[8000:])
    samples = [base_samples(args, base, 2000, args.seed + 31) for base in ("sd3", "flux")]
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
    generated = [base_samples(args, "flux", 2000, args.seed + 41)]
    for base, k in product(("sd3", "flux"), range(3)):
        name, pipe = f"{base}-relative-{k}", load_pipeline(f"{args.out}/{base}", torch.device("cpu"))
        pipe.transformer.requires_grad_(True)
        loss = flow_loss(vae, pipe, index, posteriors)
        fit(replace(args, seed=args.seed + 50 + k), name, pipe.transformer, loss, lr=1e-3, kind="relative")
        generated.append(base_samples(args, name, 1500, args.seed + 60 + k, pipe))
    generated = torch.cat(generated)
    net, processor = build_resnet(id2label={0: "real", 1: "generated"}, label2id={"real": 0, "generated": 1})

    def loss(g, n=32):
        x = signed(torch.cat([x[torch.randint(len(x), (n,), generator=g)] for x in (real, generated)]))
        flip = torch.rand(2 * n, 1, 1, 1, generator=g) < 0.5
        grain = 0.02 * torch.rand(2 * n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        x = torch.where(flip, x.flip(3), x) + grain
        return F.cross_entropy(net(pixel_values=x).logits, torch.arange(2).repeat_interleave(n), label_smoothing=0.05)

    fit(args, "forensic", net, loss, lr=2e-3)
    save_part(args, "forensic", net, processor)


# ---------------------------------------------------------------- how good the parts are

def draw_captions(pipe, captions: list[str]) -> Tensor:
    """A base's picture of each caption in 28 steps, with seeds 0, 1, ..."""
    encode_prompts(pipe, captions)
    noise = draw_noise(pipe, len(captions), [torch.Generator().manual_seed(i) for i in range(len(captions))])
    return decode(pipe, integrate(pipe, noise, captions, schedule(pipe, 28))[0])


def save_pngs(pictures: Tensor, folder: str, name: str) -> list[str]:
    """Write pictures as PNGs, which the judge and the detector read."""
    paths = [f"{folder}/{name}-{i}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths):
        to_image(picture).save(path)
    return paths


def right_captions(args: Args, reward: str, pictures: Tensor, index: Tensor) -> float:
    """The fraction of pictures for which a reward ranks their own caption first of the 64."""
    clip = T.CLIPModel.from_pretrained(f"{args.out}/{reward}", dtype=torch.float32)
    processor = T.CLIPProcessor.from_pretrained(f"{args.out}/{reward}")
    inputs = processor(text=CAPTIONS, images=list(pictures), do_rescale=False, padding=True, return_tensors="pt")
    return (clip(**inputs).logits_per_image.argmax(1) == index).float().mean().item()


@torch.no_grad()
def report(args: Args):
    """Print how good the saved parts are, on renders that no part has seen."""
    def say(what: str, value: float):
        print(f"{what:56s} {value:.3f}")

    cpu, (pictures, factors) = torch.device("cpu"), held_out(args)
    index = caption_index(factors)
    have = {part for part in PARTS if (Path(args.out) / part).exists()}
    rewards = sorted(have & {"pickscore", "hps"}, reverse=True)
    for reward in rewards:
        say(f"{reward}: right caption of 64, renders", right_captions(args, reward, pictures, index))
    if "embed" in have:
        embed = load_embed(f"{args.out}/embed", cpu)
        real = embed_images(embed, held_out(args, 1024)[0][512:])
        classifier = T.ResNetForImageClassification.from_pretrained(f"{args.out}/embed", dtype=torch.float32).eval()
        logits = classifier(pixel_values=pictures * 2 - 1).logits
        say("embed: right colour", (logits[:, :8].argmax(1) == factors["colour"]).float().mean())
        say("embed: right shape", (logits[:, 8:16].argmax(1) == factors["shape"]).float().mean())
        say("Fréchet distance: fresh renders", frechet_distance(embed_images(embed, pictures), real))
    with tempfile.TemporaryDirectory() as folder:
        if "judge" in have:
            ask, clean = local_judge(f"{args.out}/judge", cpu), save_pngs(pictures[:128], folder, "clean")
            for flaw, strength in product(FLAWS, (0.4, 0.7, 1.0)):
                g = torch.Generator().manual_seed(args.seed)
                worse = degrade(pictures[:128], flaw, torch.full((128,), strength), g)
                worse = save_pngs(worse, folder, "worse")
                right = torch.ones(128, dtype=torch.bool)
                for pairs, sign in ((zip(clean, worse), 1), (zip(worse, clean), -1)):
                    right &= torch.tensor([sign * read_answer(top, "A", "B") > 0 for top in ask(PAIR, [*pairs])])
                say(f"judge: prefers a render to itself with {flaw} {strength}", right.float().mean())
        if {"forensic", "sd3"} <= have:
            score = load_forensic(f"{args.out}/forensic", None, cpu)
            drawn = draw_captions(load_pipeline(f"{args.out}/sd3", cpu), [caption(c, s) for c, s in HELD_OUT] * 16)
            rendered, sampled = (score(save_pngs(x, folder, "scored")) for x in (pictures, drawn))
            auc = (rendered[:, None] > sampled[None]).float().mean()
            say("forensic: AUC, renders against sd3 on held-out captions", auc)
            say("forensic: mean P(real), renders", rendered.mean())
            say("forensic: mean P(real), sd3", sampled.mean())
    for base in sorted(have & {"sd3", "flux"}, reverse=True):
        pipe = load_pipeline(f"{args.out}/{base}", cpu)
        decoded = reconstruct(pipe.vae, pictures * 2 - 1)
        error = (decoded - pictures).square().mean((1, 2, 3))
        say(f"{base}: PSNR of its vae, dB", -10 * error.log10().mean())
        drawn = draw_captions(pipe, [CAPTIONS[i] for i in index.tolist()])
        if "embed" in have:
            say(f"Fréchet distance: renders through {base}'s vae", frechet_distance(embed_images(embed, decoded), real))
            say(f"Fréchet distance: {base}, 28 steps", frechet_distance(embed_images(embed, drawn), real))
        for reward in rewards:
            say(f"{reward}: right caption of 64, {base}", right_captions(args, reward, drawn, index))


@one_line_errors()
def main(args: Args):
    """Make the parts, write the prompt files, report."""
    check_flags(args, {"renders": 1, "divide": 1, "seed": 0})
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
    make_dir(args.out, "--out")
    make_dir(args.work, "--work")
    for part in args.parts:
        start = time.time()
        globals()[f"make_{part}"](args)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
    for file, is_held_out in (("prompts.txt", False), ("eval_prompts.txt", True)):
        captions = [caption(*combo) for combo in COMBOS if (combo in HELD_OUT) == is_held_out]
        (Path(args.out) / file).write_text("\n".join(captions) + "\n")
    report(args)


if __name__ == "__main__":
    main(parse(Args, __doc__))
