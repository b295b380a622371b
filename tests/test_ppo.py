"""PPO: advantages, ratios and losses against plain references, the value head, the gradient of the whole script, its runs."""
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import critics
import ppo
import road_vla
import road_vla_text
import small
from critics import DIM, FEW

ACTIONS, BINS = 3, 256                                   # actions of a chunk


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize("gamma,lam", [(.99, .95), (1., 1.), (.9, 0.), (0., .95), (.9, 1.)])
def test_gae(gamma, lam):
    reward, value = draw(0, 2, 3, 6)
    episode = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 1, 0, 2, 0, 1, 2, 1, 1, 2, 0])    # as played: by turns, not in step
    order = episode.argsort(stable=True)
    flat = torch.empty(2, 18, dtype=torch.float64)
    flat[:, order] = torch.stack([reward, value]).flatten(1)
    advantage, returns = (x[order].view(3, 6) for x in ppo.gae(*flat, episode, gamma, lam))
    some = order[:8].sort().values                       # of other lengths: one whole, of another the first two
    torch.testing.assert_close(ppo.gae(*flat[:, some], episode[some], gamma, lam)[0][episode[some] == 0], advantage[0])
    np.testing.assert_allclose(advantage, critics.gae(reward.numpy(), value.numpy(), gamma, lam), atol=1e-12)
    torch.testing.assert_close(returns, advantage + value)
    torch.testing.assert_close(advantage[:, -1], reward[:, -1] - value[:, -1])       # behind the end there is nothing
    if lam == 1:                                         # the discounted rewards to come: no value counts
        torch.testing.assert_close(returns, sum(gamma ** k * torch.nn.functional.pad(reward[:, k:], (0, k)) for k in range(6)))
    if lam == 0:
        torch.testing.assert_close(advantage[:, :-1], (reward + gamma * value.roll(-1, 1) - value)[:, :-1])


def test_moments():
    x = (3 + 2 * draw(1, 5)).float()
    assert ppo.moments(x, 1) == pytest.approx((x.mean().item(), x.std(correction=0).item()), rel=1e-5)
    for n, same in ((5, .7), (7, .9), (100, 1 / 3)):     # rounding leaves a variance below 0 here
        assert ppo.moments(torch.full((n,), same), 1) == pytest.approx((same, 0), abs=1e-3)


# ------------------------------------------------------------------------------------------------------------------ losses
def case(drift=.15, seed=0, B=6):
    """Queries of three actions of which the last ones may be behind the horizon; ratios, values and errors on both sides of every clip."""
    logits, tokens = 1.5 * draw(seed, B, ACTIONS * DIM, BINS), torch.randint(BINS, (B, ACTIONS * DIM), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(ACTIONS * DIM) // DIM < torch.tensor([3, 2, 1, 3, 1, 3])[:B, None]
    value, old, returns = draw(seed + 1, 3, B)
    returns[:2] += torch.tensor([20., -20.])[:B]
    return dict(logits=logits, value=value, tokens=tokens, mask=mask, drift=drift * draw(seed + 2, *tokens.shape), old_value=value + .3 * old,
                advantage=torch.tensor([1., -1., 2., -.5, .3, 1.5], dtype=torch.float64)[:B], returns=returns)


def loss_of(args, logits, value, tokens, mask, drift, old_value, advantage, returns):
    """Loss, gradients, what is logged, and the arguments of the reference."""
    logits, value = logits.clone().requires_grad_(), value.clone().requires_grad_()
    old = (logits.detach() / args.temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0] - drift
    counts = torch.stack([mask.sum() / (DIM if args.ratio == "action" else 1), torch.tensor(float(len(tokens))), mask.sum()])
    given = logits, value, tokens, mask, old, old_value, advantage, returns
    loss, logged = ppo.ppo_loss(*given, counts, args, DIM)
    return loss, torch.autograd.grad(loss, (logits, value)), logged, given


@pytest.mark.parametrize("flags", [dict(), dict(ratio="token"), dict(temperature=1.6, entropy_coefficient=.1), dict(ratio="token", clip=.05, value_clip=.5)])
def test_loss_against_loops(flags):
    """One ratio an action, or one a token; the larger of two Hubers; the entropy's bonus; means over what was executed."""
    args = ppo.Args(**flags)
    loss, gradient, logged, given = loss_of(args, **case())
    policy, value, entropy = critics.losses(*given, args)
    want = policy + value - args.entropy_coefficient * entropy
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    for mine, reference in zip(gradient, torch.autograd.grad(want, given[:2])):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close([logged[k] for k in ("policy_loss", "value_loss", "entropy")], [policy, value, entropy], rtol=1e-9, atol=1e-12)
    assert 0 < logged["clipfrac"] < 1 and logged["approx_kl"] > 0
    moved, error = (given[1] - given[5]).abs(), (given[1] - given[7]).abs()
    assert (moved > args.value_clip).any() and (moved < args.value_clip).any() and (error > 10).any() and (error < 10).any(), "the case is too easy"
    assert not gradient[0][~given[3]].any() and gradient[0][given[3]].any(-1).float().mean() > .4        # behind the horizon nothing


def test_first_order():
    """At ratio 1 an action's gradient is -A grad log p / number of actions, once: not 7 times, and not 1/7 of it."""
    c = case(drift=0)
    p, hot = c["logits"].softmax(-1), torch.nn.functional.one_hot(c["tokens"], BINS)
    want = -(c["advantage"][:, None, None] * (hot - p)) * c["mask"][..., None] / (c["mask"].sum() / DIM)
    torch.testing.assert_close(loss_of(ppo.Args(), **c)[1][0], want, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(loss_of(ppo.Args(ratio="token"), **c)[1][0], want / DIM, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("ratio", ["action", "token"])
@pytest.mark.parametrize("change,advantage,moves", [(.3, 1, False), (.3, -1, True), (-.3, 1, True), (-.3, -1, False), (.1, 1, True), (-.1, -1, True)])
def test_clip(ratio, change, advantage, moves):
    """A policy that went far enough is left alone, on either side; the 7 tokens of an action count together."""
    args, c = ppo.Args(ratio=ratio), case(drift=0, B=1)
    c["drift"], c["advantage"] = torch.full_like(c["drift"], change / (DIM if ratio == "action" else 1)), torch.tensor([float(advantage)])
    assert loss_of(args, **c)[1][0].any() == moves


@pytest.mark.parametrize("value,old,returns,slope",
                         [(.5, 0, 1, 0), (-.5, 0, 1, -1.5), (.1, 0, 1, -.9), (1.5, 0, 1, 0), (5, 0, 1, 4), (50, 50, 1, 10), (-50, -50, 1, -10)])
def test_value_loss(value, old, returns, slope):
    """No reward for coming more than .2 nearer, whereas going away costs all of it; linear from 10 on."""
    c = case(B=1) | {k: torch.tensor([float(x)]) for k, x in dict(value=value, old_value=old, returns=returns).items()}
    assert loss_of(ppo.Args(), **c)[1][1].item() == pytest.approx(slope)


def test_entropy_bonus():
    c = case() | dict(advantage=torch.zeros(6))
    entropy = lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    for coefficient in (.1, -.1):
        gradient = loss_of(ppo.Args(entropy_coefficient=coefficient), **c)[1][0]
        assert (entropy(c["logits"] - gradient) > entropy(c["logits"])) == (coefficient > 0)
    assert not loss_of(ppo.Args(), **c)[1][0].any()


# -------------------------------------------------------------------------------------------------------------- value head
@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_value(tmp_path, decoding):
    """act() reads the state that a pass with the tokens reads: before any of them."""
    model = critics.actor_critic(critics.checkpoint(tmp_path, decoding))
    text = ["pick up the red cube and put it in the basket", "pick up the ball"] * 3      # padded
    image = torch.randint(256, (6, model.policy.image, model.policy.image, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, logp, state = model.policy.act(image, text, 1., torch.Generator().manual_seed(0))
    logits, value = model(image, text, tokens)
    assert value.shape == (6,) and value.dtype == torch.float32 and value.std() > .001
    torch.testing.assert_close(model.value(state)[:, 0], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], logp, rtol=1e-4, atol=1e-4)
    for others in (255 - tokens, tokens[:, :1]):
        torch.testing.assert_close(model(image, text, others)[1], value, rtol=1e-4, atol=1e-5)
    value.sum().backward()                               # the critic teaches the policy's eyes, too
    named = dict(model.policy.named_parameters())
    for k in ("vision_backbone.featurizer.features.0.weight", "projector.fc1.weight", "language_model.model.embed_tokens.weight"):
        assert named[k].grad.any(), k
    assert named["language_model.lm_head.weight"].grad is None or not named["language_model.lm_head.weight"].grad.any()


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_value_head_is_kept(tmp_path, rank):
    small.model().save(tmp_path / "base")
    state, read = draw(0, 5, 32).float(), []
    for path in ("base", "saved", "saved"):
        model = critics.actor_critic(str(tmp_path / path), lora_rank=rank)
        read.append(model.value(state).detach())
        if path == "base":
            model.save(tmp_path / "saved")
    assert torch.equal(*read[1:]) and torch.equal(*read[:2]) and read[0].any()
    other = critics.actor_critic(str(tmp_path / "base")).value(state)
    assert not torch.equal(other, read[0]) and other.std() < 1     # without a saved one: new, and small


def test_a_hub_ids_value_head_is_read(tmp_path, monkeypatch):
    """Of a hub that does not answer, from its cache."""
    model, state = critics.actor_critic(critics.checkpoint(tmp_path)), draw(0, 5, 32).float()
    model.save(tmp_path / "hub/models--me--run/snapshots/0123abcd")
    (tmp_path / "hub/models--me--run/refs").mkdir()
    (tmp_path / "hub/models--me--run/refs/main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(critics.actor_critic("me/run").value(state), model.value(state))


# ------------------------------------------------------------------------------------------------------------ whole script
def brute_force(path, batches, args):
    """The gradient on everything that was played, by all processes."""
    model = critics.actor_critic(path)
    value, advantage, returns = (torch.cat(x) for x in zip(*(critics.judged(model, b, args) for b in batches)))
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
    image, tokens, mask, logp = (torch.cat([b[k] for b in batches]) for k in ("image", "tokens", "mask", "logp"))
    logits, now = model(image, sum((b["instruction"] for b in batches), []), tokens)
    policy, worth, entropy = critics.losses(logits, now, tokens, mask, logp, value, advantage, returns, args)
    (policy + worth - args.entropy_coefficient * entropy).backward()
    return critics.flat_gradient(model)


def once(path, run_dir, **kw):
    return ppo.Args(**{**FEW, "student": path, "run_dir": str(run_dir), "num_iterations": 1, "updates_per_rollout": 1, "max_grad_norm": small.FAR,
                       "entropy_coefficient": .1, **kw})


@pytest.mark.parametrize("decoding,kw", [("parallel", dict(micro_batch_size=5, query_batch_size=3)), ("parallel", dict(ratio="token", gamma=.8, gae_lambda=.5)),
                                         ("parallel", dict(updates_per_rollout=3)), ("autoregressive", dict(temperature=1.3))])
def test_main_gradient(tmp_path, monkeypatch, decoding, kw):
    """Also of three steps' mean, here where the policy stands still: advantages are normalised once for all."""
    critics.short(monkeypatch, 12 if "updates_per_rollout" in kw else 6)     # shares of one size, or chunks cut off by the horizon
    path = critics.checkpoint(tmp_path, decoding)
    args = once(path, tmp_path / "run", **kw)
    steps, batch = critics.recorded(ppo, args)
    assert len(steps) == args.updates_per_rollout and batch["mask"].all() == (decoding == "autoregressive" or len(steps) > 1)
    want = brute_force(path, [batch], args)
    assert (torch.stack(steps).mean(0) - want).norm() < 1e-3 * want.norm()


def worker(rank, folder, port):
    """One of two processes; the horizons differ, so that only the sum over both is right."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    critics.short(patch, 6 + 7 * rank)
    args = once(critics.checkpoint(folder), folder / "run")
    (gradient,), batch = critics.recorded(ppo, args)
    tensors = {k: v.contiguous() for k, v in batch.items() if torch.is_tensor(v)}
    save_file({"gradient": gradient, **tensors}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(batch["instruction"]))
    torch.distributed.destroy_process_group()


@small.two_devices
def test_two_processes_are_one(tmp_path):
    path = critics.checkpoint(tmp_path)
    torch.multiprocessing.spawn(worker, (tmp_path, small.free_port()), 2)
    a, b = (load_file(tmp_path / f"{r}.safetensors") | dict(instruction=json.loads((tmp_path / f"{r}.json").read_text())) for r in (0, 1))
    assert torch.equal(a["gradient"], b["gradient"]) and len(a["tokens"]) != len(b["tokens"])
    want = brute_force(path, [a, b], once(path, ""))
    assert (a["gradient"] - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("still", ["learning_rate", "value_learning_rate"])
def test_two_learning_rates(tmp_path, monkeypatch, still):
    critics.short(monkeypatch, 4)
    monkeypatch.setattr(ppo, "evaluate", small.no_evaluation)
    run = critics.play(ppo, tmp_path, "run", num_iterations=1, **{still: 0.})
    before, after = critics.parts(critics.checkpoint(tmp_path)), critics.parts(run / "checkpoint")
    for part, name in (("model", "learning_rate"), ("value_head", "value_learning_rate")):
        moved = np.array([(before[part][k] - after[part][k]).abs().max() for k in before[part]])
        assert not moved.any() if still == name else (moved > 1e-5).mean() > .8, part        # more than weight decay


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_end_to_end(tmp_path, monkeypatch, decoding):
    critics.short(monkeypatch, 8)
    run = critics.straight_and_resumed(ppo, tmp_path, decoding)
    saved, head = critics.parts(run / "checkpoint")["value_head"], critics.actor_critic(str(run / "checkpoint")).value.state_dict()
    assert all(torch.equal(v, head[k]) for k, v in saved.items())


@pytest.mark.parametrize("script", [ppo, road_vla, road_vla_text], ids=lambda s: s.__name__)
def test_gradients_are_clipped(tmp_path, monkeypatch, script):
    critics.short(monkeypatch, 6)
    source = dict(reference=str(critics.play(ppo, tmp_path, "ppo", num_iterations=1))) if script is road_vla else {}
    args = script.Args(**{**FEW, **source, "student": critics.checkpoint(tmp_path), "run_dir": str(tmp_path / "run"), "num_iterations": 1, "max_grad_norm": 1e-3})
    assert [g.norm().item() for g in critics.recorded(script, args)[0]] == pytest.approx([1e-3] * 2, rel=1e-2)


@pytest.mark.parametrize("script", [ppo, road_vla, road_vla_text], ids=lambda s: s.__name__)
def test_both_splits_are_evaluated(tmp_path, monkeypatch, script):
    """At the temperature asked for, while success ends an episode; what is logged of a split is its own."""
    critics.short(monkeypatch, 4)
    kw = dict(env="tabletop-repositioning", student=critics.checkpoint(tmp_path), num_iterations=1)
    source, seen = dict(reference=str(critics.play(ppo, tmp_path, "ppo", **kw))) if script is road_vla else {}, []

    def evaluate(env, policy, split, episodes_per_task, temperature, *rest):
        seen.append((split, temperature, env.fixed_horizon))
        return small.no_evaluation(env, policy, split, episodes_per_task) + (split == "ood")
    monkeypatch.setattr(script, "evaluate", evaluate)
    row = critics.rows(critics.play(script, tmp_path, "run", eval_temperature=.6, **source, **kw))[-1]
    assert seen == [("eval", .6, False), ("ood", .6, False)] * 2
    assert [float(row[f"charts/{k}"]) for k in ("eval_success", "ood_success", "eval_grasped", "ood_grasped")] == [0, 1, 0, 1]


def test_command_line(tmp_path):
    """From another directory, to the real horizon."""
    flags = FEW | dict(num_iterations=1, student=critics.checkpoint(tmp_path), ratio="token", gamma=.9)
    status, out, err = small.call(small.command("ppo.py", **flags), tmp_path)
    assert status == 0 and "Traceback" not in err and "before:" in out and "after:" in out, err
    run = tmp_path / "runs/tabletop-object-ppo-1"
    assert critics.rows(run)[1]["charts/env_steps"] == "256.0" and (run / "curve.png").exists() and (run / "checkpoint/value_head.safetensors").exists()
    for flags in (dict(updates_per_rollout=0), dict(num_episodes=0)):
        with pytest.raises(SystemExit, match="--num-episodes.*--updates-per-rollout"):
            critics.play(ppo, tmp_path, "run", **flags)
