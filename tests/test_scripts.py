"""The scripts as a user meets them: what a run leaves behind, stopping and going on, and what is said when something is wrong."""
import csv
import errno
import json
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import dagger_forward_kl
import dagger_hard_ce
import envs
import evaluate
import grpo
import ppo
import road_vla
import road_vla_text
import sft
import small
import vla_opd


class Script(NamedTuple):
    module: object
    roles: tuple                                         # the checkpoints it starts from
    flags: dict                                          # a run of 4 episodes an iteration
    metrics: str                                         # beside METRICS


METRICS = """charts/success_rate charts/eval_success charts/eval_low charts/eval_high charts/success charts/episodes charts/env_steps charts/queries
    charts/queries_per_second losses/policy_loss losses/entropy losses/approx_kl losses/clipfrac time/rollout time/update time/env"""
DISTILS = "charts/learned losses/reverse_kl_exact losses/teacher_agreement time/teacher"
GROUPS = "charts/learned charts/groups charts/groups_kept charts/groups_failed charts/groups_solved"
SCRIPTS = {
    **{m.__name__: Script(m, ("student", "teacher"), small.FEW, DISTILS) for m in (vla_opd, dagger_forward_kl, dagger_hard_ce)},
    "grpo": Script(grpo, ("student",), {**small.FEW, "keep_low": 0., "keep_high": 1.}, GROUPS)}


def rows(run_dir):
    return list(csv.DictReader(open(Path(run_dir) / "metrics.csv")))


def timeless(run_dir):
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k != "charts/queries_per_second"} for r in rows(run_dir)]


def flags(name, folder, decoding="parallel"):
    return {**SCRIPTS[name].flags, **{role: path for role, path in small.checkpoints(folder, decoding).items() if role in SCRIPTS[name].roles}}


def train(name, folder, run_dir, decoding="parallel", **kw):
    """A script's main in this process."""
    module = SCRIPTS[name].module
    module.main(module.Args(**{**flags(name, folder, decoding), "run_dir": str(folder / run_dir), **kw}))
    return folder / run_dir


def opd(*args, **kw):
    return train("vla_opd", *args, **kw)


def same_weights(a, b, *files):
    for file in files or ("model", "optimizer"):
        x, y = (load_file(run / "checkpoint" / f"{file}.safetensors") for run in (a, b))
        assert x.keys() == y.keys() and len(x) > 10
        assert not [k for k in x if not torch.equal(x[k], y[k])], file


# ------------------------------------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize("name,decoding", [*((name, "parallel") for name in SCRIPTS), ("vla_opd", "autoregressive")])
def test_end_to_end(tmp_path, name, decoding):
    """From another working directory; then the same seed again, then evaluate.py on what came out."""
    given, run, script = {**flags(name, tmp_path, decoding), "num_envs": 10}, tmp_path / "runs" / f"tabletop-object-{name}-1", SCRIPTS[name]
    metrics = (METRICS + " " + script.metrics).split()
    status, out, err = small.call(small.command(f"{name}.py", capture_video=True, **given), tmp_path)
    assert status == 0 and "Traceback" not in err, err
    assert str(run.relative_to(tmp_path)) in out and "before:" in out and "after:" in out
    first, *trained = rows(run)
    assert [r["step"] for r in (first, *trained)] == ["0", "1", "2"] and first["charts/eval_success"] and trained[1]["charts/eval_success"]
    assert set(metrics) | {"step"} == set(first)
    for row in trained:
        assert np.isfinite([float(row[k]) for k in metrics if row[k] or "eval" not in k]).all()
    assert float(trained[0]["charts/env_steps"]) == 4 * 64 and float(trained[0]["charts/queries"]) == 4 * 64 / small.CHUNK[decoding]
    assert 4 < float(trained[0]["losses/entropy"]) <= np.log(256) + 1e-4
    assert json.loads((run / "args.json").read_text())["seed"] == 1
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG" and (run / "eval.gif").read_bytes()[:3] == b"GIF"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(run)).Reload()
    assert set(board.Tags()["scalars"]) == set(metrics) and [e.step for e in board.Scalars("losses/entropy")] == [1, 2]
    before, after = load_file(f"{given['student']}/model.safetensors"), load_file(run / "checkpoint/model.safetensors")
    assert before.keys() == after.keys() and all(after[k].isfinite().all() for k in after)
    if "teacher" in script.roles:                        # a random policy never succeeds: nothing to learn from rewards
        assert float(trained[0]["losses/reverse_kl_exact"]) > .01 and trained[0]["losses/policy_loss"] != trained[1]["losses/policy_loss"]
        assert sum(not torch.equal(before[k], after[k]) for k in before) > .9 * len(before)
    assert len(load_file(run / "checkpoint/optimizer.safetensors")) == 3 * len(before)

    script.module.VLA.load(run / "checkpoint")
    if name != "vla_opd" or small.DEVICE != "cpu":       # for time's sake; all resume alike, see below.  On a GPU sums vary in their last digits
        return
    again = opd(tmp_path, "again", decoding, num_envs=10)                # in another process, with the same seed
    assert timeless(run) == timeless(again)
    same_weights(run, again)
    if decoding == "parallel":                           # the other way round for time's sake
        made = str(run.relative_to(tmp_path) / "checkpoint")
        status, out, err = small.call(small.command("evaluate.py", checkpoint=made, episodes_per_task=1, num_envs=8), tmp_path)
        assert status == 0, err
        assert len(list(csv.DictReader(open(tmp_path / f"runs/evaluate-tabletop-object-eval-{run.name}-1/episodes.csv")))) == 2 * 10
        other = opd(tmp_path, "other", seed=2)
        assert timeless(other)[1] != timeless(run)[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_adam_eps_reaches_the_optimizer(tmp_path, monkeypatch, name):
    """7 B's 1e-8 moves weights whose gradients are far below the default's 1e-5."""
    moved = {}
    small.shorten(monkeypatch)                           # so that some succeed: GRPO learns from the difference
    for eps in (1e-5, 1e-8):
        monkeypatch.setattr(SCRIPTS[name].module, "evaluate", small.no_evaluation)
        kw = {"seed": 1, "adam_eps": eps, "max_grad_norm": 1e-6, "num_iterations": 1}
        run = train(name, tmp_path, f"{name}-{eps}", **kw)
        before, after = (load_file(Path(k) / "model.safetensors") for k in (small.checkpoints(tmp_path)["student"], run / "checkpoint"))
        moved[eps] = sum((after[k] - before[k]).abs().sum() for k in before)
    assert moved[1e-8] > 5 * moved[1e-5] > 0, moved


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_played_and_how_fast_it_is_learned(tmp_path, monkeypatch, name):
    """Greedy on the evaluation's states before and after; sampled on the training's, new ones every iteration, from which the policy then moves away."""
    module, seen, rates, play, step = SCRIPTS[name].module, [], [], SCRIPTS[name].module.rollout, torch.optim.AdamW.step
    small.shorten(monkeypatch)

    def rollout(env, model, task, state, split, temperature, *rest):
        seen.append((split, temperature, state.tolist()))
        return play(env, model, task, state, split, temperature, *rest)
    monkeypatch.setattr(module, "rollout", rollout)
    monkeypatch.setattr(torch.optim, "AdamW", type("AdamW", (torch.optim.AdamW,), dict(step=lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))))
    run = train(name, tmp_path, "run", temperature=1.3, eval_every=9, num_envs=12)
    assert [s[:2] for s in seen] == [("eval", 0.), ("train", 1.3), ("train", 1.3), ("eval", 0.)]
    assert max(seen[1][2] + seen[2][2]) < 400 <= min(seen[0][2]) and seen[1][2] != seen[2][2]
    rate = module.Args().learning_rate
    assert rates == pytest.approx([rate] * 4 if name == "grpo" else [rate, rate, rate / 2, rate / 2])
    assert all(float(row["losses/approx_kl"]) > 1e-8 for row in rows(run)[1:])           # the ratio is that to the policy that played


def test_two_evaluators_are_one(monkeypatch):
    env, model, parts = envs.make("tabletop-object", 2), small.model(), []
    monkeypatch.setattr(vla_opd, "rollout", lambda env, model, task, state, *rest: dict(success=(task + state) % 3 == 0, grasped=state == 401, length=10 * task + state))
    alone = vla_opd.evaluate(env, model, "eval", 3, 0., 8, 1)
    monkeypatch.setattr(vla_opd, "all_sum", lambda x, world: parts.append(x.clone()) or x)
    [vla_opd.evaluate(env, model, "eval", 3, 0., 8, 1, rank, 2) for rank in (0, 1)]
    assert np.array_equal(sum(parts).numpy().reshape(alone.shape), alone)


def test_a_reward_is_its_querys():
    """Five episodes in three environments; every reward is the number of the state that the episode began in."""
    env, model, state = envs.make("tabletop-object", 3, 1), small.model(), np.array([5, 17, 3, 99, 42])
    step = env.step

    def paid(actions):
        obs, _, *rest = step(actions)
        return obs, env.init_state.astype(np.float32), *rest
    env.step = paid
    batch = vla_opd.rollout(env, model, np.arange(5), state, "train", 1., 8)
    assert torch.equal(batch["reward"], torch.from_numpy(state).float()[batch["episode"]])


@small.two_devices
def test_torchrun(tmp_path):
    """Two processes: one run directory, written by the first; totals are over both."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(small.free_port())]
    given = {**flags("vla_opd", tmp_path), "num_iterations": 1, "run_dir": "run"}
    status, out, err = small.call(words + small.command("vla_opd.py", **given)[1:], tmp_path)
    assert status == 0 and "Traceback" not in err, err
    assert out.count("before:") == 1 and len(list((tmp_path / "run").glob("events.*"))) == 1
    row = rows(tmp_path / "run")[1]
    assert {*METRICS.split(), *DISTILS.split()} <= set(row) and float(row["charts/env_steps"]) == 4 * 64 and float(row["charts/queries"]) == 4 * 16
    assert 4 < float(row["losses/entropy"]) <= np.log(256) + 1e-4
    vla_opd.VLA.load(tmp_path / "run" / "checkpoint")


@small.two_devices
def test_torchrun_evaluates_and_ends(tmp_path):
    """What one process finds, and nothing of the process group is left to end with Python: its threads abort some processes then."""
    (tmp_path / "ends.py").write_text("""import atexit, runpy, sys, torch.distributed as dist
atexit.register(lambda: sys.stdout.write(f"process {dist.is_initialized() and 'left a group'}\\n"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")""")
    given = dict(checkpoint=small.checkpoints(tmp_path)["student"], episodes_per_task=1, num_envs=8, device=small.DEVICE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(small.free_port()), str(tmp_path / "ends.py")]
    greedy = []
    for name, words in (("alone", [sys.executable]), ("both", torchrun)):
        status, out, err = small.call(words + small.command("evaluate.py", run_dir=name, **given)[1:], tmp_path)
        assert status == 0 and "Traceback" not in err, err
        greedy.append([r for r in csv.DictReader(open(tmp_path / name / "episodes.csv")) if r["mode"] == "greedy"])
    assert out.count("process False") == 2 and out.count("episodes: ") == 1, out
    assert greedy[0] == greedy[1] and len(greedy[0]) == 10


def test_two_arms(tmp_path, monkeypatch):
    """14 dimensions, chunk x 14 tokens, through every script."""
    small.shorten(monkeypatch)
    roles = {role: small.model(seed=seed, action_dim=14).save(tmp_path / role) or str(tmp_path / role) for seed, role in enumerate(("student", "teacher"))}
    given = dict(small.RUN, env="tabletop-two-arm", num_envs=12, num_iterations=1)
    critic = dict(given, student=roles["student"], num_episodes=6)
    runs = [(script.module, {**script.flags, **given, **{role: roles[role] for role in script.roles}}) for script in SCRIPTS.values()]
    runs += [(ppo, critic), (road_vla, dict(critic, reference=str(tmp_path / "ppo"))), (road_vla_text, dict(critic, privileged_info="rel-spatial"))]
    runs += [(sft, dict({k: v for k, v in given.items() if k != "updates_per_rollout"}, student=roles["student"], batch_size=32))]
    for module, kw in runs:
        run, played = tmp_path / module.__name__, []
        with pytest.MonkeyPatch.context() as patch:
            play = module.rollout
            patch.setattr(module, "rollout", lambda *a, **k: played.append(play(*a, **k)) or dict(played[-1]))
            module.main(module.Args(**kw, run_dir=str(run)))
        assert {p["tokens"].shape[1] for p in played} == {4 * 14} and all(p["mask"].sum() == 14 * p["length"].sum() > 0 for p in played), module
        assert json.loads((run / "checkpoint/config.json").read_text())["action_dim"] == 14, module
        assert all(np.isfinite(float(v)) for v in rows(run)[-1].values() if v), module
    evaluate.main(evaluate.Args(env="tabletop-two-arm", checkpoint=str(run / "checkpoint"), episodes_per_task=1, num_envs=12, device=small.DEVICE, run_dir=str(tmp_path / "ev")))
    assert len(list(csv.DictReader(open(tmp_path / "ev" / "episodes.csv")))) == 2 * 10


# ----------------------------------------------------------------------------------------------------- stopping, going on
@pytest.mark.parametrize("decoding,rank", [("autoregressive", 0), ("parallel", 4)], ids=["full", "lora"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_is_exact(tmp_path, monkeypatch, name, decoding, rank):
    small.shorten(monkeypatch)                           # some episodes succeed, so that there is something to learn
    straight = train(name, tmp_path, "straight", decoding, lora_rank=rank, num_envs=12)
    train(name, tmp_path, "parts", decoding, lora_rank=rank, num_envs=12, num_iterations=1)
    same = load_file(tmp_path / "parts/checkpoint" / ("adapter_model.safetensors" if rank else "model.safetensors"))
    parts = train(name, tmp_path, "parts", decoding, lora_rank=rank, num_envs=12, resume=True)
    same_weights(straight, parts, "adapter_model" if rank else "model", "optimizer")
    moved = load_file(parts / "checkpoint" / ("adapter_model.safetensors" if rank else "model.safetensors"))
    assert max((same[k] - moved[k]).abs().max() for k in same) > 1e-5, "the second iteration did nothing"      # more than weight decay
    assert timeless(straight)[2] == timeless(parts)[2] and [r["step"] for r in rows(parts)] == ["0", "1", "2"]
    assert float(rows(parts)[2]["charts/eval_success"]) > 0
    SCRIPTS[name].module.VLA.load(parts / "checkpoint")
    if rank:
        assert all("lora_" in k for k in moved) and sum("lora_B" in k and bool(v.any()) for k, v in moved.items()) == len(moved) // 2
        assert not (parts / "checkpoint/model.safetensors").exists()


def test_killed_and_resumed(tmp_path):
    given = {**flags("vla_opd", tmp_path), "run_dir": "run", "num_iterations": 500, "eval_every": 500}
    checkpoint = tmp_path / "run" / "checkpoint" / "progress.json"
    process = small.start(small.command("vla_opd.py", **given), tmp_path)
    try:
        for _ in range(1200):
            if checkpoint.exists() or process.poll() is not None:
                break
            time.sleep(.1)
    finally:
        process.kill()
        err = process.communicate()[1]
    assert checkpoint.exists() and process.returncode == -9, err
    step = json.loads(checkpoint.read_text())["step"]
    status, out, err = small.call(small.command("vla_opd.py", **{**given, "num_iterations": 1}), tmp_path)     # forgot --resume
    assert status == 1 and "Traceback" not in err and "--resume" in (said := err.splitlines()[-1]) and "--run-dir" in said, err
    straight = opd(tmp_path, "straight", num_iterations=step + 1, eval_every=500)
    resumed = opd(tmp_path, "run", num_iterations=step + 1, eval_every=500, resume=True)
    assert [r["step"] for r in rows(resumed)] == [str(i) for i in range(step + 2)]
    same_weights(straight, resumed)


def test_resume_refuses_other_flags(tmp_path, monkeypatch):
    """And leaves the run as it was; what changes no result, and the number of iterations, may change."""
    [monkeypatch.setattr(module, "evaluate", small.no_evaluation) for module in (vla_opd, grpo)]
    run = opd(tmp_path, "run", num_iterations=1)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for other, words in ((lambda: opd(tmp_path, "run", learning_rate=1., resume=True), "started with learning_rate = 0.0005: resume it so"),
                         (lambda: opd(tmp_path, "run", env="tabletop-goal", resume=True), "env = 'tabletop-object'"),
                         (lambda: train("grpo", tmp_path, "run", resume=True), "estimator = 'exact'")):
        with pytest.raises(SystemExit, match=words):
            other()
    with monkeypatch.context() as patch:
        [patch.setattr(vla_opd.dist, k, lambda v=v: v) for k, v in dict(is_initialized=True, get_world_size=2, barrier=None).items()]
        with pytest.raises(SystemExit, match="started with processes = 1"):
            opd(tmp_path, "run", resume=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    opd(tmp_path, "run", num_iterations=2, eval_every=1, micro_batch_size=7, resume=True)


@pytest.mark.parametrize("left", ["checkpoint.old", "checkpoint.tmp"])
def test_killed_while_saving(tmp_path, monkeypatch, left):
    """Whatever step of save() it died at: the leftovers do not matter."""
    monkeypatch.setattr(vla_opd, "evaluate", small.no_evaluation)
    run, save = opd(tmp_path, "run", num_iterations=1), vla_opd.Run.save
    monkeypatch.setattr(vla_opd.Run, "save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):               # logged, not saved: played again, and on the board once
        opd(tmp_path, "run", resume=True)
    monkeypatch.setattr(vla_opd.Run, "save", save)
    if left == "checkpoint.old":                         # between the renames: only the old one is there
        (run / "checkpoint").rename(run / left)
        opd(tmp_path, "run", resume=True)
    shutil.copytree(run / "checkpoint", run / left)      # .old: after the renames, before the old one was removed
    opd(tmp_path, "run", num_iterations=3, resume=True)
    assert json.loads((run / "checkpoint/progress.json").read_text())["step"] == 3
    assert [p.name for p in run.glob("checkpoint*")] == ["checkpoint"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert [e.step for e in EventAccumulator(str(run)).Reload().Scalars("losses/entropy")] == [1, 2, 3]


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
def test_full_disk(tmp_path, monkeypatch, error):
    """One sentence, and the checkpoint before is as it was; with room again --resume goes on."""
    monkeypatch.setattr(vla_opd, "evaluate", small.no_evaluation)
    run, save = opd(tmp_path, "run", num_iterations=1), vla_opd.save_file

    def full(tensors, path, *a):
        save(dict(list(tensors.items())[:3]), path, *a)
        raise error
    before = {p.name: p.read_bytes() for p in (run / "checkpoint").iterdir()}
    monkeypatch.setattr(vla_opd, "save_file", full)
    with pytest.raises(SystemExit, match="disk is full|No space left") as e:
        opd(tmp_path, "run", resume=True)
    assert "\n" not in e.value.code and "--resume" in e.value.code
    assert before == {p.name: p.read_bytes() for p in (run / "checkpoint").iterdir()}
    monkeypatch.setattr(vla_opd, "save_file", save)
    opd(tmp_path, "run", resume=True)
    same_weights(opd(tmp_path, "straight"), run)


def test_intervals_hold_the_rate(tmp_path, monkeypatch):
    """At 0 and 100 % too, to the last bit: finish() draws them, and matplotlib wants no negative error."""
    assert vla_opd.wilson(np.arange(200) < 100) == pytest.approx((.4314, .5686), abs=1e-4)
    for n in range(1, 300):
        for k in {0, 1, n // 2, n}:
            success = np.arange(n) < k
            low, high = vla_opd.wilson(success)
            assert 0 <= low <= success.mean() <= high <= 1, (n, k)
    monkeypatch.setattr(vla_opd, "evaluate", lambda *a: small.no_evaluation(*a) + 1)
    assert (opd(tmp_path, "run", num_iterations=1, eval_episodes_per_task=2) / "curve.png").exists()     # 20 of 20


# ----------------------------------------------------------------------------------------------------------------- errors
def refused(main, args, *words):
    """A SystemExit with one sentence: Python prints it without a traceback and exits with 1."""
    with pytest.raises(SystemExit) as e:
        main(args)
    said = e.value.code
    assert isinstance(said, str) and "\n" not in said and 20 < len(said) < 1000, said
    assert not [w for w in words if w not in said], said
    return said


@pytest.mark.parametrize("module", [*(script.module for script in SCRIPTS.values()), sft, evaluate], ids=lambda m: m.__name__)
@pytest.mark.parametrize("flags,words", [
    (dict(env="tabletop-nowhere"), ("tabletop-nowhere", "tabletop-object")),
    (dict(env="nowhere"), ("nowhere", "tabletop-object")),
    (dict(weights="nobody/nothing"), ("nobody/nothing", "hf download")),
    (dict(weights="runs/mistyped/checkpoint"), ("runs/mistyped/checkpoint is no folder",)),
    (dict(weights="EMPTY"), ("model*.safetensors",)),
    (dict(device="cuda"), ("--device cuda", "--device cpu")),
    (dict(device="teapot"), ("teapot",))], ids=lambda x: "-".join(x) + "-" + next(iter(x.values())).replace("/", "_") if isinstance(x, dict) else "")
def test_one_sentence(tmp_path, monkeypatch, module, flags, words):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    flags, weights = {"device": small.DEVICE, **flags}, flags.get("weights") or small.checkpoints(tmp_path)["student"]
    flags.pop("weights", None)
    key = "checkpoint" if module is evaluate else "student"
    said = refused(module.main, module.Args(num_envs=4, **{key: weights}, **flags, run_dir=str(tmp_path / "run")), *words)
    assert "hf download runs" not in said                # no hub id has two slashes
    assert not list(tmp_path.glob("run/checkpoint*"))


@pytest.mark.parametrize("flags,words", [
    (dict(batch_prompts=1, group_size=1, updates_per_rollout=2), ("--batch-prompts", "--updates-per-rollout")),
    (dict(updates_per_rollout=0), ("--updates-per-rollout",)),
    (dict(teacher="nobody/nothing"), ("nobody/nothing",)),
    (dict(reward="rollout"), ("--reward rollout", "--estimator sampled")),
    (dict(resume=True), ("nothing to resume", "--resume")),
    (dict(temperature=0.), ("--temperature",)),
    (dict(seed=-1), ("--seed -1",)),
    (dict(env="tabletop-two-arm"), ("takes actions of 14 numbers", "have 7")),
    (dict(num_envs=0), ("--num-envs",)),
    (dict(num_iterations=0), ("--num-iterations",)),
    (dict(max_grad_norm=-1.), ("--max-grad-norm",)),
    (dict(eval_episodes_per_task=0), ("--eval-episodes-per-task",)),
    (dict(micro_batch_size=0), ("--micro-batch-size",))], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_one_sentence_opd(tmp_path, monkeypatch, flags, words):
    "env" in flags or monkeypatch.setattr(vla_opd, "evaluate", small.no_evaluation)
    refused(lambda _: opd(tmp_path, "run", **flags), None, *words)


@pytest.mark.parametrize("flags,words", [
    (dict(group_size=1), ("--group-size",)), (dict(keep_low=.9, keep_high=.1), ("--keep-low",)), (dict(max_rollouts=0), ("--max-rollouts",)), (dict(updates_per_rollout=0), ("--updates-per-rollout",)),
    (dict(batch_prompts=0), ("--batch-prompts",)), (dict(resume=True), ("--resume",))], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_one_sentence_grpo(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(grpo, "evaluate", small.no_evaluation)
    refused(lambda _: train("grpo", tmp_path, "run", **flags), None, *words)


def test_one_sentence_evaluate(tmp_path):
    weights = small.checkpoints(tmp_path)["student"]
    refused(evaluate.main, evaluate.Args(checkpoint=weights, split="ood", run_dir=str(tmp_path)), "ood", "eval")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "teacher" in SCRIPTS[name].roles])
def test_mismatched_teacher_is_refused(tmp_path, name):
    small.model(seed=1, chunk=2).save(tmp_path / "other")
    refused(lambda _: train(name, tmp_path, "run", teacher=str(tmp_path / "other")), None, "chunk")


def test_command_line_errors(tmp_path):
    """What the shell sees: flags that do not exist, and a SystemExit's way out."""
    for words, said in ((small.command("vla_opd.py", group_sizes=3), "group"), (small.command("vla_opd.py", estimator="k3"), "sampled"),
                        (small.command("vla_opd.py", learning_rate="fast"), "learning-rate"),
                        (small.command("evaluate.py", checkpoint="nobody/nothing", device=small.DEVICE), "hf download nobody/nothing")):
        status, out, err = small.call(words, tmp_path)
        assert status in (1, 2) and said in out + err and "Traceback" not in out + err, out + err
    assert "hf download" in err.splitlines()[-1] and status == 1        # libraries may have said something before
    assert not list(tmp_path.iterdir())
