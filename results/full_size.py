"""What an iteration costs at full size: OpenVLA-7B and OpenVLA-OFT with random weights, written in the official layout, through the scripts themselves.

    python results/full_size.py --folder DIR     # one GPU of 80 GB, a minute a job; 32 GB of room in DIR; writes results/full_size.csv

Episodes of tabletop-object are cut to 16 steps, and evaluation is left out: it is time and memory that are measured, not success (random weights have none).  So that
GRPO has something to learn from, every other episode counts as solved.  The teacher is the student with another lm_head.  Each job runs two iterations, the first
warms up; "-resumed" goes on with a copy of the run before it.  Memory is what torch had allocated at most.
"""
import argparse
import csv
import gc
import importlib
import json
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algos")]
import envs
import sft

STEPS = 16
PEFT = dict(lora_rank=32, dtype="bfloat16", adam_eps=1e-8, temperature=1.6)                 # the README's flags at 7 B
COMMON = dict(PEFT, num_iterations=2, learning_rate=1e-4, micro_batch_size=8, query_batch_size=32, updates_per_rollout=4)
GROUPS = dict(batch_prompts=8, group_size=2, num_envs=16)                                    # 16 episodes
CHUNKS = dict(batch_prompts=64, group_size=2, num_envs=64)                                   # the same number of queries, of 8 steps each
JOBS = {                                                                                     # name: (script, checkpoint, flags)
    "opd": ("vla_opd", "autoregressive", GROUPS), "opd-oft": ("vla_opd", "parallel", CHUNKS),
    "opd-oft-resumed": ("vla_opd", "parallel", dict(CHUNKS, num_iterations=3, resume=True)),
    "grpo-oft": ("grpo", "parallel", CHUNKS), "ppo": ("ppo", "autoregressive", dict(num_episodes=16, num_envs=16)),
    "road": ("road_vla", "autoregressive", dict(num_episodes=16, num_envs=16)), "opd-4bit": ("vla_opd", "autoregressive", dict(GROUPS, load_in_4bit=True)),
    "forward-kl-oft": ("dagger_forward_kl", "parallel", CHUNKS), "hard-ce-oft": ("dagger_hard_ce", "parallel", CHUNKS),
    "opd-oft-micro-16": ("vla_opd", "parallel", dict(CHUNKS, micro_batch_size=16)), "opd-oft-micro-32": ("vla_opd", "parallel", dict(CHUNKS, micro_batch_size=32)),
    "opd-oft-compiled": ("vla_opd", "parallel", dict(CHUNKS, compile=True))}


def write(folder, device, toy):
    """A student and a teacher in each decoding; they share all weights but lm_head's."""
    prompt = "In: What action should the robot take to {instruction}?\nOut:"
    text = dict(vocab_size=32064, pad_token_id=32000, **(dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4) if toy else {}))
    towers = [dict(t, dim=32, depth=3, heads=4, hidden=64) for t in (sft.DINO, sft.SIGLIP)] if toy else None
    config = dict(text_config=text, image_sizes=[56 if toy else 224] * 2, pad_to_multiple_of=64, n_action_bins=256, prompt=prompt, **(dict(towers=towers) if toy else {}),
                  timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"], norm_stats={})
    words = [*envs.vocabulary("tabletop-object"), *prompt.replace(":", " : ").replace("?", " ? ").split()]
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in sft.VLA(config).state_dict().items()}
    torch.manual_seed(0)

    def random(name):
        x = torch.zeros(shapes[name], dtype=torch.bfloat16, device=device)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale_factor")):
            x += 1
        elif not name.endswith("bias"):
            x.normal_(std=.02)
        return x.cpu()

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: random(k) for k in shapes if "lm_head" not in k}, folder / "body.safetensors")
    for role in ("student", "teacher"):
        save_file({k: random(k) for k in shapes if "lm_head" in k}, folder / f"{role}.safetensors")
        for decoding in ("autoregressive", "parallel"):
            to = folder / f"{decoding}-{role}"
            to.mkdir(exist_ok=True)
            for i, part in enumerate(("body", role)):
                (to / f"model-{i}.safetensors").unlink(missing_ok=True)
                (to / f"model-{i}.safetensors").symlink_to(folder / f"{part}.safetensors")
            sft.tiny(words).tokenizer.save_pretrained(to)
            (to / "config.json").write_text(json.dumps(dict(config, decoding=decoding)))


def cut(make):
    """Episodes of STEPS steps, every other one a success."""
    def made(*args, **kw):
        env = make(*args, **kw)
        env.suite.max_steps, step = STEPS, env._step
        env._step = lambda action, live: step(action, live) | live & (env.steps == STEPS - 1) & (np.arange(env.num_envs) % 2 == 0)
        return env
    return made


def measure(name, folder, cuda, toy):
    script, decoding, flags = JOBS[name]
    module, run = importlib.import_module(script), folder / "runs" / name
    name.endswith("-resumed") and shutil.copytree(folder / "runs" / name.removesuffix("-resumed"), run)
    module.evaluate = lambda env, model, *rest: np.zeros((3, len(env.suite.tasks), 1))
    roles = {role: str(folder / f"{decoding}-{role}") for role in ("student", "teacher") if hasattr(module.Args, role)}
    roles |= dict(reference=str(folder / "runs" / "ppo")) if script == "road_vla" else {}
    smaller = {k: v for k, v in dict(dtype="float32", batch_prompts=2, num_episodes=4).items() if toy and hasattr(module.Args, k)}
    cuda and torch.cuda.reset_peak_memory_stats()
    started = time.time()
    module.main(module.Args(**{**COMMON, **roles, **flags, **smaller, "run_dir": str(run)}))
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    first, last = ({k: float(v) for k, v in rows[i].items() if v} for i in (1, -1))
    seconds = dict(rollout=last["time/rollout"], label=last.get("time/teacher", last.get("time/reference", 0.)), update=last["time/update"])
    return dict(queries=int(last["charts/queries"]), **{f"{k}_seconds": f"{v:.2f}" for k, v in seconds.items()}, env_seconds=f"{last['time/env']:.2f}",
                peak_gb=f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if cuda else "", whole_seconds=f"{time.time() - started:.0f}",
                **{f"{k}_{when}": f"{row[f'losses/{k}']:.4f}" for k in ("reverse_kl_exact", "entropy") for when, row in (("first", first), ("last", last)) if f"losses/{k}" in row})


def main(folder, names, toy, out):
    cuda, folder = torch.cuda.is_available(), folder.resolve()
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=7"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    about = dict(commit=commit, machine=torch.cuda.get_device_name() if cuda else "CPU", torch=torch.__version__)
    (folder / "parallel-teacher" / "config.json").exists() or write(folder, "cuda" if cuda else "cpu", toy)
    envs.make, results = cut(envs.make), {row["job"]: row for row in csv.DictReader(open(out))} if out.exists() else {}
    for name in names:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        try:
            row = measure(name, folder, cuda, toy)
        except (Exception, SystemExit) as e:             # the others still count
            traceback.print_exc()
            row = dict(error=f"{type(e).__name__}: {e}".split("\n")[0].split(". ")[0])
        gc.collect()
        cuda and torch.cuda.empty_cache()
        results[name] = dict(job=name, script=JOBS[name][0], decoding=JOBS[name][1], **about, **row)
        with open(out, "w", newline="") as file:         # after every job: none is lost
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in results.values() for k in row)), restval="", lineterminator="\n")
            writer.writeheader(), writer.writerows(results.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints and the runs go")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS, help="which to run")
    parser.add_argument("--toy", action="store_true", help="the same with a few thousand parameters, to try the plumbing")
    parser.add_argument("--out", type=Path, help="the table; jobs that are not run keep their rows (default: results/full_size.csv, of toys DIR/toy/full_size.csv)")
    given = parser.parse_args()
    folder = given.folder / "toy" if given.toy else given.folder
    main(folder, given.jobs, given.toy, given.out or (folder if given.toy else HERE) / "full_size.csv")
