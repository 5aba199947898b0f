"""Ask a vision-language model about pictures, in process or over HTTP, and read its answer from log-probabilities."""
import base64
import http.client
import json
import math
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from flow.cli import cannot_load, check_model, fail, reason

Answer = list[tuple[str, float]]  # the likeliest first tokens of an answer and their log-probabilities
# no reply, one that was cut, or one that cannot be read
NO_REPLY = OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError


def messages(question: str, pictures: list[dict]) -> list[dict]:
    """A chat of one message: the pictures (content parts), called A and B if there are two, then the question."""
    if len(pictures) > 1:
        titles = [{"type": "text", "text": f"Picture {name}:"} for name in "AB"]
        pictures = [part for titled in zip(titles, pictures) for part in titled]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def read_answer(top: Answer, first: str, second: str) -> float:
    """log p(first) - log p(second) for two answer words, from the likeliest first tokens of an answer.

    Case and space variants of a word are summed. A word that is not listed has at most what the listed ones leave, and
    at most what the least of them has. NaN if the two together have less than 1 %: the answer cannot be read.
    """
    words = [token.strip(" .,*\"'\n").lower() for token, _ in top]
    probs = [math.exp(logprob) for _, logprob in top]
    a, b = (sum(p for said, p in zip(words, probs) if said == word.lower()) for word in (first, second))
    if a + b < 0.01:
        return math.nan
    rest = max(min(1 - sum(probs), *probs), 1e-9)
    return math.log(a or rest) - math.log(b or rest)


def local_judge(name: str, device: torch.device) -> Callable[[str, list[list[str]]], list[Answer]]:
    """ask(question, [[file, ...], ...]) -> for each, the 20 likeliest first tokens of the answer."""
    check_model("--judge", name, "http://HOST:PORT/v1, ")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load("--judge", name, e)
    if not processor.chat_template:
        fail(f"--judge {name}: has no chat template; give an instruction-tuned model")
    model.eval().to(device)
    processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def ask(question: str, pictures: list[list[str]]) -> list[Answer]:
        """A batch, in one forward pass."""
        images = [[{"type": "image", "image": Image.open(file).convert("RGB")} for file in files] for files in pictures]
        inputs = processor.apply_chat_template(
            [messages(question, parts) for parts in images], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}).to(device, model.dtype)
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits = model.generate(**inputs, **options).logits[0]
        top = logits.float().log_softmax(1).topk(min(20, logits.shape[1]))
        tokens = [[processor.tokenizer.decode([i]) for i in row] for row in top.indices.tolist()]
        return [list(zip(*answer)) for answer in zip(tokens, top.values.tolist())]

    return ask


def http_judge(url: str, model: str, timeout: float, retries: int, concurrency: int) -> Callable:
    """The same from an OpenAI-compatible server: POST URL/chat/completions with logprobs; its key, if
    any, from OPENAI_API_KEY.

    A request that fails is tried again after 1, 2, 4, ... seconds (or Retry-After); then its answer is an empty list.
    A server that cannot be reached, refuses the key or the model, or answers none of a first batch ends the process.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    flag, address = f"--judge {url}", f"{url.rstrip('/')}/chat/completions"
    unreachable = (ConnectionRefusedError, socket.gaierror)
    errors, fatal, worked = set(), [], []

    def request(question: str, files: list[str]) -> Answer:
        """One question."""
        images = [base64.b64encode(Path(file).read_bytes()).decode() for file in files]
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        body = {"model": model, "messages": messages(question, parts), "temperature": 0, "max_tokens": 1,
                "logprobs": True, "top_logprobs": 20}
        error, wait = "", 0.0
        for attempt in range(0 if fatal else retries + 1):
            time.sleep(max(wait, min(2 ** (attempt - 1), 30)) if attempt else 0)
            try:
                post = urllib.request.Request(address, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(post, timeout=timeout) as reply:
                    choice = json.load(reply)["choices"][0]
                worked.append(True)
                if not choice.get("logprobs"):  # a server without them: the word itself, taken as certain
                    return [(choice["message"]["content"].split()[0], 0.0)]
                return [(t["token"], float(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
            except urllib.error.HTTPError as e:
                error = f"{e.code} {e.reason} {e.read(200).decode(errors='replace')}"
                after = e.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else 0.0  # a rate limit's, in seconds
                if e.code in (401, 403, 404):
                    hint = f"is --judge-model {model} right, and the key in OPENAI_API_KEY?"
                    fatal.append(f"{flag}: the server says {error}; {hint}")
                    return []
                if e.code < 500 and e.code not in (408, 429):
                    break  # it will not like it better the next time
            except NO_REPLY as e:
                error = f"{type(e).__name__}: {reason(e)}"
                if attempt == retries and isinstance(getattr(e, "reason", None), unreachable):
                    fatal.append(f"{flag}: cannot be reached ({reason(e)})")
        if not fatal and error not in errors:
            tqdm.write(f"warning: {flag}: {error}", file=sys.stderr)
            errors.add(error)
        return []

    def ask(question: str, pictures: list[list[str]]) -> list[Answer]:
        """A batch, `concurrency` requests at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(request, [question] * len(pictures), pictures))
        if not worked and not fatal:
            fatal.append(f"{flag}: no request has succeeded; the last one: {errors.pop()}")
        if fatal:
            fail(fatal[0])
        return answers

    return ask
