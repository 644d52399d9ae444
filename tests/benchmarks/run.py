"""The budgets, measured: `python tests/benchmarks/run.py [NAME...]`. Run by hand; no test asserts a time.

Where a floor exists it is measured in the same run, in turns with ours (A B A B …), and medians are compared: a busy
machine slows both. Commands run as the Python in BENCH_PYTHON (else this one) has them installed; an editable install
starts more slowly than the one users get.
"""

from __future__ import annotations

import argparse
import sys

import agent
import drain
import large
import rates
import scale
import startup
from measure import Bench, workspace

#: In the order of the table. One name may print several lines.
BENCHMARKS = {
    "enqueue_process": startup.enqueue_process,
    "enqueue_process_files": startup.enqueue_process_files,
    "api_rate": rates.api_rate,
    "json_rate": rates.json_rate,
    "drain": drain.drain,
    "drain_50ms": drain.drain_50ms,
    "latency": agent.latency,
    "idle": agent.idle,
    "scale": scale.scale,
    "years": large.years,
}


def main() -> int:
    """Run the chosen benchmarks, print a line per budget; 1 if any was missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--dir", help="where the data goes, on the disk to be measured (default: TMPDIR)")
    parser.add_argument("--pairs", type=int, default=25, help="pairs of processes that start-up is measured with")
    parser.add_argument("--idle", type=float, default=60.0, metavar="SECONDS", help="how long to watch an idle agent")
    parser.add_argument("--records", type=int, default=1_000_000, help="size of the large outbox")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    is_ok = True
    for name in options.names or BENCHMARKS:
        with workspace(options.dir) as directory:
            bench = Bench(directory, options.pairs, options.idle, options.records)
            for result in BENCHMARKS[name](bench):
                print(result.line(), flush=True)
                is_ok &= result.is_ok
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
