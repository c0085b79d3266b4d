"""How far kernels' gradients under each policy are from float32's, while ResNet-20 is trained.

    python docs/accuracy/gradient_errors.py cifar10 --output runs/gradient_errors

Trains ResNet-20 in float32. Before the first epoch and after some, it computes the gradients of the
same batches with the same weights under every policy. The error of a kernel is the norm of the
difference to float32's gradient, of float32's, averaged over batches. Of each policy and stage it
prints the median over kernels and the worst kernel's; then every kernel's, of some policies; and
draws these. It goes on where it was stopped.
"""

import itertools
import json
from pathlib import Path

import click
import keras
import numpy as np
import tensorflow as tf
from gradients import gradients_of
from tqdm import tqdm

from keras_dfp import zoo
from keras_dfp.files import written_whole
from keras_dfp.training import network
from keras_dfp.training.pipeline import Pipeline
from keras_dfp.training.policies import policy as policy_of
from keras_dfp.training.settings import Settings

BITS = range(12, 17)
POLICIES = (
    "mixed_bfloat16",
    *(f"dfp16:exponents=tensor:mantissa_bits={bits}" for bits in BITS),
    *(f"dfp16:mantissa_bits={bits}" for bits in BITS),
)
SHOWN = {
    "mixed_bfloat16": "bfloat16",
    "dfp16:exponents=tensor:mantissa_bits=14": "14 bits, tensor",
    "dfp16:mantissa_bits=14": "14 bits",
    "dfp16:mantissa_bits=16": "16 bits",
}


@click.command(help=__doc__.split("\n")[0])
@click.argument("data", type=click.Path(exists=True, file_okay=False))
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/gradient_errors"))
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batches", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--epochs", default="0,1,4", show_default=True, help="When to look.")
def main(data: str, output: Path, batch_size: int, batches: int, epochs: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        network="resnet20", data=data, policy="float32", batch_size=batch_size
    ).resolved()
    source, _ = settings.find_data()
    recipe = settings.recipe
    pipeline = Pipeline(source, recipe.images, batch_size, zoo.preprocessing("resnet20"))
    keras.utils.set_random_seed(settings.seed)
    model = network.build(settings, pipeline.image_shape(), len(source.classes))
    optimizer = network.optimizer(recipe)
    optimizer.build(model.trainable_variables)
    step = network.train_step(model, optimizer, recipe, 0.0)
    done = 0
    results = {}
    for stage in sorted(int(text) for text in epochs.split(",")):
        weights = output / f"epoch{stage}.npz"
        variables = model.variables + optimizer.variables
        if weights.exists():
            values = np.load(weights)
            for variable, name in zip(variables, values.files, strict=True):
                variable.assign(values[name])
        else:
            for epoch in range(done, stage):
                some = pipeline.training(settings.seed, epoch)
                for images, labels in tqdm(some, f"epoch {epoch + 1}", pipeline.steps):
                    step(images, labels)
            with written_whole(weights) as path, path.open("wb") as file:
                np.savez(file, *map(keras.ops.convert_to_numpy, variables))
        done = stage
        results[stage] = errors(output, stage, model, pipeline, batches)
    names = [w.path.split("/")[-2] for w in model.trainable_variables if network.is_kernel(w)]
    table(results)
    table_of_kernels(results, names)
    plot(results, names, output / "gradient_errors.png")


def errors(output, stage, model, pipeline, batches) -> dict[str, list[float]]:
    """Returns, for each policy, the error of each kernel at a stage."""
    path = output / f"errors{stage}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    some = list(itertools.islice(pipeline.training(seed=99, epoch=0), batches))
    truth = None
    for name in tqdm([name for name in POLICIES if name not in known], f"after {stage} epochs"):
        if truth is None:
            truth = [gradients_of(model)(*batch) for batch in some]
        other = zoo.load(
            "resnet20",
            policy=policy_of(name),
            input_shape=model.input_shape[1:],
            classes=model.output_shape[-1],
            classifier_activation=None,
        )
        other.set_weights(model.get_weights())
        rounded = gradients_of(other)
        each = [
            [
                float(tf.norm(tf.cast(a, tf.float32) - b) / tf.norm(b))
                for a, b in zip(rounded(*batch), exact, strict=True)
            ]
            for batch, exact in zip(some, truth, strict=True)
        ]
        known[name] = np.mean(each, axis=0).tolist()
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1))
    return known


def table(results: dict[int, dict[str, list[float]]]) -> None:
    print("| policy | " + " | ".join(f"after {stage} epochs: median, worst" for stage in results))
    print("|---" * (1 + len(results)) + "|")
    for name in POLICIES:
        cells = [
            f"{np.median(found[name]):.2%}, {max(found[name]):.2%}" for found in results.values()
        ]
        print(f"| `{name}` | " + " | ".join(cells) + " |")


def table_of_kernels(results: dict[int, dict[str, list[float]]], names: list[str]) -> None:
    print("\n| kernel |" + f" {' | '.join(SHOWN.values())} |" * len(results))
    print("|---" + "|---:" * len(SHOWN) * len(results) + "|")
    for i, name in enumerate(names):
        cells = [f"{100 * found[p][i]:.2f}" for found in results.values() for p in SHOWN]
        print(f"| {name} | {' | '.join(cells)} |")


def plot(results: dict[int, dict[str, list[float]]], names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (stage, found) in zip(panels, results.items(), strict=True):
        for (name, label), marker in zip(SHOWN.items(), "sovD", strict=True):
            axes.plot([100 * e for e in found[name]], marker=marker, ms=4, label=label)
        axes.set_title(f"after {stage} epoch{'s' * (stage != 1)}")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error of the gradient, % of float32's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SHOWN))
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
