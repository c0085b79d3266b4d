"""Training by recipe: what `keras-dfp train`, `evaluate`, `export`, `compare` and `report` use.

    summary.py            runs, as they are in their folders, on a page
         |
    comparison.py         several runs from equal beginnings, and what they show
         |
       run.py             one training: from its settings to its last checkpoint
         |
         +-- log.py       progress, CSV, TensorBoard
         +-- checkpoint.py, schedule.py
         +-- network.py   the network, its step of training, its test
         |
    pipeline.py           images to augmented batches, in an order that seed and epoch determine
         |
    sources.py            class folders, TFRecords, digits

`settings.py` and `policies.py` say what a user decides. Below lies the zoo, which has the networks
and their recipes. Nothing here knows the command line.
"""
