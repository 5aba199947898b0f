"""Wrong updates, and which test sees each. A mutant that survives is a fault that no test would see.

    python tests/mutants.py                     # all, a quarter of an hour; number 0 is no change: all tests must pass
    python tests/mutants.py --only 3 17

Each is applied alone, to a copy of the checkout, and its tests run until one fails. No test itself: it changes code."""
import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # name: files and -k of pytest. A mutant lists the names of those that are to see it, the quickest first
    "method": "test_normguard.py tests/test_draws.py -k 'not train_'",
    "reference": "tests/test_reference.py",
    "nft": "test_normguard.py -k '(updates_are or steps_are_adamw) and train_nft'",
    "awm": "test_normguard.py -k '(updates_are or steps_are_adamw) and train_awm'",
    "dpo": "test_normguard.py -k '(updates_are or steps_are_adamw) and train_dpo'",
    "training": "tests/test_training.py -k 'rollouts or ten_bad or steps_means or kept_everything'",
    "nonfinite": "tests/test_training.py -k nonfinite",
    "evaluate": "tests/test_evaluate.py",
    "metadata": "tests/test_rewards.py -k metadata",
    "normalized": "tests/test_rewards.py -k 'deviations or normalized'",
    "dicts": "tests/test_rewards.py -k dict",
    "ocr": "tests/test_rewards.py -k 'ocr or aesthetic'",
    "sample": "tests/test_sample.py tests/test_pipeline.py -k 'norms_and_renorm or sample_is_plain or schedule_is'",
    "resume": "tests/test_run.py -k 'twins_resume or killed_runs or extended'",
    "precision": "tests/test_lora.py -k 'merged or swapped or draws'",
    "files": "tests/test_lora.py -k 'metadata or each_format or warm_start or conversion or ends_another'",
    "processes": "tests/test_distributed.py -k 'everything_once or in_order or summed'",
    "pictures": "tests/test_pictures.py",
    "folders": "tests/test_eval_judge.py -k 'others or prompts_of or fewer or named_after or stands_alone'",
    "two": "tests/test_distributed.py -k two_processes",
    "judge": "tests/test_judge.py",
    "judged": "tests/test_eval_judge.py -k 'probabilities or not_read'",
}
MUTANTS = [  # file, old text (once in it), new text, tests
    # the seven
    ("train_awm.py", "v.detach() if u == 0 else v_olds[rows[0].item()].to(device)", "v.detach()", "awm"),
    ("train_nft.py", "r = 0.5 + 0.5 * draws", "r = 0.5 + 0.25 * draws", "nft"),
    ("train_dpo.py", "rewards[w] - rewards[l] > draws.rounding(rewards)", "rewards[w] >= rewards[l]", "dpo"),
    ("train_dpo.py", "epoch, rows, both,", "epoch, torch.cat([rows, rows + 99]), both,", "dpo"),
    ("train_dpo.py", "(loss.sum() / len(update)).backward()", "loss.mean().backward()", "dpo"),
    ("train_awm.py", "(params, args.max_grad_norm)", "(params, 1e9)", "awm"),
    ("train_awm.py", "sigmas[draws.stratified_steps(", "sigmas[1 + draws.stratified_steps(", "awm"),
    # the guard
    ("normguard.py", "vector_norm(v.float().flatten(1), dim=1)", "vector_norm(v.flatten(1), dim=1).float()", "method"),
    ("normguard.py", "velocity_norm(v_ref.detach())", "velocity_norm(v_ref)", "method"),
    ("normguard.py", "- (1.0 + margin))", "- 1.0)", "method"),
    ("normguard.py", "- radial.clamp_max(0)", "- radial", "method"),
    ("normguard.py", "longer = norm_ratio(v, v_ref) > 1.0 + margin", "longer = norm_ratio(v, v_ref) > 1.0", "method"),
    ("normguard.py", "(g, inner, v_ref, margin, c)", "(g, inner, v_ref, 0.0, c)", "method"),
    ("normguard.py", "scale = scale.clamp_max(1.0)", "scale = scale.clamp_min(1.0)", "method sample"),
    ("normguard.py", "= disabled or not kept", "= True", "reference"),
    ("normguard.py", "m.training = False", "pass", "reference"),
    ("normguard.py", "no_grad():\n            yield", "enable_grad():\n            yield", "reference"),
    ("normguard.py", "    finally:", "    except ZeroDivisionError:\n        pass\n    else:", "reference"),
    ("normguard.py", "m._active_adapter = disabled, active", "m._active_adapter = False, active", "reference"),
    # the losses
    ("train_awm.py", "-t.float() / power", "-1 / power", "method"),
    ("train_awm.py", "log_prob(v_old.detach())", "log_prob(v_old)", "method"),
    ("train_awm.py", "torch.maximum(-adv", "torch.minimum(-adv", "method"),
    ("train_awm.py", "ratio.clamp(1 - clip, 1 + clip)", "ratio", "method"),
    ("train_nft.py", "error.detach().abs()", "error.abs()", "method"),
    ("train_nft.py", "v_old.detach(), x0", "v_old, x0", "method"),
    ("train_nft.py", "(1 + beta) * v_old - beta * v", "(1 - beta) * v_old - beta * v", "method"),
    ("train_dpo.py", "-beta / 2 * (w - l)", "-beta * (w - l)", "method"),
    ("train_dpo.py", "error(v_ref_l.detach(), target_l)", "error(v_ref_w.detach(), target_w)", "method"),
    # the scripts
    ("train_awm.py", "args.group, args.adv_clip)", "args.group, 5.0)", "awm training"),
    ("train_awm.py", "*inputs, batch[\"adv\"], args.power)", "*inputs, batch[\"adv\"])", "awm training"),
    ("flow/draws.py", "[prompts[i] for i in picture]", "[prompts[0] for i in picture]", "awm"),
    ("train_awm.py", "guard = norm_hinge(vg, vg_ref, args.margin)", "guard = norm_hinge(vg, vg_ref)", "awm"),
    ("train_awm.py", "vg_ref = v_ref if guided is None else velocity(*given, guided)", "vg_ref = v_ref", "awm"),
    ("train_dpo.py", "vg = v if guided is None else velocity(*given, guided)", "vg = v", "dpo"),
    ("train_awm.py", "oppose(v, v_ref, args.margin)", "oppose(v, v_ref)", "awm"),
    ("train_nft.py", "lam * guard + args.kl * kl", "lam * guard", "nft"),
    ("train_nft.py", "if u == 0 and decay == 0:", "if u == 0:", "nft"),
    ("train_nft.py", "no_grad(), old_policy(pipe.transformer)", "no_grad()", "nft"),
    ("train_nft.py", "with old_policy(pipe.transformer):\n            x0", "if True:\n            x0", "nft training"),
    ("train_nft.py", "decay * q + (1 - decay) * p", "decay * p + (1 - decay) * q", "nft"),
    ("train_dpo.py", "two=2).mean(0)\n                ratio", "two=2).sum(0)\n                ratio", "dpo"),
    ("train_dpo.py", "torch.sigmoid(torch.randn(len(pair)", "(torch.rand(len(pair)", "dpo"),
    ("train_awm.py", "min((2 + step) / (11 + step), args.ema)", "args.ema", "awm"),
    ("train_awm.py", "skipped_in_a_row = 0 if finite else skipped_in_a_row + 1", "skipped_in_a_row += not finite",
     "training"),
    ("train_awm.py", "    if finite:\n", "    if True:\n", "nonfinite"),
    # what is drawn
    ("flow/draws.py", "by_group.mean(1, keepdim=True)", "by_group.mean(0, keepdim=True)", "method"),
    ("flow/draws.py", "purpose, epoch, int(row)", "purpose, 0, int(row)", "awm"),
    ("flow/draws.py", "rng(seed, purpose,", "rng(seed, TRAINING,", "awm training"),
    ("flow/draws.py", "rng(args.seed, PROMPTS, i)", "rng(args.seed, PROMPTS, 0)", "method awm"),
    ("flow/draws.py", "linspace(0, trained_steps, strata", "linspace(0, trained_steps - 1, strata", "method"),
    ("train_nft.py", "args.steps, generator=g).argsort(1)", "args.steps).argsort(1)", "nft"),
    ("flow/draws.py", "<= rounding(reward)).float()", "<= 0).float()", "method awm"),
    # several processes
    ("flow/distributed.py", "slice(n * RANK // PROCESSES,", "slice(n * RANK // PROCESSES + (RANK > 0),",
     "processes two"),
    ("flow/distributed.py", "flat[len(params):].split(", "(flat[len(params):] / PROCESSES).split(", "processes two"),
    ("flow/distributed.py", "torch.cat(all_gather(x.cpu()))", "torch.cat(all_gather(x.cpu())[::-1])", "processes two"),
    ("flow/distributed.py", "for total in totals if name in total", "for total in totals[:1] if name in total",
     "training two"),
    # the checkpoint
    ("flow/run.py", "optimizer.load_state_dict(saved[\"opt\"])", "pass", "training resume"),
    ("flow/run.py", "\"bad\": skipped_in_a_row", "\"bad\": 0", "training"),
    ("flow/run.py", "\"ema\": ema,", "\"ema\": params,", "training"),
    ("train_nft.py", "ema=ema, old=old_params)", "ema=None, old=old_params)", "training resume"),
    ("flow/run.py", "saved[\"step\"], saved[\"skipped\"], saved[\"bad\"]", "0, 0, 0", "training resume"),
    ("flow/run.py", "log.truncate(saved[\"log_bytes\"] if saved else 0)", "pass", "training resume"),
    ("flow/run.py", "x.data.copy_(value)", "pass", "training resume"),
    ("train_nft.py", "decay = old_decay(step, *args.old_decay)  #", "decay = 0  #", "training resume"),
    # the LoRA, the pipeline
    ("flow/lora.py", "lora_alpha=2 * rank", "lora_alpha=rank", "awm"),
    ("flow/lora.py", "[layer.get_delta_weight(name)", "[0.5 * layer.get_delta_weight(name)", "sample"),
    ("flow/lora.py", "if layer.disable_adapters:", "if False:", "sample"),
    ("flow/lora.py", "p.data = data\n", "pass\n", "awm"),
    ("flow/lora.py", "torch.Tensor and w.dtype == torch.float32", "torch.Tensor", "precision"),
    ("flow/lora.py", "data.copy_(b / 2)", "data.copy_(b)", "files"),
    ("flow/lora.py", "rank**0.5 if config.get", "1 if config.get", "files"),
    ("flow/lora.py", "converted if torch.isclose(kept, whole, rtol=1e-6, atol=0) else lora", "converted", "files"),
    ("flow/lora.py", "(2 * value if", "(value if", "files"),
    ("flow/lora.py", "if configs else whole_names or", "if configs else list(initial) or", "files"),
    ("flow/pipeline.py", "torch.lerp(x0, noise,", "torch.lerp(noise, x0,", "awm"),
    ("flow/pipeline.py", "x = x + dts[i] * v", "x = x - dts[i] * v", "sample"),
    ("flow/pipeline.py", "sigmas.diff().tolist()", "[*sigmas.diff().tolist()[:-1], 0.0]", "sample"),
    ("flow/pipeline.py", "[\"\"], steps, set_timesteps)", "[\"\"], steps + 1, set_timesteps)", "awm"),
    ("flow/intercept.py", "[timestep(pipe, level) for level", "[timestep(pipe, level) / 1000 for level", "awm"),
    # the rewards, the evaluation
    ("flow/rewards.py", "sum(weight * scores[name] for", "sum(scores[name] for", "evaluate"),
    ("flow/rewards.py", "images[i:i + batch].clone()", "images[i:i + batch]", "evaluate"),
    ("flow/rewards.py", "prompts[i:i + batch],", "prompts[:len(images[i:i + batch])],", "evaluate"),
    ("flow/rewards.py", "metadata[i:i + batch])", "metadata[:batch])", "metadata"),
    ("flow/evaluate.py", "[\"metadata\"]) for i in rows]", "[\"metadata\"]) for i in range(len(rows))]", "evaluate"),
    ("flow/evaluate.py", "manual_seed(seed) for", "manual_seed(seed + epoch) for", "evaluate"),
    ("train_awm.py", "swapped(params, ema)", "swapped(params, None)", "evaluate"),
    ("flow/evaluate.py", "ratios.mean(0)", "ratios.amax(0)", "evaluate"),
    ("flow/evaluate.py", "ratio_by_step.max().item()", "ratio_by_step[-1].item()", "evaluate"),
    ("flow/pictures.py", "(top - low) / top.clamp_min(1e-3)", "(top - low)", "evaluate"),
    ("flow/rewards.py", "variances[0] / (epoch + 1)", "variances[0]", "normalized"),
    ("train_awm.py", "reward.weighted(scores / deviations)", "reward.weighted(scores)", "normalized"),
    ("train_dpo.py", "optimizer, variances=variances, ema=ema)", "optimizer, ema=ema)", "normalized"),
    ("flow/rewards.py", "sorted(scores.keys() - {key}, key=str))", "[])", "dicts"),
    ("flow/rewards.py", "0 if wanted in found else ", "", "ocr"),
    ("flow/rewards.py", "clip.head(out.image_embeds)", "clip.head(out.text_embeds)", "ocr"),
    # the judge, the detector
    ("flow/judge.py", "top.append((text, own if own > -100 else math.nan))", "pass", "judge"),
    ("flow/judge.py", "max((end.end() for end in CLOSES.finditer(text)), default=0)", "0", "judge"),
    ("flow/judge.py", "jobs[:0 if \"\" in told else 3]", "jobs[:0]", "judge"),
    ("flow/judge.py", "else logits.sigmoid()", "else logits.softmax(1)", "judge"),
    ("eval_judge.py", "abs(x) == judge.CERTAIN", "abs(x) > 20", "judged"),
    # the log
    ("flow/distributed.py", "(t * BINS).long()", "(t * BINS).round().long()", "awm"),
    ("train_awm.py", "square - mean ** 2", "square - 1", "awm"),
    ("train_awm.py", "n * (u + 1) / args.updates", "n", "evaluate"),
    ("train_awm.py", "(policy_ratio - 1).abs() > CLIP", "policy_ratio > CLIP", "awm"),
    ("train_nft.py", "(v.detach() - v_old).square()", "(v.detach() - v_old).abs()", "nft"),
    ("train_dpo.py", "\"accuracy\": weight *", "\"accuracy\": differ_b *", "dpo"),
    ("train_dpo.py", "\"margin\": weight * logit", "\"margin\": logit", "dpo"),
    # pictures and folders
    ("flow/pictures.py", "values >> 8", "values", "pictures"),
    ("flow/pictures.py", "        elif on_white:\n", "        elif False:\n", "pictures"),
    ("flow/pictures.py", "ImageOps.exif_transpose(opened)", "opened", "pictures"),
    ("flow/pictures.py", ".replace(\"<\", \"\\\\u003c\")", "", "folders"),
    ("flow/pictures.py", "notes[f\"not read ({kind})\"] += 1", "pass", "pictures"),
    ("eval_judge.py", "key=natural)", "key=str)", "folders"),
    ("eval_judge.py", "and len(known) >= 8", "", "folders"),
]


def run(copy: Path, tests: list[str]) -> str | None:
    """The first test that fails, or None."""
    for name in tests:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(TESTS[name])]
        try:
            ended = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"the time limit, in {TESTS[name]}"
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", ended.stdout, re.MULTILINE)
        if ended.returncode:
            return failed[1] if failed else f"exit code {ended.returncode} of pytest, in {TESTS[name]}"
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, nargs="+", default=range(len(MUTANTS) + 1))
    survived, only = [], parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        without = shutil.ignore_patterns(".git", "__pycache__", "runs")
        copy = shutil.copytree(ROOT, Path(folder) / "copy", ignore=without)
        for k in only:
            file, old, new, tests = MUTANTS[k - 1] if k else ("normguard.py", "import torch\n", "import torch\n", "")
            text = (copy / file).read_text()
            if text.count(old) != 1:
                sys.exit(f"{k}: {old!r} occurs {text.count(old)} times in {file}; it must once")
            (copy / file).write_text(text.replace(old, new))
            killer = run(copy, tests.split() if k else list(TESTS))
            (copy / file).write_text(text)
            survived += [k] if killer is None else []
            print(f"{k:3d} {file}: {old!r} -> {new!r}: {f'killed by {killer}' if killer else 'SURVIVED'}", flush=True)
    changed = [k for k in only if k]
    print(f"{len(changed)} mutants, {len([k for k in changed if k not in survived])} killed; survived: "
          f"{', '.join(str(k) for k in survived if k) or 'none'}")


if __name__ == "__main__":
    main()
