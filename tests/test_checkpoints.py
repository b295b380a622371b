"""The shipped checkpoints: small, strong or weak as they should be, and they look at the picture."""
from pathlib import Path

import pytest
import torch

import envs
from vla_opd import VLA, evaluate

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "checkpoints").iterdir())


def success(model, env_id="tabletop-object", episodes=10):
    return evaluate(envs.make(env_id, 10 * episodes), model, "eval", episodes, 0., 512, 1)[0].mean()


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f.name)
def test_small_and_loadable(folder):
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2e6
    assert all(torch.isfinite(p).all() for p in VLA.load(folder).parameters())


def test_teacher_above_student_above_nothing():
    teacher, student = (success(VLA.load(f"{SHIPPED[0].parent}/tabletop-object-{role}")) for role in ("teacher", "student"))
    assert teacher >= .88 and .3 <= student <= .65, (teacher, student)


def test_the_picture_matters(monkeypatch):
    """Pictures of other episodes, at the same moment, leave nothing of the teacher's success."""
    teacher = VLA.load(SHIPPED[0].parent / "tabletop-object-teacher")
    generator = torch.Generator().manual_seed(0)
    prepare = teacher.prepare
    monkeypatch.setattr(teacher, "prepare", lambda images: prepare(images)[torch.randperm(len(images), generator=generator)])
    assert success(teacher) < .1


def test_the_instruction_matters():
    teacher, env = VLA.load(SHIPPED[0].parent / "tabletop-object-teacher"), envs.make("tabletop-object", 100)
    act = teacher.act
    teacher.act = lambda images, texts, *rest: act(images, [env.suite.tasks[(env.suite.tasks.index(t) + 3) % 10] for t in texts], *rest)
    assert evaluate(env, teacher, "eval", 10, 0., 512, 1)[0].mean() < .2
