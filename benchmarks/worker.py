"""`python -m keras_dfp.benchmarks.worker BENCHMARK SETTINGS`: measures one configuration.

SETTINGS is JSON. Standard output is one JSON pair a line: ["machine", facts] first, then, as they
come, ["doing", [what is being measured, share of the work done]] and ["row", figures]. After
["turn", null] others may have theirs: it waits for a line of standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main(benchmark: str, settings: dict) -> None:
    # TensorFlow's libraries may print; what was standard output is for results alone.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(kind, value):
        print(json.dumps([kind, value]), file=results, flush=True)

    import tensorflow as tf

    if settings["threads"]:
        tf.config.threading.set_intra_op_parallelism_threads(settings["threads"])
        tf.config.threading.set_inter_op_parallelism_threads(settings["threads"])

    from keras_dfp.benchmarks import machine
    from keras_dfp.benchmarks.run import Doing

    facts = machine.facts()
    # Not before whole steps: the copied memory would count as theirs. The others have other roofs.
    if benchmark not in ("step", "pipeline", "workers"):
        facts.update(machine.roofs(facts["threads"]))
    send("machine", facts)
    module = importlib.import_module(f"keras_dfp.benchmarks.{benchmark}")
    for value in module.measure(settings):
        if value is None:
            send("turn", None)
            if not sys.stdin.readline():
                return  # Whoever started this process has gone.
            continue
        send("doing" if isinstance(value, Doing) else "row", value)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
