"""How fast the integers are: what `keras-dfp bench` measures, also in an installed package.

    run.py          starts a process per configuration, or several that take turns, and gathers
                    what they send: a document
      worker.py       that process: measures one configuration
        conv.py         a network's convolutions and dense layers, three passes, on products.py
        gemm.py         matrix products of given sizes, on products.py
        quantize.py     float32 to int16, against the memory's speed
        small.py        what a call costs when there is next to nothing to compute
        step.py         whole training steps
        optimizer.py    what an optimizer takes of them (no command: see there)
        pipeline.py     images on their way to a training step
        workers.py      steps of several workers, and the bytes that they exchange
    report.py       a document as tables, for a terminal or in Markdown
    roofline.py     a document of products as a plot
    wire.py         a document of workers as a plot

A document is what `--json` writes; its form is described in docs/performance.md.
"""
