"""Runs so small that tests can afford them: random models of a few thousand parameters on tabletop-object."""
import functools
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import sft
import vla_opd
from envs.tabletop import TabletopEnv

ALGOS = Path(__file__).resolve().parents[1] / "algos"
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
two_devices = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="two processes need two GPUs")
RUN = dict(num_envs=4, num_iterations=2, updates_per_rollout=2, eval_episodes_per_task=1, device=DEVICE)
FEW = dict(RUN, batch_prompts=2, group_size=2)
FAR = 1e9                                                # a clipping threshold that no gradient reaches
CHUNK = dict(parallel=4, autoregressive=1)


@functools.cache
def words():
    return sorted(envs.vocabulary("tabletop-object"))


def model(decoding="parallel", seed=0, **kw):
    made = sft.tiny(words(), **{**dict(decoding=decoding, chunk=CHUNK[decoding], width=32, layers=2, tokens=4, tower=8), **kw})
    torch.manual_seed(seed)
    return vla_opd.VLA(made.config, made.tokenizer).eval()


def checkpoints(folder, decoding="parallel"):
    """A student and a teacher that differ, as flags."""
    for role, seed in (("student", 0), ("teacher", 1)):
        if not (folder / f"{decoding}-{role}").exists():
            model(decoding, seed).save(folder / f"{decoding}-{role}")
    return {role: str(folder / f"{decoding}-{role}") for role in ("student", "teacher")}


def nearly_equal(decoding):
    """A student and teachers ever further from it, computing in bfloat16."""
    student, teacher = (model(decoding, 0, action_dim=2, chunk=2) for _ in range(2))
    student.compute = teacher.compute = torch.bfloat16
    for noise in (0., 1e-4, 1e-2, .3):
        torch.manual_seed(2)
        for p, q in zip(student.parameters(), teacher.parameters()):
            q.data = p.data + noise * p.data.std() * torch.randn_like(p) if p.numel() > 1 else p.data
        yield noise, student, teacher


def no_evaluation(env, model, split, episodes_per_task, *rest):
    """For tests of something else: evaluation takes most of a tiny run's time."""
    return np.zeros((3, len(env.suite.tasks), episodes_per_task))


def shorten(patch, more=0):
    """Episodes of 5, 7 or 9 steps, so that chunks end early and lengths differ; the long ones fail.  `more`: all so much longer."""
    init, step = TabletopEnv.__init__, TabletopEnv._step

    def limited(self, *args, **kw):
        init(self, *args, **kw)
        self.suite.max_steps = 9 + more

    def lucky(self, action, live):
        third = np.arange(self.num_envs) % 3
        return step(self, action, live) | live & (third < 2) & (self.steps == 4 + more + 2 * third)
    patch.setattr(TabletopEnv, "__init__", limited)
    patch.setattr(TabletopEnv, "_step", lucky)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


class Recorder(torch.optim.AdamW):
    """Keeps the gradient of every step and takes none, so that each is that of the start."""
    gradients = []

    def step(self):
        Recorder.gradients.append(flat(p.grad for g in self.param_groups for p in g["params"] if p.grad is not None).cpu())


def recorded(script, args):
    """The gradients of script.main(args), and the batches it played."""
    played, original, Recorder.gradients = [], script.rollout, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorder)
        patch.setattr(script, "evaluate", no_evaluation)
        patch.setattr(script.Run, "save", lambda *a: None)
        patch.setattr(script.Run, "finish", lambda *a: None)
        patch.setattr(script, "rollout", lambda *a, **k: played.append(original(*a, **k)) or dict(played[-1]))
        script.main(args)
    return Recorder.gradients, played


rank = threading.local()                                  # rank.id: which of the two


def two(patch, script, work):
    """work() in two threads in the place of processes, their sums by hand.  Returns what each made of it."""
    barrier, given, made, failed = threading.Barrier(2, timeout=60), {}, {}, []

    def all_sum(x, world):
        if world > 1:
            given[rank.id] = x.clone()
            barrier.wait()
            x.copy_(given[0] + given[1])
            barrier.wait()
        return x

    def process(i):
        rank.id = i
        try:
            made[i] = work()
        except BaseException as e:
            failed.append(e)
            barrier.abort()
    patch.setattr(script, "all_sum", all_sum)
    threads = [threading.Thread(target=process, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed, failed
    return made[0], made[1]


def twice(patch, script):
    """script.main() is two processes from now on: small.two's threads."""
    main = script.main
    patch.setattr(script, "Run", type("Run", (script.Run,), dict(__init__=lambda *a: None, log=lambda *a: None)))
    patch.setattr(script, "setup", lambda args: (rank.id, 2, torch.device("cpu")))
    patch.setattr(script.dist, "broadcast", lambda *a: None)
    patch.setattr(script, "main", lambda args: two(patch, script, lambda: main(args)))


def command(script, **flags):
    words = [f"--{k.replace('_', '-')}" if v is True else f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    return [sys.executable, str(ALGOS / script), *words]


def start(words, cwd, **kw):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(words, cwd=cwd, env={**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def call(words, cwd):
    """Exit status, what it printed, what it complained."""
    p = start(words, cwd)
    try:
        out, err = p.communicate(timeout=300)
    finally:
        p.kill()
    return p.returncode, out, err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
