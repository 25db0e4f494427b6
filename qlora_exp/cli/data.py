"""Commands that need no weights: ``validate``, ``data preview`` and ``init``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_exp.cli.arguments import AcceptPrediction, AsJson, Overrides, Source, examples, forced
from qlora_exp.cli.settings_file import combined_overrides
from qlora_exp.errors import QloraExpError

if TYPE_CHECKING:
    from qlora_exp.config.schema import Config
    from qlora_exp.data.items import Splits
    from qlora_exp.records.types import Environment, Plan
    from qlora_exp.runs.prepare import Prepared

STARTER = Path(__file__).resolve().parent / "starter"
"""The files of ``init``: a small task, the settings to run it, a sweep over it, and a README."""


def add_to(app: typer.Typer) -> None:
    app.command(
        "validate",
        epilog=examples(
            "qlora-exp validate quantization=nf4 lora.r=8",
            "qlora-exp validate task=local task.path=FILE.jsonl    # says how the columns are read",
            "qlora-exp validate task=local task.path=FILE.jsonl task.columns.prompt=question",
        ),
    )(validate)
    data = typer.Typer(
        help="Look at the data that training will use.",
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
    )
    data.command(
        "preview",
        epilog=examples(
            "qlora-exp data preview",
            "qlora-exp data preview task=local task.path=FILE.jsonl --split validation --count 5",
            "qlora-exp data preview model.variant=instruct         # with the chat template",
        ),
    )(preview)
    app.add_typer(data, name="data")
    app.command("init", epilog=examples("qlora-exp init my-task", "cd my-task && qlora-exp run --from task.yaml"))(init)


def validate(
    overrides: Overrides = None, source: Source = None, force: AcceptPrediction = False, as_json: AsJson = False
) -> int:
    """Check configuration and data without loading weights."""
    from qlora_exp.architecture.targets import rank_warning
    from qlora_exp.formatting import print_wrapped
    from qlora_exp.runs.execute import preflight

    config, prepared, environment = _prepared([*combined_overrides(source, overrides), *forced(force)])
    warning = preflight(config, prepared, environment)
    if config.tracking.enabled:
        from qlora_exp.paths import OutputPaths
        from qlora_exp.tracking.store import locate

        locate(config.tracking, OutputPaths.of(config.output_root))
    is_lora = prepared.plan.alpha is not None
    too_wide = rank_warning(prepared.architecture, prepared.modules, config.lora) if is_lora else None
    warnings = [text for text in (warning, too_wide, *prepared.splits.warnings) if text is not None]
    if as_json:
        from qlora_exp.cli.tables import print_json
        from qlora_exp.records.model_name import model_name
        from qlora_exp.records.schema import to_dict

        model = model_name(vars(config.model))
        content = {"valid": True, "model": model, "variant": config.model.variant.value}
        print_json(
            content | {"plan": to_dict(prepared.plan), "data": to_dict(prepared.splits.record), "warnings": warnings}
        )
        return 0
    print_wrapped(_summary_lines(config, prepared.plan, prepared.splits))
    print_wrapped(f"  warning  {text}" for text in warnings)
    return 0


def preview(
    overrides: Overrides = None,
    source: Source = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", help="Number of items")] = 3,
    as_json: AsJson = False,
) -> int:
    """Show items as tokens. The trained tokens are highlighted, or in [brackets] without a terminal."""
    from rich.text import Text

    from qlora_exp.data.preview import preview_items, rows_report
    from qlora_exp.formatting import print_table

    config, prepared, _ = _prepared(combined_overrides(source, overrides))
    if as_json:
        _print_items(split, preview_items(prepared.splits, prepared.tokenizer, split, count))
        return 0
    data = prepared.splits.record
    counts = f"{data.train_items} train, {data.validation_items} validation, {data.test_items} test items"
    print(f"{config.task.path or config.task.hub_id or config.task.name}: {counts}; {prepared.plan.format} format")
    read_as = [prepared.splits.read_as] if prepared.splits.read_as is not None else []
    for line in (*read_as, *rows_report(prepared.splits)):
        print(line)
    print()
    for item, tokens in preview_items(prepared.splits, prepared.tokenizer, split, count):
        trained = sum(token.trained for token in tokens)
        head = f"{split} {item.item_id}: {len(tokens)} tokens, {trained} trained"
        print_table(Text(head + (f", label {item.label!r}" if item.label is not None else ""), style="bold"))
        print_table(_marked_text(tokens))
        print_table("")
    return 0


def _print_items(split: str, shown: Any) -> None:
    """Print ``data preview --json``: one object per item, with its tokens."""
    from qlora_exp.cli.tables import print_json

    print_json(
        [
            {"split": split, "item_id": item.item_id, "label": item.label}
            | {"tokens": [token._asdict() for token in tokens]}
            for item, tokens in shown
        ]
    )


def init(folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A new or empty folder")] = Path(".")) -> int:
    """Write a starter folder with a task of your own."""
    sources = {path.relative_to(STARTER): path for path in sorted(STARTER.rglob("*")) if path.is_file()}
    existing = [str(name) for name in sources if (folder / name).exists()]
    if existing:
        what = f"{', '.join(existing)} would be overwritten"
        raise QloraExpError(what, str(folder.absolute()), "qlora-exp init NEW_FOLDER")
    try:
        for name, source in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    except OSError as error:
        what = f"the folder can't be written: {error.strerror}"
        raise QloraExpError(what, str(folder.absolute()), "qlora-exp init OTHER_FOLDER") from None
    for name in sources:
        print(folder / name)
    print(f"next: {f'cd {folder} && ' if folder != Path('.') else ''}qlora-exp run --from task.yaml")
    return 0


def _prepared(overrides: list[str]) -> tuple[Config, Prepared, Environment]:
    """Return the configuration, the run's preparation (plan, tokenizer, splits) and the environment. Loads no
    weights."""
    from dataclasses import replace

    from qlora_exp.config.compose import compose_run
    from qlora_exp.runs.process import hide_other_gpus, set_threads, silence_libraries
    from qlora_exp.system import heap

    config = compose_run(overrides)
    hide_other_gpus(config.training.device)
    set_threads(config.training.threads)
    silence_libraries()
    from qlora_exp.runs.prepare import prepare
    from qlora_exp.system.environment import probe

    environment = probe(config.training.device)
    if environment.device.kind == "cpu":  # the tunables of the process that will train
        environment = replace(environment, glibc_tunables=heap.tunables_for_training())
    return config, prepare(config, environment), environment


def _summary_lines(config: Config, plan: Plan, splits: Splits) -> list[str]:
    """Return the lines that ``validate`` prints."""
    from qlora_exp.data.preview import rows_report
    from qlora_exp.records.model_name import model_name

    data = splits.record
    share = plan.trainable_parameters / plan.total_parameters
    from qlora_exp.config.schema import to_plain
    from qlora_exp.records.method_name import method_name

    rounded_in = " and ".join(plan.inputs_rounded_in or ())
    rounded = f", inputs rounded to 8 bits in {rounded_in}" if rounded_in else ""
    epochs = f" ({config.training.epochs:g} epochs of {data.train_items} rows)" if config.training.epochs else ""
    unpacked = f"unpacked from {plan.unpacked_from}, " if plan.unpacked_from is not None else ""
    dropped = f", {data.dropped_rows} rows dropped" if data.dropped_rows else ""
    tuning = f"method   {method_name(to_plain(config))}"
    if plan.alpha is not None:
        modules = f"{plan.adapted_modules} modules ({', '.join(plan.target_modules)})"
        tuning = f"LoRA     r={config.lora.r} alpha={plan.alpha:g} on {modules}"
    return [
        "valid",
        f"  model    {model_name(vars(config.model))} {config.model.variant.value} ({plan.architecture}, "
        f"{plan.total_parameters:,} parameters), {unpacked}{plan.weight_dtype} weights, "
        f"computing in {plan.compute_dtype} on {plan.device}{rounded}",
        f"  {tuning}: {plan.trainable_parameters:,} trained parameters ({share:.2%})",
        f"  data     {data.task}: {data.train_items} train, {data.validation_items} validation, "
        f"{data.test_items} test items{dropped}; {plan.format} format",
        *([f"           {splits.read_as}"] if splits.read_as is not None else []),
        *(f"           {line}" for line in rows_report(splits)),
        f"  training {plan.max_steps} steps of {plan.batch_size} items{epochs} "
        f"({_micro_batch(plan)} at a time), seed {config.seed}; "
        f"{'without padding' if plan.padding_free else f'with padding: {plan.padded_because}'}",
    ]


def _micro_batch(plan: Any) -> str:
    if plan.micro_batch_tokens is not None:
        return f"at most {plan.micro_batch_tokens:,} tokens"
    return str(plan.micro_batch_size)


def _marked_text(tokens: Any) -> Any:
    """Return the item as text: trained tokens highlighted on a terminal, in brackets elsewhere."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        shown = token.text.replace("\n", "⏎\n")
        if not token.trained:
            text.append(shown, style="dim")
        elif sys.stdout.isatty():
            text.append(shown, style="bold black on green")
        else:
            text.append(f"[{shown}]")
    return text
