"""Compare folders of pictures: rewards, a vision-language judge, detectors of generated pictures, the Frechet distance.

    python eval_judge.py runs/base runs/awm runs/awm+normguard --real runs/renders
    python eval_judge.py A B --reward pickscore hpsv2.1 --judge Qwen/Qwen2.5-VL-7B-Instruct --forensic DETECTOR
    python eval_judge.py A B --judge http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-VL-7B-Instruct   # vLLM, OpenAI

A and B are folders that sample.py wrote with the same prompts and seeds, so that their pictures form pairs, or folders
of any pictures, paired by file name (--prompts if a metric needs their prompts). Prints a Markdown table and writes
report.json, report.png and report.html. Means have 95 % bootstrap intervals over prompts.

    reward/NAME      mean score of a reward; of a sum also each part's mean and deviation
    judge/quality    how often the judge prefers a folder's picture to its pair in another folder, asked in both orders;
                     if the two answers disagree, it is a tie
    judge/QUESTION   mean P(yes) of the judge's answer to a question about one picture
    forensic/NAME    mean P(real) of a detector, such as Organika/sdxl-detector
    fd/NAME          Frechet distance to the pictures of --real

An answer that cannot be read counts as "not read" and has no score; one without probabilities counts as certain. Scores
are kept in OUT/scores.jsonl: a second run computes only those that are missing.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch is imported: idle threads free their core

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, combinations, permutations
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from flow import cli, judge
from flow.distributed import base_dtype
from flow.pictures import grid, load_pictures, natural, page, png, read_folder
from flow.prompts import read_prompts
from flow.rewards import VLM_QUESTION, load_reward, reward_model, short_reward, split_reward

# The judge's questions. Only the probability of the answer's first word is used.
PAIR = ("Which of these two pictures, A or B, has the better quality? Look at sharpness, colours, light and artifacts, "
        "not at what is shown. Answer with one letter.")
SINGLE = {
    "over-sharpening": "Is this picture over-sharpened, with harsh edges or halos? Answer yes or no.",
    "oversaturation": "Is this picture oversaturated, its colours too strong to be natural? Answer yes or no.",
    "unnatural lighting": "Is the light in this picture unnatural: too harsh, too high in contrast, or from nowhere? "
                          "Answer yes or no.",
    "artifacts": "Does this picture have artifacts, such as noise, blur, blocks or broken shapes? Answer yes or no.",
    "overall": "Is this picture, all in all, of good quality, natural and free of defects? Answer yes or no.",
}

REPORTS = "report.json", "report.png", "report.html"
SERVERS = ("http://", "https://")
OTHERS = "; move it, or give another --out"  # what to do with a file that is not this script's
Folders = dict[str, list[dict]]  # folder: its rows, as read_folder gives them


@dataclass
class Args:
    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]  # folders of pictures; the others are compared to the first
    prompts: str | None = None  # file of prompts, one per picture in the order of their names, if sample.py wrote none
    # rewards: pickscore, hpsv2.1, clipscore, aesthetic, ocr, a CLIPModel, file.py:function, vlm:MODEL, or a sum
    reward: tuple[str, ...] = ("tiny/pickscore",)
    vlm_question: str | None = None  # what vlm:MODEL asks; {prompt} is the picture's (None: does it show the prompt?)
    # vision-language model: a folder, a hub id or a server http://HOST:PORT/v1 (OpenAI's API); none for no judge
    judge: str | None = "tiny/judge"
    judge_model: str | None = None  # name of the model on that server
    judge_extra: str | None = None  # JSON for each request, such as {"max_tokens": 2000} for a model that thinks first
    judge_timeout: float = 60.0  # seconds after which a request to the server has failed
    judge_retries: int = 3  # how often a failed request is sent again
    judge_concurrency: int = 8  # requests sent at once
    forensic: tuple[str, ...] = ("tiny/forensic",)  # detectors of generated pictures: classifiers, folders or hub ids
    real_label: str | None = None  # the detectors' label for a real picture (None: told by the labels' words)
    real: str | None = None  # folder of real pictures; adds the Frechet distance to them
    embed: str = "tiny/embed"  # network whose features the Frechet distance compares: a folder or hub id
    batch: int = 16  # pictures scored at once
    bootstrap: int = 2000  # resamples for the 95 % intervals
    out: str | None = None  # folder for report.* and scores.jsonl (None: runs/eval-A-B for the folders A and B)


def pair_folders(dirs: tuple[str, ...], prompts: str | None) -> tuple[Folders, str]:
    """Each folder's rows for the pictures that all folders have, in the first folder's order, and a note if these are
    fewer than half. Pairs have one prompt and seed; or, with the file `prompts` or if sample.py did not write all
    folders, one file name. Then prompts are those of `prompts`, for all names in natural order, or of sample.py."""
    if not dirs:
        raise cli.InputError("give the folders to compare before the flags")
    for a, b in combinations(dirs, 2):
        if Path(a).resolve() == Path(b).resolve():
            raise cli.InputError(f"{a} and {b}: are one folder, given twice")
    read = {d: read_folder(d) for d in dirs}
    by_name = prompts or not all(rows[0]["prompt"] for rows in read.values())
    if by_name:
        names = sorted({row["name"] for row in chain(*read.values())}, key=natural)
        given = read_prompts(prompts, "--prompts") if prompts else []
        if prompts and len(given) != len(names):
            raise cli.InputError(f"--prompts {prompts}: {len(given)} prompts for {len(names)} names; give one for each"
                                 " name, and the files of a pair one name")
        sources = dict(zip(names, given))
        for row in sorted(chain(*read.values()), key=lambda row: not row["prompt"]):  # first those that have one
            source = sources.setdefault(row["name"], row)
            if row["prompt"] not in ("", source["prompt"]):
                raise cli.InputError(f"{row['file']}: another prompt is given for this name, in --prompts or a folder")
            row |= {"key": row["name"], "prompt": source["prompt"], "metadata": source["metadata"]}
    by_key = {d: {row["key"]: row for row in rows} for d, rows in read.items()}
    common = [key for key in by_key[dirs[0]] if all(key in rows for rows in by_key.values())]
    if not common:
        what, advice = ("name", "give two files of a pair one name") if by_name else (
            "prompt and seed", "sample with the same --n and --seed")
        raise cli.InputError(f"{dirs[0]}: no {what} is in all folders; {advice}")
    for d, rows in by_key.items():
        if len(common) < len(rows):
            print(f"note: {len(common)} of the {len(rows)} pictures in {d} are in all folders; the others are left out")
    most = max(map(len, by_key.values()))
    note = f"Only {len(common)} of up to {most} pictures a folder are in all folders." if 2 * len(common) < most else ""
    folders = {d: [rows[key] for key in common] for d, rows in by_key.items()}
    size = folders[dirs[0]][0]["size"]
    for row in chain(*folders.values()):
        if row["size"] != size:
            raise cli.InputError(f"{row['file']}: has the size {row['size']}, others {size}; bring all to one size")
    return folders, note


def check_out(out: Path, dirs: tuple[str, ...]):
    """Raise InputError if a file that this script would overwrite was written by another, or compares other folders."""
    read_scores(out / "scores.jsonl")
    for file in filter(Path.exists, (out / name for name in REPORTS)):
        with cli.on_error(f"{file}: was not written by eval_judge.py", OTHERS):
            report = json.loads((out / "report.json").read_text())
            compared = {Path(d).resolve() for d in report["dirs"]}
            report["metrics"], report["pairs"]  # a KeyError if it has none
            if file.suffix == ".html" and "eval_judge.py" not in file.read_text():
                raise ValueError("another page")
        if compared != {Path(d).resolve() for d in dirs}:
            raise cli.InputError(f"{file}: compares {' and '.join(report['dirs'])}{OTHERS}")


def read_scores(file: Path) -> dict[str, float]:
    """The scores in scores.jsonl, by key: a hexadecimal number of 32 digits."""
    known = {}
    with cli.on_error(f"{file}: was not written by eval_judge.py", OTHERS):
        for line in filter(None, file.read_text().splitlines() if file.exists() else []):
            is_cut = line[0] == "{" and line[-1] != "}"  # a killed run left half a line
            row = {} if is_cut else json.loads(line)
            known |= {f"{int(key, 16):032x}": float(score) for key, score in row.items()}
    return known


def identity(name: str, device: torch.device) -> str:
    """What scores depend on besides the picture: the model's name, the size and time of its files, and, if it runs in
    this process, the device, the precision and the versions of the libraries."""
    if name.startswith(SERVERS):
        return name
    stamps = []
    for path in (Path(reward_model(part)) for part, _ in split_reward(name)):
        files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
        stamps += [f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files]
    libraries = [f"{library} {version(library)}" for library in ("torch", "transformers")]
    return " ".join([name, *stamps, device.type, str(base_dtype(device)), *libraries])


def cached(out: Path, who: str, jobs: list[list[dict]], load: Callable, batch: int, name: str) -> Tensor:
    """The scores (jobs,) that a model with identity `who` gives to jobs: lists of rows that are scored together.

    Scores that are not in scores.jsonl are computed by load()(jobs), `batch` jobs at once, and added to it. NaN is not
    kept, so the next run tries again. Jobs are sorted, so that the order of folders does not change the batches."""
    def key(job: list[dict]) -> str:
        depends_on = json.dumps([who, [[row["prompt"], row["hash"], *filter(None, [row["metadata"]])] for row in job]])
        return hashlib.sha256(depends_on.encode()).hexdigest()[:32]

    known = read_scores(out / "scores.jsonl")
    by_key = {key(job): job for job in jobs}
    missing = sorted(by_key.keys() - known.keys())
    score = load() if missing else None
    for i in cli.progress(range(0, len(missing), batch), desc=name, leave=False):
        keys = missing[i:i + batch]
        scores = dict(zip(keys, score([by_key[k] for k in keys])))
        known |= scores
        lines = [json.dumps({k: value}) + "\n" for k, value in scores.items() if math.isfinite(value)]
        cli.make_dir(out, "--out")  # only now: a model that fails at once leaves no folder behind
        cli.append(out / "scores.jsonl", "\n" + "".join(lines))  # "\n": a killed run may have left half a line
    return torch.tensor([known[key(job)] for job in jobs], dtype=torch.float64)


def summary(values: Tensor, prompts: list[str], draws: int) -> dict:
    """Mean of the values (n,) that are not NaN, the number of NaN, and a 95 % bootstrap interval of 8 or more. Prompts,
    each with all its pictures, are resampled `draws` times (pictures, if all have one prompt), with a fixed seed."""
    units = prompts if len(set(prompts)) > 1 else list(range(len(prompts)))
    known = (~values.isnan()).nonzero().flatten().tolist()
    units, values = [units[i] for i in known], values[known].double()
    mean = values.mean().item() if known else None
    result = {"mean": mean, "lo": None, "hi": None, "n": len(known), "nan": len(prompts) - len(known)}
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    if len(index) > 1 and len(known) >= 8:
        where = torch.tensor([index[unit] for unit in units])
        sums, counts = torch.bincount(where, weights=values), torch.bincount(where)  # (units,)
        drawn = torch.randint(len(index), (draws, len(index)), generator=torch.Generator().manual_seed(0))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)  # (draws,)
        result["lo"], result["hi"] = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return result


def compare_folders(dirs: tuple[str, ...], scores: Tensor, parts: dict, prompts: list[str], draws: int) -> dict:
    """Each folder's summary of its scores, of (folders, n), and mean and deviation of each of several parts. Of all but
    the first also `diff`, to the first: the pictures are paired, so differences have an interval of their own."""
    compared = {}
    for i, d in enumerate(dirs):
        compared[d] = summary(scores[i], prompts, draws)
        if len(parts) > 1:
            compared[d]["parts"] = {name: {"mean": part[i].mean().item(), "std": part[i].std().item()}
                                    for name, part in parts.items()}
        if i > 0:
            diff = summary(scores[i] - scores[0], prompts, draws)
            compared[d]["diff"] = {k: diff[k] for k in ("mean", "lo", "hi")}
    return compared


def compare_pairs(dirs: tuple[str, ...], margins: dict[str, Tensor], prompts: list[str], draws: int) -> dict[str, dict]:
    """The judge's verdicts on each two folders: how often the first one wins, ties or loses, its rate (a tie counts
    half), and its mean margin. margins["a vs b"] (n,) is log P(A) - log P(B), where A is a's picture, B that of b."""
    verdicts = {}
    for a, b in combinations(dirs, 2):
        one, other = margins[f"{a} vs {b}"], -margins[f"{b} vs {a}"]  # above 0: the picture of a is preferred
        margin = (one + other) / 2
        win, loss = (one > 0) & (other > 0), (one < 0) & (other < 0)
        score = (0.5 + 0.5 * win.double() - 0.5 * loss.double()).where(~margin.isnan(), torch.nan)
        rate = summary(score, prompts, draws)
        verdicts[f"{a} vs {b}"] = {
            "win": int(win.sum()), "tie": int((score == 0.5).sum()), "loss": int(loss.sum()),
            "rate": rate.pop("mean"), **rate, "margin": summary(margin, prompts, 1)["mean"]}
    return verdicts


# Each scorer loads a model and returns a function that scores a list of jobs, as `cached` takes it.

def reward_scorer(spec: str, device: torch.device, question: str | None, rows: list[dict]) -> Callable:
    """Its scores are a reward's; it first checks the prompts of `rows`."""
    reward = load_reward(spec, device, question=question)
    reward.check_prompts(rows)
    return lambda jobs: reward(load_pictures([row["file"] for [row] in jobs]),
                               [row["prompt"] for [row] in jobs], [row["metadata"] for [row] in jobs]).tolist()


def detector_scorer(name: str, real_label: str | None, device: torch.device) -> Callable:
    """Its scores are a detector's P(real)."""
    detector = judge.load_forensic(name, real_label, device)
    return lambda jobs: detector([row["file"] for [row] in jobs]).tolist()


def judge_scorer(load_judge: Callable, question: str, metric: str, unread: dict[str, str]) -> Callable:
    """Its scores are log P(yes) - log P(no), or of A and B. An answer that is not read goes to unread[metric]."""
    ask, words = load_judge(), ("A", "B") if question == PAIR else ("yes", "no")

    def score(jobs: list[list[dict]]) -> list[float]:
        answers = ask(question, [[row["file"] for row in job] for job in jobs])
        margins = [judge.read_answer(answer, *words) for answer in answers]
        for answer, margin in zip(answers, margins):
            if answer and math.isnan(margin):
                unread.setdefault(metric, f", such as `{answer[0][0]!r}`")
        return margins
    return score


def distance_scorer(name: str, real_rows: list[dict], device: torch.device, batch: int) -> Callable:
    """Its scores are Frechet distances of a job's pictures to those of real_rows."""
    embed = judge.load_embed(name, device)

    def features(rows: list[dict]) -> Tensor:
        starts = cli.progress(range(0, len(rows), batch), desc="features", leave=False)
        pictures = ([load_pictures([row["file"]])[0] for row in rows[i:i + batch]] for i in starts)
        return torch.cat([judge.embed_images(embed, some) for some in pictures])

    real = features(real_rows)
    return lambda jobs: [judge.frechet_distance(features(job), real) for job in jobs]


def arrow(name: str) -> str:
    """Whether a metric is better if higher or lower."""
    is_flaw = name.startswith("judge/") and name != "judge/overall"
    return "↓" if is_flaw or name.startswith("fd/") else "↑"


def short_names(names: tuple[str, ...], shorten: Callable = os.path.basename) -> list[str]:
    """Short names of paths, model ids or rewards; their full names if two would be equal."""
    short = [shorten(name.rstrip("/")) for name in names]
    return short if len(set(short)) == len(short) else list(names)


def table(report: dict) -> str:
    """The report in Markdown. Where more than a tenth of the judge's answers are not read, it shows one of them."""
    dirs, verdicts = report["dirs"], report["pairs"].get("judge/quality", {})

    def numbers(m: dict, decimals: int) -> str:
        mean = "-" if m["mean"] is None else f"{m['mean']:.{decimals}f}"
        interval = "" if m["lo"] is None else f" [{m['lo']:.{decimals}f}, {m['hi']:.{decimals}f}]"
        return f"{mean}{interval}, n {m['n']}"

    def example(name: str, m: dict) -> str:
        return report["unread"].get(name, ", as no answer came") if m["nan"] > 0.1 * (m["n"] + m["nan"]) else ""

    def row(*cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [report["note"], ""] if report["note"] else []
    lines += [row("metric", *dirs), "|---|" + "---|" * len(dirs)]
    for name, scores in report["metrics"].items():
        cells = []
        for m in scores.values():
            to = f", {m['n_real']} real" if "n_real" in m else ""
            lost = f" ({m['nan']} of {m['n'] + m['nan']} not read{example(name, m)})" if m["nan"] else ""
            cells.append(numbers(m, 4) + to + lost)
        lines.append(row(f"{name} {arrow(name)}", *cells))
        for part in scores[dirs[0]].get("parts", ()):
            cells = [["-" if x is None else f"{x:.4f}" for x in scores[d]["parts"][part].values()] for d in dirs]
            lines.append(row(f"of it: {part}", *[f"{mean} (deviation {std})" for mean, std in cells]))
    if verdicts:
        lines += ["", row("judge/quality", "win", "tie", "loss", "not read", "rate"), "|---|---|---|---|---|---|"]
    for name, v in verdicts.items():
        lost, rate = f"{v['nan']}{example('judge/quality', v)}", numbers({**v, "mean": v["rate"]}, 3)
        lines.append(row(name, v["win"], v["tie"], v["loss"], lost, rate))
    return "\n".join(lines)


@matplotlib.rc_context({"text.parse_math": False})  # names may have a $
def draw_report(folders: Folders, report: dict) -> bytes:
    """A PNG: each folder's pictures of up to 12 prompts, and a bar chart per metric and of the judge's verdicts."""
    names, prompts = short_names(tuple(folders)), [row["prompt"] for row in next(iter(folders.values()))]
    several = len(set(prompts)) > 1  # else the pictures of one prompt
    shown = [i for i, prompt in enumerate(prompts) if not several or prompts.index(prompt) == i][:12]
    charts = {}  # title: {label: its mean and interval}
    for name, scores in report["metrics"].items():
        better = "higher" if arrow(name) == "↑" else "lower"
        charts[f"{name}\n{better} is better"] = dict(zip(names, scores.values()))
    if verdicts := report["pairs"].get("judge/quality"):
        charts["judge/quality (win, tie, loss)\nabove 0.5 the first is better"] = {
            f"{a} vs {b}\n{v['win']}, {v['tie']}, {v['loss']}": {**v, "mean": v["rate"]}
            for (a, b), v in zip(combinations(names, 2), verdicts.values())}
    columns = min(5, len(charts))
    rows = math.ceil(len(charts) / columns)
    heights = 1.2 * len(names), rows * (0.22 * max(map(len, charts.values())) + 0.9)
    figure = Figure(figsize=(13, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(f"{report['note']} n: number of pictures. Black lines: 95 % intervals.".strip(), fontsize=9)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    pictures = load_pictures([folder[i]["file"] for folder in folders.values() for i in shown])
    sheet = grid(pictures, len(shown), [prompts[i] for i in shown] * len(names))  # one image: axes are slow to draw
    axis = top.subplots()
    axis.imshow(sheet)
    axis.set(xticks=[], yticks=np.arange(0.5, len(names)) * sheet.height / len(names), yticklabels=names)
    for i, (title, bars) in enumerate(charts.items(), 1):
        axis = bottom.add_subplot(rows, columns, i)
        mean, lo, hi = np.array([[bar[k] for k in ("mean", "lo", "hi")] for bar in bars.values()], dtype=float).T
        errors = np.nan_to_num([mean - lo, hi - mean]).clip(0)
        colours = [f"C{k}" for k in range(len(bars))] if list(bars) == names else "gray"  # a folder's, or of a pair
        axis.barh(list(bars), mean, 0.75, xerr=errors, color=colours)
        counts, unread = [bar["n"] for bar in bars.values()], sum(bar["nan"] for bar in bars.values())
        title += f", n {min(counts)}" + (f" to {max(counts)}, {unread} not read" if unread else "")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params("x", nbins=5)
        axis.invert_yaxis()
    return png(figure, 130)


@cli.one_line_errors()
def main(args: Args):
    """Check the flags, score the folders by each metric, write the report."""
    cli.quiet_libraries()
    cli.check_flags(args, dict(bootstrap=1, batch=1, judge_concurrency=1, judge_retries=0, judge_timeout=1e-3))
    args.out = args.out or "runs/eval-" + "-".join(Path(d).resolve().name for d in args.dirs)[:150]
    cli.check_place(args.out, "--out", ("scores.jsonl", *REPORTS))
    is_read = Path(args.out).resolve() in [Path(d).resolve() for d in (*args.dirs, args.real) if d]
    if is_read and not (Path(args.out) / "samples.jsonl").exists():
        raise cli.InputError(f"--out {args.out}: holds pictures to compare; give another, as report.png is a picture")
    args.judge = None if args.judge in (None, "none", "None") else args.judge
    if not (args.reward or args.forensic or args.judge or args.real):
        raise cli.InputError("nothing to compare by: give --reward, --judge, --forensic or --real")
    folders, note = pair_folders(args.dirs, args.prompts)
    first = args.dirs[0]
    prompts = [row["prompt"] for row in folders[first]]
    real_rows = read_folder(args.real) if args.real else []
    n, n_real = len(prompts), len(real_rows)
    if args.real and min(n, n_real) < 2:
        raise cli.InputError(f"--real {args.real}: a Frechet distance takes at least two pictures, not {n} to {n_real}")
    for flag, name in [("--forensic", name) for name in args.forensic] + [("--embed", args.embed)] * bool(args.real):
        cli.check_model(flag, name)
    is_server = bool(args.judge) and args.judge.startswith(SERVERS)
    if args.judge and not is_server:
        cli.check_model("--judge", args.judge, "http://HOST:PORT/v1, ")
    if is_server and not args.judge_model:
        raise cli.InputError(f"--judge {args.judge}: give the model's name on that server as --judge-model")
    if args.judge_extra and not is_server:
        raise cli.InputError("--judge-extra: goes into the requests to a server; give --judge http://HOST:PORT/v1")
    question = args.vlm_question or VLM_QUESTION
    for name, _ in chain(*map(split_reward, args.reward)):
        if not all(prompts) and ("vlm:" not in name or "{prompt}" in question):
            raise cli.InputError(f"--reward {name}: needs prompts; give --prompts FILE, one for each picture in the "
                                 "order of their names, or --reward without a value")
    tiny = [name for name in (args.judge, *args.forensic, *args.reward) if name and name.startswith("tiny/")]
    if tiny and folders[first][0]["size"] != (64, 64):
        print(f"note: {', '.join(tiny)} were trained on 64x64 pictures of one kind; their scores of others mean little")
    out = Path(args.out)
    check_out(out, args.dirs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    load_judge = cache(partial(judge.local_judge, args.judge, device))
    if is_server:
        load_judge = cache(partial(judge.http_judge, args.judge, args.judge_model, args.judge_timeout,
                                   args.judge_retries, args.judge_concurrency, extra=args.judge_extra or "{}"))
        load_judge()  # now, to find a wrong URL, key or --judge-extra
    scores_of, parts_of = {}, {}  # by metric: scores (folders, n), and those of a reward's parts by name
    answers, unread = {}, {}  # by metric: the margins of the judge's answers, and one answer that is not read
    margins = {}  # "a vs b": those of the pairs of two folders
    singles = [[row] for rows in folders.values() for row in rows]
    for spec, short in zip(args.reward, short_names(args.reward, short_reward)):
        metric, total, parts = f"reward/{short}", 0, {}
        for name, weight in split_reward(spec):
            asked = question if "vlm:" in name else ""
            load = partial(reward_scorer, name, device, asked, folders[first])
            scores = cached(out, f"{identity(name, device)} {asked}", singles, load, args.batch, metric)
            parts[name] = scores.view(-1, n)
            total = total + weight * parts[name]
        scores_of[metric] = total
        parts_of[metric] = dict(zip(short_names(tuple(parts), short_reward), parts.values()))
    for name, short in zip(args.forensic, short_names(args.forensic)):
        metric, who = f"forensic/{short}", f"{identity(name, device)} {args.real_label}"
        load = partial(detector_scorer, name, args.real_label, device)
        scores_of[metric] = cached(out, who, singles, load, args.batch, metric).view(-1, n)
    if args.judge:
        who = f"{identity(args.judge, device)} {args.judge_model} {args.judge_extra}"
        batch = args.batch * (args.judge_concurrency if is_server else 1)
        orders = list(permutations(folders, 2))
        pairs = [[x, y] for a, b in orders for x, y in zip(folders[a], folders[b])]
        for short, asked in [*SINGLE.items(), ("quality", PAIR)]:
            metric, jobs = f"judge/{short}", pairs if asked == PAIR else singles
            load = partial(judge_scorer, load_judge, asked, metric, unread)
            answers[metric] = cached(out, f"{who} {asked}", jobs, load, batch, metric).view(-1, n)
        margins = {f"{a} vs {b}": margin for (a, b), margin in zip(orders, answers["judge/quality"])}
        scores_of |= {f"judge/{short}": answers[f"judge/{short}"].sigmoid() for short in SINGLE}
    metrics = {metric: compare_folders(args.dirs, scores, parts_of.get(metric, {}), prompts, args.bootstrap)
               for metric, scores in scores_of.items()}
    if args.real:
        metric = f"fd/{short_names((args.embed,))[0]}"
        who = f"{identity(args.embed, device)} {sorted(row['hash'] for row in real_rows)}"
        load = partial(distance_scorer, args.embed, real_rows, device, args.batch)
        distances = cached(out, who, list(folders.values()), load, len(folders), metric)
        metrics[metric] = {d: {"mean": distance, "lo": None, "hi": None, "n": n, "n_real": n_real, "nan": 0}
                           for d, distance in zip(folders, distances.clamp_min(0).tolist())}
        if min(n, n_real) < 128:
            print(f"note: {metric} of {n} pictures to {n_real}: so few make it larger than it is, and noisy")

    verdicts = compare_pairs(args.dirs, margins, prompts, args.bootstrap) if margins else {}
    report = {"dirs": args.dirs, "n": n, "note": note, "args": asdict(args), "metrics": metrics,
              "pairs": {"judge/quality": verdicts} if verdicts else {}, "unread": unread}
    report = json.loads(cli.to_json(report))  # with None for NaN, as in the file
    text = table(report)
    read = [x for values in answers.values() for x in values.flatten().tolist() if not math.isnan(x)]
    certain = sum(abs(x) == judge.CERTAIN for x in read)
    text += f"\n\nanswers without probabilities: {certain} of {len(read)}" if certain else ""
    shown = {"dirs": args.dirs, "text": text, "pairs": [[row["name"], row["prompt"]] for row in folders[first]],
             "scores": {f"{metric} {arrow(metric)}": scores.tolist() for metric, scores in scores_of.items()},
             "margins": {name: margin.tolist() for name, margin in margins.items()}}
    cli.write_files({out / "report.json": cli.to_json(report, indent=2) + "\n",
                     out / "report.png": draw_report(folders, report),
                     out / "report.html": page(shown, [[row["file"] for row in rows] for rows in folders.values()])})
    encoding = sys.stdout.encoding or "utf-8"
    signs = {} if "↑".encode(encoding, "ignore") else {ord("↑"): "^", ord("↓"): "v"}  # that the terminal can show
    print(text.translate(signs).encode(encoding, "replace").decode(encoding))


if __name__ == "__main__":
    main(cli.parse(Args, __doc__))
