"""ROAD-VLA: the closed form against all 256 tokens, the weights against the equations, the gradient of the whole script, its runs."""
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from torch.nn.functional import one_hot

import critics
import ppo
import road_vla
import small
from critics import DIM, FEW
from road_vla import agd, distillation_weights, road_loss

BINS = 256


# ------------------------------------------------------------------------------------------------------------ closed form
def divergence(p, q, kind):
    """Of two distributions, both as logarithms; jsd: Jensen-Shannon, of which neither comes first."""
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return kl(q, p) if kind == "fkl" else .5 * kl(q, m) + .5 * kl(p, m)


def brute(logits, tokens, bump, kind, frozen=True):
    """The divergence over all 256 tokens, of the student and of the teacher as in eq. 10."""
    teacher = (logits.detach() if frozen else logits) + bump[..., None] * one_hot(tokens, BINS)
    return divergence(logits.log_softmax(-1), teacher.log_softmax(-1), kind)


def closed(logits, tokens, bump, kind):
    return agd(logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], bump, kind)


def cases(dtype=torch.float64, bumps=(-8., -2., -.3, 1e-3, .3, 2., 8.)):
    """Logits [N, 256], sampled tokens from all but impossible to all but certain, bumps."""
    logits = 1.5 * torch.randn(40, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(40) * 6
    logits[torch.arange(40), tokens] = torch.linspace(-20, 24, 40, dtype=torch.float64)
    p = logits.softmax(-1).gather(-1, tokens[:, None])
    assert p.min() < 1e-9 and p.max() > 1 - 1e-6
    n = len(bumps)
    return logits.repeat(n, 1).to(dtype), tokens.repeat(n), torch.tensor(bumps, dtype=dtype).repeat_interleave(40)


@pytest.mark.parametrize("kind", ["fkl", "jsd"])
def test_agd_is_exact(kind):
    logits, tokens, bump = cases()
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, want = closed(leaf, tokens, bump, kind), brute(other, tokens, bump, kind)
    torch.testing.assert_close(value, want, rtol=0, atol=1e-10)
    mine, gradient = (torch.autograd.grad(x.sum(), at)[0] for x, at in ((value, leaf), (want, other)))
    torch.testing.assert_close(mine, gradient, rtol=1e-6, atol=1e-10)
    attached = torch.autograd.grad(brute(other, tokens, bump, kind, frozen=False).sum(), other)[0]
    assert (attached - mine).norm() > .1 * mine.norm()       # through the teacher it would be another
    sampled = mine.gather(-1, tokens[:, None])[:, 0]
    seen = sampled.abs() > 1e-12                         # where a step can tell: the sampled token's logit goes the way of its weight
    assert seen.float().mean() > .8 and (sampled.sign() == -bump.sign())[seen].all()


@pytest.mark.parametrize("kind", ["fkl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bump_is_nothing(kind, dtype):
    logits, tokens, bump = cases(dtype, (0.,))
    value = closed(logits.requires_grad_(), tokens, bump, kind)
    assert not value.any() and torch.autograd.grad(value.sum(), logits)[0].abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["fkl", "jsd"])
def test_float32(kind):
    """With the weights that training has: right to rounding, so not below zero by more than that; also while the model is in bfloat16."""
    logits, tokens, bump = cases(torch.float32, (-2., -1., -1e-2, 1e-2, 1., 2.))
    with torch.autocast("cpu", torch.bfloat16):
        value = closed(logits.requires_grad_(), tokens, bump, kind)
    assert value.dtype == torch.float32 and value.min() > -5e-7
    torch.testing.assert_close(value.double(), brute(logits.double(), tokens, bump.double(), kind), rtol=1e-5, atol=5e-6)
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()
    logits, tokens, bump = cases(torch.float32, (-80., -20., 20., 80.))      # --eta 40
    value, want = closed(logits.requires_grad_(), tokens, bump, kind), brute(logits.double(), tokens, bump.double(), kind)
    unsure = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0] < .99     # of 1 - p, float32 knows no more
    torch.testing.assert_close(value.double()[unsure], want[unsure], rtol=1e-5, atol=5e-6)
    assert unsure.sum() > 100 and value.isfinite().all() and torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def gradients(logits, w):
    """With respect to logits [N, 256]: of the distillation and of PPO's surrogate, expected over the tokens."""
    p, tokens = logits.softmax(-1), torch.arange(BINS).expand(len(logits), -1)
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1).gather(-1, tokens)
    losses = agd(logp, torch.tensor(w), "fkl"), -(logp - logp.detach()).exp() * w
    return [torch.autograd.grad((p * loss).sum(), leaf, retain_graph=True)[0] for loss in losses]


def test_how_strong_the_distillation_is():
    """A sampled token's gradient is PPO's times p (e^w - 1) / w / 7, to first order in p."""
    for p in (.001, .01, .05):
        logits, tokens = torch.zeros(1, BINS, dtype=torch.float64), torch.tensor([[9]])
        logits[0, 9] = math.log(p / (1 - p) * (BINS - 1))
        for w in (-1., .2, 1.):
            leaf = logits.clone().requires_grad_()
            logp = leaf.log_softmax(-1).gather(-1, tokens)[:, 0]
            mine, ppos = (torch.autograd.grad(x.sum(), leaf)[0] for x in (closed(leaf, tokens[0], torch.tensor([w], dtype=torch.float64), "fkl") / 7, -w * (logp - logp.detach()).exp()))
            torch.testing.assert_close(mine, ppos * p * math.expm1(w) / w / 7, rtol=3 * p, atol=1e-12)


def test_a_weight_that_knows_nothing_sharpens():
    """Averaged over tokens and over w of either sign, PPO's gradient is nothing; the distillation's raises the sum of p^2."""
    logits = .5 * torch.randn(3, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, ppos = (sum(g) for g in zip(gradients(logits, 1.), gradients(logits, -1.)))
    assert ppos.abs().max() < 1e-15
    leaf = logits.clone().requires_grad_()
    peak, = torch.autograd.grad(leaf.softmax(-1).square().sum(), leaf)
    torch.testing.assert_close(mine, -(math.cosh(1) - 1) * peak, rtol=.1, atol=.02 * peak.abs().max().item())


def test_jensen_shannon():
    """Bounded, symmetric; half the KL's curvature of it: a quarter of KL for small bumps."""
    logits, tokens, bump = cases(bumps=(-40., -2., 2., 40.))
    value = closed(logits, tokens, bump, "jsd")
    teacher = (logits + bump[:, None] * one_hot(tokens, BINS)).log_softmax(-1)
    torch.testing.assert_close(value, divergence(teacher, logits.log_softmax(-1), "jsd"), rtol=0, atol=1e-10)
    assert -1e-15 < value.min() and .6 < value.max() <= math.log(2)
    logits, tokens, bump = cases(bumps=(1e-3, -1e-3))
    ratio = closed(logits, tokens, bump, "jsd") / closed(logits, tokens, bump, "fkl")
    torch.testing.assert_close(ratio[10:30], torch.full((20,), .25, dtype=torch.float64), rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------------------------------------------- weights
def advantages(n=200):
    g = torch.Generator().manual_seed(0)
    intrinsic = .3 + .7 * torch.randn(n, generator=g, dtype=torch.float64)
    return intrinsic, 4 - 3 * intrinsic + 5 * torch.randn(n, generator=g, dtype=torch.float64) + 8 * intrinsic


@pytest.mark.parametrize("alpha", [0., .5, 1.])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("positive_only", [True, False])
def test_weights(alpha, gate, positive_only):
    """Equations 7 to 9."""
    intrinsic, reference = advantages()
    weight, agree = distillation_weights(intrinsic, reference, road_vla.Args(alpha=alpha, gate=gate, positive_only=positive_only), 1)
    a, r = intrinsic.numpy(), reference.numpy()
    r = a.mean() + a.std() / r.std() * (r - r.mean())
    same = np.sign(a) == np.sign(r)
    mixed = [x + alpha * (y - x) if s or not gate else x for x, y, s in zip(a, r, same)]
    want = np.clip((mixed - np.mean(mixed)) / np.std(mixed), -2, 2)
    np.testing.assert_allclose(weight, np.maximum(want, 0) if positive_only else want, atol=1e-6)
    assert (agree.numpy() == same).all() and .1 < same.mean() < .9
    assert weight.max() == 2 and weight.min() == (0 if positive_only else -2)
    if alpha == 0:                                       # PPO's own advantage, whatever the reference
        other = distillation_weights(intrinsic, -7 * reference, road_vla.Args(alpha=alpha, gate=gate, positive_only=positive_only), 1)[0]
        assert torch.equal(other, weight)


def test_calibration(monkeypatch):
    """The reference gets the mean and the spread of the current critic, so its own do not matter."""
    intrinsic, reference = advantages()
    seen, moments = [], road_vla.moments
    monkeypatch.setattr(road_vla, "moments", lambda x, world: seen.append(x) or moments(x, world))
    args = road_vla.Args(alpha=1., gate=False, weight_clip=9.)
    weight = distillation_weights(intrinsic, reference, args, 1)[0]
    torch.testing.assert_close(torch.std_mean(seen[-1]), torch.std_mean(intrinsic), rtol=1e-6, atol=0)
    np.testing.assert_allclose(weight, (reference - reference.mean()) / reference.std(correction=0), atol=1e-6)
    for flags in (dict(gate=False), dict()):
        a, b = (distillation_weights(intrinsic, r, road_vla.Args(**flags), 1) for r in (reference, 5 * reference - 40))
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-6)
        assert torch.equal(a[1], b[1])
    assert distillation_weights(intrinsic, reference, road_vla.Args(weight_clip=.5), 1)[0].abs().max() == .5
    assert not distillation_weights(torch.ones(5), torch.ones(5), road_vla.Args(), 1)[0].any()     # nothing to tell apart


# ------------------------------------------------------------------------------------------------------------------- loss
def losses(flags, B=5):
    """road_loss() and ppo_loss() of the same queries and their gradients; without PPO's term an advantage of 0 takes its place."""
    g = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(B, 3 * DIM, BINS, generator=g), torch.randint(BINS, (B, 3 * DIM), generator=g)
    mask, args = torch.arange(3 * DIM) // DIM < torch.tensor([3, 2, 1, 3, 1])[:, None], road_vla.Args(**flags)
    value, old_value, advantage, weight, returns = torch.randn(5, B, generator=g)
    old = (logits / args.temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0] + .1 * torch.randn(tokens.shape, generator=g)
    counts, found = torch.stack([mask.sum() / DIM, torch.tensor(float(B)), mask.sum()]), []
    for f, of in ((road_loss, [advantage, weight]), (ppo.ppo_loss, [advantage * args.ppo_term])):
        leaves = logits.clone().requires_grad_(), value.clone().requires_grad_()
        loss, logged = f(*leaves, tokens, mask, old, old_value, *of, returns, counts, args, DIM)
        found.append((loss, *torch.autograd.grad(loss, leaves), logged))
    return *found, logits, tokens, mask, weight, args


def test_without_distillation_it_is_ppo():
    for ratio in ("action", "token"):
        mine, ppos, *_ = losses(dict(distill_coefficient=0., entropy_coefficient=0., ratio=ratio))
        assert all(torch.equal(a, b) for a, b in zip(mine[:3], ppos[:3]))
        assert mine[3].keys() == ppos[3].keys() | {"distill_loss"} and all(torch.equal(mine[3][k], v) for k, v in ppos[3].items())


@pytest.mark.parametrize("flags", [dict(ppo_term=False), dict(), dict(eta=3., distill_coefficient=2., divergence="jsd"), dict(ppo_term=False, temperature=1.6)])
def test_loss(flags):
    """PPO's and the mean divergence of the executed tokens; without PPO's term the distillation, the value and the entropy are left."""
    (loss, on_logits, on_value, logged), (rest, rest_logits, rest_value, _), logits, tokens, mask, weight, args = losses(flags)
    leaf = logits.clone().requires_grad_()
    distill = brute(leaf / args.temperature, tokens, args.eta * weight[:, None].expand(mask.shape), args.divergence)[mask].mean()
    gradient = torch.autograd.grad(distill, leaf)[0]
    torch.testing.assert_close(logged["distill_loss"], distill, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss, rest + args.distill_coefficient * distill, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_logits, rest_logits + args.distill_coefficient * gradient, rtol=1e-3, atol=1e-7)
    assert torch.equal(on_value, rest_value) and on_value.any() and gradient.any() and not on_logits[~mask].any()


# ------------------------------------------------------------------------------------------------------------ whole script
def reference(folder, decoding="parallel", n=1):
    """A finished run of ppo.py."""
    return str(critics.play(ppo, folder, "ppo", decoding, student=critics.checkpoint(folder, decoding, 1), num_iterations=n))


def once(folder, source, path, **kw):
    return road_vla.Args(**{**FEW, "student": path, "reference": source, "run_dir": str(folder / "run"), "num_iterations": 1, "updates_per_rollout": 1,
                            "max_grad_norm": small.FAR, "distill_coefficient": 20., **kw})


def brute_force(batches, args):
    """The gradient on everything that was played, by all processes: the loss over all 256 tokens, weights from both critics' advantages."""
    model, frozen = critics.actor_critic(args.student), critics.actor_critic(f"{args.reference}/checkpoint")
    value, advantage, returns = (torch.cat(x) for x in zip(*(critics.judged(model, b, args) for b in batches)))
    weight = distillation_weights(advantage, torch.cat([critics.judged(frozen, b, args)[1] for b in batches]), args, 1)[0]
    image, tokens, mask, logp = (torch.cat([b[k] for b in batches]) for k in ("image", "tokens", "mask", "logp"))
    logits, now = model(image, sum((b["instruction"] for b in batches), []), tokens)
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
    policy, worth, entropy = critics.losses(logits, now, tokens, mask, logp, value, advantage, returns, args)
    distill = brute(logits, tokens, weight[:, None].expand(mask.shape), "fkl")[mask].mean()
    (args.ppo_term * policy + 20 * distill + worth - args.entropy_coefficient * entropy).backward()
    return critics.flat_gradient(model)


@pytest.mark.parametrize("decoding,kw", [("parallel", dict(query_batch_size=5, micro_batch_size=5, alpha=1.)),
                                         ("autoregressive", dict(ppo_term=False, alpha=1., gate=False))])
def test_main_gradient(tmp_path, monkeypatch, decoding, kw):
    critics.short(monkeypatch, 6)
    monkeypatch.setattr(ppo, "evaluate", small.no_evaluation)
    args = once(tmp_path, reference(tmp_path, decoding), critics.checkpoint(tmp_path, decoding), **kw)
    (gradient,), batch = critics.recorded(road_vla, args)
    want = brute_force([batch], args)
    assert (gradient - want).norm() < 1e-3 * want.norm()


def test_two_processes_are_one(tmp_path, monkeypatch):
    """Advantages, weights and the mean are over what both played."""
    critics.short(monkeypatch, 6)
    monkeypatch.setattr(ppo, "evaluate", small.no_evaluation)
    args = once(tmp_path, reference(tmp_path), critics.checkpoint(tmp_path), alpha=1.)
    critics.rewarded(monkeypatch, road_vla)
    small.twice(monkeypatch, road_vla)
    gradients, batches = small.recorded(road_vla, args)
    assert len(gradients) == 2 and torch.equal(*gradients) and not torch.equal(*(b["image"][0] for b in batches))
    want = brute_force(batches, args)
    assert (gradients[0] - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_end_to_end(tmp_path, monkeypatch, decoding):
    """The reference stays as it was, and what it cost is told."""
    critics.short(monkeypatch, 8)
    source = reference(tmp_path, decoding, 2)
    before = critics.parts(f"{source}/checkpoint")["value_head"]
    run = critics.straight_and_resumed(road_vla, tmp_path, decoding, reference=source)
    told, *trained = critics.rows(run)
    cost = sum(float(row["charts/env_steps"]) for row in critics.rows(source)[1:])
    assert float(told["charts/reference_env_steps"]) == cost == 2 * 32 and float(told["charts/reference_minutes"]) > 0
    assert all(float(row["losses/distill_loss"]) > 0 and 0 < float(row["losses/critic_agreement"]) <= 1 for row in trained)
    after, head = critics.parts(f"{source}/checkpoint")["value_head"], critics.actor_critic(str(run / "checkpoint")).value.state_dict()
    assert all(torch.equal(before[k], after[k]) and not torch.equal(before[k], head[k]) for k in before)


def test_missing_reference_says_how_to_make_it(tmp_path, monkeypatch):
    """One sentence with a command; what the command makes is a reference."""
    critics.short(monkeypatch, 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        critics.play(road_vla, tmp_path, "run", seed=3)
    said = e.value.code                                  # a string: Python prints it and exits with 1
    assert isinstance(said, str) and "\n" not in said and len(said) < 300 and "tabletop-object-ppo-3" in said
    _, script, *words = shlex.split(said.split("`")[1])
    assert script == "algos/ppo.py" and not list(tmp_path.glob("run*"))
    ppo.main(tyro.cli(ppo.Args, args=[*words, "--num-iterations=1", "--num-episodes=4", "--num-envs=10", "--eval-episodes-per-task=1", "--device=cpu",
                                      "--updates-per-rollout=1", f"--student={critics.checkpoint(tmp_path, seed=1)}"]))
    assert float(critics.rows(critics.play(road_vla, tmp_path, "run", seed=3, num_iterations=1))[0]["charts/reference_env_steps"]) == 16
    small.model(image=32).save(tmp_path / "student32")
    with pytest.raises(SystemExit, match="ppo-3 has image 64, not 32: --reference must be of the same"):
        critics.play(road_vla, tmp_path, "smaller", seed=3, student=str(tmp_path / "student32"))
    with pytest.raises(SystemExit, match="ppo-3 has gamma 0.99, not 0.9:"):
        critics.play(road_vla, tmp_path, "sooner", seed=3, gamma=.9)
    with pytest.raises(SystemExit, match="ppo-3 has env tabletop-object, not tabletop-goal:"):
        critics.play(road_vla, tmp_path, "elsewhere", env="tabletop-goal", reference="runs/tabletop-object-ppo-3")
    with pytest.raises(SystemExit, match="ppo.py --env tabletop-object --student mine --seed 5"):
        critics.play(road_vla, tmp_path, "other", seed=5, student="mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no run of ppo.py"):
        critics.play(road_vla, tmp_path, "other", reference=str(tmp_path / "empty"))


def test_the_reference_is_a_finished_run(tmp_path, monkeypatch):
    critics.short(monkeypatch, 4)
    source = Path(reference(tmp_path))
    args = json.loads((source / "args.json").read_text())
    (source / "args.json").write_text(json.dumps(args | dict(num_iterations=7)))
    with pytest.raises(SystemExit, match=f"{args['num_iterations']} of 7 iterations are done, finish it first"):
        critics.play(road_vla, tmp_path, "run", reference=str(source))
    (source / "args.json").write_text(json.dumps(args))
    critics.play(road_vla, tmp_path, "run", reference=f"{source}/checkpoint/", num_iterations=1)     # named as --student is
    made = json.loads((source / "checkpoint/progress.json").read_text())
    (source / "checkpoint/progress.json").write_text(json.dumps(made | dict(rows=made["rows"] + made["rows"][-1:])))
    with pytest.raises(SystemExit, match="has gone on since .*run began"):
        critics.play(road_vla, tmp_path, "run", reference=f"{source}/checkpoint/", num_iterations=2, resume=True)
    with pytest.raises(SystemExit, match="is no run of ppo.py"):     # but ROAD's own, whose cost is that of two runs
        critics.play(road_vla, tmp_path, "again", reference=str(tmp_path / "run"), num_iterations=1)


def test_evaluation_is_not_upside_down(tmp_path):
    with pytest.raises(SystemExit, match="--eval-temperature -1.0 is too small"):
        critics.play(ppo, tmp_path, "run", eval_temperature=-1.)


def test_flags(tmp_path, monkeypatch):
    """The ablations, as a user types them."""
    critics.short(monkeypatch, 4)
    flags = tyro.cli(road_vla.Args, args="--no-ppo-term --no-gate --positive-only --divergence jsd --alpha 1".split())
    assert not flags.ppo_term and not flags.gate
    kw = {k: getattr(flags, k) for k in ("ppo_term", "gate", "positive_only", "divergence", "alpha")}
    row = critics.rows(critics.play(road_vla, tmp_path, "run", reference=reference(tmp_path), num_iterations=1, **kw))[1]
    assert 0 < float(row["losses/distill_loss"]) < .3 and float(row["losses/mean_weight"]) > .1      # a mean of 0 where weights have both signs


def test_warm_critic(tmp_path, monkeypatch):
    """The critic starts as the reference's, which stays as it was; a resumed run goes on with its own."""
    critics.short(monkeypatch, 8)
    kw = dict(reference=reference(tmp_path, "parallel", 2), learning_rate=0., num_iterations=1)
    want, *heads = (critics.parts(run / "checkpoint")["value_head"] for run in (Path(kw["reference"]), *(
        critics.play(road_vla, tmp_path, f"{warm}-{rate}", warm_critic=warm, value_learning_rate=rate, **kw) for warm, rate in ((True, 0.), (False, 0.), (True, .01)))))
    assert [all(torch.equal(head[k], want[k]) for k in want) for head in heads] == [True, False, False]
    critics.straight_and_resumed(road_vla, tmp_path, "parallel", reference=kw["reference"], warm_critic=True)


@pytest.mark.parametrize("rank", [0, 4])
def test_under_lora_both_have_one_base(tmp_path, monkeypatch, rank):
    """Which saves 15 GB at 7 B; what is trained is nobody else's, and the reference computes what it computed in ppo.py."""
    critics.short(monkeypatch, 4)
    made, init = [], road_vla.ActorCritic.__init__
    monkeypatch.setattr(road_vla.ActorCritic, "__init__", lambda self, *a, **kw: init(self, *a, **kw) or made.append(self))
    source = critics.play(ppo, tmp_path, "ppo", num_iterations=1, lora_rank=rank)
    critics.play(road_vla, tmp_path, "run", reference=str(source), num_iterations=1, lora_rank=rank)
    (mine, theirs), alone = made[:2], ppo.ActorCritic(str(source / "checkpoint"), ppo.Args(lora_rank=rank), "cpu", trainable=False)
    trained = {p.data_ptr() for p in mine.parameters() if p.requires_grad}
    base = [p for name, p in theirs.policy.named_parameters() if rank and "lora_" not in name]
    assert {p.data_ptr() for p in base} == {p.data_ptr() for p in mine.policy.parameters() if not p.requires_grad} and bool(base) == bool(rank)
    assert trained and not trained & {p.data_ptr() for p in theirs.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), alone.state_dict().values(), strict=True))
