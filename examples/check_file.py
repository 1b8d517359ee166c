"""Find what is wrong with a batch file before a device is touched.

python examples/check_file.py
"""

import tempfile
from pathlib import Path

from elbowroom.jobs.check import check_file
from elbowroom.jobs.limits import RowLimits

GOOD = '{"custom_id": "%s", "method": "POST", "url": "/v1/completions", "body": {"model": "m"%s}}\n'


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.jsonl"
        lines = [
            GOOD % ("one", ', "prompt": "1 + 1 =", "max_tokens": 4'),
            GOOD % ("one", ', "prompt": "an id twice", "max_tokens": 4'),
            GOOD % ("many", ', "prompt": "too many answers", "n": 1000'),
            "no JSON at all\n",
        ]
        path.write_text("".join(lines))
        report = check_file(path, model_dir=None, max_model_len=None, limits=RowLimits())
    print(f"{report.num_rows} rows, {len(report.problems)} problems")
    for problem in report.problems:
        print(f"line {problem.line_number}: {problem.code}: {problem.message}")


if __name__ == "__main__":
    main()
