"""Supervised fine-tuning: what it learns from and whether it learns; evaluation's numbers."""
import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import sft
import small
import envs
from envs.libero_worker import picture
from envs.tabletop import TabletopEnv
import vla_opd

FEW = dict(num_envs=4, num_iterations=1, demos_per_task=1, eval_episodes_per_task=1, device=small.DEVICE, batch_size=4096)
WINDOWS = sft.windows
STATS = {"robot": {"action": {"q01": [-3, .1, -1], "q99": [2, .4, 1], "mask": [True, True, False]}}}


def demo(T, dim, dirty=(), seed=0, text="pick"):
    rng = np.random.default_rng(seed)
    clean = ~np.isin(np.arange(T), dirty)
    return rng.integers(0, 256, (T, 16, 16, 3), dtype=np.uint8), rng.uniform(-1, 1, (T, dim)).astype(np.float32), clean, text


def test_windows_against_brute_force():
    model = small.model(image=16, chunk=3, action_dim=2)
    demos = [demo(7, 2, (3,)), demo(2, 2, seed=1, text="place"), demo(5, 2, (4,), 2), demo(4, 2, (0, 1, 2, 3), 3, "never")]
    images, actions, texts = [], [], []
    for image, action, clean, text in demos:
        for t in range(len(image)):
            window = [min(t + k, len(image) - 1) for k in range(3)]          # past the end the last action repeats
            if all(clean[w] for w in window):
                images, texts = images + [image[t]], texts + [text]
                actions.append([action[w] for w in window])
    found, words, tokens = sft.windows(demos, model)
    assert len(texts) == 8 and words == texts and "place" in texts
    np.testing.assert_array_equal(found.numpy(), np.stack(images))
    np.testing.assert_allclose(model.actions(tokens), np.array(actions), atol=1 / 255 + 1e-6)


@pytest.mark.parametrize("stats", [{}, STATS])
def test_tokens_of_is_the_inverse_of_actions(stats):
    model = small.model(chunk=2, action_dim=3, norm_stats=stats)
    tokens = torch.randint(1, 256, (500, 6), generator=torch.Generator().manual_seed(0))     # 0 and 1 mean the same centre
    assert torch.equal(sft.tokens_of(model, model.actions(tokens)), tokens)
    low, high = model.ranges()
    actions = np.random.default_rng(0).uniform(low, high, (500, 2, 3))
    assert (abs(model.actions(sft.tokens_of(model, actions)) - actions) <= (high - low) / 255 / 2 + 1e-6).all()
    ends = sft.tokens_of(model, np.stack([np.broadcast_to(x, (2, 3)) for x in (low, high, low - 9, high + 9)]))
    assert ends.tolist() == [[255] * 6, [0] * 6, [255] * 6, [0] * 6]


def test_read_hdf5(tmp_path):
    """LIBERO's layout: data/demo_i/{actions, obs/agentview_rgb}, the instruction in the file's name, as its environments have it."""
    h5py = pytest.importorskip("h5py")
    rng, want = np.random.default_rng(0), {}
    for task, text in enumerate(("pick up the red cube", "open the drawer")):
        (tmp_path / "suite").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "suite" / f"{('A', 'LIVING_ROOM_SCENE2')[task]}_{text.replace(' ', '_')}_demo.hdf5", "w") as f:
            data = f.create_group("data")
            if task == 0:                                # LIBERO's has other words than its environment
                data.attrs["problem_info"] = json.dumps(dict(language_instruction=list("Pick the red one")))
            for i in (0, 1, 2, 10):
                actions = rng.uniform(.1, 1, (6, 7))
                actions[:, 6] = -1
                actions[2, :6] = actions[4, :6] = 0      # 2: nothing happens; 4: only the gripper closes
                actions[4:, 6] = 1
                images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
                group = data.create_group(f"demo_{i}")
                group["actions"], group["obs/agentview_rgb"] = actions, images
                if i == 2:                               # task 0: places in the middle 0.9 of the picture, as all once were; task 1: in all of it
                    group["obs/keypoints"] = np.full((6, 1, 2), .9)
                    group["obs/keypoints"].attrs.update(dict(names=["cube"]) | (dict(whole=1) if task else {}))
                want[task, i] = images, actions
    demos = sft.read_hdf5(tmp_path, 3)
    assert [d[3] for d in demos] == ["A pick up the red cube"] * 3 + ["open the drawer"] * 3
    kept = [0, 1, 3, 4, 5]
    for (image, action, clean, _, points), key in zip(demos, [(t, i) for t in (0, 1) for i in (0, 1, 2)]):
        np.testing.assert_array_equal(image, np.stack([picture(x) for x in want[key][0][kept]]))     # as envs/libero.py shows them
        np.testing.assert_array_equal(action[:, :6], want[key][1][kept][:, :6].astype(np.float32))
        np.testing.assert_array_equal(action[:, 6], want[key][1][kept][:, 6] < 0)                      # -1 opens: 1
        assert (not points) == (key[1] < 2) and clean.all() and len(clean) == 5
    for whole, k in ((False, (1, .9 ** -.5)), (True, (.9 ** .5, 1))):
        places = [np.unique(d[4]["cube"]) for d in sft.read_hdf5(tmp_path, 3, whole)[2::3]]
        np.testing.assert_allclose(places, .5 + .4 * np.array(k)[:, None])
    assert len(sft.windows(demos, small.model(image=8))[0]) == 30
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="no .*hdf5 in"):
        sft.read_hdf5(tmp_path / "none", 1)


@pytest.mark.parametrize("env_id", ["tabletop-object", "tabletop-two-arm"])
def test_saved_demonstrations_are_the_played_ones(tmp_path, monkeypatch, env_id):
    """--save-demos writes what --data reads: all but the frames in which no arm does anything, and keypoints that the tower can learn from."""
    pytest.importorskip("h5py")
    args = sft.Args(env=env_id, num_envs=4, demos_per_task=1, demo_noise=.5, save_demos=str(tmp_path / "demos"), run_dir=str(tmp_path / "run"))
    sft.main(args)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="leave torchrun out"):
        patch.setattr(sft, "setup", lambda args: (1, 2, torch.device("cpu")))            # two would write one file
        sft.main(args)
    made = envs.make(env_id, 4, args.seed)
    played = sft.play_expert(made, 1, .5, np.random.default_rng(args.seed), keypoints=True)
    read = {text: (image, action, clean, points) for image, action, clean, text, points in sft.read_hdf5(tmp_path / "demos", 9)}
    assert len(read) == len(played) == len(made.suite.tasks) and not list(tmp_path.glob("**/*.part"))
    for image, action, clean, text, things in played:
        grip = action[:, 6::7]
        kept = np.array([abs(np.delete(a, range(6, len(a), 7))).max() > 1e-4 or t > 0 and (grip[t] != grip[t - 1]).any() for t, a in enumerate(action)])
        for got, want in zip(read[text], (image, action.astype(np.float32), clean)):
            np.testing.assert_array_equal(got, want[kept])
        for name, places in read[text][3].items():
            seen = (things[kept, :, 0] == int(name)).any(1)
            np.testing.assert_array_equal((places > -1).all(1), seen)
            np.testing.assert_array_equal(places[seen], np.reshape([row[row[:, 0] == int(name)][0, 1:] for row in things[kept][seen]], (-1, 2)))
    model = small.model(image=64, tokens=28)
    (pictures, index, pixels), = sft.look_at(sft.read_hdf5(tmp_path / "demos", 9), model)
    assert len(pictures) == len(index) and (index >= 0).sum(1).min() >= 2
    tower = [p.clone() for p in model.vision_backbone["featurizer"].parameters()]
    sft.pretrain_tower(model, [(pictures, index, pixels)], 3, np.random.default_rng(0))
    assert not all(torch.equal(a, b) for a, b in zip(tower, model.vision_backbone["featurizer"].parameters()))


def test_a_waiting_arm_is_no_no_op_of_two(tmp_path):
    """Frames are kept in which either arm moves, or opens or closes its hand; those in which neither does are dropped."""
    pytest.importorskip("h5py")
    images, _, clean, text = demo(6, 14)
    actions = np.zeros((6, 14), np.float32)
    actions[:, [6, 13]] = 1
    actions[1, 3] = actions[2, 9] = .5                   # 1: the first arm moves; 2: the second
    actions[4:, 13] = -1                                 # 4: the second hand closes; 0, 3, 5: nothing
    sft.write_hdf5([(images, actions, clean, text)], tmp_path, "two")
    (image, action, *_), = sft.read_hdf5(tmp_path, 1)
    np.testing.assert_array_equal(image, images[[1, 2, 4]])
    np.testing.assert_array_equal(action, actions[[1, 2, 4]])


def test_of_two_keypoints_alike_the_first_counts(tmp_path):
    pytest.importorskip("h5py")
    images, actions, clean, text = demo(2, 7)
    things = np.array([[[1, .1, .2], [1, .3, .4], [0, .5, .6]], [[-1, .1, .2], [1, .7, .8], [-1, 0, 0]]])       # then the first is hidden
    sft.write_hdf5([(images, actions + [[0.], [.5]], clean, text, things)], tmp_path, "alike")
    (*_, points), = sft.read_hdf5(tmp_path, 1)
    assert {k: v.tolist() for k, v in points.items()} == {"00": [[.5, .6], [-1, -1]], "01": [[.1, .2], [.7, .8]]}


def train(folder, patch, run_dir, **kw):
    """sft.main's metrics, and the windows it had."""
    seen = []
    patch.setattr(sft, "evaluate", small.no_evaluation)
    patch.setattr(sft, "windows", lambda *a: seen.append(WINDOWS(*a)) or seen[-1])
    sft.main(sft.Args(**{**FEW, "student": small.checkpoints(folder)["student"], "run_dir": str(folder / run_dir), **kw}))
    return list(csv.DictReader(open(folder / run_dir / "metrics.csv"))), seen[0]


@pytest.mark.parametrize("smoothing", [0., .5, 6.])
def test_labels(tmp_path, monkeypatch, capsys, smoothing):
    """The first loss is the cross-entropy with Gaussians that sum to 1; with one bin at 0."""
    rows, (image, text, target) = train(tmp_path, monkeypatch, "run", smoothing=smoothing)
    said = capsys.readouterr().out
    assert "after:" in said and "before:" not in said    # it was not evaluated before
    model = vla_opd.VLA.load(small.checkpoints(tmp_path)["student"])
    with torch.no_grad():
        logp = model.score(image, text, target).log_softmax(-1).double().numpy()
    if smoothing:
        label = np.exp(-.5 * ((np.arange(256) - target.numpy()[..., None]) / smoothing) ** 2)
        label /= label.sum(-1, keepdims=True)
    else:
        label = np.arange(256) == target.numpy()[..., None]
    assert abs(float(rows[0]["losses/policy_loss"]) - -(label * logp).sum(-1).mean()) < 1e-4


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_learns(tmp_path, monkeypatch, decoding):
    student = small.checkpoints(tmp_path, decoding)["student"]
    rows, (image, _, target) = train(tmp_path, monkeypatch, "run", student=student, num_iterations=3, batch_size=32, smoothing=0.)
    loss = [float(r["losses/policy_loss"]) for r in rows]
    assert len(loss) == 3 and 0 < loss[2] < loss[1] < loss[0] and loss[2] < loss[0] - .5, loss
    assert 10 * 8 < len(image) == len(target) < 10 * 64  # one demonstration of each of the ten tasks


def test_micro_batches_are_the_batch(tmp_path, monkeypatch):
    for size in (7, 64):
        train(tmp_path, monkeypatch, f"run-{size}", num_iterations=1, batch_size=64, micro_batch_size=size)
    a, b = (load_file(tmp_path / f"run-{size}" / "checkpoint" / "optimizer.safetensors") for size in (7, 64))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= 1e-3 * b[k].abs().max() + 1e-7 for k in a)
    one, two = (list(csv.DictReader(open(tmp_path / f"run-{size}" / "metrics.csv")))[-1] for size in (7, 64))
    assert all(abs(float(one[k]) - float(two[k])) < 1e-3 for k in ("losses/policy_loss", "losses/within_10_bins"))


def test_what_is_learned_and_how_fast(tmp_path, monkeypatch):
    """Demonstrations from the training's states, new ones every pass with --fresh-demos, in a new order; a falling rate, clipped gradients; greedy evaluation."""
    made, rates, norms, states, step, reset = [], [], [], set(), torch.optim.AdamW.step, TabletopEnv.reset

    def stepped(self):
        rates.append([group["lr"] for group in self.param_groups])
        norms.append(small.flat(p.grad for group in self.param_groups for p in group["params"]).norm())
        return step(self)
    monkeypatch.setattr(torch.optim, "AdamW", type("AdamW", (torch.optim.AdamW,), dict(step=stepped)))
    monkeypatch.setattr(TabletopEnv, "reset", lambda self, **kw: states.update(kw["options"]["init_state"].tolist()) or reset(self, **kw))
    score, seen = sft.VLA.score, []
    monkeypatch.setattr(sft.VLA, "score", lambda self, image, text, tokens: seen.append(tokens[:, 0].tolist()) or score(self, image, text, tokens))
    kw = dict(num_iterations=2, learning_rate=1e-3, tower_rate=.5, max_grad_norm=1e-3, micro_batch_size=4096)
    train(tmp_path, monkeypatch, "run", **kw)
    assert np.allclose(rates, [[1e-3, 5e-4], [5e-4, 2.5e-4]]) and max(norms) < 1.001e-3 and max(states) < 400
    assert sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1]
    monkeypatch.setattr(sft, "windows", lambda demos, model: made.append(WINDOWS(demos, model)) or made[-1])
    monkeypatch.setattr(sft, "evaluate", lambda env, model, split, n, temperature, *rest: made.append((split, temperature)) or small.no_evaluation(env, model, split, n))
    sft.main(sft.Args(**{**FEW, **kw, "student": small.checkpoints(tmp_path)["student"], "run_dir": str(tmp_path / "fresh"), "fresh_demos": True}))
    (_, _, first), (_, _, second), evaluation = made
    assert evaluation == ("eval", 0.) and (first.shape != second.shape or not torch.equal(first, second))


@small.two_devices
def test_two_processes_log_the_loss_of_both(tmp_path, monkeypatch):
    """Each has half of the demonstrations, in one step; the loss is that of all of them."""
    kw = dict(learning_rate=1e-12, batch_size=4096, num_iterations=1)
    (alone,), (image, text, target) = train(tmp_path, monkeypatch, "alone", **kw)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(small.free_port())]
    given = dict(FEW, student=small.checkpoints(tmp_path)["student"], run_dir="both", **kw)
    status, out, err = small.call(words + small.command("sft.py", **given)[1:], tmp_path)
    assert status == 0, err
    both, = csv.DictReader(open(tmp_path / "both" / "metrics.csv"))
    for k in ("losses/policy_loss", "losses/within_10_bins"):
        assert abs(float(both[k]) - float(alone[k])) < 1e-3 * float(alone[k]), k
    a, b = (load_file(tmp_path / name / "checkpoint/optimizer.safetensors") for name in ("alone", "both"))
    assert all((a[k] - b[k]).norm() <= 2e-2 * a[k].norm() + 1e-9 for k in a if k.endswith(("exp_avg", "momentum_buffer")))      # the gradient, too
    model, half = vla_opd.VLA.load(given["student"]), np.random.default_rng([1, 1]).permutation(len(target) // 2 * 2)[::2]
    with torch.no_grad():
        hits = (model.score(image[half], [text[i] for i in half], target[half]).argmax(-1) - target[half]).abs() <= 10
    assert abs(hits.float().mean() - float(alone["losses/within_10_bins"])) > 5e-3 * float(alone["losses/within_10_bins"])     # the first's own differs


def test_another_robot_needs_all_weights(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has 7 action dimensions, tabletop-two-arm 14: .*without --lora-rank"):
        train(tmp_path, monkeypatch, "run", env="tabletop-two-arm", lora_rank=2)


@pytest.mark.parametrize("rate", [0., 1.])
def test_tower_rate(tmp_path, monkeypatch, rate):
    train(tmp_path, monkeypatch, "run", num_iterations=1, tower_rate=rate)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (small.checkpoints(tmp_path)["student"], tmp_path / "run" / "checkpoint"))
    same = {k: torch.equal(before[k], after[k]) for k in before if k.startswith(("vision", "projector", "action_slots"))}
    assert all(same[k] == (rate == 0 and k.startswith("vision")) for k in same) and len(same) > 5


def test_disturbed_demonstrations(tmp_path):
    """Bursts are marked, and what is written down is what the expert wanted, within -1 and 1."""
    import envs
    env = envs.make("tabletop-object", 5, 1)
    calm, shaken = (sft.play_expert(env, 1, noise, np.random.default_rng(0)) for noise in (0., .7))
    assert len(calm) == len(shaken) == 10 and sorted(d[3] for d in calm) == sorted(env.suite.tasks)
    assert all(d[2].all() for d in calm) and .1 < np.mean([d[2].mean() for d in shaken]) < .95
    assert all(abs(d[1]).max() <= 1 and len(d[0]) == len(d[1]) == len(d[2]) for d in calm + shaken)


def test_an_expert_that_stands_still_teaches_nothing(capsys):
    """As LIBERO's does before drawers and knobs."""
    import envs
    env, knows = envs.make("tabletop-object", 5, 1), np.arange(10) % 4 > 0
    action = env.expert_action
    env.expert_action = lambda: action() * knows[env.task][:, None]
    demos = sft.play_expert(env, 2, 0., np.random.default_rng(0))
    assert sorted(d[3] for d in demos) == sorted(2 * [t for t, known in zip(env.suite.tasks, knows) if known]) and "14 demonstrations instead of 20" in capsys.readouterr().out
    knows[:] = False
    with pytest.raises(SystemExit, match="pass --data"):
        sft.play_expert(env, 1, 0., np.random.default_rng(0))


@pytest.mark.parametrize("lacks,flags,said", [("expert_action", {}, "no scripted expert: pass --data"), ("keypoints", dict(pretrain_tower=5), "no keypoints .*: pass --data")])
def test_an_environment_without_expert_or_keypoints(tmp_path, monkeypatch, lacks, flags, said):
    import envs
    env = envs.make("tabletop-object", 4, 1)
    has = SimpleNamespace(**{k: getattr(env, k) for k in ("suite", "num_envs", "expert_action", "keypoints") if k != lacks})
    monkeypatch.setattr(envs, "make", lambda *a: has)
    with pytest.raises(SystemExit, match=said):
        sft.main(sft.Args(env="mine", run_dir=str(tmp_path / "run"), device=small.DEVICE, **flags))
    assert not (tmp_path / "run").exists()


def test_a_policy_in_between():
    """The expert finds back from where a policy went, and no label reaches over the gap: what is learned from are stretches that the expert played itself."""
    import envs
    env, model, played = envs.make("tabletop-object", 1, 1), small.model(), []
    step, env.suite.tasks = env.step, env.suite.tasks[:4]
    env.step = lambda actions: played.extend(actions[0]) or step(actions)
    demos = [d for seed in range(3) for d in sft.play_expert(env, 1, 0., np.random.default_rng(seed), model)]
    actions, gaps = np.stack(played), 0
    for _, wanted, clean, _ in demos:
        gaps += (~clean).sum()
        for i in range(len(wanted) - 3):
            if clean[i:i + 4].all():
                assert (abs(np.lib.stride_tricks.sliding_window_view(actions, (4, 7))[:, 0] - wanted[i:i + 4]).max((1, 2)) < 1e-6).any()
    assert gaps >= 3


def test_a_policy_in_between_plays_in_batches():
    import envs
    env, model, sizes = envs.make("tabletop-object", 4, 1), small.model(), []
    act, env.suite.tasks = model.act, env.suite.tasks[:4]
    model.act = lambda pictures, *rest: sizes.append(len(pictures)) or act(pictures, *rest)
    assert len(sft.play_expert(env, 1, 0., np.random.default_rng(0), model, 3)) == 4 and sizes == [3, 1] * (len(sizes) // 2) != []


@pytest.mark.parametrize("flags,said", [
    (dict(data="x", demo_policy="y"), "--demo-policy is about the scripted expert.*leave --data out"), (dict(data="x", demo_noise=.7), "--demo-noise.*leave --data out"),
    (dict(data="x", fresh_demos=True), "--fresh-demos.*leave --data out"), (dict(data="x", save_demos="y"), "--save-demos.*leave --data out"), (dict(student="x", pretrain_tower=5), "--pretrain-tower.*leave --student out"),
    (dict(lora_rank=4), "need --student"), (dict(load_in_4bit=True), "need --student"), (dict(batch_size=0), "--batch-size 0 is too small")], ids=str)
def test_flags_that_would_do_nothing_are_refused(tmp_path, flags, said):
    with pytest.raises(SystemExit, match=said):
        sft.main(sft.Args(run_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()


def test_data_needs_h5py(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "find_spec", lambda name: None)
    monkeypatch.setattr(sft, "play_expert", lambda *args: pytest.fail("played for nothing"))
    for flags in (dict(data=str(tmp_path)), dict(save_demos=str(tmp_path / "demos"))):
        with pytest.raises(SystemExit, match="pip install h5py"):
            sft.main(sft.Args(run_dir=str(tmp_path / "run"), **flags))


def test_a_new_model_goes_on_in_its_dtype(tmp_path, monkeypatch):
    """Resumed it is what it was, in bfloat16 too; and a run that has nothing left to do, and was never evaluated, ends in peace."""
    kw = dict(student="", dtype="bfloat16", eval_every=9)
    train(tmp_path, monkeypatch, "straight", num_iterations=2, **kw)
    original, seen = sft.Run.save, []
    monkeypatch.setattr(sft.Run, "save", lambda run, model, *a: seen.append(model.compute) or original(run, model, *a) or 1 / (a[-1] != 1))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, monkeypatch, "broken", num_iterations=2, **kw)
    monkeypatch.setattr(sft.Run, "save", original)
    sft.main(sft.Args(**{**FEW, **kw, "run_dir": str(tmp_path / "broken"), "num_iterations": 1, "resume": True}))
    train(tmp_path, monkeypatch, "broken", num_iterations=2, resume=True, **kw)
    a, b = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("straight", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a) and set(seen) == {torch.bfloat16}


def test_resume_goes_on_exactly(tmp_path, monkeypatch):
    """Killed after the first of two iterations; both optimisers go on."""
    train(tmp_path, monkeypatch, "straight", num_iterations=2, batch_size=64)
    original = sft.Run.save

    def save_and_die(*a):
        original(*a)
        raise KeyboardInterrupt
    monkeypatch.setattr(sft.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, monkeypatch, "broken", num_iterations=2, batch_size=64)
    monkeypatch.setattr(sft.Run, "save", original)
    train(tmp_path, monkeypatch, "broken", num_iterations=2, batch_size=64, resume=True)
    for file in ("model", "optimizer"):
        a, b = (load_file(tmp_path / name / "checkpoint" / f"{file}.safetensors") for name in ("straight", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    assert {k.split(".")[0] for k in a} == {"0", "1"}    # AdamW and Muon


@pytest.mark.parametrize("name", ["tabletop-object", "tabletop-object-pupil", "tabletop-nowhere-student", "libero-base", "libero-object-teacher", "base-"])
def test_make_with_a_bad_name(name):
    with pytest.raises(SystemExit, match=f"^--make {name}: not .*tabletop-object") as e:
        sft.follow_recipe(sft.Args(make=name))
    assert "\n" not in str(e.value)


def test_evaluation_is_repeatable(tmp_path, capsys, monkeypatch):
    tables, printed, played, original = [], [], [], evaluate.rollout
    monkeypatch.setattr(evaluate, "rollout", lambda *a, **k: played.append(original(*a, **k)) or played[-1])
    for i, seed in enumerate((1, 1, 2)):
        evaluate.main(evaluate.Args(checkpoint=small.checkpoints(tmp_path)["student"], env="tabletop-object", episodes_per_task=2, num_envs=8,
                                    seed=seed, device=small.DEVICE, run_dir=str(tmp_path / str(i))))
        tables.append(list(csv.DictReader(open(tmp_path / str(i) / "episodes.csv"))))
        printed.append([line for line in capsys.readouterr().out.splitlines() if "%" in line])
    assert tables[0] == tables[1] and printed[0] == printed[1] and len(printed[0]) == 2 * 11
    greedy, sampled = ([p["tokens"] for p in played[i::2]] for i in (0, 1))
    assert torch.equal(greedy[0], greedy[2]) and torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    keys = [(r["mode"], int(r["task"]), int(r["init_state"])) for r in tables[0]]
    assert keys == [(m, t, s) for m in ("greedy", "sampled") for t in range(10) for s in (400, 401)]
    assert all(r["success"] in "01" and r["grasped"] in "01" and 0 < int(r["steps"]) <= 64 for r in tables[0])


@pytest.mark.parametrize("name,start", [("tabletop-object-student", "tabletop-base"), ("tabletop-two-arm-base", "tabletop-base"),
                                        ("tabletop-two-arm-student", "tabletop-two-arm-base"), ("tabletop-two-arm-teacher", "tabletop-two-arm-base")])
def test_recipes_start_from_one_base(tmp_path, monkeypatch, name, start):
    monkeypatch.chdir(tmp_path)
    args, shipped = sft.follow_recipe(sft.Args(make=name, seed=3))
    for killed, resume in (("checkpoint.tmp", False), ("checkpoint.old", True), ("checkpoint", True)):       # while saving the first, between two renames, after
        (tmp_path / args.run_dir / killed).mkdir(parents=True)
        assert sft.follow_recipe(sft.Args(make=name, seed=3))[0].resume == resume
    assert args.student.endswith(f"checkpoints/{start}") and shipped.name == name and name.startswith(args.env) and args.run_dir == f"runs/make-{name}-3"


def test_evaluation_counts_the_right_episode(tmp_path, monkeypatch):
    """A policy that succeeds with some tasks and states only, in any order of play."""
    import envs

    def play(env, model, task, state, split, *rest):
        return dict(success=(task + state) % 3 == 0, grasped=state == 401, length=10 * task + state)
    monkeypatch.setattr(evaluate, "rollout", play)
    env, model = envs.make("tabletop-object", 2), SimpleNamespace(device=small.DEVICE)
    success, grasped, length = evaluate.evaluate(env, model, "eval", 3, 0., 8, 1)
    for t in range(10):
        for i, s in enumerate((400, 401, 402)):
            assert (success[t, i], grasped[t, i], length[t, i]) == ((t + s) % 3 == 0, s == 401, 10 * t + s)


@pytest.mark.parametrize("split", ["eval", "ood"])
def test_the_split_asked_for_is_evaluated(tmp_path, monkeypatch, split):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda env, model, split, n, temperature, *rest: seen.append(split) or small.no_evaluation(env, model, split, n))
    evaluate.main(evaluate.Args(env="tabletop-repositioning", checkpoint=small.checkpoints(tmp_path)["student"], split=split, episodes_per_task=1, num_envs=1,
                                device=small.DEVICE, run_dir=str(tmp_path / "run")))
    assert set(seen) == {split}


def test_processes_sample_apart(tmp_path, monkeypatch):
    """Every process of a sampled evaluation has random numbers of its own; one alone has those of the seed."""
    env, seeds = envs.make("tabletop-object", 8, 1), []
    played = lambda *a: seeds.append(torch.rand(4, generator=a[7]).tolist()) or {k: np.zeros(len(a[2])) for k in ("success", "grasped", "length")}
    monkeypatch.setattr(evaluate, "rollout", played), monkeypatch.setattr(evaluate, "all_sum", lambda x, world: x)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        evaluate.evaluate(env, small.model(), "eval", 2, .6, 8, 5, rank, world)
    assert seeds[0] == seeds[1] == torch.rand(4, generator=torch.Generator(small.DEVICE).manual_seed(5), device=small.DEVICE).tolist() != seeds[2]
