"""Check that every row of a batch file has exactly one result, wherever the results are from.

python examples/verify_results.py
"""

import json
import tempfile
from pathlib import Path

from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.verify import verify_results

REQUESTS = Path(__file__).parent / "requests.jsonl"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, BatchFile(REQUESTS) as batch:
        batch.scan()
        results = Path(folder) / "results.jsonl"
        for answered in (["sum", "unit"], ["sum", "sum"]):
            lines = (
                json.dumps({"custom_id": name, "response": {"status_code": 200}, "error": None})
                for name in answered
            )
            results.write_text("\n".join(lines) + "\n")
            print(verify_results(batch, [results]))


if __name__ == "__main__":
    main()
