"""The paper's claims, measured on the miniature world by one command.

    python tiny/reproduce.py                                  # what is not in tiny/results yet; then the report of all of it
    python tiny/reproduce.py --results runs/mine              # all of it anew, beside the committed numbers
    python tiny/reproduce.py --bases sd3 --methods awm --rewards pickscore --seeds 0 --only 4
    python tiny/reproduce.py --smoke                          # a toy of it, in runs/smoke: does everything still work?

A run is a base, a method, a reward and a seed, trained with --lam 0 ("unguarded") and --lam 0.05 ("guarded"), the scripts'
defaults otherwise. Trainings, pictures and their scores come from the project's own scripts, carried out in this process; their
commands stand in RUNS/<run>/commands.txt. A run's numbers go to RESULTS/<run>.json part by part as they come, and are not computed
again, whatever has changed since: to measure anew, delete them. Killed at any moment, the same command goes on. Writes RESULTS.md
and results.json beside RESULTS, the figures to assets/.

Pictures that are judged show held-out prompts. What is chosen (claim 8: a checkpoint; claim 9: a guard) is chosen on training
prompts.
"""
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
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
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from eval_judge import SINGLE, fail, load_pictures, local_judge, make_dir, parse, read_answer, read_folder
from normguard import norm_ratio, velocity_norm
from report import LAM, read_json, rounded, write_report, write_text
from sample import save_lora


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
    """one claim, 1 to 9 (default: all)"""
    jobs: int | None = None
    """runs at a time (default: one per CPU core, one on a GPU)"""
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


SMOKE = Size("--epochs 2 --group 2 --groups 2 --eval-n 2 --save-every 1", 4, (2,), 1, 1, 1, 1, 32)


# ---------------------------------------------------------------- claim 9: other guards

def squared(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """relu(ratio - 1)^2: no pull at the threshold, and more the further above."""
    return torch.relu(norm_ratio(v, v_ref) - 1 - margin).square()


def absolute(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """relu(||v|| - ||v_ref||), in units of the latent."""
    return torch.relu(velocity_norm(v) - velocity_norm(v_ref.detach()) - margin)


def per_token(v: Tensor, v_ref: Tensor, margin: float = 0.0) -> Tensor:
    """The hinge of each token's norm, averaged over the tokens, which are patches of 2x2: (b, c, h, w) -> (b,)."""
    tokens = (rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2) for x in (v, v_ref))
    return torch.relu(norm_ratio(*tokens) - 1 - margin).view(len(v), -1).mean(1)


# name: (flags, hinge or None for normguard's own). A squared hinge's slope is the linear one's at an excess of 5 % if lam is ten
# times larger; ||v_ref|| is about 30 to 40 here, hence the lam of the absolute one.
VARIANTS = {
    "lam 0.0005": ("--lam 0.0005", None), "lam 0.005": ("--lam 0.005", None), "lam 0.5": ("--lam 0.5", None), "lam 5": ("--lam 5", None),
    "squared, lam 0.05": ("--lam 0.05", squared), "squared, lam 0.5": ("--lam 0.5", squared), "squared, lam 5": ("--lam 5", squared),
    "absolute, lam 0.0015": ("--lam 0.0015", absolute), "per token": (f"--lam {LAM}", per_token), "margin 0.02": (f"--lam {LAM} --margin 0.02", None),
}


# ---------------------------------------------------------------- what is done to a run

def command(log: Path, line: str, out: Path | None = None, note: str = ""):
    """Carry out `python <line>` in this process and note it in commands.txt, unless out/command.txt says that this has been done."""
    said = " ".join(f"python {line} {note}".split()) + "\n"
    if out and (out / "command.txt").exists() and (out / "command.txt").read_text() == said:
        return
    script, *flags = line.split()
    module = importlib.import_module(Path(script).stem)
    log.mkdir(parents=True, exist_ok=True)
    with open(log / "commands.txt", "a") as f:
        f.write(said)
    with open(log / "output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try:
            module.main(tyro.cli(module.Args, args=flags))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"python {line}: exit code {end.code}; its output is in {log}/output.txt") from end
    if out:
        write_text(out / "command.txt", said)


def train(home: Path, run: Run, size: Size, name: str, flags: str, hinge: Callable | None = None) -> Path:
    """The folder home/name of a finished training, in which lora-EPOCH holds each checkpoint's LoRA. `hinge` takes norm_hinge's place."""
    module, out = importlib.import_module(f"train_{run.method}"), home / name
    own = module.save_checkpoint, module.norm_hinge

    def keep(out, pipe, opt, epoch, **extra):
        """Save as ever, and keep a copy."""
        save_lora(pipe, out / f"lora-{epoch:05d}")
        own[0](out, pipe, opt, epoch=epoch, **extra)

    module.save_checkpoint, module.norm_hinge = keep, hinge or own[1]
    try:
        command(home, f"train_{run.method}.py --model tiny/{run.base} --reward tiny/{run.reward} --seed {run.seed} --out {out} {flags} {size.train}",
                out, f"# with norm_hinge = reproduce.{hinge.__name__}" if hinge else "")
    finally:
        module.save_checkpoint, module.norm_hinge = own
    return out


def sample(home: Path, base: str, out: Path, flags: str) -> Path:
    """Pictures in `out`."""
    command(home, f"sample.py --model tiny/{base} --out {out} {flags}", out)
    return out


def held_out(home: Path, run: Run, size: Size, name: str, lora: Path, steps: int | None = None, flags: str = "--norms") -> Path:
    """Pictures home/name of held-out prompts, their noise the same for every run."""
    return sample(home, run.base, home / name, f"--lora {lora} --n {size.n} --steps {steps or size.steps} --seed 1000 {flags}")


def colours(folder: Path) -> dict[str, float]:
    """Means over a folder's pictures of the HSV saturation, and of the luma's absolute Laplacian: sharpness."""
    x = load_pictures([row["file"] for row in read_folder(str(folder), plain=True)])
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return {"saturation": ((x.amax(1) - x.amin(1)) / x.amax(1).clamp_min(1e-3)).mean().item(),
            "sharpness": torch.nn.functional.conv2d(luma, kernel).abs().mean().item()}


def judge(home: Path, run: Run, folders: dict[str, Path], renders: Path) -> dict:
    """eval_judge.py's report on folders of pictures by their names here: {name: {metric: mean}}, and the verdicts on each two."""
    home_eval, names = home / "eval", {str(path): name for name, path in folders.items()}
    command(home, f"eval_judge.py {' '.join(names)} --reward tiny/pickscore tiny/hps --real {renders} --out {home_eval}")
    report = json.loads((home_eval / "report.json").read_text())
    kind = {"reward/pickscore": "other reward", "reward/hps": "other reward", f"reward/{run.reward}": "reward", "forensic/forensic": "P(real)",
            "fd/embed": "FD"}
    means = {name: colours(path) for name, path in folders.items()}
    for metric, by_folder in report["metrics"].items():
        for path, numbers in by_folder.items():
            means[names[path]][kind.get(metric, metric)] = numbers["mean"]
    verdicts = {" vs ".join(names[path] for path in pair.split(" vs ")): [m[k] for k in ("win", "tie", "loss", "nan")]
                for pair, m in report["pairs"]["judge/quality"].items()}
    return {"means": means, "verdicts": verdicts}


def ratio_of(folder: Path) -> dict:
    """Norm ratio along the trajectory."""
    norms = json.loads((folder / "norms.json").read_text())
    return {"overall": norms["overall"], "t": norms["t"], "mean": norms["mean"]}


def both(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """The unguarded and the guarded training."""
    return train(home, run, size, "lam0", "--lam 0"), train(home, run, size, f"lam{LAM}", f"--lam {LAM}")


def shown(home: Path, run: Run, size: Size) -> tuple[Path, Path]:
    """Their pictures at full steps."""
    unguarded, guarded = both(home, run, size)
    return held_out(home, run, size, run.method, unguarded / "lora"), held_out(home, run, size, f"{run.method}+normguard", guarded / "lora")


def main_part(root: Path, run: Run, size: Size) -> dict:
    """Claims 1, 4, 5, 6: the norm over training and over t, and what reward, judge and detector say of the pictures."""
    home = root / run.name
    unguarded, guarded = shown(home, run, size)
    curves = {}
    for name, out in zip(("unguarded", "guarded"), both(home, run, size)):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [{k.removeprefix("eval_"): line[k] for k in ("epoch", "eval_reward", "eval_reward_se", "eval_norm_ratio",
                                                                    "eval_norm_ratio_steps", "eval_saturation")} for line in lines if "eval_reward" in line]
    said = judge(home, run, {"base": root / run.base / "base", "unguarded": unguarded, "guarded": guarded}, root / "renders")
    shutil.copy(home / "eval" / "report.png", home / "report.png")  # the other parts write their own
    return {"curves": curves, "ratio": {"unguarded": ratio_of(unguarded), "guarded": ratio_of(guarded)}, **said}


def renorm_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 2: the unguarded model's velocity rescaled to the reference's norm while sampling."""
    home, (unguarded, guarded) = root / run.name, shown(root / run.name, run, size)
    lora = both(home, run, size)[0] / "lora"
    rescaled = {how: held_out(home, run, size, f"renorm-{how}", lora, flags=f"--renorm {how}") for how in ("match", "cap")}
    return judge(home, run, {"unguarded": unguarded, **rescaled, "guarded": guarded}, root / "renders")


def adjoint_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 3, on the unguarded model."""
    home = root / run.name
    return adjoint(home, run.base, run.reward, size, home / "adjoint", f"--lora {both(home, run, size)[0] / 'lora'}")


def adjoint(home: Path, base: str, reward: str, size: Size, out: Path, flags: str = "") -> dict:
    """sample.py --adjoint on held-out prompts at the rollouts' 8 steps."""
    sample(home, base, out, f"--adjoint --reward tiny/{reward} --n {size.n_adjoint} --steps 8 --seed 3000 {flags}")
    rows = json.loads((out / "adjoint.json").read_text())
    return {"t": rows["t"], "units": rows["units"], "reward": rows[f"tiny/{reward}"], "energy": rows["energy (control)"]}


def few_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 7: the same models at few steps."""
    home, (unguarded, guarded), out = root / run.name, both(root / run.name, run, size), {}
    for steps in size.few:
        folders = {"base": root / run.base / f"base-{steps}"}
        for name, folder in (("unguarded", unguarded), ("guarded", guarded)):
            folders[name] = held_out(home, run, size, f"{name}-{steps}", folder / "lora", steps, flags="")
        out[str(steps)] = judge(home, run, folders, root / "renders")
    return out


def early_part(root: Path, run: Run, size: Size) -> dict:
    """Claim 8: the guarded model against the unguarded run's first checkpoint of equal reward, and against the one that the judge
    likes best. Equal: not below the guarded one's by more than a standard error (paired, over prompts); if none is, the best."""
    home, (unguarded, guarded) = root / run.name, both(root / run.name, run, size)
    ask, found, rewards = local_judge("tiny/judge", torch.device("cuda" if torch.cuda.is_available() else "cpu")), {}, {}
    for lora in (guarded / "lora", *sorted(unguarded.glob("lora-*"))):
        name = "guarded" if lora.parent == guarded else lora.name.removeprefix("lora-")
        folder = sample(home, run.base, home / "choose" / name, f"--lora {lora} --prompts tiny/prompts.txt --n {size.n_choose} --steps 8 "
                                                                f"--seed 5000 --reward tiny/{run.reward}")
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        margins = [read_answer(top, "yes", "no") for i in range(0, len(rows), 32)
                   for top in ask(SINGLE["overall"], [[str(folder / row["file"])] for row in rows[i:i + 32]])]
        rewards[name] = np.reshape([row["reward"] for row in rows], (-1, size.n_choose)).mean(1)  # of each prompt
        less = rewards["guarded"] - rewards[name]
        found[name] = {"reward": float(rewards[name].mean()), "overall": float(np.nanmean(1 / (1 + np.exp(-np.array(margins))))),
                       "less": float(less.mean()), "se": float(less.std(ddof=1) / len(less) ** 0.5)}
    checkpoints = [name for name in found if name != "guarded"]
    equal = [name for name in checkpoints if found[name]["less"] <= found[name]["se"]]
    chosen = {"early, equal reward": (equal or [max(checkpoints, key=lambda name: found[name]["reward"])])[0],
              "early, best judged": max(checkpoints, key=lambda name: found[name]["overall"])}
    pictures = {how: held_out(home, run, size, how.replace(", ", "-").replace(" ", "-"), unguarded / f"lora-{name}", flags="")
                for how, name in chosen.items()}
    return {"found": found, "chosen": chosen, "reached": bool(equal), **judge(home, run, {"guarded": shown(home, run, size)[1], **pictures}, root / "renders")}


def variant_part(root: Path, run: Run, size: Size, name: str) -> dict:
    """Claim 9: another guard, on training prompts: it is a matter of choice."""
    home, (flags, hinge), folder = root / run.name, VARIANTS[name], name.replace(", ", "-").replace(" ", "-")
    trained = dict(zip(("unguarded", "guarded"), both(home, run, size))) | {"variant": train(home, run, size, folder, f"{flags} --eval-every 0", hinge)}
    pictures = {who: sample(home, run.base, home / "guards" / out.name, f"--lora {out / 'lora'} --prompts tiny/prompts.txt --n {size.n_guard} "
                                                                        f"--steps {size.steps} --seed 5000 --norms") for who, out in trained.items()}
    return {"ratio": {who: ratio_of(path) for who, path in pictures.items()}, **judge(home, run, pictures, root / "renders-training")}


PARTS = {"main": (main_part, tuple(range(1, 9))), "renorm": (renorm_part, (2,)), "adjoint": (adjoint_part, (3,)), "few": (few_part, (7,)),
         "early": (early_part, (8,)), **{f"guard: {name}": (partial(variant_part, name=name), (9,)) for name in VARIANTS}}


# ---------------------------------------------------------------- the work, spread over processes

def add(file: Path, part: str, numbers: Callable[[], dict]):
    """A part's numbers to a file, unless they are there."""
    known = read_json(file)
    if part not in known:
        start = time.time()
        known[part] = rounded({**numbers(), "seconds": time.time() - start})
        write_text(file, "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()) + "\n}\n")  # a part a line


def work_on_base(base: str, args: Args, size: Size):
    """What the runs of a base share: its pictures, and its sensitivities."""
    root, home = Path(args.runs), Path(args.runs) / base
    for name, steps in (("base", size.steps), *((f"base-{steps}", steps) for steps in size.few)):
        sample(home, base, home / name, f"--n {size.n} --steps {steps} --seed 1000")
    add(Path(args.results) / f"{base}.json", "colours", lambda: {"base": colours(home / "base"), "renders": colours(root / "renders")})
    for reward in args.rewards if args.only in (None, 3) else ():
        add(Path(args.results) / f"{base}.json", f"adjoint {reward}", lambda r=reward: adjoint(home, base, r, size, home / f"adjoint-{r}"))


def work_on_run(run: Run, parts: list[str], args: Args, size: Size):
    """A run's parts, one after the other."""
    for part in parts:
        add(Path(args.results) / f"{run.name}.json", part, lambda p=part: PARTS[p][0](Path(args.runs), run, size))


def start_worker(threads: int):
    """Each process its share of the cores. It does not outlive the one that started it, whose successor may be at work already."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)


def todo(args: Args, runs: list[Run], ablation: bool) -> dict[Run, list[str]]:
    """The parts of the runs that are asked for and not there; of the ablation, or all others."""
    out = {}
    for run in runs:
        known = read_json(Path(args.results) / f"{run.name}.json")
        out[run] = [p for p, (_, claims) in PARTS.items() if (claims == (9,)) == ablation and (args.only or claims[0]) in claims and p not in known]
    return {run: parts for run, parts in out.items() if parts}


def main(args: Args):
    """Do what is missing, then write the report."""
    for flag, known in (("bases", Args.bases), ("methods", Args.methods), ("rewards", Args.rewards)):
        if unknown := set(getattr(args, flag)) - set(known):
            fail(f"--{flag} {unknown.pop()}: {', '.join(known)}")
    if args.only is not None and not 1 <= args.only <= 9:
        fail(f"--only {args.only}: a claim is a number from 1 to 9")
    if args.jobs is not None and args.jobs < 1:
        fail(f"--jobs {args.jobs}: at least 1")
    if len(args.runs.split()) != 1:  # commands are split at spaces
        fail(f"--runs '{args.runs}': a path without spaces")
    if not all((args.bases, args.methods, args.rewards, args.seeds)):
        fail("--bases, --methods, --rewards and --seeds each take at least one")
    os.chdir(ROOT)
    size = SMOKE if args.smoke else Size()
    if args.smoke:
        root = "runs/smoke" if args.runs == Args.runs else args.runs
        args = Args(("sd3",), ("awm",), ("hps",), (0,), args.only, args.jobs, True, root, f"{root}/results")
    root, results = make_dir(args.runs, "--runs"), make_dir(args.results, "--results")
    assets = Path("assets") if args.results == Args.results else results.parent
    lock = open(root / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"--runs {root}: another reproduce.py is at work there")
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    threads = max(1, os.cpu_count() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before a worker imports torch
    runs = [Run(*which, seed) for seed, *which in dict.fromkeys(product(args.seeds, args.bases, args.methods, args.rewards))]
    corners = {(args.bases[i], args.rewards[i]) for i in (0, -1)}  # a base and a reward to look at, others to confirm it
    ablated = [run for run in runs if (run.base, run.reward) in corners]
    grid, ablation = todo(args, runs, False), todo(args, ablated, True)
    total = sum(map(len, [*grid.values(), *ablation.values()]))

    def left() -> int:
        """Parts to do."""
        return sum(part not in read_json(results / f"{run.name}.json") for some in (grid, ablation) for run, parts in some.items() for part in parts)

    if total:
        for out, prompts in (("renders", "eval_prompts"), ("renders-training", "prompts")):
            command(root, f"tiny/world.py --n {size.renders} --seed 1 --prompts tiny/{prompts}.txt --out {root / out}", root / out)
    with tqdm(total=total, desc="reproduce", unit="part") as bar:
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,))
        try:
            for tasks in ([partial(work_on_base, base, args, size) for base in dict.fromkeys(args.bases) if total],  # each phase needs the one before
                          [partial(work_on_run, run, parts, args, size) for run, parts in grid.items()],
                          [partial(work_on_run, run, parts, args, size) for run, parts in ablation.items()]):
                pending = {pool.submit(task) for task in tasks}
                while pending:
                    done, pending = wait(pending, timeout=5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()  # raises what it raised
                    bar.update(total - left() - bar.n)
        except BaseException:
            for process in multiprocessing.active_children():  # they have more tasks in their queue
                process.terminate()
            raise
        pool.shutdown()

    found = {Run(b, m, r, int(file.stem.rpartition("-s")[2])): read_json(file) for b, m, r in product(Args.bases, Args.methods, Args.rewards)
             for file in sorted(results.glob(f"{b}-{m}-{r}-s*.json"))}
    bases = {base: numbers for base in Args.bases if (numbers := read_json(results / f"{base}.json"))}
    write_report(found, bases, size, results.parent, assets)
    if (front := root / Run("sd3", "awm", "pickscore", 0).name / "report.png").exists():
        shutil.copy(front, assets / "front.png")
    print(f"{len(found)} runs: {results.parent}/RESULTS.md, {results.parent}/results.json and figures in {assets}/")


if __name__ == "__main__":
    main(parse(Args, __doc__))
