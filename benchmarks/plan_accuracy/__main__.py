"""What the planner predicts beside what is measured: peak memory and step time on CPU processes, and published figures.

    python -m benchmarks.plan_accuracy --memory --times --blind --collectives --host --published

Memory is the peak of live tensor bytes over two steps on the busiest process, and beside it what the process' resident
memory grew by.
"""

import argparse
import sys

from benchmarks.machine import describe
from benchmarks.plan_accuracy.collectives import collectives_table
from benchmarks.plan_accuracy.host import host_table
from benchmarks.plan_accuracy.memory import memory_table
from benchmarks.plan_accuracy.published import published_tables
from benchmarks.plan_accuracy.times import blind_table, time_table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("memory", "peak memory of processes"), ("times", "seconds of a step in different layouts"),
                       ("blind", "seconds of a step, predicted before any such layout is measured"),
                       ("collectives", "processor time of gloo's collectives alone"),
                       ("host", "processor time of a layer in which nothing is computed"),
                       ("published", "figures of others")):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args(argv)
    print(f"{describe('cpu')}\n")
    for wanted, table in ((args.memory, memory_table), (args.times, time_table),
                          (args.blind, blind_table), (args.collectives, collectives_table),
                          (args.host, host_table), (args.published, published_tables)):
        if wanted:
            print(f"{table()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
