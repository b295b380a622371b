"""What the tests of the two scripts with a critic share: short episodes, a checkpoint with a value head, plain references, the gradients of main()."""
import csv

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import envs
import ppo
import small

DIM = 7                                                  # tokens of an action
FEW = dict(small.RUN, num_episodes=4, num_envs=10)
TIMES = ("time/", "charts/queries_per_second", "charts/reference_minutes")


def short(patch, steps):
    """Episodes of so many steps: what is played is no matter here."""
    make = envs.make

    def made(*a, **k):
        env = make(*a, **k)
        env.suite.max_steps = steps
        return env
    patch.setattr(envs, "make", made)


def checkpoint(folder, decoding="parallel", seed=0):
    """A policy and a value head whose values differ from state to state; returns the folder."""
    path = folder / f"{decoding}-{seed}"
    if not path.exists():
        small.model(decoding, seed).save(path)
        model = ppo.ActorCritic(str(path), ppo.Args(), "cpu")
        for p in model.value.parameters():
            p.data = 2 * p.data if p.shape[0] > 1 else .03 * torch.randn_like(p)
        model.save(path)
    return str(path)


def actor_critic(path, **kw):
    return ppo.ActorCritic(path, ppo.Args(**kw), "cpu")


def gae(reward, value, gamma, lam):
    """By its definition, a sum over all later steps of an [E, T] array."""
    advantage = np.zeros(reward.shape)
    for t in range(reward.shape[1]):
        for later in range(t, reward.shape[1]):
            following = value[:, later + 1] if later + 1 < reward.shape[1] else 0
            advantage[:, t] += (gamma * lam) ** (later - t) * (reward[:, later] + gamma * following - value[:, later])
    return advantage


def huber(x, delta=10.):
    return x ** 2 / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)


def losses(logits, value, tokens, mask, old_logp, old_value, advantage, returns, args):
    """Policy loss, value loss, entropy: a query, an action, a token at a time."""
    per, policy, worth, entropy = DIM if args.ratio == "action" else 1, [], [], []
    for q, lp in enumerate((logits / args.temperature).log_softmax(-1)):
        for first in range(0, tokens.shape[1], per):
            if mask[q, first]:
                ratio = sum(lp[k, tokens[q, k]] - old_logp[q, k] for k in range(first, first + per)).exp()
                policy.append(-min(ratio * advantage[q], min(max(ratio, 1 - args.clip), 1 + args.clip) * advantage[q]))
        entropy += [-(lp[k].exp() * lp[k]).sum() for k in range(tokens.shape[1]) if mask[q, k]]
        near = min(max(value[q], old_value[q] - args.value_clip), old_value[q] + args.value_clip)
        worth.append(max(huber(value[q] - returns[q]), huber(near - returns[q])))
    return [sum(x) / len(x) for x in (policy, worth, entropy)]


def rewarded(patch, module):
    """Rollouts have rewards that a random policy would never get."""
    original = module.rollout

    def rollout(*a, **k):
        batch = original(*a, **k)
        g = torch.Generator().manual_seed(int(batch["tokens"].sum()))
        return batch | dict(reward=.1 + .3 * torch.randn(len(batch["tokens"]), generator=g))
    patch.setattr(module, "rollout", rollout)


def recorded(module, args):
    """main()'s gradients, and the batch it had."""
    with pytest.MonkeyPatch.context() as patch:
        rewarded(patch, module)
        gradients, (batch,) = small.recorded(module, args)
    return gradients, batch


def judged(model, batch, args):
    """Values, advantages and returns of a batch, one episode at a time; values from a pass over all, with other tokens."""
    with torch.no_grad():
        value = model(batch["image"], batch["instruction"], 0 * batch["tokens"])[1]
    advantage, returns = torch.zeros(2, len(value))
    for e in batch["episode"].unique():
        rows = torch.tensor([i for i, x in enumerate(batch["episode"]) if x == e])
        advantage[rows] = torch.from_numpy(gae(batch["reward"][rows][None].numpy(), value[rows][None].numpy(), args.gamma, args.gae_lambda)).float()[0]
        returns[rows] = advantage[rows] + value[rows]
    return value, advantage, returns


def flat_gradient(model):
    return small.flat(p.grad for p in [*model.policy.parameters(), *model.value.parameters()] if p.grad is not None)


def rows(run):
    return list(csv.DictReader(open(f"{run}/metrics.csv")))


def parts(checkpoint):
    return {k: load_file(f"{checkpoint}/{k}.safetensors") for k in ("model", "value_head")}


def play(module, folder, run_dir, decoding="parallel", **kw):
    module.main(module.Args(**{**FEW, "student": checkpoint(folder, decoding), "run_dir": str(folder / run_dir), **kw}))
    return folder / run_dir


def straight_and_resumed(module, folder, decoding, **kw):
    """Two iterations at once, and in two runs: the same to the last bit, and finite."""
    seen, play_one = [], module.rollout

    def rollout(env, model, task, state, split, temperature, *rest):
        seen.append((split, env.fixed_horizon, temperature, set(state)))
        return play_one(env, model, task, state, split, temperature, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rollout", rollout)
        straight = play(module, folder, "straight", decoding, temperature=1.3, **kw)
    kw["temperature"] = 1.3
    assert [s[:3] for s in seen] == [("eval", False, 0.), ("train", True, 1.3), ("train", True, 1.3), ("eval", False, 0.)]
    assert max(seen[1][3] | seen[2][3]) < 400 <= min(seen[0][3]) and seen[1][3] != seen[2][3]
    half = play(module, folder, "parts", decoding, num_iterations=1, **kw)
    first = parts(half / "checkpoint")
    play(module, folder, "parts", decoding, resume=True, **kw)
    done, again = parts(straight / "checkpoint"), parts(half / "checkpoint")
    for part in done:
        assert all(torch.equal(v, again[part][k]) and v.isfinite().all() for k, v in done[part].items()), part
        moved = max((v - first[part][k]).abs().max() for k, v in done[part].items())
        assert moved > 1e-4, "the second iteration did nothing"          # more than weight decay
    last, resumed = ({k: v for k, v in rows(run)[2].items() if not k.startswith(TIMES)} for run in (straight, half))
    assert last == resumed and [r["step"] for r in rows(half)] == ["0", "1", "2"]
    for row in rows(straight)[1:]:
        assert np.isfinite([float(v) for k, v in row.items() if v or "eval" not in k and "reference_" not in k]).all()
        assert float(row["charts/env_steps"]) == 32 and float(row["charts/queries"]) == 32 / small.CHUNK[decoding]
        assert 4 < float(row["losses/entropy"]) <= np.log(256)
        assert float(row["losses/approx_kl"]) > 1e-8                     # the ratio is that to the policy that played
    return straight
