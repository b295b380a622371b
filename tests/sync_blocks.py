"""The blocks that the scripts of algos/ share are copies.  vla_opd.py holds the original of each (ppo.py of what
critics need); this writes it into the others, over what
was changed there.

    python tests/sync_blocks.py            # after a change of vla_opd.py
    python tests/sync_blocks.py --check    # exit 1 where a copy differs
"""
import re
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parents[1] / "algos"
BLOCK = re.compile(r"(?ms)^( *# --- block (\w+)\n)(.*?)(\n*)(?=^ *# --- (?:block|end) \w)")      # up to the next marker


def main(check):
    original = {m[2]: m[3] for name in ("ppo.py", "vla_opd.py") if (ALGOS / name).exists() for m in BLOCK.finditer((ALGOS / name).read_text())}
    stale = []
    for path in sorted(ALGOS.glob("*.py")):
        text = path.read_text()
        if unknown := {m[2] for m in BLOCK.finditer(text)} - original.keys():
            stale.append(f"{path.name}: neither vla_opd.py nor ppo.py has a block {sorted(unknown)}")
        new = BLOCK.sub(lambda m: m[1] + original.get(m[2], m[3]) + m[4], text)
        if new != text:
            stale.append(f"{path.name}: {'differs from' if check else 'rewritten from'} vla_opd.py")
            if not check:
                path.write_text(new)
    return stale


if __name__ == "__main__":
    found = main("--check" in sys.argv)
    print("\n".join(found) or "all copies are identical")
    sys.exit(bool(found) and "--check" in sys.argv)
