"""The benchmarks: that what is timed is the same product, and that figures are told as they are."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
from click.testing import CliRunner

import keras_dfp
from keras_dfp.benchmarks import (
    machine,
    networks,
    optimizer,
    pipeline,
    products,
    quantize,
    report,
    run,
    small,
    step,
    workers,
)
from keras_dfp.cli import main
from keras_dfp.cli.bench import _each_network

BOTH = ["float32", "bfloat16"]
# How far a product of hundreds of random numbers may be off, of its largest element.
TOLERANCES = {"dfp": 1e-3, "bfloat16": 3e-2}


def bench(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)], prog_name="keras-dfp")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def first_output(result):
    """An op with several outputs returns them all; the product is the first."""
    return np.asarray((result if hasattr(result, "dtype") else result[0]).numpy(), np.float32)


@pytest.mark.parametrize(
    ("passes", "macs"),
    [
        (lambda: products.dense(4, 300, 20, BOTH), 4 * 300 * 20),
        (
            lambda: products.convolution(
                (2, 9, 9, 32), (3, 3, 32, 16), (2, 2), "SAME", False, BOTH
            ),
            2 * 5 * 5 * 16 * 3 * 3 * 32,
        ),
        (
            lambda: products.convolution(
                (2, 9, 9, 32), (3, 3, 16, 24), (1, 1), "VALID", False, ["float32"]
            ),
            2 * 7 * 7 * 24 * 3 * 3 * 16,
        ),
        (
            lambda: products.convolution((2, 9, 9, 32), (3, 3, 32, 1), (1, 1), "SAME", True, BOTH),
            2 * 9 * 9 * 32 * 3 * 3,
        ),
    ],
    ids=["dense", "conv", "grouped", "depthwise"],
)
def test_all_ways_compute_the_same_product(passes, macs):
    passes, (x, w, dy) = passes()
    assert tuple(passes) == products.PASSES
    results = {"forward": dy, "input gradient": x, "weight gradient": w}
    for name, product in passes.items():
        assert product.macs == macs
        operands = [t for t in (x, w, dy) if t is not results[name]]
        assert product.bytes == sum(2 * t.size for t in operands) + 4 * results[name].size
        exact = first_output(product.ways["float32"]())
        assert exact.shape == results[name].shape
        for way in set(product.ways) - {"float32"}:
            error = np.abs(first_output(product.ways[way]()) - exact).max() / np.abs(exact).max()
            assert error < TOLERANCES[way], (name, way)


def test_layers_of_a_network():
    found = networks.layers("alexnet", 227)
    # Sizes, kernels and groups of the paper; padding of conv1 as Caffe has it.
    assert [str(layer) for layer in found] == [
        "227x227x3 11x11/4 -> 96",
        "27x27x96 5x5/1 -> 256, 2 groups",
        "13x13x256 3x3/1 -> 384",
        "13x13x384 3x3/1 -> 384, 2 groups",
        "13x13x384 3x3/1 -> 256, 2 groups",
        "9216 -> 4096",
        "4096 -> 4096",
        "4096 -> 1000",
    ]
    assert set(found.values()) == {1}


def test_depthwise_layers_are_told_apart():
    found = networks.layers("mobilenet_v2", 96)
    counts = dict.fromkeys(("conv", "depthwise", "dense"), 0)
    for layer, count in found.items():
        counts[layer.kind] += count
    assert counts == {"conv": 35, "depthwise": 17, "dense": 1}


@pytest.mark.parametrize(
    ("network", "size", "parameters", "multiplying"),
    # Parameters and layers as the papers and Keras count them, for 1,000 classes or for 10.
    [("resnet20", 32, 271_098, 20), ("efficientnet_b0", 64, 5_330_571, 82)],
)
def test_networks_of_images(network, size, parameters, multiplying):
    model = networks.build(network, size)
    assert model.count_params() == parameters
    assert sum(networks.layers(network, size).values()) == multiplying
    x, y, _ = networks.data(model, 2)
    assert (x.shape, y.shape) == ((2, size, size, 3), (2,))


@pytest.mark.parametrize(
    ("network", "shape", "parameters"),
    [
        ("dense", (784,), 785 * 1024 + 1025 * 1024 + 1025 * 10),
        ("convnet", (28, 28, 1), 34_826),
        ("lstm", (100,), 20_000 * 128 + 4 * 257 * 128 + 129),
        # Embeddings; twice attention, two dense layers and two norms; the classes.
        (
            "transformer",
            (64,),
            20_064 * 128 + 2 * (4 * 129 * 128 + 129 * 512 + 513 * 128 + 512) + 1290,
        ),
    ],
)
def test_networks_of_a_fixed_input(network, shape, parameters):
    model = networks.build(network, None, "dfp16")
    assert model.count_params() == parameters
    x, y, loss = networks.data(model, 3)
    assert x.shape == (3, *shape) and len(y) == 3
    # An untrained network finds all classes about equally likely.
    assert 0 < float(loss(y, model(x))) < 2 * np.log(max(model.output_shape[-1], 2))


def test_which_networks_there_are():
    assert set(networks.NETWORKS) - set(networks.OF_IMAGES) == {
        "dense",
        "convnet",
        "lstm",
        "transformer",
    }
    assert set(networks.ALL) < set(networks.OF_IMAGES)
    each = _each_network(["lstm", "all", "vgg16"], None, None)
    assert [(settings["network"], settings["batch"]) for settings in each] == [
        ("lstm", 64),
        ("resnet50", 32),
        ("vgg16", 16),
        ("googlenet_v1", 32),
        ("alexnet", 32),
        ("mobilenet_v2", 32),
    ]


def test_medians_are_of_the_runs_after_the_first():
    calls = []
    taken = machine.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert all(0 < ms < 1000 for ms in taken.values())


def test_quartiles():
    assert machine.quartiles([5.0]) == (5.0, 5.0, 5.0)
    values = [9.0, 1.0, 4.0, 2.0, 3.0, 7.0]
    assert machine.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))


def test_copy_bandwidth_counts_reading_and_writing():
    # No memory is slower than 0.1 GB/s, none faster than 10 TB/s.
    assert 1e8 < machine.copy_bandwidth(2, 1 << 24) < 1e13


def rows_of(module, **settings):
    return [row for row in module.measure(settings) if isinstance(row, dict)]


def test_quantize_rows():
    rows = rows_of(quantize, elements=[1000, 100000], groups=[32, 1500, None], repeats=1)
    sizes = [(992, 32), (1000, 1000), (100000, 32), (99000, 1500), (100000, 100000)]
    assert [(row["elements"], row["group"], row["way"]) for row in rows] == [
        (*size, way) for size in sizes for way in quantize.WAYS
    ]
    assert all(row["bytes"] == 10 * row["elements"] and row["dfp_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_optimizer_rows():
    *rows, quantizing = rows_of(optimizer, network="convnet", repeats=3, steps=1)
    assert [row["optimizer"] for row in rows] == list(optimizer.OPTIMIZERS)
    assert all(row["step_ms"] > 0 and 0 < row["in_step_share"] < 1 for row in rows)
    assert quantizing["quantizing_kernels_ms"] > 0
    slots = {row["optimizer"]: row["slots_mb"] for row in rows}
    assert slots["SGD"] == slots["DFPSGD"] == pytest.approx(slots["Adam"] / 2, rel=1e-3)
    assert slots["DFPAdam, dfp16"] == pytest.approx(slots["Adam"] * 33 / 64, rel=1e-2)


def test_small_rows():
    rows = rows_of(small, repeats=1)
    assert {row["mode"] for row in rows} == {"eager", "graph"}
    for row in rows:
        # A call takes more than a function that does nothing and less than a second.
        assert all(0.05 < row[f"{way}_us"] < 1e6 for way in ("dfp", "float32", "quantize")), row


def test_a_graph_of_small_calls_makes_them_all():
    counted = []
    import tensorflow as tf

    def call():
        return tf.py_function(lambda: counted.append(1) or 1.0, [], tf.float32)

    small._graph(call)()
    assert len(counted) == small.CALLS


def check_document(path, benchmark, runs):
    document = json.loads(path.read_text())
    assert set(document) == {"schema", "benchmark", "complete", "runs"}
    assert (document["schema"], document["benchmark"]) == (run.SCHEMA, benchmark)
    assert len(document["runs"]) == runs
    for each in document["runs"]:
        assert set(each) == {"settings", "machine", "rows"}
        assert {"cpu", "isa", "threads", "tensorflow", "keras_dfp"} <= set(each["machine"])
    return document


@pytest.mark.slow
def test_gemm(tmp_path):
    written, plot = tmp_path / "gemm.json", tmp_path / "gemm.png"
    arguments = ["--size", 96, "--size", "64x32x500", "--repeats", 2, "--threads", "1,2"]
    arguments += ["--against", "float32,bfloat16", "--json", written, "--plot", plot]
    output = bench("gemm", *arguments)
    document = check_document(written, "gemm", runs=2)
    assert document["complete"]
    assert [r["machine"]["threads"] for r in document["runs"]] == [1, 2]
    for each in document["runs"]:
        assert [(row["m"], row["n"], row["k"]) for row in each["rows"]] == [
            (96, 96, 96),
            (64, 32, 500),
        ]
        for row in each["rows"]:
            assert row["macs"] == row["m"] * row["n"] * row["k"]
            # No result can beat the roof by more than the noise of a busy machine.
            assert 0 < report.gmacs(row) < 3 * each["machine"]["peak_gmacs"]
            cells = [f"{row['m']} x {row['n']} x {row['k']}", f"{row['dfp_ms']:.2f}"]
            cells += [f"{row['float32_ms']:.2f}", f"{row['float32_ms'] / row['dfp_ms']:.2f}"]
            assert re.search(".* ".join(map(re.escape, cells)), output)
            both = row["dfp_ms"] + row["quantize_ms"]
            assert report.ratio(row, "float32", quantize=True) == row["float32_ms"] / both
    one, two = (each["rows"][0]["dfp_ms"] for each in document["runs"])
    assert re.search(rf"Threads: gemm\n.*\n96 x 96 x 96 .* {one / two:.2f}\n", output)
    assert keras_dfp.info()["cpu"] in output
    assert matplotlib.image.imread(plot).shape[:2] == (1650, 1200)

    printed = bench("report", written)
    # Of each number of threads, and both together; and where it is slower, if it is.
    assert printed.count("| 96 x 96 x 96 |") >= 3
    for line in printed.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    document["complete"] = False
    written.write_text(json.dumps(document))
    assert "Interrupted" in bench("report", written)


@pytest.mark.slow
def test_conv_forced_to_an_instruction_set(tmp_path):
    isas = [entry["name"] for entry in keras_dfp.info()["kernels"] if entry["available"]]
    isa = "avx2" if "avx2" in isas else "portable"
    written = tmp_path / "conv.json"
    arguments = ["--network", "alexnet", "--image-size", 35, "--batch", 1, "--repeats", 1]
    output = bench("conv", *arguments, "--isa", isa, "--json", written)
    (each,) = check_document(written, "conv", runs=1)["runs"]
    assert each["machine"]["isa"] == isa
    assert each["machine"]["onednn_max_cpu_isa"] == ("AVX2" if isa == "avx2" else None)
    assert ("oneDNN held to AVX2" in output) == (isa == "avx2")
    rows = each["rows"]
    first = [row["pass"] for row in rows if row["layer"] == rows[0]["layer"]]
    assert first == ["forward", "weight gradient"]
    assert len(rows) == 3 * 8 - 1
    for row in rows:
        reuses = row["pass"] == "weight gradient" and row is not rows[1]
        assert (row["quantize_ms"] == 0) == reuses
    *passes, everything, ungrouped = report.totals(each)
    assert [row["pass"] for row in passes] == list(products.PASSES)
    assert everything["macs"] == sum(row["macs"] for row in rows)
    assert everything["macs"] == sum(row["macs"] for row in passes)
    grouped = sum(row["macs"] for row in rows if "groups" in row["layer"])
    assert everything["macs"] - ungrouped["macs"] == grouped
    assert f"{everything['float32_ms'] / everything['dfp_ms']:.2f}" in output
    slower = sum(row["dfp_ms"] > row["float32_ms"] for row in rows)
    assert f"Slower than TensorFlow's float32: {slower} of 23." in output
    assert "| total |" in bench("report", written)
    assert "| 4096 -> 4096 | 1 | input gradient |" in bench("report", "--rows", written)


def test_totals_count_every_occurrence():
    rows = [
        {"count": 3, "pass": "forward", "macs": 5, "bytes": 7, "dfp_ms": 1.0, "quantize_ms": 0.5},
        {"count": 1, "pass": "forward", "macs": 1, "bytes": 1, "dfp_ms": 2.0, "quantize_ms": 0.0},
    ]
    assert report.total(rows) == {"macs": 16, "bytes": 22, "dfp_ms": 5.0, "quantize_ms": 1.5}


@pytest.mark.slow
def test_step(tmp_path):
    written = tmp_path / "step.json"
    arguments = ["--network", "alexnet", "--image-size", 35, "--batch", 2, "--repeats", 1]
    arguments += ["--policy", "mixed_bfloat16", "--policy", "dfp16", "--json", written]
    output = bench("--end-to-end", *arguments)
    (each,) = check_document(written, "step", runs=1)["runs"]
    assert each["settings"]["policies"] == ["mixed_bfloat16", "dfp16"]
    assert [row["policy"] for row in each["rows"]] == each["settings"]["policies"]
    for row in each["rows"]:
        assert row["rounds_ms"] == [row["step_ms"]]
        assert row["images_per_s"] == pytest.approx(2000 / row["step_ms"])
        # More than the weights, their gradients and the momenta; less than a machine has.
        assert 3 * 4e-6 * row["parameters"] < row["peak_memory_mb"] < 1e5
        kinds = {kind["kind"]: kind for kind in row["kinds"]}
        # 8 layers in three passes, but for the first's input gradient; XLA may join passes.
        assert kinds["convolutions and products"]["calls"] >= 8
        assert kinds["optimizer"]["ms"] > 0
        for kind in ("quantization", "batch norm, ReLU and quantizing fused"):
            assert (kind in kinds) == (row["policy"] == "dfp16")
        assert kinds.get("other", {"ms": 0})["ms"] < 0.5 * sum(kind["ms"] for kind in row["kinds"])
    assert re.search(r"Where a step's time goes.*\n.*mixed_bfloat16 +dfp16\n", output)
    assert "quantization" in bench("report", written)


def test_ratios_are_of_the_same_round(tmp_path):
    # A machine that becomes six times as slow, and a policy that stays half as fast again.
    float32, dfp16 = [10.0, 20.0, 30.0, 60.0], [5.0, 12.5, 20.0, 60.0]
    kind = {"kind": "casts", "ms": 1.0, "calls": 1, "mb": 2.0, "ops": {"Cast": 1.0}}
    common = {"parameters": 1, "kinds": [kind]}
    rows = [
        {"policy": "float32", "step_ms": 25.0, "rounds_ms": float32, "images_per_s": 80.0,
         "peak_memory_mb": 800.0, **common},
        {"policy": "dfp16", "step_ms": 16.25, "rounds_ms": dfp16, "images_per_s": 123.0,
         "peak_memory_mb": 600.0, **common},
    ]  # fmt: skip
    settings = {"network": "dense", "batch": 2, "image_size": None, "repeats": 4, "isa": None,
                "threads": None, "policies": ["float32", "dfp16"]}  # fmt: skip
    run_ = {"settings": settings, "machine": machine.facts(), "rows": rows}
    document = {"schema": run.SCHEMA, "benchmark": "step", "complete": True, "runs": [run_]}
    written = tmp_path / "step.json"
    written.write_text(json.dumps(document))
    output = bench("report", written)
    # The rounds' ratios are 2, 1.6, 1.5 and 1.
    low, middle, high = np.percentile([2, 1.6, 1.5, 1], [25, 50, 75])
    ratio = f"{middle:.2f} | {low:.2f}-{high:.2f}"
    assert f"| dfp16 | 16.25 | 123.00 | {ratio} | 600 | 0.75 |" in output
    assert "| float32 | 25.00 | 80.00 | 1.00 | 1.00-1.00 | 800 | 1.00 |" in output
    refused = bench("report", written, "--plot", tmp_path / "step.png", code=1)
    assert "is of bench step; --plot draws conv, depthwise, gemm, workers." in refused


def busy_seconds(pid):
    """Returns the time that a process has had of all cores."""
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_policies_take_turns_and_none_is_left_when_one_dies():
    policies = ["float32", "dfp16"]
    settings = {"network": "dense", "batch": 8, "image_size": None, "repeats": 4, "isa": None,
                "threads": None, "policies": policies}  # fmt: skip
    before = set(children(os.getpid()))
    doing, pids, busy = [], [], []
    with pytest.raises(RuntimeError) as error:
        for kind, value in run.measure("step", settings):
            if kind != "doing":
                continue
            doing.append(value)
            started = set(children(os.getpid())) - before - set(pids)
            pids += started
            busy.append([busy_seconds(pid) for pid in pids])
            if len(doing) == 7:
                # The first policy's turn, while the second waits.
                os.kill(int(pids[1]), signal.SIGKILL)
    # Both warm up, and have rounds after that.
    assert [each.what for each in doing] == [*["dense float32", "dense dfp16"] * 3, "dense float32"]
    shares = [each.share for each in doing]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1
    for i in range(2, 6):
        taken = np.subtract(busy[i + 1], busy[i])
        assert taken[1 - i % 2] < 0.3 * taken[i % 2]
    assert str(error.value) == (
        "The process measuring step dense dfp16 was killed (SIGKILL), probably for want of "
        "memory. The 2 policies need memory at once: name fewer (--policy), or a smaller --batch."
    )
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (1, "Traceback\nValueError: no\n", "ended with exit code 1. ValueError: no"),
        (1, "MemoryError: 1 GiB\n", "exit code 1. MemoryError: 1 GiB. Choose a smaller --batch."),
        (-6, "F0000 broken", "was killed by SIGABRT. The last it wrote: F0000 broken"),
        (-9, "", "was killed (SIGKILL), probably for want of memory. Choose a smaller --batch."),
    ],
)
def test_what_is_said_of_a_process_that_ended(code, errors, said):
    settings = {"network": "lstm", "policy": "dfp16", "policies": ["dfp16"]}
    told = run._failure("step", settings, code, errors)
    assert told.startswith("The process measuring step lstm dfp16 ")
    assert told.endswith(said)


def test_step_of_a_network_without_images(tmp_path):
    written = tmp_path / "step.json"
    # TensorFlow's executor stops tracing an op that takes fewer than 8000 cycles: a batch of 2
    # made products of about that.
    arguments = ["--network", "lstm", "--batch", 32, "--repeats", 3, "--policy", "float32"]
    output = bench("step", *arguments, "--json", written)
    assert "step: lstm, batch 32; median of 3; " in output
    (each,) = check_document(written, "step", runs=1)["runs"]
    assert (each["settings"]["batch"], each["settings"]["image_size"]) == (32, None)
    (row,) = each["rows"]
    assert len(row["rounds_ms"]) == 3 and row["step_ms"] == sorted(row["rounds_ms"])[1]
    assert re.search(rf"samples/s .*\n.* {row['images_per_s']:.2f} ", output)
    (products,) = (kind for kind in row["kinds"] if kind["kind"] == "convolutions and products")
    # In each of 100 steps of the loop, 2 kernels of 128x512 are read in the forward pass and in
    # the input gradient, and their gradients written, each beside 32 rows of 128 and of 512.
    assert 100 * 6 <= products["calls"] < 100 * 6 + 10
    loop = 100 * 6 * (128 * 512 + 32 * (128 + 512)) * 4e-6
    assert loop < products["mb"] < 1.01 * loop


def test_outputs_that_are_not_wanted_are_not_written():
    import tensorflow as tf

    from keras_dfp.native import lib

    with tf.Graph().as_default():
        x = tf.zeros([2, 3, 3, 8])
        forward = {"parameters": [], "residual": [], "bounds": [], "step": []}
        backward = {name: [] for name in ("mask_map", "mask_bits", "norm", "sums", "step")}
        for wanted, names in {
            (): ["y"],
            ("want_q",): ["y", "q", "e"],
            ("want_mask",): ["y", "mask"],
        }.items():
            results = lib.dfp_normalize(x=x, **forward, **dict.fromkeys(wanted, True))
            assert step.written(results.y.op) == [getattr(results, name) for name in names]
        results = lib.dfp_normalize(x=x, **forward, want_y=False, want_q=True)
        assert step.written(results.y.op) == [results.q, results.e]
        results = lib.dfp_normalize_gradient(parts=[x], **backward, want_y=False, want_q=True)
        assert step.written(results.y.op) == [results.q, results.e]
        # Ops without such attributes write all they have.
        moments = lib.dfp_moments(x=x)
        assert step.written(moments.mean.op) == list(moments)


def test_ops_of_loops_count():
    import tensorflow as tf

    @tf.function(autograph=False)
    def powers(x):
        return tf.while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, tf.linalg.matmul(y, x)), (0, x)
        )

    graph = powers.get_concrete_function(tf.zeros([4, 4])).graph
    assert "MatMul" not in {op.type for op in graph.get_operations()}
    (product,) = (op for op in step.operations(graph) if op.type == "MatMul")
    assert step._bytes([*product.inputs, *step.written(product)]) == 3 * 4 * 4 * 4


@pytest.mark.slow
def test_pipeline(tmp_path):
    written = tmp_path / "pipeline.json"
    arguments = ["--network", "alexnet", "--network", "vgg16", "--images", 9, "--batch", 4]
    output = bench("pipeline", *arguments, "--repeats", 1, "--json", written)
    (each,) = check_document(written, "pipeline", runs=1)["runs"]
    printed = bench("report", written)
    for network, row in zip(("alexnet", "vgg16"), each["rows"], strict=True):
        # Whole batches; files of a photograph's size; more than an image a second and core.
        assert (row["network"], row["images"]) == (network, 8)
        assert 50 < row["image_kb"] < 200
        assert row["images_per_s"] > 1 and 0.1 < row["cpu_ms"] < 1000
        assert re.search(rf"\n{network} .* {row['images_per_s']:.0f} ", output)
        assert f"| {network} |" in printed


def workers_document(own_network):
    settings = {"network": "lenet", "batch": 96, "image_size": None, "repeats": 20, "isa": None,
                "threads": 1, "own_network": own_network}  # fmt: skip
    facts = {**machine.facts(), "threads": 1}
    rows = [
        {"workers": n, "exchange": exchange, "step_ms": 10.0 * n, "low_ms": 9.0 * n,
         "high_ms": 12.5 * n, "bytes": 1.5e3 * n if own_network else None, "ring_bytes": 1000 * n}
        for n, exchange in [(1, "none"), (2, "float32"), (2, "dfp16")]
    ]  # fmt: skip
    runs = [{"settings": settings, "machine": facts, "rows": rows}]
    return {"schema": run.SCHEMA, "benchmark": "workers", "complete": True, "runs": runs}


@pytest.mark.parametrize("own_network", [True, False])
def test_workers_are_told_and_drawn(tmp_path, own_network):
    written, plot = tmp_path / "workers.json", tmp_path / "workers.png"
    written.write_text(json.dumps(workers_document(own_network)))
    output = bench("report", written, "--plot", plot)
    sent = "3,000" if own_network else "-"
    assert f"| 2 | dfp16 | 20.00 | 18.00-25.00 | 50.0 | {sent} | 2,000 |" in output
    assert ("Bytes are not counted" in output) == (not own_network)
    assert matplotlib.image.imread(plot).shape[:2] == (396, 990)


def test_loopback_counts_what_is_sent():
    import socket

    before = workers.loopback_bytes()
    with socket.socket(type=socket.SOCK_DGRAM) as one, socket.socket(type=socket.SOCK_DGRAM) as two:
        two.bind(("127.0.0.1", 0))
        for _ in range(10):
            one.sendto(bytes(5000), two.getsockname())
    assert workers.loopback_bytes() - before >= 50_000


def test_a_ring_of_workers():
    # Each of 3 sends a third twice to be added up, and twice again to be known.
    assert workers._ring(3, "float32", 999) == 3 * (2 + 2) * 333 * 4
    assert workers._ring(2, "dfp16", 1000) == 2 * (1 + 1) * 500 * 2
    assert workers._ring(1, "none", 1000) == 0


@pytest.mark.slow
@pytest.mark.parametrize("own_network", [True, False])
def test_workers(tmp_path, monkeypatch, own_network):
    if own_network and not run.may_have_own_network():
        pytest.skip("this user may not make a network namespace")
    # Not by its name: the package has the command of that name.
    module = sys.modules["keras_dfp.cli.bench"]
    monkeypatch.setattr(module, "may_have_own_network", lambda: own_network)
    written = tmp_path / "workers.json"
    arguments = ["--workers", "1,2", "--repeats", 12, "--batch", 8, "--json", written]
    output = bench("workers", *arguments)
    (each,) = check_document(written, "workers", runs=1)["runs"]
    found = {(row["workers"], row["exchange"]): row for row in each["rows"]}
    assert list(found) == [(1, "none"), (2, "float32"), (2, "dfp16")]
    for (count, exchange), row in found.items():
        assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        # LeNet's weights, in 4 or 2 bytes.
        wanted = 2 * (count - 1) * 62_250 * (2 if exchange == "dfp16" else 4)
        assert row["ring_bytes"] == wanted
        if own_network:
            # And what gRPC puts around them.
            assert wanted <= row["bytes"] < 1.02 * wanted + 5_000
    assert ("Bytes are not counted" in output) == (not own_network)


@pytest.mark.slow
def test_a_terminal_is_told_how_long_it_takes():
    import fcntl
    import pty
    import struct
    import termios

    command = [sys.executable, "-m", "keras_dfp", "bench", "gemm", "--repeats", "1"]
    command += ["--size", "64", "--size", "65", "--size", "66"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    os.close(theirs)
    shown = b""
    # Linux reports the end of a terminal as an error.
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    shown = shown.decode()
    assert "measuring 66x66x66: 67 % done, 00:0" in shown and "left" in shown
    assert "measuring" not in ended.stdout and ended.stdout.count("\n6") == 3
    piped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "measuring" not in piped.stderr


def test_images_of_the_pipeline_are_photographs_in_size(tmp_path):
    written = pipeline.write_images(tmp_path, 3)
    files = sorted(tmp_path.glob("class*/*.jpg"))
    assert [file.parent.name for file in files] == ["class0", "class0", "class1"]
    assert sum(file.stat().st_size for file in files) == written
    assert all(matplotlib.image.imread(file).shape == (375, 500, 3) for file in files)


def test_an_op_does_not_count_what_runs_inside_it():
    events = [
        ("model/call:PartitionedCall", 0, 10_000_000_000),
        ("ExecutorState::Process", 0, 9_000_000_000),
        ("model/conv:Conv2D", 1_000_000_000, 4_000_000_000),
        ("model/relu:Relu", 6_000_000_000, 1_000_000_000),
        ("model/next:Relu", 10_000_000_000, 2_000_000_000),
    ]
    assert list(step._own_times(events)) == [
        ("model/call", "PartitionedCall", 5.0),
        ("model/conv", "Conv2D", 4.0),
        ("model/relu", "Relu", 1.0),
        ("model/next", "Relu", 2.0),
    ]


@pytest.mark.parametrize(
    ("name", "op_type", "kind"),
    [
        ("net_1/conv1_1/convolution", "_MklNativeConv2D", "convolutions and products"),
        ("gradient_tape/net_1/fc/MatMul/MatMul_1", "_MklMatMul", "convolutions and products"),
        ("net_1/conv1_1/DfpQuantize", "DfpQuantize", "quantization"),
        ("net_1/bn_1/DfpMoments", "DfpMoments", "batch norm, ReLU and quantizing fused"),
        (
            "gradient_tape/net_1/conv1_1/DfpQuantize/fused/DfpNormalizeGradient",
            "DfpNormalizeGradient",
            "batch norm, ReLU and quantizing fused",
        ),
        ("gradient_tape/net_1/bn_1/mul", "Mul", "batch norm"),
        ("net_1/conv1_1/BiasAdd", "BiasAdd", "bias and ReLU of products"),
        ("sgd/Sub_12", "Sub", "optimizer"),
        ("net_1/conv1_1/Cast", "Cast", "casts"),
        ("net_1/drop_1/Mul", "Mul", "Dropout"),
        ("AddN_3", "AddN", "sums of gradients"),
        ("loss/Mul", "Mul", "other"),
    ],
)
def test_kinds_of_op(name, op_type, kind):
    classes = {"conv1": "Conv2D", "fc": "Dense", "bn_1": "BatchNormalization", "drop": "Dropout"}
    assert step.kind_of(name, op_type, {**classes, "sgd": "optimizer"}) == kind


def test_tensorflow_is_held_to_the_same_instruction_set(monkeypatch):
    for name in ("KERAS_DFP_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert not {"KERAS_DFP_ISA", "ONEDNN_MAX_CPU_ISA"} & run.environment(None).keys()
    assert "ONEDNN_MAX_CPU_ISA" not in run.environment("avx512vnni")
    assert run.environment("avx2")["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    monkeypatch.setenv("KERAS_DFP_ISA", "avx2")
    assert run.environment(None)["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert run.environment("portable")["KERAS_DFP_ISA"] == "portable"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert run.environment(None)["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv", "--network", "resnet51"], "'resnet51' is not one of 'resnet50', 'vgg16'"),
        (["conv", "--network", "lstm"], "'lstm' is not one of 'resnet50', 'vgg16'"),
        (["step", "--network", "lstm", "--image-size", 64], "--image-size is not for lstm"),
        (["conv", "--isa", "sse9"], "'sse9' is not available here; available: "),
        (["conv", "--against", "float32,float8"], "'float8' is not one of"),
        (["gemm", "--threads", "1,0"], "0 is not in the range x>=1"),
        (["gemm", "--size", "3x4"], "'3x4' is neither N nor MxNxK"),
        (["gemm", "--json", "no/such/folder/a.json"], "no/such/folder to write to"),
        (["gemm", "--plot", "a.txt"], "a.txt must end in .png, .svg or .pdf"),
        (["step", "--policy", "int8"], "'int8' is not one of"),
        (["pipeline", "--images", "8"], "8 images do not make a batch of 32"),
        (["workers", "--workers", "1,0"], "0 is not in the range"),
        (["workers", "--batch", "2"], "--batch 2 is too small for 3 workers"),
        (["workers", "--exchange", "int8"], "'int8' is not one of 'float32', 'dfp16'"),
        (["report", "nowhere.json"], "does not exist"),
    ],
)
def test_wrong_usage(arguments, message):
    assert message in bench(*arguments, code=2)


def test_report_of_something_else(tmp_path):
    path = tmp_path / "a.json"
    for content in ("{}", "[]", "no json"):
        path.write_text(content)
        assert "was not written by keras-dfp bench" in bench("report", path, code=1)
    path.write_text('{"schema": 0}')
    assert f"has schema 0; this version reads {run.SCHEMA}" in bench("report", path, code=1)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in bench("gemm", "--plot", "a.png", code=1)


@pytest.mark.slow
def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("KERAS_DFP_ISA", "sse9")
    output = bench("quantize", code=1)
    assert "exit code" in output
    assert "sse9" in output


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    written = tmp_path / "gemm.json"
    command = [sys.executable, "-m", "keras_dfp", "bench", "gemm", "--repeats", "100"]
    command += ["--size", "64", "--size", "4096", "--json", str(written)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stdout:
            if line.startswith("64 x 64 x 64 "):
                (worker,) = map(int, children(process.pid))
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted; so far:" in output
    assert "Slower than TensorFlow's float32" in output
    assert "Traceback" not in errors
    assert not os.path.exists(f"/proc/{worker}")
    document = check_document(written, "gemm", runs=1)
    assert not document["complete"]
    assert [row["m"] for row in document["runs"][0]["rows"]] == [64]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_policy_is_left_behind(how):
    command = [sys.executable, "-m", "keras_dfp", "bench", "step", "--network", "dense"]
    with subprocess.Popen(
        [*command, "--policy", "float32", "--policy", "dfp16", "--repeats", "1000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert wait_until(lambda: len(children(process.pid)) == 2)
        pids = children(process.pid)
        process.send_signal(how)
        assert process.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    # Without a word from the command, those that wait notice at once, another after its turn.
    seconds = 0 if how == signal.SIGINT else 30
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), seconds)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as ids:
        return ids.read().split()
