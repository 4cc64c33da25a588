"""The benchmarks that need no data set, one after another; the figures are left in benchmarks.json.

Usage: python benchmarks/run.py [--rounds 3] [--quick] [--cpu_time] [--json benchmarks.json]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = ("startup", "data", "checkpoints", "step", "recipes", "guards")


def main() -> None:
    """Print what the scripts print; keep their last lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default="3")
    for name in ("quick", "cpu_time"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"))
    options = parser.parse_args()
    results, begun = {}, time.monotonic()
    for name in SCRIPTS:
        words = ["--rounds", options.rounds, *["--quick"] * options.quick, *["--cpu_time"] * options.cpu_time]
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *words]
        print(f"\n== {name}", flush=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    results[name] = json.loads(line)
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(f"{name} failed")
    options.json.write_text(json.dumps(results, indent=1))
    figures = [figure for result in results.values() for figure in result["figures"]]
    short = [figure["name"] for figure in figures if figure["verdict"] == "FALLS SHORT"]
    passed = sum(figure["verdict"] == "PASS" for figure in figures)
    print(f"\n{passed} PASS, {len(short)} FALLS SHORT in {time.monotonic() - begun:.0f} s; figures: {options.json}")
    for name in short:
        print(f"FALLS SHORT: {name}")


if __name__ == "__main__":
    main()
