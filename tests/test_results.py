"""The numbers on the results page are those of the files beside it; the statistics are what their names say."""
import csv
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).resolve().parents[1] / "results"
sys.path.insert(0, str(RESULTS))
import bench
import data
import figures
import jobs
import report


def test_page_is_what_the_files_say(tmp_path):
    assert subprocess.run([sys.executable, RESULTS / "report.py", "--check"]).returncode == 0
    shutil.copytree(RESULTS, tmp_path / "copy", ignore=shutil.ignore_patterns("quick", "__pycache__"))
    table = tmp_path / "copy" / "tabletop-object-grpo-1.csv"                             # and a changed number is noticed
    header, *rows = table.read_text().splitlines()
    cells, at = rows[-1].split(","), header.split(",").index("charts/eval_success")
    cells[at] = f"{float(cells[at]) + .1}"
    table.write_text("\n".join([header, *rows[:-1], ",".join(cells)]) + "\n")
    found = subprocess.run([sys.executable, RESULTS / "report.py", tmp_path / "copy", "--check"], capture_output=True, text=True)
    assert found.returncode == 1 and "is not what the files beside it say" in found.stderr


def test_full_size_in_small(tmp_path, monkeypatch):
    """The same jobs with a few thousand parameters: each leaves a row, as far as it came, and one that fails does not stop the rest."""
    words = [sys.executable, RESULTS / "full_size.py", "--toy", "--folder", tmp_path / "made", "--out", tmp_path / "full_size.csv"]
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    for names in ("opd-oft",), ("opd-oft-resumed", "road", "grpo-oft"):                  # what an earlier call measured stays
        done = subprocess.run([*words, "--jobs", *names], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        *_, last, _ = report.sized()
        assert last.startswith(f"| `{names[-1]}` | parallel | ")
    first, resumed, road, grpo = csv.DictReader(open(tmp_path / "full_size.csv"))
    assert "is no run of ppo.py" in road["error"] and not first["error"] and not resumed["error"] and not grpo["error"]
    assert first["queries"] == "8" and float(first["update_seconds"]) > 0 < float(first["label_seconds"]) and float(grpo["label_seconds"]) == 0
    ended = [list(csv.DictReader(open(tmp_path / "made/toy/runs" / name / "metrics.csv")))[-1] for name in ("opd-oft", "opd-oft-resumed")]
    assert first["reverse_kl_exact_first"] == resumed["reverse_kl_exact_first"] and [row["step"] for row in ended] == ["2", "3"]
    assert all(abs(float(row["losses/reverse_kl_exact"]) - float(shown["reverse_kl_exact_last"])) < 1e-3 for row, shown in zip(ended, (first, resumed)))
    grpo = list(csv.DictReader(open(tmp_path / "made/toy/runs/grpo-oft/metrics.csv")))
    assert float(grpo[1]["charts/success_rate"]) == .5 and float(grpo[1]["charts/env_steps"]) == 4 * 16     # every other one is solved, at its last step
    assert sum("is no run of ppo.py" in line for line in report.sized()) == 1


def fill(folder, every, chance):
    """Files as ./benchmark.sh leaves them; success by chance(name)."""
    (folder / "episodes").mkdir()
    for name in ("cost.json", "gradients.json", "teacher.json", "forgetting.json", "full_size.csv"):
        shutil.copy(RESULTS / name, folder)
    rng = np.random.default_rng(0)
    for job in every.values():
        for path in job.outputs(folder):
            if path.parent == folder / "episodes":
                rows = [(t, 400 + i, int(rng.random() < chance(job.name)), 1) for t in range(10) for i in range(20)]
                path.write_text("task,init_state,success,grasped\n" + "".join(f"{','.join(map(str, r))}\n" for r in rows))
            elif path.suffix == ".csv" and not path.exists():
                like = f"repositioning-{'road' if job.script == 'road_vla' else 'ppo'}" if "ppo" in job.script or "road" in job.script else "object-grpo" if job.script != "sft" else "object-opd-exact"
                shutil.copy(RESULTS / f"tabletop-{like}-1.csv", path)
        bench.record(folder, job.name, commit="abc", command="", seconds=1, versions="torch 9", machine="a machine", error="")


def test_a_full_folder_and_any_part_of_it_make_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    fill(tmp_path, jobs.make_jobs(["full"], 2), lambda name: .95 if "opd" in name or "base" in name or "teacher" in name else .4)
    page = report.page()
    for title, *_ in report.SECTIONS[:-3]:
        assert f"## {title}\n" in page, title
    assert "| not run |" not in page and "nan" not in page and all(title not in page for title, *_ in report.SECTIONS[-3:])
    for row in ("| VLA-OPD, Table 2 | VLA-OPD, exact, is above its student (87.4, 48.9) | higher | ", "| VLA-OPD, Figure 3 | Distill is above SFT on unseen suites | higher | "):
        found = next(line for line in page.splitlines() if line.startswith(row))
        assert "paired; seeds 2" in found and found.endswith("| holds |")
    assert "| 93.4 |" in page and "| 4.68 ± 0.0 |" in page                               # the papers' columns
    figures.draw()
    assert {p.stem for p in tmp_path.glob("*.png")} == {f.removesuffix(".png") for *_, f in report.SECTIONS if f}

    bench.record(tmp_path, "tabletop-goal-grpo-1", commit="abc", command="", seconds=1, versions="", machine="", error="the disk is full")
    assert "| tabletop-goal-grpo-1 | the disk is full |" in report.page()
    draw, files = random.Random(0), sorted(p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".json"))
    for n in range(6):                                   # less and less
        for path in draw.sample(files, len(files) // 3):
            files.remove(path), path.unlink()
        page = report.page()
        assert "nan" not in page and ("| seeds |" in page or n > 3)
        n % 3 or figures.draw()


def test_an_empty_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    assert report.page().count("| not run |") == len(report.SECTIONS) - 4
    figures.draw()


def test_a_run_that_was_made_again_stands_beside_its_first(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    for seed, to in ((1, "earlier-2"), (2, "2"), (3, "3")):
        shutil.copy(RESULTS / f"tabletop-object-opd-exact-{seed}.csv", tmp_path / f"tabletop-object-opd-exact-{to}.csv")
    first, shown, other = (100 * data.parse(RESULTS / f"tabletop-object-opd-exact-{seed}.csv")[-1]["charts/eval_success"] for seed in (1, 2, 3))
    page = report.page()
    assert f"| object | VLA-OPD, exact | 2 | in | {first:.1f} | {shown:.1f} | {shown - first:+.1f} |" in page
    assert f"{shown - first:+.1f} from the first in the mean, {abs(shown - first):.1f} in size" in page and f"two seeds of these algorithms are {abs(shown - other):.1f} apart" in page


def test_other_simulators_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    shutil.copy(RESULTS / "tabletop-object-opd-exact-1.csv", tmp_path / "libero-object-opd-exact-1.csv")
    rows = data.parse(tmp_path / "libero-object-opd-exact-1.csv")
    first, last = ("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * r[f"charts/eval_{k}"] for k in ("success", "low", "high"))) for r in (rows[0], rows[-1]))
    assert f"| libero-object-opd-exact-1 | {first} | {last} | 200 | 10 |" in report.page()


def test_the_readme_quotes_the_run_on_libero():
    (rows,), (teacher,) = (data.read(data.MINIATURE, k).values() for k in ("opd-forgot", "teacher-policy-demos"))
    greedy, sampled = ([f"{100 * r[k]:.0f}" for r in rows if k in r] for k in ("charts/eval_success", "charts/success_rate"))
    said = (f"In {rows[-1]['step']:.0f} iterations greedy success rose from {greedy[0]} to {greedy[-1]} % of {data.size(rows[0])} episodes, sampled success from {sampled[0]} "
            f"to {max(sampled, key=int)}, then {sampled[-1]} % of {rows[1]['charts/episodes']:.0f}; the teacher has {100 * teacher[-1]['charts/eval_success']:.0f} % of {data.size(teacher[-1])}")
    readme = (RESULTS.parent / "README.md").read_text()
    assert said in " ".join(readme.split()), said
    assert f"--run-dir runs/libero-opd                # {data.spent(rows)[1]:.0f}\n" in readme


def test_the_readme_quotes_the_checkpoints():
    student, base, teacher = (data.ends(k, ["object"])[0][0] for k in ("student", "base", "teacher"))
    said = f"({100 * student:.1f} %: a base of {100 * base:.0f} %, made to forget); VLA-OPD and DAgger also use a teacher ({100 * teacher:.0f} %)"
    assert said in (RESULTS.parent / "README.md").read_text()


def test_the_readme_quotes_the_runs_on_maniskill():
    (base,), (ppo,) = (data.read("maniskill-repositioning", k).values() for k in ("base", "ppo"))
    readme = (RESULTS.parent / "README.md").read_text()
    assert f"({100 * base[-1]['charts/eval_success']:.0f} % of {data.size(base[-1])} episodes), {data.spent(base)[1]:.0f} minutes without evaluation" in readme
    assert f"# {data.spent(ppo)[1]:.0f} minutes; road_vla.py" in readme


def test_the_readme_quotes_the_runs_with_two_arms():
    """The last evaluation of every run it names, the pairs of episodes, the rollouts' best, the minutes."""
    readme, best, minutes = " ".join((RESULTS.parent / "README.md").read_text().split()), [], []
    for suite, runs in (("stack", ("base-1", "its-own-states-2", "recorded-demos-1")), ("pick", ("base-1", "its-own-states-1"))):
        line, = re.findall(rf"\| `TwoRobot{suite.title()}Cube-v1`.*?\|(.*?)\| (.*?) \| (.*?) \|", readme)
        ends = [data.parse(RESULTS / f"maniskill-two-robot-{suite}-{run}.csv")[-1] for run in runs]
        assert re.findall(r"\d+ of \d+", line[0]) == [f"{r['charts/eval_success'] * data.size(r):.0f} of {data.size(r)}" for r in ends]
        for said, kind in zip(line[1:], ("student", "opd-exact")):
            won = [*data.played(f"maniskill-two-robot-{suite}", kind)[1].values()]
            assert said == f"{sum(won):.0f} of {len(won)}"
        rows = data.parse(RESULTS / f"maniskill-two-robot-{suite}-opd-exact-1.csv")
        best.append(100 * max(r.get("charts/success_rate", 0) for r in rows)), minutes.append(data.spent(rows)[1])
    assert f"at most {best[0]:.0f} and {best[1]:.0f} %" in readme and f"took {minutes[0]:.0f} and {minutes[1]:.0f} minutes" in readme


def test_ppo_and_road_on_another_simulator(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    for k in ("ppo", "road"):
        shutil.copy(RESULTS / f"tabletop-repositioning-{k}-1.csv", tmp_path / f"maniskill-repositioning-{k}-1.csv")
    page, (first, *_, last) = report.page(), data.parse(RESULTS / "tabletop-repositioning-road-1.csv")
    steps = sum(r.get("charts/env_steps", 0) for k in ("ppo", "road") for r in data.parse(RESULTS / f"tabletop-repositioning-{k}-1.csv"))
    line, = [line for line in page.splitlines() if line.startswith("| ROAD-VLA | 1 |")]
    shown = "| {:.0f} | {:.1f} [".format(*(100 * r["charts/ood_success"] for r in (first, last)))
    assert shown in line and f"| {steps:.0f} |" in line and "simulators.png" not in page
    (tmp_path / "episodes").mkdir()                      # and where its episodes are, these count; before, 200 episodes were played, 50 of each task
    (tmp_path / "episodes" / "maniskill-repositioning-road-1-ood.csv").write_text(
        "task,init_state,success,grasped\n" + "".join(f"{t},{400 + i},{(i < 50) * i % 2},{i % 4 < 3:d}\n" for t in range(4) for i in range(100)))
    line, = [line for line in report.page().splitlines() if line.startswith("| ROAD-VLA | 1 |")]
    assert "| 34 | 50 | 25.0 [21.0, 29.5] |" in line and "| 75 |" in line
    assert page.count("ROAD is above PPO out of distribution (maniskill-repositioning) | higher |") == 1
    figures.draw()
    assert [p.name for p in tmp_path.glob("*.png")] == ["maniskill-repositioning.png"]


@pytest.mark.parametrize("t,p", [(2.776, .05), (4.604, .01), (.741, .5), (1e9, 0.)])     # a table of Student's t, 4 degrees of freedom
def test_seeds_that_differ_count_by_students_t(t, p):
    spread = np.array([-.3, 0., .3])                     # far more than 200 episodes explain: variance .09, of a mean .03
    assert data.student(t, 4) == pytest.approx(p, rel=.01, abs=1e-6)
    for states in (None, np.array([1] * 40)):
        if t < 5:
            assert data.differ(.5 + spread + t * (.06 ** .5), .5 + spread, 200, states) == pytest.approx(p, rel=.01)
    assert data.student(12.706, 1) == pytest.approx(.05, rel=.01) and data.student(4.303, 2) == pytest.approx(.05, rel=.01)


def test_one_run_against_seeds_is_one_draw_but_a_checkpoint_is_none():
    a = np.array([.40, .49, .54])                        # standard deviation .0709
    assert data.differ(a, np.array([.75]), 200) == pytest.approx(data.student(.2733 / (.0709 * (4 / 3) ** .5), 2), rel=.01)
    assert data.differ(a, .75, 200) == pytest.approx(data.student(.2733 / (.0709 / 3 ** .5), 2), rel=.01)
    assert data.differ(np.array([.5]), .6, 200) == pytest.approx(.0446, abs=1e-3)        # nothing known of seeds: z = .1 / sqrt(2 * .55 * .45 / 200)


def test_seeds_that_agree_count_by_their_episodes():
    a, b = np.full(3, .5), np.full(3, .56)
    assert data.differ(a, b, 200) == pytest.approx(.0375, abs=1e-3)                      # z = .06 / sqrt(2 * .53 * .47 / 600)
    assert data.differ(a, a, 200) == pytest.approx(1)
    states = np.array([1] * 10 + [-1] * 2 + [0] * 188)
    assert data.differ(a, b, 200, states) == data.sign_flips(states)


def test_the_larger_p_counts():
    """Pairs make the episodes' variance small; the seeds' may not be."""
    a, b, states = np.array([.80, .86, .86]), np.array([.78, .80, .81]), np.array([3] * 43 + [-3] * 17)
    assert data.sign_flips(states) < .002 and data.differ(a, b, 200, states) == pytest.approx(.119, abs=.003)      # t = 1.98


def test_a_margin_shifts_the_difference_and_not_its_variance():
    assert data.differ(np.full(3, .93), np.full(1, .955), 200, margin=.05) == pytest.approx(.21, abs=.005)     # z = .025 / sqrt(.9363 * .0637 * 4 / 600)
    assert 0 < data.differ(np.array([.98]), np.array([.98]), 50, margin=.05) < .1        # one seed each, near the ceiling


def test_an_interval_ends_where_its_tests_find_something():
    for a, b, n in ((np.array([.40, .49, .54]), np.array([.5, .52, .58]), 2000), (np.array([.40, .49, .54]), .5, 2000), (np.full(3, .5), np.full(3, .5), 50)):
        for level in (.05, .1):
            half = data.reach(a, b, n, level=level)
            assert [data.differ(a, b, n, margin=np.mean(b) - np.mean(a) + side * half) for side in (1, -1)] == pytest.approx([level, level], rel=1e-3)
    for ups, n in ((9, 200), (10, 200), (4, 10)):        # 12 coins: 10 of one side are .039, 9 are .146; of 4 no number is enough
        states = np.array([1] * ups + [-1] * (12 - ups) * (n == 200))
        a, b = np.array([.5 + states.sum() / n]), np.array([.5])
        assert (a[0] - b[0] < data.reach(a, b, n, states)) == (data.differ(a, b, n, states) > .05) == (ups != 10)
    states = np.random.default_rng(1).choice([-3, -1, 0, 0, 0, 2], 4000)                 # many: nearly normal; 3 and 2 seeds
    assert data.reach(np.full(3, .5), np.full(2, .5), 4000, states) == pytest.approx(1.96 * np.sqrt((states ** 2).sum()) / 6 / 4000, rel=.01)


def test_sign_flips_are_all_ways_to_fall():
    for d in ([1] * 10 + [-1] * 2 + [0] * 5, [1] * 7, [1, -1] * 3, [-1], [3, -1, 2, 2, -3, 1], [6, 1, 1], []):
        sums = [abs(sum(k * sign for k, sign in zip(d, signs))) for signs in itertools.product((1, -1), repeat=len(d))]
        assert data.sign_flips(np.array(d, int)) == data.sign_flips(-np.array(d, int)) == pytest.approx(np.mean([s >= abs(sum(d)) for s in sums]))
    assert data.sign_flips(np.array([1] * 10 + [-1] * 2)) == pytest.approx(2 * (1 + 12 + 66) / 2 ** 12)      # McNemar's


def test_iqm_and_its_interval_the_long_way():
    rng, draw = np.random.default_rng(3), random.Random(4)
    x = rng.random((3, 10)).round(2)
    middle = lambda values: np.mean(sorted(values)[len(values) // 4:len(values) - len(values) // 4])      # scipy.stats.trim_mean(values, .25)
    value, low, high = data.iqm(x)
    assert value == pytest.approx(middle(x.ravel()))
    long = [middle([x[draw.randrange(3), task] for task in range(10) for _ in range(3)]) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(long, (2.5, 97.5)), abs=.02)
    assert data.iqm(x[:1])[1:] == (data.iqm(x[:1])[0],) * 2                              # one seed says nothing about seeds


def test_iqm_is_of_the_seeds_that_every_suite_has(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    (tmp_path / "episodes").mkdir()
    for suite, seed, wins in (("object", 1, 3), ("object", 2, 0), ("goal", 1, 1)):
        (tmp_path / "episodes" / f"tabletop-{suite}-ppo-{seed}.csv").write_text("task,init_state,success,grasped\n" + "".join(f"{t},{i},{i < wins:d},0\n" for t in range(4) for i in range(4)))
    assert report.middle("ppo", ["object", "goal"]) == "50.0" and report.middle("ppo", ["goal"]) == "25.0" and report.middle("ppo", ["object", "long"]) == ""
    assert report.middle("ppo", ["object"]).startswith("37.5 [")


def test_the_episodes_of_an_interval_are_found():
    for n, k in itertools.product((10, 50, 200, 500), (0, .1, .455, .5, .9, 1)):
        p = round(k * n) / n
        low, high = data.wilson(p, n)
        assert data.size({"charts/eval_success": p, "charts/eval_low": low, "charts/eval_high": high}) == n


def test_pairs_are_of_the_same_state_and_of_the_seeds_that_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    (tmp_path / "episodes").mkdir()

    def write(name, *success, suite="object"):
        (tmp_path / "episodes" / f"tabletop-{suite}-{name}.csv").write_text("task,init_state,success,grasped\n" + "".join(f"{i},400,{s},1\n" for i, s in enumerate(success)))
    write("grpo-1", 1, 1, 0, 0), write("grpo-2", 1, 0, 0, 0), write("ppo-1", 0, 1, 0, 1), write("ppo-2", 0, 0, 0, 0), write("student", 0, 0, 0, 1)
    assert data.paired("grpo", "ppo", ["object"]).tolist() == [4, 0, 0, -2]              # two seeds each: 2 * (2 - 0), 2 * (1 - 1), 0, 2 * (0 - 1)
    assert data.paired("grpo", "student", ["object"]).tolist() == [2, 1, 0, -2] and data.paired("student", "grpo", ["object"]).tolist() == [-2, -1, 0, 2]
    assert not data.paired("student", "student", ["object"]).any()
    assert data.ends("grpo", ["object"])[0].tolist() == [.5, .25] and data.ends("student", ["object"])[1] == 4
    assert data.drawn("student", ["object"]) == .25 and np.ndim(data.drawn("student", ["object"])) == 0 and np.ndim(data.drawn("grpo", ["object"])) == 1
    write("grpo-2", 1, 1, 1, 1, suite="goal"), write("ppo-1", 0, 0, 0, 0, suite="goal")
    both = ["object", "goal"]                            # seeds with both suites: grpo's second, ppo's first
    assert data.seeds_of("grpo", both) == [2] and data.seeds_of("ppo", both) == [1] and data.ends("grpo", both)[0].tolist() == [.625]
    assert data.paired("grpo", "ppo", both).tolist() == [1, -1, 0, -1, 1, 1, 1, 1]
    shutil.copy(RESULTS / "tabletop-object-ppo-1.csv", tmp_path / "tabletop-object-ppo-3.csv")                # a run without episodes: no pairs
    assert data.paired("grpo", "ppo", ["object"]) is None


@pytest.mark.parametrize("a,b,margin,verdict", [(.9, .5, 0, "holds"), (.5, .9, 0, "does not hold"), (.5, .51, 0, "not resolvable"),
                                                (.9, .91, .05, "holds"), (.5, .9, .05, "does not hold"), (.5, .55, .05, "not resolvable")])
def test_verdicts(monkeypatch, a, b, margin, verdict):
    monkeypatch.setattr(report, "ends", lambda name, suites, split, key: (np.array([dict(a=a, b=b)[name]] * 3), 200))
    monkeypatch.setattr(report, "drawn", lambda name, suites, split, key: np.array([dict(a=a, b=b)[name]] * 3))
    monkeypatch.setattr(report, "paired", lambda *args: None)
    report.claims.clear()
    report.compare("a is above b", "a", "b", ["object"], margin=margin)
    assert report.claims[0][-1] == verdict and report.claims[0][0] == "paper"


def test_what_is_smaller_than_the_papers_is_said(monkeypatch):
    monkeypatch.setattr(report, "ends", lambda name, suites, split, key: (np.array([dict(a=.4, b=.6)[name]] * 3), 200))
    monkeypatch.setattr(report, "drawn", lambda *args: report.ends(*args)[0])
    monkeypatch.setattr(report, "paired", lambda *args: None)
    report.claims.clear()
    for text, margin in ((" (object; 70, 69.9)", 0), (" (10, 40)", 0), ("", 0), (" (70, 10)", .05)):
        report.compare(f"a is above b{text}", "a", "b", ["object"], margin=margin)
    assert ["smaller" in c[-2] for c in report.claims] == [True, False, False, False] and report.claims[0][-2].endswith("; smaller than the paper's +0.1")
    assert report.claims[0][-2].startswith("40.0 and 60.0, -20.0 [-25.7, -14.3], p < 0.001; seeds 3, 3; ")     # 1.96 x sqrt(2 x .25 / 600)


def test_a_verdict_must_survive_the_first_of_two_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    (tmp_path / "episodes").mkdir()

    def played(name, wins):
        (tmp_path / f"tabletop-object-{name}.csv").write_text("step\n0\n")
        (tmp_path / f"episodes/tabletop-object-{name}.csv").write_text("task,init_state,success,grasped\n" + "".join(f"0,{i},{int(i < wins)},1\n" for i in range(100)))
    for seed in (1, 2, 3):
        played(f"a-{seed}", 80 + seed), played(f"b-{seed}", 50 + seed)
    judged = lambda: (data.parse.cache_clear(), report.claims.clear(), report.compare("a is above b", "a", "b", ["object"]), report.claims[0])[3]
    assert judged()[-1] == "holds" and "first" not in judged()[-2]
    played("b-earlier-1", 60)                            # lower still: it holds with either
    assert judged()[-1] == "holds" and "82.0 and 52.0, " in judged()[-2] and "; first runs 82.0 and 55.0, " in judged()[-2]
    played("b-earlier-1", 100)
    assert judged()[-1] == "not resolvable" and "first runs 82.0 and 68.3, " in judged()[-2]
    (tmp_path / "episodes/tabletop-object-b-earlier-1.csv").unlink()                     # its episodes were not kept: what its training said last
    (tmp_path / "tabletop-object-b-earlier-1.csv").write_text("step,charts/eval_success,charts/eval_low,charts/eval_high\n0,1.0,0.963,1.0\n")
    assert judged()[-1] == "not resolvable" and "first runs 82.0 and 68.3, " in judged()[-2]
    assert not data.FIRST


def test_every_checkpoint_is_kept_and_played(tmp_path, monkeypatch):
    import forgetting
    small = "--num-iterations 2 --batch-prompts 2 --num-envs 16 --eval-episodes-per-task 1 --eval-every 1"
    monkeypatch.setattr(forgetting, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(forgetting, "ALGORITHMS", {"opd-exact": f"vla_opd.py {small}", "distill-grpo": f"grpo.py {small} --student {{opd-exact}}/checkpoint"})
    monkeypatch.setattr(forgetting.success, "__defaults__", (2,))
    forgetting.main(("opd-exact", "distill-grpo"), tmp_path / "forgetting.json")
    found = json.loads((tmp_path / "forgetting.json").read_text())
    assert [[r["iteration"] for r in rows] for rows in found.values()] == [[1, 2], [1, 2]]
    for name, rows in found.items():
        logged = {r["step"]: r["charts/eval_success"] for r in data.parse(tmp_path / "runs" / name / "metrics.csv")}
        assert all(r["object"] == logged[r["iteration"]] and len(r["goal"]) == len(r["spatial"]) == 10 for r in rows)
        weights = [(tmp_path / "runs" / f"{name}-{i}" / "model.safetensors").read_bytes() for i in (1, 2)]
        assert weights[0] != weights[1] == (tmp_path / "runs" / name / "checkpoint" / "model.safetensors").read_bytes()
    for row in found["opd-exact"]:                       # each by its own checkpoint
        model = forgetting.vla_opd.VLA.load(tmp_path / f"runs/opd-exact-{row['iteration']}", trainable=False)
        assert all(forgetting.success(model, suite) == row[suite] for suite in forgetting.UNSEEN)
    (tmp_path / "runs/opd-exact-1/unseen.json").write_text(json.dumps(dict(goal=[9], spatial=[9])))          # what has been played is not played again
    forgetting.main(("opd-exact",), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["opd-exact"][0]["goal"] == [9]
    monkeypatch.setattr(forgetting, "ALGORITHMS", {"opd-exact": "vla_opd.py --no-such-flag"})
    with pytest.raises(SystemExit, match="failed; the same command goes on"):
        forgetting.main(("opd-exact",), tmp_path / "again.json")


def test_every_seed_or_none():
    assert report.every([True, True]) is True and report.every([False, False]) is False and report.every([True, False]) is None
    assert report.most(np.arange(21) > 4) is True and report.most(np.arange(21) < 5) is False and report.most(np.arange(21) < 6) is None      # .027; .078
    assert report.apart([3, 4], [1, 2]) is True and report.apart([1, 2], [3, 4]) is False and report.apart([1, 4], [2, 3]) is None


def test_steps_add_up_and_costs_include_what_came_before(tmp_path, monkeypatch):
    rows = [{"step": 0, "charts/eval_success": .2}, {"step": 1, "charts/env_steps": 100, "charts/eval_success": .4, "time/update": 60},
            {"step": 2, "charts/env_steps": 300, "time/rollout": 30}, {"step": 3, "charts/env_steps": 100, "charts/eval_success": .8, "time/teacher": 30}]
    assert data.curve(rows).tolist() == [[0, 100, 500], [.2, .4, .8]] and data.curve(rows, x="iteration").tolist() == [[0, 1, 3], [.2, .4, .8]]
    assert data.spent(rows).tolist() == [500, 2] and data.spent(rows, 400).tolist() == [500, 1.5] and data.spent(rows, 250).tolist() == [500, 1.25]
    runs = {"opd-exact": {1: rows}, "distill-grpo": {1: rows[:2]}, "road": {1: [{"charts/reference_env_steps": 7, "charts/reference_minutes": 1}] + rows[1:]}}
    monkeypatch.setattr(data, "read", lambda suite, algorithm: runs.get(algorithm, {}))
    assert data.whole("object", "opd-exact").tolist() == [500, 2]
    assert data.whole("object", "distill-grpo").tolist() == [600, 3] and data.whole("object", "road").tolist() == [507, 3]
    runs["make-teacher"] = {1: [{"charts/samples": 10, "time/demos": 30}, {"charts/samples": 20, "time/update": 30}]}
    assert [data.whole("object", k).tolist() for k in ("opd-exact", "distill-grpo", "road")] == [[530, 3], [630, 4], [507, 3]]       # those that have a teacher


def test_falls_and_valleys_and_what_is_grasped_and_lost(tmp_path, monkeypatch):
    """What falls of success are added up, what counts as an early dip, greedy and of the rollouts, and what is lost."""
    greedy, sampled = (.5, .4, .6, .45, .2), (.5, .49, .3, .6)
    rows = [{"step": i, "charts/eval_success": g, **({"charts/success_rate": sampled[i - 1], "charts/env_steps": 10} if i else {})} for i, g in enumerate(greedy)]
    monkeypatch.setattr(data, "read", lambda suite, algorithm: {1: rows, 2: rows[:1] + [{**r, "charts/eval_success": .9} for r in rows[1:]]})
    assert data.falls("object", "any") == pytest.approx([.1 + .15 + .25, 0])
    assert data.valleys("object", "any") == pytest.approx(np.array([[.1, .2], [0, .2]]))     # .2 comes after the third iteration
    monkeypatch.undo()
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "tabletop-object-ppo-1.csv").write_text("task,init_state,success,grasped\n0,1,1,1\n0,2,0,1\n0,3,0,0\n0,4,0,1\n")
    assert [data.ends("ppo", ["object"], key=key)[0].tolist() for key in ("success", "grasped", "lost")] == [[.25], [.75], [.5]]


def test_a_smaller_loss_out_of_distribution(tmp_path, monkeypatch):
    """By the states: PPO is better on 3 of ID and worse on 4 of OOD, 7 coins that all say the same."""
    (tmp_path / "episodes").mkdir()
    for k, wins in (("ppo", dict(eval=9, ood=2)), ("road", dict(eval=6, ood=6))):
        shutil.copy(RESULTS / f"tabletop-repositioning-{k}-1.csv", tmp_path)
        for split, tail in (("eval", ""), ("ood", "-ood")):
            (tmp_path / "episodes" / f"tabletop-repositioning-{k}-1{tail}.csv").write_text(
                "task,init_state,success,grasped\n" + "".join(f"0,{i},{i < wins[split]:d},1\n" for i in range(10)))
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    report.claims.clear()
    [*report.road_table1()]
    last = report.claims[-1]
    assert last[1].startswith("ROAD loses less than PPO") and last[3:] == ("0.0 and 70.0, -70.0 [-130.0, -10.0], p = 0.016, paired; seeds 1, 1", "holds (one seed)")
    report.claims.clear()
    [*report.road_fig5()]                                # lost out of distribution: 8 and 4 of 10, four coins
    assert report.claims[-1][3:] == ("80.0 and 40.0, +40.0 [-10.0, 90.0], p = 0.12, paired; seeds 1, 1", "not resolvable")


def test_one_seed_is_said_of_the_sides_of_a_claim_alone(tmp_path, monkeypatch):
    """Two seeds of forward KL, hard CE and exact, one of sampled: only what sampled has a part in is of one seed."""
    for k, seeds in (("opd-exact", 2), ("dagger-fkl", 2), ("dagger-ce", 2), ("opd-sampled", 1)):
        [shutil.copy(RESULTS / f"tabletop-object-{k}-{seed}.csv", tmp_path) for seed in range(1, seeds + 1)]
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    report.claims.clear()
    [*report.opd_fig4()]
    verdicts = {text: said for _, text, _, _, said in report.claims}
    alone = {text for text, said in verdicts.items() if said.endswith("(one seed)")}
    assert "hard CE lowers entropy, most of all (object)" in alone and all("sampled" in text or text.startswith("hard CE") for text in alone)
    assert verdicts["forward KL dips early (object)"] == "does not hold" and verdicts["reverse KL's entropy lies between (object)"] == "holds"


def test_what_no_paper_says_is_not_among_the_papers_claims():
    page = (RESULTS / "README.md").read_text()
    papers, ours = re.split("\n## ", page.split("## The papers' claims, here")[1])[:2]
    assert ours.startswith("Questions of our own")
    for text in ("ends above sampled reverse KL", "in a third of its steps (object)", "160 iterations", "with a warm critic", "with the distillation alone", "maniskill"):
        assert text in ours and text not in papers, text
    for text in ("in a third of its steps (long)", "ends above forward KL", "ROAD is above PPO out of distribution (7 of our 7"):
        assert text in papers and text not in ours, text


def test_where_existing_runs_come_from():
    rows = {r["name"]: r for r in csv.DictReader((RESULTS / "runs.csv").open())}
    for path in [*RESULTS.glob("*-[0-9].csv"), *(RESULTS / "episodes").glob("*.csv")]:
        row = rows[path.stem.removesuffix("-ood")]
        assert row["commit"] and row["command"] and row["versions"] and row["machine"], path.name
    assert all(math.isfinite(float(r["seconds"] or 0)) for r in rows.values())


# Their references were run again later, with the very same metrics but for the times.
AGAIN = {"tabletop-multi-object-road-1", "tabletop-repositioning-road-even-1"}


def test_what_goes_on_from_another_run_goes_on_from_the_one_that_is_shown():
    """A run that was made again may have other numbers (sums in another order): then what started from it has to be made again, too."""
    rows, roads, tuned = {name: list(csv.DictReader((RESULTS / f"{name}.csv").open())) for name in (r["name"] for r in report.runs() if not r["error"])
                          if (RESULTS / f"{name}.csv").exists()}, [], []
    commands = {r["name"]: r["command"] for r in report.runs()}
    for name, mine in rows.items():
        if minutes := [row["charts/reference_minutes"] for row in mine if row.get("charts/reference_minutes")]:
            said = re.search(r"--reference \S*?([\w-]+)$|--reference \S*?([\w-]+) ", commands[name])
            reference = next(filter(None, said.groups()))
            reference = name.replace("-road-", "-ppo-") if reference == "maniskill-ppo" else reference
            if "-earlier-" in name:                      # a first run of its reference's first run
                reference = re.sub(r"(-\d)$", r"-earlier\1", reference)
            spent = sum(float(row[f"time/{k}"] or 0) for row in rows[reference] for k in ("rollout", "advantages", "update")) / 60
            assert name in AGAIN or abs(spent - float(minutes[0])) < 1e-6, f"{name} had another reference than {reference}: {minutes[0]} minutes, not {spent}"
            roads.append(name)
        if (began := re.fullmatch(r"(.*)-distill-grpo(?:-long|-slow)?((?:-earlier)?-\d)", name)) and (before := f"{began[1]}-opd-exact{began[2]}") in rows:
            assert mine[0]["charts/eval_success"] == rows[before][-1]["charts/eval_success"], f"{name} did not start from {before}"
            tuned.append(name)
    assert len(roads) > 30 and len(tuned) > 8 and AGAIN < set(roads)
