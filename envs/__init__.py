"""envs.make(env_id, ...) -> one gymnasium vector environment for every suite.  This docstring is the contract; an adapter is one file beside this one.

To add a simulator, write `class MyEnv(SimulatorEnv)` and add its names to SUITES below.  Its constructor gets the name behind the dash, num_envs, seed, and calls
    super().__init__(Suite(name, tasks, splits, max_steps, action_dim, chunk, image), num_envs, seed)
      name     the whole one; tasks: the instructions, one a task
      splits   {"train": [...], "eval": [...]} initial states (integers), disjoint; shifted suites have an "ood" split as well, with scenes of its own
and it has these methods, over all environments at once, where `live` is a boolean mask of those that count:
    _reset(i, task, init_state, split)   put environment i into that state, return its instruction; the same arguments always give the same state
    _step(action [N, dim], live)         one step of the live ones; returns where the goal holds now, [N] bool; self.broken[i] = True ends an episode
    _render(live)                        pictures of the live ones, uint8 [live.sum(), H, W, 3]
    _grasped()                           who holds the right object now, [N] bool; where goals need no grasp (LIBERO, maniskill:ID), also where the goal holds: fixed_horizon pays for both
    expert_action()                      (optional) the privileged expert's next action, [N, dim]
    describe(), keypoints()              (optional) the state that road_vla_text.py puts into words; what is where in the picture, for sft.py --pretrain-tower
What users get (gymnasium's VectorEnv conventions):
    obs, info = env.reset(seed=..., options=dict(task=[...], init_state=[...], split="train", mask=[...]))
        task and init_state: integers, one an environment (drawn from the seed if absent); mask: restart only these
    obs, reward, terminated, truncated, info = env.step(actions [N, chunk, dim])
        obs["image"] uint8 [N, H, W, 3], obs["instruction"] N strings.  The chunk is executed inside, open loop; it stops where the episode ends, and
        info["steps"] says how many environment steps ran.  One picture is drawn, after the last one.  A finished episode is inert: its picture
        stays, its steps are 0 and its reward too, until it is reset.  reward: 1 in the step that succeeds.
        info: success, grasped, kept (grasped for 5 steps in a row), all at any time so far (rl4vla's success: now), and steps, each [N].
    env.fixed_horizon = True    RL4VLA's training: success does not end the episode, and the reward is the change, since the chunk before, of
        0.1 (grasped so far) + 0.1 (kept so far) + 1 (the goal holds now, and grasped so far)
"""
import importlib, os, re, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
import gymnasium, numpy as np

TABLETOP = ("spatial", "object", "goal", "long", "unseen-table", "dynamic-texture", "dynamic-noise", "multi-object", "multi-receptacle", "init-pose",
            "repositioning", "two-arm")
SUITES = {"tabletop": ("TabletopEnv", TABLETOP), "libero": ("LiberoEnv", TABLETOP[:4]), "rl4vla": ("RL4VLAEnv", ("main", *TABLETOP[4:11])),
          "maniskill": ("ManiSkillEnv", TABLETOP[4:11]),
          "robotwin": ("RoboTwinEnv", ("pick-dual-bottles", "place-empty-cup", "handover-block", "stack-bowls-two", "beat-block-hammer"))}


@dataclass
class Suite:
    name: str
    tasks: list
    splits: dict
    max_steps: int
    action_dim: int
    chunk: int
    image: int


class SimulatorEnv(gymnasium.vector.VectorEnv):
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}

    def __init__(self, suite, num_envs, seed):
        self.suite, self.num_envs, self.seed, self.closed, self.rng = suite, num_envs, seed, False, np.random.default_rng(seed)
        box, text = gymnasium.spaces.Box(0, 255, (suite.image, suite.image, 3), np.uint8), gymnasium.spaces.Text(256, charset=[chr(c) for c in range(32, 127)])
        self.single_observation_space = gymnasium.spaces.Dict(image=box, instruction=text)
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (suite.chunk, suite.action_dim), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.task, self.init_state, self.steps, self.in_a_row = (np.zeros(num_envs, int) for _ in range(4))
        self.done, self.split, self.fixed_horizon = np.ones(num_envs, bool), np.full(num_envs, "train", object), False
        self.succeeded, self.grasped, self.kept, self.holds, self.broken = (np.zeros(num_envs, bool) for _ in range(5))
        self.image, self.instruction = np.zeros((num_envs, suite.image, suite.image, 3), np.uint8), [""] * num_envs

    def reset(self, *, seed=None, options=None):
        o = {"mask" if k == "reset_mask" else k: v for k, v in (options or {}).items()}      # gymnasium's name for it
        self.seed, self.rng = (self.seed, self.rng) if seed is None else (seed, np.random.default_rng(seed))
        if unknown := set(o) - {"task", "init_state", "split", "mask"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}: there are task, init_state, split and mask")
        split, rng, mask = o.get("split", "train"), self.rng, np.broadcast_to(o.get("mask", True), self.num_envs).astype(bool)
        if split not in self.suite.splits:
            raise ValueError(f"{self.suite.name} has no split {split!r}: there are {', '.join(self.suite.splits)}")
        task = np.broadcast_to(o["task"] if o.get("task") is not None else rng.integers(len(self.suite.tasks), size=self.num_envs), self.num_envs)
        state = np.broadcast_to(o["init_state"] if o.get("init_state") is not None else rng.choice(self.suite.splits[split], self.num_envs), self.num_envs)
        if not 0 <= min(task) <= max(task) < len(self.suite.tasks) or min(state) < 0:
            raise ValueError(f"{self.suite.name} has tasks 0 to {len(self.suite.tasks) - 1} and initial states from 0 on, not {min(task)} to {max(task)} and {min(state)}")
        for i in np.flatnonzero(mask):
            self.task[i], self.init_state[i], self.split[i] = task[i], state[i], split
            self.instruction[i] = self._reset(i, int(task[i]), int(state[i]), split)
        for state in (self.steps, self.in_a_row, self.done, self.succeeded, self.grasped, self.kept, self.holds, self.broken):
            state[mask] = 0
        self.image[mask] = self._render(mask)
        return self._obs(), self._info(np.zeros(self.num_envs, int))

    def step(self, actions):
        actions = np.clip(np.asarray(actions, float), -1, 1)
        if actions.ndim != 3 or actions.shape[::2] != (self.num_envs, self.suite.action_dim) or np.isnan(actions).any():
            raise ValueError(f"{self.suite.name} takes actions [{self.num_envs}, chunk, {self.suite.action_dim}] without NaN, not {list(actions.shape)}")
        started, before, was, potential = ~self.done, self.steps.copy(), self.succeeded.copy(), self._potential()
        for action in actions.swapaxes(0, 1):
            live = ~self.done
            if not live.any():
                break
            self.holds = np.where(live, self._step(action, live), self.holds)
            self.in_a_row = np.where(live, (self.in_a_row + 1) * self._grasped(), self.in_a_row)
            self.grasped, self.kept, self.succeeded = self.grasped | (self.in_a_row > 0), self.kept | (self.in_a_row >= 5), self.succeeded | self.holds
            self.steps += live
            self.done |= (self.succeeded & (not self.fixed_horizon)) | (self.steps >= self.suite.max_steps) | self.broken
        self.image[started] = self._render(started)
        reward = self._potential() - potential if self.fixed_horizon else self.succeeded & ~was
        terminated = self.succeeded & (not self.fixed_horizon)
        return self._obs(), reward.astype(np.float32), terminated, self.done & ~terminated, self._info(self.steps - before)

    def _potential(self):
        return .1 * self.grasped + .1 * self.kept + (self.holds & self.grasped)

    def _obs(self):
        return dict(image=self.image.copy(), instruction=tuple(self.instruction))

    def _info(self, steps):
        return dict(success=self.succeeded.copy(), grasped=self.grasped.copy(), kept=self.kept.copy(), steps=steps)


def checkpoint(env_id, role):
    """The suite's own student or teacher: a hub id, or a folder shipped with the repository, or made now by sft.py."""
    if env_id.startswith("libero"):
        return importlib.import_module("envs.libero").checkpoint(env_id, role)
    name, sft = f"{env_id}-{role}", Path(__file__).resolve().parents[1] / "algos" / "sft.py"
    folder, command = sft.parents[1] / "checkpoints" / name, [sys.executable, str(sft), "--make", name]
    if not env_id.startswith("tabletop") or not folder.exists() and not sft.exists():
        made = f" (where there is a scripted expert, `python algos/sft.py --env {env_id}` makes one)" * (not env_id.startswith(("rl4vla", "robotwin")))
        raise SystemExit(f"{env_id} has no default {role} here: name a folder or a hub id with --{role} (evaluate.py: --checkpoint){made}")
    if not (folder / "config.json").exists() and os.environ.get("RANK", "0") == "0":
        print(f"{folder} is missing; making it, in minutes (its base, if missing too, takes an hour): {' '.join(command)}", flush=True)
        subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")})
    while not (folder / "config.json").exists():     # another process makes it
        time.sleep(1)
    return str(folder)


def vocabulary(env_id):
    """The words of a suite's instructions, those of its unseen objects too."""
    if env_id.startswith("maniskill"):
        return importlib.import_module("envs.maniskill").vocabulary(env_id)
    if env_id.startswith("rl4vla"):
        from envs.rl4vla import OBJECTS, PLATES
        return {w for k in (*OBJECTS, *PLATES, "put on") for w in k.lower().split()}
    from envs import tabletop
    return {w for t in make(env_id).suite.tasks for w in t.split()} | {w for k in tabletop.KINDS for w in k.split()}


def known():
    return [f"tabletop-{name}" for name in TABLETOP]


def make(env_id, num_envs=1, seed=0, **kwargs):
    """Imports the suite's adapter only.  LIBERO's, RoboTwin's and ManiSkill's names take options behind them; maniskill:ID is any of ManiSkill's tasks."""
    prefix, name = re.match(r"(\w*)-?(.*)", env_id).groups()
    adapter, names = SUITES.get(prefix, ("", ()))
    if name in names or prefix in ("libero", "robotwin", "maniskill") and name.startswith(tuple(f"{n}-" for n in names)) or env_id[:10] == "maniskill:":
        return getattr(importlib.import_module(f"envs.{prefix}"), adapter)(name, num_envs, seed, **kwargs)
    raise SystemExit(f"unknown environment {env_id!r}; known: {', '.join(f'{k}-{n}' for k, (_, names) in SUITES.items() for n in names)}")
