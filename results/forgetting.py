"""VLA-OPD's Figure 3: success on the tasks trained on (tabletop-object) and on unseen ones (tabletop-goal, -spatial) of every checkpoint during fine-tuning.
Trains one seed of each algorithm anew, keeps the checkpoint of every iteration, and plays it, greedy, from the states of the tables.  Writes results/forgetting.json;
interrupted, it goes on where it was.

    python results/forgetting.py
"""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algos")]
import envs
import vla_opd
from jobs import ALGORITHMS

RUNS, UNSEEN = HERE.parent / "runs" / "forgetting", ("goal", "spatial")


def train(name, flags):
    """Runs a script to its end and copies its checkpoint whenever that is a new one."""
    folder = RUNS / name
    script, *flags = flags.replace("{env}", "tabletop-object").replace("{opd-exact}", str(RUNS / "opd-exact")).split()
    words = [sys.executable, f"algos/{script}", "--env", "tabletop-object", *flags, "--run-dir", str(folder)]
    process = subprocess.Popen(words + ["--resume"] * (folder / "checkpoint").exists(), cwd=HERE.parent)
    version, seen = lambda: (folder / "checkpoint" / "progress.json").stat().st_mtime_ns, 0
    try:
        while True:
            ended = process.poll() is not None
            try:
                if (before := version()) != seen:
                    shutil.rmtree(RUNS / "copy", ignore_errors=True)
                    shutil.copytree(folder / "checkpoint", RUNS / "copy")
                    kept = RUNS / f"{name}-{json.loads((RUNS / 'copy' / 'progress.json').read_text())['step']}"
                    if before == version():              # else the script has put the next one there meanwhile
                        kept.exists() or (RUNS / "copy").rename(kept)
                        seen = before
            except (OSError, shutil.Error):
                pass
            if ended:
                process.returncode and sys.exit(f"{' '.join(words)} failed; the same command goes on from its last checkpoint")
                return json.loads((folder / "checkpoint" / "progress.json").read_text())["rows"]
            time.sleep(.02)
    finally:
        process.terminate()


def success(model, suite, states=20):
    """Greedy success of every task, from the first initial states for evaluation."""
    env = envs.make(f"tabletop-{suite}", 256, 1)
    task, state = np.arange(10).repeat(states), np.tile(env.suite.splits["eval"][:states], 10)
    return vla_opd.rollout(env, model, task, state, "eval", 0., 512)["success"].reshape(10, states).mean(1).tolist()


def main(algorithms=("opd-exact", "grpo", "distill-grpo", "sft-many"), out=HERE / "forgetting.json"):
    RUNS.mkdir(parents=True, exist_ok=True)
    result = {}
    for name in algorithms:
        for row in train(name, ALGORITHMS[name]):
            kept = RUNS / f"{name}-{row['step']:.0f}"
            if row["step"] and not kept.exists():
                sys.exit(f"{kept} was missed: remove {RUNS / name} and run this again")
            if row["step"] and not (kept / "unseen.json").exists():
                model = vla_opd.VLA.load(kept, trainable=False)
                unseen = {suite: success(model, suite) for suite in UNSEEN}
                (kept / "unseen.json").write_text(json.dumps(unseen))
            if row["step"]:
                result.setdefault(name, []).append(dict(iteration=row["step"], object=row["charts/eval_success"], **json.loads((kept / "unseen.json").read_text())))
    out.write_text(json.dumps(result).replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)                            # takes its training along
    main()
