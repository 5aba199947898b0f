"""Judges of pictures: a vision-language model's answers, a reader of text, detectors of generated pictures, the Frechet
distance.

A vision-language judge is a function ask(question, [[file, ...], ...]) -> [answer, ...]. Each answer is about one or
two pictures; `question` is one for all or a list. An answer is its 20 likeliest first tokens with log-probabilities.
"""
import base64
import math
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flow.cli import InputError, loading, on_error
from flow.distributed import base_dtype
from flow.pictures import to_image

Answer = list[tuple[str, float]]


def messages(question: str, pictures: list[dict]) -> list[dict]:
    """A chat of one message: the pictures, then the question. Two pictures are called A and B."""
    if len(pictures) > 1:
        titles = [{"type": "text", "text": f"Picture {name}:"} for name in "AB"]
        pictures = [part for titled in zip(titles, pictures) for part in titled]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def read_answer(top: Answer, first: str, second: str) -> float:
    """log p(first) - log p(second) of two answer words, each in any spelling (case, spaces). A word that `top` does not
    list gets the most it can have: the rest to 1, but no more than the least word in `top`. NaN, for an unreadable
    answer, if the two words together have less than 1 %."""
    words = [token.strip(" .,*\"'\n").lower() for token, _ in top]
    probs = [math.exp(logprob) for _, logprob in top]
    a = sum(p for word, p in zip(words, probs) if word == first.lower())
    b = sum(p for word, p in zip(words, probs) if word == second.lower())
    if a + b < 0.01:
        return math.nan
    rest = max(min(1 - sum(probs), *probs), 1e-9)
    return math.log(a or rest) - math.log(b or rest)


def local_judge(name: str, device: torch.device, flag: str = "--judge") -> Callable:
    """A judge in this process, which answers a batch in one forward pass. An InputError names `flag`."""
    with loading(flag, name, "http://HOST:PORT/v1, " if flag == "--judge" else ""):
        processor = transformers.AutoProcessor.from_pretrained(name)
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=base_dtype(device))
    if not processor.chat_template:
        raise InputError(f"{flag} {name}: has no chat template; give an instruction-tuned model")
    model.eval().to(device)

    @torch.no_grad()
    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        images = [[{"type": "image", "image": Image.open(file).convert("RGB")} for file in files] for files in pictures]
        questions = [question] * len(pictures) if isinstance(question, str) else question
        inputs = processor.apply_chat_template(
            list(map(messages, questions, images)), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=dict(padding=True, padding_side="left")).to(device, model.dtype)
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits = model.generate(**inputs, **options).logits[0]  # (b, vocabulary)
        top = logits.float().log_softmax(1).topk(min(20, logits.shape[1]))
        tokens = [[processor.tokenizer.decode([i]) for i in row] for row in top.indices.tolist()]
        return [list(zip(*answer)) for answer in zip(tokens, top.values.tolist())]
    ask.model = model
    return ask


def http_judge(url: str, model: str, timeout=60.0, retries=3, concurrency=8, flag: str = "--judge") -> Callable:
    """A judge on an OpenAI-compatible server, sent `concurrency` requests at once with the key in OPENAI_API_KEY.

    The answer to a failed request is empty; each different error is printed once. Raises InputError, naming `flag`, if
    the server cannot be reached, refuses the key or the model, or answers nothing in the first batch."""
    with on_error(f"{flag} {url}: needs a package", "; pip install openai"):
        import openai  # half a second that only this needs
    key = os.environ.get("OPENAI_API_KEY") or "none"  # a local server needs none
    with on_error(f"{flag} {url}: is no URL"):
        client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
    options = dict(model=model, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20)
    errors, refusals, answered = [], [], False

    def request(question: str, files: list[str]) -> Answer:
        if refusals:  # it would refuse all others too
            return []
        images = [base64.b64encode(Path(file).read_bytes()).decode() for file in files]
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        try:
            choice = client.chat.completions.create(messages=messages(question, parts), **options).choices[0]
            if not choice.logprobs:  # the server gives only the word: take it as certain
                return [(choice.message.content.split()[0], 0.0)]
            return [(t.token, float(t.logprob)) for t in choice.logprobs.content[0].top_logprobs]
        except Exception as e:  # no reply, half a reply, or not a reply of this kind
            error = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            if getattr(e, "status_code", 0) in (401, 403, 404) or type(e.__cause__).__name__ == "ConnectError":
                refusals.append(error)
                return []
        if error not in errors:
            tqdm.write(f"warning: {flag} {url}: {error}", file=sys.stderr)
            errors.append(error)
        return []

    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        nonlocal answered
        questions = [question] * len(pictures) if isinstance(question, str) else question
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(request, questions, pictures))
        if refusals:
            raise InputError(f"{flag} {url}: its model {model} cannot be reached with the key in OPENAI_API_KEY "
                             f"({refusals[0]})")
        answered = answered or any(answers)
        if not answered:
            raise InputError(f"{flag} {url}: no request has succeeded; the last error: {errors[-1]}")
        return answers
    return ask


REAL = {"real", "human", "natural", "authentic"}  # words in the labels of detectors
FAKE = {"fake", "artificial", "ai", "generated", "synthetic"}


def load_ocr() -> Callable:
    """The reward `ocr` as score(images (b, 3, h, w) in [0, 1], prompts, metadata) -> (b,): how well the wanted text can
    be read in a picture. As flow_grpo's ocr.py: 1 if it is part of what is read, else 1 - edit distance / its length,
    at least 0. Spaces and case do not count."""
    with on_error("--reward ocr: cannot be loaded", "; pip install rapidocr-onnxruntime==1.4.4"):
        from rapidocr_onnxruntime import RapidOCR  # an optional package
        read = RapidOCR()

    def score(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        scores = []
        for image, prompt, fields in zip(images, prompts, metadata):
            lines, _ = read(to_image(image), use_cls=False)  # as it is, not turned by 180 degrees
            found = "".join(text for _, text, _ in lines or ())
            wanted, found = ["".join(text.lower().split()) for text in (wanted_text(prompt, fields), found)]
            distance = 0 if wanted in found else min(edit_distance(wanted, found), len(wanted))
            scores.append(1 - distance / len(wanted))
        return torch.tensor(scores)

    score.check = lambda rows: [wanted_text(row["prompt"], row["metadata"]) for row in rows]
    return score


def wanted_text(prompt: str, metadata: dict) -> str:
    """The text that a picture is to show: `text` of the prompt's metadata, else the first in double quotes."""
    given, quoted = metadata.get("text"), re.findall('["“„«「]([^"“”„«»「」]*)["”“»」]', prompt)
    given = [str(given)] if isinstance(given, (str, int, float)) and given == given else []  # NaN: an empty cell
    for text in filter(str.strip, given + quoted):
        return text
    raise InputError(f"--reward ocr: the prompt {prompt!r} has no text in double quotes, nor a field `text` in its row "
                     "of the prompt file; it needs one of them")


def edit_distance(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that makes b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))  # from the empty text to each beginning of b
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


def load_forensic(name: str, real_label: str | None, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A detector of generated pictures (any image classifier): a function of files -> P(real), (b,)."""
    with loading("--forensic", name):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name)
        except ValueError:  # detectors of 2022 name a class that transformers 5 no longer has
            processor = transformers.ViTImageProcessorPil.from_pretrained(name)
        net = transformers.AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval().to(device)
    real = real_labels(name, net.config.id2label, real_label)

    @torch.no_grad()
    def score(files: list[str]) -> Tensor:
        inputs = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").to(device)
        return net(**inputs).logits.softmax(1)[:, real].sum(1).cpu()
    return score


def real_labels(name: str, labels: dict[int, str], real_label: str | None) -> list[int]:
    """The indices of a detector's labels that mean "real": that of `real_label`, or told by the words of all labels."""
    words = {i: set(re.findall("[a-z]+", label.lower())) for i, label in labels.items()}
    real = [i for i in labels if words[i] & REAL and not words[i] & FAKE]
    fake = [i for i in labels if words[i] & FAKE and not words[i] & REAL]
    if real_label is not None:
        real = [i for i, label in labels.items() if label == real_label]
        fake = [i for i in labels if i not in real]
    if not real or not fake or len(real) + len(fake) < len(labels):
        raise InputError(f"--forensic {name} --real-label {real_label}: which of its labels means a real picture? Give "
                         f"one of {', '.join([*labels.values()][:8])} as --real-label")
    return real


def load_embed(model: str, device: torch.device):
    """(network, processor) of a CLIPModel, or of a vision model with a pooler_output (ResNet, DINOv2, ...)."""
    with loading("--embed", model):
        net = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False).to(device)
        return net, transformers.AutoImageProcessor.from_pretrained(model)


@torch.no_grad()
def embed_images(embed, images: Tensor | list[Tensor], batch: int = 64) -> Tensor:
    """The network's pooled features (n, d) of images (3, h, w) in [0, 1], which may differ in size."""
    net, processor = embed
    run = net.get_image_features if hasattr(net, "get_image_features") else net
    features = []
    for i in range(0, len(images), batch):
        inputs = processor([to_image(x) for x in images[i:i + batch]], return_tensors="pt").to(net.device)
        features.append(run(**inputs).pooler_output.flatten(1).cpu())
    return torch.cat(features)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(ca cb): the eigenvalues of a product of two covariances are real and >= 0, up to rounding
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    return (mean + ca.trace() + cb.trace() - 2 * root).item()
