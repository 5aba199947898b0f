"""Ask a vision-language model about pictures, in process or over HTTP, and read its answer from log-probabilities.
A judge is ask(question, [[file, ...], ...]) -> each answer's 20 likeliest first tokens; a list asks each its own."""
import base64
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from flow.cli import cannot_load, check_model, fail, reason

Answer = list[tuple[str, float]]  # the likeliest first tokens of an answer and their log-probabilities


def messages(question: str, pictures: list[dict]) -> list[dict]:
    """A chat of one message: the pictures (content parts), called A and B if there are two, then the question."""
    if len(pictures) > 1:
        titles = [{"type": "text", "text": f"Picture {name}:"} for name in "AB"]
        pictures = [part for titled in zip(titles, pictures) for part in titled]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def read_answer(top: Answer, first: str, second: str) -> float:
    """log p(first) - log p(second) for two answer words, from the likeliest first tokens of an answer. Case
    and space variants of a word are summed. A word that is not listed has at most what the listed ones leave, and at
    most what the least of them has. NaN if the two together have less than 1 %: the answer cannot be read."""
    words = [token.strip(" .,*\"'\n").lower() for token, _ in top]
    probs = [math.exp(logprob) for _, logprob in top]
    a, b = (sum(p for said, p in zip(words, probs) if said == word.lower()) for word in (first, second))
    if a + b < 0.01:
        return math.nan
    rest = max(min(1 - sum(probs), *probs), 1e-9)
    return math.log(a or rest) - math.log(b or rest)


def judge_dtype(device: torch.device) -> torch.dtype:
    """Of a judge in this process: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def local_judge(name: str, device: torch.device, flag: str = "--judge") -> Callable:
    """A judge in this process, a batch in one forward pass. A model that cannot be loaded ends it, naming `flag`."""
    check_model(flag, name, "http://HOST:PORT/v1, " if flag == "--judge" else "")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=judge_dtype(device))
    except Exception as e:  # no network, another model class, a broken file: each raises its own
        cannot_load(flag, name, e)
    if not processor.chat_template:
        fail(f"{flag} {name}: has no chat template; give an instruction-tuned model")
    model.eval().to(device)

    @torch.no_grad()
    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        """A batch, in one forward pass."""
        images = [[{"type": "image", "image": Image.open(file).convert("RGB")} for file in files] for files in pictures]
        questions = [question] * len(pictures) if isinstance(question, str) else question
        inputs = processor.apply_chat_template(
            list(map(messages, questions, images)), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=dict(padding=True, padding_side="left")).to(device, model.dtype)
        options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits = model.generate(**inputs, **options).logits[0]
        top = logits.float().log_softmax(1).topk(min(20, logits.shape[1]))
        tokens = [[processor.tokenizer.decode([i]) for i in row] for row in top.indices.tolist()]
        return [list(zip(*answer)) for answer in zip(tokens, top.values.tolist())]
    ask.model = model
    return ask


def http_judge(url: str, model: str, timeout=60.0, retries=3, concurrency=8, flag: str = "--judge") -> Callable:
    """A judge at an OpenAI-compatible server, `concurrency` requests at a time; its key, if any, from OPENAI_API_KEY.
    A request that has failed is told on stderr, each error once, and its answer is an empty list. A server that cannot
    be reached, refuses the key or the model, or answers none of a first batch ends the process, naming `flag`."""
    try:
        import openai  # takes half a second, and nothing else needs it
        key = os.environ.get("OPENAI_API_KEY") or "none"  # a local server needs none
        client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
    except ImportError as e:
        fail(f"{flag} {url}: {reason(e)}; pip install openai")
    except Exception as e:  # its HTTP library's
        fail(f"{flag} {url}: is no URL ({reason(e)})")
    options = dict(model=model, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20)
    errors, worked, refused = [], [], []

    def request(question: str, files: list[str]) -> Answer:
        """One question; an empty answer where it failed, or where another has been refused."""
        if refused:
            return []
        images = [base64.b64encode(Path(file).read_bytes()).decode() for file in files]
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
        try:
            choice = client.chat.completions.create(messages=messages(question, parts), **options).choices[0]
            if not choice.logprobs:  # a server without them: the word itself, taken as certain
                return [(choice.message.content.split()[0], 0.0)]
            return [(t.token, float(t.logprob)) for t in choice.logprobs.content[0].top_logprobs]
        except Exception as e:  # no reply, one that was cut, or one that cannot be read
            if getattr(e, "status_code", 0) in (401, 403, 404) or type(e.__cause__).__name__ == "ConnectError":
                refused.append(e)
                raise
            error = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        if error not in errors:
            tqdm.write(f"warning: {flag} {url}: {error}", file=sys.stderr)
            errors.append(error)
        return []

    def ask(question: str | list[str], pictures: list[list[str]]) -> list[Answer]:
        """A batch, `concurrency` requests at a time."""
        questions = [question] * len(pictures) if isinstance(question, str) else question
        try:
            with ThreadPoolExecutor(concurrency) as pool:
                answers = list(pool.map(request, questions, pictures))
        except openai.APIStatusError as e:
            fail(f"{flag} {url}: {e.status_code} {str(e)[:200]}; is its model {model}, and the key in OPENAI_API_KEY?")
        except openai.APIConnectionError as e:
            fail(f"{flag} {url}: cannot be reached ({reason(e.__cause__)})")
        worked.append(any(answers))
        if not any(worked):
            fail(f"{flag} {url}: no request has succeeded; the last one: {errors[-1]}")
        return answers
    return ask
