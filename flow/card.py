"""The model card that stands beside a LoRA."""
import shlex
from dataclasses import fields

from flow.cli import write_files


def write_card(run):
    """lora/README.md: a model card as the hub expects it; the licence is the user's to choose."""
    args, flags = run.args, []
    for field in fields(args):
        value, flag = getattr(args, field.name), field.name.replace("_", "-")
        if value != field.default:
            words = value if isinstance(value, tuple) else [value]
            switch = f"--{flag}" if value else f"--no-{flag}"
            flags.append(switch if isinstance(value, bool) else shlex.join([f"--{flag}", *map(str, words)]))
    prompts = "\n".join(f"- {prompt}" for prompt in dict.fromkeys(run.eval_prompts[:4]))
    text = f"""---
base_model: {args.model}
library_name: diffusers
tags: [lora, diffusers, normguard, {run.name}]
---
A LoRA of rank {args.rank} for `{args.model}` (`pipe.load_lora_weights(FOLDER)`), trained for the reward
`{args.reward}` with {run.name.upper()} and NormGuard (arXiv 2606.27771), lam {args.lam}:

    python train_{run.name}.py {" ".join(flags)}

Prompts to try:

{prompts}
"""
    write_files({run.out / "lora" / "README.md": text})
