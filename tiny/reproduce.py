"""Measure the paper's claims on the miniature world.

    python tiny/reproduce.py                            # what is missing in tiny/results, then the report of all of it
    python tiny/reproduce.py --results runs/mine        # measure everything anew, beside the committed numbers
    python tiny/reproduce.py --bases sd3 --methods awm --rewards pickscore --seeds 0 --only 4
    python tiny/reproduce.py --smoke                    # a toy version in runs/smoke, to see that all of it works

A run is a base, a method, a reward and a seed. Each run is trained three times: with --lam 0 ("unguarded"), with
--lam 0.05 ("guarded", the default), and with that and --guard-guidance 3 ("guided": the guard of the guided velocity).
All else is as the scripts have it by default. The project's own scripts train, sample and judge. They are called in
this process; RUNS/<run>-<hashes>/commands.txt lists the commands. What "with guidance" means for tiny/flux is said in
guards.py, true_guidance.

What is measured on a run comes in parts (`PARTS`). Each part is saved in RESULTS/<run>.json as soon as it is measured,
with its commit and with hashes of the weights, code and flags that it depends on, and is not measured again. The last
lines say how many parts have other hashes than today's; to measure a part anew, delete it. An interrupted reproduction
continues with the same command. RESULTS.md, TABLES.md and results.json are written beside RESULTS, and the figures to
assets/.

On several cores, start the command several times, on one thread each. What another process works on is left to it:

    for i in 1 2; do OMP_NUM_THREADS=1 python tiny/reproduce.py & sleep 1; done; wait

Pictures that are judged show held-out prompts. All that is chosen is chosen on training prompts: a checkpoint (claim
8), a guard (9), a rival's strength (10).
"""
import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import guards
import numpy as np
import torch
import tyro
from figures import draw_all, draw_front
from guards import AUTO, BOTH, GUARDS, GUIDANCE, GUIDED, LAM, RIVALS, Variant, true_guidance
from paired import read_json
from report import rounded, write_report
from tqdm import tqdm

from eval_judge import SINGLE
from flow.cli import InputError, check_flags, check_place, fingerprint, make_dir, one_line_errors, parse, write_files
from flow.judge import local_judge, read_answer
from flow.pictures import load_pictures, read_folder


@dataclass
class Args:
    bases: tuple[Literal["sd3", "flux"], ...] = ("sd3", "flux")
    """base models in tiny/"""
    methods: tuple[Literal["nft", "awm", "dpo"], ...] = ("nft", "awm", "dpo")
    """training scripts"""
    rewards: tuple[Literal["pickscore", "hps"], ...] = ("pickscore", "hps")
    """reward models in tiny/"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the trainings"""
    only: tuple[str, ...] = ()
    """measure what these claims need, 1 to 10, or the parts whose names begin so ("rival: velocity KL"); (): all"""
    smoke: bool = False
    """one run of two epochs with few pictures"""
    runs: str = "runs/reproduce"
    """folder for LoRAs and pictures (with --smoke: for everything; runs/smoke by default)"""
    results: str = "tiny/results"
    """folder for the numbers"""


class Run(NamedTuple):
    base: str
    method: str
    reward: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder and file."""
        return f"{self.base}-{self.method}-{self.reward}-s{self.seed}"

    @property
    def cell(self) -> str:
        """What runs that differ only in their seed have in common."""
        return f"{self.base} {self.method} {self.reward}"

    @property
    def corner(self) -> str:
        """The run's base and reward."""
        return f"{self.base}, {self.reward}"


class Size(NamedTuple):
    """How much is trained and sampled. The recorded hashes of flags depend on these names and values."""
    train: str = ""  # more flags for the training scripts
    steps: int = 28
    few: tuple[int, ...] = (8, 4, 2)  # steps of few-step sampling
    scales: tuple[str, ...] = ("none", "1.5", "2", "3", "4.5")  # guidance scales
    n: int = 8  # pictures of each held-out prompt
    n_adjoint: int = 12  # the same, for claim 3
    n_choose: int = 2  # pictures of each training prompt, to choose a checkpoint, a strength or a guard
    renders: int = 1024
    prompts: str = "tiny/prompts.txt"  # training prompts
    only: tuple[str, ...] | None = None  # parts to measure (None: all)


SMOKE = Size("--epochs 2 --group 2 --groups 2 --steps 4 --eval-n 2 --save-every 2", 4, (2,), ("none", "3"), 1, 1, 1, 32,
             "tiny/smoke_prompts.txt", only=("main", "auto", "renorm", "adjoint", "few", "early",
                                             "guard: both, guided times 1", "rival: EMA-KL 0.3"))


# ---------------------------------------------------------------- what numbers depend on

@functools.cache
def weights(base: str) -> str:
    """A hash of the models and prompts that a base's runs use."""
    files = (base, "pickscore", "hps", "judge", "forensic", "embed", "prompts.txt", "eval_prompts.txt")
    return hashlib.sha256("".join(fingerprint(f"tiny/{file}") for file in files).encode()).hexdigest()[:8]


def source_hash(*sources: str) -> str:
    """A hash of Python code without its comments, docstrings and help texts."""
    digest = hashlib.sha256()
    for source in sources:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [line for line in node.body if not isinstance(getattr(line, "value", None), ast.Constant)
                             or not isinstance(line, ast.Expr)]
        text = re.sub(r", \w+=\[\]|\w+=\[\](, )?", "", ast.dump(tree))  # Python's versions differ in empty fields
        digest.update(text.encode())
    return digest.hexdigest()[:8]


@functools.cache
def code(*scripts: str) -> str:
    """A hash of the code that numbers come from: the given scripts, the guard, sampling, judging, the renderer, and
    flow/ without its tests and cost estimates."""
    flow = [file for file in Path("flow").rglob("*.py") if not file.name.startswith("test_")]
    flow = [file for file in flow if Path("flow/cost") not in file.parents]
    files = ("normguard.py", *scripts, "sample.py", "eval_judge.py", "tiny/world.py", *sorted(flow))
    return source_hash(*[Path(file).read_text() for file in files])


def rival_code(variant: Variant) -> str:
    """A hash of the code of a variant's rival; "" with NormGuard's own hinge."""
    if not variant.rival:
        return ""
    rival = getattr(variant.rival, "func", variant.rival)  # of a partial
    arguments = getattr(variant.rival, "keywords", {})
    functions = (rival, guards.of_rows, guards.squared_error, guards.velocity_with, guards.velocities, true_guidance)
    return source_hash(*map(inspect.getsource, functions), repr(arguments))


@functools.cache
def commit() -> str | None:
    """The commit that is checked out; None outside git."""
    git = shutil.which("git")
    command = [git, "rev-parse", "--short", "HEAD"]
    return git and subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def made_with(base: str, *scripts: str) -> dict[str, str]:
    """Hashes of a base's weights, and of the code with these training scripts."""
    return {"weights": weights(base), "code": code(*scripts)}


def depends(run: Run, size: Size, part: str) -> dict[str, str]:
    """Hashes of what a part's numbers depend on."""
    variants = [f"{variant.flags} {rival_code(variant)}" for variant in (PARTS[part].variant, GUIDED[run.base])]
    flags = zlib.crc32(f"{part} {LAM} {GUIDANCE} {size._replace(only=None)} {variants}".encode())
    return {**made_with(run.base, f"train_{run.method}.py"), "flags": f"{flags:08x}"}


def home_of(root: Path, base: str, run: Run | None = None) -> Path:
    """The folder of a base or of one of its runs. What other weights or code made is in other folders."""
    hashes = made_with(base, f"train_{run.method}.py") if run else made_with(base)
    return root / f"{run.name if run else base}-{hashes['weights']}-{hashes['code']}"


# ---------------------------------------------------------------- commands

def command(log: Path, line: str, out: Path | None = None, note: str = "", **more):
    """Run `python <line>` in this process, as main(args, **more) of its script, and add it to log/commands.txt.

    out: the folder that it writes. The command is skipped if out/command.txt has it, with the same note. The folder is
    deleted first if another command wrote it, or if the command has a note: then it cannot resume."""
    noted = " ".join(f"python {line} {note}".split()) + "\n"
    done = (out / "command.txt").read_text() if out and (out / "command.txt").exists() else None
    if done == noted:
        return
    if out and (done or note):
        shutil.rmtree(out, ignore_errors=True)
    script, *flags = line.split()
    module = importlib.import_module(Path(script).stem)
    log.mkdir(parents=True, exist_ok=True)
    with open(log / "commands.txt", "a") as f:
        f.write(noted)
    with open(log / "output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try:
            module.main(tyro.cli(module.Args, args=flags), **more)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"python {line}: exit code {end.code}; its output is in {log}/output.txt") from end
    if out:
        write_files({out / "command.txt": noted})


def training_line(run: Run, size: Size, out: Path, flags: str) -> str:
    """The command of a training."""
    return (f"train_{run.method}.py --model tiny/{run.base} --reward tiny/{run.reward} --seed {run.seed} --out {out} "
            f"{flags} {size.train}")


def train_unguarded(home: Path, run: Run, size: Size) -> Path:
    """The folder of the unguarded training. It is trained from checkpoint to checkpoint, with --epochs growing, and
    lora-EPOCH keeps the LoRA of each."""
    out = home / "lam0"
    script, *flags = training_line(run, size, out, "--lam 0").split()
    args = tyro.cli(importlib.import_module(f"train_{run.method}").Args, args=flags)
    for epoch in range(args.save_every, args.epochs + 1, args.save_every):
        kept, copy = out / f"lora-{epoch:05d}", out / "lora.tmp"
        if not kept.exists():
            command(home, f"{script} {' '.join(flags)} --epochs {epoch}")
            shutil.rmtree(copy, ignore_errors=True)  # from a copy that was killed
            shutil.copytree(out / "lora", copy)
            copy.rename(kept)
    return out


def train_variant(home: Path, run: Run, size: Size, name: str, variant: Variant, strength: float = 1.0) -> Path:
    """The LoRA of another training, without evaluations, in the folder home/name. Without a rival function the folder
    is named by the flags instead, so that claims 9 and 10 share what both need."""
    other = next(reward for reward in Args.rewards if reward != run.reward)
    flags = variant.flags.format(s=strength, reward=run.reward, other=other)
    out = home / (name if variant.rival else slug(flags.replace("--", "")))
    line = training_line(run, size, out, f"{flags} --eval-every 0")
    if variant.rival:
        state = {"guidance": GUIDANCE if "--guard-guidance" in flags else None}
        # the state is not in checkpoints, so that an interrupted training begins anew: it has a note
        note = f"# rival: {name}, {rival_code(variant)}"
        with true_guidance():
            command(home, line, out, note, rival=lambda *given: variant.rival(*given, state))
    else:
        command(home, line, out)
    return out / "lora"


def train_all(home: Path, run: Run, size: Size) -> dict[str, Path]:
    """The LoRAs of the three trainings."""
    unguarded, guarded = train_unguarded(home, run, size), home / f"lam{LAM}"
    command(home, training_line(run, size, guarded, f"--lam {LAM}"), guarded)
    guided = train_variant(home, run, size, "guided", GUIDED[run.base])
    return {"unguarded": unguarded / "lora", "guarded": guarded / "lora", "guided": guided}


def slug(name: str) -> str:
    """A name without spaces, for a folder."""
    return name.replace(", ", "-").replace(" ", "-")


def sample(home: Path, base: str, out: Path, flags: str, lora: Path | None = None, told: bool = False) -> Path:
    """Draw pictures into the folder `out`, with these flags of sample.py. `told`: a guidance scale is what the
    embedding of flux is told, not its true_guidance."""
    lora_flag, note = (f" --lora {lora}", f"# of {fingerprint(str(lora))}") if lora else ("", "")
    with contextlib.nullcontext() if told else true_guidance():
        command(home, f"sample.py --model tiny/{base} --out {out} {flags}{lora_flag}", out, note)
    return out


def draw(home: Path, base: str, size: Size, name: str, lora: Path | None = None, scale: str = "none", *,
         steps: int | None = None, training: bool = False, told: bool = False, flags: str = "") -> Path:
    """Draw a model's pictures (lora None: the base's) into home/drawn, of held-out or of training prompts, with the
    same noise for every model."""
    steps = steps or size.steps
    name = f"{slug(name)}@{scale}-{steps}" + "-training" * training + "-told" * told
    prompts = f" --prompts {size.prompts}" if training or size.only else ""  # the smoke test has one list of prompts
    numbers = f"--n {size.n_choose} --seed 5000" if training else f"--n {size.n} --seed 1000"
    flags = f"{numbers} --steps {steps}{prompts} {flags}" + f" --guidance {scale}" * (scale != "none")
    return sample(home, base, home / "drawn" / name, flags, lora, told)


def training_rewards(home: Path, run: Run, size: Size, name: str, lora: Path | None = None,
                     flags: str = "") -> tuple[Path, np.ndarray]:
    """Draw pictures of training prompts in 8 steps, as in rollouts: their folder, and each prompt's mean reward."""
    flags = f"--prompts {size.prompts} --n {size.n_choose} --steps 8 --seed 5000 --reward tiny/{run.reward} {flags}"
    folder = sample(home, run.base, home / "choose" / name, flags, lora)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return folder, np.reshape([row["reward"] for row in rows], (-1, size.n_choose)).mean(1)


def statistics(folder: Path) -> dict[str, torch.Tensor]:
    """Measures of each picture of a folder that no model had to learn, (n,) each: HSV saturation; colourfulness (Hasler
    and Suesstrunk 2003, 10.1117/12.477378), whose unit is a grey level of 255; the share of values within a grey level
    of 0 or 255; the mean squares of the luma's gradient and of its Laplacian, in units of 1e-4."""
    x = load_pictures([row["file"] for row in read_folder(str(folder))])  # (n, 3, h, w)
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    across, down = luma.diff(dim=3), luma.diff(dim=2)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    r, g, b = (255 * x).flatten(2).unbind(1)  # (n, h w) each
    opponent = torch.stack([r - g, (r + g) / 2 - b])
    spread, mean = opponent.std(2).norm(dim=0), opponent.mean(2).norm(dim=0)
    return {
        "saturation": ((x.amax(1) - x.amin(1)) / x.amax(1).clamp_min(1e-3)).flatten(1).mean(1),
        "colourfulness": spread + 0.3 * mean,
        "clipped": ((x < 1.5 / 255) | (x > 253.5 / 255)).float().flatten(1).mean(1),
        "gradient energy": 1e4 * (across.square().flatten(1).mean(1) + down.square().flatten(1).mean(1)),
        "Laplacian energy": 1e4 * torch.nn.functional.conv2d(luma, kernel).square().flatten(1).mean(1),
    }


def judge(home: Path, run: Run, folders: dict[str, Path], renders: str = "renders") -> dict:
    """eval_judge.py on named folders: "means" {name: {metric: mean}}, "verdicts" {"A vs B": [win, tie, loss, nan]}, and
    "ratio", the norm ratios of folders that have them."""
    out, names = home / "eval", {str(path): name for name, path in folders.items()}
    for report in out.glob("report.*"):
        report.unlink()  # of other folders
    flags = f"--reward tiny/pickscore tiny/hps --real {home.parent / renders} --out {out}"
    command(home, f"eval_judge.py {' '.join(names)} {flags}")
    report = json.loads((out / "report.json").read_text())
    labels = {"reward/pickscore": "other reward", "reward/hps": "other reward", "forensic/forensic": "P(real)",
              "fd/embed": "FD", f"reward/{run.reward}": "reward"}
    means = {name: {k: v.mean().item() for k, v in statistics(path).items()} for name, path in folders.items()}
    for metric, by_folder in report["metrics"].items():
        for path, numbers in by_folder.items():
            means[names[path]][labels.get(metric, metric)] = numbers["mean"]
    verdicts = {}
    for pair, counts in report["pairs"]["judge/quality"].items():
        first, second = pair.split(" vs ")
        verdicts[f"{names[first]} vs {names[second]}"] = [counts[k] for k in ("win", "tie", "loss", "nan")]
    norms = {name: read_json(path / "norms.json") for name, path in folders.items()}  # {} if it was drawn without
    ratios = {name: {k: n[k] for k in ("overall", "t", "mean")} for name, n in norms.items() if n}
    return {"means": means, "verdicts": verdicts, "ratio": ratios}


# ---------------------------------------------------------------- the parts of a run

def compare(home: Path, run: Run, size: Size, loras: dict[str, Path], scale: str, steps: int | None = None,
            training: bool = False, told: bool = False, flags: dict[str, str] | None = None) -> dict:
    """Draw the pictures of the base and of models, given by their LoRAs, at a guidance scale, and judge them. `flags`:
    more flags of sample.py for single models."""
    given = {"steps": steps, "training": training, "told": told}
    home_of_base = home_of(home.parent, run.base)
    with locked(home_of_base):  # all runs of the base need these
        folders = {"base": draw(home_of_base, run.base, size, "base", None, scale, **given)}
    for name, lora in loras.items():
        more = "--norms" * (scale in BOTH and steps is None) + " " + (flags or {}).get(name, "")
        folders[name] = draw(home, run.base, size, name, lora, scale, **given, flags=more)
    return judge(home, run, folders, "renders-training" if training else "renders")


def main_part(home: Path, run: Run, size: Size) -> dict:
    """Claims 1, 4, 5 and 6, without guidance and with each scale of it: norm ratios, reward, judge, detector."""
    loras, curves = train_all(home, run, size), {}
    _, rewards = training_rewards(home, run, size, "base")
    training = {"base": rewards.mean()}
    for name, lora in loras.items():
        lines = [json.loads(line) for line in (lora.parent / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [{"epoch": line["epoch"], "norm_ratio": line["eval_norm_ratio"]} for line in lines
                        if "eval_norm_ratio" in line]
        _, rewards = training_rewards(home, run, size, name, lora)
        training[name] = rewards.mean()
    judged = {scale: compare(home, run, size, loras, scale) for scale in size.scales}
    return {"curves": curves, "training reward": training, **judged}


def auto_part(home: Path, run: Run, size: Size) -> dict:
    """Claims 4 to 6 for --lam auto."""
    loras = train_all(home, run, size)
    loras["auto"] = train_variant(home, run, size, "auto", AUTO)
    return {scale: compare(home, run, size, loras, scale) for scale in BOTH}


def renorm_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 2: while sampling, the unguarded model's velocity is rescaled to the reference's norm, with guidance the
    guided velocity to the reference's guided norm."""
    loras = train_all(home, run, size)
    loras["match"] = loras["unguarded"]
    return {scale: compare(home, run, size, loras, scale, flags={"match": "--renorm match"}) for scale in BOTH}


def told_part(home: Path, run: Run, size: Size) -> dict:
    """What the guidance embedding of tiny/flux is told, instead of 3.5."""
    loras = train_all(home, run, size)
    return {scale: compare(home, run, size, loras, scale, told=True) for scale in ("2", "6")}


def adjoint(home: Path, base: str, reward: str, size: Size, out: Path, lora: Path | None = None) -> dict:
    """Claim 3: sample.py --adjoint on held-out prompts, in 8 steps as in rollouts."""
    sample(home, base, out, f"--adjoint --reward tiny/{reward} --n {size.n_adjoint} --steps 8 --seed 3000", lora)
    rows = json.loads((out / "adjoint.json").read_text())
    return {"t": rows["t"], "units": rows["units"], "reward": rows[f"tiny/{reward}"],
            "energy": rows["energy (control)"]}


def adjoint_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 3 on the unguarded model."""
    lora = train_unguarded(home, run, size) / "lora"
    return adjoint(home, run.base, run.reward, size, home / "adjoint", lora)


def few_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 7: the same models, sampled in few steps."""
    loras = train_all(home, run, size)
    return {str(steps): {scale: compare(home, run, size, loras, scale, steps) for scale in BOTH} for steps in size.few}


def early_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 8: the guarded models against checkpoints of the unguarded one, chosen on training prompts. For each guard:
    the first checkpoint whose reward is at most a standard error (paired over prompts) below the guard's; if there is
    none, that of the highest reward. And the checkpoint that the judge likes best, without and with guidance."""
    loras = train_all(home, run, size)
    unguarded = loras.pop("unguarded").parent
    models = loras | {path.name.removeprefix("lora-"): path for path in sorted(unguarded.glob("lora-*"))}
    ask = local_judge("tiny/judge", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found, rewards = {}, {}
    for name, lora in models.items():
        folder, rewards[name] = training_rewards(home, run, size, name, lora)
        found[name] = {"reward": rewards[name].mean(), "none": judged_good(ask, folder)}
        guided = draw(home, run.base, size, name, lora, BOTH[1], steps=8, training=True)
        found[name][BOTH[1]] = judged_good(ask, guided)
    checkpoints, chosen, reached = [name for name in found if name not in loras], {}, {}
    for guard in loras:
        less = {name: rewards[guard] - rewards[name] for name in checkpoints}  # (prompts,) each
        equal = [name for name, x in less.items() if x.mean() <= x.std(ddof=1) / len(x) ** 0.5]
        reached[guard] = bool(equal)
        chosen[f"early, equal to {guard}"] = (equal or [max(checkpoints, key=lambda name: found[name]["reward"])])[0]
    for scale in BOTH:
        chosen[f"early, best judged, {scale}"] = max(checkpoints, key=lambda name: found[name][scale])
    loras |= {how: models[name] for how, name in chosen.items()}
    judged = {scale: compare(home, run, size, loras, scale) for scale in BOTH}
    return {"found": found, "chosen": chosen, "reached": reached, **judged}


def judged_good(ask: Callable, folder: Path) -> float:
    """The judge's mean P(good) of a folder's pictures."""
    files, margins = [row["file"] for row in read_folder(str(folder))], []
    for i in range(0, len(files), 32):
        answers = ask(SINGLE["overall"], [[file] for file in files[i:i + 32]])
        margins += [read_answer(top, "yes", "no") for top in answers]
    return float(np.nanmean(1 / (1 + np.exp(-np.array(margins)))))


def guard_part(home: Path, run: Run, size: Size, name: str) -> dict:
    """Claim 9: another guard. On training prompts, because a guard is a matter of choice."""
    loras = train_all(home, run, size)
    loras["variant"] = train_variant(home, run, size, slug(f"guard {name}"), GUARDS[name])
    return {scale: compare(home, run, size, loras, scale, training=True) for scale in size.scales}


def rival_part(home: Path, run: Run, size: Size, name: str, strength: float) -> dict:
    """Claim 10: a rival of the guard at one strength."""
    rival, label, loras = RIVALS[name], slug(f"rival {name} {strength:g}"), train_all(home, run, size)
    loras["rival"], flags = loras["unguarded"], rival.sampling.format(s=strength)
    if rival.training:
        loras["rival"] = train_variant(home, run, size, label, rival.training, strength)
    _, rewards = training_rewards(home, run, size, label, loras["rival"], flags)
    judged = {scale: compare(home, run, size, loras, scale, flags={"rival": flags}) for scale in size.scales}
    return {"training reward": {"rival": rewards.mean()}, **judged}


class Part(NamedTuple):
    """What is measured on a run."""
    measure: Callable[[Path, Run, Size], dict]
    claims: tuple[int, ...]  # claims that use its numbers
    variant: Variant = Variant("")  # how it trains
    methods: tuple[str, ...] = Args.methods
    corners: tuple[str, ...] = ()  # where it is measured; (): everywhere


PARTS = {
    "main": Part(main_part, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)),
    "auto": Part(auto_part, (4,), AUTO),
    "renorm": Part(renorm_part, (2,)),
    "adjoint": Part(adjoint_part, (3,)),
    "few": Part(few_part, (7,)),
    "early": Part(early_part, (8,)),
    "told": Part(told_part, (6,), corners=("flux, pickscore", "flux, hps")),
}
for _name, _variant in GUARDS.items():
    PARTS[f"guard: {_name}"] = Part(functools.partial(guard_part, name=_name), (9,), _variant, corners=guards.SD3)
for _name, _rival in RIVALS.items():
    for _strength in dict.fromkeys(_rival.strengths + _rival.dpo):
        _methods = tuple(method for method in Args.methods if _strength in _rival.strengths_of(method))
        _measure = functools.partial(rival_part, name=_name, strength=_strength)
        _variant = _rival.training or Variant(_rival.sampling)
        PARTS[f"rival: {_name} {_strength:g}"] = Part(_measure, (10,), _variant, _methods, _rival.corners)


def is_asked(name: str, args: Args, size: Size) -> bool:
    """Do the flags ask for this part?"""
    asked = any(int(only) in PARTS[name].claims if only.isdigit() else name.startswith(only) for only in args.only)
    return (asked or not args.only) and (size.only is None or name in size.only)


def missing_parts(args: Args, size: Size) -> list[tuple[Run, str]]:
    """The parts that are asked for and not measured yet."""
    missing = []
    for seed, base, reward, method in product(args.seeds, args.bases, args.rewards, args.methods):
        run = Run(base, method, reward, seed)
        known = read_json(Path(args.results) / f"{run.name}.json")
        for name, part in PARTS.items():
            fits = method in part.methods and (not part.corners or run.corner in part.corners)
            if fits and is_asked(name, args, size) and name not in known:
                missing.append((run, name))
    return sorted(missing, key=lambda item: bool(PARTS[item[1]].corners))  # the grid first


# ---------------------------------------------------------------- the work

def add_part(file: Path, name: str, hashes: dict[str, str], measure: Callable[[], dict]):
    """Measure a part and add its numbers to a file, unless they are there."""
    if name in read_json(file):
        return
    start = time.time()
    numbers = {**measure(), "of": {**hashes, "commit": commit()}, "seconds": time.time() - start}
    known = {**read_json(file), name: rounded(numbers)}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()]  # one line a part
    write_files({file: "{\n" + ",\n".join(lines) + "\n}\n"})


def measure_base(base: str, args: Args, size: Size):
    """Measure the renders, and the base's sensitivities."""
    root, file, hashes = Path(args.runs), Path(args.results) / f"{base}.json", made_with(base)

    def renders() -> dict:
        values = statistics(root / "renders")
        return {name: {"mean": x.mean().item(), "std": x.std().item()} for name, x in values.items()}

    add_part(file, "renders", hashes, renders)
    if is_asked("adjoint", args, size):
        home = home_of(root, base)
        for reward in args.rewards:
            measure = functools.partial(adjoint, home, base, reward, size, home / f"adjoint-{reward}")
            add_part(file, f"adjoint {reward}", hashes, measure)


def gathered(results: Path) -> tuple[dict[Run, dict], dict[str, dict]]:
    """Read the numbers of all runs and of the bases from a folder."""
    runs = {}
    for base, reward, method in product(Args.bases, Args.rewards, Args.methods):
        files = results.glob(f"{base}-{method}-{reward}-s*.json")
        for seed, file in sorted((int(file.stem.rpartition("-s")[2]), file) for file in files):
            runs[Run(base, method, reward, seed)] = read_json(file)
    return runs, {base: numbers for base in Args.bases if (numbers := read_json(results / f"{base}.json"))}


def stale_parts(runs: dict[Run, dict], bases: dict[str, dict], size: Size) -> dict[str, list[str]]:
    """Measured parts whose recorded hashes differ from today's: {"weights", "code" or "flags": ["run: part", ...]}."""
    measured = []
    for run, numbers in runs.items():
        measured += [(run.name, part, numbers[part], depends(run, size, part)) for part in PARTS if part in numbers]
    for base, numbers in bases.items():
        measured += [(base, part, numbers[part], made_with(base)) for part in numbers]
    stale = {}
    for name, part, numbers, today in measured:
        recorded = numbers.get("of", {})
        for what in today:
            if recorded.get(what) != today[what]:
                stale.setdefault(what, []).append(f"{name}: {part}")
    return stale


@one_line_errors()
def main(args: Args):
    """Measure what is missing, then write the report."""
    check_flags(args, {})
    for only in args.only:
        if not any(is_asked(name, Args(only=(only,)), Size()) for name in PARTS):
            raise InputError(f"--only {only}: give claims, 1 to 10, or parts like few or 'rival: velocity KL'")
    if not all((args.bases, args.methods, args.rewards, args.seeds)):
        raise InputError("--bases, --methods, --rewards and --seeds each take at least one")
    if not 0 <= min(args.seeds) <= max(args.seeds) < 2**63:
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: from 0 to below 2^63")
    if len(args.runs.split()) != 1:  # commands are split at spaces
        raise InputError(f"--runs '{args.runs}': give a path without spaces")
    os.chdir(ROOT)
    size = SMOKE if args.smoke else Size()
    if args.smoke:
        root = "runs/smoke" if args.runs == Args.runs else args.runs
        args = Args(("sd3",), ("awm",), ("pickscore",), (0,), args.only, True, root, f"{root}/results")
    check_place(Path(args.results).parent, "--results", ("RESULTS.md", "TABLES.md", "results.json"))
    make_dir(args.runs, "--runs")
    make_dir(args.results, "--results")
    measure_all(args, size)
    report_all(args, size)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True):
    """Hold a folder's lock. Gives False if another process holds it and `wait` is off."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:  # closing the file frees it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
        except BlockingIOError:
            yield False
        else:
            yield True


def measure_all(args: Args, size: Size):
    """Measure all missing parts: first of the bases, whose pictures the runs need, then of the runs."""
    root = Path(args.runs)
    renderer = source_hash(Path("tiny/world.py").read_text())
    with locked(root):
        for name, prompts in (("renders", "eval_prompts"), ("renders-training", "prompts")):
            flags = f"--n {size.renders} --seed 1 --prompts tiny/{prompts}.txt --out {root / name}"
            command(root, f"tiny/world.py {flags}", root / name, f"# {renderer}")
        for base in dict.fromkeys(args.bases):
            measure_base(base, args, size)
    while missing := missing_parts(args, size):
        measured = 0
        for run, name in tqdm(missing, desc="reproduce", unit="part"):
            home = home_of(root, run.base, run)
            with locked(home, wait=False) as free:
                if free:
                    measure = functools.partial(PARTS[name].measure, home, run, size)
                    add_part(Path(args.results) / f"{run.name}.json", name, depends(run, size, name), measure)
                    measured += 1
        if not measured:
            print(f"note: {len(missing)} parts are left to other processes, which work on their runs")
            return


def report_all(args: Args, size: Size):
    """Write the report and the figures of all numbers in RESULTS, and say which ones are stale."""
    root, results = Path(args.runs), Path(args.results)
    runs, bases = gathered(results)
    assets = Path("assets") if args.results == Args.results else results.parent
    write_report(runs, bases, size, results.parent, assets, comments=args.results == Args.results)
    draw_all(runs, bases, assets)
    front = next((run for run, numbers in runs.items() if run.method == "awm" and "main" in numbers), None)
    if front:
        drawn, name = home_of(root, front.base, front) / "drawn", f"@{GUIDANCE}-{size.steps}"
        folders = {"base": home_of(root, front.base) / "drawn" / f"base{name}"}
        folders |= {who: drawn / f"{who}{name}" for who in ("unguarded", "guarded", "guided")}
        if all(map(Path.exists, folders.values())):
            draw_front(runs[front], folders, assets / "front.png")
    for what, parts in stale_parts(runs, bases, size).items():
        print(f"note: {len(parts)} parts were measured with other {what} than today's ({parts[0]}, ...); to measure "
              f"them anew, delete them in {results}")
    print(f"{len(runs)} runs: RESULTS.md, TABLES.md and results.json in {results.parent}/, figures in {assets}/")


if __name__ == "__main__":
    main(parse(Args, __doc__))
