"""Tests of bad input: the error is one short line that names the flag or the file, exit code 2, and no file changes.

Each line of CASES has a script, its flags, and words of the error. RUN stands for the flags of the finished run in
`run/`; the folders in `runs/` are copies of it, each with one thing wrong. The scripts are called in this process as
their last line calls them.
"""
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval_judge
import flow.rewards
from flow import cli, pictures, run
from flow.pipeline import load_pipeline
from tests.helpers import CPU, ROOT, refuses

RUN = ("--group 2 --groups 2 --batch 8 --rank 4 --steps 2 --timesteps 1 --eval-n 2 --eval-every 2 --save-every 1 "
       "--epochs 3 --out")
BIG = "1" + "0" * 12
ASK = "--judge-model m --judge-retries 0 --reward --forensic"
CASES = [line.split("|") for line in f"""
train_awm | --lr 0 | --lr 0 positive
train_awm | --lr -1e-3 | --lr
train_awm | --lr nan | --lr nan finite
train_awm | --lr inf | --lr inf finite
train_awm | --lam -0.1 | --lam -0.1
train_awm | --lam nan | --lam nan
train_awm | --lam -inf | --lam -inf
train_awm | --margin -1 | --margin -1
train_awm | --margin inf | --margin inf
train_awm | --kl -1 | --kl -1
train_awm | --kl nan | --kl nan
train_awm | --epochs 0 | --epochs 0
train_awm | --epochs -3 | --epochs -3
train_awm | --epochs {BIG} | --epochs {BIG} most
train_awm | --groups {BIG} | --groups {BIG} most
train_awm | --groups 49 | --groups 49 48
train_awm | --group {BIG} | --group {BIG} most
train_awm | --group 1 | --group 1 2
train_awm | --rank {BIG} | --rank {BIG} most
train_awm | --rank 0 | --rank 0
train_awm | --steps {BIG} | --steps {BIG} most
train_awm | --steps 1 | --steps 1
train_awm | --timesteps {BIG} | --timesteps {BIG} most
train_awm | --timesteps 8 | --timesteps 8 --steps
train_awm | --size {BIG} | --size {BIG} most
train_awm | --size -64 | --size -64
train_awm | --size 65 | --size 65 tiny/sd3
train_awm | --size 64x | --size 64x 768x512
train_awm | --size 0 | --size 0 least
train_awm | --size 64x33 | --size 64x33 tiny/sd3
train_awm | --size 256 | --size 256 tiny/sd3
train_awm | --frames 5 | --frames 5 videos
train_awm | --frames 0 | --frames 0
train_awm | --eval-n {BIG} | --eval-n {BIG} most
train_awm | --eval-n 0 | --eval-n 0
train_awm | --eval-every -1 | --eval-every -1
train_awm | --save-every 0 | --save-every 0
train_awm | --batch 0 | --batch 0
train_awm | --updates 7 | --updates 7
train_awm | --updates {BIG} | --updates {BIG} most
train_awm | --seed -1 | --seed -1
train_awm | --seed {2**63} | --seed {2**63} 2^63
train_awm | --seed {"9" * 4000} | --seed 2^63
train_awm | --guidance nan | --guidance nan
train_awm | --guidance -1 | --guidance -1
train_awm | --guard-guidance -1 | --guard-guidance -1
train_nft | --guard-guidance 3 --lam auto | --lam auto --guard-guidance number
train_dpo | --guard-guidance 3 --model tiny/flux | --guard-guidance FluxPipeline is told --guidance
train_awm | --max-grad-norm 0 | --max-grad-norm 0
train_awm | --max-grad-norm nan | --max-grad-norm nan
train_awm | --adv-clip 0 | --adv-clip 0
train_awm | --power 0 | --power 0
train_awm | --wandb '' | --wandb empty
train_awm | --init-lora missing | --init-lora missing no such folder
train_awm | --init-lora '' | --init-lora empty
train_awm | --init-lora run/lora --rank 8 | --rank 8 --init-lora run/lora rank 4
train_nft | --init-lora run/lora --rank 32 | --rank 32 --init-lora run/lora rank 4
train_dpo | --init-lora loras/loha | --init-lora loras/loha LoHa plain
train_awm | --init-lora loras/text --rank 8 | --init-lora loras/text lacks any layer
train_nft | --nft-beta 0 | --nft-beta 0
train_nft | --nft-beta nan | --nft-beta nan
train_nft | --timesteps 9 | --timesteps 9
train_nft | --groups 3 --group 3 --updates 2 | --updates 2 9
train_nft | --epochs {BIG} | --epochs {BIG}
train_dpo | --dpo-beta -5 | --dpo-beta -5
train_dpo | --pairs 0 | --pairs 0
train_dpo | --pairs 9 --group 16 | --pairs 9 8
train_dpo | --pairs 3 --group 4 | --pairs 3 --group 4
train_dpo | --group 3 --updates 5 | --updates 5
train_dpo | --epochs {BIG} | --epochs {BIG}
train_awm | --model '' | --model empty
train_awm | --model missing | --model missing folder
train_awm | --model odd/folder | --model odd/folder
train_awm | --model odd/empty.txt | --model odd/empty.txt
train_awm | --model tiny | --model tiny
train_awm | --model tiny/sd3/vae | --model tiny/sd3/vae
train_awm | --model tiny/pickscore | --model tiny/pickscore
train_awm | --model odd/broken-model | --model odd/broken-model
train_awm | --model a/b/c | --model a/b/c
train_awm | --reward '' | --reward empty
train_awm | --reward pickscor | --reward pickscor pickscore,
train_awm | --vlm-question Good? | --vlm-question vlm:MODEL
sample | --vlm-question Good? | --vlm-question vlm:MODEL
train_awm | --reward missing.py:f | --reward missing.py
train_awm | --reward odd/reward.py | --reward odd/reward.py:FUNCTION
train_awm | --reward odd/reward.py: | --reward odd/reward.py
train_awm | --reward odd/reward.py:g | --reward odd/reward.py:g
train_awm | --reward odd/reward.py:number | --reward no function number
train_awm | --reward odd/reward.py:0.5 | --reward 0.5
train_awm | --reward odd/reward.py:nan:nan | --reward weight
train_awm | --reward odd/reward.py:raises | --reward raises reward.py
train_awm | --reward odd/reward.py:exits | --reward exits SystemExit reward.py:5
train_awm | --reward odd/reward.py:nan | --reward nan
train_awm | --reward odd/reward.py:inf | --reward inf
train_awm | --reward odd/reward.py:shape | --reward shape
train_awm | --reward odd/reward.py:none | --reward none
train_awm | --reward odd/reward.py:text | --reward text
train_awm | --reward odd/syntax.py:f | --reward odd/syntax.py:f
train_awm | --reward odd/imports.py:f | --reward odd/imports.py:f nothing_of_the_kind
train_awm | --reward odd/quits.py:f | --reward odd/quits.py:f SystemExit
train_awm | --reward odd/binary.txt.py:f | --reward odd/binary.txt.py:f
train_awm | --reward odd/folder.py:f | --reward odd/folder.py
train_awm | --reward tiny/pickscore:nan | --reward weight
train_awm | --reward tiny/pickscore:inf | --reward weight
train_awm | --reward tiny/pickscore, | --reward missing
train_awm | --reward ,tiny/pickscore | --reward missing
train_awm | --reward :0.5 | --reward missing
train_awm | --reward tiny/sd3 | --reward tiny/sd3
train_awm | --reward odd/folder | --reward odd/folder
train_awm | --prompts '' | --prompts empty
train_awm | --prompts missing.txt | --prompts missing.txt
train_awm | --prompts odd/empty.txt | --prompts odd/empty.txt no prompt
train_awm | --prompts odd/blank.txt | --prompts odd/blank.txt no prompt
train_awm | --prompts odd/bom.txt | --prompts odd/bom.txt no prompt
train_awm | --prompts odd/binary.txt | --prompts odd/binary.txt
train_awm | --prompts odd/latin.txt | --prompts odd/latin.txt
train_awm | --prompts odd/folder | --prompts odd/folder
train_awm | --prompts odd/loop | --prompts odd/loop
train_awm | --prompts odd/dangling | --prompts odd/dangling
train_awm | --prompts /dev/null | --prompts /dev/null no prompt
train_awm | --eval-prompts missing.txt | --eval-prompts missing.txt
train_awm | --eval-prompts odd/binary.txt | --eval-prompts odd/binary.txt
train_awm | --eval-prompts odd/folder | --eval-prompts odd/folder
train_awm | --out '' | --out empty
train_awm | --out odd/empty.txt | --out odd/empty.txt no folder
train_awm | --out odd/empty.txt/run | --out odd/empty.txt no folder
train_awm | --out odd/dangling | --out odd/dangling
train_awm | --out odd/loop/run | --out odd/loop
train_awm | --out {"x" * 300} | --out long
train_awm | --out /proc/run | --out /proc
train_awm | {RUN} run --lr 0.5 | --out run --lr 0.0005 0.5
train_awm | {RUN} run --seed 7 --kl 0.5 | --out --seed --kl
train_awm | {RUN} run --epochs 1 --lam 1 | --out run --lam
train_awm | {RUN} run --epochs 1 | --epochs 1 has done 2
train_nft | {RUN} run | --out run train_nft.py another
train_dpo | {RUN} run | --out run train_dpo.py another
train_awm | {RUN} runs/args-folder | --out args.json no file
train_awm | {RUN} runs/args-list | --out args.json
train_awm | {RUN} runs/args-garbage | args.json
train_awm | {RUN} runs/args-binary | args.json
train_awm | {RUN} runs/args-empty | args.json
train_awm | {RUN} runs/args-inputs | --out args.json
train_awm | {RUN} runs/args-gone | --out another
train_awm | {RUN} runs/args-device | --out args.json no file
train_awm | {RUN} runs/log-folder | --out metrics.jsonl no file
train_awm | {RUN} runs/log-garbage | metrics.jsonl
train_awm | {RUN} runs/log-short | metrics.jsonl shorter
train_awm | {RUN} runs/log-gone | metrics.jsonl
train_awm | {RUN} runs/log-lists | metrics.jsonl object
train_awm | {RUN} runs/log-full | --out metrics.jsonl no file
train_awm | {RUN} runs/curves-folder | --out curves.png no file
train_awm | {RUN} runs/samples-file | --out samples no folder
train_awm | {RUN} runs/samples-png-folder | --out 00000.png no file
train_awm | {RUN} runs/lora-file | --out lora no folder
train_awm | {RUN} runs/lora-loop | --out lora no folder
train_awm | {RUN} runs/lora-weights-folder | --out pytorch_lora_weights.safetensors no file
train_awm | {RUN} runs/lora-card-folder | --out README.md no file
train_awm | {RUN} runs/checkpoint-file | --out checkpoint no folder
train_awm | {RUN} runs/checkpoint-dangling | --out checkpoint no folder
train_awm | {RUN} runs/checkpoint-gone | --out checkpoint gone
train_awm | {RUN} runs/state-folder | --out state.pt no file
train_awm | {RUN} runs/state-gone | checkpoint gone
train_awm | {RUN} runs/state-gone --lr 0.5 | --out --lr
train_awm | {RUN} runs/state-cut | state.pt
train_awm | {RUN} runs/state-bits | state.pt checksum
train_awm | {RUN} runs/state-garbage | state.pt
train_awm | {RUN} runs/state-empty | state.pt
train_awm | {RUN} runs/state-list | state.pt
train_awm | {RUN} runs/state-pickle | state.pt
train_awm | {RUN} runs/state-no-opt | state.pt opt
train_awm | {RUN} runs/state-no-step | state.pt step
train_awm | {RUN} runs/state-epoch-text | state.pt epoch
train_awm | {RUN} runs/state-nan | state.pt not finite
train_awm | {RUN} runs/state-epoch-9 | --epochs 3 has done 9
train_awm | {RUN} runs/state-other-lora | state.pt does not fit
train_awm | {RUN} runs/state-fewer-loras | state.pt does not fit
train_awm | {RUN} runs/state-renamed-lora | state.pt does not fit
train_awm | {RUN} runs/state-odd-opt | state.pt does not fit
train_awm | {RUN} runs/state-odd-moments | state.pt does not fit
train_nft | {RUN} runs/nft-no-old | state.pt old
train_nft | {RUN} runs/nft-odd-old | state.pt fit
train_nft | {RUN} runs/nft-nan-old | state.pt not finite
train_awm | {RUN} runs/lock-folder | --out lock no file
train_awm | --out runs/only-png | --out samples another
train_awm | --out runs/only-mine | --out samples another
train_awm | --out runs/only-curves | --out curves.png another
train_awm | --out runs/only-lora | --out lora another
train_awm | --out runs/only-log | --out metrics.jsonl another
train_awm | --out runs/only-args | --out args.json another
train_awm | --out a | --out samples.jsonl another
sample | --steps 0 | --steps 0
sample | --steps {BIG} | --steps {BIG} most
sample | --n 0 | --n 0
sample | --n {BIG} | --n {BIG} most
sample | --n 99999 | --n 99999 pictures
sample | --size {BIG} | --size {BIG} most
sample | --size 63 | --size 63
sample | --size wide | --size wide 768x512
sample | --frames 3 | --frames 3 videos
sample | --batch -1 | --batch -1
sample | --seed {2**64} | --seed 2^63
sample | --seed -5 | --seed -5
sample | --guidance inf | --guidance inf
sample | --renorm both | --renorm both
sample | --renorm match | --renorm --lora
sample | --norms | --norms --lora
sample | --adjoint | --adjoint --reward
sample | --adjoint --reward vlm:tiny/judge | --adjoint no gradient
sample | --adjoint --reward odd/reward.py:numpy | --adjoint odd/reward.py:numpy no gradient
sample | --adjoint --reward odd/reward.py:prompts | --adjoint odd/reward.py:prompts no gradient
sample | --adjoint --reward tiny/hps,odd/reward.py:numpy | --adjoint odd/reward.py:numpy no gradient
sample | --reward odd/reward.py:raises | --reward raises
sample | --reward missing | --reward missing
sample | --model missing | --model missing
sample | --model tiny/judge | --model tiny/judge
sample | --prompt '' | --prompt empty
sample | --prompts odd/binary.txt | --prompts odd/binary.txt
sample | --prompts odd/bom.txt | --prompts odd/bom.txt
sample | --lora missing | --lora missing
sample | --lora '' | --lora empty
sample | --lora run | --lora run lora/
sample | --lora loras/garbage | --lora loras/garbage
sample | --lora loras/cut | --lora loras/cut
sample | --lora loras/folder | --lora loras/folder
sample | --lora loras/nan | --lora loras/nan not finite
sample | --lora loras/none | --lora loras/none
sample | --lora loras/half | --lora loras/half lacks
sample | --lora loras/layers | --lora loras/layers lacks
sample | --lora loras/wide | --lora loras/wide no place [128, 4] [4, 256] of transformer_blocks
sample | --lora loras/thin | --lora loras/thin rank 2 says 4
sample | --lora loras/renamed | --lora loras/renamed UNet no place unet.transformer_blocks
sample | --lora loras/more | --lora loras/more diffusers no place of more
sample | --lora loras/metadata | --lora loras/metadata
sample | --lora loras/peft | --lora loras/peft PEFT put its adapter_config.json beside it
sample | --lora loras/loha | --lora loras/loha LoHa hada_w1_a plain
sample | --lora loras/dora | --lora loras/dora DoRA lora_magnitude_vector
sample | --lora loras/dropped --model tiny/flux | --lora loras/dropped kohya no place double_blocks_0
sample | --lora loras | --lora loras holds no .safetensors file lora/
sample | --lora loras/dora-scale | --lora loras/dora-scale DoRA dora_scale plain
sample | --lora loras/bias | --lora loras/bias lora_B.bias plain
sample | --lora loras/twice | --lora loras/twice lora_A comes twice
sample | --lora loras/again | --lora loras/again no place for
sample | --lora loras/second | --lora loras/second no place transformer_2.
sample | --lora loras/text | --lora loras/text lacks any layer of the transformer
sample | --lora loras/conv | --lora loras/conv no place pos_embed.proj
sample | --lora loras/unet | --lora loras/unet kohya no place down_blocks_0
sample | --lora loras/empty | --lora loras/empty cannot be read
sample | --lora loras/mine.pt | --lora loras/mine.pt pickle run code convert .safetensors
sample | --lora loras/pickled | --lora loras/pickled no .safetensors file
sample | --lora run/lor/x | --lora run/lor/x no such folder
sample | --lora loras/two | --lora loras/two holds a.safetensors, b.safetensors give one
sample | --lora run/lora --model tiny/flux | --lora run/lora tiny/flux
sample | --out odd/empty.txt | --out odd/empty.txt no folder
sample | --out run/samples | --out run/samples 00000.png
sample | --out outs/jsonl-folder | --out samples.jsonl no file
sample | --out outs/jsonl-garbage | --out samples.jsonl
sample | --out outs/grid-folder | --out grid.png no file
sample | --out outs/norms-folder | --out norms.json no file
sample | --out outs/strange | --out 00000.png
sample | --out /proc/x | --out /proc
eval_judge | a b --judge ftp://x | --judge ftp://x
eval_judge | a b --judge missing | --judge missing
eval_judge | a b --judge http://127.0.0.1:9/v1 | --judge-model
eval_judge | a b {ASK} --judge http://127.0.0.1:9/v1 | --judge cannot be reached
eval_judge | a b {ASK} --judge http:// | --judge http://
eval_judge | a b {ASK} --judge http://[ | --judge http://[
eval_judge | a b --judge tiny/pickscore --reward --forensic | --judge tiny/pickscore
eval_judge | a b --judge-timeout 0 | --judge-timeout 0
eval_judge | a b --judge-retries -1 | --judge-retries -1
eval_judge | a b --judge-retries {BIG} | --judge-retries {BIG}
eval_judge | a b --judge-concurrency 0 | --judge-concurrency 0
eval_judge | a b --judge-concurrency {BIG} | --judge-concurrency {BIG}
eval_judge | a b --bootstrap 0 | --bootstrap 0
eval_judge | a b --bootstrap {BIG} | --bootstrap {BIG}
eval_judge | a b --batch 0 | --batch 0
eval_judge | a b --reward missing --judge none --forensic | --reward missing
eval_judge | a b --reward odd/reward.py:nan --judge none --forensic | --reward nan
eval_judge | a b --reward --forensic --judge none | --reward --judge
eval_judge | a b --forensic tiny/embed --reward --judge none | --forensic tiny/embed --real-label
eval_judge | a b --forensic missing --reward --judge none | --forensic missing
eval_judge | a b --real-label typo --reward --judge none | --real-label typo
eval_judge | a b --real missing | missing folder
eval_judge | a b --real odd/folder | odd/folder picture
eval_judge | a b --real outs/other | --real at least two
eval_judge | a b --embed missing --real b --reward --forensic --judge none | --embed missing
eval_judge | | folders
eval_judge | a missing | missing no such folder
eval_judge | a odd/empty.txt | odd/empty.txt folder
eval_judge | a odd/folder | odd/folder no picture
eval_judge | a outs/jsonl-garbage | outs/jsonl-garbage samples.jsonl
eval_judge | a outs/cut | 00001.png
eval_judge | a outs/gone | 00001.png
eval_judge | a outs/broken | 00001.png
eval_judge | a outs/small | 00001.png
eval_judge | a outs/jsonl-object | outs/jsonl-object samples.jsonl
eval_judge | a outs/jsonl-list | outs/jsonl-list samples.jsonl
eval_judge | a outs/jsonl-prompts | outs/jsonl-prompts samples.jsonl
eval_judge | a outs/jsonl-empty | outs/jsonl-empty no picture
eval_judge | a outs/other | no prompt and seed
eval_judge | a outs/seeds | no prompt and seed
eval_judge | a b --out odd/empty.txt | --out odd/empty.txt no folder
eval_judge | a b --out evals/report-folder | --out report.json no file
eval_judge | a b --out evals/report-garbage | report.json
eval_judge | a b --out evals/picture-folder | --out report.png no file
eval_judge | a b --out evals/picture | report.png
eval_judge | a b --out evals/scores-folder | --out scores.jsonl no file
eval_judge | a b --out evals/scores-garbage | scores.jsonl
make | --parts judge --out odd/folder | --parts judge sd3
make | --divide 0 | --divide 0
make | --renders 0 | --renders 0
make | --renders {BIG} | --renders {BIG} most
make | --seed -1 | --seed -1
make | --seed {2**70} | --seed 2^32
make | --out odd/empty.txt | --out odd/empty.txt no folder
make | --out '' | --out empty
make | --work odd/empty.txt/x | --work odd/empty.txt no folder
make | --out outs/sd3-file | --out sd3 no folder
world | --n 0 | --n 0
world | --n {BIG} | --n {BIG} most
world | --seed -1 | --seed -1
world | --seed {2**63} | --seed 2^63
world | --prompts odd/latin.txt | --prompts odd/latin.txt
world | --prompts odd/strange.txt | --prompts a grey cat
world | --out odd/empty.txt | --out odd/empty.txt no folder
world | --out run/samples | --out run/samples
flow.cost.budget | --model no/such/folder | --model no/such/folder
flow.cost.budget | --batch 0 | --batch 0 positive
flow.cost.budget | --tflops -1 | --tflops -1.0
reproduce | --seeds -1 | --seeds -1
reproduce | --seeds | --seeds
reproduce | --only 0 | --only 0
reproduce | --only 11 | --only 11
reproduce | --runs /dev/null | --runs /dev/null no folder
reproduce | --runs '' | --runs empty
reproduce | --runs 'a b' | --runs a b
reproduce | --results /dev/null/x | --results /dev/null no folder
reproduce | --results {"y" * 300} | --results long
""".strip().splitlines()]


REWARDS = """import numpy as np
import torch
number = 3
def raises(images, prompts): raise ValueError("no")
def exits(images, prompts): raise SystemExit(0)
def nan(images, prompts): return images.mean((1, 2, 3)) * float("nan")
def inf(images, prompts): return images.mean((1, 2, 3)) + float("inf")
def shape(images, prompts): return images
def none(images, prompts): return None
def text(images, prompts): return ["good"] * len(images)
def numpy(images, prompts): return torch.from_numpy(np.asarray(images.detach()).mean((1, 2, 3)))
def prompts(images, prompts): return torch.tensor([float(len(p)) for p in prompts], requires_grad=True)
"""


def call(script: str, flags: list[str]):
    """Call a script as its last line does."""
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *flags]
    module.main(cli.parse(module.Args, module.__doc__))


def make_odd(odd: Path):
    """Write files that are no prompts, rewards or models."""
    odd.mkdir()
    (odd / "folder").mkdir()
    (odd / "folder.py").mkdir()
    (odd / "loop").symlink_to("loop")
    (odd / "dangling").symlink_to("nowhere/at/all")
    for name, content in {
        "empty.txt": b"",
        "blank.txt": b"\n \n\t\n",
        "bom.txt": b"\xef\xbb\xbf",
        "binary.txt": bytes(range(256)),
        "latin.txt": "un café\n".encode("latin-1"),
        "strange.txt": b"a grey cat\n",
        "reward.py": REWARDS.encode(),
        "syntax.py": b"def f(images, prompts:\n",
        "imports.py": b"import nothing_of_the_kind\n",
        "quits.py": b"import sys\nsys.exit(0)\n",
        "binary.txt.py": bytes(range(256)),
    }.items():
        (odd / name).write_bytes(content)
    (odd / "broken-model").mkdir()
    (odd / "broken-model/model_index.json").write_text("{")


def make_runs(runs: Path, run: Path):
    """Copy a finished run, each time with one thing wrong."""
    good, state = (run / "checkpoint/state.pt").read_bytes(), torch.load(run / "checkpoint/state.pt", weights_only=True)
    name, weight = next(iter(state["lora"].items()))

    def copy(what: str) -> Path:
        return shutil.copytree(run, runs / what)

    def instead(what: str, part: str, content=None, link: str | None = None):
        """In the place of a file or folder: a file of this content, a link, or a folder."""
        path = copy(what) / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if link:
            path.symlink_to(link)
        elif content is None:
            path.mkdir()
        else:
            path.write_bytes(content)

    def other_state(what: str, value):
        torch.save(value, copy(what) / "checkpoint/state.pt")

    args = json.loads((run / "args.json").read_text())
    instead("args-folder", "args.json")
    instead("args-list", "args.json", b"[1, 2]")
    instead("args-garbage", "args.json", b"{'lam':")
    instead("args-binary", "args.json", bytes(range(256)))
    instead("args-empty", "args.json", b"")
    instead("args-inputs", "args.json", json.dumps({**args, "inputs": 3}).encode())
    instead("args-device", "args.json", link="/dev/full")
    instead("log-folder", "metrics.jsonl")
    instead("log-garbage", "metrics.jsonl", os.urandom(20_000))
    instead("log-short", "metrics.jsonl", b"{}\n")
    instead("log-lists", "metrics.jsonl", b"1\n" * 10_000)  # however many bytes of it are read
    instead("log-full", "metrics.jsonl", link="/dev/full")
    instead("curves-folder", "curves.png")
    instead("samples-file", "samples", b"")
    instead("samples-png-folder", "samples/00000.png")
    instead("lora-file", "lora", b"")
    instead("lora-loop", "lora", link="lora")
    instead("lora-weights-folder", "lora/pytorch_lora_weights.safetensors")
    instead("lora-card-folder", "lora/README.md")
    instead("checkpoint-file", "checkpoint", b"")
    instead("checkpoint-dangling", "checkpoint", link="nowhere")
    instead("state-folder", "checkpoint/state.pt")
    instead("state-cut", "checkpoint/state.pt", good[:1000])
    half = len(good) // 2
    instead("state-bits", "checkpoint/state.pt", good[:half] + bytes(64) + good[half + 64:])
    instead("state-garbage", "checkpoint/state.pt", os.urandom(5000))
    instead("state-empty", "checkpoint/state.pt", b"")
    instead("lock-folder", "checkpoint/lock")
    (copy("args-gone") / "args.json").unlink()
    (copy("log-gone") / "metrics.jsonl").unlink()
    (copy("state-gone") / "checkpoint/state.pt").unlink()
    shutil.rmtree(copy("checkpoint-gone") / "checkpoint")
    other_state("state-list", [1, 2])
    other_state("state-pickle", {**state, "epoch": Path("x")})  # needs the unpickler that runs code
    for part in ("opt", "step"):
        other_state(f"state-no-{part}", {k: v for k, v in state.items() if k != part})
    other_state("state-epoch-text", {**state, "epoch": "1"})
    other_state("state-nan", {**state, "lora": {**state["lora"], name: weight * math.nan}})
    other_state("state-epoch-9", {**state, "epoch": 9})
    other_state("state-other-lora", {**state, "lora": {**state["lora"], name: weight[:1]}})
    fewer = {k: v for k, v in state["lora"].items() if k != name}
    other_state("state-fewer-loras", {**state, "lora": fewer})
    other_state("state-renamed-lora", {**state, "lora": {**fewer, "renamed": weight}})
    moments = {0: {**state["opt"]["state"][0], "exp_avg": torch.zeros(3, 3)}}
    other_state("state-odd-moments", {**state, "opt": {**state["opt"], "state": moments}})
    other_state("state-odd-opt", {**state, "opt": {"state": {0: {"exp_avg": weight}}, "param_groups": []}})
    for what, file in {
        "png": "samples/00000.png",
        "mine": "samples/mine.png",
        "curves": "curves.png",
        "lora": "lora/mine.safetensors",
        "log": "metrics.jsonl",
        "args": "args.json",
    }.items():
        (runs / f"only-{what}" / file).parent.mkdir(parents=True)
        (runs / f"only-{what}" / file).write_bytes(b"{}")


def make_nft_runs(runs: Path, run: Path):
    """Copy a finished run of NFT with a wrong old policy in its checkpoint."""
    state = torch.load(run / "checkpoint/state.pt", weights_only=True)
    for what, old in {
        "no-old": None,
        "odd-old": state["old"][:-1],
        "nan-old": [x * math.nan for x in state["old"]],
    }.items():
        torch.save({**state, "old": old}, shutil.copytree(run, runs / f"nft-{what}") / "checkpoint/state.pt")


def make_loras(loras: Path, run: Path):
    """Write LoRAs that are broken, or of another model."""
    name = "pytorch_lora_weights.safetensors"
    good = (run / "lora" / name).read_bytes()
    weights = load_file(run / "lora" / name)
    with safe_open(run / "lora" / name, "pt") as opened:
        metadata = opened.metadata()

    def make(what: str, tensors: dict, metadata=metadata):
        (loras / what).mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, loras / what / name, metadata)

    more = {f"transformer.more.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    make("nan", {k: v * math.nan for k, v in weights.items()})
    make("none", {})
    make("half", {k: v for k, v in weights.items() if "lora_A" in k})
    make("layers", {k: v for k, v in weights.items() if "blocks.0." in k})
    make("wide", {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in weights.items()})
    make("thin", {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in weights.items()})
    make("renamed", {k.replace("transformer.", "unet."): v for k, v in weights.items()}, None)
    make("more", {**weights, **more}, None)
    make("metadata", weights, {"lora_adapter_metadata": "{"})
    first = next(iter(weights)).removesuffix(".lora_A.weight")
    make("peft", {f"base_model.model.{k.removeprefix('transformer.')}": v for k, v in weights.items()}, None)
    make("loha", {f"{first}.hada_w1_a": torch.ones(4, 4)}, None)
    make("dora", {**weights, f"{first}.lora_magnitude_vector": torch.ones(64)})
    kohya = {f"lora_unet_{layer}.lora_{part}.weight": torch.ones(shape) for layer in (
        "double_blocks_0_img_attn_proj", "final_layer_other") for part, shape in (("down", (2, 64)), ("up", (64, 2)))}
    make("dropped", kohya, None)
    make("dora-scale", {**weights, f"{first}.dora_scale": torch.ones(128, 1)}, None)
    make("bias", {**weights, f"{first}.lora_B.bias": torch.ones(128)}, None)
    make("twice", {**weights, f"{first}.lora_A.old.weight": torch.ones(4, 128)}, None)
    kohya_name = f"lora_transformer_{first.removeprefix('transformer.').replace('.', '_')}"
    make("again", {**weights, **{f"{kohya_name}.lora_{part}.weight": 1 * weights[f"{first}.lora_{x}.weight"]
                                 for part, x in (("down", "A"), ("up", "B"))}}, None)
    make("second", {k.replace("transformer.", "transformer_2."): v for k, v in weights.items()}, None)
    make("text", {k.replace("transformer.", "text_encoder."): v for k, v in weights.items()}, None)
    make("conv", {f"transformer.pos_embed.proj.lora_{part}.weight": torch.ones(4, 4, 1, 1) for part in "AB"}, None)
    make("unet", {f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{part}.weight": torch.ones(4, 4)
                  for part in ("down", "up")}, None)
    (loras / "pickled").mkdir()
    for file in ("mine.pt", "pickled/adapter_model.bin"):
        torch.save(weights, loras / file)
    (loras / "two").mkdir()
    for file in ("a", "b"):
        save_file(weights, loras / "two" / f"{file}.safetensors")
    for what, content in {"garbage": os.urandom(2000), "cut": good[:2000], "empty": b""}.items():
        (loras / what).mkdir()
        (loras / what / name).write_bytes(content)
    (loras / "folder" / name).mkdir(parents=True)


def make_outs(home: Path):
    """Write folders of pictures, some with one thing wrong, and folders in which an output cannot be written."""
    rows = [{"prompt": "a red star", "seed": seed} for seed in range(2)]
    for name in ("a", "b", "outs/cut", "outs/gone", "outs/broken", "outs/small"):
        pictures.save_samples(str(home / name), torch.rand(2, 3, 64, 64), rows)
    pictures.save_samples(str(home / "outs/other"), torch.rand(1, 3, 64, 64), [{"prompt": "a blue star", "seed": 0}])
    other_seeds = [{**row, "seed": 9 + row["seed"]} for row in rows]
    pictures.save_samples(str(home / "outs/seeds"), torch.rand(2, 3, 64, 64), other_seeds)
    (home / "outs/cut/00001.png").write_bytes((home / "a/00001.png").read_bytes()[:100])
    (home / "outs/gone/00001.png").unlink()
    (home / "outs/broken/00001.png").write_bytes(b"not a picture")
    pictures.to_image(torch.rand(3, 32, 32)).save(home / "outs/small/00001.png")
    for name, text in {
        "object": "{}\n",
        "list": "[1]\n",
        "prompts": '{"prompt": ["a"], "seed": 0, "file": "00000.png"}\n',
        "empty": "",
    }.items():
        (home / f"outs/jsonl-{name}").mkdir(parents=True)
        (home / f"outs/jsonl-{name}/samples.jsonl").write_text(text)
    for folder in ("outs/jsonl-folder/samples.jsonl", "outs/grid-folder/grid.png", "outs/norms-folder/norms.json",
                   "evals/report-folder/report.json", "evals/picture-folder/report.png",
                   "evals/scores-folder/scores.jsonl"):
        (home / folder).mkdir(parents=True)
    for file in ("outs/jsonl-garbage/samples.jsonl", "outs/strange/00000.png", "outs/sd3-file/sd3",
                 "evals/report-garbage/report.json", "evals/picture/report.png", "evals/scores-garbage/scores.jsonl"):
        (home / file).parent.mkdir(parents=True)
        (home / file).write_text("mine")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with finished runs and everything that is wrong; tiny/ is the repository's."""
    home = tmp_path_factory.mktemp("bad")
    (home / "tiny").symlink_to(ROOT / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sys, "argv", sys.argv)
        call("train_awm", [*RUN.split(), "run", "--epochs", "2"])
        call("train_nft", [*RUN.split(), "nft", "--epochs", "1"])
    run.unlock()
    make_odd(home / "odd")
    make_runs(home / "runs", home / "run")
    make_nft_runs(home / "runs", home / "nft")
    make_loras(home / "loras", home / "run")
    make_outs(home)
    return home


def tree(folder) -> dict:
    """Each file and folder with its size and time of writing, without locks; links are not followed."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            now = entry.stat(follow_symlinks=False)
            found |= {entry.path: (now.st_size, now.st_mtime_ns)} if entry.name != "lock" else {}
            found |= tree(entry.path) if entry.is_dir(follow_symlinks=False) else {}
    return found


def check_error(said: str, words: str):
    """The output is one short line that has these words."""
    lines = [line for line in said.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and len(lines[0]) <= 250 and "\x1b" not in said and "Traceback" not in said
    assert all(word in lines[0] for word in words.split()), (words, lines[0])


def stop(signum, frame):
    """End a case that is not refused."""
    raise TimeoutError("the input was accepted")


@pytest.mark.parametrize("script, flags, words", CASES, ids=lambda text: text.strip()[:60])
def test_it_is_one_line_and_nothing_is_written(home, monkeypatch, capfd, script, flags, words):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", sys.argv)
    before = tree(home)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        with pytest.raises(SystemExit) as end:
            call(script.strip(), shlex.split(flags))
    finally:
        signal.alarm(0)
        run.unlock()
    assert end.value.code == 2
    check_error(capfd.readouterr().err, words)
    assert tree(home) == before


@pytest.mark.parametrize("command", [
    "train_dpo.py --pairs 3 --group 4 | --pairs 3 --group 4",
])
def test_a_real_process_says_the_same(home, command):
    """Typed in a shell, nothing that the libraries print gets in the way."""
    command, words = command.split("|")
    before = tree(home)
    script, *flags = shlex.split(command)
    end = subprocess.run([sys.executable, ROOT / script, *flags], cwd=home, capture_output=True, text=True)
    assert end.returncode == 2 and end.stdout == ""
    check_error(end.stderr, words)
    assert tree(home) == before


def test_a_model_that_cannot_be_downloaded(monkeypatch, tmp_path, capsys):
    """A hub id without network and cache: the error says what to accept or download, and how to point the flag to a
    folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for flag, call, name in [
        ("--model", lambda n: load_pipeline(n, CPU), "stabilityai/stable-diffusion-3.5-medium"),
        ("--embed", lambda n: eval_judge.judge.load_embed(n, CPU), "facebook/dinov2-base"),
    ]:
        refuses(capsys, lambda: call(name),
                f"{flag} {name}", "licence", f"hf download {name} --local-dir DIR", f"{flag} DIR")
    for name, needs in (
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("hpsv2.1", "xswu/HPSv2"),
        ("clipscore", "openai/clip-vit-large-patch14"),
    ):
        refuses(capsys, lambda: flow.rewards.load_reward(name, CPU),
                f"--reward {name}", needs, "HF_HOME")
