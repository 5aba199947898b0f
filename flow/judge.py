"""Judges of pictures: a vision-language model's answers, detectors of generated pictures, the Frechet distance.

A vision-language judge is a function ask(question, [[file, ...], ...]) -> [answer, ...] about one or two pictures each.
`question` is one for all or a list. An answer is its likeliest first tokens with log-probabilities, or a word with 0.0.
"""
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
import transformers
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from flow.cli import InputError, load_whole, loading, on_error, progress
from flow.distributed import base_dtype
from flow.pictures import encode, open_picture, to_data_url, to_image

Answer = list[tuple[str, float]]
CERTAIN = -math.log(1e-9)  # what read_answer gives, or minus that, for an answer without probabilities


def messages(question: str, pictures: list[dict]) -> list[dict]:
    """A chat of one message: the pictures, then the question. Two pictures are called A and B."""
    if len(pictures) > 1:
        titles = [{"type": "text", "text": f"Picture {name}:"} for name in "AB"]
        pictures = [part for titled in zip(titles, pictures) for part in titled]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def read_answer(top: Answer, first: str, second: str) -> float:
    """log p(first) - log p(second) of two answer words in any spelling; NaN if together they have less than 1 %. A word
    that `top` does not list gets the most it can have: the rest to 1, but no more than the least word in `top`."""
    words = [re.sub(r"^[\W_]+|[\W_]+$", "", token).lower() for token, _ in top]
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
        model = load_whole(transformers.AutoModelForImageTextToText, name, dtype=base_dtype(device)).to(device)
    if not processor.chat_template:
        raise InputError(f"{flag} {name}: has no chat template; give an instruction-tuned model")

    @torch.no_grad()
    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        images = [[{"type": "image", "image": open_picture(file)} for file in files] for files in pictures]
        questions = [question] * len(pictures) if isinstance(question, str) else question
        inputs = processor.apply_chat_template(
            list(map(messages, questions, images)), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=dict(padding=True, padding_side="left")).to(device, model.dtype)
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits = model.generate(**inputs, **options).logits[0]  # (b, vocabulary)
        top = logits.float().log_softmax(1).topk(min(20, logits.shape[1]))
        tokens = [[processor.tokenizer.decode([i]) for i in row] for row in top.indices.tolist()]
        return [list(zip(*answer)) for answer in zip(tokens, top.values.clamp_max(-1e-8).tolist())]
    ask.model = model
    return ask


# How models mark their thinking: <think> ... </think>, [THINK] ... [/THINK], <|channel|>analysis ... <|channel|>final
TAG = r"[<\[◁]\|?{}(?:\w+:)?(?:think(?:ing)?|thought|reason(?:ing)?|analysis|reflection|scratchpad)\|?[>\]▷]|{}"
OPENS = re.compile(TAG.format("(?:start_|begin_of_)?", r"<\|channel\|?>(?!final)"), re.IGNORECASE)
CLOSES = re.compile(TAG.format("(?:/|end_|end_of_)", r"<\|channel\|>final|<channel\|>"), re.IGNORECASE)
THINKS = """the model thinks first ({}); start the server without thinking, or for --judge turn that off by \
--judge-extra '{{"chat_template_kwargs": {{"enable_thinking": false}}}}', or have the answer after it read by \
--judge-extra '{{"max_tokens": 2000}}'"""


def answer_start(text: str) -> int:
    """Where the answer's first word is in a model's text, after thinking and tags; -1 if the thinking has not ended."""
    start = max((end.end() for end in CLOSES.finditer(text)), default=0)
    without_tags = re.sub(r"<[^<>]*>", lambda tag: " " * len(tag[0]), text)
    word = re.compile(r"[^\W_]|\Z").search(without_tags, start).start()
    opens = OPENS.search(text, start)
    is_cut_tag = text != "" and "<think>".startswith(text)
    thought_only = start > 0 and word == len(text)
    return -1 if is_cut_tag or thought_only or opens and opens.start() < word else word


def read_token(token: dict) -> tuple[str, Answer]:
    """A token's text, and what could stand in its place, itself included; [] if these are no log-probabilities."""
    text = bytes(token["bytes"]).decode(errors="replace") if token.get("bytes") else token["token"]
    text = re.sub("[Ġ▁]", " ", re.sub("Ċ|<0x0A>", "\n", text))  # raw, as in the tokenizer's vocabulary
    top = [(read_token(other)[0], float(other["logprob"])) for other in token.get("top_logprobs") or []]
    if sum(math.exp(p) for _, p in top) > 1.02:
        top = list(dict.fromkeys(top))  # the chosen token may come twice
    if top and text not in dict(top):
        own = float(token["logprob"])
        if not any(other.strip() == text.strip() and abs(p - own) < 1e-3 for other, p in top):  # " yes" for "yes"
            top.append((text, own if own > -100 else math.nan))  # -9999 stands for unknown
    if not (all(p < 1e-3 for _, p in top) and sum(math.exp(p) for _, p in top) < 1.02):
        return text, []
    known = [(other, min(p, -1e-8)) for other, p in top if p > -100]
    is_choice = len(known) == 1 and known[0][1] > -1e-6  # after temperature 0: the chosen token has 1, others nothing
    return text, [] if is_choice else known


def read_reply(reply: str) -> tuple[Answer, str]:
    """The answer in a server's reply, and why it cannot be read, or "". The answer is the first word after thinking:
    the probabilities of its token, else the word alone. One that cannot be read is as it came."""
    try:
        choice = json.loads(reply)["choices"][0]
        message = choice["message"]
        content, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        parts = [{"text": content}] if isinstance(content, str) else content
        content = "".join(part.get("text", "") for part in parts).strip()
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return [], f"instead of an answer came: {server_words(reply)}"
    tokens = []
    with contextlib.suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
        tokens = [read_token(token) for token in choice["logprobs"]["content"]]
    whole = "".join(text for text, _ in tokens)  # with the thinking, which `content` may lack
    tops = [top for text, top in tokens for _ in text] + [top for _, top in tokens[-1:]] + [[]]  # by letter
    said = content or (f"<think>{thought}" if thought else whole)
    start, at = answer_start(said), max(whole.rfind(said), 0)
    at += max(answer_start(whole[at:]), 0)
    listed = tops[at] if said in whole or not thought else []  # else these are tokens of the thinking
    answer = listed or [(word, 0.0) for word in re.findall(r"[^\s<]+", said[start:])[:1]]
    if start >= 0 and answer:
        return answer, ""
    came = " ".join((said or json.dumps(message)).split())[:100]
    thinks = start < 0 or choice.get("finish_reason") == "length"
    return [(came, 0.0)], THINKS.format(came) if thinks else f"the answer has no text: {came}"


def server_words(text: str) -> str:
    """What a server says in an error: the message in its JSON, the words of its web page, or the text's beginning."""
    kind = "an HTML page: " if text.lstrip().startswith("<") else ""
    plain = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
    message = re.search(r'"(?:message|msg|detail|error)"\s*:\s*"((?:[^"\\]|\\.)+)"', plain)
    return kind + " ".join((message[1] if message else plain).split())[:300] or "nothing"


def data_url(file: str) -> str:
    """A picture as servers take it: a PNG, JPEG or WebP that all programs show alike as it is, anything else as PNG."""
    with Image.open(file) as opened:
        is_plain = opened.mode in ("L", "RGB") and not opened.has_transparency_data
        is_plain &= not getattr(opened, "is_animated", False)
        is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
        kind, content = opened.format, Path(file).read_bytes()
    if not is_plain or is_turned or kind not in ("PNG", "JPEG", "WEBP"):
        kind, content = "PNG", encode(open_picture(file))
    return to_data_url(content, kind)


def http_judge(url: str, model: str, timeout=60.0, retries=3, concurrency=8, flag="--judge", extra="{}") -> Callable:
    """A judge on an OpenAI-compatible server, sent `concurrency` requests at once with the key in OPENAI_API_KEY and
    the JSON object `extra` in each. The answer to a failed request is empty; each different error is printed once.
    Raises InputError, naming `flag`, if a reward's request fails, or the first ones, also one without a picture."""
    with on_error(f"{flag} {url}: needs a package", "; pip install openai"):
        import openai  # half a second that only this needs
    with on_error(f"--judge-extra {extra}: is no JSON object", """; give for example '{"max_tokens": 2000}'"""):
        options = dict(temperature=0, max_tokens=1, logprobs=True, top_logprobs=20) | json.loads(extra)
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # a local server needs none
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{flag} {url}: OPENAI_API_KEY has a line break or another sign that no key has; set it again")
    told, bar = set(), tqdm(disable=True)  # kinds of errors that came, "" once an answer has come
    busy = {429: "waiting: too many requests (status 429)", 503: "waiting: the server is busy (status 503)"}
    hooks = {"response": [lambda r: bar.set_postfix_str(busy.get(r.status_code, ""), r.status_code in busy)]}
    with on_error(f"{flag} {url}: is no URL"):
        client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries,
                               http_client=openai.DefaultHttpxClient(event_hooks=hooks))

    def request(job: tuple[str, list[str]]) -> tuple[Answer, str]:
        question, files = job
        chat = messages(question, [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files])
        try:
            reply = client.chat.completions.with_raw_response.create(model=model, messages=chat, extra_body=options)
            return read_reply(reply.http_response.text)
        except openai.APIStatusError as e:
            return [], f"status {e.status_code}: {server_words(e.response.text)}"
        except openai.APIConnectionError as e:
            if type(e.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol"):
                why = str(e.__cause__).rpartition("] ")[2]
                raise InputError(f"{flag} {url}: cannot be reached ({why}); start the server, or correct the URL")
            return [], f"no reply in {timeout:g} s" if isinstance(e, openai.APITimeoutError) else "a reply broke off"

    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        nonlocal bar
        jobs = list(zip([question] * len(pictures) if isinstance(question, str) else question, pictures))
        answers, bar = [], progress(total=len(jobs), desc="answers", leave=False, delay=2)
        with bar, ThreadPoolExecutor(concurrency) as pool:
            first = list(pool.map(request, jobs[:0 if "" in told else 3]))
            if first and all(error for _, error in first):
                _, lost = request(("Answer yes.", []))  # is it the pictures, or the server?
                if lost.startswith("the "):  # model or answer: it says what to do
                    raise InputError(f"{flag} {url}: {lost}")
                if lost:
                    later = "try again later, or " if lost.startswith("status 429") else ""
                    field = ", --judge-extra" if flag == "--judge" else ""
                    raise InputError(f"{flag} {url}: {lost}; {later}check model {model}, OPENAI_API_KEY, URL (most end "
                                     f"in /v1){field}")
            for answer, error in chain(first, pool.map(request, jobs[len(first):])):
                if error and flag != "--judge":  # a reward needs them all
                    raise InputError(f"{flag} {url}: {error}")
                kind = re.sub(r"\w*\d[\w.]{3,}", "", error)  # without a request's id
                if error and kind not in told:
                    tqdm.write(f"warning: {flag} {url}: {error}", file=sys.stderr)
                told.add(kind)
                answers.append(answer)
                bar.update()
        return answers
    return ask


NOT = {"not", "non"}  # words in the labels of detectors
REAL = {"real", "human", "natural", "authentic"} | NOT
FAKE = {"fake", "artificial", "ai", "generated", "synthetic"} | NOT


def load_forensic(name: str, real_label: str | None, device: torch.device) -> Callable[[list[str]], Tensor]:
    """A detector (any image classifier): a function of files -> P(real), (b,), as transformers' own pipeline says."""
    with loading("--forensic", name):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name)
        except ValueError:  # detectors of 2022 name a class that transformers 5 no longer has
            processor = transformers.ViTImageProcessorPil.from_pretrained(name)
        net = load_whole(transformers.AutoModelForImageClassification, name, dtype=torch.float32).to(device)
    real = real_labels(name, net.config.id2label, real_label)

    @torch.no_grad()
    def score(files: list[str]) -> Tensor:
        inputs = processor([open_picture(file) for file in files], return_tensors="pt").to(device)
        logits, kind = net(**inputs).logits.cpu(), net.config.problem_type
        if logits.shape[1] > 1 and kind not in ("multi_label_classification", "regression"):
            return logits.softmax(1)[:, real].sum(1)
        scores = logits if kind == "regression" else logits.sigmoid()
        return scores[:, real].amax(1) if real else 1 - scores[:, 0]  # a single label may mean a fake
    return score


def real_labels(name: str, labels: dict[int, str], real_label: str | None) -> list[int]:
    """The indices of a detector's labels that mean "real": `real_label`, or told by words. A single one may be fake."""
    words = {i: set(re.findall("[a-z]+", str(label).lower())) for i, label in labels.items()}
    real = [i for i in labels if words[i] & REAL and not words[i] & FAKE]
    fake = [i for i in labels if words[i] & FAKE and not words[i] & REAL]
    if real_label is not None:
        real = [i for i, label in labels.items() if str(label) == real_label]
        fake = [i for i in labels if i not in real]
    if not (real and fake or len(labels) == 1 and (real or fake and real_label is None)):
        given = "" if real_label is None else f" --real-label {real_label}"
        advice = '; if that means a fake, call it "fake" in id2label of its config.json' if len(labels) == 1 else ""
        raise InputError(f"--forensic {name}{given}: which of its labels means a real picture? Give one of "
                         f"{', '.join(map(str, [*labels.values()][:8]))} as --real-label{advice}")
    return real


def load_embed(model: str, device: torch.device):
    """(network, processor) of a CLIPModel, or of a vision model with a pooler_output (ResNet, DINOv2, ...)."""
    with loading("--embed", model):
        net = load_whole(transformers.AutoModel, model, dtype=torch.float32).to(device)
        embed = net, transformers.AutoImageProcessor.from_pretrained(model)
        embed_images(embed, torch.zeros(1, 3, 64, 64))  # an error now if it has no pooled features
        return embed


@torch.no_grad()
def embed_images(embed, images: Tensor | list[Tensor]) -> Tensor:
    """The network's pooled features (n, d) of images (3, h, w) in [0, 1], which may differ in size."""
    net, processor = embed
    run = net.get_image_features if hasattr(net, "get_image_features") else net
    inputs = processor([to_image(image) for image in images], return_tensors="pt").to(net.device)
    return run(**inputs).pooler_output.flatten(1).cpu()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al. 2017, arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(ca cb): the eigenvalues of a product of two covariances are real and >= 0, up to rounding
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root).item()
