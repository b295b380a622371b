"""VLA-OPD's gradient: the reverse KL's, nothing added and nothing lost, whatever the batch, the processes and the precision."""
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import small
import vla_opd
from small import flat
from vla_opd import reverse_kl_loss, token_weights


def Args(**kw):
    """The paper's estimator, unless a test says otherwise."""
    return vla_opd.Args(**{"estimator": "sampled", **kw})


BINS = 256


def table(seed, K=3, scale=1.5):
    """Logits of K independent tokens, in float64, so that equal means 1e-12."""
    return scale * torch.randn(K, BINS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_p(z, T=1.):
    return (z / T).log_softmax(-1)


def exact_kl_gradient(z, teacher, T):
    z = z.clone().requires_grad_()
    kl = (log_p(z, T).exp() * (log_p(z, T) - log_p(teacher, T))).sum()
    return kl.item(), torch.autograd.grad(kl, z)[0]


def expectation(z, teacher, old, args):
    """The mean loss and gradient over all tokens, each as often as the policy `old` plays it: no sampling noise."""
    leaf, tokens = z.clone().requires_grad_(), torch.arange(BINS)[:, None].expand(-1, len(z))
    spread = lambda x: x.expand(BINS, *x.shape)
    old_logp = log_p(old, args.temperature).T
    loss, _ = reverse_kl_loss(spread(leaf), spread(log_p(teacher, args.temperature)), tokens, old_logp, old_logp.exp(), args)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


# ---------------------------------------------------------------------------------------------------------------- formula
@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("T", [1., 1.6])
@pytest.mark.parametrize("drift", [0., .3])              # off-policy: samples of an older policy, ratio != 1
def test_expected_gradient_is_the_exact_kls(estimator, T, drift):
    z, teacher = table(1), table(2)
    kl, gradient = exact_kl_gradient(z, teacher, T)
    loss, ours = expectation(z, teacher, z + drift * table(3), Args(estimator=estimator, temperature=T))
    assert abs(loss - kl) < 1e-10                        # E[-ratio r] is the KL as well
    torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12)
    p, excess = log_p(z, T).exp(), log_p(z, T) - log_p(teacher, T)
    torch.testing.assert_close(ours, p * (excess - (p * excess).sum(-1, keepdim=True)) / T, rtol=1e-9, atol=1e-12)


def test_rollout_reward_is_another_objective():
    """On-policy both rewards are one; off-policy that of the rollout is the gradient of E_p[log p_old - log q]."""
    z, teacher, old = table(1), table(2), table(1) + .3 * table(3)
    for now, then in ((z, z), (z, old)):
        leaf = now.clone().requires_grad_()
        surrogate = (log_p(leaf).exp() * (log_p(then) - log_p(teacher))).sum()
        ours = expectation(now, teacher, then, Args(reward="rollout"))[1]
        torch.testing.assert_close(ours, torch.autograd.grad(surrogate, leaf)[0], rtol=1e-9, atol=1e-12)
        error = (ours - exact_kl_gradient(now, teacher, 1.)[1]).norm() / ours.norm()
        assert error < 1e-9 if now is then else error > .02


def each_gradient(z, teacher, tokens, old_logp=None, N=1, **kw):
    """Per-sample gradients [N, K, 256], of one backward pass over all."""
    args, leaf = Args(**kw), z.expand(N, *z.shape).clone().requires_grad_()
    old_logp = log_p(z, args.temperature).expand(N, -1, -1).gather(-1, tokens[..., None])[..., 0] if old_logp is None else old_logp
    loss, logged = reverse_kl_loss(leaf, teacher, tokens, old_logp, torch.ones_like(tokens, dtype=z.dtype), args)
    return torch.autograd.grad(loss, leaf)[0], logged, loss


@pytest.mark.parametrize("T", [1., 1.6])
def test_many_samples(T):
    """20 000 draws: unbiased along the gradient, and in every coordinate."""
    z, teacher, N, g = table(1, 2), table(2, 2), 20_000, torch.Generator().manual_seed(4)
    tokens = torch.multinomial(log_p(z, T).exp(), N, replacement=True, generator=g).T
    each = each_gradient(z, log_p(teacher, T).expand(N, -1, -1), tokens, N=N, temperature=T)[0]
    gradient = exact_kl_gradient(z, teacher, T)[1]
    along = (each * gradient).sum((1, 2)) / gradient.square().sum()
    error = along.std() / N ** .5
    assert error < .1 and abs(along.mean() - 1) < 4 * error
    often = N * log_p(z, T).exp() > 50                   # of rarer tokens nobody can estimate the spread
    score = ((each.mean(0) - gradient) / each.std(0) * N ** .5)[often]
    assert often.sum() > 100 and score.abs().max() < 5 and .8 < score.square().mean().sqrt() < 1.2


@pytest.mark.parametrize("T", [1., 1.6])
def test_zero_at_a_match(T):
    z, tokens = table(1, 5), torch.randint(BINS, (7, 5), generator=torch.Generator().manual_seed(0))
    same = log_p(z, T).expand(7, -1, -1)
    for reward in ("current", "rollout"):
        gradient, logged, loss = each_gradient(z, same, tokens, N=7, temperature=T, reward=reward)
        assert loss == 0 and not gradient.any() and not logged["reverse_kl_exact"].any()
    gradient, _, loss = each_gradient(z, same, tokens, N=7, temperature=T, estimator="exact")
    assert loss == 0 and gradient.abs().max() < 1e-15
    other = each_gradient(z, log_p(z, 2.).expand(7, -1, -1), tokens, N=7, temperature=T)[0]     # a teacher at another temperature
    assert other.abs().max() > .01


def test_reward_is_raw():
    """No baseline, no normalisation: linear in r, sample by sample, off-policy too."""
    z, N, T, g = table(1), 6, 1.3, torch.Generator().manual_seed(0)
    tokens, teacher = torch.randint(BINS, (N, 3), generator=g), log_p(table(2), T).expand(N, -1, -1)
    logp = log_p(z, T).expand(N, -1, -1)
    old = logp.gather(-1, tokens[..., None])[..., 0] + .2 * torch.randn(N, 3, generator=g, dtype=z.dtype)
    of = lambda t: each_gradient(z, t, tokens, old, N, temperature=T)[0]
    base, ratio = of(teacher), (logp.gather(-1, tokens[..., None])[..., 0] - old).exp()[..., None]
    grad_logp = (torch.nn.functional.one_hot(tokens, BINS) - logp.exp()) / T
    torch.testing.assert_close(of(teacher + .7) - base, -.7 * ratio * grad_logp, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of(2 * teacher - logp), 2 * base, rtol=1e-9, atol=1e-12)          # r doubled
    for i in range(N):                                   # the other samples do not matter
        alone = each_gradient(z, teacher[i:i + 1], tokens[i:i + 1], old[i:i + 1], temperature=T)[0]
        torch.testing.assert_close(alone[0], base[i], rtol=1e-12, atol=0)


def test_logged_against_numpy():
    z, teacher, tokens = table(1), table(2), torch.tensor([[3, 200, 77]])
    teacher[0] = z[0]
    p, q = (log_p(x).exp().numpy() for x in (z, teacher))
    old = log_p(z).gather(-1, tokens.T).T + torch.tensor([[0., .1, -.3]])
    logged = each_gradient(z, log_p(teacher)[None], tokens, old)[1]
    ratio = np.exp([0., -.1, .3])
    want = dict(reverse_kl_exact=(p * np.log(p / q)).sum(-1), entropy=-(p * np.log(p)).sum(-1), teacher_agreement=p.argmax(-1) == q.argmax(-1),
                approx_kl=ratio - 1 - np.log(ratio), clipfrac=abs(ratio - 1) > .2)
    assert logged.keys() == want.keys()
    for k, v in want.items():
        np.testing.assert_allclose(logged[k][0].detach().numpy(), v, atol=1e-8, err_msg=k)


# ---------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("agg", ["sum", "seq", "token"])
def test_token_weights(agg):
    """Three trajectories of 9, 4 and 1 executed tokens; queries in mixed order."""
    rng, episode, K = np.random.default_rng(0), np.array([0, 1, 0, 2, 1, 0]), 4
    mask = np.arange(K) < np.array([4, 3, 4, 1, 1, 1])[:, None]
    weight = token_weights(torch.from_numpy(mask), torch.from_numpy(episode), 3, agg, 1)
    loss = rng.standard_normal((6, K))
    per = [[loss[q, k] for q in range(6) for k in range(K) if episode[q] == e and mask[q, k]] for e in range(3)]
    want = {"sum": sum(map(sum, per)) / 3, "seq": np.mean([np.mean(x) for x in per]), "token": np.mean(sum(per, []))}[agg]
    np.testing.assert_allclose((weight.double() * torch.from_numpy(loss)).sum(), want, rtol=1e-6)
    assert not weight[~torch.from_numpy(mask)].any()


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_no_gradient_behind_the_end(estimator):
    z, teacher = table(1, 8).view(2, 4, BINS).requires_grad_(), log_p(table(2, 8)).view(2, 4, BINS)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    weight = token_weights(mask, torch.tensor([0, 0]), 1, "sum", 1)
    loss, _ = reverse_kl_loss(z, teacher, torch.full((2, 4), 9), log_p(z).detach()[..., 9], weight, Args(estimator=estimator))
    gradient = torch.autograd.grad(loss, z)[0].abs().sum(-1)
    assert not gradient[~mask].any() and gradient[mask].all()


# ------------------------------------------------------------------------------------------------------------- the model
def queries(model, n):
    g = torch.Generator().manual_seed(5)
    return torch.randint(256, (n, model.image, model.image, 3), generator=g, dtype=torch.uint8), ["pick up the red cube and put it in the basket"] * n


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_model_expected_gradient(decoding):
    """All 256 tokens at the last position, the ones before given: the mean over them is the exact KL's gradient."""
    student, teacher = (small.model(decoding, s, action_dim=3, chunk=1) for s in (0, 1))
    image, text = queries(student, 1)
    tokens, T = torch.tensor([[17, 140, 0]]).repeat(BINS, 1), 1.6
    tokens[:, -1] = torch.arange(BINS)
    images, weight = image.expand(BINS, -1, -1, -1), torch.zeros(BINS, 3)
    with torch.no_grad():
        q = log_p(teacher.score(images, text * BINS, tokens), T)
        old = log_p(student.score(images, text * BINS, tokens), T).gather(-1, tokens[..., None])[..., 0]
    weight[:, -1] = old[:, -1].exp()
    ours = {}
    for estimator in ("sampled", "exact"):
        student.zero_grad()
        loss, _ = reverse_kl_loss(student.score(images, text * BINS, tokens), q, tokens, old, weight, Args(estimator=estimator, temperature=T))
        loss.backward()
        ours[estimator] = loss.item(), flat(p.grad for p in student.parameters() if p.grad is not None)
    student.zero_grad()
    lp = log_p(student.score(image, text, tokens[:1]), T)[0, -1]
    kl = (lp.exp() * (lp - q[0, -1])).sum()
    kl.backward()
    brute = flat(p.grad for p in student.parameters() if p.grad is not None)
    assert kl > .1 and brute.norm() > .01
    for estimator, (loss, gradient) in ours.items():
        assert abs(loss - kl.item()) < 1e-4, estimator
        assert (gradient - brute).norm() < 1e-3 * brute.norm(), estimator


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_model_sampled_gradient(decoding):
    """Tokens and log-probabilities of act(), as a rollout has them: within sampling noise of the exact estimator."""
    student, teacher = (small.model(decoding, s, action_dim=2, chunk=1) for s in (0, 1))
    n, parts, T, g = 48, 24, 1.6, torch.Generator().manual_seed(1)
    images, text = queries(student, 1)
    images, text, weights = images.expand(n, -1, -1, -1), text * n, list(student.language_model.lm_head.parameters())
    gradients = dict(sampled=[], exact=[])
    for _ in range(parts):
        tokens, old, _ = student.act(images, text, T, g)
        with torch.no_grad():
            q = log_p(teacher.score(images, text, tokens), T)
        for estimator, found in gradients.items():
            args, weight = Args(estimator=estimator, temperature=T), torch.full((n, 2), 1 / n)
            loss, logged = reverse_kl_loss(student.score(images, text, tokens), q, tokens, old, weight, args)
            assert logged["approx_kl"].abs().max() < 1e-6                    # act() and score() agree: ratio 1
            found.append(flat(torch.autograd.grad(loss, weights)))
    sampled, exact = map(torch.stack, gradients.values())
    mean = exact.mean(0)
    along = ((sampled - exact) @ mean) / mean.square().sum()
    error = along.std() / parts ** .5
    assert error < .2 and abs(along.mean()) < 4 * error, (along.mean(), error)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_bfloat16_keeps_float32_logits_and_kl_positive(decoding):
    for noise, student, teacher in small.nearly_equal(decoding):
        images, text = queries(student, 16)
        tokens, old, _ = student.act(images, text, 1.)
        logits, other = student.score(images, text, tokens), teacher.score(images, text, tokens)
        assert logits.dtype == other.dtype == old.dtype == torch.float32
        loss, logged = reverse_kl_loss(logits, log_p(other), tokens, old, torch.ones(16, 4), Args())
        kl, lp, lq = logged["reverse_kl_exact"], log_p(logits.double()), log_p(other.double())
        assert kl.dtype == torch.float32 and kl.min() > -1e-6
        torch.testing.assert_close(kl.double(), (lp.exp() * (lp - lq)).sum(-1), rtol=1e-3, atol=1e-6)
        assert (noise == 0) == (kl.max() == 0) and loss.isfinite()


# ----------------------------------------------------------------------------------------------------------- the training
def recorded(folder, run_dir, **kw):
    """main()'s gradients, and the batch it had."""
    gradients, (batch,) = small.recorded(vla_opd, Args(**{
        **small.FEW, **small.checkpoints(folder), "num_iterations": 1, "updates_per_rollout": 1, "max_grad_norm": small.FAR, "temperature": 1.6,
        "run_dir": str(folder / run_dir), **kw}))
    return gradients, batch


def brute_force(folder, batch, agg, T=1.6):
    """(1/BG) sum over trajectories, time and tokens, written down as in the paper."""
    student, teacher = (vla_opd.VLA.load(path) for path in small.checkpoints(folder).values())
    tokens, image, text = batch["tokens"], batch["image"], batch["instruction"]
    with torch.no_grad():
        q = log_p(teacher.score(image, text, tokens), T)
    lp = log_p(student.score(image, text, tokens), T)
    lp, q = (x.gather(-1, tokens[..., None])[..., 0] for x in (lp, q))
    loss, episodes, total = 0., batch["episode"].unique(), batch["mask"].sum()
    for e in episodes:
        mine = batch["mask"] & (batch["episode"] == e)[:, None]
        r = (q - lp).detach()[mine]
        term = -(r * lp[mine]).sum()
        loss = loss + term * {"sum": 1 / len(episodes), "seq": 1 / len(episodes) / mine.sum(), "token": 1 / total}[agg]
    loss.backward()
    return flat(p.grad for p in student.parameters() if p.grad is not None)


def test_main_gradient(tmp_path, monkeypatch):
    """Of the whole script, for every aggregation and micro-batch size."""
    small.shorten(monkeypatch)
    for agg in ("sum", "seq", "token"):
        for size in (128, 1, 3) if agg == "sum" else (3,):
            (gradient,), batch = recorded(tmp_path, f"{agg}{size}", loss_agg=agg, micro_batch_size=size, query_batch_size=5)
            assert len(set(batch["length"])) > 1 and not batch["mask"].all(), "the test needs unequal lengths and partial chunks"
            want = brute_force(tmp_path, batch, agg)
            assert (gradient - want).norm() < 1e-4 * want.norm(), (agg, size)


def test_main_shares(tmp_path, monkeypatch):
    """Each trajectory serves one optimiser step: the steps' mean is the gradient of all (here the policy stands still)."""
    small.shorten(monkeypatch)
    for agg in ("sum", "seq"):
        steps, batch = recorded(tmp_path, agg, updates_per_rollout=4, loss_agg=agg)
        want = brute_force(tmp_path, batch, agg)
        assert len(steps) == 4 and (torch.stack(steps).mean(0) - want).norm() < 1e-4 * want.norm()
        assert (steps[0] - want).norm() > .1 * want.norm()


def test_more_processes_than_gpus_and_a_full_one(monkeypatch, capsys):
    """Each is one sentence that says what to do; the full one comes below its traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert vla_opd.setup(Args()) == (0, 1, torch.device("cuda:0"))
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError("of memory"), None)
    assert "of memory" in (said := capsys.readouterr().err) and "--micro-batch-size" in said.splitlines()[-1]
    sys.excepthook(ValueError, ValueError("else"), None)
    assert "--micro-batch-size" not in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for device in ("auto", "cuda", "cuda:0", "gpu"):
        with pytest.raises(SystemExit, match=f"--device {device}: .*1 here"):
            vla_opd.setup(Args(device=device))
    monkeypatch.delenv("LOCAL_RANK"), monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit, match="--device cuda:1: .*1 here"):
        vla_opd.setup(Args(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)       # there is one, but its driver is too old for torch
    assert vla_opd.setup(Args()) == (0, 1, torch.device("cpu"))


def worker(rank, folder, port):
    """One of two processes; the rollouts differ, so that only the sum over both is right."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    small.shorten(patch, 3 * rank)                       # unequal numbers of tokens
    joined = vla_opd.setup(Args(device="cpu"))
    patch.setattr(vla_opd, "setup", lambda args: joined)
    for agg in ("sum", "seq", "token"):
        (gradient,), batch = recorded(folder, agg, loss_agg=agg)
        tensors = {k: batch[k].contiguous() for k in ("image", "tokens", "mask", "episode")}
        save_file({"gradient": gradient, **tensors}, folder / f"{agg}{rank}.safetensors", {"text": "|".join(batch["instruction"])})
    (gradient,), _ = recorded(folder, "clipped", max_grad_norm=1e-3)
    save_file({"gradient": gradient}, folder / f"clipped{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    from safetensors import safe_open
    small.checkpoints(tmp_path)
    torch.multiprocessing.spawn(worker, (tmp_path, small.free_port()), 2)
    for agg in ("sum", "seq", "token"):
        files = [tmp_path / f"{agg}{rank}.safetensors" for rank in (0, 1)]
        a, b = map(load_file, files)
        assert torch.equal(a["gradient"], b["gradient"]), agg
        assert not torch.equal(a["image"][0], b["image"][0]), "both processes play the same"
        b["episode"] = b["episode"] + a["episode"].max() + 1
        batch = {k: torch.cat([a[k], b[k]]) for k in ("image", "tokens", "mask", "episode")}
        batch["instruction"] = [t for f in files for t in safe_open(f, "pt").metadata()["text"].split("|")]
        want = brute_force(tmp_path, batch, agg)
        assert (a["gradient"] - want).norm() < 1e-4 * want.norm(), agg
        if agg == "sum":                                 # clipped once, as a whole
            clipped = load_file(tmp_path / "clipped0.safetensors")["gradient"]
            assert (clipped - 1e-3 * want / want.norm()).norm() < 1e-3 * 1e-3


def test_matching_teacher_moves_nothing(tmp_path, monkeypatch):
    """A whole run with the student as its own teacher: the weights stay, bit for bit."""
    monkeypatch.setattr(vla_opd, "evaluate", small.no_evaluation)
    student = small.checkpoints(tmp_path)["student"]
    vla_opd.main(Args(**{**small.FEW, "student": student, "teacher": student, "updates_per_rollout": 1, "micro_batch_size": 512, "temperature": 1.6,
                         "run_dir": str(tmp_path / "run")}))
    before, after = load_file(f"{student}/model.safetensors"), load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
