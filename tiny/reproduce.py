"""Measure the paper's claims on the miniature world.

    python tiny/reproduce.py                            # what is missing in tiny/results, then the report of all of it
    python tiny/reproduce.py --results runs/mine        # measure everything anew, beside the committed numbers
    python tiny/reproduce.py --bases sd3 --methods awm --rewards pickscore --seeds 0 --only 4
    python tiny/reproduce.py --smoke                    # a toy version in runs/smoke, to see that all of it works

A run is a base, a method, a reward and a seed. Each run is trained with --lam 0 ("unguarded") and with --lam 0.05
("guarded"), and with the scripts' defaults otherwise. The project's own scripts train, sample and judge. They are
called in this process; RUNS/<run>-<hashes>/commands.txt lists the commands.

What is measured on a run comes in parts (`PARTS`). Each part is saved in RESULTS/<run>.json as soon as it is measured,
with its commit and with hashes of the weights, code and flags that it depends on, and is not measured again. The last
lines say how many parts have other hashes than today's; to measure a part anew, delete it. An interrupted reproduction
continues with the same command. RESULTS.md and results.json are written beside RESULTS, and the figures to assets/.

On several cores, start one process for each seed, each with its own --runs:

    for s in 0 1 2; do OMP_NUM_THREADS=1 python tiny/reproduce.py --seeds $s --runs runs/reproduce-$s & done; wait

Pictures that are judged show held-out prompts. Whatever is chosen (claim 8: a checkpoint; claim 9: a guard; claim 10: a
rival's strength) is chosen on training prompts.
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
import numpy as np
import torch
import tyro
from figures import draw_all, draw_front
from guards import GUARDS, LAM, RIVALS, Variant, of_rows, squared_error, velocity_with
from paired import read_json
from report import rounded, write_report, write_text
from tqdm import tqdm

from eval_judge import SINGLE
from flow.cli import InputError, check_flags, check_place, fingerprint, make_dir, one_line_errors, parse
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
    only: int | None = None
    """measure what this claim needs, 1 to 10 (None: all claims)"""
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
    few: tuple[int, ...] = (4, 2)  # steps of few-step sampling
    n: int = 8  # pictures of each held-out prompt
    n_adjoint: int = 12  # the same, for claim 3
    n_choose: int = 2  # pictures of each training prompt, to choose a checkpoint or a strength
    n_guard: int = 3  # the same, to compare guards
    renders: int = 1024
    prompts: str = "tiny/prompts.txt"  # training prompts
    only: tuple[str, ...] | None = None  # parts to measure (None: all)


SMOKE = Size("--epochs 2 --group 2 --groups 2 --steps 4 --eval-n 2 --save-every 2", 4, (2,), 1, 1, 1, 1, 32,
             "tiny/smoke_prompts.txt", only=("main", "auto", "renorm", "adjoint", "few", "early", "guard: per token",
                                             "rival: EMA-KL 0.3", "rival: projected 1"))


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
    functions = variant.rival, of_rows, squared_error, velocity_with
    return source_hash(*map(inspect.getsource, functions))


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
    variant = PARTS[part].variant
    flags = zlib.crc32(f"{part} {LAM} {size._replace(only=None)} {variant.flags} {rival_code(variant)}".encode())
    return {**made_with(run.base, f"train_{run.method}.py"), "flags": f"{flags:08x}"}


def home_of(root: Path, base: str, run: Run | None = None) -> Path:
    """The folder of a base or of one of its runs. What other weights or code made is in other folders."""
    hashes = made_with(base, f"train_{run.method}.py") if run else made_with(base)
    return root / f"{run.name if run else base}-{hashes['weights']}-{hashes['code']}"


# ---------------------------------------------------------------- commands

def command(log: Path, line: str, out: Path | None = None, note: str = "", **more):
    """Run `python <line>` in this process, as main(args, **more) of its script, and add it to log/commands.txt.

    out: the folder that it writes. The command is skipped if out/command.txt has it, with the same note. What another
    command left there is deleted, and what an interrupted command with a note left, because that cannot resume."""
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
        write_text(out / "command.txt", noted)


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


def train_both(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """The folders of the unguarded and of the guarded training."""
    unguarded, guarded = train_unguarded(home, run, size), home / f"lam{LAM}"
    command(home, training_line(run, size, guarded, f"--lam {LAM}"), guarded)
    return unguarded, guarded


def train_variant(home: Path, run: Run, size: Size, name: str, variant: Variant, strength: float = 1.0) -> Path:
    """The folder home/name of another training, without evaluations."""
    out, script = home / name, importlib.import_module(f"train_{run.method}")
    other = next(reward for reward in Args.rewards if reward != run.reward)
    flags = variant.flags.format(s=strength, lr=script.Args.lr * strength, reward=run.reward, other=other)
    line = training_line(run, size, out, f"{flags} --eval-every 0")
    if variant.rival:
        state = {}  # it is not in checkpoints, so that an interrupted training begins anew: it has a note
        note = f"# rival: guards.{variant.rival.__name__}, {rival_code(variant)}"
        command(home, line, out, note, rival=lambda *given: variant.rival(*given, state))
    else:
        command(home, line, out)
    return out


def slug(name: str) -> str:
    """A name without spaces, for a folder."""
    return name.replace(", ", "-").replace(" ", "-")


def sample(home: Path, base: str, out: Path, flags: str) -> Path:
    """Draw pictures into the folder `out`, with these flags of sample.py."""
    command(home, f"sample.py --model tiny/{base} --out {out} {flags}", out)
    return out


def held_out_flags(size: Size, steps: int) -> str:
    """Flags of sample.py for held-out prompts, with the same noise for every model."""
    prompts = f" --prompts {size.prompts}" if size.only else ""  # the smoke test has one list of prompts
    return f"--n {size.n}{prompts} --steps {steps} --seed 1000"


def sample_held_out(home: Path, run: Run, size: Size, name: str, lora: Path, steps: int | None = None,
                    flags: str = "--norms") -> Path:
    """Draw a LoRA's pictures of held-out prompts into home/name."""
    flags = f"--lora {lora} {held_out_flags(size, steps or size.steps)} {flags}"
    return sample(home, run.base, home / name, flags)


def sample_both(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """The unguarded and the guarded model's pictures of held-out prompts."""
    unguarded, guarded = train_both(home, run, size)
    pictures = sample_held_out(home, run, size, run.method, unguarded / "lora")
    return pictures, sample_held_out(home, run, size, f"{run.method}+normguard", guarded / "lora")


def training_rewards(home: Path, run: Run, size: Size, name: str, flags: str) -> tuple[Path, np.ndarray]:
    """Draw pictures of training prompts in 8 steps, as in rollouts: their folder, and each prompt's mean reward."""
    flags = f"--prompts {size.prompts} --n {size.n_choose} --steps 8 --seed 5000 --reward tiny/{run.reward} {flags}"
    folder = sample(home, run.base, home / "choose" / name, flags)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return folder, np.reshape([row["reward"] for row in rows], (-1, size.n_choose)).mean(1)


def colours(folder: Path) -> dict[str, float]:
    """Means over a folder's pictures: HSV saturation, and sharpness, the absolute Laplacian of the luma."""
    x = load_pictures([row["file"] for row in read_folder(str(folder))])  # (n, 3, h, w)
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    saturation = (x.amax(1) - x.amin(1)) / x.amax(1).clamp_min(1e-3)
    sharpness = torch.nn.functional.conv2d(luma, kernel).abs()
    return {"saturation": saturation.mean().item(), "sharpness": sharpness.mean().item()}


def judge(home: Path, run: Run, folders: dict[str, Path], renders: str = "renders") -> dict:
    """eval_judge.py on named folders: "means" {name: {metric: mean}}, "verdicts" {"A vs B": [win, tie, loss, nan]}."""
    out, names = home / "eval", {str(path): name for name, path in folders.items()}
    for report in out.glob("report.*"):
        report.unlink()  # of other folders
    flags = f"--reward tiny/pickscore tiny/hps --real {home.parent / renders} --out {out}"
    command(home, f"eval_judge.py {' '.join(names)} {flags}")
    report = json.loads((out / "report.json").read_text())
    labels = {"reward/pickscore": "other reward", "reward/hps": "other reward", "forensic/forensic": "P(real)",
              "fd/embed": "FD", f"reward/{run.reward}": "reward"}
    means = {name: colours(path) for name, path in folders.items()}
    for metric, by_folder in report["metrics"].items():
        for path, numbers in by_folder.items():
            means[names[path]][labels.get(metric, metric)] = numbers["mean"]
    verdicts = {}
    for pair, counts in report["pairs"]["judge/quality"].items():
        first, second = pair.split(" vs ")
        verdicts[f"{names[first]} vs {names[second]}"] = [counts[k] for k in ("win", "tie", "loss", "nan")]
    return {"means": means, "verdicts": verdicts}


def ratio_of(folder: Path) -> dict:
    """The norm ratio along the sampling trajectory."""
    norms = json.loads((folder / "norms.json").read_text())
    return {"overall": norms["overall"], "t": norms["t"], "mean": norms["mean"]}


# ---------------------------------------------------------------- the parts of a run

def main_part(home: Path, run: Run, size: Size) -> dict:
    """Claims 1, 4, 5 and 6: norm ratios over training and over t; reward, judge and detector on the pictures."""
    keys = ("eval_reward", "eval_reward_se", "eval_norm_ratio", "eval_norm_ratio_steps", "eval_saturation")
    _, rewards = training_rewards(home, run, size, "base", "")
    curves, training = {}, {"base": rewards.mean()}
    for name, out in zip(("unguarded", "guarded"), train_both(home, run, size)):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evals = [line for line in lines if "eval_reward" in line]
        curves[name] = [{k.removeprefix("eval_"): line[k] for k in ("epoch", *keys)} for line in evals]
        _, rewards = training_rewards(home, run, size, name, f"--lora {out}/lora")
        training[name] = rewards.mean()
    unguarded, guarded = sample_both(home, run, size)
    ratios = {"unguarded": ratio_of(unguarded), "guarded": ratio_of(guarded)}
    folders = {"base": home_of(home.parent, run.base) / "base", "unguarded": unguarded, "guarded": guarded}
    judged = judge(home, run, folders)
    return {"curves": curves, "ratio": ratios, "training reward": training, **judged}


def auto_part(home: Path, run: Run, size: Size) -> dict:
    """Claims 4, 5 and 6 for --lam auto."""
    unguarded, guarded = sample_both(home, run, size)
    trained = train_variant(home, run, size, "guards/auto", GUARDS["auto"])
    auto = sample_held_out(home, run, size, f"{run.method}+auto", trained / "lora")
    judged = judge(home, run, {"unguarded": unguarded, "guarded": guarded, "auto": auto})
    return {"ratio": {"auto": ratio_of(auto)}, **judged}


def renorm_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 2: while sampling, the unguarded model's velocity is rescaled to the reference's norm."""
    unguarded, guarded = sample_both(home, run, size)
    lora = train_unguarded(home, run, size) / "lora"
    rescaled = {}
    for how in ("match", "cap"):
        rescaled[how] = sample_held_out(home, run, size, f"renorm-{how}", lora, flags=f"--renorm {how}")
    return judge(home, run, {"unguarded": unguarded, **rescaled, "guarded": guarded})


def adjoint(home: Path, base: str, reward: str, size: Size, out: Path, flags: str = "") -> dict:
    """Claim 3: sample.py --adjoint on held-out prompts, in 8 steps as in rollouts."""
    sample(home, base, out, f"--adjoint --reward tiny/{reward} --n {size.n_adjoint} --steps 8 --seed 3000 {flags}")
    rows = json.loads((out / "adjoint.json").read_text())
    return {"t": rows["t"], "units": rows["units"], "reward": rows[f"tiny/{reward}"],
            "energy": rows["energy (control)"]}


def adjoint_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 3 on the unguarded model."""
    lora = train_unguarded(home, run, size) / "lora"
    return adjoint(home, run.base, run.reward, size, home / "adjoint", f"--lora {lora}")


def few_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 7: the same models, sampled in few steps."""
    numbers = {}
    unguarded, guarded = train_both(home, run, size)
    auto = train_variant(home, run, size, "guards/auto", GUARDS["auto"])
    trained = {"unguarded": unguarded, "guarded": guarded, "auto": auto}
    for steps in size.few:
        folders = {"base": home_of(home.parent, run.base) / f"base-{steps}"}
        for name, out in trained.items():
            folders[name] = sample_held_out(home, run, size, f"{name}-{steps}", out / "lora", steps, flags="")
        numbers[str(steps)] = judge(home, run, folders)
    return numbers


def early_part(home: Path, run: Run, size: Size) -> dict:
    """Claim 8: the guarded model against two checkpoints of the unguarded one. One is the first of equal reward (not
    lower by more than a standard error, paired over prompts), or that of the highest reward where there is none. The
    other is the one that the judge likes best."""
    unguarded, guarded = train_both(home, run, size)
    loras = {"guarded": guarded / "lora"}
    loras |= {path.name.removeprefix("lora-"): path for path in sorted(unguarded.glob("lora-*"))}
    ask = local_judge("tiny/judge", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found, rewards = {}, {}
    for name, lora in loras.items():
        folder, rewards[name] = training_rewards(home, run, size, name, f"--lora {lora}")
        less = rewards["guarded"] - rewards[name]  # (prompts,)
        found[name] = {
            "reward": float(rewards[name].mean()),
            "overall": judged_good(ask, folder),
            "less": float(less.mean()),
            "se": float(less.std(ddof=1) / len(less) ** 0.5),
        }
    checkpoints = [name for name in found if name != "guarded"]
    equal = [name for name in checkpoints if found[name]["less"] <= found[name]["se"]]
    highest = max(checkpoints, key=lambda name: found[name]["reward"])
    best_judged = max(checkpoints, key=lambda name: found[name]["overall"])
    chosen = {"early, equal reward": equal[0] if equal else highest, "early, best judged": best_judged}
    folders = {"guarded": sample_both(home, run, size)[1]}
    for how, name in chosen.items():
        folders[how] = sample_held_out(home, run, size, slug(how), loras[name], flags="")
    judged = judge(home, run, folders)
    return {"found": found, "chosen": chosen, "reached": bool(equal), **judged}


def judged_good(ask: Callable, folder: Path) -> float:
    """The judge's mean P(good) of a folder's pictures."""
    files, margins = [row["file"] for row in read_folder(str(folder))], []
    for i in range(0, len(files), 32):
        answers = ask(SINGLE["overall"], [[file] for file in files[i:i + 32]])
        margins += [read_answer(top, "yes", "no") for top in answers]
    return float(np.nanmean(1 / (1 + np.exp(-np.array(margins)))))


def guard_part(home: Path, run: Run, size: Size, name: str) -> dict:
    """Claim 9: another guard. On training prompts, because a guard is a matter of choice."""
    trained = dict(zip(("unguarded", "guarded"), train_both(home, run, size)))
    trained["variant"] = train_variant(home, run, size, f"guards/{slug(name)}", GUARDS[name])
    flags = f"--prompts {size.prompts} --n {size.n_guard} --steps {size.steps} --seed 5000 --norms"
    pictures = {}
    for who, out in trained.items():
        pictures[who] = sample(home, run.base, home / "chosen" / out.name, f"--lora {out / 'lora'} {flags}")
    ratios = {who: ratio_of(path) for who, path in pictures.items()}
    return {"ratio": ratios, **judge(home, run, pictures, "renders-training")}


def rival_part(home: Path, run: Run, size: Size, name: str, strength: float) -> dict:
    """Claim 10: a rival of the guard at one strength."""
    rival, label = RIVALS[name], slug(f"{name} {strength:g}")
    if rival.training:
        trained = train_variant(home, run, size, f"rivals/{label}", rival.training, strength)
    else:
        trained = train_unguarded(home, run, size)
    flags = rival.sampling.format(s=strength)
    pictures = sample_held_out(home, run, size, f"{run.method}+{label}", trained / "lora", flags=f"--norms {flags}")
    _, rewards = training_rewards(home, run, size, label, f"--lora {trained}/lora {flags}")
    judged = judge(home, run, {"guarded": sample_both(home, run, size)[1], "rival": pictures})
    return {"ratio": {"rival": ratio_of(pictures)}, "training reward": {"rival": rewards.mean()}, **judged}


class Part(NamedTuple):
    """What is measured on a run."""
    measure: Callable[[Path, Run, Size], dict]
    claims: tuple[int, ...]  # that use its numbers
    variant: Variant = Variant("")  # how it trains or samples
    methods: tuple[str, ...] = Args.methods
    corner: bool = False  # is it measured only with the first base and reward and with the last ones?


PARTS = {
    "main": Part(main_part, (1, 2, 3, 4, 5, 6, 7, 8, 10)),
    "auto": Part(auto_part, (4, 7, 10)),
    "renorm": Part(renorm_part, (2,)),
    "adjoint": Part(adjoint_part, (3,)),
    "few": Part(few_part, (7,)),
    "early": Part(early_part, (8,)),
}
for _name, _variant in GUARDS.items():
    PARTS[f"guard: {_name}"] = Part(functools.partial(guard_part, name=_name), (9,), _variant, corner=True)
for _name, _rival in RIVALS.items():
    for _strength in dict.fromkeys(_rival.strengths + _rival.dpo):
        _methods = tuple(method for method in Args.methods if _strength in _rival.strengths_of(method))
        _measure = functools.partial(rival_part, name=_name, strength=_strength)
        _variant = _rival.training or Variant(_rival.sampling)
        PARTS[f"rival: {_name} {_strength:g}"] = Part(_measure, (10,), _variant, _methods, corner=True)


def is_asked(name: str, args: Args, size: Size) -> bool:
    """Do the flags ask for this part?"""
    return (args.only is None or args.only in PARTS[name].claims) and (size.only is None or name in size.only)


def missing_parts(args: Args, size: Size) -> list[tuple[Run, str]]:
    """The parts that are asked for and not measured yet."""
    missing = []
    for seed, base, method, reward in product(args.seeds, args.bases, args.methods, args.rewards):
        run = Run(base, method, reward, seed)
        known = read_json(Path(args.results) / f"{run.name}.json")
        at_corner = (base, reward) in ((args.bases[0], args.rewards[0]), (args.bases[-1], args.rewards[-1]))
        for name, part in PARTS.items():
            fits = method in part.methods and (at_corner or not part.corner)
            if fits and is_asked(name, args, size) and name not in known:
                missing.append((run, name))
    return sorted(missing, key=lambda item: PARTS[item[1]].corner)  # the grid first


# ---------------------------------------------------------------- the work

def add_part(file: Path, name: str, hashes: dict[str, str], measure: Callable[[], dict]):
    """Measure a part and add its numbers to a file, unless they are there."""
    if name in read_json(file):
        return
    start = time.time()
    numbers = {**measure(), "of": {**hashes, "commit": commit()}, "seconds": time.time() - start}
    known = {**read_json(file), name: rounded(numbers)}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()]  # one line a part
    write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")


def measure_base(base: str, args: Args, size: Size):
    """Draw the base's pictures, which all its runs use, and measure them and its sensitivities."""
    root, file, hashes = Path(args.runs), Path(args.results) / f"{base}.json", made_with(base)
    home = home_of(root, base)
    sample(home, base, home / "base", held_out_flags(size, size.steps))
    if is_asked("few", args, size):
        for steps in size.few:
            sample(home, base, home / f"base-{steps}", held_out_flags(size, steps))
    add_part(file, "colours", hashes, lambda: {"base": colours(home / "base"), "renders": colours(root / "renders")})
    if is_asked("adjoint", args, size):
        for reward in args.rewards:
            measure = functools.partial(adjoint, home, base, reward, size, home / f"adjoint-{reward}")
            add_part(file, f"adjoint {reward}", hashes, measure)


def gathered(results: Path) -> tuple[dict[Run, dict], dict[str, dict]]:
    """Read the numbers of all runs and of the bases from a folder."""
    runs = {}
    for base, method, reward in product(Args.bases, Args.methods, Args.rewards):
        for file in sorted(results.glob(f"{base}-{method}-{reward}-s*.json")):
            runs[Run(base, method, reward, int(file.stem.rpartition("-s")[2]))] = read_json(file)
    bases = {base: read_json(results / f"{base}.json") for base in Args.bases}
    return runs, {base: numbers for base, numbers in bases.items() if numbers}


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
    if args.only is not None and not 1 <= args.only <= 10:
        raise InputError(f"--only {args.only}: a claim is a number from 1 to 10")
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
        args = Args(("sd3",), ("awm",), ("hps",), (0,), args.only, True, root, f"{root}/results")
    check_place(Path(args.results).parent, "--results", ("RESULTS.md", "results.json"))
    root = make_dir(args.runs, "--runs")
    make_dir(args.results, "--results")
    with open(root / "lock", "a") as lock:  # closing the file frees it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--runs {root}: another reproduce.py works there; wait for it, or give another folder")
        measure_all(args, size)
        report_all(args, size)


def measure_all(args: Args, size: Size):
    """Measure all missing parts: first of the bases, whose pictures the runs need, then of the runs."""
    root, missing = Path(args.runs), missing_parts(args, size)
    if not missing:
        return
    renderer = source_hash(Path("tiny/world.py").read_text())
    for name, prompts in (("renders", "eval_prompts"), ("renders-training", "prompts")):
        flags = f"--n {size.renders} --seed 1 --prompts tiny/{prompts}.txt --out {root / name}"
        command(root, f"tiny/world.py {flags}", root / name, f"# {renderer}")
    for base in dict.fromkeys(args.bases):
        measure_base(base, args, size)
    for run, name in tqdm(missing, desc="reproduce", unit="part"):
        measure = functools.partial(PARTS[name].measure, home_of(root, run.base, run), run, size)
        add_part(Path(args.results) / f"{run.name}.json", name, depends(run, size, name), measure)


def report_all(args: Args, size: Size):
    """Write the report and the figures of all numbers in RESULTS, and say which ones are stale."""
    root, results = Path(args.runs), Path(args.results)
    runs, bases = gathered(results)
    assets = Path("assets") if args.results == Args.results else results.parent
    write_report(runs, bases, size, results.parent, assets)
    draw_all(runs, bases, assets)
    front = next((run for run in runs if run.method == "awm"), None)
    if front:
        home = home_of(root, front.base, front)
        folders = {"base": home_of(root, front.base) / "base"}
        folders |= {"unguarded": home / "awm", "guarded": home / "awm+normguard"}
        if all(map(Path.exists, folders.values())):
            draw_front(runs[front], folders, assets / "front.png")
    for what, parts in stale_parts(runs, bases, size).items():
        print(f"note: {len(parts)} parts were measured with other {what} than today's ({parts[0]}, ...); to measure "
              f"them anew, delete them in {results}")
    print(f"{len(runs)} runs: {results.parent}/RESULTS.md, {results.parent}/results.json and figures in {assets}/")


if __name__ == "__main__":
    main(parse(Args, __doc__))
