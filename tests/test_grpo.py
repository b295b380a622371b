"""GRPO: advantages within a group, the asymmetric clip, the mean over trajectories, and what becomes of groups that teach nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import grpo
import small
from grpo import Args, group_advantages, grpo_loss, token_weights
from small import flat
from test_opd import BINS, log_p, table
from test_scripts import rows


# ---------------------------------------------------------------------------------------------------------------- formula
@pytest.mark.parametrize("G", [2, 3, 5, 8])
def test_advantages_against_numpy(G):
    """Of every possible group."""
    success = (np.arange(2 ** G)[:, None] >> np.arange(G)) & 1
    want = (success - success.mean(1, keepdims=True)) / (success.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(torch.from_numpy(success).double()), want, rtol=1e-12)


def test_all_equal_groups_have_exactly_none():
    for G in range(2, 130):
        for outcome in (0., 1.):
            assert (group_advantages(torch.full((3, G), outcome)) == 0).all(), (G, outcome)


def of_ratio(ratio, advantage, T=1., **kw):
    """Gradient, what it is without a clip, loss and log of one token whose probability is `ratio` times that of the rollout."""
    z, tokens, args = table(1, 1)[None].requires_grad_(), torch.tensor([[7]]), Args(temperature=T, **kw)
    old = log_p(z, T).detach()[..., 7] - np.log(ratio)
    loss, logged = grpo_loss(z, torch.tensor([advantage]), tokens, old, torch.ones(1, 1), args)
    free = -advantage * ratio * (torch.nn.functional.one_hot(tokens, BINS) - log_p(z, T).exp()) / T
    return torch.autograd.grad(loss, z)[0], free.detach(), loss.item(), {k: v.item() for k, v in logged.items()}


@pytest.mark.parametrize("ratio,advantage,kw,passes", [
    (1.25, 2., {}, True), (1.27, 2., {}, True), (1.29, 2., {}, False), (.5, 2., {}, True), (.79, 2., {}, True),
    (.79, -2., {}, False), (.81, -2., {}, True), (1.29, -2., {}, True), (5., -2., {}, True), (.5, -2., {}, False),
    (1.29, 2., dict(clip_high=.4), True), (1.25, 2., dict(clip_high=.2), False), (.79, -2., dict(clip_low=.3), True)])
@pytest.mark.parametrize("T", [1., 1.6])
def test_clip_higher(ratio, advantage, kw, passes, T):
    gradient, free, loss, logged = of_ratio(ratio, advantage, T, **kw)
    if passes:
        torch.testing.assert_close(gradient, free, rtol=1e-9, atol=1e-12)
    else:
        assert not gradient.any()
    bound = ratio if passes else 1.28 * (advantage > 0) + .8 * (advantage < 0) if not kw else 1 + kw["clip_high"]
    assert abs(loss + advantage * bound) < 1e-6
    assert logged["clipfrac"] == (not passes) and abs(logged["approx_kl"] - (ratio - 1 - np.log(ratio))) < 1e-9
    p = log_p(table(1, 1), T).exp()
    assert abs(logged["entropy"] + (p * p.log()).sum().item()) < 1e-9


def test_nothing_without_advantage():
    for ratio in (.5, 1., 2.):
        gradient, _, loss, logged = of_ratio(ratio, 0.)
        assert not gradient.any() and loss == 0 and logged["clipfrac"] == 0


@pytest.mark.parametrize("agg", ["seq", "token"])
def test_reductions(agg):
    """Trajectories of 9, 4 and 1 executed tokens, queries in mixed order, against a loop."""
    g, episode, lengths, K = torch.Generator().manual_seed(0), torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor([4, 3, 4, 1, 1, 1]), 4
    mask, advantage, tokens = torch.arange(K) < lengths[:, None], torch.tensor([.7, -1.3, .4]).double(), torch.randint(BINS, (6, K), generator=g)
    z = table(3, 6 * K).view(6, K, BINS).requires_grad_()
    old = log_p(z).detach().gather(-1, tokens[..., None])[..., 0] + .3 * torch.randn(6, K, generator=g)
    loss = grpo_loss(z, advantage[episode], tokens, old, token_weights(mask, episode, 3, agg, 1), Args())[0]
    means, total = [], mask.sum()
    for e in range(3):
        terms = []
        for q, k in ((q, k) for q in range(6) for k in range(K) if episode[q] == e and mask[q, k]):
            ratio, A = (log_p(z)[q, k, tokens[q, k]] - old[q, k]).exp(), advantage[e]
            terms.append(-torch.minimum(ratio * A, ratio.clamp(.8, 1.28) * A))
        means.append(torch.stack(terms).mean() * (1 / 3 if agg == "seq" else len(terms) / total))
    want = sum(means)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-7)
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (loss, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert not ours[~mask].any() and ours[mask].abs().sum(-1).count_nonzero() > 4      # behind the end, inside a chunk too: exactly 0


# ----------------------------------------------------------------------------------------------------------- the training
def flags(folder, run_dir="run", **kw):
    return Args(**{**small.FEW, "student": small.checkpoints(folder)["student"], "run_dir": str(folder / run_dir), **kw})


def outcomes(patch, G, *written, process=lambda: 0):
    """Rollouts end as written: a word a rollout, a digit a group, the number of its members that succeed; a list of words a process."""
    original, calls = grpo.rollout, []

    def rollout(env, model, task, state, split, *rest):
        rank = process()
        word, groups = written[rank][sum(c["rank"] == rank for c in calls)], len(task) // G
        assert len(word) == groups, f"{groups} prompts are played, not {len(word)}"
        batch = original(env, model, task, state, split, *rest)
        batch["success"] = np.concatenate([np.roll(np.arange(G) < int(n), i) for i, n in enumerate(word)]).astype(int)
        calls.append(dict(batch, task=task, state=state, split=split, rank=rank, episode=batch["episode"].clone()))
        return batch
    patch.setattr(grpo, "rollout", rollout)
    return calls


def brute_force(folder, batches, args):
    """The gradient where the ratio is 1: -A grad log p, averaged over the kept trajectories."""
    student, terms, T = grpo.VLA.load(args.student), [], args.temperature
    for batch in batches:
        lp = log_p(student.score(batch["image"], batch["instruction"], batch["tokens"]), T).gather(-1, batch["tokens"][..., None])[..., 0]
        episode = batch["episode"] - batch["episode"].min()
        for e, group in enumerate(np.repeat(batch["success"].reshape(-1, args.group_size), args.group_size, 0)):
            if args.keep_low <= group.mean() <= args.keep_high:
                A, mine = (batch["success"][e] - group.mean()) / (group.std(ddof=1) + 1e-6), batch["mask"] & (episode == e)[:, None]
                terms.append(-A * lp[mine])
    sum(t.mean() for t in terms).div(len(terms)).backward() if args.loss_agg == "seq" else torch.cat(terms).mean().backward()
    return flat(p.grad for p in student.parameters() if p.grad is not None)


def check_gradient(folder, patch, written, **kw):
    args = flags(folder, **{**dict(num_iterations=1, updates_per_rollout=1, max_grad_norm=small.FAR, temperature=1.6), **kw})
    with patch.context() as p:
        outcomes(p, args.group_size, written)
        steps, batches = small.recorded(grpo, args)
    assert len(batches) == len(written) and len({n for b in batches for n in b["length"]}) > 1 and not batches[0]["mask"].all()
    want = brute_force(folder, batches, args)
    assert want.norm() > .01 and (torch.stack(steps).mean(0) - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("agg", ["seq", "token"])
def test_main_gradient(tmp_path, monkeypatch, agg):
    """Of the whole script: groups kept and dropped, of several rollouts, in micro-batches, in several shares."""
    small.shorten(monkeypatch)
    check_gradient(tmp_path, monkeypatch, ["120"], batch_prompts=3, group_size=3, loss_agg=agg, keep_low=0, keep_high=1)
    check_gradient(tmp_path, monkeypatch, ["03", "12"], group_size=3, loss_agg=agg, micro_batch_size=3, query_batch_size=5)
    check_gradient(tmp_path, monkeypatch, ["140", "42", "2"], batch_prompts=3, group_size=4, loss_agg=agg, micro_batch_size=2)
    if agg == "seq":
        check_gradient(tmp_path, monkeypatch, ["20", "1"], group_size=4, updates_per_rollout=4)


@pytest.mark.parametrize("written", [(["12"], ["21"]), (["12"], ["10", "3"]), (["21"], ["03", "30"])], ids=["all", "unequal", "one-has-none"])
def test_two_processes_are_one(tmp_path, monkeypatch, written):
    """Threads in place of processes, their sum by hand: the gradient is that of all their kept trajectories."""
    small.shorten(monkeypatch)
    args = flags(tmp_path, batch_prompts=4, group_size=3, num_iterations=1, updates_per_rollout=1, max_grad_norm=small.FAR, max_rollouts=2)
    small.twice(monkeypatch, grpo)
    for args.loss_agg in ("seq", "token"):
        with monkeypatch.context() as p:
            calls = outcomes(p, args.group_size, *written, process=lambda: small.rank.id)
            gradients, batches = small.recorded(grpo, args)
        states = [{s for c in calls if c["rank"] == i for s in c["state"]} for i in range(2)]
        assert len(gradients) == 2 and torch.equal(*gradients) and states[0] != states[1], "both play the same"
        want = brute_force(tmp_path, batches, args)
        assert (gradients[0] - want).norm() < 1e-4 * want.norm(), args.loss_agg


# --------------------------------------------------------------------------------------------------------------- groups
def run(folder, patch, *written, **kw):
    """The metrics of a run, and its rollouts."""
    small.shorten(patch)
    patch.setattr(grpo, "evaluate", small.no_evaluation)
    calls = outcomes(patch, kw["group_size"], written)
    grpo.main(flags(folder, **kw))
    assert len(calls) == len(written)                    # neither more prompts than missing, nor fewer rollouts
    return [{k.split("/")[-1]: float(v) for k, v in row.items() if v} for row in rows(folder / "run")[1:]], calls


@pytest.mark.parametrize("written,kw", [
    (["213"], {}), (["204", "10", "3"], {}), (["044", "000", "400"], dict(max_rollouts=3)), (["104"], dict(max_rollouts=1)),
    (["213", "13", "32"], dict(keep_low=.5, keep_high=.5, max_rollouts=3)), (["034", "1"], dict(keep_low=0., keep_high=.75)),
    (["19"], dict(group_size=10, batch_prompts=2))], ids=lambda x: "-".join(x) if isinstance(x, list) else "")
def test_dynamic_sampling(tmp_path, monkeypatch, written, kw):
    args = {**dict(group_size=4, batch_prompts=3, max_rollouts=4, keep_low=.1, keep_high=.9), **kw}
    (row,), calls = run(tmp_path, monkeypatch, *written, num_iterations=1, num_envs=8, **args)
    G, groups = args["group_size"], [int(n) for n in "".join(written)]
    keep = np.array([args["keep_low"] <= n / G <= args["keep_high"] for n in groups])
    length = np.concatenate([c["length"] for c in calls])
    want = dict(groups=len(groups), groups_kept=keep.sum(), groups_failed=groups.count(0), groups_solved=groups.count(G), success=sum(groups),
                episodes=len(groups) * G, success_rate=sum(groups) / len(groups) / G, queries=sum(len(c["tokens"]) for c in calls),
                env_steps=length.sum(), learned=7 * (length * keep.repeat(G)).sum())                # the dropped ones' steps were played too
    assert {k: row[k] for k in want} == pytest.approx(want)
    if (args["keep_low"], args["keep_high"]) == (.1, .9):
        assert row["groups"] == row["groups_kept"] + row["groups_failed"] + row["groups_solved"]
    prompts = [{*zip(task, state)} for c in calls for task, state in zip(*(c[k].reshape(-1, G).tolist() for k in ("task", "state")))]
    assert all(len(p) == 1 for p in prompts) and len(set.union(*prompts)) == len(groups)             # one a group, and always new
    assert {c["split"] for c in calls} == {"train"}


def weights(folder, run_dir="run"):
    return load_file(folder / run_dir / "checkpoint/model.safetensors")


def test_no_group_kept_changes_nothing(tmp_path, monkeypatch):
    """Half of three is nobody: the run goes on with the same weights, bit for bit."""
    metrics, _ = run(tmp_path, monkeypatch, "12", "21", "11", "22", group_size=3, keep_low=.5, keep_high=.5, max_rollouts=2)
    assert [(m["groups"], m["groups_kept"], m["learned"]) for m in metrics] == [(4, 0, 0)] * 2
    assert not any("policy_loss" in m or "entropy" in m for m in metrics)                # not measured, so not 0
    before, after = load_file(tmp_path / "parallel-student/model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_learning_after_nothing_kept(tmp_path, monkeypatch):
    metrics, _ = run(tmp_path, monkeypatch, "13", "23", group_size=4, keep_low=.5, keep_high=.5, max_rollouts=1)
    assert [m["groups_kept"] for m in metrics] == [0, 1] and metrics[1]["entropy"] > 4 and np.isfinite(list(metrics[1].values())).all()
    before, after = load_file(tmp_path / "parallel-student/model.safetensors"), weights(tmp_path)
    assert max((before[k] - after[k]).abs().max() for k in before) > 1e-4                # more than weight decay


def test_every_optimiser_step_has_episodes(tmp_path, monkeypatch):
    """Four kept episodes, eight steps asked for: a step without data would move the weights by old momentum."""
    outcomes(monkeypatch, 4, ["02"])
    steps, _ = small.recorded(grpo, flags(tmp_path, group_size=4, updates_per_rollout=8, max_rollouts=1, num_iterations=1))
    assert len(steps) == 4 and all(s.any() for s in steps)
