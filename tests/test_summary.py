"""`keras-dfp report`: what a page says of runs, and that a browser shows it."""

import csv
import itertools
import json
import re
import shutil

import browser
import matplotlib.image
import numpy as np
import pytest
from click.testing import CliRunner

import keras_dfp
from keras_dfp.audit import pattern
from keras_dfp.cli import main
from keras_dfp.statistics import COLUMNS
from keras_dfp.training import log, summary
from keras_dfp.training.errors import RunError

QUANTITIES = ("exponent_least", "exponent_median", "exponent_largest", "lost", "clamped", "snr_db")
NASTY = "<script>document.title = 'taken'</script>/$x_{/[1]*"
LAYERS = ["conv1", "block/conv2", NASTY, "dense"]
STEPS = range(10, 90, 10)


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="keras-dfp")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def table(path, layers=LAYERS, steps=STEPS, **changed):
    """Writes a table of statistics in which `changed` says otherwise of some, from layer and tensor
    to values of QUANTITIES."""
    changed = {LAYERS[int(key[0])]: value for key, value in changed.items()} if changed else {}
    usual = {"activation": (-12, -10, -9, 1e-3, 0, 66), "weight": (-15, -15, -15, 0, 0, "inf"),
             "gradient": (-26, -24, -20, 0.02, 0, 52)}  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in steps:
            for layer in layers:
                for tensor, values in (usual | changed.get(layer, {})).items():
                    for quantity, value in zip(QUANTITIES, values, strict=True):
                        writer.writerow((step, layer, tensor, quantity, value))
                    writer.writerow((step, layer, tensor, "nonfinite", 0))
                for (tensor, quantity), ms in zip(summary.PRODUCTS, (1.5, 2, 4), strict=True):
                    writer.writerow((step, layer, tensor, quantity, ms))
            # Of one that is not among the worst, and of one that is.
            for layer, tensor in itertools.product(layers[:2], summary.ERRORS):
                writer.writerow((step, layer, tensor, "error", 0.003))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a comparison, one with statistics: a noisy gradient, and one that is lost."""
    folder = tmp_path_factory.mktemp("study")
    run("compare", "--epochs", "2", "--output", folder)
    table(
        folder / "seed1" / "dfp16" / "statistics.csv",
        **{"2": {"gradient": (-26, -24, -20, 0.9, 0, 12)},
           "1": {"activation": (-12, -10, -9, 1e-3, 0, 30)}},
    )  # fmt: skip
    return folder


def test_the_page_in_a_browser(runs, tmp_path):
    if browser.CHROMIUM is None:
        pytest.skip("there is no Chromium")
    page = tmp_path / "page.html"
    output = run("report", runs, "--output", page)
    assert f"dfp16: {NASTY}: exclude=[{pattern(NASTY)!r}]" in output
    assert f"In {page}; its pictures in {tmp_path / 'page-pictures'}/" in output
    with browser.page(tmp_path / "profile") as shown:
        for width, dark in ((1280, False), (800, False), (390, True)):
            shown.width(width, dark)
            shown.open(page)
            # Wide things scroll in themselves.
            assert shown.run("document.documentElement.scrollWidth") <= width
        sizes = shown.run(
            "Promise.all([...document.images].map("
            "i => i.decode().then(() => [i.naturalWidth, i.naturalHeight, i.width])))"
        )
        text = shown.run("document.body.innerText")
        title = shown.run("document.title")
    assert {url for url in shown.requests if not url.startswith("data:image/png")} == {
        page.as_uri()
    }
    assert shown.messages == []
    assert len(sizes) == len(list((tmp_path / "page-pictures").iterdir())) == 11
    assert all(min(size) > 200 for size in sizes)
    assert "keras-dfp report" in title
    for each in (
        "Report of 2 runs", "float32", "dfp16", "4 layers, 8 steps", "The worst layers",
        "12 dB", "90 %", "Loss and accuracy", "Exponents over time", "Throughput and memory", NASTY,
    ):  # fmt: skip
        assert each in text


def test_the_worst_layers_come_first_with_advice(runs):
    _, dfp = summary.read([runs])
    assert [each.layer for each in dfp.worst][:2] == [NASTY, "block/conv2"]
    first, second, *others = dfp.worst
    assert (first.remedy, second.remedy) == ("exclude", "mantissa_bits")
    assert first.noise == pytest.approx(10 ** (-12 / 20))
    assert all(not each.advice for each in others)
    # The advice is Python, and does what it says.
    policy = eval(dfp.snippet, {"keras_dfp": keras_dfp})
    assert policy == keras_dfp.DFPPolicy(
        exclude=[pattern(NASTY)], overrides={"block/conv2": {"mantissa_bits": 16}}
    )
    assert policy[NASTY].name == "float32"


def test_advice_follows_the_policy_of_the_run(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs / "seed1" / "dfp16", folder)
    facts = json.loads((folder / "run.json").read_text())
    for policy, remedy in (
        ("dfp16:mantissa_bits=16", "exclude"),
        ("dfp16_paper", "exponents"),
        ("dfp16:mantissa_bits=12", "mantissa_bits"),
    ):
        facts["settings"]["policy"] = policy
        (folder / "run.json").write_text(json.dumps(facts))
        (told,) = summary.read([folder])
        assert told.worst[1].remedy == remedy
        assert isinstance(eval(told.snippet, {"keras_dfp": keras_dfp}), keras_dfp.DFPPolicy)


def test_where_most_layers_need_bits_it_is_the_policy(tmp_path):
    noisy = {"gradient": (-26, -24, -20, 0.9, 0, 30)}
    table(tmp_path / "statistics.csv", **{"0": noisy, "1": noisy, "3": noisy})
    (told,) = summary.read([tmp_path])
    assert len(told.advised) == 3
    assert told.snippet == "keras_dfp.DFPPolicy('dfp16', mantissa_bits=16)"


def test_a_tensor_that_is_not_finite(tmp_path):
    table(tmp_path / "statistics.csv")
    with open(tmp_path / "statistics.csv", "a") as file:
        file.write("90,dense,gradient,nonfinite,3\n90,dense,activation,nonfinite,1\n")
        file.write("80,dense,gradient,nonfinite,3\n")
    (told,) = summary.read([tmp_path])
    assert (told.worst[0].layer, told.worst[0].nonfinite) == ("dense", (80, "gradient"))
    assert "gradient not finite from step 80 on." in summary.page([told], summary.pictures([told]))


@pytest.mark.parametrize("end", ["", "90,de", '90,"den', "90,dense,gradient,lost,0.", '90,"a\n'])
def test_a_table_that_is_being_written(tmp_path, end):
    path = tmp_path / "statistics.csv"
    table(path)
    whole = summary.read_statistics(path)
    path.write_text(path.read_text() + end)
    if end.endswith("\n"):
        with pytest.raises(RunError, match="spoiled at line"):
            summary.read_statistics(path)
        return
    torn = summary.read_statistics(path)
    assert torn.steps.tolist() == whole.steps.tolist() == list(STEPS)
    assert torn.series.keys() == whole.series.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,layer\n", "spoiled at line 1: its columns must be step,layer,tensor,quantity,valu"),
        (b"1,a,b\n", "spoiled at line 2: there must be 5 values; got 3"),
        (b"1,a,weight,lost,much\n", "spoiled at line 2: could not convert string to float: 'much'"),
        (b"first,a,weight,lost,0\n", "spoiled at line 2: invalid literal for int()"),
        (b"1,a,weight,lost,0\n\xff\n", "spoiled at line 1: 'utf-8' codec can't decode"),
    ],
)
def test_a_table_that_is_spoiled(tmp_path, content, message):
    header = b"" if content.startswith(b"step") else b"step,layer,tensor,quantity,value\n"
    (tmp_path / "statistics.csv").write_bytes(header + content)
    output = run("report", tmp_path, code=1)
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_run(runs, tmp_path):
    assert "neither run.json nor statistics.csv" in run("report", tmp_path, code=1)
    assert "it does not exist" in run("report", tmp_path / "nowhere", code=1)
    (tmp_path / "file").touch()
    assert "it is no folder" in run("report", tmp_path / "file", code=1)
    broken = tmp_path / "broken"
    shutil.copytree(runs / "seed1" / "float32", broken)
    (broken / "checkpoint.npz").write_bytes(b"garbage")
    assert "is not a checkpoint of this model" in run("report", runs, broken, code=1)
    # One that has just begun.
    (broken / "checkpoint.npz").unlink()
    (broken / "statistics.csv").touch()
    run("report", broken)
    page = (broken / "report.html").read_text()
    assert "no checkpoint yet" in page
    assert "<img" not in page


def test_runs_side_by_side_and_fewer(runs, tmp_path):
    (tmp_path / "report-pictures").mkdir()
    for name in ("mine.png", "lost-7.png"):
        (tmp_path / "report-pictures" / name).touch()
    output = tmp_path / "report.html"
    run("report", runs / "seed1" / "float32", runs / "seed1" / "dfp16", "--output", output)
    names = {path.name for path in (tmp_path / "report-pictures").iterdir()}
    # Of an earlier report, and not of one.
    assert "lost-7.png" not in names and "mine.png" in names
    assert {"loss.png", "accuracy.png", "throughput.png", "memory.png", "lost-2.png"} < names
    for name in names - {"mine.png"}:
        assert np.ptp(matplotlib.image.imread(tmp_path / "report-pictures" / name)[..., :3]) == 1
    for images in re.findall(r"data:image/png;base64,(\S+?)\"", output.read_text()):
        assert len(images) > 1000
    run("report", runs / "seed1" / "float32", "--output", output)
    names = {path.name for path in (tmp_path / "report-pictures").iterdir()}
    assert names == {"loss.png", "accuracy.png", "throughput.png", "memory.png", "mine.png"}


def test_a_history_of_an_older_version(runs, tmp_path):
    """Its epochs do not say how much memory they took."""
    (told,) = summary.read([runs / "seed1" / "float32"])
    new = told.progress.history[0]
    old = {key: value for key, value in new.items() if key != "peak_memory_mb"}
    log.check_rows([old, new])
    log.write_csv(tmp_path / "log.csv", [old, new])
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["peak_memory_mb"] == ""
    assert 1e2 < float(rows[1]["peak_memory_mb"]) < 1e5
    told.progress.history[:] = [old, old]
    sections = summary.pictures([told])
    assert [picture.name for picture in sections["speed"]] == ["throughput.png"]


def test_labels_of_many_layers():
    """Short, each once, and what tells them apart stays."""
    layers = [
        f"transformer_with_a_long_name/encoder_block_{block:02d}/multi_head_self_attention/{part}"
        for block in range(40)
        for part in ("query_projection", "key_projection", "value_projection", "output_projection")
    ]
    labels = summary._labels(layers)
    assert len(set(labels)) == 160
    assert max(map(len, labels)) <= 34
    assert re.fullmatch(r"enc.*_07/query.*", labels[28])
    for names in (
        ["a"],
        ["a", "a/b", "a/b/c"],
        ["x/" + 50 * "y" + str(n) for n in range(9)],
        ["/"],
    ):
        assert len(set(summary._labels(names))) == len(names)
