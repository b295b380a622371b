"""The rules of single-file scripts: shared blocks are identical copies, scripts stand alone, small, safe and documented."""
import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sync_blocks

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "algos").glob("*.py"))
SOURCES = SCRIPTS + sorted((ROOT / "envs").glob("*.py"))
LIMITS = {"algos/vla_opd.py": 550, "algos/grpo.py": 600, "algos/dagger_forward_kl.py": 600, "algos/dagger_hard_ce.py": 600, "algos/ppo.py": 600,
          "algos/road_vla.py": 631, "envs/__init__.py": 150, "envs/tabletop.py": 350}
DIFFERENCES = {("vla_opd.py", "dagger_hard_ce.py"): 60, ("vla_opd.py", "dagger_forward_kl.py"): 60, ("grpo.py", "vla_opd.py"): 120}
by_name = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")


# ----------------------------------------------------------------------------------------------------------------- blocks
def test_copies_are_identical():
    assert sync_blocks.main(check=True) == []
    blocks = {p.name: [m[2] for m in sync_blocks.BLOCK.finditer(p.read_text())] for p in SCRIPTS}
    assert "policy" in blocks["vla_opd.py"] and all("policy" in b for b in blocks.values()), blocks
    for path in SCRIPTS:                                 # a marker that the pattern does not see would never be compared
        assert len(re.findall("# --- block", path.read_text())) == len(blocks[path.name]), path.name


@by_name
def test_an_altered_copy_is_found_and_mended(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sync_blocks, "ALGOS", tmp_path)
    for p in SCRIPTS:
        (tmp_path / p.name).write_text(p.read_text())
    assert sync_blocks.main(check=True) == []
    copy, text = tmp_path / path.name, path.read_text()
    for block in sync_blocks.BLOCK.finditer(text):
        copy.write_text(text[:block.start(3)] + block[3].replace(" ", "  ", 1) + text[block.end(3):])
        found = sync_blocks.main(check=True)
        original = next(p for p in (ROOT / "algos/vla_opd.py", ROOT / "algos/ppo.py") if f"# --- block {block[2]}\n" in p.read_text())
        if path == original:                             # a changed original: it is the others that are stale
            users = [p.name for p in SCRIPTS if p != path and f"# --- block {block[2]}\n" in p.read_text()]
            assert [f.split(":")[0] for f in found] == users
        else:
            assert [f.split(":")[0] for f in found] == [path.name]
            sync_blocks.main(check=False)
            assert copy.read_text() == text
    copy.write_text(text)
    (tmp_path / "new.py").write_text("# --- block mystery\n# --- end mystery\n")
    assert any("mystery" in f for f in sync_blocks.main(check=True))


def test_they_end_alike():
    """Each leaves its process group: without that some are aborted as they end."""
    ends = {p.read_text().rpartition('\n\nif __name__')[2] for p in SCRIPTS}
    assert len(ends) == 1 and "destroy_process_group" in ends.pop()


# ---------------------------------------------------------------------------------------------------------------- sources
@pytest.mark.parametrize("name", LIMITS)
def test_size(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= LIMITS[name], f"{name} has {len(lines)} lines, {LIMITS[name]} are allowed"


@pytest.mark.parametrize("pair", DIFFERENCES, ids="-".join)
def test_differences_are_small(pair):
    """What `diff` shows is the algorithm, and can be read at once."""
    shown = subprocess.run(["diff", *pair], capture_output=True, text=True, cwd=ROOT / "algos")
    assert shown.returncode == 1, shown.stderr
    changed = [line for line in shown.stdout.splitlines() if line[0] in "<>"]
    assert len(changed) <= DIFFERENCES[pair], f"{len(changed)} changed lines, {DIFFERENCES[pair]} are allowed"


@pytest.mark.parametrize("original,copies", [("vla_opd", ("dagger_forward_kl", "dagger_hard_ce")), ("ppo", ("road_vla", "road_vla_text"))])
def test_they_learn_alike(original, copies):
    """From the shares of the rollout to the optimiser's step only the loss differs: what tests show of the original there, of its gradient too, holds for the others."""
    def learning(name):
        source = (ROOT / f"algos/{name}.py").read_text()
        loop = source[source.index("# Learning."):source.index('metrics |= {"charts/success_rate"')]
        return re.sub(r"= \w+_loss\((.|\n)*?\)\n( *)loss\.backward", "= LOSS\n\\2loss.backward", loop)
    assert "= LOSS\n" in learning(original) and "all_sum(torch.zeros_like(p)" in learning(original)
    assert all(learning(copy) == learning(original) for copy in copies)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@by_name
def test_scripts_import_no_script(path):
    assert not [m for m in imported(path) if m.startswith(".") or m.split(".")[0] in {"algos", "tests"} | {p.stem for p in SCRIPTS}]


@each_source
def test_no_code_from_checkpoints(path):
    """No pickles, no remote code: torch.load, if at all, with weights_only=True."""
    text = path.read_text()
    assert not [m for m in imported(path) if m.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")]
    assert not re.search(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|allow_pickle\s*=\s*True", text)
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), f"line {call.lineno}"


# ------------------------------------------------------------------------------------------------------------------- help
@by_name
def test_help_is_quick_and_complete(path, tmp_path):
    """From any folder; before torch is imported; every flag says what it is for."""
    fields = [n.target.id for c in ast.parse(path.read_text()).body if isinstance(c, ast.ClassDef) and c.name == "Args"
              for n in c.body if isinstance(n, ast.AnnAssign)]
    assert fields
    env, best = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1"}, 9.
    for _ in range(2):                                   # the first may read files from a cold disk
        began = time.time()
        run = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path, env=env)
        best = min(best, time.time() - began)
    assert run.returncode == 0, run.stderr
    assert best < 3, f"{best:.1f} s"
    # Without a description a flag shows only its default: "(default: 1)"
    entries = re.split(r"(?m)^[│|\s]*(?=--?[a-z])", run.stdout)
    for field in fields:
        flag = "--" + field.replace("_", "-")
        entry = [" ".join(e.split()).strip("│| ") for e in entries if re.match(rf"{flag}\b(?!-)", e)]
        assert entry, f"{flag} is not in the help"
        rest = re.sub(r"^\S+(, --no-\S+)?( \{[^}]*\}| [A-Z]+| STR| INT| FLOAT)?", "", entry[0])
        described = re.sub(r"[│|]|\((default|required|optional)[^)]*\)|\[.*?\]", "", rest).strip()
        assert len(described) > 10, f"{flag} has no description: {entry[0]!r}"
    assert not list(tmp_path.iterdir())
