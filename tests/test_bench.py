"""The benchmark's runner, with stand-ins for the scripts: they write what the real ones write, at once."""
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))
import bench
import jobs

SCRIPT = '''
import os, sys, time
from pathlib import Path
words, name = sys.argv[1:], Path(__file__).stem
flag = dict(zip(words, words[1:]))
folder, root = Path(flag["--run-dir"]), Path(__file__).parents[1]
(root / "calls").open("a").write(" ".join([name, *words]) + "\\n")
fails = (root / "fails").read_text().split() if (root / "fails").exists() else []
if any(word in flag["--run-dir"] for word in fails):
    print("40 %|###\\r41 %|###", file=sys.stderr)
    sys.exit("the disk is full")
for k in ("--student", "--reference", "--checkpoint"):
    assert k not in flag or flag[k].startswith("checkpoints/") or (root / flag[k]).exists(), flag[k]
folder.mkdir(parents=True, exist_ok=True)
if name == "evaluate":
    (folder / "episodes.csv").write_text("mode,task,instruction,init_state,success,grasped,steps\\n" + "".join(
        f"{mode},{task},put it there,{400 + i},1,{int(i > 0)},9\\n" for mode in ("greedy", "sampled") for task in (0, 1) for i in range(3)))
    sys.exit()
(folder / "cores").write_text(" ".join(map(str, os.sched_getaffinity(0))))
saved = folder / "checkpoint" / "step"
assert saved.exists() == ("--resume" in words), "resume"
first = int(saved.read_text()) if saved.exists() else 0
for step in range(first + 1, int(flag.get("--num-iterations", 3)) + 1):
    (folder / "metrics.csv").write_text("step,charts/eval_success\\n" + "".join(f"{i},.5\\n" for i in range(step + 1)))
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(str(step))
    while step == 2 and (root / "hang").exists():
        time.sleep(.05)
'''


@pytest.fixture
def repo(tmp_path):
    for folder in ("algos", "results"):
        (tmp_path / folder).mkdir()
    for name in {words.split()[0] for words in jobs.ALGORITHMS.values()}:
        name.startswith("..") or (tmp_path / "algos" / name).write_text(SCRIPT)
    for name in ("bench.py", "jobs.py"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    (tmp_path / "results" / "forgetting.py").write_text("from pathlib import Path; Path(__file__).with_suffix('.json').write_text('{}')")
    (tmp_path / "results" / "report.py").write_text("import sys; from pathlib import Path; (Path(sys.argv[1]) / 'README.md').write_text('the page')")

    def call(words, wait=True):
        p = subprocess.Popen([sys.executable, tmp_path / "results" / "bench.py", *shlex.split(words)], cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))       # ignored where the tests run in the background
        if not wait:
            return p
        out, err = p.communicate(timeout=120)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        (tmp_path / "calls").unlink(missing_ok=True)
        return p.returncode, out, err, calls
    return tmp_path, call


def trainings(calls):
    return [words for words in calls if not words.startswith("evaluate")]


def rows(path):
    return {row["name"]: row for row in csv.DictReader(path.open())}


def test_finished_is_not_run_again_and_changed_is(repo):
    root, call = repo
    status, _, err, calls = call("opd-fig5 --seeds 1 --jobs 3")
    assert status == 0, err
    assert len(trainings(calls)) == 6 and len(calls) == 12
    assert (root / "results" / "tabletop-object-opd-g2-1.csv").read_text() == (root / "runs/bench/tabletop-object-opd-g2-1/metrics.csv").read_text()
    assert (root / "results/episodes/tabletop-object-opd-g2-1.csv").read_text().splitlines()[:2] == ["task,init_state,success,grasped", "0,400,1,0"]
    assert len((root / "results/episodes/tabletop-object-opd-g2-1.csv").read_text().splitlines()) == 7         # greedy alone
    assert (root / "results" / "README.md").read_text() == "the page"
    row = rows(root / "results" / "runs.csv")["tabletop-object-opd-g2-1"]
    assert row["error"] == "" and "--group-size 2" in row["command"] and "torch" in row["versions"] and row["machine"]
    assert json.loads((root / "runs/bench/tabletop-object-opd-g2-1/done.json").read_text())["commit"] == row["commit"]

    assert call("opd-fig5 --seeds 1")[3] == []                                           # nothing changed
    mine = root / "results" / "tabletop-object-opd-g2-1.csv"
    kept = mine.read_text()
    mine.write_text("another machine's\n")                                               # git checkout results: evaluated and shown again, not trained again
    again, = trainings(call("opd-fig5 --seeds 1")[3])
    assert again.endswith("--run-dir runs/bench/tabletop-object-opd-g2-1 --resume") and mine.read_text() == kept
    with (root / "algos" / "vla_opd.py").open("a") as f:
        f.write("# a comment changes nothing\n")
    assert call("opd-fig5 --seeds 1")[3] == []
    text = (root / "results" / "jobs.py").read_text()                                    # other flags: this one again, from the start
    (root / "results" / "jobs.py").write_text(text.replace("vla_opd.py --eval-every 1 --group-size 2\"", "vla_opd.py --eval-every 1 --group-size 2 --seed 9\""))
    assert [words.split("--run-dir")[1].strip() for words in trainings(call("opd-fig5 --seeds 1")[3])] == ["runs/bench/tabletop-object-opd-g2-1"]
    with (root / "algos" / "vla_opd.py").open("a") as f:
        f.write("more = 1\n")
    assert len(trainings(call("opd-fig5 --seeds 1")[3])) == 6


def test_missing_makes_again_what_started_from_a_run_made_again(repo):
    """A reference made again has other numbers; a run that started from the former would not fit."""
    root, call = repo
    assert call("road-table5 --seeds 1")[0] == 0
    (root / "results" / "tabletop-multi-object-road-positive-1.csv").unlink()
    assert "3 jobs, 1 to run" in call("road-table5 --seeds 1 --missing --list")[1]       # the reference is here
    shutil.rmtree(root / "runs")
    assert "3 jobs, 3 to run" in call("road-table5 --seeds 1 --missing --list")[1]       # as in a fresh clone


def test_jobs_side_by_side_share_the_cores(repo):
    root, call = repo
    all_, _ = os.sched_getaffinity(0), call("opd-fig5 --seeds 1 --jobs 2")
    seen = {frozenset(map(int, path.read_text().split())) for path in root.glob("runs/bench/*/cores")}
    assert set().union(*seen) == all_ and len(seen) == min(2, len(all_)) and sum(map(len, seen)) == len(all_)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(repo, how):
    root, call = repo
    (root / "hang").touch()
    p, step = call("opd-table3 --seeds 1 --jobs 1", wait=False), root / "runs/bench/tabletop-two-arm-opd-exact-1/checkpoint/step"
    while not step.exists() or step.read_text() != "2":                                  # the first to run after student and teacher
        time.sleep(.05)
        assert p.poll() is None, p.communicate()
    p.send_signal(how)
    assert p.wait(30) != 0
    how == signal.SIGKILL or "goes on from here" in p.stderr.read() or pytest.fail("no word")
    how == signal.SIGKILL and ("another" in call("opd-table3 --seeds 1")[2] or pytest.fail("two at once"))      # the orphan still runs
    (root / "hang").unlink()
    time.sleep(.5)
    (root / "calls").unlink(missing_ok=True)
    assert "begun, " in call("opd-table3 --seeds 1 --list")[1]
    status, _, err, calls = call("opd-table3 --seeds 1 --jobs 1")
    assert status == 0, err
    assert "--resume" in next(words for words in calls if words.startswith("vla_opd")) and not any("two-arm-student" in words for words in calls)
    assert (root / "results" / "tabletop-two-arm-opd-exact-1.csv").read_text().count("\n") == 5


def test_a_failure_is_told_and_the_rest_goes_on(repo):
    root, call = repo
    (root / "fails").write_text("object-opd-exact-1")
    status, _, err, calls = call("opd-fig2 --seeds 1")
    table = rows(root / "results" / "runs.csv")
    assert status == 1 and "tabletop-object-opd-exact-1: the disk is full" in err
    assert table["tabletop-object-opd-exact-1"]["error"] == "the disk is full"
    assert table["tabletop-object-distill-grpo-1"]["error"] == "skipped: it needs tabletop-object-opd-exact-1"
    assert table["tabletop-object-grpo-1"]["error"] == table["tabletop-long-distill-grpo-1"]["error"] == ""
    assert (root / "results" / "README.md").exists()
    (root / "fails").unlink()
    status, _, err, calls = call("opd-fig2 --seeds 1")                                   # and is tried again: itself, who waited for it, nobody else
    assert status == 0 and sorted(words.split()[0] for words in trainings(calls)) == ["grpo", "vla_opd"]
    before = rows(root / "results" / "runs.csv")
    assert not any(row["error"] for row in before.values())

    (root / "fails").write_text("object-grpo-1")                                         # a failure leaves what was measured before, and where it is from
    (root / "algos" / "grpo.py").write_text(SCRIPT.replace("the disk is full", "no"))
    assert call("opd-fig2 --seeds 1")[0] == 1
    after = rows(root / "results" / "runs.csv")
    assert after["tabletop-object-grpo-1"] == before["tabletop-object-grpo-1"] | dict(error="no") and (root / "results" / "tabletop-object-grpo-1.csv").exists()


def test_needs_come_first_and_their_checkpoints_are_found(repo):
    root, call = repo
    status, _, err, calls = call("road-table5 opd-fig3 --seeds 1 --jobs 2")
    assert status == 0, err
    began = [words.split("--run-dir")[1].split()[0].split("/")[2] for words in calls]
    assert began.index("tabletop-multi-object-ppo-1") < began.index("tabletop-multi-object-road-positive-1")
    assert began.index("tabletop-object-opd-exact-1") < began.index("tabletop-object-distill-grpo-1") < began.index("tabletop-spatial-forget-distill-grpo-1")
    assert (root / "results/episodes/tabletop-multi-object-road-1-ood.csv").exists() and (root / "results/episodes/tabletop-goal-base.csv").exists()
    assert not (root / "results/tabletop-goal-base.csv").exists() and (root / "results/forgetting.json").read_text() == "{}"


def test_missing_and_list(repo):
    root, call = repo
    (root / "results" / "tabletop-long-grpo-1.csv").write_text("measured elsewhere")
    (root / "results" / "tabletop-long-opd-exact-1.csv").write_text("measured elsewhere")
    assert "finished elsewhere" in call("opd-fig2 --seeds 1 --missing --list")[1] and "finished elsewhere" not in call("opd-fig2 --seeds 1 --list")[1]
    assert not (root / "runs" / "bench").exists()
    status, out, err, calls = call("opd-fig2 --seeds 1 --missing")
    assert status == 0, err
    ran = {words.split("--run-dir")[1].split()[0].split("/")[2] for words in calls}
    assert "tabletop-long-opd-exact-1" in ran and "tabletop-long-grpo-1" not in ran      # Distill + GRPO needs the former's checkpoint
    assert (root / "results" / "tabletop-long-grpo-1.csv").read_text() == "measured elsewhere"
    assert "13 jobs, 0 to run" in call("opd-fig2 --seeds 1 --missing --list")[1] and "13 jobs, 1 to run" in call("opd-fig2 --seeds 1 --list")[1]


def test_quick_has_its_own_folder(repo):
    root, call = repo
    status, _, err, calls = call("--jobs 6")
    assert status == 0, err
    assert (root / "results/quick/README.md").exists() and not (root / "results/README.md").exists() and not (root / "runs/bench").exists()
    ran = {words.split()[0] for words in calls}
    assert ran == {"vla_opd", "dagger_forward_kl", "dagger_hard_ce", "grpo", "ppo", "road_vla", "road_vla_text", "sft", "evaluate"}


@pytest.mark.parametrize("words,sentence", [("figure-9", "unknown: figure-9"), ("full opd-fig2", "full goes alone"), ("--seeds 0", "must be positive"), ("--seeds 10", "9 at most"), ("opd-table3 --student mine", "--student and --teacher are for libero"),
    ("robotwin", "ROBOTWIN_ROOT")])
def test_errors_are_one_sentence(repo, words, sentence):
    shutil.copytree(ROOT / "envs", repo[0] / "envs")
    status, _, err, _ = repo[1](words)
    assert status and sentence in err.splitlines()[-1] and "Traceback" not in err


def test_suites_of_one_task_are_evaluated_on_100_episodes(monkeypatch):
    import envs
    monkeypatch.setattr(envs, "make", lambda *a: SimpleNamespace(close=lambda: None))
    for what, tasks in (("robotwin", 1), ("rl4vla", 1), ("libero", 10), ("maniskill", 10)):
        for job in jobs.make_jobs([what], 1, "student").values():
            assert int(dict(zip(job.play, job.play[1:]))["--episodes-per-task"]) * tasks >= 100


def test_scripts_know_all_flags():
    tyro = pytest.importorskip("tyro")
    sys.path.insert(0, str(ROOT / "algos"))
    for what in (["full"], ["quick"]):
        for job in jobs.make_jobs(what, 1).values():
            if job.splits:
                tyro.cli(__import__(job.script).Args, args=job.words[1:] + (job.play if job.script == "evaluate" else []))
    assert len(jobs.make_jobs(["full"], 3)) > 2 * len(jobs.make_jobs(["full"], 1)) - 60


def test_three_seeds_of_what_the_papers_measured():
    seeds = lambda made, k: sorted(int(name[-1]) for name in made if name[:-2] == f"tabletop-{k}")
    plain, more = jobs.make_jobs(["full"]), jobs.make_jobs(["full"], 2)
    for k in ("object-opd-exact", "long-grpo", "init-pose-road", "two-arm-dagger-ce", "repositioning-text-mcts", "goal-forget-sft-many", "repositioning-ppo-at-20"):
        assert seeds(plain, k) == [1, 2, 3] and seeds(more, k) == [1, 2]
    for k in ("object-plain-teacher", "object-sharp-ce", "object-distill-grpo-slow", "object-all-states-opd-exact", "repositioning-ppo-long", "repositioning-road-even"):
        assert seeds(plain, k) == [1] and seeds(more, k) == [1, 2]
    assert {k for k in jobs.ONCE if k not in {a for _, _, algorithms in jobs.TABLES for a in algorithms.split()}} == {"plain-teacher", "sharp-student"}     # made for others


@pytest.mark.parametrize("shown,gpus,card", [(None, [], 0), ("", [], None), ("-1", [], None), ("3,4", [], 3), ("", ["2"], 2), (None, ["5", "6"], 5)])
def test_the_gpu_that_jobs_were_shown_is_recorded(tmp_path, monkeypatch, shown, gpus, card):
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "card $2"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False) if shown is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    job = jobs.Job("nothing", "", [""], [], tmp_path, [], (), "")
    monkeypatch.setattr(jobs.Job, "fingerprint", lambda self, jobs: "")
    monkeypatch.setattr(jobs.Job, "steps", lambda self, stamp: self.keep(fingerprint=stamp) or iter(()))
    with open(tmp_path / "lock", "w") as lock:
        bench.run(dict(nothing=job), ["nothing"], tmp_path, 1, gpus, lock)
    machine = next(csv.DictReader((tmp_path / "runs.csv").open()))["machine"]
    assert machine.split(", ")[2:] == ([] if card is None else [f"card {card}"])
