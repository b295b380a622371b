"""The numbers on the results page are those of the CSV files beside it."""
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def test_page_is_what_the_files_say(tmp_path):
    assert subprocess.run([sys.executable, RESULTS / "report.py", "--check"]).returncode == 0
    for file in RESULTS.iterdir():                       # and a changed number is noticed
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    table = tmp_path / "checkpoints.csv"
    header, first, *rest = table.read_text().splitlines()
    cells = first.split(",")
    cells[header.split(",").index("success")] = "12.3"
    table.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    assert subprocess.run([sys.executable, tmp_path / "report.py", "--check"], capture_output=True).returncode == 1
