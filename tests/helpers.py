"""Functions and fixtures that several test files share."""
import functools
import json
import math
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import world
from PIL import Image
from safetensors.torch import load_file

import train_awm
import train_dpo
import train_nft
from flow.cli import one_line_errors
from flow.pictures import save_samples
from tests.families import build

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SCRIPTS = [train_nft, train_awm, train_dpo]
PROMPTS = ["a red star", "a very large blue ring", "a green moon"]  # of several lengths


# ---------------------------------------------------------------- what is drawn

def generator(*key: int) -> torch.Generator:
    """The generator of a run's draws, by (seed, purpose, index). Purposes: 0 prompts, 1 an epoch's training rows,
    2 the noise of a rollout, 3 the noise of a training row."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def random_pair(b=5, scale=1.2, seed=0, dtype=torch.float64):
    """A velocity and its reference, with norm ratios from 0.7 to `scale`."""
    g = torch.Generator().manual_seed(seed)
    v_ref = torch.randn(b, 4, 3, 2, generator=g, dtype=dtype)
    scales = torch.linspace(0.7, scale, b, dtype=dtype).view(-1, 1, 1, 1)
    v = v_ref * scales + 0.1 * torch.randn(v_ref.shape, generator=g, dtype=dtype)
    return v, v_ref


def renders(n: int = 3) -> torch.Tensor:
    """Renders (n, 3, 64, 64) of the miniature world."""
    return world.render(world.scene(torch.arange(n) * 7 % 64, torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------- short runs and what they write

SMALL = dict(epochs=4, group=4, groups=2, updates=2, batch=8, rank=4, steps=5, timesteps=1,
             eval_n=4, eval_every=2, save_every=4, lr=2e-3)  # saved once: curves.png takes its time


def small_run(out, script=train_awm, **changes) -> Path:
    """A short training run in this process; returns its folder."""
    pairs = {"pairs": 2} if script is train_dpo else {}
    script.main(script.Args(out=str(out), **SMALL | pairs | changes))
    return Path(out)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(script): the folder of a finished small run, which no test may change."""
    root = tmp_path_factory.mktemp("finished")
    return functools.cache(lambda script: small_run(root / script.__name__, script))


@pytest.fixture(scope="session")
def run(finished) -> Path:
    """The folder of AWM's finished small run."""
    return finished(train_awm)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without the only number that depends on the clock."""
    return [{name: value for name, value in line.items() if name != "img_per_s"} for line in metrics(out)]


def lora_bytes(out: Path) -> bytes:
    """The file of a run's LoRA."""
    return (out / "lora/pytorch_lora_weights.safetensors").read_bytes()


def lora_weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's LoRA."""
    return load_file(out / "lora/pytorch_lora_weights.safetensors")


def flat_copy(params) -> torch.Tensor:
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in params])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sample_rows(out) -> list[dict]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


def pixels(path) -> np.ndarray:
    """A picture (h, w, 3), 0 to 255."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# ---------------------------------------------------------------- errors

def refuses(capsys, call, *words, unchanged: Path | None = None):
    """call() ends with exit code 2 and one line on stderr that has these words, and leaves a folder as it was."""
    before = contents(unchanged) if unchanged else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, one_line_errors():
        call()
    printed = capsys.readouterr().err.splitlines()
    error = [line for line in printed if line.strip() and "%|" not in line]  # without progress bars
    assert end.value.code == 2 and len(error) == 1, error
    assert all(word in error[0] for word in words), (words, error[0])
    assert before is None or contents(unchanged) == before


# ---------------------------------------------------------------- other models

@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name): the folder of a tiny random pipeline of tests/families.py, or of a repository's model like
    tiny/sd3."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name: str) -> str:
        if "/" in name:
            return name
        build(name, root / name)
        return str(root / name)
    return folder


# ---------------------------------------------------------------- a judge over HTTP

@contextmanager
def serve(reply):
    """The URL of an OpenAI-compatible server. reply(path, headers, request) gives (status, body) or (status, body,
    headers); None closes the connection without an answer."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            replied = reply(self.path, self.headers, request)
            if replied is None:
                return self.connection.close()
            status, body, *more = replied
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": len(body), "retry-after-ms": 10}
            for name, value in (headers | dict(*more)).items():
                if value is not None:
                    self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the default of 5 drops some of many clients at once for a second
        daemon_threads = False  # server_close waits for them

    http = Server(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


def answer(probs: dict[str, float]) -> dict:
    """A server's answer: the probabilities of the words that its first token can be, the likeliest first."""
    top = [{"token": word, "logprob": math.log(p)} for word, p in probs.items()]
    content = [{**top[0], "top_logprobs": top}]
    return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}]}


@pytest.fixture()
def server():
    """(url, replies, asked): a server that gives the next of `replies`, (status, body) or (status, body, headers), and
    60 % yes when out of them; each request goes to `asked` as (its headers, its body). A body is JSON, or bytes."""
    replies, asked = [], []

    def reply(path, headers, request):
        asked.append((headers, request))
        status, body, *headers = replies.pop(0) if replies else (200, answer({"Yes": 0.6, "no": 0.3}))
        return status, body if isinstance(body, bytes) else json.dumps(body).encode(), *headers
    with serve(reply) as url:
        yield url, replies, asked


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Two folders of three pictures as sample.py writes them."""
    root, rows = tmp_path_factory.mktemp("folders"), [{"prompt": world.CAPTIONS[i], "seed": 0} for i in range(3)]
    for name, shade in (("a", 1.0), ("b", 0.7)):
        save_samples(str(root / name), renders() * shade, rows)
    return f"{root}/a", f"{root}/b"
