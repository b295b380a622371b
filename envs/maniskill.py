"""ManiSkill 3.  Our put-on-plate family, a Panda, objects and receptacles from primitives, no download, under ROAD-VLA's seven shifts:
    maniskill-{unseen-table, dynamic-texture, dynamic-noise, multi-object, multi-receptacle, init-pose, repositioning}
and ManiSkill's own tasks that need no download:
    maniskill:PickCube-v1, maniskill:StackCube-v1, with two arms maniskill:TwoRobotPickCube-v1, maniskill:TwoRobotStackCube-v1, ...
as they are, but that the goals are drawn that it hides from cameras and gives as numbers, and that the cameras of these two look closer (VIEW).
The family and these two tasks of two arms have a scripted expert and keypoints.

Actions are ManiSkill's pd_ee_delta_pose at 20 Hz: 0.1 m and 0.1 rad a unit (a positive rotation turns backwards there), the gripper closes at -1, opens at 1.
Initial states of the family say everything about a scene (`scene` below), those of ManiSkill's tasks are its seeds.  Success is that the object rests on the
receptacle, let go; in ManiSkill's tasks it is theirs, and grasped is that anything lies between a gripper's fingers, or success.

On a CPU every environment is a process (ManiSkill simulates one there), kept alive; one that dies or hangs is replaced and the new one replays the episode:
the simulation is deterministic.  Arms are drawn with their collision shapes there, which is several times faster and the same physics; -meshes behind a name,
or full_meshes=True, brings the full meshes back.  With CUDA all environments run in this process, in ManiSkill's GPU simulation, pictures stay on the
device until the one that is read.  That path is untested on a GPU; in it an episode that ends inside a chunk shows the chunk's end.  -cpu behind a name
simulates in processes as above all the same, and the GPU only draws: the scenes and looks of a machine without one.
"""
import importlib.util, re, sys
from pathlib import Path
import numpy as np
import torch
from envs import TABLETOP, Suite, SimulatorEnv
from envs.worker import Replayed, cores, start

SHIFTS = TABLETOP[4:11]
COLOURS = dict(red=(.8, .06, .06), green=(.05, .5, .1), blue=(.06, .18, .8), yellow=(.95, .75, .05), purple=(.4, .08, .55), orange=(.95, .35, .03),
               white=(.92, .92, .9), black=(.03, .03, .04), pink=(.95, .4, .6), cyan=(.05, .65, .75))
SHAPES = dict(cube=("box", [.02, .02, .02]), ball=("sphere", .022), can=("cylinder", .02, .03), brick=("box", [.034, .016, .018]), pill=("capsule", .017, .02))
HEIGHT = dict(cube=.02, ball=.022, can=.03, brick=.018, pill=.017)           # of its middle when it lies on the table
OBJECTS = ("red cube", "green ball", "blue can", "yellow brick", "purple pill", "orange cube", "white ball", "black can", "pink brick", "cyan pill")
UNSEEN = ("blue cube", "yellow ball", "green can", "red brick", "orange pill", "purple cube", "pink ball", "cyan can", "white brick", "black pill")
PLATES = ("white plate", "blue plate", "red plate", "green plate", "yellow plate")       # the last two are never seen in training
EXTRAS = "(-meshes|-cpu)+$"                                                   # behind a name
KEYPOINTS = (*COLOURS, *PLATES, "hand", "left hand", "goal")                 # objects by colour: no two of a scene share one
RADIUS, THICK = .065, .01                                                    # a plate's
SENTENCES = {"PickCube-v1": "pick up the red cube and move it to the green goal", "StackCube-v1": "stack the red cube on the green cube",
             "TwoRobotPickCube-v1": "hand over the red cube and move it to the green goal",
             "TwoRobotStackCube-v1": "put the green cube on the goal and the blue cube on top"}
TWO_ARMS = tuple(k for k in SENTENCES if k.startswith("TwoRobot"))
VIEW = {"TwoRobotPickCube-v1": .6, "TwoRobotStackCube-v1": .9}               # ManiSkill's pi / 2 shows two robots and a cube of 3 pixels in 96
# --no-deps: sapien would bring a second OpenCV, which needs a display's libraries.
INSTALL = ("pip install scipy h5py pyyaml requests transforms3d lxml trimesh imageio IPython defusedxml dacite opencv-python-headless && "
           "pip install --no-deps mani_skill==3.0.1 sapien==3.0.3 pytorch_kinematics==0.7.6 arm_pytorch_utilities pytorch_seed")
VULKAN = ("no Vulkan driver that ManiSkill can draw with: on a CPU it needs Mesa 23 or newer (apt install mesa-vulkan-drivers, on Debian 12 from "
          "bookworm-backports), and VK_ICD_FILENAMES, where it is set, must name that driver's .json file; a GPU needs its maker's (in containers "
          "NVIDIA_DRIVER_CAPABILITIES=all), and where CUDA_VISIBLE_DEVICES is empty Mesa draws")


class Unavailable(Exception):
    """A simulator that cannot be made here, and why."""


def instructions(name):
    if name.startswith(":"):                                                 # PlaceSphere-v1: "place sphere"
        return [SENTENCES.get(name[1:]) or " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", re.sub(r"-v\d+$", "", name))).lower()]
    return [f"put the {o} on the {PLATES[i % 3 if name == 'multi-receptacle' else 0]}" for i, o in enumerate(OBJECTS)]


def vocabulary(env_id):
    name = re.sub(EXTRAS, "", env_id.removeprefix("maniskill").removeprefix("-"))
    return {w for text in (*instructions(name), *(() if name.startswith(":") else (*OBJECTS, *UNSEEN, *PLATES))) for w in text.split()}


def scene(name, task, init_state, ood):
    """(what the simulator shall show, instruction), from these four alone.  Places are (x, y, z, turn)."""
    rng, taken = np.random.default_rng([SHIFTS.index(name), task, init_state, ood]), []
    size = lambda thing: RADIUS if thing in PLATES else .034

    def place(thing):
        """Somewhere on the table where there is room."""
        for attempt in range(1000):
            x, y = rng.uniform((-.17, -.2), (.1, .2))
            if all(np.hypot(x - u, y - v) > (size(thing) + size(other) + .025) * .998 ** attempt for other, u, v in taken):
                break
        taken.append((thing, x, y))
        return x, y, THICK / 2 if thing in PLATES else HEIGHT[thing.split()[1]], rng.uniform(-np.pi, np.pi)
    objects, plate, others = UNSEEN if name == "multi-object" and ood else OBJECTS, 0, []
    if name == "multi-receptacle":
        plate, others = task % 3 if not ood else 3 + task % 2, [PLATES[k] for k in rng.permutation(5 if ood else 3)]
    rest = [str(o) for o in rng.permutation(objects) if o != objects[task]][:{"multi-object": 3, "multi-receptacle": 0}.get(name, 1)]
    at = {thing: place(thing) for thing in (PLATES[plate], objects[task], *[p for p in others if p != PLATES[plate]][:1], *rest)}
    made = dict(thing=(OBJECTS + UNSEEN).index(objects[task]), plate=plate, arm=rng.uniform(-.03, .03, 7), jump={})
    if name == "init-pose" and ood:                                          # swung aside, stretched or drawn in, turned; the hand looks down still
        aside, out, turn = rng.choice((-1, 1), 3) * rng.uniform((.15, .1, .3), (.3, .2, .6))
        made["arm"] = made["arm"] + (aside, 0, 0, out, 0, -out, turn)
    if name == "repositioning":                                              # not to where something is or was
        made["jump"] = {thing: place(thing) for thing in ([PLATES[plate]] if ood else []) + [objects[task]]}
    if name.startswith("dynamic"):                                           # over the whole frame or not, which one, what its crops depend on
        made["texture"] = name == "dynamic-noise", int(rng.integers(1, 17)) if ood else 0, task, init_state, int(ood)
    table = 0 if name != "unseen-table" else int(rng.integers(9, 17) if ood else rng.integers(1, 9))
    return made | dict(at=at | {f"table {table}": (0, 0, 0, 0)}), f"put the {objects[task]} on the {PLATES[plate]}"


# -------------------------------------------------------------------------------------------------------------- environment
class ManiSkillEnv(SimulatorEnv):
    workers, simulation = (), None                                           # for __del__, should the constructor fail
    restarts = property(lambda self: sum(worker.restarts for worker in self.workers))

    def __init__(self, name, num_envs=1, seed=0, max_steps=None, image=128, full_meshes=False, workers=None, timeout=120):
        """workers: on a CPU, at most so many environments, by default one a core.  timeout: seconds for a step; a start gets five minutes more."""
        self.name, self.label = re.sub(EXTRAS, "", name), f"maniskill{'-' * (name[0] != ':')}{name}"
        extras, card = name[len(self.name):], f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        cuda = card != "cpu" and "-cpu" not in extras
        if self.name not in SHIFTS and not re.match(":.", self.name):
            raise SystemExit(f"{self.label} is neither one of maniskill-{{{', '.join(SHIFTS)}}}, with or without -meshes or -cpu behind it, nor a maniskill:ID")
        if missing := [k for k in ("mani_skill", "sapien", "pytorch_kinematics") if not importlib.util.find_spec(k)]:
            raise SystemExit(f"{self.label} needs ManiSkill 3 ({missing[0]} is missing): {INSTALL}")
        most = num_envs if cuda else workers or cores()
        if num_envs > most:
            print(f"{self.label}: {most} environments side by side, one a core, instead of {num_envs}", file=sys.stderr, flush=True)
            num_envs = most
        words, root = (self.name[1:] if self.name[0] == ":" else "", image, int(full_meshes or "-meshes" in extras), card), Path(__file__).resolve().parents[1]
        self.fresh, self.holding = {}, np.zeros(num_envs, bool)
        try:
            if cuda:
                from envs.maniskill_worker import Simulation
                self.simulation = Simulation(words[0], num_envs, image, True, card, card)
            else:
                self.workers = [Replayed(f"{self.label}: worker {i}", lambda: start("envs.maniskill_worker", words, root), timeout, suite=300, reset=300)
                                for i in range(num_envs)]
            made, = self._call("suite", [0])
        except Unavailable as e:
            self.close()
            raise SystemExit(f"{self.label}: {e}")
        states = list(range(500))
        splits = dict(train=states[:400], eval=states[400:]) | (dict(ood=states[400:]) if self.name in SHIFTS else {})
        super().__init__(Suite(self.label, instructions(self.name), splits, max_steps or made["max_steps"], made["action_dim"], 4, image), num_envs, seed)

    # ---------------------------------------------------------------------------------------------------------- processes
    def _call(self, method, rows, *given):
        """Asks the simulators of `rows`, all at once; one answer a row."""
        if self.simulation:
            return getattr(self.simulation, method)(list(rows), *given)
        requests = [(method, *(g[k] for g in given)) for k in range(len(rows))]
        for i, request in zip(rows, requests):
            self.workers[i].ask(*request)
        return np.concatenate([self.workers[i].answer(request if method in ("reset", "step") else None) for i, request in zip(rows, requests)])

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.kill()
        self.workers = ()
        if self.simulation:
            self.simulation.env.close()

    def __del__(self):
        self.close()

    # ----------------------------------------------------------------------------------------------------------- episodes
    def _reset(self, i, task, init_state, split):
        self.fresh[i], text = scene(self.name, task, init_state, split == "ood") if self.name in SHIFTS else (init_state, self.suite.tasks[0])
        return text                                                          # _render restarts all of them at once

    def _render(self, live):
        if self.fresh:
            fresh, self.fresh = self.fresh, {}
            self._call("reset", list(fresh), list(fresh.values()))
        return self._call("look", np.flatnonzero(live)) if live.any() else self.image[:0]

    def _step(self, action, live):
        if not np.isfinite(action).all():
            raise ValueError(f"{self.label}: an action is NaN or infinite")
        now, rows = np.zeros((self.num_envs, 2), bool), np.flatnonzero(live)
        now[rows] = self._call("step", rows, action[rows])
        self.holding = now[:, 1]
        return now[:, 0]

    def _grasped(self):
        return self.holding

    def _needs_ours(self, what):
        if self.name not in SHIFTS and self.name[1:] not in TWO_ARMS:
            raise SystemExit(f"{self.label} has no {what}: the maniskill-* suites have, and maniskill:{{{', '.join(TWO_ARMS)}}}")

    def expert_action(self):
        self._needs_ours("scripted expert")
        action, rows = np.zeros((self.num_envs, self.suite.action_dim)), np.flatnonzero(~self.done)
        action[rows] = self._call("expert", rows) if len(rows) else 0
        return action

    def keypoints(self):
        """What is where in the picture: an index into KEYPOINTS (-1: not in sight) [N, things] and pixels (x, y) [N, things, 2]."""
        self._needs_ours("keypoints")
        seen = self._call("keypoints", range(self.num_envs))
        return seen[..., 0].astype(int), seen[..., 1:]
