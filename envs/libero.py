"""LIBERO's four suites on PyPI's hf-libero: libero-spatial, -object, -goal, -long.  Options are part of the name: libero-object-all50 trains and evaluates
on all 50 initial states as SimpleVLA-RL does (otherwise 40 are for training, 10 for evaluation), -512 ends episodes after 512 steps as it does (or any
other number), -tasks037 has these three tasks only, -nomsaa draws without anti-aliasing (faster; edges differ), -whole shows the
whole picture, on which RLinf trained.  Scripted demonstrations: python -m envs.libero --demos libero-object DIR --per-task 5

Protocol of SimpleVLA-RL: seed 0, reset, initial state, 10 steps of nothing, then open-loop chunks; the agentview camera at 256 pixels.  (OpenVLA-OFT seeds
once a task, so its furniture is drawn anew in every episode.  RLinf waits 15 steps, the gripper at 0, and evaluates sampled, at temperature 1.6.)
Actions are the published checkpoints': the last number is 0 to close the gripper, 1 to open it.  LIBERO's own 1 and -1 exist behind `protocol` alone.

Every environment is a process; on GPUs all draw on the first (MUJOCO_EGL_DEVICE_ID chooses).  It runs a whole chunk, then draws what the stock camera saw
last: states and frames are the stock ones to the bit.
One that dies, hangs or meets a NaN is replaced, and the new one replays the episode: the simulator is deterministic, so nothing is lost, no script needs to
know, and stderr tells.  Where a NaN comes back the physics itself blew up: the episode ends there, a failure, and env.broken marks it.
"""
import argparse, contextlib, ctypes.util, functools, importlib.util, io, json, os, re, sys, tempfile
from pathlib import Path
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from envs import Suite, SimulatorEnv, make
from envs.libero_worker import IDLE, protocol
from envs.worker import Failed, Replayed, cores, start

MAX_STEPS = dict(spatial=220, object=280, goal=300, long=520)
INSTALL = ("pip install 'mujoco<3.9' scipy numba opencv-python-headless PyOpenGL easydict cloudpickle future termcolor pyyaml h5py && "
           "pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1")
DRAWING = "apt install libegl1 libgl1-mesa-dri, or libosmesa6 and MUJOCO_GL=osmesa"
MESHES = "hf download lerobot/libero-assets --repo-type dataset --local-dir DIR"


# What others publish.  Students: OpenVLA-OFT after one demonstration a task (SimpleVLA-RL's).  Teachers: the same after reinforcement learning; SimpleVLA-RL
# published its own for the long suite alone, so the others are RLinf's (which have no </s>, VLA.load knows them by name; and saw the whole picture: -whole).
CHECKPOINTS = {s: dict(student=f"Haozhan72/Openvla-oft-SFT-libero-{s}-traj1", teacher=f"RLinf/RLinf-OpenVLAOFT-GRPO-LIBERO-{s}") for s in MAX_STEPS}
CHECKPOINTS["long"] = dict(student="Haozhan72/Openvla-oft-SFT-libero10-traj1", teacher="Haozhan72/openvla-oft-libero10-traj1-rl")
STATISTICS = "moojink/openvla-7b-oft-finetuned-libero-{}"                # of actions, from OpenVLA-OFT's authors


def checkpoint(env_id, role):
    """The hub id of a suite's published student or teacher, if there is a hub.  If it lacks the action statistics, they are put beside it."""
    suite = env_id.split("-")[1]
    published, tiny = CHECKPOINTS[suite], "runs/tiny/checkpoint"
    try:
        config = Path(hf_hub_download(published[role], "config.json"))
        if not any("libero" in key for key in json.loads(config.read_text()).get("norm_stats") or ()):
            try:
                hf_hub_download(published[role], "dataset_statistics.json")
            except EntryNotFoundError:
                hf_hub_download(STATISTICS.format(suite.replace("long", "10")), "dataset_statistics.json", local_dir=config.parent)
        return published[role]
    except Exception as e:
        both = " and ".join(f"`hf download {name}`" for name in published.values())
        raise SystemExit(f"the hub did not give {published[role]} ({type(e).__name__}): run {both} where there is a network, or make a tiny policy here, "
                         f"`python algos/sft.py --env {env_id} --run-dir runs/tiny`, and name it: --student {tiny}, for distillation --teacher {tiny}, too")


def setup(assets=""):
    """What LIBERO needs before it is imported, so that it never asks: where things are and how to draw without a display.  Returns the meshes' folder."""
    if missing := [name for name in ("libero", "robosuite", "bddl", "mujoco") if not importlib.util.find_spec(name)]:
        raise SystemExit(f"LIBERO is not installed ({missing[0]} is missing): {INSTALL}")
    root = Path(importlib.util.find_spec("libero").submodule_search_locations[0]) / "libero"
    folder = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(Path(tempfile.gettempdir()) / f"libero-{os.getuid()}{str(root).replace('/', '-')[-150:]}")))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        paths = dict(benchmark_root="", bddl_files="bddl_files", init_states="init_files", datasets="../datasets", assets="assets")
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
            f.write(json.dumps({k: str(root / v) for k, v in paths.items()}))    # JSON is YAML
        os.replace(f.name, folder / "config.yaml")                       # several processes may do this at once
    gl = os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
    os.environ.setdefault("PYOPENGL_PLATFORM", gl)
    with contextlib.redirect_stdout(io.StringIO()):
        import libero.libero
        if not hasattr(libero.libero, "get_assets_path"):
            raise SystemExit(f"the LIBERO installed here is not hf-libero: pip uninstall -y libero && {INSTALL}")
        assets = assets or os.environ.get("LIBERO_ASSETS") or libero.libero.get_assets_path()        # the package's own folder, cache or download
    if not all((Path(assets) / name).is_dir() for name in ("articulated_objects", "scenes", "stable_scanned_objects", "textures")):
        raise SystemExit(f"LIBERO's meshes are not in {assets}: run `{MESHES}`, then set LIBERO_ASSETS=DIR")
    libero.libero._assets_path_cache = str(Path(assets).resolve())
    return libero.libero._assets_path_cache


# -------------------------------------------------------------------------------------------------------------- environment
class LiberoEnv(SimulatorEnv):
    workers = ()                                                         # for __del__, should the constructor fail
    restarts = property(lambda self: sum(worker.restarts for worker in self.workers))

    def __init__(self, name, num_envs=1, seed=0, max_steps=None, assets="", workers=None, timeout=60):
        """workers: at most so many environments, by default one a core.  timeout: seconds for a chunk; a reset gets two minutes more."""
        suite, *options = name.split("-")
        if wrong := [k for k in options if not re.fullmatch(r"all50|nomsaa|whole|[1-9]\d*|tasks\d+", k)]:
            raise SystemExit(f"libero-{suite} has no option -{wrong[0]}: there are -all50, -nomsaa, -whole, a number of steps (-512) and tasks (-tasks037)")
        self.draw, words = True, (setup(assets), int("nomsaa" not in options), int("whole" in options))
        with contextlib.redirect_stdout(io.StringIO()):
            from libero.libero import benchmark
            self.benchmark = benchmark.get_benchmark(f"libero_{suite if suite != 'long' else '10'}")()
        most = workers or cores()
        if num_envs > most:
            print(f"libero-{name}: {most} environments side by side, one a core, instead of {num_envs}", file=sys.stderr, flush=True)
        self.numbers = next(([int(n) for n in k[5:]] for k in options if k.startswith("tasks")), range(10))
        states, tasks = list(range(50)), [self.benchmark.tasks[n].language for n in self.numbers]
        limit = max_steps or next((int(k) for k in options if k.isdigit()), MAX_STEPS[suite])
        splits = dict(train=states, eval=states) if "all50" in options else dict(train=states[:40], eval=states[40:])
        super().__init__(Suite(f"libero-{name}", tasks, splits, limit, action_dim=7, chunk=8, image=224), min(num_envs, most), seed)
        self.init_states, self.answer = functools.cache(self.benchmark.get_task_init_states), [{}] * self.num_envs
        self.workers = [Replayed(f"libero-{name}: worker {i}", lambda: start("envs.libero_worker", words, os.environ["LIBERO_CONFIG_PATH"]), timeout, reset=120)
                        for i in range(self.num_envs)]

    def _wait(self, i):
        """Worker i's answer to what it was asked last."""
        request = self.workers[i].asked
        try:
            self.answer[i] = self.workers[i].answer((*request[:-1], False))      # replayed without pictures
        except Failed as e:
            if "physics" not in str(e) or request[0] == "reset":
                raise
            self.broken[i] = True

    def _reset(self, i, task, init_state, split):
        number = self.numbers[task]
        self.workers[i].ask("reset", self.benchmark.get_task_bddl_file_path(number), self.init_states(number)[init_state], self.draw)
        return self.suite.tasks[task]

    def _render(self, live):
        """What came with the answers; draw=False leaves pictures as they are."""
        for i in np.flatnonzero(live):
            self.workers[i].asked and self._wait(i)                      # a reset is under way
        return np.stack([self.answer[i].get("image", self.image[i]) for i in np.flatnonzero(live)]) if live.any() else self.image[:0]

    def step(self, actions):
        actions, self.at, live = np.asarray(actions, float), 0, np.flatnonzero(~self.done)
        if not np.isfinite(actions).all():
            raise ValueError(f"{self.suite.name}: an action is NaN or infinite")
        if actions.ndim == 3 and actions.shape[::2] == (self.num_envs, 7):           # otherwise the base class tells
            self.ran = np.zeros((2, self.num_envs, actions.shape[1]), bool)
            for i in live:
                self.workers[i].ask("run", np.clip(actions[i, :self.suite.max_steps - self.steps[i]], -1, 1), self.fixed_horizon, self.draw)
            for i in live:
                self._wait(i)
                if not self.broken[i]:
                    self.ran[:, i, :len(self.answer[i]["holds"])] = self.answer[i]["holds"], self.answer[i]["held"]
        return super().step(actions)                                     # of a broken one's chunk, of which nobody knows how much ran, it counts a step

    def _step(self, action, live):                                       # the workers have done it: the base class goes through it step by step
        self.at += 1
        return self.ran[0, :, self.at - 1]

    def _grasped(self):
        return self.ran[1, :, self.at - 1]

    def expert_action(self):
        live, action = np.flatnonzero(~self.done), np.tile(IDLE, (self.num_envs, 1))
        for i in live:
            self.workers[i].ask("expert")
        for i in live:
            action[i] = self.workers[i].answer()
        return action

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.kill()
        self.workers = ()

    def __del__(self):
        self.close()


def write(env, folder, per_task, noise=0.):
    """One file a task, like the published ones: pictures upside down, the gripper -1 (open) or 1 (close), only successes, training states only.  noise: of
    bursts of random actions, as in sft.py; `actions` stays the expert's.  Besides: `clean`, not in such a burst, and keypoints for --pretrain-tower."""
    import h5py
    folder.mkdir(parents=True, exist_ok=True)
    for task in range(len(env.suite.tasks)):
        states, demos, rng = list(env.suite.splits["train"]), [], np.random.default_rng([env.seed, task])
        while states and len(demos) < per_task:
            n = min(len(states), env.num_envs, per_task - len(demos))
            now = [states.pop(0) for _ in range(n)]
            env.reset(options=dict(task=task, init_state=now + now[:1] * (env.num_envs - n), mask=np.arange(env.num_envs) < n))
            env.done[n:] = True
            rows, burst = [[] for _ in now], np.zeros(env.num_envs, int)
            while not env.done.all():
                live, action = np.flatnonzero(~env.done), env.expert_action()
                burst = np.where((burst == 0) & (rng.random(env.num_envs) < .08 * (noise > 0)), rng.integers(1, 8, env.num_envs), np.maximum(burst - 1, 0))
                for i in live:
                    rows[i].append((env.answer[i]["frame"], protocol(action[i]), burst[i] == 0, list(env.answer[i]["keypoints"].values())))
                env.step((action + (burst > 0)[:, None] * noise * np.array([1] * 6 + [2]) * rng.standard_normal(action.shape))[:, None])
                if idle := (action[live] == IDLE).all():                 # nothing that it can do
                    env.done[:] = True
            demos += [(*map(np.stack, zip(*rows[i])), list(env.answer[i]["keypoints"])) for i in range(n) if env.succeeded[i]]
            if idle and not demos:
                break
        print(f"{len(demos)} of {per_task} demonstrations: {env.suite.tasks[task]}", flush=True)
        if demos:
            name = env.benchmark.get_task_names()[env.numbers[task]]
            with h5py.File(folder / f"{name}_demo.hdf5", "w") as f:
                f.create_group("data").attrs.update(problem_info=json.dumps(dict(language_instruction=env.suite.tasks[task])), num_demos=len(demos),
                                                    macros_image_convention="opengl")
                for i, (pictures, actions, clean, keypoints, names) in enumerate(demos):
                    f.create_dataset(f"data/demo_{i}/obs/agentview_rgb", data=pictures, compression="lzf", chunks=(1, 256, 256, 3))
                    f[f"data/demo_{i}/actions"], f[f"data/demo_{i}/clean"], f[f"data/demo_{i}/obs/keypoints"] = actions, clean, keypoints
                    f[f"data/demo_{i}/obs/keypoints"].attrs.update(names=names, whole=int("-whole" in env.suite.name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Demonstrations by a scripted expert in LIBERO's HDF5 layout, for algos/sft.py --data DIR.")
    parser.add_argument("--demos", nargs=2, required=True, metavar=("SUITE", "DIR"))
    parser.add_argument("--per-task", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0., help="size of bursts of random actions that the expert then makes good; sft.py's --demo-noise")
    args = parser.parse_args()
    write(make(args.demos[0], 512), Path(args.demos[1]), args.per_task, args.noise)
