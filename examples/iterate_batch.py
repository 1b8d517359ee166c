"""Answer a batch file from Python, and take rows as they finish (needs vLLM).

python examples/iterate_batch.py results.jsonl
"""

import sys
from pathlib import Path

import elbowroom

HERE = Path(__file__).parent


def main() -> None:
    rows = elbowroom.iter_batch(
        HERE / "demo" / "model",
        HERE / "requests.jsonl",
        sys.argv[1],
        memory="160MiB",
        replicas=1,
        served_model_names=("demo",),
    )
    for row in rows:
        answer = row["response"]["body"]["choices"][0]["message"]["content"]
        print(f"{row['custom_id']}: {answer}")


if __name__ == "__main__":
    main()
