"""LIBERO (envs/libero.py, envs/libero_worker.py) on the real simulator.  LIBERO_ASSETS names the folder of the meshes; without it only what needs none runs.

    python tests/test_libero.py speed                      # against stepping the stock environment, drawing each step
    python tests/test_libero.py expert libero-object 10    # the scripted expert on so many initial states a task
"""
import contextlib
import ctypes.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
os.environ.setdefault("LP_NUM_THREADS", "0")             # Mesa draws in the thread that asks
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import envs
from envs import libero, libero_worker

simulated = pytest.mark.skipif(not os.environ.get("LIBERO_ASSETS"), reason="LIBERO_ASSETS is not set to the folder with LIBERO's meshes")
OPEN, CLOSE = 1., 0.


def random_actions(n, length, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, length, 7))


def make(n=1, name="libero-object", **kw):
    return envs.make(name, n, workers=n, **kw)


def play(env, actions, chunk=8):
    """All the actions; returns what step() said each time and the simulators' states."""
    said = []
    for part in np.split(actions, range(chunk, actions.shape[1], chunk), 1):
        said.append((*env.step(part), [a["state"] for a in env.answer]))
    return said


def same(a, b):
    """Two rows of play(): observations, rewards, ends, infos, states."""
    return (np.array_equal(a[0]["image"], b[0]["image"]) and a[0]["instruction"] == b[0]["instruction"]
            and all(np.array_equal(x, y) for x, y in zip(a[1:4], b[1:4]))
            and all(np.array_equal(a[4][k], b[4][k]) for k in a[4]) and np.array_equal(a[5], b[5]))


def pids(env):
    return [w.worker.process.pid for w in env.workers]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):      # gone before, or while it was read
        return False


def gone(processes, seconds=20):
    end = time.time() + seconds
    while any(map(alive, processes)) and time.time() < end:
        time.sleep(.1)
    return not any(map(alive, processes))


@pytest.fixture(scope="module")
def env():
    with contextlib.closing(make(2, max_steps=20)) as made:
        yield made


@pytest.fixture(autouse=True)
def as_new(request):
    """The shared environments, whatever the test before did to them."""
    if "env" in request.fixturenames:
        env = request.getfixturevalue("env")
        env.suite.max_steps, env.fixed_horizon, env.draw, env.timeout = 20, False, True, 60
    yield


def reset(env, task=(0, 1), init_state=(0, 1), **kw):
    return env.reset(options=dict(task=list(task), init_state=list(init_state), split="train", **kw))


# ------------------------------------------------------------------------------------------------------ pictures and actions
def lanczos(x, size):
    """tf.image.resize(method="lanczos3", antialias=True), pixel by pixel."""
    def axis(x):
        scale = x.shape[0] / size
        wide = 3 * max(scale, 1)
        out = np.zeros((size, *x.shape[1:]))
        for i in range(size):
            middle = (i + .5) * scale
            taps = [j for j in range(x.shape[0]) if abs(j + .5 - middle) < wide]
            at = np.array([(j + .5 - middle) / max(scale, 1) for j in taps])
            weights = np.sinc(at) * np.sinc(at / 3)
            out[i] = np.tensordot(weights / weights.sum(), x[taps], (0, 0))
        return out
    return axis(axis(x.astype(float)).swapaxes(0, 1)).swapaxes(0, 1)


def crop(x, area=.9):
    """tf.image.crop_and_resize to the same size, pixel by pixel."""
    n, low, high = len(x), (1 - area ** .5) / 2, (1 + area ** .5) / 2
    out = np.zeros(x.shape)
    for i in range(n):
        for j in range(n):
            y, z = (low * (n - 1) + k * (high - low) * (n - 1) / (n - 1) for k in (i, j))
            t, l = int(y), int(z)
            b, r, v, u = min(t + 1, n - 1), min(l + 1, n - 1), y - int(y), z - int(z)
            out[i, j] = (1 - v) * ((1 - u) * x[t, l] + u * x[t, r]) + v * ((1 - u) * x[b, l] + u * x[b, r])
    return out


def scene():
    """Something with edges, gradients and a little texture, upside down like the simulator's frames."""
    y, x = np.mgrid[:256, :256]
    base = np.stack([x, y, (x + y) // 2], 2) + 60 * ((x // 19 + y // 23) % 2)[..., None] + np.random.default_rng(0).integers(0, 9, (256, 256, 3))
    return base.clip(0, 255).astype(np.uint8)


def test_picture_is_the_formula():
    frame = scene()
    buffer = io.BytesIO()
    Image.fromarray(frame[::-1, ::-1]).save(buffer, "JPEG", quality=95, subsampling=2)
    jpeg = np.asarray(Image.open(buffer))
    want = np.floor(crop(lanczos(jpeg, 224).round().clip(0, 255) / 255).clip(0, 1) * 255.5)
    off = abs(libero_worker.picture(frame) - want)
    assert off.max() <= 1 and off.mean() < .01, (off.max(), off.mean())
    for wrong in (frame, frame[::-1], frame[:, ::-1]):   # only a turn by 180 degrees is right
        assert abs(libero_worker.picture(wrong[::-1, ::-1]) - want).mean() > 10
    plain = np.floor(crop(lanczos(frame[::-1, ::-1], 224).round().clip(0, 255) / 255).clip(0, 1) * 255.5)
    assert abs(libero_worker.picture(frame) - plain).mean() > .5           # the JPEG is seen


@pytest.mark.skipif(not os.environ.get("OPENVLA_GOLDEN"), reason="OPENVLA_GOLDEN is not set to the folder with the original code's answers")
@pytest.mark.parametrize("i", [0, 1])
def test_picture_is_tensorflows(i):
    golden = np.load(Path(os.environ["OPENVLA_GOLDEN"]) / "images_tf.npz")
    off = abs(libero_worker.picture(golden[f"raw{i}"][::-1, ::-1]).astype(int) - golden[f"cropped{i}"])
    assert off.max() <= 6 and off.mean() < 1.1


def test_the_whole_picture_is_rlinfs():
    """Turned, then torchvision's resize, which for a tensor is this."""
    frame = scene()
    want = F.interpolate(torch.from_numpy(frame[::-1, ::-1].copy()).permute(2, 0, 1)[None], (224, 224), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(libero_worker.picture(frame, True).astype(int) - want).max() <= 1 < abs(libero_worker.picture(frame).astype(int) - want).mean()


def test_gripper():
    """A checkpoint says 0 (close) to 1 (open), LIBERO 1 and -1; its demonstrations become the checkpoints' numbers and come back."""
    says = lambda g: libero_worker.protocol(np.array([.1, -.2, .3, 0, 0, 0, g]))
    assert [says(g)[6] for g in (0, .2, .49, .51, .8, 1, .996, -.3)] == [1, 1, 1, -1, -1, -1, -1, 1]
    assert says(0)[:6].tolist() == [.1, -.2, .3, 0, 0, 0]
    assert [says(libero_worker.gripper(g))[6] for g in (-1., 1.)] == [-1, 1]
    assert libero_worker.protocol(libero_worker.IDLE).tolist() == libero_worker.NOTHING.tolist()


@pytest.mark.parametrize("stats", [{}, {"x": {"action": {"q01": [-.5] * 6 + [0], "q99": [.7] * 6 + [1], "mask": [True] * 6 + [False]}}}])
def test_gripper_survives_tokens(stats):
    """Through a policy's tokens, with published statistics (mask: not the gripper) and with a tiny model's (none)."""
    import sft
    import small
    model = small.model(chunk=2, norm_stats=stats)
    action = np.zeros((2, 2, 7))
    action[0, :, 6], action[1, :, 6] = OPEN, CLOSE
    decoded = model.actions(sft.tokens_of(model, action))
    assert [[libero_worker.protocol(a)[6] for a in chunk] for chunk in decoded] == [[-1, -1], [1, 1]]


# -------------------------------------------------------------------------------------------------------------------- errors
def test_without_the_package(monkeypatch):
    monkeypatch.setattr(libero.importlib.util, "find_spec", lambda name: None if name == "robosuite" else object())
    with pytest.raises(SystemExit, match="LIBERO is not installed .robosuite.*pip install .*hf-libero==0.1.4"):
        envs.make("libero-goal")


def test_another_package_of_that_name(tmp_path, monkeypatch):
    """LIBERO's own repository, which knows nothing of an assets path."""
    for name in ("libero", "libero/libero", "robosuite", "bddl", "mujoco"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in (("LIBERO_CONFIG_PATH", str(tmp_path / "config")), ("MUJOCO_GL", "egl"), ("PYOPENGL_PLATFORM", "egl")):
        monkeypatch.setenv(name, value)
    [monkeypatch.delitem(sys.modules, name) for name in list(sys.modules) if name.split(".")[0] == "libero"]
    with pytest.raises(SystemExit, match="not hf-libero: pip uninstall -y libero && .*pip install .*hf-libero==0.1.4"):
        libero.setup()
    [sys.modules.pop(name, None) for name in ("libero.libero", "libero")]


def test_unknown_names():
    with pytest.raises(SystemExit, match="unknown environment 'libero-90'.*tabletop-goal.*libero-long"):
        envs.make("libero-90")


def test_without_a_hub():
    with pytest.raises(SystemExit) as e:
        envs.checkpoint("libero-object-all50", "student")
    assert all(x in str(e.value) for x in ("hf download Haozhan72/Openvla-oft-SFT-libero-object-traj1", "hf download RLinf/RLinf-OpenVLAOFT-GRPO-LIBERO-object",
                                           "python algos/sft.py --env libero-object-all50", "--teacher")) and "\n" not in str(e.value)
    with pytest.raises(SystemExit, match="openvla-oft-libero10-traj1-rl"):
        envs.checkpoint("libero-long", "teacher")


@pytest.mark.parametrize("has,own,asked", [(["bridge_orig"], False, "moojink/openvla-7b-oft-finetuned-libero-10"), (None, True, ""), (["libero_10_no_noops"], False, "")])
def test_action_statistics_are_found(tmp_path, monkeypatch, has, own, asked):
    """In the checkpoint's config, in a file of its own, or in OpenVLA-OFT's, which is put beside."""
    def download(repo, name, local_dir=tmp_path / "snapshot"):
        wanted.append((repo, name))
        if name != "config.json" and local_dir == tmp_path / "snapshot" and not own and "moojink" not in repo:
            raise libero.EntryNotFoundError("no")
        (local_dir / name).parent.mkdir(exist_ok=True)
        (local_dir / name).write_text(json.dumps(dict(norm_stats=dict.fromkeys(has)) if has else {}) if name == "config.json" else repo)
        return str(local_dir / name)
    wanted, found = [], tmp_path / "snapshot" / "dataset_statistics.json"
    monkeypatch.setattr(libero, "hf_hub_download", download)
    assert libero.checkpoint("libero-long-nomsaa", "student") == "Haozhan72/Openvla-oft-SFT-libero10-traj1"
    assert (found.read_text() if found.exists() else "") == (asked or "Haozhan72/Openvla-oft-SFT-libero10-traj1" * own)
    assert (asked, "dataset_statistics.json") in wanted or not asked and not any("moojink" in repo for repo, _ in wanted)


@simulated
def test_without_meshes(tmp_path):
    with pytest.raises(SystemExit, match="meshes are not in .*hf download lerobot/libero-assets.*LIBERO_ASSETS"):
        make(assets=str(tmp_path))


@simulated
def test_no_prompt_no_display_no_torchvision(tmp_path):
    """A first import with nothing configured, no standard input and no display; the policies' libraries still work beside it."""
    code = ("import sys, envs; e = envs.make('libero-goal'); import peft, libero.libero as l; assert 'torchvision' not in sys.modules; "
            "print(l.get_libero_path('bddl_files'))")
    clean = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")}
    p = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT,
                       env=dict(clean, LIBERO_CONFIG_PATH=str(tmp_path / "new"), HOME=str(tmp_path)))
    assert p.returncode == 0, p.stderr
    assert Path(p.stdout.strip()).is_dir() and (tmp_path / "new" / "config.yaml").exists() and not (tmp_path / ".libero").exists()


# ------------------------------------------------------------------------------------------------------------------ contract
@simulated
def test_numbers_of_the_protocol(capsys):
    assert [envs.make(f"libero-{s}").suite.max_steps for s in ("spatial", "object", "goal", "long", "object-512")] == [220, 280, 300, 520, 512]
    suite, papers = envs.make("libero-object").suite, envs.make("libero-object-all50-512").suite
    assert suite.splits == dict(train=list(range(40)), eval=list(range(40, 50))) and papers.splits == dict(train=list(range(50)), eval=list(range(50)))
    assert len(set(suite.tasks)) == 10 and suite.tasks[0] == "pick up the alphabet soup and place it in the basket"
    assert (suite.chunk, suite.action_dim, suite.image, papers.max_steps, papers.name) == (8, 7, 224, 512, "libero-object-all50-512")
    few = envs.make("libero-object-150-tasks71")
    assert few.suite.tasks == [suite.tasks[7], suite.tasks[1]] and few.suite.max_steps == 150 and few.suite.name == "libero-object-150-tasks71"
    few.workers[0].start = Broken
    few._reset(0, 0, 0, "train")
    assert "pick_up_the_milk" in few.workers[0].asked[1] and np.array_equal(few.workers[0].asked[2], few.init_states(7)[0])
    for wrong in ("all49", "0"):
        with pytest.raises(SystemExit, match=f"no option -{wrong}: there are -all50, -nomsaa, -whole, a number of steps"):
            envs.make(f"libero-object-{wrong}")
    capsys.readouterr()
    cores = len(os.sched_getaffinity(0))
    assert envs.make("libero-object", 512).num_envs == cores and f"{cores} environments side by side" in capsys.readouterr().err


@simulated
def test_spaces_and_splits(env):
    obs, info = reset(env)
    assert env.observation_space.contains(obs) and obs["instruction"] == tuple(env.suite.tasks[:2]) and obs["image"].std((1, 2, 3)).min() > 20
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and {k: v.dtype.kind for k, v in info.items()} == dict(success="b", grasped="b", kept="b", steps="i")
    assert reward.dtype.kind == "f" and terminated.dtype == truncated.dtype == bool and (info["steps"] == 8).all()
    with pytest.raises(ValueError, match="no split 'ood'.*train, eval"):
        env.reset(options=dict(split="ood"))
    with pytest.raises(ValueError, match="takes actions"):
        env.step(np.zeros((2, 7)))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((2, 8, 7), np.nan))
    again, _ = env.reset(options=dict(mask=[False, False]))
    assert (again["image"] == obs["image"]).all() and again["instruction"] == obs["instruction"]


@simulated
def test_chunk_is_its_steps_and_time_is_up(env):
    """3, 8, 8, 8 actions or one at a time: same pictures and states; the 20 steps end inside a chunk, then nothing moves."""
    actions = random_actions(2, 27)
    first, _ = reset(env)
    chunks = [play(env, a)[0] for a in np.split(actions, (3, 11, 19), 1)]
    assert (first["image"] != chunks[0][0]["image"]).any((1, 2, 3)).all()
    assert [c[4]["steps"].tolist() for c in chunks] == [[3, 3], [8, 8], [8, 8], [1, 1]] and chunks[-1][3].all() and not chunks[-1][2].any()
    assert np.array_equal(reset(env)[0]["image"], first["image"])
    singles = play(env, actions, 1)
    for chunk, end in zip(chunks, (2, 10, 18, 26)):
        assert np.array_equal(chunk[0]["image"], singles[end][0]["image"]) and np.array_equal(chunk[5], singles[end][5])
    assert not any(s[4]["steps"].any() or s[1].any() for s in singles[20:])


@simulated
def test_determined_by_task_and_state_and_mask(env):
    """Whoever plays it and whatever was before; a mask restarts only those."""
    reset(env, (0, 1), (3, 4))
    actions = random_actions(2, 16)
    a = play(env, actions)
    fresh, _ = reset(env, (5, 0), (7, 3), mask=[False, True])
    assert np.array_equal(fresh["image"][0], a[-1][0]["image"][0]) and env.steps.tolist() == [16, 0]
    b = play(env, actions[::-1])
    assert np.array_equal(a[0][0]["image"][0], b[0][0]["image"][1]) and np.array_equal(a[1][5][0], b[1][5][1])
    assert b[-1][4]["steps"].tolist() == [0, 8]


# ----------------------------------------------------------------------------------------------------- the stock environment
def stock(task, suite="libero-object", **kw):
    """As OpenVLA-OFT and SimpleVLA-RL make it."""
    env = envs.make(suite)
    from libero.libero.envs import OffScreenRenderEnv
    made = OffScreenRenderEnv(bddl_file_name=env.benchmark.get_task_bddl_file_path(task), camera_heights=256, camera_widths=256, **kw)
    return made, env.init_states(task)


def begin(made, state):
    made.seed(0)
    made.reset()
    obs = made.set_init_state(state)
    for _ in range(10):
        obs = made.step([0, 0, 0, 0, 0, 0, -1])[0]
    return obs


@simulated
@pytest.mark.parametrize("suite,task", [("libero-object", 0), ("libero-spatial", 4), ("libero-long", 9)])      # an open drawer, an open microwave: drawn as often
def test_states_and_frames_are_the_stock_ones(env, suite, task):
    """To the bit, in the first and in the second episode of a worker, while it draws one frame in eight."""
    if alone := suite != "libero-object":
        env = make(1, suite)
    made, states = stock(task, suite, camera_names=["agentview"])
    for state in (2, 5)[alone:]:                         # SimpleVLA-RL makes a new stock environment for every episode
        actions = random_actions(env.num_envs, 11, state)
        obs, frames, flat = begin(made, states[state]), [], []
        reset(env, [task] * env.num_envs, [state] * env.num_envs)
        frames.append((obs["agentview_image"], env.answer[0]["frame"], made.get_sim_state(), env.answer[0]["state"]))
        for part in np.split(actions, (8,), 1):
            for a in part[0]:
                obs = made.step([*a[:6], -np.sign(2 * a[6] - 1)])[0]
            env.step(part)
            frames.append((obs["agentview_image"], env.answer[0]["frame"], made.get_sim_state(), env.answer[0]["state"]))
        for want, got, state, mine in frames:
            assert np.array_equal(state, mine) and np.array_equal(want, got)
        assert np.array_equal(env.image[0], libero_worker.picture(obs["agentview_image"]))
    made.close()
    alone and env.close()


@simulated
def test_osmesa_draws_what_egl_draws(env, monkeypatch):
    if not ctypes.util.find_library("OSMesa"):
        pytest.skip("OSMesa is not here: apt install libosmesa6")
    seen = []
    for gl in ("egl", "osmesa"):
        [monkeypatch.setenv(name, gl) for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM")]
        with contextlib.closing(make()) as made:
            reset(made, (0,), (3,))
            seen.append(play(made, random_actions(1, 16))[-1][0]["image"])
            assert f"MUJOCO_GL={gl}".encode() in Path(f"/proc/{pids(made)[0]}/environ").read_bytes().split(b"\0")
    assert np.array_equal(*seen) and seen[0].std() > 20


@simulated
def test_one_frame_a_chunk():
    env = envs.make("libero-object")
    simulation = libero_worker.Simulation(env.benchmark.get_task_bddl_file_path(0))
    drawn, render = [], simulation.renderer.render
    simulation.renderer.render = lambda: drawn.append(1) or render()
    simulation.reset(env.init_states(0)[0])
    simulation.run(random_actions(1, 8)[0])
    assert len(drawn) == 2
    simulation.run(random_actions(1, 2)[0], False, False)
    assert len(drawn) == 2
    simulation.data.qpos[3] = np.nan
    with pytest.raises(FloatingPointError):
        simulation.run(random_actions(1, 2)[0])


@simulated
def test_a_picture_is_of_one_moment():
    """A burner that lights up after the camera has looked is in the next picture; of two bowls alike the keypoint is the one to move."""
    env = envs.make("libero-spatial")
    simulation = libero_worker.Simulation(env.benchmark.get_task_bddl_file_path(0))
    frame, at = (simulation.reset(env.init_states(0)[0])[k] for k in ("frame", "keypoints"))
    burner = simulation.model.site("flat_stove_1_burner").id
    simulation.model.site_rgba[burner] = 1 - simulation.model.site_rgba[burner]
    lit = simulation.model.site_rgba[burner].copy()
    assert np.array_equal(simulation.answer([], [], True)["frame"], frame) and np.array_equal(simulation.model.site_rgba[burner], lit)
    assert simulation.things == ["akita_black_bowl_1"]
    del simulation.env.objects_dict["akita_black_bowl_2"]
    assert np.array_equal(simulation.keypoints()["akita_black_bowl"], at["akita_black_bowl"])


@simulated
def test_without_a_driver_it_says_which_to_install(tmp_path):
    said = subprocess.run([sys.executable, "-c", "import envs\nenvs.make('libero-object').reset()"], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          env=os.environ | dict(MUJOCO_GL="egl", PYOPENGL_PLATFORM="egl", __EGL_VENDOR_LIBRARY_FILENAMES=str(tmp_path / "none.json")))
    assert said.returncode == 1 and "Traceback" not in said.stderr and re.fullmatch("LIBERO cannot draw here .*: apt install libegl1 libgl1-mesa-dri, or libosmesa6 .*\n", said.stderr), said.stderr


@simulated
def test_the_whole_picture(env):
    """-whole: all of the frame, and keypoints where they are in it."""
    reset(env, (0, 0), (1, 2))
    with contextlib.closing(make(1, "libero-object-whole")) as whole:
        obs, _ = whole.reset(options=dict(task=[0], init_state=[1], split="train"))
        assert np.array_equal(whole.answer[0]["frame"], env.answer[0]["frame"]) and whole.suite.name == "libero-object-whole"
        assert np.array_equal(obs["image"][0], libero_worker.picture(env.answer[0]["frame"], True)) and (obs["image"][0] != env.image[0]).mean() > .5
        for name, at in whole.answer[0]["keypoints"].items():
            assert np.allclose(at - .5, (env.answer[0]["keypoints"][name] - .5) * np.sqrt(.9))


# ---------------------------------------------------------------------------------------------------------------- robustness
@simulated
def test_killed_and_hung_workers_are_replaced(env, capsys, monkeypatch):
    """kill -9 inside an episode, before a step and during one; then a hang.  The episode goes on to the bit, and stderr tells."""
    actions = random_actions(2, 20)
    reset(env)
    want = play(env, actions, 4)
    restarts = env.restarts
    reset(env)
    got = []
    for k, part in enumerate(np.split(actions, range(4, 20, 4), 1)):
        if k == 1:
            os.kill(pids(env)[0], signal.SIGKILL)
        if k == 2:
            ask = env.workers[1].ask
            monkeypatch.setattr(env.workers[1], "ask", lambda *request: (ask(*request), os.kill(pids(env)[1], signal.SIGKILL)))
        if k == 3:
            monkeypatch.undo()
            os.kill(pids(env)[0], signal.SIGSTOP)
            monkeypatch.setattr(env.workers[0], "timeout", 5)
            waited = time.time()
        got += play(env, part)
        if k == 3:
            assert time.time() - waited > 5
    assert all(same(a, b) for a, b in zip(want, got)) and len(want) == len(got) == 5
    told = capsys.readouterr().err
    assert env.restarts == restarts + 3 and told.count("replays its episode") == 3 and "no answer for 5 s" in told


class Broken:
    """A worker that resets well and then meets the same NaN each time, or always fails."""
    started, fails = 0, FloatingPointError("NaN or huge numbers in the physics")

    def __init__(self, *arguments):
        Broken.started += 1

    def send(self, *request):
        self.request = request

    def receive(self, timeout):
        if self.request[0] == "run" or not isinstance(self.fails, FloatingPointError):
            raise self.fails
        return dict(holds=[], held=[], state=np.zeros(3), image=np.ones((224, 224, 3), np.uint8), frame=np.ones((256, 256, 3), np.uint8))

    def kill(self):
        return "oh"


@simulated
def test_a_nan_that_comes_back_ends_the_episode(monkeypatch, capsys):
    monkeypatch.setattr(libero, "start", Broken)
    monkeypatch.setattr(Broken, "started", 0)
    env = make(1)
    reset(env, (0,), (0,))
    obs, reward, terminated, truncated, info = env.step(random_actions(1, 8))
    assert Broken.started == 4 and truncated.all() and not terminated.any() and not info["success"].any() and env.broken.all() and env.done.all()
    assert info["steps"].tolist() == env.steps.tolist() == [1]           # how much of the chunk ran nobody knows
    assert env.step(random_actions(1, 8))[4]["steps"].tolist() == [0]
    reset(env, (0,), (1,))
    assert not env.broken.any() and not env.done.any()
    monkeypatch.setattr(Broken, "fails", EOFError())
    with pytest.raises(SystemExit, match="three workers in a row.*oh"):
        reset(env, (0,), (0,))


@simulated
@pytest.mark.parametrize("how", ["close", "SIGINT", "SIGKILL"])
def test_no_stray_processes(how, tmp_path):
    code = ("import signal, sys, time, envs\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"       # a shell's background jobs ignore it
            "e = envs.make('libero-object', 2, workers=2)\ne.draw = False\ne.reset(options=dict(task=[0, 0], init_state=[0, 1]))\n"
            "print(*[w.worker.process.pid for w in e.workers], flush=True)\n" + ("e.close()\nprint(flush=True)\ntime.sleep(60)" if how == "close" else
                                                                            "while True:\n    e.reset()"))
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        workers = list(map(int, p.stdout.readline().split()))
        assert len(workers) == 2
        if how == "close":
            p.stdout.readline()
        else:
            assert all(map(alive, workers))
            p.send_signal(getattr(signal, how))
        assert gone(workers)
    finally:
        p.kill()
        p.wait()


# -------------------------------------------------------------------------------------------------------------------- expert
@simulated
def test_expert_and_success(env):
    """Two tasks, two states each; then the same actions in chunks: success comes at the same step, inside a chunk, and ends the episode."""
    env.suite.max_steps, env.draw, played = 280, False, []
    for state in (0, 1):
        reset(env, (0, 1), (state, state))
        actions = []
        while not env.done.all():
            actions.append(env.expert_action())
            assert np.isfinite(actions[-1]).all() and (abs(actions[-1]) <= 1).all()
            env.step(actions[-1][:, None])
        assert env.succeeded.all() and env.grasped.all() and (env.steps < 140).all()
    length, actions = env.steps.copy(), np.stack(actions, 1)
    reset(env, (0, 1), (1, 1))
    said = play(env, np.concatenate([actions, actions[:, :8]], 1))
    assert env.steps.tolist() == length.tolist() and env.succeeded.all() and sum(s[1] for s in said).tolist() == [1, 1]
    assert said[-1][2].all() and not said[-1][3].any() and not said[-1][4]["steps"].any()
    env.fixed_horizon = True                             # success does not end it
    reset(env, (0, 1), (1, 1))
    play(env, actions)
    assert not env.done.any() and (env.steps == actions.shape[1]).all() and env.succeeded.all()


@simulated
def test_a_task_that_holds_nothing_and_a_long_episode(env, monkeypatch):
    """With fixed_horizon success is paid for where nothing was held before; robosuite's own horizon, 1,000 steps, ends nothing."""
    simulation = libero_worker.Simulation(env.benchmark.get_task_bddl_file_path(0))
    simulation.env.horizon, there = 12, [False]
    monkeypatch.setattr(simulation.env, "_check_success", lambda: there[0])
    simulation.reset(env.init_states(0)[0], False)
    for there[0] in (False, True):
        said = simulation.run(np.zeros((9, 7)), True, False)
        assert said["holds"] == said["held"] == 9 * [there[0]]
    assert simulation.controller.lost > 100              # for the expert: nothing in hand


def write(env, folder, *numbers, **kw):
    """A demonstration of each of these tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "numbers", numbers)
        patch.setattr(env.suite, "tasks", [env.suite.tasks[n] for n in numbers])
        libero.write(env, folder, 1, **kw)


@simulated
def test_demonstrations(tmp_path, env):
    """LIBERO's layout, and what sft.py makes of it: the environment's own pictures, the checkpoints' gripper."""
    h5py = pytest.importorskip("h5py")
    import sft
    env.suite.max_steps = 280
    write(env, tmp_path, 1)
    file = tmp_path / "pick_up_the_cream_cheese_and_place_it_in_the_basket_demo.hdf5"
    with h5py.File(file) as f:
        actions, frames = f["data/demo_0/actions"][:], f["data/demo_0/obs/agentview_rgb"][:]
        assert json.loads(f["data"].attrs["problem_info"])["language_instruction"] == env.suite.tasks[1] and list(f["data"]) == ["demo_0"]
    assert frames.shape == (len(actions), 256, 256, 3) and set(actions[:, 6]) == {-1, 1} and actions[0, 6] == -1
    (images, learned, clean, text, _), = sft.read_hdf5(tmp_path, 1)
    assert text == env.suite.tasks[1] and clean.all() and len(images) == len(learned) <= len(actions)
    assert set(learned[:, 6]) == {OPEN, CLOSE} and learned[0, 6] == OPEN
    obs, _ = reset(env, (1, 1), (0, 0))
    assert np.array_equal(images[0], obs["image"][0])
    env.draw = False                                     # what was learned succeeds
    play(env, np.tile(learned, (2, 1, 1)))
    assert env.succeeded.all()


class Clumsy:
    """Drops the object in initial state 0; of the second task it knows nothing."""
    num_envs, seed, init_state = 1, 1, 0
    suite = SimpleNamespace(name="libero-object-whole", tasks=["known", "unknown"], splits=dict(train=[0, 1, 2]))
    numbers, benchmark = range(2), SimpleNamespace(get_task_names=lambda: Clumsy.suite.tasks)
    answer = [dict(frame=np.zeros((256, 256, 3), np.uint8), keypoints=dict(cube=(.5, .5)))]

    def reset(self, options):
        self.task, self.state, self.done, self.succeeded = options["task"], options["init_state"][0], np.zeros(1, bool), np.zeros(1, bool)

    def expert_action(self):
        return np.zeros((1, 7)) if self.task == 0 else np.tile(libero.IDLE, (1, 1))

    def step(self, actions):
        self.done[:], self.succeeded[:] = True, self.state > 0


def test_a_failed_demonstration_is_not_an_unknown_task(tmp_path, capsys):
    """On one core a first wave is one episode."""
    h5py = pytest.importorskip("h5py")
    libero.write(Clumsy(), tmp_path, 2)
    assert "2 of 2 demonstrations: known" in (said := capsys.readouterr().out) and "0 of 2 demonstrations: unknown" in said
    with h5py.File(tmp_path / "known_demo.hdf5") as f:
        assert list(f["data"]) == ["demo_0", "demo_1"] and f["data/demo_1/obs/keypoints"].attrs["whole"] == 1       # what keypoints are fractions of


@simulated
def test_disturbed_demonstrations(tmp_path, env):
    """Bursts of random actions are marked, the labels in them are still the expert's, and keypoints are on the things."""
    pytest.importorskip("h5py")
    import sft
    env.suite.max_steps = 280
    write(env, tmp_path, 1, noise=.7)
    demo, = sft.read_hdf5(tmp_path, 1)
    images, learned, clean, _, points = demo
    assert .4 < clean.mean() < 1 and set(learned[:, 6]) == {OPEN, CLOSE} and abs(learned).max() <= 1
    assert {"cream_cheese", "basket", "hand"} < set(points) and all(at.shape == (len(images), 2) for at in points.values())
    first, *_, last = np.linalg.norm(points["cream_cheese"] - points["basket"], axis=1)
    assert last < .2 and last < first / 2                # over the basket's rim, above its middle
    assert np.linalg.norm(points["hand"] - points["cream_cheese"], axis=1).min() < .05
    assert (abs(points["basket"] - (.2, .6)) < .1).all()  # where it is in the picture: left, below the middle
    model = sft.tiny(["a"], image=96, chunk=8)
    (pictures, index, pixels), = sft.look_at([demo], model)
    assert pictures.shape == (len(images), 96, 96, 3) and index.max() == len(points) - 1 and np.allclose(pixels[:, sorted(points).index("hand")], points["hand"] * 96)
    kept = len(sft.windows([demo], model)[1])
    assert 0 < kept < len(images) and kept == sum(clean[i:i + 8].all() for i in range(len(clean)))


@simulated
def test_every_script(tmp_path, env, monkeypatch):
    """Two iterations of each on the real simulator: its own demonstrations, then the rest from that checkpoint."""
    pytest.importorskip("h5py")
    import dagger_forward_kl, dagger_hard_ce, grpo, ppo, road_vla, sft, vla_opd
    env.suite.max_steps = 280
    write(env, tmp_path / "demos", 0, 1)
    env.suite.max_steps, tasks = 20, env.suite.tasks
    monkeypatch.setattr(envs, "make", lambda *a, **k: env)
    monkeypatch.setattr(env.suite, "tasks", tasks[:2])
    common = dict(env="libero-object", num_envs=2, num_iterations=2, eval_episodes_per_task=1, eval_every=2, device="cpu")
    sft.main(sft.Args(**common, run_dir=str(tmp_path / "sft"), data=str(tmp_path / "demos"), pretrain_tower=5))
    student, few = str(tmp_path / "sft" / "checkpoint"), dict(updates_per_rollout=2, batch_prompts=2, group_size=2)
    for script, flags in ((vla_opd, dict(few, teacher=student)), (dagger_forward_kl, dict(few, teacher=student)), (dagger_hard_ce, dict(few, teacher=student)),
                          (grpo, dict(few, keep_low=0., keep_high=1.)), (ppo, dict(num_episodes=2, updates_per_rollout=2)),
                          (road_vla, dict(num_episodes=2, updates_per_rollout=2, reference=str(tmp_path / "ppo")))):
        env.fixed_horizon = False
        name = script.__name__
        script.main(script.Args(**common, **flags, student=student, run_dir=str(tmp_path / name)))
        lines = [line.split(",") for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        last = dict(zip(lines[0], lines[-1]))
        assert last["step"] == "2" and float(last["charts/env_steps"]) == 20 * float(last["charts/episodes"]), name
        assert all(np.isfinite(float(v)) for row in lines[1:] for v in row if v), name
        assert (tmp_path / name / "checkpoint" / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- by hand
def seconds(pid):
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def speed(episodes=2, task=0):
    """Processor time of the same episodes, so that other programs count little: the stock environment drawing each step, and one worker."""
    env = make(1)
    state, actions, env.draw = [0], [], False
    reset(env, [task], state)
    while not env.done.all():
        actions.append(env.expert_action())
        env.step(actions[-1][:, None])
    actions, env.draw = np.stack(actions, 1), True
    results = {}
    for name, kw in (("stock, both cameras", {}), ("stock, agentview only", dict(camera_names=["agentview"]))):
        made, states = stock(task, **kw)
        begin(made, states[0])
        began, frames = time.process_time(), []
        for _ in range(episodes):
            begin(made, states[0])
            for k, a in enumerate(actions[0]):
                obs = made.step(libero_worker.protocol(a))[0]
                if k % 8 == 7 or k == actions.shape[1] - 1:
                    frames.append((libero_worker.picture(obs["agentview_image"]), obs["agentview_image"], made.get_sim_state()))
        results[name] = (time.process_time() - began) / episodes
        made.close()
    for name in ("libero-object", "libero-object-nomsaa"):
        env = make(1, name)
        reset(env, [task], state)
        began, equal, frame = seconds(pids(env)[0]), True, iter(frames)
        for _ in range(episodes):
            reset(env, [task], state)
            for part in np.split(actions, range(8, actions.shape[1], 8), 1):
                env.step(part)
                image, raw, flat = next(frame)
                equal &= np.array_equal(flat, env.answer[0]["state"]) and (np.array_equal(raw, env.answer[0]["frame"]) or "nomsaa" in name)
        results[name] = (seconds(pids(env)[0]) - began) / episodes
        memory = [int(line.split()[1]) for line in Path(f"/proc/{pids(env)[0]}/status").read_text().splitlines() if line.startswith("VmHWM")][0]
        print(f"{name}: states {'' if 'nomsaa' in name else 'and frames '}{'identical to the stock ones' if equal else 'DIFFER'}; {memory / 1e6:.2f} GB a worker")
        env.close()
    for name, t in results.items():
        print(f"{name:24s} {t:6.2f} s of one core an episode of {actions.shape[1]} steps, {60 / t:5.1f} episodes a minute, "
              f"{results['stock, both cameras'] / t:.1f} x, {results['stock, agentview only'] / t:.1f} x one stock camera")
    rate = {}
    for n in (1, 2):                                     # by the clock: for an idle machine
        with contextlib.closing(make(n)) as env:
            for k in range(1 + episodes):                # the first one loads
                if k == 1:
                    began = time.time()
                reset(env, [task] * n, state * n)
                for part in np.split(actions, range(8, actions.shape[1], 8), 1):
                    env.step(np.repeat(part, n, 0))
            rate[n] = n * episodes / (time.time() - began)
    print(f"two workers: {rate[2] / rate[1]:.2f} x one, by the clock")


def expert(name, states, tasks=range(10)):
    env = envs.make(name, 512)
    env.draw = False
    for task in tasks:
        wins = steps = 0
        for first in range(0, states, env.num_envs):
            n = min(env.num_envs, states - first)
            env.reset(options=dict(task=task, init_state=(first + np.arange(env.num_envs)) % 40))
            while not env.done.all():
                env.step(env.expert_action()[:, None])
            wins, steps = wins + env.succeeded[:n].sum(), steps + env.steps[:n].sum()
        print(f"{wins:3d} of {states}, {steps / states:.0f} steps: {env.suite.tasks[task]}", flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    speed(*map(int, rest)) if what == "speed" else expert(rest[0], int(rest[1]))
