"""The paper's claims, measured on the miniature world by one command.

    python tiny/reproduce.py                            # what is not in tiny/results yet; then the report of all of it
    python tiny/reproduce.py --results runs/mine        # all of it anew, beside the committed numbers
    python tiny/reproduce.py --bases sd3 --methods awm --rewards pickscore --seeds 0 --only 4
    python tiny/reproduce.py --smoke                    # a toy of it, in runs/smoke: does everything still work?

A run is a base, a method, a reward and a seed, trained with --lam 0 ("unguarded") and --lam 0.05 ("guarded"), the
scripts' defaults otherwise. Trainings, pictures and their scores come from the project's own scripts, carried out in
this process; their commands stand in RUNS/<run>/commands.txt. A run's numbers go to RESULTS/<run>.json part by part as
they come, each with its commit and a hash of what it depends on (weights, code, flags), and are not computed again. A
number whose hash is another today is stale: the end says how many are; to measure one anew, delete it. Killed at any
moment, the same command goes on. Writes RESULTS.md and results.json beside RESULTS, the figures to assets/.

Pictures that are judged show held-out prompts. What is chosen (claim 8: a checkpoint; claim 9: a guard; claim 10: the
rivals' strengths) is chosen on training prompts.
"""
import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import tyro
from figures import draw_all, draw_front
from guards import GUARDS, LAM, RIVALS, Other, instead_of_hinge, squared_error
from paired import read_json
from report import rounded, write_report, write_text
from tqdm import tqdm

from eval_judge import SINGLE
from flow import run as flow_run
from flow.cli import InputError, check_flags, check_place, fingerprint, make_dir, one_line_errors, parse
from flow.judge import local_judge, read_answer
from flow.lora import save_lora
from flow.pictures import load_pictures, read_folder


@dataclass
class Args:
    bases: tuple[str, ...] = ("sd3", "flux")
    """base models, of tiny/"""
    methods: tuple[str, ...] = ("nft", "awm", "dpo")
    """training scripts"""
    rewards: tuple[str, ...] = ("pickscore", "hps")
    """rewards, of tiny/"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the training"""
    only: int | None = None
    """one claim, 1 to 10 (None: all)"""
    jobs: int | None = None
    """runs at a time (None: one per CPU core, one on a GPU)"""
    smoke: bool = False
    """two epochs, few pictures, one cell"""
    runs: str = "runs/reproduce"
    """folder for LoRAs and pictures (with --smoke: for all, and runs/smoke by default)"""
    results: str = "tiny/results"
    """folder for the numbers"""


class Run(NamedTuple):
    base: str
    method: str
    reward: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's and its file's name."""
        return "-".join(self[:3]) + f"-s{self.seed}"

    @property
    def cell(self) -> str:
        """The run but for its seed."""
        return " ".join(self[:3])


class Size(NamedTuple):
    """How much of everything; the smoke test has less."""
    train: str = ""  # further flags of the training scripts
    steps: int = 28
    few: tuple[int, ...] = (4, 2)
    n: int = 8  # pictures of each of the 16 held-out prompts
    n_adjoint: int = 12
    n_choose: int = 2  # of each of the 48 training prompts, for a checkpoint
    n_guard: int = 3  # and for a guard
    renders: int = 1024
    prompts: str = "tiny/prompts.txt"  # of choices
    only: tuple[str, ...] | None = None  # of the parts

    @property
    def shown(self) -> str:
        """Flags for pictures of held-out prompts; the smoke test has one short list for all."""
        return f"--n {self.n}" + (f" --prompts {self.prompts}" if self.only else "")


SMOKE = Size("--epochs 2 --group 2 --groups 2 --steps 4 --eval-n 2 --save-every 2", 4, (2,), 1, 1, 1, 1, 32,
             "tiny/smoke_prompts.txt", only=("main", "auto", "renorm", "adjoint", "few", "early", "guard: per token",
                                             "rival: EMA-KL 0.3", "rival: projected 1"))


# ---------------------------------------------------------------- what numbers depend on

@functools.cache
def weights(base: str) -> str:
    """A hash of the models that a base's runs see, of the prompts and of the world."""
    parts = (base, "pickscore", "hps", "judge", "forensic", "embed", "prompts.txt", "eval_prompts.txt", "world.py")
    return hashlib.sha256("".join(fingerprint(f"tiny/{part}") for part in parts).encode()).hexdigest()[:8]


def written(tree) -> str:
    """A syntax tree as text, without fields that hold nothing: which of those there are depends on Python's version."""
    if isinstance(tree, list):
        return f"[{', '.join(map(written, tree))}]"
    if not isinstance(tree, ast.AST):
        return repr(tree)
    fields = [f"{name}={written(value)}" for name, value in ast.iter_fields(tree) if value not in (None, [])]
    return f"{type(tree).__name__}({', '.join(fields)})"


COSTS = {"cost", "bench.py", "blank.py", "budget.py", "meter.py"}  # what of flow/ only estimates costs


@functools.cache
def code(*scripts: str) -> str:
    """A hash of the code that numbers come from: the guard, the training's script if there is one, pictures, judging,
    and flow/ without tests and costs; comments, docstrings and helps left out."""
    flow = [file for file in Path("flow").rglob("*.py") if not (file.name.startswith("test_") or COSTS & {*file.parts})]
    digest = hashlib.sha256()
    for file in ("normguard.py", *scripts, "sample.py", "eval_judge.py", *sorted(flow)):
        tree = ast.parse(Path(file).read_text())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not isinstance(getattr(line, "value", None), ast.Constant)
                             or not isinstance(line, ast.Expr)]
        digest.update(written(tree).encode())
    return digest.hexdigest()[:8]


@functools.cache
def commit() -> str | None:
    """The commit that lies here, None outside git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def guard_code(other: Other) -> str:
    """A hash of another guard's code, "" of NormGuard's own."""
    if not other.guard:
        return ""
    helpers = (instead_of_hinge, squared_error) if other.made else ()
    return f"{zlib.crc32(''.join(map(inspect.getsource, (other.guard, *helpers))).encode()):08x}"


def made_with(base: str, method: str | None = None) -> dict[str, str]:
    """The weights and the code of a base's runs of a method; or of what all of its runs share."""
    return {"weights": weights(base), "code": code(*[f"train_{method}.py"] if method else ())}


def depends(run: Run, size: Size, part: str) -> dict[str, str]:
    """What a part's numbers depend on: another of these is another number."""
    other = TRAININGS.get(part, Other(""))
    flags = zlib.crc32(f"{part} {LAM} {size._replace(only=None)} {other.flags} {guard_code(other)}".encode())
    return {**made_with(run.base, run.method), "flags": f"{flags:08x}"}


def fresh_folder(home: Path, of: dict[str, str]) -> Path:
    """A folder for what is made with these weights and this code; what was made with others is deleted."""
    file, old = home / "of.json", home.with_name(f"{home.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # a killed deletion's
    if home.exists() and read_json(file) != of:
        if not file.exists() and not (home / "commands.txt").exists() and any(home.iterdir()):
            raise InputError(f"--runs {home.parent}: {home} is not of reproduce.py; give another folder")
        home.rename(old)
        shutil.rmtree(old)
    if not file.exists():
        write_text(file, json.dumps(of))
    return home


# ---------------------------------------------------------------- what is done to a run

def command(log: Path, line: str, out: Path | None = None, note: str = ""):
    """Carry out `python <line>` in this process and note it in commands.txt, unless out/command.txt says that this has
    been done. A folder of another command, or of one with a note that was not done to its end, is begun anew."""
    noted = " ".join(f"python {line} {note}".split()) + "\n"
    done = out and (out / "command.txt").exists() and (out / "command.txt").read_text()
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
            module.main(tyro.cli(module.Args, args=flags))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"python {line}: exit code {end.code}; its output is in {log}/output.txt") from end
    if out:
        write_text(out / "command.txt", noted)


def train(home: Path, run: Run, size: Size, name: str, other: Other, strength: float = 1.0) -> Path:
    """The folder home/name of a finished training, in which lora-EPOCH holds each checkpoint's LoRA."""
    module, out = importlib.import_module(f"train_{run.method}"), home / name
    save_checkpoint = flow_run.save_checkpoint

    def keep(training, epoch, **state):
        """Save as ever, and keep a copy."""
        save_lora(training.pipe, training.out / f"lora-{epoch:05d}")
        save_checkpoint(training, epoch, **state)

    flags = other.flags.format(s=strength, lr=module.Args.lr * strength)
    line = f"train_{run.method}.py --model tiny/{run.base} --reward tiny/{run.reward} --seed {run.seed} --out {out}"
    # a checkpoint holds neither another guard's state nor its code
    note = f"# with norm_hinge = guards.{other.guard.__qualname__}, {guard_code(other)}" if other.guard else ""
    flow_run.save_checkpoint = keep
    try:
        with instead_of_hinge(module, other):
            command(home, f"{line} {flags} {size.train}", out, note)
    finally:
        flow_run.save_checkpoint = save_checkpoint
    return out


def sample(home: Path, base: str, out: Path, flags: str) -> Path:
    """Pictures in `out`."""
    command(home, f"sample.py --model tiny/{base} --out {out} {flags}", out)
    return out


def held_out(home: Path, run: Run, size: Size, name: str, lora: Path, steps: int | None = None,
             flags: str = "--norms") -> Path:
    """Pictures home/name of held-out prompts, their noise the same for every run."""
    steps = steps or size.steps
    return sample(home, run.base, home / name, f"--lora {lora} {size.shown} --steps {steps} --seed 1000 {flags}")


def rewards_in_training(home: Path, run: Run, size: Size, name: str, flags: str) -> tuple[Path, np.ndarray]:
    """Pictures of training prompts at the rollouts' 8 steps, for what is chosen, and each prompt's mean reward."""
    flags = f"--prompts {size.prompts} --n {size.n_choose} --steps 8 --seed 5000 --reward tiny/{run.reward} {flags}"
    folder = sample(home, run.base, home / "choose" / name, flags)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return folder, np.reshape([row["reward"] for row in rows], (-1, size.n_choose)).mean(1)


def colours(folder: Path) -> dict[str, float]:
    """Means over a folder's pictures of the HSV saturation, and of the luma's absolute Laplacian: sharpness."""
    x = load_pictures([row["file"] for row in read_folder(str(folder), plain=True)])
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return {"saturation": ((x.amax(1) - x.amin(1)) / x.amax(1).clamp_min(1e-3)).mean().item(),
            "sharpness": torch.nn.functional.conv2d(luma, kernel).abs().mean().item()}


def judge(home: Path, run: Run, folders: dict[str, Path], renders: Path) -> dict:
    """eval_judge.py's report on folders of pictures by their names here: {name: {metric: mean}}, and the verdicts on
    each two."""
    home_eval, names = home / "eval", {str(path): name for name, path in folders.items()}
    rewards = "--reward tiny/pickscore tiny/hps"
    command(home, f"eval_judge.py {' '.join(names)} {rewards} --real {renders} --out {home_eval}")
    report = json.loads((home_eval / "report.json").read_text())
    label = {
        "reward/pickscore": "other reward",
        "reward/hps": "other reward",
        f"reward/{run.reward}": "reward",
        "forensic/forensic": "P(real)",
        "fd/embed": "FD",
    }
    means = {name: colours(path) for name, path in folders.items()}
    for metric, by_folder in report["metrics"].items():
        for path, numbers in by_folder.items():
            means[names[path]][label.get(metric, metric)] = numbers["mean"]
    verdicts = {}
    for pair, counts in report["pairs"]["judge/quality"].items():
        first, second = pair.split(" vs ")
        verdicts[f"{names[first]} vs {names[second]}"] = [counts[k] for k in ("win", "tie", "loss", "nan")]
    return {"means": means, "verdicts": verdicts}


def ratio_of(folder: Path) -> dict:
    """Norm ratio along the trajectory."""
    norms = json.loads((folder / "norms.json").read_text())
    return {"overall": norms["overall"], "t": norms["t"], "mean": norms["mean"]}


def both(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """The unguarded and the guarded training."""
    return (train(home, run, size, "lam0", Other("--lam 0")),
            train(home, run, size, f"lam{LAM}", Other(f"--lam {LAM}")))


def shown(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """Their pictures at full steps."""
    unguarded, guarded = both(home, run, size)
    pictures = held_out(home, run, size, run.method, unguarded / "lora")
    return pictures, held_out(home, run, size, f"{run.method}+normguard", guarded / "lora")


def with_guard(home: Path, run: Run, size: Size, name: str) -> Path:
    """The training with another guard."""
    other = GUARDS[name]
    return train(home, run, size, f"guards/{slug(name)}", other._replace(flags=f"{other.flags} --eval-every 0"))


def main_part(root: Path, run: Run, size: Size) -> dict:
    """Claims 1, 4, 5, 6: the norm over training and over t, and what reward, judge and detector say of the pictures."""
    home = root / run.name
    unguarded, guarded = shown(home, run, size)
    keys = ("eval_reward", "eval_reward_se", "eval_norm_ratio", "eval_norm_ratio_steps", "eval_saturation")
    _, rewards = rewards_in_training(home, run, size, "base", "")
    curves, training = {}, {"base": rewards.mean()}
    for name, out in zip(("unguarded", "guarded"), both(home, run, size)):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        evals = [line for line in lines if "eval_reward" in line]
        curves[name] = [{k.removeprefix("eval_"): line[k] for k in ("epoch", *keys)} for line in evals]
        _, rewards = rewards_in_training(home, run, size, name, f"--lora {out}/lora")
        training[name] = rewards.mean()
    ratios = {"unguarded": ratio_of(unguarded), "guarded": ratio_of(guarded)}
    folders = {"base": root / run.base / "base", "unguarded": unguarded, "guarded": guarded}
    judged = judge(home, run, folders, root / "renders")
    return {"curves": curves, "ratio": ratios, "training reward": training, **judged}


def renorm_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 2: the unguarded model's velocity rescaled to the reference's norm while sampling."""
    home = root / run.name
    unguarded, guarded = shown(home, run, size)
    lora = both(home, run, size)[0] / "lora"
    rescaled = {}
    for how in ("match", "cap"):
        rescaled[how] = held_out(home, run, size, f"renorm-{how}", lora, flags=f"--renorm {how}")
    return judge(home, run, {"unguarded": unguarded, **rescaled, "guarded": guarded}, root / "renders")


def adjoint_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 3, on the unguarded model."""
    home = root / run.name
    return adjoint(home, run.base, run.reward, size, home / "adjoint", f"--lora {both(home, run, size)[0] / 'lora'}")


def adjoint(home: Path, base: str, reward: str, size: Size, out: Path, flags: str = "") -> dict:
    """sample.py --adjoint on held-out prompts at the rollouts' 8 steps."""
    sample(home, base, out, f"--adjoint --reward tiny/{reward} --n {size.n_adjoint} --steps 8 --seed 3000 {flags}")
    rows = json.loads((out / "adjoint.json").read_text())
    sensitivities = {"reward": rows[f"tiny/{reward}"], "energy": rows["energy (control)"]}
    return {"t": rows["t"], "units": rows["units"], **sensitivities}


def few_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 7: the same models at few steps."""
    home, out = root / run.name, {}
    unguarded, guarded = both(home, run, size)
    auto = with_guard(home, run, size, "auto")
    for steps in size.few:
        folders = {"base": root / run.base / f"base-{steps}"}
        for name, folder in (("unguarded", unguarded), ("guarded", guarded), ("auto", auto)):
            folders[name] = held_out(home, run, size, f"{name}-{steps}", folder / "lora", steps, flags="")
        out[str(steps)] = judge(home, run, folders, root / "renders")
    return out


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(", ", "-").replace(" ", "-")


def early_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 8: the guarded model against the unguarded run's first checkpoint of equal reward, and against the one
    that the judge likes best. Equal: not below the guarded one's by more than a standard error (paired, over prompts);
    if none is, the best."""
    home, found, rewards = root / run.name, {}, {}
    unguarded, guarded = both(home, run, size)
    ask = local_judge("tiny/judge", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for lora in (guarded / "lora", *sorted(unguarded.glob("lora-*"))):
        name = "guarded" if lora.parent == guarded else lora.name.removeprefix("lora-")
        folder, rewards[name] = rewards_in_training(home, run, size, name, f"--lora {lora}")
        files, margins = [row["file"] for row in read_folder(str(folder), plain=True)], []
        for i in range(0, len(files), 32):
            pictures = [[file] for file in files[i:i + 32]]
            margins += [read_answer(top, "yes", "no") for top in ask(SINGLE["overall"], pictures)]
        good = 1 / (1 + np.exp(-np.array(margins)))
        less = rewards["guarded"] - rewards[name]
        found[name] = {
            "reward": float(rewards[name].mean()),
            "overall": float(np.nanmean(good)),
            "less": float(less.mean()),
            "se": float(less.std(ddof=1) / len(less) ** 0.5),
        }
    checkpoints = [name for name in found if name != "guarded"]
    equal = [name for name in checkpoints if found[name]["less"] <= found[name]["se"]]
    highest = max(checkpoints, key=lambda name: found[name]["reward"])
    best_judged = max(checkpoints, key=lambda name: found[name]["overall"])
    chosen = {"early, equal reward": equal[0] if equal else highest, "early, best judged": best_judged}
    folders = {}
    for how, name in chosen.items():
        folders[how] = held_out(home, run, size, slug(how), unguarded / f"lora-{name}", flags="")
    folders = {"guarded": shown(home, run, size)[1], **folders}
    judged = judge(home, run, folders, root / "renders")
    return {"found": found, "chosen": chosen, "reached": bool(equal), **judged}


def auto_part(root: Path, run: Run, size: Size) -> dict:
    """Claims 4, 5 and 6 for --lam auto."""
    home = root / run.name
    pictures = held_out(home, run, size, f"{run.method}+auto", with_guard(home, run, size, "auto") / "lora")
    folders = dict(zip(("unguarded", "guarded", "auto"), (*shown(home, run, size), pictures)))
    return {"ratio": {"auto": ratio_of(pictures)}, **judge(home, run, folders, root / "renders")}


def guard_part(root: Path, run: Run, size: Size, name: str) -> dict:
    """Claim 9: another guard, on training prompts: it is a matter of choice."""
    home = root / run.name
    trained = dict(zip(("unguarded", "guarded"), both(home, run, size)))
    trained["variant"] = with_guard(home, run, size, name)
    flags = f"--prompts {size.prompts} --n {size.n_guard} --steps {size.steps} --seed 5000 --norms"
    pictures = {}
    for who, out in trained.items():
        pictures[who] = sample(home, run.base, home / "chosen" / out.name, f"--lora {out / 'lora'} {flags}")
    ratios = {who: ratio_of(path) for who, path in pictures.items()}
    return {"ratio": ratios, **judge(home, run, pictures, root / "renders-training")}


def rival_part(root: Path, run: Run, size: Size, name: str, strength: float) -> dict:
    """Claim 10: a rival of the guard, at a strength."""
    home, rival, label = root / run.name, RIVALS[name], slug(f"{name} {strength:g}")
    unguarded, _ = both(home, run, size)
    trained = unguarded
    if rival.training:
        training = rival.training._replace(flags=f"{rival.training.flags} --eval-every 0")
        trained = train(home, run, size, f"rivals/{label}", training, strength)
    flags = rival.sampling.format(s=strength)
    pictures = held_out(home, run, size, f"{run.method}+{label}", trained / "lora", flags=f"--norms {flags}")
    _, rewards = rewards_in_training(home, run, size, label, f"--lora {trained}/lora {flags}")
    judged = judge(home, run, {"guarded": shown(home, run, size)[1], "rival": pictures}, root / "renders")
    return {"ratio": {"rival": ratio_of(pictures)}, "training reward": {"rival": rewards.mean()}, **judged}


GRID = {  # of every run: a part's name, what measures it, the claims that it serves
    "main": (main_part, (1, 2, 3, 4, 5, 6, 7, 8, 10)),
    "auto": (auto_part, (4, 7, 10)),  # 7 compares with it
    "renorm": (renorm_part, (2,)),
    "adjoint": (adjoint_part, (3,)),
    "few": (few_part, (7,)),
    "early": (early_part, (8,)),
}
CORNERS, TRAININGS = {}, {}  # of a base and a reward to look at, and others to confirm it; and how they train
METHODS = {}  # those that have a part, where not all do
for _name, _other in GUARDS.items():
    TRAININGS[f"guard: {_name}"] = _other
    CORNERS[f"guard: {_name}"] = (partial(guard_part, name=_name), (9,))
for _name, _rival in RIVALS.items():
    for _strength in dict.fromkeys(_rival.strengths + _rival.dpo):
        _part = f"rival: {_name} {_strength:g}"
        TRAININGS[_part] = _rival.training or Other(_rival.sampling)
        CORNERS[_part] = (partial(rival_part, name=_name, strength=_strength), (10,))
        METHODS[_part] = [method for method in Args.methods if _strength in _rival.of(method)]
PARTS = {**GRID, **CORNERS}


# ---------------------------------------------------------------- the work, spread over processes

def add(file: Path, part: str, of: dict[str, str], numbers: Callable[[], dict]):
    """A part's numbers, and what they depend on, to a file, unless they are there."""
    known = read_json(file)
    if part not in known:
        start = time.time()
        known[part] = rounded({**numbers(), "of": {**of, "commit": commit()}, "seconds": time.time() - start})
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()]  # a part a line
        write_text(file, "{\n" + ",\n".join(lines) + "\n}\n")


def asked(args: Args, size: Size, parts: dict) -> list[str]:
    """Those of the parts that are asked for."""
    return [part for part, (_, claims) in parts.items()
            if (args.only is None or args.only in claims) and (size.only is None or part in size.only)]


def work_on_base(base: str, args: Args, size: Size):
    """What the runs of a base share: its pictures, and its sensitivities."""
    root, file, of = Path(args.runs), Path(args.results) / f"{base}.json", made_with(base)
    home, wanted = fresh_folder(root / base, of), asked(args, size, GRID)
    few = size.few if "few" in wanted else ()
    for name, steps in (("base", size.steps), *((f"base-{steps}", steps) for steps in few)):
        sample(home, base, home / name, f"{size.shown} --steps {steps} --seed 1000")
    add(file, "colours", of, lambda: {"base": colours(home / "base"), "renders": colours(root / "renders")})
    for reward in args.rewards if "adjoint" in wanted else ():
        add(file, f"adjoint {reward}", of, partial(adjoint, home, base, reward, size, home / f"adjoint-{reward}"))


def work_on_run(run: Run, parts: list[str], args: Args, size: Size):
    """A run's parts, one after the other."""
    root, file = Path(args.runs), Path(args.results) / f"{run.name}.json"
    fresh_folder(root / run.name, made_with(run.base, run.method))
    for part in parts:
        measure, _ = PARTS[part]
        add(file, part, depends(run, size, part), partial(measure, root, run, size))


def start_worker(threads: int):
    """Each process its share of the cores. It does not outlive the one that started it, whose successor may be at work
    already."""
    def follow():
        """End when the parent does."""
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)


def todo(args: Args, size: Size, runs: list[Run], parts: dict) -> dict[Run, list[str]]:
    """Those of the parts that are asked for and not there, of each run."""
    left = {run: read_json(Path(args.results) / f"{run.name}.json") for run in runs}
    left = {run: [part for part in asked(args, size, parts)
                  if part not in known and run.method in METHODS.get(part, args.methods)]
            for run, known in left.items()}
    return {run: parts for run, parts in left.items() if parts}


def gathered(results: Path) -> tuple[dict[Run, dict], dict[str, dict]]:
    """The numbers of all runs that a folder has, and of the bases."""
    found = {}
    for cell in product(Args.bases, Args.methods, Args.rewards):
        for file in sorted(results.glob(f"{'-'.join(cell)}-s*.json")):
            found[Run(*cell, int(file.stem.rpartition("-s")[2]))] = read_json(file)
    return found, {base: numbers for base in Args.bases if (numbers := read_json(results / f"{base}.json"))}


def stale_parts(found: dict[Run, dict], bases: dict[str, dict], size: Size) -> dict[str, list[str]]:
    """The measured parts that depend on something that is not as it was: {what: [run: part, ...]}."""
    parts = [(run.name, part, numbers[part], depends(run, size, part))
             for run, numbers in found.items() for part in PARTS if part in numbers]
    parts += [(base, part, numbers, made_with(base)) for base, of_base in bases.items()
              for part, numbers in of_base.items()]
    stale = {}
    for name, part, numbers, now in parts:
        for what in (what for what in now if numbers.get("of", {}).get(what) != now[what]):
            stale.setdefault(what, []).append(f"{name}: {part}")
    return stale


@one_line_errors()
def main(args: Args):
    """Do what is missing, then write the report."""
    check_flags(args, {"jobs": 1})
    for flag, known in (("bases", Args.bases), ("methods", Args.methods), ("rewards", Args.rewards)):
        if unknown := set(getattr(args, flag)) - set(known):
            raise InputError(f"--{flag} {unknown.pop()}: {', '.join(known)}")
    if args.only is not None and not 1 <= args.only <= 10:
        raise InputError(f"--only {args.only}: a claim is a number from 1 to 10")
    if args.seeds and not 0 <= min(args.seeds) <= max(args.seeds) < 2**63:
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: from 0 to below 2^63")
    if len(args.runs.split()) != 1:  # commands are split at spaces
        raise InputError(f"--runs '{args.runs}': a path without spaces")
    if not all((args.bases, args.methods, args.rewards, args.seeds)):
        raise InputError("--bases, --methods, --rewards and --seeds each take at least one")
    os.chdir(ROOT)
    size = SMOKE if args.smoke else Size()
    if args.smoke:
        root = "runs/smoke" if args.runs == Args.runs else args.runs
        args = Args(("sd3",), ("awm",), ("hps",), (0,), args.only, args.jobs, True, root, f"{root}/results")
    check_place(args.runs, "--runs")
    check_place(args.results, "--results")
    check_place(Path(args.results).parent, "--results", ("RESULTS.md", "results.json"))
    root, results = make_dir(args.runs, "--runs"), make_dir(args.results, "--results")
    folders = {folder.resolve(): (flag, folder) for flag, folder in (("--results", results), ("--runs", root))}
    with contextlib.ExitStack() as locks:
        for flag, folder in folders.values():  # one, if it is both
            locks.enter_context(locked(flag, folder))
        work_and_report(args, size, root, results)


@contextlib.contextmanager
def locked(flag: str, folder: Path):
    """While this lasts, no other reproduce.py works in a folder."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{flag} {folder}: another reproduce.py is at work there")
    try:
        yield
    finally:
        os.close(lock)  # which frees it


def work_through(tasks: list[Callable], jobs: int, threads: int, progress: Callable):
    """All tasks: in this process if there is one job, else spread over several."""
    if jobs == 1:
        for task in tasks:
            task()
            progress()
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before a worker imports torch
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,))
    try:
        pending = {pool.submit(task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what it raised
            progress()
    except BaseException:
        for process in multiprocessing.active_children():  # they have more tasks in their queue
            process.terminate()
        raise
    pool.shutdown()


def work_and_report(args: Args, size: Size, root: Path, results: Path):
    """What is missing, spread over processes; then the report of all that there is."""
    assets = Path("assets") if args.results == Args.results else results.parent
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    threads = max(1, os.cpu_count() // jobs)
    combinations = dict.fromkeys(product(args.seeds, args.bases, args.methods, args.rewards))
    runs = [Run(*which, seed) for seed, *which in combinations]
    corners = {(args.bases[i], args.rewards[i]) for i in (0, -1)}
    of_corners = [run for run in runs if (run.base, run.reward) in corners]
    work = todo(args, size, runs, GRID), todo(args, size, of_corners, CORNERS)
    wanted = [(run, part) for phase in work for run, parts in phase.items() for part in parts]
    total = len(wanted)

    def left() -> int:
        """Parts to do."""
        return sum(part not in read_json(results / f"{run.name}.json") for run, part in wanted)

    if total:
        for out, prompts in (("renders", "eval_prompts"), ("renders-training", "prompts")):
            flags = f"--n {size.renders} --seed 1 --prompts tiny/{prompts}.txt --out {root / out}"
            command(root, f"tiny/world.py {flags}", root / out, f"# {fingerprint('tiny/world.py')}")
    # each phase needs the one before
    phases = [[partial(work_on_base, base, args, size) for base in dict.fromkeys(args.bases) if total]]
    for phase in work:
        phases.append([partial(work_on_run, run, parts, args, size) for run, parts in phase.items()])
    with tqdm(total=total, desc="reproduce", unit="part") as bar:
        for tasks in phases:
            work_through(tasks, jobs, threads, lambda: bar.update(total - left() - bar.n))

    found, bases = gathered(results)
    write_report(found, bases, size, results.parent, assets)
    draw_all(found, bases, assets)
    front = next((run for run in found if run.method == "awm"), None)
    folders = front and {"base": root / front.base / "base", "unguarded": root / front.name / front.method,
                         "guarded": root / front.name / f"{front.method}+normguard"}
    if folders and all(map(Path.exists, folders.values())):
        draw_front(found[front], folders, assets / "front.png")
    for what, parts in stale_parts(found, bases, size).items():
        print(f"note: {len(parts)} parts were measured with other {what} than today's ({parts[0]}, ...); to measure "
              f"them anew, delete them in {results}")
    print(f"{len(found)} runs: {results.parent}/RESULTS.md, {results.parent}/results.json and figures in {assets}/")


if __name__ == "__main__":
    main(parse(Args, __doc__))
