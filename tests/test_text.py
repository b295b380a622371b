"""road_vla_text.py: what the teacher is told, and its divergence."""
import math

import numpy as np
import pytest
import torch

import critics
import envs
import road_vla_text as text
import small

OFFSETS = {(.3, 0, 0): ["right"], (-.3, .2, 0): ["left", "ahead"], (0, -.2, .1): ["behind", "above"], (.01, 0, -.2): ["below"], (0, 0, 0): []}


def test_jsd_is_bounded_symmetric_and_right():
    p, q = torch.randn(2, 50, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(3).log_softmax(-1)
    m = (p.exp() + q.exp()) / 2
    reference = ((p.exp() * (p - m.log())).sum(-1) + (q.exp() * (q - m.log())).sum(-1)) / 2
    assert torch.allclose(text.jsd(p, q), reference, atol=1e-12) and torch.allclose(text.jsd(p, q), text.jsd(q, p), atol=1e-12)
    assert 0 < text.jsd(p, q).min() and text.jsd(p, q).max() < math.log(2)
    assert text.jsd(p, p).abs().max() < 1e-12
    far = torch.full((2, 256), -1e4).index_put((torch.arange(2), torch.tensor([0, 9])), torch.tensor(0.)).log_softmax(-1)
    assert text.jsd(far[0], far[1]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("offset", OFFSETS)
def test_directions(offset):
    assert text.direction(np.array(offset)) == OFFSETS[offset]


def told(split="train"):
    env = envs.make("tabletop-object", 3, 1)
    text.tell(env)
    return env, env.reset(options=dict(task=[0, 1, 2], init_state=[1, 2, 3], split=split))[0]["instruction"]


def test_hints_tell_the_state_of_their_moment():
    env, before = told()
    object_at, hand = env.xyz[0, env.goal[0, 0, 1]].copy(), env.hand[0, -1].copy()
    sentence = text.hints(before, {}, "rel-spatial")[0]
    side = "right" if object_at[0] > hand[0] else "left"
    assert sentence.startswith(f"{before[0]}. red cube is {side}") and "not grasped. basket is" in sentence and sentence.endswith("gripper open.")
    for _ in range(40):
        after = env.step(env.expert_action()[:, None])[0]["instruction"]
        if env._grasped()[0]:
            break
    assert ", grasped." in text.hints(after, {}, "rel-spatial")[0] and text.hints(after, {}, "rel-spatial")[0].endswith("gripper closed.")
    assert text.hints(before, {}, "rel-spatial")[0] == sentence                          # still what it was then
    plan = text.hints(before, {}, "plan-rel-spatial")[0]
    assert "1. Approach" in plan and plan.endswith(sentence.removeprefix(f"{before[0]}. "))
    assert not any("gripper" in t for t in before)                                       # the student sees none of it


def test_memory_holds_successes_and_gives_the_nearest():
    env, start = told()
    later = env.step(np.ones((3, 4, 7)))[0]["instruction"]
    batch = dict(success=np.array([1, 0, 1]), episode=torch.tensor([0, 1, 2, 0, 1, 2]), instruction=[*start, *later])
    actions = np.arange(42, dtype=float).reshape(6, 7) / 10 - 2
    memory = {}
    assert text.hints(start, memory, "mcts") == list(start)                              # nothing known yet
    text.remember(memory, batch, actions, np.arange(6.))
    assert set(memory) == {str(start[0]), str(start[2])} and len(memory[start[0]][0]) == 2
    first, failed, _ = text.hints(start, memory, "mcts")
    assert failed == start[1]
    assert first == f"{start[0]}. Hint (q=0.00): move (-2.00, -1.90, -1.80), rotate (-1.70, -1.60, -1.50), gripper open."
    assert "q=3.00" in text.hints(later, memory, "mcts")[0] and "gripper closed" in text.hints(later, memory, "mcts")[0]


def test_main_gradient(tmp_path, monkeypatch):
    """Of the whole script: PPO's, and the divergence from the same policy that is told more."""
    critics.short(monkeypatch, 6)
    path = critics.checkpoint(tmp_path)
    args = text.Args(**{**critics.FEW, "student": path, "run_dir": str(tmp_path / "run"), "num_iterations": 1, "updates_per_rollout": 1, "max_grad_norm": small.FAR,
                        "distill_coefficient": 20., "entropy_coefficient": .1, "micro_batch_size": 5, "query_batch_size": 3})
    (gradient,), batch = critics.recorded(text, args)
    model = critics.actor_critic(path)
    value, advantage, returns = critics.judged(model, batch, args)
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
    with torch.no_grad():
        q = model.policy.score(batch["image"], text.hints(batch["instruction"], {}, args.privileged_info), batch["tokens"]).log_softmax(-1)
    logits, now = model(batch["image"], batch["instruction"], batch["tokens"])
    p = logits.log_softmax(-1)
    middle = ((p.exp() + q.exp()) / 2).log()
    distill = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))[batch["mask"]].mean() / 2
    policy, worth, entropy = critics.losses(logits, now, batch["tokens"], batch["mask"], batch["logp"], value, advantage, returns, args)
    (policy + 20 * distill + worth - .1 * entropy).backward()
    want = critics.flat_gradient(model)
    assert distill > 1e-4 and (gradient - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("kind", ["rel-spatial", "mcts"])
def test_resume_is_exact(tmp_path, monkeypatch, kind):
    """The memory goes on, too: in the second iteration the teacher is told of the first."""
    critics.short(monkeypatch, 8)
    play = text.rollout
    monkeypatch.setattr(text, "rollout", lambda *a: (batch := play(*a)) | dict(success=batch["success"] | 1))
    run = critics.straight_and_resumed(text, tmp_path, "parallel", privileged_info=kind, seed=2)     # a seed with which instructions come again
    first, second = (float(row["losses/distill_loss"]) for row in critics.rows(run)[1:])
    assert second > .01 and (first > .01) == (kind != "mcts"), (first, second)


@pytest.mark.parametrize("kind", ["plan-rel-spatial", "mcts"])
def test_a_run(kind, tmp_path):
    args = text.Args(student=small.checkpoints(tmp_path)["student"], run_dir=str(tmp_path / "run"), num_episodes=4, privileged_info=kind, **small.RUN)
    text.main(args)
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(",")))
    assert all(math.isfinite(float(v)) for v in last.values() if v)
    assert float(last["losses/distill_loss"]) > 1e-6 or kind == "mcts"                   # an untrained policy has no success to remember


def test_of_two_hands_the_one_that_has_to_act_is_described():
    """The left one fetches what it can reach and hands it over: what is said is where the thing is from the hand that the expert moves towards it."""
    env, seen = envs.make("tabletop-two-arm", 12, 1), set()
    text.tell(env)
    texts = env.reset(options=dict(task=np.arange(12) % 10, init_state=np.arange(12)))[0]["instruction"]
    for _ in range(60):
        thing = env.goal[:, 0, 1]
        for i, said in enumerate(text.hints(texts, {}, "rel-spatial")):
            arm = int((env.held[i] == thing[i]).argmax()) if (env.held[i] == thing[i]).any() else int(env.xyz[i, thing[i], 0] > env.high[0, 0])
            where, hand = env.xyz[i, thing[i]] - env.hand[i, arm], ("left", "right")[arm]
            assert said.startswith(f"{texts[i]}. {envs.tabletop.KINDS[env.kind[i, thing[i]]]} is {', '.join(text.direction(where) or ['at'])} {hand} gripper")
            assert said.endswith(f"{hand} gripper {'open' if env.open[i, arm] > .5 else 'closed'}.")
            seen.add((hand, (env.held[i] == thing[i]).any()))
        texts = env.step(env.expert_action()[:, None])[0]["instruction"]
    assert len(seen) == 4
    memory = {texts[0]: (text.features(texts[0].state)[None], np.arange(14.)[None] / 10 - .6, np.array([1.]))}
    assert text.hints(texts[:1], memory, "mcts")[0].endswith("move (-0.60, -0.50, -0.40), rotate (-0.30, -0.20, -0.10), gripper open; "
                                                             "move (+0.10, +0.20, +0.30), rotate (+0.40, +0.50, +0.60), gripper closed.")


def test_no_hints_that_are_not_true(tmp_path):
    """A drawer is not put on the plate."""
    with pytest.raises(SystemExit, match="no text teacher"):
        text.main(text.Args(env="tabletop-goal", run_dir=str(tmp_path / "run"), num_episodes=4, privileged_info="rel-spatial", **small.RUN))


def test_one_memory_needs_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "setup", lambda args: (0, 2, torch.device("cpu")))
    with pytest.raises(SystemExit, match="one memory.*without torchrun"):
        text.main(text.Args(student=small.checkpoints(tmp_path)["student"], run_dir=str(tmp_path / "run"), num_episodes=4, privileged_info="mcts", **small.RUN))
