"""Tests of rewards: PickScore, HPSv2.1, SigLIP, functions, sums, a vision-language model's answers."""
import base64
import functools
import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import world
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPConfig, CLIPModel

import eval_judge
import flow.evaluate
import flow.pipeline
import flow.rewards
import flow.run
import sample
import train_dpo
from flow.judge import local_judge, read_answer
from flow.pictures import save_samples, to_image
from flow.rewards import (
    VLM_QUESTION,
    edit_distance,
    load_reward,
    reward_model,
    short_reward,
    split_reward,
    wanted_text,
)
from tests.families import fast_tokenizer, vocab_size
from tests.helpers import (
    CPU,
    SCRIPTS,
    answer,
    generator,
    lora_bytes,
    metrics,
    refuses,
    renders,
    sample_rows,
    small_run,
    timeless,
)

OVERALL = eval_judge.SINGLE["overall"]  # tiny/judge knows the words of eval_judge.py's questions only; it has commas


# ---------------------------------------------------------------- the models

@pytest.mark.parametrize("height, width", [
    (64, 64),
    (224, 224),
    (512, 512),
    (64, 128),
    (128, 64),
    (96, 65),
])
def test_differentiable_rewards_are_the_rewards(height, width):
    """torch's bicubic resizing against PIL's, for pictures smaller than, as large as and larger than the network's
    input. Wide and high ones are cropped as CLIP's processor does, and padded as HPSv2's."""
    drawn = world.render(world.scene(torch.arange(8), torch.Generator().manual_seed(1)))
    pictures = torch.nn.functional.interpolate(drawn, (height, width), mode="bicubic").clamp(0, 1)
    ours, theirs = (
        flow.rewards.load_reward("tiny/pickscore", CPU, differentiable=d)(pictures, world.CAPTIONS[:8])
        for d in (True, False)
    )
    np.testing.assert_allclose(ours, theirs, atol=0.01)
    mean, std = flow.rewards.OPENAI_CLIP_MEAN, flow.rewards.OPENAI_CLIP_STD
    longest_side = [max] if height != width else []
    for picture in pictures[:2]:
        pil = flow.rewards.hps_pixels(picture)
        own = flow.rewards.torch_pixels(picture[None], 224, mean, std, *longest_side)[0]
        assert (pil - own).abs().mean() < 0.02  # both in standard deviations: half a level of 255


def test_pickscore_formula():
    from transformers import CLIPModel, CLIPTokenizer
    pictures = world.render(world.scene(torch.arange(4), torch.Generator().manual_seed(0)))
    prompts = world.CAPTIONS[:2] + world.CAPTIONS[40:42]
    clip = CLIPModel.from_pretrained("tiny/pickscore", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained("tiny/pickscore")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        image = clip.get_image_features(((pictures * 255).round() / 255 - mean) / std).pooler_output
        words = clip.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output
    image, words = image.numpy().astype(np.float64), words.numpy().astype(np.float64)
    cosine = (image * words).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(words, axis=1)
    ours = flow.rewards.load_reward("tiny/pickscore", CPU)(pictures, prompts)
    np.testing.assert_allclose(ours.numpy(), cosine * math.exp(clip.logit_scale.item()) / 26, rtol=1e-4)
    assert ours[:2].min() > ours[2:].max()  # renders of the first captions: right ones score above wrong colours


class OpenClip(torch.nn.Module):
    """open_clip's CLIP of two small towers, written from its checkpoint's layout with torch's own layers."""

    def __init__(self, width, heads, positions, vocabulary=None, patch=14, out=16):
        super().__init__()
        self.class_embedding = torch.nn.Parameter(torch.randn(width)) if vocabulary is None else None
        self.positional_embedding = torch.nn.Parameter(0.3 * torch.randn(positions, width))
        self.proj = torch.nn.Parameter(torch.randn(width, out) / width**0.5)
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False) if vocabulary is None else None
        self.token_embedding = None if vocabulary is None else torch.nn.Embedding(vocabulary, width)
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width) if vocabulary is None else None, torch.nn.LayerNorm(width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({
                "ln_1": torch.nn.LayerNorm(width),
                "attn": torch.nn.MultiheadAttention(width, heads, batch_first=True),
                "ln_2": torch.nn.LayerNorm(width),
                "mlp": torch.nn.ModuleDict({
                    "c_fc": torch.nn.Linear(width, 4 * width),
                    "c_proj": torch.nn.Linear(4 * width, width),
                }),
            })
            for _ in range(2)
        )
        for p in self.parameters():
            p.data += 0.1 * torch.randn_like(p)

    def forward(self, x):
        if self.conv1 is not None:
            x = self.conv1(x).flatten(2).mT
            x = self.ln_pre(torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding)
            last, mask = 0, None
        else:
            last, x = x.argmax(1), self.token_embedding(x) + self.positional_embedding[:x.shape[1]]
            mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        for block in self.blocks:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + block["mlp"]["c_proj"](torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return torch.nn.functional.normalize(self.ln_post(x[torch.arange(len(x)), last]) @ self.proj, dim=1)


@torch.no_grad()
def test_hps_checkpoint_layout():
    """The same comparison with open_clip 3.3.0's model, made once outside the tests, agreed to 6e-16 in float64."""
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    image, words = OpenClip(32, 2, 5), OpenClip(24, 3, 8, vocabulary=50)
    state = {f"visual.{k.replace('blocks.', 'transformer.resblocks.')}": v for k, v in image.state_dict().items()}
    state["logit_scale"] = torch.tensor(2.0)
    for k, v in words.state_dict().items():
        renamed = k.replace("blocks.", "transformer.resblocks.").replace("ln_post", "ln_final")
        state[{"proj": "text_projection"}.get(k, renamed)] = v
    shared = dict(num_hidden_layers=2, hidden_act="gelu")
    vision = dict(hidden_size=32, intermediate_size=128, num_attention_heads=2, image_size=28, patch_size=14, **shared)
    text = dict(hidden_size=24, intermediate_size=96, num_attention_heads=3, max_position_embeddings=8,
                vocab_size=50, eos_token_id=49, **shared)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    clip.load_state_dict(flow.rewards.from_open_clip(state))
    pixels = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    ids = torch.tensor([[48, 3, 7, 49, 0], [48, 1, 49, 0, 0], [48, 1, 2, 3, 49]])
    out = clip.double()(pixel_values=pixels, input_ids=ids)
    np.testing.assert_allclose(out.image_embeds, image.double()(pixels), atol=1e-12)
    np.testing.assert_allclose(out.text_embeds, words.double()(ids), atol=1e-12)
    assert clip.logit_scale == 2
    with torch.device("meta"):
        published = CLIPModel(CLIPConfig(**flow.rewards.VIT_H_CONFIG))
    assert sum(p.numel() for p in published.parameters()) == 986_109_441  # open_clip's ViT-H-14


def test_hps_pixels():
    """As HPSv2's ResizeMaxSize: the longest side becomes 224, the rest is zero (black) before normalisation."""
    x = flow.rewards.hps_pixels(torch.ones(3, 32, 64))
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    black, white = (np.subtract(v, mean) / std for v in (0, 1))
    assert x.shape == (3, 224, 224)
    np.testing.assert_allclose(x[:, :56].amax((1, 2)), black, rtol=1e-5)
    np.testing.assert_allclose(x[:, 168:].amax((1, 2)), black, rtol=1e-5)
    np.testing.assert_allclose(x[:, 56:168].amin((1, 2)), white, rtol=1e-5)


def test_the_two_proxies_differ():
    """Both follow the caption. Only hps, which was tuned on preferences, sees that a picture is dimmed or blurred."""
    pictures = world.render(world.scene(torch.arange(64), torch.Generator().manual_seed(5)))
    dim = 0.65 * pictures
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pictures, 4), 64, mode="bilinear")
    pick, hps = (flow.rewards.load_reward(f"tiny/{name}", CPU) for name in ("pickscore", "hps"))
    for reward in (pick, hps):
        mismatched = reward(pictures, world.CAPTIONS[9:] + world.CAPTIONS[:9])
        assert reward(pictures, world.CAPTIONS).mean() > mismatched.mean() + 0.7
    for worse in (dim, blurred):
        assert (pick(pictures, world.CAPTIONS) - pick(worse, world.CAPTIONS)).mean().abs() < 0.05
        assert (hps(pictures, world.CAPTIONS) - hps(worse, world.CAPTIONS)).mean() > 0.15


def test_a_siglip_reward_does_not_depend_on_the_other_prompts(tmp_path):
    """SigLIP sees padding, so each prompt is padded to the same length in any batch."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

    torch.manual_seed(0)
    shared = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(shared, vocab_size=vocab_size(), max_position_embeddings=16, projection_size=16)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(shared, image_size=32, patch_size=8))).eval()
    processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), fast_tokenizer(length=16))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures, prompts = torch.rand(2, 3, 32, 32), ["a red star", "a red ring and a blue heart and a green moon"]
    pictures = (pictures * 255).round() / 255
    load = functools.partial(flow.rewards.load_reward, str(tmp_path), CPU)
    together = load()(pictures, prompts)
    alone = torch.cat([load()(pictures[i:i + 1], prompts[i:i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    ids = processor.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(pixel_values=2 * pictures - 1, input_ids=ids)
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds) * model.logit_scale.exp() / 26
    torch.testing.assert_close(together, cosine.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(load(differentiable=True)(pictures, prompts), cosine.detach(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- functions and sums


def test_reward_from_a_function(tmp_path):
    (tmp_path / "red.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2)) + len(prompts)\n")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = flow.rewards.load_reward(f"{tmp_path}/red.py:red", CPU, batch=2)(images, ["a"] * 3)
    np.testing.assert_allclose(ours.numpy(), images[:, 0].numpy().reshape(3, -1).mean(1) + [2, 2, 1], rtol=1e-6)


METADATA = """import functools
import torch
def third(images, prompts, metadata):
    assert len(images) == len(prompts) == len(metadata) and all(type(fields) is dict for fields in metadata)
    return torch.tensor([float(fields.pop("n", -1)) for fields in metadata])
def default(images, prompts, fields={}):
    return third(images, prompts, fields)
def two(images, prompts, *, metadata=None):
    return torch.full((len(prompts),), 7.0 + (metadata is not None))
def wrap(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner
wrapped = wrap(third)
class Network(torch.nn.Module):
    def forward(self, images, prompts, metadata=None):
        return third(images, prompts, metadata)
needs = lambda images, prompts, metadata: torch.tensor([float(fields["n"]) for fields in metadata])
"""
ROWS = [{"prompt": "a red star", "n": i} for i in range(5)]  # of one text: only the row tells them apart


def test_metadata_reaches_functions_that_take_a_third_argument(tmp_path):
    """One dict a picture, in parts of a sum and in batches, a copy each; a video's for each frame."""
    (tmp_path / "m.py").write_text(METADATA)
    spec = ",".join(f"{tmp_path}/m.py:{name}" for name in ("third", "default", "two", "wrapped", "Network"))
    reward, fields = flow.rewards.load_reward(spec, CPU, batch=2), [{"n": i} for i in range(5)]
    for images in (torch.rand(5, 3, 8, 8), torch.rand(5, 2, 3, 8, 8)):
        assert reward.scores_of(images, ["a"] * 5, fields).tolist() == [[*range(5)]] * 2 + [[7] * 5] + [[*range(5)]] * 2
        assert reward(images, ["a"] * 5, [{"n": 3}] * 5).tolist() == [19] * 5
        assert reward.scores_of(images, ["a"] * 5)[0].tolist() == [-1] * 5
    assert fields == [{"n": i} for i in range(5)]


def test_metadata_goes_by_row_from_the_file_to_the_reward(tmp_path, monkeypatch):
    """In training (shuffled), in its evaluations, in sample.py and eval_judge.py; a resumed run has the same."""
    (tmp_path / "m.py").write_text(METADATA)
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    given = dict(prompts=f"{tmp_path}/p.jsonl", eval_prompts=f"{tmp_path}/p.jsonl", reward=f"{tmp_path}/m.py:needs",
                 group=2, groups=5, updates=1, batch=16, steps=3, eval_n=5, eval_every=1)
    for script in SCRIPTS:
        seen, pairs = [], {"pairs": 1} if script is train_dpo else {}
        monkeypatch.setattr(script, "score", lambda *args: seen.append(flow.evaluate.score(*args)) or seen[-1])
        out = small_run(tmp_path / script.__name__, script, epochs=1, **given, **pairs)
        small_run(out, script, epochs=2, **given, **pairs)
        for epoch, (scores,) in enumerate(seen):
            order = torch.randperm(5, generator=generator(0, 0, epoch))
            assert scores.tolist() == order.repeat_interleave(2).tolist()
        assert len(seen) == 2 and [x["eval_reward"] for x in metrics(out) if "eval_reward" in x] == [2.0] * 3
    sample.main(sample.Args(prompts=given["prompts"], n=2, steps=2, reward=given["reward"], out=f"{tmp_path}/out"))
    assert [row["reward"] for row in sample_rows(tmp_path / "out")] == [i // 2 for i in range(10)]
    assert [row["metadata"] for row in sample_rows(tmp_path / "out")] == [{"n": i // 2} for i in range(10)]
    eval_judge.main(eval_judge.Args(dirs=(f"{tmp_path}/out",), reward=(given["reward"],), judge=None, forensic=(),
                                    out=f"{tmp_path}/eval"))
    report = json.loads((tmp_path / "eval/report.json").read_text())
    assert report["metrics"]["reward/m.py:needs"][f"{tmp_path}/out"]["mean"] == 2
    sample.main(sample.Args(prompt="a red star", steps=2, reward=f"{tmp_path}/m.py:third", out=f"{tmp_path}/one"))
    assert sample_rows(tmp_path / "one")[0]["reward"] == -1 and "metadata" not in sample_rows(tmp_path / "one")[0]


def test_a_reward_cannot_change_pictures_that_others_see(tmp_path):
    """It may write into its copy: neither the next part of a sum nor the saved file shows it."""
    (tmp_path / "rude.py").write_text("def rude(images, prompts):\n    images.mul_(255)\n    prompts.clear()\n"
                                      "    return images.mean((1, 2, 3))\n"
                                      "def after(images, prompts):\n    return images.amax((1, 2, 3)) + len(prompts)\n")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    spec = f"{tmp_path}/rude.py:rude,{tmp_path}/rude.py:after"
    scores = flow.rewards.load_reward(spec, CPU).scores_of(images, ["a"] * 3)
    torch.testing.assert_close(scores, torch.stack([255 * before.mean((1, 2, 3)), before.amax((1, 2, 3)) + 3]))
    assert torch.equal(images, before)
    for name, reward in (("plain", None), ("rude", f"{tmp_path}/rude.py:rude")):
        sample.main(sample.Args(prompt="a red star", steps=2, reward=reward, out=str(tmp_path / name)))
    assert (tmp_path / "plain/00000.png").read_bytes() == (tmp_path / "rude/00000.png").read_bytes()


@pytest.mark.parametrize("size", [None, 32])
def test_a_reward_is_tried_on_pictures_like_the_runs(tmp_path, size):
    """The trial pictures have the run's size and more than one colour."""
    (tmp_path / "picky.py").write_text(f"def picky(images, prompts):\n    assert images.shape[1:] == (3, {size or 64}, "
                                       f"{size or 64})\n    return images.std((1, 2, 3)) / images.mean((1, 2, 3))\n")
    small_run(tmp_path / "run", reward=f"{tmp_path}/picky.py:picky", size=size, epochs=1, eval_every=0)


def test_a_videos_reward_is_the_mean_over_four_frames(tmp_path):
    (tmp_path / "red.py").write_text("def red(images, prompts):\n    assert images.ndim == 4\n"
                                     "    return images[:, 0].mean((1, 2))\n")
    reward = load_reward(f"{tmp_path}/red.py:red", CPU)
    videos = torch.rand(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(reward(videos, ["a", "b"]), videos[:, [0, 3, 6, 9], 0].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(reward(videos[:, :3], ["a", "b"]), videos[:, :3, 0].mean((1, 2, 3)), rtol=1e-6)


def test_a_reward_without_some_of_its_weights_is_refused(tmp_path, capsys):
    """transformers would make them random."""
    folder = shutil.copytree("tiny/pickscore", tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in weights.items() if name != "visual_projection.weight"},
              folder / "model.safetensors", {"format": "pt"})
    refuses(capsys, lambda: load_reward(str(folder), CPU), f"--reward {folder}", "visual_projection.weight")


def test_an_empty_reward_names_the_known_ones(capsys):
    refuses(capsys, lambda: load_reward("", CPU), "--reward ''", "pickscore")


def test_a_function_may_be_named_nan(tmp_path):
    """Its name is not read as a weight."""
    (tmp_path / "f.py").write_text("def nan(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = load_reward(f"{tmp_path}/f.py:nan,{tmp_path}/f.py:nan:2", CPU)
    torch.testing.assert_close(reward(renders(), ["a"] * 3), 3 * renders().mean((1, 2, 3)))


# ---------------------------------------------------------------- a vision-language model

def test_a_vlm_reward_is_the_judge(folders):
    """The reward is P(yes) of each picture: alone, in a weighted sum, and on video frames."""
    x, prompts = renders(), world.CAPTIONS[:3]
    files = [[f"{folders[0]}/0000{i}.png"] for i in range(3)]
    answers = local_judge("tiny/judge", CPU)(OVERALL, files)
    p = torch.tensor([read_answer(top, "yes", "no") for top in answers]).sigmoid()
    assert 0 < p.min() and p.max() < 1 and p.std() > 0
    judge = load_reward("vlm:tiny/judge", CPU, question=OVERALL)
    torch.testing.assert_close(judge(x, prompts), p)
    pick = load_reward("tiny/pickscore", CPU)(x, prompts)
    both = load_reward("tiny/pickscore:0.5,vlm:tiny/judge:2", CPU, question=OVERALL)
    torch.testing.assert_close(both(x, prompts), 0.5 * pick + 2 * p)
    torch.testing.assert_close(judge(x[None], prompts[:1]), p.mean()[None])


@pytest.mark.parametrize("question", [None, "{prompt}: is it there, or not?"])
def test_a_vlm_reward_over_http(server, question):
    """The model's name on the server may contain a colon. The question contains the prompt, whatever characters it
    has."""
    url, _, asked = server
    prompts = ["a red star", "a {blue} ring, 1:2", "50 % [moon]"]
    reward = load_reward(f"vlm:qwen2.5vl:7b@{url}:0.5", CPU, question=question)
    torch.testing.assert_close(reward(renders(), prompts), torch.full((3,), 0.5 * 0.6 / 0.9))
    assert {request["model"] for _, request in asked} == {"qwen2.5vl:7b"}
    content = [request["messages"][0]["content"] for _, request in asked]
    asked_for = {(question or VLM_QUESTION).replace("{prompt}", prompt) for prompt in prompts}
    assert {parts[1]["text"] for parts in content} == asked_for
    urls = {parts[0]["image_url"]["url"].partition("base64,")[2] for parts in content}
    sent = {Image.open(io.BytesIO(base64.b64decode(url))).convert("RGB").tobytes() for url in urls}
    assert sent == {to_image(picture).tobytes() for picture in renders()}


def test_a_vlm_reward_without_an_answer(server, capsys):
    url, replies, _ = server
    reward = load_reward(f"vlm:m@{url}", CPU)
    replies += [(200, answer({"Well": 1.0}))]
    refuses(capsys, lambda: reward(renders(1), ["a red star"]), "--reward vlm:m", "neither yes nor no", "'Well'",
            "a red star")
    replies += [(200, {"choices": [{"message": {"content": "", "reasoning_content": "Yes, but"}}]})]
    refuses(capsys, lambda: reward(renders(1), ["a red star"]), f"--reward vlm: {url}",
            "thinks first (<think>Yes, but)")
    replies += [(404, {})]
    refuses(capsys, lambda: reward(renders(1), ["a red star"]), f"--reward vlm: {url}", "404")


def test_a_vlm_reward_without_probabilities_says_so_once(server, capsys):
    url, replies, _ = server
    replies += [(200, {"choices": [{"message": {"content": text}}]}) for text in ("Yes", "yes", "No", "Yes.")]
    reward = load_reward(f"vlm:m@{url}", CPU)
    assert all(score in (0, 1) for score in reward(renders(2), ["a", "b"]).round(decimals=6).tolist())
    assert sorted(reward(renders(2), ["a", "b"]).round(decimals=6).tolist()) == [0, 1]
    printed = capsys.readouterr()
    assert printed.out.count("without probabilities") == 1 and not printed.err


def test_vlm_specs_that_are_refused(capsys):
    for spec, words in [
        ("vlm:", ["vlm:MODEL"]),
        ("vlm:http://localhost:8000/v1", ["vlm:MODEL@http://HOST:PORT/v1"]),
        ("vlm:m@localhost:8000/v1", ["vlm:MODEL@http://HOST:PORT/v1"]),
        ("vlm:m@http://localhost:8000", ["vlm:MODEL@http://HOST:PORT/v1"]),  # 8000 would be a weight
        ("vlm:tiny/judge[Good?]", ["--vlm-question"]),
        ("tiny/hps,vlm:m@http://localhost:8000/v1[Good, or not?]:2", ["--vlm-question"]),
        ("vlm:tiny/judge:nan", ["weight"]),
        ("vlm:no/such/model", ["no/such/model", "no such folder"]),
        ("vlm:tiny/hps", ["tiny/hps", "cannot be loaded"]),
    ]:
        refuses(capsys, lambda: load_reward(spec, CPU), "--reward", *words)


@pytest.mark.parametrize("spec, parts, short", [
    ("pickscore", [("pickscore", 1.0, "yuvalkirstain/PickScore_v1")], "pickscore"),
    ("runs/clip/:0.5,a/b", [("runs/clip/", 0.5, "runs/clip/"), ("a/b", 1.0, "a/b")], "clip:0.5,b"),
    ("pickscore:2, a/b", [("pickscore", 2.0, "yuvalkirstain/PickScore_v1"), ("a/b", 1.0, "a/b")], "pickscore:2,b"),
    ("dir/f.py:nan:-1e-1", [("dir/f.py:nan", -0.1, "dir/f.py")], "f.py:nan:-1e-1"),
    ("f.py:nan", [("f.py:nan", 1.0, "f.py")], "f.py:nan"),
    ("vlm:a/b@http://h:8000/v1", [("vlm:a/b@http://h:8000/v1", 1.0, "a/b")], "b"),
    ("vlm:q:7b@http://h:8000/v1:2", [("vlm:q:7b@http://h:8000/v1", 2.0, "q:7b")], "q:7b:2"),
    ("vlm:m@http://h:8000", [("vlm:m@http://h:8000", 1.0, "m")], "m"),
])
def test_parts_and_short_name_of_a_reward(spec, parts, short):
    """A port, or a function that is called like a number, is no weight."""
    assert [(name, weight, reward_model(name)) for name, weight in split_reward(spec)] == parts
    assert short_reward(spec) == short


FOREIGN = """
import io
import numpy as np
import torch
from PIL import Image

def red(images):
    return images[:, 0].mean((1, 2))

def as_list(images, prompts):
    return red(images).tolist()

def as_array(images, prompts):
    return red(images).numpy()

def as_column(images, prompts):
    return red(images)[:, None]

def with_info(images, prompts, metadata):
    assert metadata == [{} for _ in prompts]
    return red(images).tolist(), {"anything": 1}

def with_default(images, prompts, metadata=None):
    assert metadata == [{} for _ in prompts]
    return red(images)

def named(images, prompts):
    return {"red": red(images).tolist(), "none": [0.0] * len(prompts)}

def averaged(images, prompts):
    return {"strict": [9.0] * len(prompts), "avg": red(images)}

def of_pil(images, prompts):
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    return [np.asarray(image)[:, :, 0].mean() / 255 for image in images]

def of_bytes(images, prompts):
    assert images.dtype == np.uint8 and images.shape[3] == 3
    return images[..., 0].mean((1, 2)) / 255

def factory():
    def score(images, prompts, metadata):
        return red(images), {}
    return score

def factory_of(device, batch):
    return as_column

def with_words(images, prompts):
    return {"red": red(images), "words": prompts}

def factory_on(device):
    assert device.type == "cpu"
    return as_column

class Scorer(torch.nn.Module):
    def __init__(self, device="cuda"):
        super().__init__()
        self.to(device)
    def forward(self, images, prompts):
        return red(images).requires_grad_()

def sizes():
    def kilobytes(image):
        content = io.BytesIO()
        image.save(content, "JPEG", quality=95)
        return content.tell() / 1000
    return lambda images, prompts, metadata: (np.array([-kilobytes(image) for image in images]), {})
"""


@pytest.mark.parametrize("function, factor", [
    ("as_list", 1),
    ("as_array", 1),
    ("as_column", 1),
    ("with_info", 1),
    ("with_default", 1),
    ("named[red]", 1),
    ("named", 0.5),  # the mean of both
    ("averaged", 1),
    ("of_pil@pil", 1),
    ("of_bytes@uint8", 1),
    ("factory", 1),
    ("factory_on", 1),
    ("Scorer", 1),
])
def test_rewards_of_other_repositories(tmp_path, function, factor):
    """As others write them: what they take, what they return, and what makes them."""
    (tmp_path / "f.py").write_text(FOREIGN)
    images = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    scores = load_reward(f"{tmp_path}/f.py:{function}:2", CPU)(images, ["a", "b", "c"])
    torch.testing.assert_close(scores, 2 * factor * images[:, 0].mean((1, 2)))


def test_a_compressibility_reward_prefers_a_flat_picture(tmp_path):
    (tmp_path / "f.py").write_text(FOREIGN)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.stack([torch.full((3, 64, 64), 0.5), noise])
    flat, noisy = load_reward(f"{tmp_path}/f.py:sizes@pil", CPU)(images, ["a", "b"])
    assert flat > noisy


def test_foreign_rewards_that_are_refused(tmp_path, capsys):
    (tmp_path / "f.py").write_text(FOREIGN)
    for function, words in [
        ("red@png", ["red@pil", "red@uint8"]),
        ("named[blue]", ["red, none", "blue"]),
        ("nothing", ["no function nothing"]),
        ("red", ["failed", "f.py"]),  # it takes no prompts
        ("factory_of", ["returned <function", "3 numbers"]),
        ("with_words", ["red, words", "[NAME]"]),
    ]:
        refuses(capsys, lambda: load_reward(f"{tmp_path}/f.py:{function}", CPU)(torch.rand(3, 3, 8, 8), ["a"] * 3),
                "--reward", *words)


DICTS = """
import torch
calls = []
def scores(images, prompts):
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    return {"avg": (red + blue) / 2, "red": red.tolist(), "blue": blue[:, None], "one": [0.5] * 3,
            "unknown": [float("nan")] * len(images), "text": ["no score"] * len(images)}
def changing(images, prompts):
    calls.append(None)
    return {"red": images[:, 0].mean((1, 2)), "blue" if len(calls) < 3 else "green": images[:, 2].mean((1, 2))}
def later(images, prompts):
    calls.append(None)
    scores = images[:, 0].mean((1, 2))
    return scores if len(calls) < 3 else {"red": scores}
"""


def test_a_reward_may_import_from_beside_it(tmp_path):
    """Its folder is searched for modules."""
    (tmp_path / "scorer_beside_it.py").write_text("def red(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "mine.py").write_text("from scorer_beside_it import red\n")
    assert load_reward(f"{tmp_path}/mine.py:red", CPU)(torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]


def test_a_reward_that_needs_more_is_refused(tmp_path, capsys):
    (tmp_path / "r.py").write_text("class Big:\n    def __init__(self, path):\n        pass\n\n\n"
                                   "def swapped(prompts, images):\n    return images.mean((1, 2, 3))\n")
    refuses(capsys, lambda: load_reward(f"{tmp_path}/r.py:Big", CPU), "Big() failed", "path", "write a function")
    swapped = load_reward(f"{tmp_path}/r.py:swapped", CPU, flag="--eval-reward")
    refuses(capsys, lambda: swapped(torch.ones(2, 3, 4, 4), ["a", "b"]), "--eval-reward", "r.py:swapped",
            "(2, 3, 4, 4) pictures, 2 prompts", "r.py:7")


def test_each_score_of_a_dict_has_a_name_and_a_row(tmp_path):
    """Besides what is used; of parts of a sum, in batches of any size and for videos. What is no number is left out."""
    (tmp_path / "d.py").write_text(DICTS)
    images = torch.rand(5, 3, 8, 8, generator=generator(0))
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    reward = load_reward(f"{tmp_path}/d.py:scores[red]:2,{tmp_path}/d.py:scores", CPU, batch=2)
    assert reward.names == ["d.py:scores[red]", "d.py:scores"]
    for pictures in (images, images[:, None].repeat(1, 2, 1, 1, 1)):
        scores = reward.scores_of(pictures, ["a"] * 5)
        by_name = dict(zip(reward.names, scores))
        assert len(scores) == len(reward.names) and by_name.pop("d.py:scores[unknown]").isnan().all()
        torch.testing.assert_close(by_name, {
            "d.py:scores[red]": red, "d.py:scores[avg]": (red + blue) / 2, "d.py:scores[blue]": blue,
            "d.py:scores": (red + blue) / 2}, check_stride=False)
        torch.testing.assert_close(reward.weighted(scores), 2 * red + (red + blue) / 2)


@pytest.mark.parametrize("specs, names", [
    (["a/d.py:scores[red]", "a/d.py:scores[blue]:3"], ["d.py:scores[red]", "d.py:scores[blue]"]),  # one function
    (["b/d.py:scores[blue]", "a/d.py:scores:3"], ["b/d.py:scores[blue]", "a/d.py:scores"]),
    (["a/d.py:scores", "b/d.py:scores[blue]:3"], ["a/d.py:scores", "b/d.py:scores[blue]"]),
])
def test_the_scores_of_two_dicts_are_kept_apart(tmp_path, monkeypatch, specs, names):
    """Two files of one name whose scores have other values: each is what its name says, and weighs what it should."""
    monkeypatch.chdir(tmp_path)
    for folder, text in (("a", DICTS), ("b", DICTS.replace("images[:, 2]", "10 * images[:, 2]"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.py").write_text(text)
    images = torch.rand(3, 3, 8, 8, generator=generator(0))
    alone = [load_reward(spec.removesuffix(":3"), CPU)(images, ["a"] * 3) for spec in specs]
    both = load_reward(",".join(specs), CPU)
    scores = both.scores_of(images, ["a"] * 3)
    assert {*names} <= {*both.names}
    torch.testing.assert_close(both.weighted(scores), alone[0] + 3 * alone[1])
    for name, score in zip(names, alone):
        torch.testing.assert_close(dict(zip(both.names, scores))[name], score)


def test_each_score_of_a_dict_is_logged_in_training_and_at_evaluations(tmp_path):
    (tmp_path / "d.py").write_text(DICTS)
    out = small_run(tmp_path / "run", epochs=1, group=3, updates=1, steps=2, eval_every=1, eval_n=3,
                    reward=f"{tmp_path}/d.py:scores[blue]")
    before, step, after = metrics(out)
    assert step["reward/d.py:scores[blue]"] == step["reward"] and step["reward/d.py:scores[unknown]"] is None
    assert {key for key in step if key.startswith("reward")} == {
        key + std for std in ("", "_std") for key in (
            "reward", *(f"reward/d.py:scores[{name}]" for name in ("avg", "red", "blue", "unknown")))}
    for line in (before, after):
        assert line["eval_reward/d.py:scores[blue]"] == line["eval_reward"]
        both = line["eval_reward/d.py:scores[red]"] + line["eval_reward/d.py:scores[blue]"]
        assert line["eval_reward/d.py:scores[avg]"] == pytest.approx(both / 2)


def test_an_eval_reward_is_no_score_of_the_trained_dict(tmp_path):
    """Of two files of one name: their scores of one name are logged apart."""
    for folder, text in (("a", DICTS), ("b", DICTS.replace("images[:, 2]", "10 * images[:, 2]"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.py").write_text(text)
    out = small_run(tmp_path / "run", epochs=1, group=3, updates=1, steps=2, eval_every=1, eval_n=3,
                    reward=f"{tmp_path}/a/d.py:scores", eval_reward=(f"{tmp_path}/b/d.py:scores[blue]",))
    for line in metrics(out)[::2]:
        ours, theirs = line["eval_reward/d.py:scores[blue]"], line[f"eval_reward/{tmp_path}/b/d.py:scores[blue]"]
        assert theirs == pytest.approx(10 * ours)


def test_a_dict_has_a_gradient_where_what_is_used_has_one(tmp_path, capsys):
    (tmp_path / "d.py").write_text(DICTS)
    images = torch.rand(2, 3, 8, 8, generator=generator(0)).requires_grad_()
    for spec in ("d.py:scores[blue]", "d.py:scores,tiny/pickscore:0"):
        scores = load_reward(f"{tmp_path}/{spec}", CPU, differentiable=True)(images, ["a"] * 2)
        assert torch.autograd.grad(scores.sum(), images)[0].any()
    for spec in ("d.py:scores[red]", f"d.py:scores,{tmp_path}/d.py:scores[red]"):  # it is made a list
        refuses(capsys, lambda: load_reward(f"{tmp_path}/{spec}", CPU, differentiable=True), "--adjoint", "scores[red]")


def test_a_dict_of_other_names_ends_the_run(tmp_path, capsys):
    (tmp_path / "d.py").write_text(DICTS)
    for function, words in [
        ("changing", ["red, green", "red, blue"]),
        ("later", ["named red", "nothing"]),
    ]:
        refuses(capsys, lambda: small_run(tmp_path / function, reward=f"{tmp_path}/d.py:{function}"),
                f"--reward {tmp_path}/d.py:{function}", "names each time", *words)


# ---------------------------------------------------------------- --normalize-rewards

def test_running_deviations():
    """Of the epochs so far, as NumPy computes them. What is constant up to rounding stays as it is, and so does NaN."""
    g = np.random.default_rng(0)
    means, scales = np.array([[5.0], [-3.0], [7.0], [1e3]]), np.array([[0.01], [1.0], [0.0], [1e-5]])
    epochs = means + scales * g.normal(size=(3, 4, 50))
    epochs[1, 1] *= 3
    variances = [torch.zeros(5, 1).double()]
    for epoch in range(3):
        scores = torch.cat([torch.from_numpy(epochs[epoch]).float(), torch.full((1, 50), math.nan)])
        ours = flow.rewards.running_deviations(scores, variances, epoch)
        expected = np.sqrt(epochs[:epoch + 1].var(2, ddof=1).mean(0))
        np.testing.assert_allclose(ours[:2, 0], expected[:2], rtol=1e-3)
        assert ours[2:].flatten().tolist() == [1.0] * 3 and variances[0].isfinite().all()


NORMALIZED = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))
def faint(images, prompts):
    return red(images, prompts) / 2 ** 14
def dark(images, prompts):
    return -images.mean((1, 2, 3)).square()
def constant(images, prompts):
    return images.new_zeros(len(images))
"""
PARTS = dict(epochs=2, group=3, groups=2, updates=1, batch=3, steps=3, timesteps=1, eval_n=2, lr=2e-2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_normalized_parts_weigh_the_same_on_any_scale_and_resume_bit_for_bit(tmp_path, script):
    """A part divided by 2^14, which rounds nothing, and a constant one change nothing; without the flag the first does.
    A run in two parts is the whole run; the reward is logged in its own units."""
    (tmp_path / "n.py").write_text(NORMALIZED)
    part = {name: f"{tmp_path}/n.py:{name}" for name in ("red", "faint", "dark", "constant")}
    flags = PARTS | ({"pairs": 1} if script is train_dpo else {})

    def train(name, *parts, **changes):
        given = dict(reward=",".join(part[p] for p in parts), eval_every=0, normalize_rewards=True)
        out = small_run(tmp_path / name, script, **flags | given | changes)
        return out, lora_bytes(out)
    plain, learnt = train("red", "red", "dark", eval_every=1)
    for epochs in (1, 2):
        faint, resumed = train("faint", "faint", "dark", eval_every=1, epochs=epochs)
    assert learnt == resumed
    if script.__name__ == "train_awm":
        assert learnt == train("constant", "faint", "constant", "dark")[1]
        raw = train("raw", "red", "dark", normalize_rewards=False)[1]
        assert learnt != raw != train("raw-faint", "faint", "dark", normalize_rewards=False)[1]
    for a, b in zip(timeless(plain), timeless(faint)):
        key = "reward" if "loss" in a else "eval_reward"
        red, small, dark = a[f"{key}/n.py:red"], b[f"{key}/n.py:faint"], a[f"{key}/n.py:dark"]
        assert small == red / 2**14 and a[key] == pytest.approx(red + dark, rel=1e-5)
        assert b[key] == pytest.approx(small + dark, rel=1e-5)
        assert {k: v for k, v in a.items() if "reward" not in k} == {k: v for k, v in b.items() if "reward" not in k}
    states = [torch.load(out / "checkpoint/state.pt", weights_only=True) for out in (plain, faint)]
    (whole,), (parts,) = [state["variances"] for state in states]
    assert torch.equal(whole, parts * torch.tensor([[2.0**28], [1.0]]))
    expected = sum(line["reward/n.py:red_std"] ** 2 for line in metrics(plain) if "loss" in line)
    assert whole[0].item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- ocr and aesthetic

def written(*texts: str) -> torch.Tensor:
    """Pictures (n, 3, 192, 320) with texts on them."""
    images = []
    for text in texts:
        image = Image.new("RGB", (320, 192), "lightyellow")
        ImageDraw.Draw(image).multiline_text((24, 50), text, "navy", ImageFont.load_default(40))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def test_ocr_reads_what_is_written(tmp_path, monkeypatch, capsys):
    """1 - edit distance / length, without spaces and case; 1 where the text is among others. The text comes from the
    prompt's quotes or its metadata. Also in a sum, in sample.py and eval_judge.py."""
    pytest.importorskip("rapidocr_onnxruntime")
    reward = load_reward("ocr", CPU)
    images = written("HELLO", "HELLO 2024", "HELLU", "New\nYork", "")
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(reward(images, ['A sign that says "hello"'] * 5), torch.tensor([1, 1, 0.8, 0, 0]))
    close(reward(images, ["a city"] * 5, [{"text": "New York"}] * 5)[3:], torch.tensor([1.0, 0.0]))
    close(reward(images[:2], ["the year"] * 2, [{"text": 2024}] * 2), torch.tensor([0.0, 1.0]))
    close(reward(torch.rand(2, 3, 64, 64), ["“Hello”"] * 2), torch.zeros(2))
    close(reward(images[1:2].flip(2, 3), ['"HELLO 2024"']), torch.zeros(1))  # upside down
    close(load_reward("ocr:2,tiny/pickscore:0", CPU)(images[:1], ['"HELLO"']), torch.tensor([2.0]))
    rows = [{"prompt": f'"{text}"', "seed": 0} for text in ("HELLO", "WORLD")]
    save_samples(str(tmp_path / "out"), images[[0, 1]], rows)
    eval_judge.main(eval_judge.Args(dirs=(f"{tmp_path}/out",), reward=("ocr:0.5,ocr:2",), judge=None, forensic=(),
                                    out=f"{tmp_path}/eval"))
    report = json.loads((tmp_path / "eval/report.json").read_text())["metrics"]["reward/ocr:0.5,ocr:2"]
    world_in_hello = 1 - edit_distance("world", "hello2024") / 5
    assert report[f"{tmp_path}/out"]["mean"] == pytest.approx(2.5 * (1 + max(0, world_in_hello)) / 2)
    sample.main(sample.Args(prompt='a "red" star', steps=2, reward="ocr", out=f"{tmp_path}/one"))
    assert sample_rows(tmp_path / "one")[0]["reward"] == 0
    refuses(capsys, lambda: sample.main(sample.Args(prompt='a "red" star', reward="ocr", adjoint=True, steps=2,
                                                    out=f"{tmp_path}/two")), "--adjoint", "ocr", "no gradient")


def test_ocr_refuses_prompts_without_a_text_at_the_start(tmp_path, monkeypatch, capsys):
    """The last of the prompts, too, and before the pipeline is loaded. As --eval-reward it is of the held-out ones."""
    pytest.importorskip("rapidocr_onnxruntime")
    quoted, plain = '{"prompt": "a sign \\"A\\""}\n{"prompt": "a sign", "text": "B"}\n', '{"prompt": "a star"}\n'
    for name, text in (("quoted", quoted), ("mixed", quoted + plain)):
        (tmp_path / f"{name}.jsonl").write_text(text)
    quoted, mixed = f"{tmp_path}/quoted.jsonl", f"{tmp_path}/mixed.jsonl"
    flags = dict(epochs=1, groups=2, group=2, updates=1, steps=2, eval_n=2, eval_every=1)
    small_run(tmp_path / "both", prompts=quoted, eval_prompts=quoted, reward="ocr", **flags)
    small_run(tmp_path / "held-out", prompts=mixed, eval_prompts=quoted, eval_reward=("ocr",), **flags)
    assert metrics(tmp_path / "held-out")[-1]["eval_reward/ocr"] == 0

    def too_early(*args, **kwargs):
        raise AssertionError("the pipeline is loaded first")
    monkeypatch.setattr(flow.run, "load_pipeline", too_early)
    monkeypatch.setattr(flow.pipeline, "load_pipeline", too_early)
    more = flags | dict(eval_n=3)
    for given in (dict(prompts=mixed, eval_prompts=quoted, reward="ocr"),
                  dict(prompts=quoted, eval_prompts=mixed, reward="ocr"),
                  dict(prompts=mixed, eval_prompts=mixed, eval_reward=("tiny/hps", "ocr"))):
        more["groups"] = 2 if given["prompts"] == quoted else 3
        words = "--eval-reward ocr" if "eval_reward" in given else "--reward ocr", "'a star'", "double quotes", "`text`"
        refuses(capsys, lambda: small_run(tmp_path / "no", **more, **given), *words)
    refuses(capsys, lambda: sample.main(sample.Args(prompts=mixed, reward="ocr", out=f"{tmp_path}/no")), "'a star'")
    assert not (tmp_path / "no").exists()
    save_samples(str(tmp_path / "out"), renders(1), [{"prompt": "a star", "seed": 0}])
    refuses(capsys, lambda: eval_judge.main(eval_judge.Args(dirs=(f"{tmp_path}/out",), reward=("ocr",), judge=None,
                                                            forensic=(), out=f"{tmp_path}/no")), "'a star'")


def test_without_its_package_ocr_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    refuses(capsys, lambda: load_reward("tiny/hps,ocr", CPU), "--reward ocr", "pip install rapidocr-onnxruntime==1.4.4")


@pytest.mark.parametrize("prompt, metadata, text", [
    ('New York Skyline with "Hello World" and "more"', {}, "Hello World"),
    ("a sign “Open” by the road", {"text": None}, "Open"),
    ("„Halt“", {"text": " "}, "Halt"),
    ('an "" empty one, then "A"', {}, "A"),
    ("it's 5 o'clock", {"text": 17}, "17"),
    ('a "vintage" sign', {"text": "CAFÉ", "tag": "x"}, "CAFÉ"),
    ("它说「你好」", {}, "你好"),
    ('a "vintage" sign', {"text": math.nan}, "vintage"),  # an empty cell of pandas
])
def test_the_text_that_ocr_looks_for(prompt, metadata, text):
    assert wanted_text(prompt, metadata) == text


@pytest.mark.parametrize("a, b, distance", [
    ("kitten", "sitting", 3),
    ("flaw", "lawn", 2),
    ("", "abc", 3),
    ("abc", "", 3),
    ("same", "same", 0),
])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.fixture()
def predictor(tmp_path, monkeypatch) -> torch.nn.Sequential:
    """An aesthetic predictor's head, and a small CLIP of 768 dimensions, in the place of the hub's."""
    torch.manual_seed(0)
    wide, layers = [768, 1024, 128, 64, 16, 1], []
    for i, sizes in enumerate(zip(wide, wide[1:])):
        layers += [torch.nn.Linear(*sizes)] + [torch.nn.Dropout(0.2)] * (i < 3)
    head = torch.nn.Sequential(*layers).eval()
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, tmp_path / "head.pth")
    shared = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    processor = AutoProcessor.from_pretrained("tiny/pickscore")
    text = dict(shared, vocab_size=len(processor.tokenizer), max_position_embeddings=16)
    clip = CLIPModel(CLIPConfig(vision_config=dict(shared, image_size=64, patch_size=16), text_config=text,
                                projection_dim=768))
    for part in (clip, processor):
        part.save_pretrained(tmp_path / "clip")
    asked = ("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth")
    monkeypatch.setattr(flow.rewards, "hf_hub_download", lambda *names: {asked: f"{tmp_path}/head.pth"}[names])
    monkeypatch.setitem(flow.rewards.HUB, "aesthetic", (f"{tmp_path}/clip", f"{tmp_path}/clip", asked[0]))
    return head


def test_the_aesthetic_predictor(predictor, tmp_path):
    """Its head on the normalized embedding of the picture, whatever the prompt; in a sum, and with a gradient."""
    pictures, prompts = renders(4), ["a red star", "word " * 99, "", "b"]
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    mean, std = [torch.tensor(x).view(3, 1, 1) for x in (flow.rewards.OPENAI_CLIP_MEAN, flow.rewards.OPENAI_CLIP_STD)]
    with torch.no_grad():
        embedding = clip.get_image_features(((pictures * 255).round() / 255 - mean) / std).pooler_output
        expected = predictor(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]
    reward = load_reward("aesthetic", CPU)
    torch.testing.assert_close(reward(pictures, prompts), expected, rtol=1e-4, atol=1e-6)
    both = load_reward("aesthetic:2,tiny/pickscore:0", CPU)
    torch.testing.assert_close(both(pictures, prompts), 2 * expected, rtol=1e-4, atol=1e-6)
    images = pictures.clone().requires_grad_()
    scores = load_reward("aesthetic", CPU, differentiable=True)(images, prompts)
    torch.testing.assert_close(scores.detach(), expected, rtol=1e-2, atol=1e-4)
    assert torch.autograd.grad(scores.sum(), images)[0].flatten(1).any(1).all()
    assert all(p.device == CPU and not p.requires_grad for p in reward.models[0].head.parameters())


def test_the_aesthetic_predictor_tells_of_no_cut_prompts(predictor, capsys):
    load_reward("aesthetic", CPU).check_prompts([{"prompt": "word " * 99}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("head", [
    {"layers.0.weight": torch.zeros(3, 3)},  # of another shape
    {"other": torch.zeros(3)},
    torch.nn.Linear(2, 2),  # a pickled object, which weights_only does not load
    b"no checkpoint",
])
def test_a_broken_head_is_refused(predictor, tmp_path, capsys, head):
    if isinstance(head, bytes):
        (tmp_path / "head.pth").write_bytes(head)
    else:
        torch.save(head, tmp_path / "head.pth")
    refuses(capsys, lambda: load_reward("aesthetic", CPU), "--reward aesthetic", "cannot be loaded",
            "camenduru/improved-aesthetic-predictor")
