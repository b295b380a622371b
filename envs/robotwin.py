"""RoboTwin 2.0, two arms: robotwin-pick-dual-bottles, -place-empty-cup, -handover-block, -stack-bowls-two, -beat-block-hammer.

Install RoboTwin as robotwin-platform.github.io says and set ROBOTWIN_ROOT to its folder, and ROBOTWIN_PYTHON to its interpreter if that is another one.
Every environment is a process of its own there (robotwin_worker.py), alive until close().

Protocol (RoboTwin's eval_policy.py; chunks and picture are SimpleVLA-RL's): an initial state is a seed that the expert solves, found by letting it play; the
scene is set up again, gets an instruction, and is played in chunks of 25.  Actions are 14 absolute joint positions, not clipped: left arm 6, left gripper (0 closed, 1 open), right arm 6,
right gripper; obs["state"] has the present ones, for policies with proprioception, as SimpleVLA-RL's and RLinf's (OpenVLA here has none).  The picture is the
head camera's, the middle 0.9 of its area at 224 pixels.
    seeds        initial state s is the first of the seeds s .. s + 99 that the expert solves.  ROBOTWIN_SEEDS (or seeds=) names a folder with SimpleVLA-RL's
                 lists, verl/utils/envs/robotwin2/seeds: then these are the initial states, and only the first visit of each needs the expert, to describe it
    -simplevla   at the end of a name: SimpleVLA-RL's step limits, instructions seen in training, evaluation seeds from where its begin (its very own: ROBOTWIN_SEEDS).  On
                 its copy of RoboTwin (notices itself) a chunk is one
                 smooth motion, success is told after it, and with ROBOTWIN_SEEDS nothing needs the expert
RoboTwin does not tell what is grasped: info["grasped"] is False, and with fixed_horizon the reward is the change of "the goal holds".
A simulator that fails ends its episode, a failure, and is replaced; stderr tells, and env.broken marks it.
"""
import json, os, sys
from pathlib import Path
import gymnasium
import numpy as np
from envs import Suite, SimulatorEnv
from envs.libero_worker import crop
from envs.worker import Worker, cores

# RoboTwin's (env_cfg/)task_config/_eval_step_limit.yml, SimpleVLA-RL's rob_rollout.py
LIMITS = {"pick-dual-bottles": (400, 100), "place-empty-cup": (500, 200), "handover-block": (800, 400), "stack-bowls-two": (900, 400),
          "beat-block-hammer": (400, 200)}


def picture(frame, size=224, area=.9):
    """The middle of a frame, as tf.image.crop_and_resize does it: bilinear, corners aligned."""
    rows, columns = (crop(n, size, area) for n in frame.shape[:2])
    return (np.einsum("ih,hwc,jw->ijc", rows, frame / 255, columns, optimize=True).clip(0, 1) * 255.5).astype(np.uint8)


def start(root, words):
    rank, gpus = os.environ.get("LOCAL_RANK"), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    mask = dict(CUDA_VISIBLE_DEVICES=gpus[int(rank)] if len(gpus) > int(rank) and gpus[0] else rank) if rank else {}     # under torchrun: this process's GPU
    return Worker([os.environ.get("ROBOTWIN_PYTHON", sys.executable), str(Path(__file__).with_name("robotwin_worker.py"))], words, root, mask)


class RoboTwinEnv(SimulatorEnv):
    def __init__(self, name, num_envs=1, seed=0, max_steps=None, seeds="", task_config="demo_randomized", instructions="", workers=None, timeout=1800):
        """task_config: one of RoboTwin's.  instructions: seen or unseen.  workers: at most so many environments (default: one a core).  timeout: seconds."""
        self.workers, self.timeout, task = [], timeout, name.removesuffix("-simplevla")
        if task not in LIMITS:
            raise SystemExit(f"there is no robotwin-{name}: there are {', '.join(LIMITS)}, each also with -simplevla at its end")
        self.root, seeds, module = os.environ.get("ROBOTWIN_ROOT", ""), seeds or os.environ.get("ROBOTWIN_SEEDS", ""), task.replace("-", "_")
        if not self.root or not (Path(self.root) / "envs" / f"{module}.py").is_file():
            raise SystemExit(f"robotwin-{name} needs RoboTwin 2.0: install it (robotwin-platform.github.io), set ROBOTWIN_ROOT to its folder")
        start = 100_000 if name == task else 100_100_000                     # where RoboTwin's own begin; SimpleVLA-RL trains there
        splits = dict(train=range(200_000, 300_000, 100), eval=range(start, start + 10_000, 100))
        if seeds:
            try:
                splits = {k: json.loads((Path(seeds) / f"robotwin2_{k}_seeds.json").read_text())[module]["success_seeds"] for k in splits}
            except (OSError, KeyError, ValueError) as e:
                raise SystemExit(f"{seeds} must hold robotwin2_train_seeds.json and robotwin2_eval_seeds.json with {module} ({type(e).__name__}: {e})")
        if num_envs > (most := workers or cores()):
            print(f"robotwin-{name}: {most} environments side by side, one a core, instead of {num_envs}", file=sys.stderr, flush=True)
        self.words, self.known, self.visited = (module, task_config, instructions or ("seen" if name != task else "unseen")), bool(seeds), {}
        super().__init__(Suite(f"robotwin-{name}", [task.replace("-", " ")], {k: list(v) for k, v in splits.items()}, max_steps or LIMITS[task][name != task],
                               action_dim=14, chunk=25, image=224), min(num_envs, most), seed)
        n, box = self.num_envs, gymnasium.spaces.Box
        self.single_observation_space = gymnasium.spaces.Dict(self.single_observation_space.spaces | dict(state=box(-np.inf, np.inf, (14,), np.float32)))
        self.single_action_space = box(-2 * np.pi, 2 * np.pi, (25, 14), np.float32)          # radians
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, n)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, n)
        self.state, self.waiting, self.workers = np.zeros((n, 14), np.float32), np.zeros(n, bool), [None] * n

    def _answer(self, i):
        """What worker i says; None if it failed, then it is gone."""
        try:
            answer = self.workers[i].receive(self.timeout)
        except (EOFError, OSError, RuntimeError) as e:
            self.failure, self.workers[i] = f"{e or 'the simulator died'}; {self.workers[i].kill()}", None
            return print(f"{self.suite.name}: environment {i} failed: {self.failure}", file=sys.stderr, flush=True)
        self.image[i] = picture(np.frombuffer(answer["frame"], np.uint8).reshape(answer["shape"]))
        self.state[i] = answer["state"]
        return answer

    def _reset(self, i, task, init_state, split):
        seed, info = self.visited.get(init_state, (init_state, None))
        self.workers[i], self.waiting[i] = self.workers[i] or start(self.root, self.words), True
        self.workers[i].send("reset", seed, self.known, info, self.suite.max_steps)
        return ""                                                            # all of them at once; _render waits

    def _render(self, live):
        for i in np.flatnonzero(live & self.waiting):
            if (answer := self._answer(i)) is None:                          # once more, in a new process
                self._reset(i, 0, int(self.init_state[i]), self.split[i])
                answer = self._answer(i)
            if answer is None:
                raise SystemExit(f"{self.suite.name}: initial state {self.init_state[i]} cannot be set up: {self.failure}")
            self.waiting[i], self.instruction[i], self.visited[int(self.init_state[i])] = False, answer["instruction"], (answer["seed"], answer["info"])
        return self.image[live]

    def step(self, actions):
        actions, self.at = np.asarray(actions, float), 0
        if not np.isfinite(actions).all():
            raise ValueError(f"{self.suite.name}: an action is NaN or infinite")
        self.ran = np.zeros((self.num_envs, *actions.shape[1:2]), bool)
        if actions.ndim == 3 and actions.shape[::2] == (self.num_envs, 14):  # otherwise SimulatorEnv complains
            live = np.flatnonzero(~self.done)
            for i in live:
                self.workers[i].send("run", actions[i, :self.suite.max_steps - self.steps[i]].tolist(), self.fixed_horizon)
            for i in live:
                answer = self._answer(i)
                self.broken[i] = answer is None
                self.ran[i, :len(answer["holds"]) if answer else 0] = answer["holds"] if answer else []
        return super().step(actions)                                         # of a broken one's chunk, of which nobody knows how much ran, it counts a step

    def _step(self, action, live):
        self.at += 1
        return self.ran[:, self.at - 1]

    def _grasped(self):
        return np.zeros(self.num_envs, bool)

    def _potential(self):
        return 1. * self.holds

    def _obs(self):
        return dict(super()._obs(), state=self.state.copy())

    def close_extras(self, **kwargs):
        while self.workers:
            if worker := self.workers.pop():
                worker.kill()

    def __del__(self):
        self.close_extras()
