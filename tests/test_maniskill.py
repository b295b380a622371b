"""ManiSkill (envs/maniskill.py, envs/maniskill_worker.py) on the real simulator.  MANISKILL=1 says that it is installed and has a Vulkan that it can draw
with; without it only what needs neither runs.

With a GPU that draws and a CPU that simulates (-cpu) too: simulation on a GPU is tested by nothing here.

    python tests/test_maniskill.py expert 20               # the scripted expert's success on so many initial states of every suite and split (expert 20 -cpu)
    python tests/test_maniskill.py speed                   # light arms against the full meshes; seconds an episode, memory
    python tests/test_maniskill.py pictures FILE           # how far the pictures drawn here are from those in FILE, which is made where there is none
"""
import contextlib
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]

import envs
from envs import maniskill
from envs.maniskill import OBJECTS, PLATES, SHIFTS, UNSEEN, scene

simulated = pytest.mark.skipif(not os.environ.get("MANISKILL"), reason="MANISKILL is not set to 1: mani_skill or a Vulkan that it can draw with may be missing")
TRAIN, KEPT = range(400), range(400, 500)


@pytest.fixture(scope="module")
def env():
    with contextlib.closing(envs.make("maniskill-repositioning-cpu", 2, workers=2)) as made:
        yield made


@pytest.fixture(autouse=True)
def as_new(request):
    """The shared environments, whatever the test before did to them; a worker that was replaced although nobody killed it is a failure."""
    shared = request.getfixturevalue("env") if "env" in request.fixturenames else None
    if shared:
        shared.name, shared.suite.max_steps, shared.fixed_horizon, shared.timeout, shared.fresh = "repositioning", 80, False, 120, {}
        restarts = shared.restarts
    yield
    assert not shared or shared.restarts == restarts or "killed" in request.node.name


def reset(env, name="repositioning", task=(0, 1), init_state=(0, 1), split="train", **kw):
    """A worker can show every suite's scenes."""
    env.name = name
    return env.reset(options=dict(task=list(task), init_state=list(init_state), split=split, **kw))[0]


def play(env, length=100, noise=0.):
    """The expert, disturbed, one step a time, at most so long; its actions [N, T, 7] and the pictures."""
    rng, actions, pictures = np.random.default_rng(0), [], [env.image.copy()]
    while not env.done.all() and len(actions) < length:
        actions.append(env.expert_action() + noise * rng.standard_normal((env.num_envs, 7)))
        pictures.append(env.step(actions[-1][:, None])[0]["image"])
    return np.stack(actions, 1), pictures


def scenes(name, split):
    states = (TRAIN if split == "train" else KEPT)[:30]
    return [scene(name, task, state, split == "ood") for task in range(10) for state in states]


# --------------------------------------------------------------------------------------------- scenes, without the simulator
def test_a_scene_depends_on_its_arguments_alone():
    for name in SHIFTS:
        assert str(scene(name, 3, 7, False)) == str(scene(name, 3, 7, False))
        assert len({str(scene(*x)[0]["at"]) for x in ((name, 3, 7, False), (name, 3, 407, False), (name, 3, 407, True), (name, 4, 7, False))}) == 4


@pytest.mark.parametrize("name", SHIFTS)
def test_there_is_room(name):
    """Nothing overlaps, jumps land on free places, and all is within reach."""
    size = lambda thing: maniskill.RADIUS if thing in PLATES else .034
    for split in ("train", "eval", "ood"):
        for made, text in scenes(name, split):
            at = {k: np.array(v[:2]) for k, v in made["at"].items() if not k.startswith("table")}
            after = at | {k: np.array(v[:2]) for k, v in made["jump"].items()}
            for where in (at, after):
                pairs = [(a, b) for a in where for b in where if a < b]
                assert all(np.hypot(*(where[a] - where[b])) > size(a) + size(b) for a, b in pairs), where
            assert all((np.abs(p - (-.035, 0)) <= (.135, .2)).all() for p in after.values())
            thing, plate = (OBJECTS + UNSEEN)[made["thing"]], PLATES[made["plate"]]
            assert text == f"put the {thing} on the {plate}" and {thing, plate} <= set(at) and set(text.split()) <= envs.vocabulary(f"maniskill-{name}")


@pytest.mark.parametrize("name", SHIFTS)
def test_ood_shifts_its_factor(name):
    """Each suite shifts one factor; eval has the distribution of training."""
    train, test, ood = ([s for s, _ in scenes(name, split)] for split in ("train", "eval", "ood"))
    factors = dict(
        unseen_table=lambda s: {k for k in s["at"] if k.startswith("table")}, multi_object=lambda s: {k for k in s["at"] if k.split()[1] in maniskill.SHAPES},
        multi_receptacle=lambda s: {s["plate"]}, dynamic=lambda s: {s["texture"][1]} if "texture" in s else set(), repositioning=lambda s: {len(s["jump"])})
    shifted = set()
    for factor, of in factors.items():
        seen, held_out, new = (set().union(*map(of, part)) for part in (train, test, ood))
        assert seen == held_out
        if new and not seen & new:
            shifted.add(factor.replace("_", "-"))
        else:
            assert new == seen
    arms = [np.abs([s["arm"] for s in part]).max(1) for part in (train + test, ood)]
    if arms[1].min() > arms[0].max():
        shifted.add("init-pose")
    assert shifted == {name if not name.startswith("dynamic") else "dynamic"}
    things = {len(s["at"]) for s in train + ood}
    assert things == {dict([("multi-object", 6)]).get(name, 4)}      # with its table


# -------------------------------------------------------------------------------------------------------------------- errors
def test_without_the_package(monkeypatch):
    monkeypatch.setattr(maniskill.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"maniskill-init-pose needs ManiSkill 3 \(mani_skill is missing\): pip install .*mani_skill==3.0.1") as e:
        envs.make("maniskill-init-pose")
    assert "\n" not in str(e.value)


def test_names():
    for bad, said in (("maniskill-nothing", "unknown environment.*maniskill-repositioning"), ("maniskill-init-pose-mesh", "with or without -meshes or -cpu"),
                      ("maniskill:", "nor a maniskill:ID")):
        with pytest.raises(SystemExit, match=said):
            envs.make(bad)
    with pytest.raises(SystemExit, match="no default student.*python algos/sft.py --env maniskill-init-pose"):
        envs.checkpoint("maniskill-init-pose", "student")
    text = lambda env_id: maniskill.instructions(":" + env_id)[0]
    assert text("PickCube-v1").startswith("pick up the red cube") and text("LiftPegUpright-v1") == "lift peg upright" and text("PushT-v1") == "push t"
    assert "cubes" not in envs.vocabulary("maniskill:PickCube-v1") >= {"cube", "goal"} and envs.vocabulary("maniskill:PushT-v1-meshes-cpu") == {"push", "t"}


@pytest.mark.parametrize("gpu", [False, True])
def test_what_simulates_and_what_draws(monkeypatch, gpu):
    """Processes without a GPU and with -cpu, which draw on a GPU where there is one; else one simulation, on the GPU."""
    made = []

    def make(*words):
        made.append(words)
        raise SystemExit("made")
    monkeypatch.setattr(maniskill.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)         # of --device cuda:1, of the second of torchrun's processes
    monkeypatch.setattr(maniskill, "start", lambda module, words, root: make(*words))
    monkeypatch.setitem(sys.modules, "envs.maniskill_worker", types.SimpleNamespace(Simulation=lambda name, num_envs, *words: make("one for all", num_envs, *words)))
    for name in ("maniskill-init-pose", "maniskill-init-pose-cpu", "maniskill-init-pose-meshes-cpu", "maniskill:PickCube-v1-cpu"):
        with pytest.raises(SystemExit, match="made"):
            envs.make(name, 1)
    card = "cuda:1" if gpu else "cpu"
    assert made == [("one for all", 1, 128, True, card, card) if gpu else ("", 128, 0, card), ("", 128, 0, card), ("", 128, 1, card), ("PickCube-v1", 128, 0, card)]


def failing(env_id, **variables):
    """What a user reads, with a closed standard input."""
    code = f"import envs\nenvs.make('{env_id}').reset()"
    p = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, env=os.environ | variables)
    assert p.returncode == 1 and "Traceback" not in p.stderr and len(p.stderr.strip().splitlines()) == 1 and p.stderr.startswith(env_id), p.stderr
    return p.stderr


@simulated
def test_no_library_for_gpu_simulation(monkeypatch, tmp_path):
    from envs import maniskill_worker
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True), monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(maniskill_worker.sapien.physx, "enable_gpu", lambda: open("/nowhere/libPhysXGpu_64.so"))
    for home in (tmp_path, tmp_path / "full"):
        monkeypatch.setattr(maniskill_worker.Path, "home", lambda: home)
        library = home / ".sapien/physx" / maniskill_worker.sapien.physx.version() / "libPhysXGpu_64.so"
        home != tmp_path and (library.parent.mkdir(parents=True), library.touch())
        with pytest.raises(SystemExit, match="^maniskill-init-pose: GPU simulation cannot be had here .FileNotFoundError: .*nowhere.*put -cpu behind the name") as e:
            envs.make("maniskill-init-pose")
        assert ("linux-so.zip in ~/.sapien/physx/" in str(e.value) or "linux-aarch64-so.zip" in str(e.value)) == (home == tmp_path)


@simulated
def test_light_arms_leave_one_file_for_all(monkeypatch, tmp_path):
    """A worker is killed, so it cannot clean up: all share the same few files, whole at any time."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    envs.make("maniskill-init-pose-cpu", 1).close()
    folder, = tmp_path.glob("maniskill-*")
    assert sorted(p.suffix for p in folder.iterdir()) == [".srdf"] * 2 + [".urdf"] * 2 and [p for p in tmp_path.iterdir() if p.is_dir()] == [folder]


@simulated
def test_one_sentence_instead_of_a_prompt_or_a_traceback():
    assert "python -m mani_skill.utils.download_asset PickSingleYCB-v1 -y" in failing("maniskill:PickSingleYCB-v1-cpu")
    assert "ManiSkill has no PickCub-v1" in failing("maniskill:PickCub-v1-cpu")
    if not torch.cuda.is_available():
        assert "Mesa 23 or newer" in failing("maniskill-repositioning", VK_ICD_FILENAMES="nowhere.json", VK_DRIVER_FILES="nowhere.json")


# ------------------------------------------------------------------------------------------------------------------ contract
@simulated
def test_spaces_and_splits(env):
    suite, (made,) = env.suite, env._call("suite", [0])
    assert (suite.name, made["max_steps"], suite.action_dim, suite.chunk, suite.image) == ("maniskill-repositioning-cpu", 80, 7, 4, 128)
    assert len(set(suite.tasks)) == 10 and suite.splits == dict(train=list(TRAIN), eval=list(KEPT), ood=list(KEPT))
    obs = reset(env)
    assert env.observation_space.contains(obs) and obs["instruction"] == tuple(suite.tasks[:2]) and obs["image"].std((1, 2, 3)).min() > 20
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and {k: v.dtype.kind for k, v in info.items()} == dict(success="b", grasped="b", kept="b", steps="i")
    assert reward.dtype.kind == "f" and terminated.dtype == truncated.dtype == bool and (info["steps"] == 4).all()
    for wrong, said in ((np.zeros((2, 7)), "takes actions"), (np.full((2, 4, 7), np.nan), "NaN")):
        with pytest.raises(ValueError, match=said):
            env.step(wrong)


@simulated
def test_chunk_is_its_steps_and_one_picture_a_chunk(env, monkeypatch):
    """3, 4, 4, ... or one at a time: same pictures; time is up inside a chunk, then nothing moves."""
    env.suite.max_steps = 9
    actions, asked, call = np.random.default_rng(0).uniform(-1, 1, (2, 15, 7)), [], env._call
    monkeypatch.setattr(env, "_call", lambda method, *given: asked.append(method) or call(method, *given))
    parts = [reset(env)] + [env.step(part) for part in np.split(actions, (3, 7, 11), 1)]
    assert [p[4]["steps"].tolist() for p in parts[1:]] == [[3, 3], [4, 4], [2, 2], [0, 0]] and parts[3][3].all() and not parts[3][2].any()
    assert asked.count("look") == 4 and asked.count("step") == 9
    assert np.array_equal(reset(env)["image"], parts[0]["image"])
    singles = [env.step(actions[:, i:i + 1])[0]["image"] for i in range(15)]
    for part, end in zip(parts[1:], (2, 6, 8, 14)):
        assert np.array_equal(part[0]["image"], singles[end])


@simulated
@pytest.mark.parametrize("name,split", [("repositioning", "ood"), ("dynamic-texture", "ood"), ("dynamic-noise", "train")])
def test_determined_by_task_and_state_and_split(env, name, split):
    """Whoever plays it and whatever was before; a mask restarts only those."""
    states = (7, 8) if split == "train" else (407, 408)
    first = reset(env, name, (3, 4), states, split)["image"]
    actions, pictures = play(env, 30, .3)
    again = reset(env, name, (9, 3), (states[1], states[0]), split, mask=[False, True])["image"]
    assert np.array_equal(again[0], pictures[-1][0]) and np.array_equal(again[1], first[0]) and env.steps[1] == 0
    env.done[0] = True
    assert all(np.array_equal(env.step(actions[::-1, t:t + 1])[0]["image"][1], pictures[t + 1][0]) for t in range(actions.shape[1]))


@simulated
@pytest.mark.parametrize("split", ["train", "ood"])
@pytest.mark.parametrize("name", SHIFTS)
def test_expert_and_reward(env, name, split):
    """Success is paid once; a chunk later the object is where it was let go."""
    reset(env, name, (1, 4), (20, 21) if split == "train" else (420, 421), split)
    total, grasped = np.zeros(2), np.zeros(2, bool)
    while not env.done.all():
        held, was = env.holding & ~env.done, env.done.copy()
        obs, reward, terminated, truncated, info = env.step(env.expert_action()[:, None])
        grasped, total = grasped | held, total + reward
        assert (terminated == info["success"]).all() and not reward[was].any() and not (terminated & truncated).any()
    assert env.succeeded.all() and env.grasped.all() and grasped.all() and (total == 1).all() and (env.steps < 75).all()


@simulated
def test_held_on_the_plate_is_no_success(env):
    """Over the plate, touching it, at rest, but never let go."""
    reset(env)
    while not env.done.all():
        action = env.expert_action()
        action[env.grasped, 6] = -1
        env.step(action[:, None])
    assert env.grasped.all() and env.holding.all() and not env.succeeded.any()


@simulated
def test_keypoints_are_on_the_things(env):
    """What changes in the picture when a thing is taken away lies around its keypoint; what the hand holds is at the hand's."""
    made = scene("multi-object", 4, 9, False)[0]

    def seen(without=""):
        env._call("reset", [0], [made | dict(at={k: v for k, v in made["at"].items() if k != without})])
        return env._call("look", [0])[0].astype(int)
    whole, (index, at) = seen(), env.keypoints()
    things = {maniskill.KEYPOINTS.index(k if k in PLATES else k.split()[0]): k for k in made["at"] if not k.startswith("table")}
    assert index.shape == (2, 26) and at.shape == (2, 26, 2) and sorted(index[0][index[0] >= 0]) == sorted([*things, maniskill.KEYPOINTS.index("hand")])
    for k, name in things.items():
        y, x = np.nonzero((np.abs(seen(name) - whole) > 15).any(2))
        np.testing.assert_allclose(at[0][index[0] == k], [[(x.min() + x.max()) / 2, (y.min() + y.max()) / 2]], atol=2, err_msg=name)
    reset(env, task=(0, 1))
    while not (env.in_a_row > 0).all():
        env.step(env.expert_action()[:, None])
    index, at = env.keypoints()
    for i, colour in enumerate(("red", "green")):
        hand, thing = (at[i, index[i] == maniskill.KEYPOINTS.index(k)] for k in ("hand", colour))
        np.testing.assert_allclose(hand, thing, atol=3)


@simulated
def test_fixed_horizon(env):
    """The expert stays away from what it has placed: .1 grasped, .1 held for 5 steps in a row, 1 for the goal, and it counts until the end."""
    env.fixed_horizon, total = True, 0.
    reset(env, task=(2, 3), init_state=(30, 31))
    while not env.done.all():
        obs, reward, terminated, truncated, info = env.step(env.expert_action()[:, None])
        total += reward
        assert not terminated.any()
    assert truncated.all() and (env.steps == 80).all() and env.holds.all()
    np.testing.assert_allclose(total, 1.2, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------- shifts
@simulated
def test_table_and_arm(env):
    """Another table and wall; another pose of the arm, and the rest of the picture is the same."""
    made = scene("init-pose", 0, 3, False)[0]

    def seen(**change):
        env._call("reset", [0], [made | change])
        return env._call("look", [0])[0].astype(int)
    first = seen()
    assert np.array_equal(seen(), first)
    other = {("table 12" if k.startswith("table") else k): v for k, v in made["at"].items()}
    assert (np.abs(seen(at=other) - first).max(2) > 10).mean() > .4
    part = (np.abs(seen(arm=scene("init-pose", 0, 403, True)[0]["arm"]) - first).max(2) > 10).mean()
    assert .05 < part < .6, part


@simulated
@pytest.mark.parametrize("name", ["dynamic-texture", "dynamic-noise"])
def test_textures(env, name):
    """At one half, on object, receptacle and arm alone or everywhere; another crop at every step; grey in training, in colours out of distribution."""
    made = scene(name, 0, 403, True)[0]
    whole, which, *seed = made["texture"]

    def seen(texture, steps):
        env._call("reset", [0], [{k: v for k, v in made.items() if k != "texture"} | (dict(texture=texture) if texture else {})])
        for _ in range(steps):
            env._call("step", [0], [np.array([0, 0, 0, 0, 0, 0, 1.])])
        return env._call("look", [0])[0].astype(int)
    plain, mixed, grey = seen(None, 0), seen(made["texture"], 0), seen((whole, 0, *seed), 0)
    changed = (mixed != plain).any(2)
    assert changed.mean() > .98 if whole else .1 < changed.mean() < .5
    texture, flat = (mixed - plain // 2)[changed], (grey - plain // 2)[(grey != plain).any(2)]
    assert texture.min() >= 0 and texture.max() <= 128 and np.ptp(flat, axis=1).max() <= 1 and np.ptp(texture, axis=1).mean() > 10
    assert (seen(made["texture"], 2) - seen(None, 2) // 2)[changed].std() > 0 and not np.array_equal(seen(made["texture"], 1) - seen(None, 1), mixed - plain)


@simulated
@pytest.mark.parametrize("split", ["train", "ood"])
def test_repositioning_at_step_5(env, split):
    """The object jumps in the fifth step, out of distribution the receptacle as well; until then and afterwards all rests."""
    state = 3 if split == "train" else 403
    made, pictures = scene("repositioning", 0, state, split == "ood")[0], [reset(env, task=(0, 0), init_state=(state, state), split=split)["image"][0].astype(int)]
    for _ in range(7):
        pictures.append(env.step(np.tile([0, 0, 0, 0, 0, 0, 1.], (2, 1, 1)))[0]["image"][0].astype(int))
    moved = [(np.abs(b - a).max(1) > 30).sum() for a, b in zip(pictures, pictures[1:])]
    assert moved[4] > 20 and max(moved[:4] + moved[5:]) < moved[4] / 4, moved
    env._call("reset", [0], [made | dict(at=made["at"] | made["jump"], jump={})])        # the same as if they had been there from the beginning
    assert (np.abs(env._call("look", [0])[0].astype(int) - pictures[-1]).max(2) > 30).mean() < .01
    assert set(made["jump"]) == {"red cube"} | ({"white plate"} if split == "ood" else set())


# ---------------------------------------------------------------------------------------------------------------- robustness
@simulated
def test_killed_and_hung_workers_are_replaced(env, capsys, monkeypatch):
    """kill -9 inside an episode; the same in a new worker, to the bit, and stderr tells.  Then one that does not answer."""
    reset(env, "dynamic-noise", (5, 6), (9, 10))
    actions, want = play(env, 12, .3)
    reset(env, "dynamic-noise", (5, 6), (9, 10))
    restarts = env.restarts
    for t in range(12):
        if t == 7:
            env.workers[0].worker.process.kill()
        assert np.array_equal(env.step(actions[:, t:t + 1])[0]["image"], want[t + 1]), t
        if t == 9:
            monkeypatch.setattr(env.workers[1], "timeout", 5)
            os.kill(env.workers[1].worker.process.pid, signal.SIGSTOP)
    told = capsys.readouterr().err
    assert env.restarts == restarts + 2 and told.count("replays its episode") == 2 and "no answer for 5 s" in told


class Broken:
    """A worker that always fails."""
    def __init__(self, *arguments):
        self.stops = EOFError()

    def send(self, *request):
        pass

    def receive(self, timeout):
        raise self.stops

    def kill(self):
        return "no more room"


def test_three_failures_are_told(monkeypatch, capsys):
    monkeypatch.setattr(maniskill, "start", Broken)
    monkeypatch.setattr(maniskill.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="three workers in a row failed at the same place .*no more room"):
        envs.make("maniskill-init-pose")


@simulated
def test_no_stray_processes():
    made = envs.make("maniskill:StackCube-v1-cpu", 2, workers=2)
    made.reset()
    processes = [w.worker.process for w in made.workers]
    assert all(p.poll() is None for p in processes) and made.suite.max_steps == 50
    made.close()
    assert all(p.poll() is not None for p in processes)


# ------------------------------------------------------------------------------------------------------- ManiSkill's own tasks
@simulated
@pytest.mark.parametrize("env_id,dim", [("PickCube-v1", 7), ("TwoRobotPickCube-v1", 14), ("TwoRobotStackCube-v1", 14)])
def test_own_tasks(env_id, dim):
    """Seeds make scenes; both arms obey their own half of an action."""
    with contextlib.closing(envs.make(f"maniskill:{env_id}-cpu", image=64)) as made:
        suite = made.suite
        assert (suite.action_dim, suite.image, suite.chunk, len(suite.tasks)) == (dim, 64, 4, 1) and suite.max_steps >= 50 and "ood" not in suite.splits
        one, two, again = (made.reset(options=dict(init_state=[k]))[0]["image"][0] for k in (1, 2, 1))
        assert (one != two).any() and np.array_equal(one, again)
        seen = [again]
        for arm in range(dim // 7):
            action = np.zeros((1, 4, dim // 7, 7))
            action[:, :, arm, 2] = 1
            seen.append(made.step(action.reshape(1, 4, dim))[0]["image"][0])
        parts = [(np.abs(b.astype(int) - a).max(2) > 10) for a, b in zip(seen, seen[1:])]
        assert all(p.mean() > .005 for p in parts) and not (dim == 14 and (parts[0] & parts[1]).mean() > .5 * parts[0].mean())
        for ask, said in ((made.expert_action, "no scripted expert"), (made.keypoints, "no keypoints")) if dim == 7 else ():
            with pytest.raises(SystemExit, match=f"{said}.*TwoRobotStackCube-v1"):
                ask()
        assert not made.restarts


@simulated
def test_hidden_goals_are_drawn():
    """A policy has the picture alone: ManiSkill hides the goal from its cameras, and gives it as numbers."""
    with contextlib.closing(envs.make("maniskill:PickCube-v1-cpu")) as made:
        red, green, blue = made.reset(options=dict(init_state=[1]))[0]["image"][0].astype(int).transpose(2, 0, 1)
        assert ((green > 2 * red + 30) & (green > 2 * blue + 30)).sum() > 20


@simulated
@pytest.mark.parametrize("env_id,things", [("TwoRobotPickCube-v1", dict(red=0)), ("TwoRobotStackCube-v1", dict(green=1, blue=2))])
def test_two_robots_expert_and_keypoints(env_id, things):
    """It solves it, undisturbed and after half a second of noise; keypoints lie on what has their colour, and move to the hand that holds it."""
    with contextlib.closing(envs.make(f"maniskill:{env_id}-cpu", 2, workers=2)) as made:
        made.reset(options=dict(init_state=[401, 402]))
        names, together = [*things, "goal", "hand", "left hand"], np.zeros((2, len(things)))
        while not made.done.all():
            if made.steps[0] in (0, 24):
                index, at = made.keypoints()
                assert index.shape == (2, len(names)) and {maniskill.KEYPOINTS[k] for k in index.ravel() if k >= 0} <= set(names)
                where = {name: at[:, list(index[0]).index(maniskill.KEYPOINTS.index(name))] for name in names}
                for k, (name, channel) in enumerate(things.items()):
                    for picture, (x, y) in zip(made.image.astype(int), where[name].round().astype(int)) if made.steps[0] == 0 else ():
                        coloured = picture[..., channel] > 1.7 * np.delete(picture, channel, 2).max(2)
                        assert coloured[y - 1:y + 2, x - 1:x + 2].any() and coloured.sum() > 60, (name, coloured.sum())     # a cube is seen from near by
                    together[:, k] = np.minimum(*(np.abs(where[hand] - where[name]).max(1) for hand in ("hand", "left hand")))
            noise = .5 * np.random.default_rng(int(made.steps[1])).standard_normal(14) * (30 <= made.steps[1] < 40)
            made.step((made.expert_action() + np.stack([0 * noise, noise]))[:, None])
        assert made.succeeded.all() and made.grasped.all() and not made.restarts, (made.succeeded, made.steps)
        assert env_id == "TwoRobotPickCube-v1" or (together < 12).all()


@simulated
def test_two_robots_expert_lets_go_wherever_it_counts(monkeypatch):
    """Not at its own mark alone: a policy that misses that by two centimetres has to learn to open its hand there as well."""
    from envs.maniskill_worker import Pose, Simulation
    simulation = Simulation("TwoRobotStackCube-v1", 1, 64, False, "cpu", "cuda" if torch.cuda.is_available() else "cpu")
    simulation.reset([0], [401])
    sim, goal = simulation.sim, simulation.sim.goal_region.pose.p[0].numpy() * (1, 1, 0)
    holds = {}
    for arm, agent in (("left", sim.left_agent), ("right", sim.right_agent)):
        monkeypatch.setattr(agent, "is_grasping", lambda thing, arm=arm: torch.tensor([holds[arm]]))

    def opens(arm, blue, green, left, right):
        holds.update(left=left, right=right)
        sim.cubeA.set_pose(Pose.create_from_pq(torch.tensor(np.array([blue]), dtype=torch.float32)))
        sim.cubeB.set_pose(Pose.create_from_pq(torch.tensor(np.array([green]), dtype=torch.float32)))
        return simulation.expert([0])[0, 13 if arm == "right" else 6] > 0
    waits = (0, -.2, .2)
    for y, z, there in ((-.045, .02, True), (0, .02, True), (.045, .02, True), (-.06, .02, False), (.06, .02, False), (0, .04, False)):
        assert opens("right", waits, goal + (0, y, z), True, True) == there, (y, z)
    for x, z, there in ((-.02, .06, True), (.02, .06, True), (.03, .06, False), (0, .08, False)):
        assert opens("left", goal + (x, 0, z), goal + (0, 0, .02), True, False) == there, (x, z)


@simulated
def test_a_task_that_holds_nothing(monkeypatch):
    """Pushed cubes are not grasped: with fixed_horizon success is paid for all the same."""
    from envs.maniskill_worker import Simulation
    simulation = Simulation("PushCube-v1", 1, 64, False, "cpu", "cuda" if torch.cuda.is_available() else "cpu")
    simulation.reset([0], [401])
    for there in (False, True):
        monkeypatch.setattr(simulation.sim, "evaluate", lambda: dict(success=torch.tensor([there])))
        assert simulation.step([0], [np.zeros(7)]).tolist() == [[there, there]]


# --------------------------------------------------------------------------------------------------------------- the scripts
@simulated
def test_scripts(env, tmp_path, monkeypatch):
    """A tiny policy from the expert's demonstrations, PPO from it, ROAD from both: two iterations each."""
    import ppo
    import road_vla
    import sft
    import small
    env.suite.max_steps = 24
    monkeypatch.setattr(envs, "make", lambda env_id, *args: env)
    monkeypatch.chdir(tmp_path)
    common = dict(env="maniskill-repositioning", num_iterations=2, eval_every=2, eval_episodes_per_task=1, device="cpu")
    monkeypatch.setattr(sft, "evaluate", small.no_evaluation)
    sft.main(sft.Args(**common))
    student, few = "runs/maniskill-repositioning-sft-1/checkpoint", dict(num_episodes=4, updates_per_rollout=2)
    ppo.main(ppo.Args(**common, **few, student=student))
    monkeypatch.setattr(road_vla, "evaluate", small.no_evaluation)
    road_vla.main(road_vla.Args(**common, **few, student=student))
    for name in ("sft", "ppo", "road_vla"):
        run = tmp_path / f"runs/maniskill-repositioning-{name}-1"
        rows = (run / "metrics.csv").read_text().splitlines()
        assert len(rows) == 3 + (name != "sft") and (run / "curve.png").exists() and (run / "checkpoint/model.safetensors").exists()


@simulated
def test_two_robots_through_the_scripts(tmp_path, monkeypatch):
    """14-dim tokens, chunk x 14: from the expert's demonstrations, from a teacher, from rewards, from a reference."""
    import dagger_forward_kl
    import dagger_hard_ce
    import grpo
    import ppo
    import road_vla
    import sft
    import small
    import vla_opd
    env_id = "maniskill:TwoRobotStackCube-v1-cpu"
    with contextlib.closing(envs.make(env_id, 2, workers=2)) as made:
        made.suite.max_steps = 8
        monkeypatch.setattr(envs, "make", lambda env_id, *args: made)
        monkeypatch.chdir(tmp_path)
        common = dict(env=env_id, num_iterations=1, eval_every=2, eval_episodes_per_task=1, device="cpu")
        sft.main(sft.Args(**common, demos_per_task=2, run_dir="sft"))
        common |= dict(student="sft/checkpoint", updates_per_rollout=1)
        distil, few = dict(teacher="sft/checkpoint", batch_prompts=1, group_size=2), dict(num_episodes=2)
        for module, kw in ((vla_opd, distil), (dagger_forward_kl, distil), (dagger_hard_ce, distil), (grpo, dict(batch_prompts=1, group_size=2, keep_low=0., keep_high=1.)),
                           (ppo, few), (road_vla, few | dict(reference="ppo"))):
            monkeypatch.setattr(module, "evaluate", small.no_evaluation)
            module.main(module.Args(**common, **kw, run_dir=module.__name__))
            header, *rows = Path(module.__name__, "metrics.csv").read_text().splitlines()
            last = dict(zip(header.split(","), rows[-1].split(",")))
            assert float(last["charts/env_steps"]) == 2 * 8 and 3 < float(last["losses/entropy"]) < 5.55, module


# ----------------------------------------------------------------------------------------------------------------- by hand
def expert(states, extra=""):
    states = int(states)
    env = envs.make(f"maniskill-repositioning{extra}", 512)
    for name in (*SHIFTS, *(f":{task}" for task in maniskill.TWO_ARMS)):
        if name in SHIFTS:
            env.name = name                              # a worker can show every suite's scenes
        else:
            env.close()
            env = envs.make(f"maniskill{name}{extra}", 512)
        tasks = len(env.suite.tasks)
        for split in env.suite.splits:
            wins = steps = 0
            for first in range(0, states, env.num_envs):
                index, mask = first + np.arange(env.num_envs), first + np.arange(env.num_envs) < states
                env.reset(options=dict(task=index % tasks, init_state=np.array(env.suite.splits[split])[index % 100], split=split, mask=mask))
                env.done[~mask] = True
                while not env.done.all():
                    env.step(env.expert_action()[:, None])
                wins, steps = wins + env.succeeded[mask].sum(), steps + env.steps[mask].sum()
            print(f"{name:21s} {split:5s} {wins:3d} of {states}, {steps / states:.0f} steps", flush=True)


def seconds(pid):
    """Processor time of a process so far, so that other programs count little."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def speed():
    one = {}
    for name in ("maniskill-repositioning-cpu", "maniskill-repositioning-meshes-cpu"):
        env = envs.make(name)
        pid, cost = env.workers[0].worker.process.pid, {}
        for chunk in (1, env.suite.chunk):               # a picture a step, and a picture a chunk
            env.reset()
            env.fixed_horizon, began = True, seconds(pid)
            for _ in range(5):
                env.reset()
                while not env.done.all():
                    env.step(np.zeros((1, chunk, 7)))
            cost[chunk] = (seconds(pid) - began) / 400
        memory = int(next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
        one[name] = cost
        print(f"{name}: {1e3 * cost[1]:.1f} ms a step with its picture, {1e3 * cost[env.suite.chunk]:.1f} ms with one picture in {env.suite.chunk} steps "
              f"({80 * cost[env.suite.chunk]:.2f} s an episode), {memory / 1e6:.2f} GB a worker", flush=True)
        env.close()
    light, full = one.values()
    print(f"light arms: {full[1] / light[1]:.1f} x faster a step with its picture")


def pictures(file):
    """Of the same scenes and actions; another Vulkan driver draws nearly the same."""
    made = {}
    for name, split in (("-repositioning", "eval"), ("-unseen-table", "ood"), ("-dynamic-noise", "ood"), (":TwoRobotStackCube-v1", "eval")):
        env = envs.make(f"maniskill{name}-cpu")
        for state in (400, 401):
            made[f"maniskill{name} {state}"] = env.reset(options=dict(task=[state % len(env.suite.tasks)], init_state=[state], split=split))[0]["image"][0]
            for _ in range(2):
                made[f"maniskill{name} {state} later"] = env.step(np.zeros((1, 4, env.suite.action_dim)))[0]["image"][0]
        env.close()
    if not Path(file).exists():
        with open(file, "wb") as new:
            np.savez_compressed(new, **made)
    for name, other in np.load(file).items():
        away = np.abs(made[name].astype(int) - other)
        print(f"{name}: {away.mean():.2f} of 255 on the average, at most {away.max()}")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    began = time.time()
    dict(expert=expert, speed=speed, pictures=pictures)[what](*rest)
    print(f"{time.time() - began:.0f} s")
