"""What ROAD-VLA's loss costs over PPO's: a rollout, the same minibatches through PPO's update, ROAD's closed form, and ROAD with the teacher written out over 256
tokens, and the reference's pass, in turns; the median of each, in seconds of one thread.  Writes results/cost.json.

    python results/cost.py [--repeats 7]
"""
import argparse
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algos")]
import envs
import ppo
import road_vla


def main(repeats):
    torch.manual_seed(1), torch.set_num_threads(1)
    args, env = road_vla.Args(), envs.make("tabletop-repositioning", 64, 1)
    model = road_vla.ActorCritic(envs.checkpoint("tabletop-repositioning", "student"), args, "cpu")
    reference = road_vla.ActorCritic(envs.checkpoint("tabletop-repositioning", "student"), args, "cpu", trainable=False).requires_grad_(False)
    env.fixed_horizon, rng = True, np.random.default_rng(1)
    task, state = rng.integers(10, size=64), rng.choice(env.suite.splits["train"], 64)
    rollout = lambda: road_vla.rollout(env, model.policy, task, state, "train", 1., args.query_batch_size)
    batch = rollout()
    image, text, tokens, mask, old_logp = (batch[k] for k in ("image", "instruction", "tokens", "mask", "logp"))
    with torch.no_grad():
        old_value = model.value(batch["state"])[:, 0]
    advantage, weight, returns = torch.randn(3, len(tokens)).unbind()

    def update(kind):
        for share in torch.arange(len(tokens)).tensor_split(args.updates_per_rollout):
            counts = torch.stack([mask[share].sum() / 7, torch.tensor(float(len(share))), mask[share].sum()])
            for i in share.split(args.micro_batch_size):
                logits, value = model(image[i], [text[j] for j in i], tokens[i])
                given = logits, value, tokens[i], mask[i], old_logp[i], old_value[i], advantage[i]
                if kind == "ppo":
                    loss = ppo.ppo_loss(*given, returns[i], counts, args, 7)[0]
                elif kind == "road":
                    loss = road_vla.road_loss(*given, weight[i], returns[i], counts, args, 7)[0]
                else:
                    loss = ppo.ppo_loss(*given, returns[i], counts, args, 7)[0]
                    raised = logits.detach().scatter_add(-1, tokens[i][..., None], (args.eta * weight[i])[:, None, None].expand(-1, logits.shape[1], 1))
                    teacher, student = raised.log_softmax(-1), logits.log_softmax(-1)
                    loss = loss + args.distill_coefficient * ((teacher.exp() * (teacher - student)).sum(-1) * mask[i]).sum() / counts[2]
                loss.backward()
            model.zero_grad()

    def reference_pass():
        with torch.no_grad():
            for i in torch.arange(len(tokens)).split(args.query_batch_size):
                reference(image[i], [text[j] for j in i], tokens[i, :1])
    work, seconds = dict(rollout=rollout, **{k: functools.partial(update, k) for k in ("ppo", "road", "written_out")}, reference=reference_pass), {}
    for _ in range(repeats):
        for k, do in work.items():
            began = time.process_time()
            do()
            seconds.setdefault(k, []).append(time.process_time() - began)
    median = {k: float(np.median(v)) for k, v in seconds.items()}
    iteration = {k: median["rollout"] + median[k] for k in ("ppo", "road", "written_out")}
    result = dict(queries=len(tokens), repeats=repeats, **median, road_over_ppo=iteration["road"] / iteration["ppo"],
                  written_out_over_ppo=iteration["written_out"] / iteration["ppo"], with_reference_over_ppo=(iteration["road"] + median["reference"]) / iteration["ppo"])
    (HERE / "cost.json").write_text(json.dumps({k: round(v, 4) for k, v in result.items()}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="how often each is timed")
    main(parser.parse_args().repeats)
