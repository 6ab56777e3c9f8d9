#!/usr/bin/env python3
"""Prints what a run's metrics.jsonl says, as a table.

usage: run_table.py RUN-DIRECTORY
"""

import json
import math
import pathlib
import statistics
import sys


def steps(path):
    """The reports in order; of a step that was done twice, the last one counts. A torn last line is left out."""
    found = {}
    for line in path.read_text().splitlines():
        try:
            report = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[report["step"]] = report
    return [found[step] for step in sorted(found)]


def number(value):
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"


def rows(reports):
    first, last = reports[0], reports[-1]
    yield f"loss at step {first['step']}", number(first["loss"])
    yield f"loss at step {last['step']}", number(last["loss"])
    validated = [r for r in reports if r.get("validation_loss") is not None]
    if validated:
        yield f"validation loss at step {validated[-1]['step']}", number(validated[-1]["validation_loss"])
    yield "tokens trained on", f"{last['tokens']:,}"
    speeds = [r["tokens_per_second"] for r in reports if r["tokens_per_second"]]
    if speeds:
        yield "tokens/s, median step", f"{statistics.median(speeds):,.0f}"
    yield "time in steps, s", f"{sum(r['step_time_s'] or 0 for r in reports):,.0f}"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: run_table.py RUN-DIRECTORY")
    run = pathlib.Path(sys.argv[1])
    try:
        reports = steps(run / "metrics.jsonl")
    except OSError as error:
        sys.exit(f"run_table: {error}")
    if not reports:
        sys.exit(f"run_table: {run / 'metrics.jsonl'} holds no step")
    table = [*rows(reports), ("run", str(run))]
    width = max(len(title) for title, _ in table)
    for title, value in table:
        print(f"  {title:<{width}}  {value}")


if __name__ == "__main__":
    main()
