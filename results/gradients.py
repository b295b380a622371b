"""How much of a step is ROAD-VLA's distillation: the norms of the gradients that the terms of its loss send into the policy, each with its coefficient, at the
first rollout of the shipped student (w from the new critic alone); and the same where the tokens are surer, at lower temperatures of the same logits.
Writes results/gradients.json.

    python results/gradients.py
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algos")]
import envs
import road_vla


def measure(temperature, env_id="tabletop-repositioning"):
    torch.manual_seed(1)
    args, rng = road_vla.Args(temperature=temperature), np.random.default_rng(1)
    env = envs.make(env_id, args.num_episodes, 1)
    model = road_vla.ActorCritic(envs.checkpoint(env_id, "student"), args, "cpu")
    policy, env.fixed_horizon = model.policy, True
    task, state = rng.integers(len(env.suite.tasks), size=args.num_episodes), rng.choice(env.suite.splits["train"], args.num_episodes)
    batch = road_vla.rollout(env, policy, task, state, "train", temperature, args.query_batch_size, torch.Generator().manual_seed(1))
    image, text, tokens, old_logp, mask = (batch[k] for k in ("image", "instruction", "tokens", "logp", "mask"))
    with torch.no_grad():
        old_value = model.value(batch["state"])[:, 0]
    advantage, returns = road_vla.gae(batch["reward"], old_value, batch["episode"], args.gamma, args.gae_lambda)
    weight, _ = road_vla.distillation_weights(advantage, advantage, args, 1)
    advantage = (advantage - advantage.mean()) / (advantage.std(unbiased=False) + 1e-5)
    counts, parameters = torch.stack([mask.sum() / policy.action_dim, torch.tensor(float(len(tokens))), mask.sum()]), list(policy.parameters())
    coefficient = dict(policy_loss=1, distill_loss=args.distill_coefficient, entropy=args.entropy_coefficient, value_loss=1)
    gradient, entropy = dict.fromkeys(coefficient, 0), 0.
    for i in torch.arange(len(tokens)).split(args.micro_batch_size):
        logits, value = model(image[i], [text[j] for j in i], tokens[i])
        _, terms = road_vla.road_loss(logits, value, tokens[i], mask[i], old_logp[i], old_value[i], advantage[i], weight[i], returns[i], counts, args, policy.action_dim)
        entropy += terms["entropy"].item()
        for k, c in coefficient.items():
            parts = torch.autograd.grad(c * terms[k], parameters, retain_graph=True, allow_unused=True)
            gradient[k] += torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])
    norm = {k: g.norm().item() for k, g in gradient.items()}
    return dict(entropy_of_a_token=entropy, likelihood_of_a_sampled_token=old_logp.exp()[mask].mean().item(), **{f"norm_{k}": v for k, v in norm.items()},
                ppo_over_distillation=norm["policy_loss"] / norm["distill_loss"],
                cosine=torch.cosine_similarity(gradient["policy_loss"], gradient["distill_loss"], 0).item())


if __name__ == "__main__":
    result = {f"{t:g}": {k: float(f"{v:.4g}") for k, v in measure(t).items()} for t in (1., .3, .1, .03)}
    (HERE / "gradients.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
