"""Judge pictures: reward proxies, a vision-language model's verdict, forensic realism, the Frechet distance.

    python eval_judge.py runs/base runs/awm runs/awm+normguard --real runs/renders
    python eval_judge.py A B --reward pickscore hpsv2.1 --judge Qwen/Qwen2.5-VL-7B-Instruct --forensic DETECTOR
    python eval_judge.py A B --judge http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-VL-7B-Instruct   # vLLM, OpenAI

A and B are folders that sample.py wrote with the same prompts and seeds: their pictures are paired. Prints a Markdown
table and writes report.json and report.png. Means carry 95 % bootstrap intervals over prompts, the same draws for all.

judge/quality compares each two folders picture by picture, asked in both orders: where the two answers disagree, it is
a tie. judge/<dimension> is the mean P(yes) of a question about one picture, forensic/<name> the mean P(real) of a
detector (Organika/sdxl-detector, ...). An answer that cannot be read is counted under nan, never scored. Scores are
kept in OUT/scores.jsonl: run again, nothing is asked twice.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "700")  # before torch: threads that wait soon leave a core to other processes

import contextlib
import functools
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, combinations, permutations
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import transformers
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from flow.cli import (
    InputError,
    append,
    check_flags,
    check_model,
    check_place,
    json_text,
    make_dir,
    one_line_errors,
    parse,
    progress,
    quiet_libraries,
    reason,
    write_files,
)
from flow.judge import (
    embed_images,
    frechet_distance,
    http_judge,
    judge_dtype,
    load_embed,
    load_forensic,
    local_judge,
    read_answer,
)
from flow.pictures import load_pictures, png, read_folder
from flow.rewards import load_reward, without_questions

# What the judge is asked. One word answers; only its probability counts.
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

SERVERS = ("http://", "https://")
Folders = dict[str, list[dict]]  # the rows of each
Load = Callable[[], Callable]  # a model, when it is needed
# a line of scores.jsonl, whole or cut short by a kill
SCORE = re.compile(r'\{("[0-9a-f]{0,32}("(: ?([-+.e\d]*\}?)?)?)?)?')


@dataclass
class Args:
    dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders that sample.py wrote, the first one the baseline"""
    reward: tuple[str, ...] = ("tiny/pickscore",)
    """rewards to score with: pickscore, hpsv2.1, clipscore, a CLIPModel folder or hub id, file.py:function, vlm:MODEL,
    or a sum"""
    judge: str | None = "tiny/judge"
    """vision-language model: a folder, hub id, or OpenAI-compatible server http://HOST:PORT/v1; none for no judge"""
    judge_model: str | None = None
    """the model's name on that server"""
    judge_timeout: float = 60.0
    """seconds until a request to the server has failed"""
    judge_retries: int = 3
    """further tries then, after 0.5, 1, 2, ... seconds or when the server says"""
    judge_concurrency: int = 8
    """requests at a time"""
    forensic: tuple[str, ...] = ("tiny/forensic",)
    """detectors of generated pictures: image classifiers, folders or hub ids"""
    real_label: str | None = None
    """their label for a real picture, where its name does not tell"""
    real: str | None = None
    """folder of real pictures (renders): adds the Frechet distance to them"""
    embed: str = "tiny/embed"
    """network whose features the Frechet distance compares"""
    batch: int = 16
    """pictures or questions at once"""
    bootstrap: int = 2000
    """resamples for the 95 % intervals"""
    out: str = "runs/eval"
    """folder for report.json, report.png and scores.jsonl"""


def pair_folders(dirs: tuple[str, ...]) -> Folders:
    """Each folder's rows, in one order: the prompts and seeds that all folders have."""
    if not dirs:
        raise InputError("give the folders to compare, as sample.py writes them, before the flags")
    seen = {}
    for d in dirs:
        if (real := Path(d).resolve()) in seen:
            raise InputError(f"{seen[real]} and {d}: are one folder, given twice")
        seen[real] = d
    folders = {d: {row["key"]: row for row in read_folder(d)} for d in dirs}
    common = [key for key in folders[dirs[0]] if all(key in rows for rows in folders.values())]
    if not common:
        raise InputError(f"{dirs[0]}: no prompt and seed is in all folders; sample them with the same --prompts, --n "
                         "and --seed")
    for d, rows in folders.items():
        if len(common) < len(rows):
            print(f"note: {len(common)} of the {len(rows)} pictures in {d} are in all folders; the others are left out")
    folders = {d: [rows[key] for key in common] for d, rows in folders.items()}
    wide, high = folders[dirs[0]][0]["size"]
    for row in chain(*folders.values()):
        w, h = row["size"]
        if (w, h) != (wide, high):
            raise InputError(f"{row['file']}: is {w}x{h}, others are {wide}x{high}; compare pictures of one size")
    return folders


def identity(name: str, device: torch.device) -> str:
    """What a score depends on besides the picture: a model's name; of a folder or file, its sizes and times; and of a
    model that runs here, the device, its precision and the libraries."""
    here = f"{device.type} {judge_dtype(device)} torch {torch.__version__} transformers {transformers.__version__}"
    paths = [Path(part.split(":")[0]) for part in without_questions(name).split(",")]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    known = [name, *(f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in files)]
    return " ".join(known if name.startswith(SERVERS) else [*known, here])


def check_out(out: Path):
    """Refuse a folder that holds anything of our names that is not of this script: it would be overwritten."""
    scores, report, picture = (out / name for name in ("scores.jsonl", "report.json", "report.png"))
    read_scores(scores)
    try:
        ours = not report.exists() or {"dirs", "metrics", "pairs"} <= json.loads(report.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise InputError(f"{report}: was not written by eval_judge.py; move it, or give another --out")
    if picture.exists() and not (picture.is_file() and scores.exists()):
        raise InputError(f"{picture}: was not written by eval_judge.py; move it, or give another --out")


def read_scores(file: Path) -> tuple[str, dict[str, float]]:
    """scores.jsonl as it is, and the scores in it by their keys."""
    try:
        text = file.read_text() if file.exists() else ""
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read ({reason(e)}); move it, or give another --out")
    known = {}
    for line in filter(None, text.splitlines()):
        if not SCORE.fullmatch(line):
            raise InputError(f"{file}: was not written by eval_judge.py; move it, or give another --out")
        with contextlib.suppress(ValueError):  # a line that was cut short
            known |= json.loads(line)
    return text, known


def cached(out: Path, jobs: dict[str, object], load: Load, batch: int, desc: str) -> dict[str, float]:
    """Each job's score by its key, from OUT/scores.jsonl or else by load()(jobs) and added to it batch by batch. A NaN
    is not kept: the next run tries again. Jobs go in the order of their keys: the order of folders changes nothing."""
    text, known = read_scores(out / "scores.jsonl")
    missing = sorted(key for key in jobs if key not in known)
    score = load() if missing else None  # a model is loaded where a score is missing, and let go after
    end = "" if text.endswith("\n") or not text else "\n"  # of a line that was cut short
    for i in progress(range(0, len(missing), batch), desc=desc, leave=False) if missing else ():
        keys = missing[i:i + batch]
        scores = dict(zip(keys, score([jobs[k] for k in keys])))
        known |= scores
        finite = {key: value for key, value in scores.items() if math.isfinite(value)}
        make_dir(str(out), "--out")  # no sooner: nothing is made for a model that cannot be loaded
        append(out / "scores.jsonl", end + "".join(json.dumps({key: value}) + "\n" for key, value in finite.items()))
        end = ""
    return {key: known[key] for key in jobs}


def key(*what) -> str:
    """A job's key: a hash of all that its score depends on."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def summary(values: Tensor, prompts: list[str], draws: int) -> dict:
    """Mean of (k,) values, how many are NaN and left out, and its 95 % interval by resampling prompts with all their
    pictures (pictures, if there is but one prompt; none of a single one)."""
    known = ~values.isnan()
    units = prompts if len(set(prompts)) > 1 else range(len(prompts))
    units = [unit for unit, k in zip(units, known) if k]
    result = {"mean": None, "lo": None, "hi": None, "n": len(units), "nan": len(values) - len(units)}
    if not units:
        return result
    values, place = values[known].double(), {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    result["mean"] = values.mean().item()
    if len(place) > 1:
        where, zeros = torch.tensor([place[unit] for unit in units]), torch.zeros(len(place), dtype=torch.float64)
        sums, counts = zeros.index_add(0, where, values), zeros.index_add(0, where, torch.ones_like(values))
        drawn = torch.randint(len(place), (draws, len(place)), generator=torch.Generator().manual_seed(0))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        result["lo"], result["hi"] = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return result


def score_rows(out: Path, folders: Folders, who: str, load: Load, batch: int, desc: str) -> dict[str, Tensor]:
    """Each folder's scores, (n,) float64, of a model that `who` tells from all others; load() is its score(rows)."""
    keys = {d: [key(who, row["prompt"], row["hash"]) for row in rows] for d, rows in folders.items()}
    jobs = {k: row for d, rows in folders.items() for k, row in zip(keys[d], rows)}
    known = cached(out, jobs, load, batch, desc)
    return {d: torch.tensor([known[k] for k in ks], dtype=torch.float64) for d, ks in keys.items()}


def compare_pairs(judge: Load, who: str, folders: Folders, draws: int, batch: int, out: Path) -> dict:
    """Each two folders compared by PAIR in both orders; counts and the rate (a tie is half) are the first one's."""
    def load() -> Callable:
        """score([[file, file], ...]): the margin of the first over the second."""
        ask = judge()
        return lambda files: [read_answer(top, "A", "B") for top in ask(PAIR, files)]

    def margins(first: str, second: str) -> Tensor:
        """Of a folder, shown as A, over another, shown as B."""
        keys = [key(who, x["hash"], y["hash"]) for x, y in zip(folders[first], folders[second])]
        return torch.tensor([known[k] for k in keys], dtype=torch.float64)

    both = chain(*(zip(folders[a], folders[b]) for a, b in permutations(folders, 2)))
    jobs = {key(who, x["hash"], y["hash"]): [x["file"], y["file"]] for x, y in both}
    known = cached(out, jobs, load, batch, "judge/quality")
    pairs = {}
    for a, b in combinations(folders, 2):
        there, back = margins(a, b), margins(b, a)
        nan, win, loss = (there + back).isnan(), (there > 0) & (back < 0), (there < 0) & (back > 0)
        score = torch.where(nan, torch.nan, 0.5 + 0.5 * (win.double() - loss.double()))
        counts = {name: int((score == s).sum()) for name, s in (("win", 1), ("tie", 0.5), ("loss", 0))}
        rate = summary(score, [row["prompt"] for row in folders[a]], draws)
        margin = None if nan.all() else ((there - back) / 2)[~nan].mean().item()
        pairs[f"{a} vs {b}"] = {**counts, "nan": rate["nan"], "rate": rate["mean"], "lo": rate["lo"], "hi": rate["hi"],
                                "margin": margin}
    return pairs


def arrow(name: str) -> str:
    """Which way a metric is better."""
    return "↓" if name.startswith("fd/") or name.startswith("judge/") and name != "judge/overall" else "↑"


def short_names(paths: tuple[str, ...]) -> list[str]:
    """The last part of each path or model id, or all of it where two would be alike. A sum of rewards has parts."""
    short = [",".join(part.rstrip("/").split("/")[-1] for part in without_questions(path).split(",")) for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def draw_report(folders: Folders, metrics: dict, pairs: dict, columns: int = 12) -> bytes:
    """A PNG: a row of pictures per folder, a column per prompt (its first picture); bars per metric; the judge's
    verdicts."""
    dirs, prompts = list(folders), [row["prompt"] for row in next(iter(folders.values()))]
    names = dict(zip(dirs, short_names(dirs)))
    colour = {d: matplotlib.colormaps["tab10"](i % 10) for i, d in enumerate(dirs)}
    first = [prompts.index(p) for p in list(dict.fromkeys(prompts))[:columns]]
    wide = min(5, len(metrics))
    rows = -(-len(metrics) // wide)
    high = [1.02 * len(dirs), rows * (0.22 * len(dirs) + 0.6)] + ([0.3 * len(pairs) + 0.4] if pairs else [])
    figure = Figure(figsize=(max(len(first), 8) + 1.2, sum(high) + 0.3), layout="constrained")
    strip, bars, *verdicts = figure.subfigures(len(high), 1, height_ratios=high)
    tiles = torch.stack([load_pictures([folders[d][i]["file"] for i in first]) for d in dirs])
    h, w = tiles.shape[-2:]
    gap = -(-w // 16)
    tiles = torch.nn.functional.pad(tiles, (0, gap, 0, gap), value=1)
    sheet = rearrange(tiles, "d k c h w -> (d h) (k w) c")[:-gap, :-gap]  # one picture: many axes are slow to draw
    axis = strip.subplots()
    axis.imshow(sheet.numpy())
    axis.set_yticks([i * (h + gap) + h / 2 for i in range(len(dirs))], list(names.values()), fontsize=9)
    titles = ["\n".join(textwrap.wrap(prompts[i], 16)[:2]).replace("$", r"\$") for i in first]
    axis.set_xticks([i * (w + gap) + w / 2 for i in range(len(first))], titles, fontsize=7)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)

    charts = bars.subplots(rows, wide, squeeze=False, sharey=True).flatten()
    for axis, (name, scores) in zip(charts, metrics.items()):
        mean, lo, hi = np.array([[scores[d][k] for k in ("mean", "lo", "hi")] for d in dirs], dtype=float).T
        error = np.nan_to_num([mean - lo, hi - mean]).clip(0)
        axis.barh(list(names.values()), mean, xerr=error, color=colour.values(), height=0.75, error_kw={"linewidth": 1})
        lost = sum(m["nan"] for m in scores.values())
        axis.set_title(f"{name} {arrow(name)}" + (f" ({lost} not read)" if lost else ""), fontsize=9)
        axis.tick_params(labelsize=8)
    charts[0].invert_yaxis()
    if pairs:
        draw_verdicts(verdicts[0].subplots(), pairs, names, colour)
    for axis in figure.axes:
        axis.spines[["top", "right"] if axis in charts[:len(metrics)] else list(axis.spines)].set_visible(False)
        axis.set_visible(axis not in charts[len(metrics):])
    return png(figure, 130)


def draw_verdicts(axis, pairs: dict, names: dict[str, str], colour: dict):
    """A bar per two folders: how many pictures of each the judge preferred."""
    both = list(combinations(names, 2))
    for i, ((a, b), said) in enumerate(zip(both, pairs.values())):
        left, n = 0, sum(said[count] for count in ("win", "tie", "loss", "nan"))
        what = {"win": (names[a], colour[a]), "tie": ("tie", "lightgray"), "loss": (names[b], colour[b]),
                "nan": ("not read", "white")}
        for count, (name, shade) in what.items():
            label = f"{name} {said[count]}" if said[count] > 0.06 * n else said[count] or ""
            axis.barh(i, said[count], left=left, color=shade, height=0.75)
            axis.text(left + said[count] / 2, i, label, ha="center", va="center", fontsize=8, clip_on=True)
            left += said[count]
    labels = [f"{names[a]} vs {names[b]}" for a, b in both]
    axis.set(yticks=range(len(both)), yticklabels=labels, xticks=[], xlim=(0, n))
    axis.set_title("judge/quality: pictures preferred, whichever is shown first", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()


def table(dirs: tuple[str, ...], metrics: dict, pairs: dict) -> str:
    """The report in Markdown."""
    lines = ["| metric | " + " | ".join(dirs) + " |", "|---|" + "---|" * len(dirs)]
    for name, scores in metrics.items():
        cells = []
        for m in (scores[d] for d in dirs):
            cell = "-" if m["mean"] is None else f"{m['mean']:.4f}"
            cell += f" [{m['lo']:.4f}, {m['hi']:.4f}]" if m["lo"] is not None else ""
            cells.append(cell + (f" ({m['nan']} of {m['n'] + m['nan']} not read)" if m["nan"] else ""))
        lines.append(f"| {name} {arrow(name)} | " + " | ".join(cells) + " |")
    if pairs:
        lines += ["", "| judge/quality | win | tie | loss | not read | rate |", "|---|---|---|---|---|---|"]
    for name, m in pairs.items():
        rate = "-" if m["rate"] is None else f"{m['rate']:.3f}"
        rate += f" [{m['lo']:.3f}, {m['hi']:.3f}]" if m["lo"] is not None else ""
        lines.append(f"| {name} | {m['win']} | {m['tie']} | {m['loss']} | {m['nan']} | {rate} |")
    return "\n".join(lines)


def reward_of(spec: str, device: torch.device) -> Callable:
    """score(rows) of a reward."""
    reward = load_reward(spec, device)
    return lambda rows: reward(load_pictures([row["file"] for row in rows]), [row["prompt"] for row in rows]).tolist()


def realism_of(spec: str, real_label: str | None, device: torch.device) -> Callable:
    """score(rows) of a detector."""
    detector = load_forensic(spec, real_label, device)
    return lambda rows: detector([row["file"] for row in rows]).tolist()


def margin_of(judge: Load, question: str) -> Callable:
    """score(rows) of a judge: log P(yes) - log P(no)."""
    ask = judge()
    return lambda rows: [read_answer(top, "yes", "no") for top in ask(question, [[row["file"]] for row in rows])]


def distance_of(args: Args, folders: Folders, real_rows: list[dict], device: torch.device) -> Callable:
    """score(dirs): the Frechet distances of folders to the real pictures."""
    embed = load_embed(args.embed, device)

    def features(rows: list[dict]) -> Tensor:
        """Of pictures that may differ in size: (n, d)."""
        parts = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)]
        parts = progress(parts, desc="features", leave=False)
        return torch.cat([embed_images(embed, [load_pictures([row["file"]])[0] for row in part]) for part in parts])

    real = features(real_rows)
    return lambda dirs: [frechet_distance(features(folders[d]), real) for d in dirs]


@one_line_errors()
def main(args: Args):
    """Compare folders."""
    quiet_libraries()
    check_flags(args, {"bootstrap": 1, "batch": 1, "judge_concurrency": 1, "judge_retries": 0, "judge_timeout": 1e-3})
    check_place(args.out, "--out", ("scores.jsonl", "report.json", "report.png"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = pair_folders(args.dirs)
    real_rows = read_folder(args.real, plain=True) if args.real else []
    prompts = [row["prompt"] for row in folders[args.dirs[0]]]
    n, n_real = len(prompts), len(real_rows)
    if args.real and min(n, n_real) < 2:
        raise InputError(f"--real {args.real}: a Frechet distance takes at least two pictures, here {n} against "
                         f"{n_real}")
    args.judge = None if args.judge in (None, "none", "None") else args.judge
    if not (args.reward or args.forensic or args.judge or args.real):
        raise InputError("nothing to compare by: give --reward, --judge, --forensic or --real")
    server = bool(args.judge) and args.judge.startswith(SERVERS)
    if args.judge and not server:
        check_model("--judge", args.judge, "http://HOST:PORT/v1, ")
    if server and not args.judge_model:
        raise InputError(f"--judge {args.judge}: give the model's name on that server as --judge-model")
    tiny = [name for name in (args.judge, *args.forensic, *args.reward) if name and name.startswith("tiny/")]
    if tiny and folders[args.dirs[0]][0]["size"] != (64, 64):
        print(f"note: {', '.join(tiny)} know only the miniature's 64x64 pictures; what they say of these means little")
    out = Path(args.out)
    check_out(out)
    values, metrics, pairs = {}, {}, {}

    judge = functools.partial(local_judge, args.judge, device)
    if server:
        judge = functools.partial(http_judge, args.judge, args.judge_model, args.judge_timeout, args.judge_retries,
                                  args.judge_concurrency)
    judge = functools.cache(judge)  # ask(question, pictures), loaded once
    for spec, short in zip(args.reward, short_names(args.reward)):
        name, load = f"reward/{short}", functools.partial(reward_of, spec, device)
        values[name] = score_rows(out, folders, identity(spec, device), load, args.batch, name)
    for spec, short in zip(args.forensic, short_names(args.forensic)):
        name, load = f"forensic/{short}", functools.partial(realism_of, spec, args.real_label, device)
        values[name] = score_rows(out, folders, f"{identity(spec, device)} {args.real_label}", load, args.batch, name)
    if args.judge:
        who = f"{identity(args.judge, device)} {args.judge_model}"
        batch = args.batch * (args.judge_concurrency if server else 1)
        for short, question in SINGLE.items():
            name, load = f"judge/{short}", functools.partial(margin_of, judge, question)
            margin = score_rows(out, folders, f"{who} {question}", load, batch, name)
            values[name] = {d: m.sigmoid() for d, m in margin.items()}
        pairs = compare_pairs(judge, f"{who} {PAIR}", folders, args.bootstrap, batch, out)

    for name, by_folder in values.items():
        metrics[name] = {d: summary(v, prompts, args.bootstrap) for d, v in by_folder.items()}
        for d in args.dirs[1:]:  # paired: the same prompts and noise
            diff = summary(by_folder[d] - by_folder[args.dirs[0]], prompts, args.bootstrap)
            metrics[name][d]["diff"] = {k: diff[k] for k in ("mean", "lo", "hi")}
    if args.real:
        name, real_hashes = f"fd/{short_names((args.embed,))[0]}", sorted(row["hash"] for row in real_rows)
        who = identity(args.embed, device)
        keys = {d: key(who, sorted(row["hash"] for row in rows), real_hashes) for d, rows in folders.items()}
        load = functools.partial(distance_of, args, folders, real_rows, device)
        fd = cached(out, {k: d for d, k in keys.items()}, load, len(keys), name)
        metrics[name] = {d: {"mean": fd[k], "lo": None, "hi": None, "n": n, "nan": 0} for d, k in keys.items()}
        if n < 128 or n_real < 128:
            print(f"note: {name} of {n} pictures to {n_real}: so few make it larger than it is, and noisy")

    metrics, pairs = (json.loads(json_text(numbers)) for numbers in (metrics, pairs))  # None for NaN, as in the file
    report = {"dirs": list(args.dirs), "n": n, "args": asdict(args), "metrics": metrics,
              "pairs": {"judge/quality": pairs} if pairs else {}}
    picture = draw_report(folders, metrics, pairs)
    write_files({out / "report.json": json_text(report, indent=2) + "\n", out / "report.png": picture})
    print(table(args.dirs, metrics, pairs))


if __name__ == "__main__":
    main(parse(Args, __doc__))
