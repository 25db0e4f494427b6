"""Creates a run: its name, its folder and its first record."""

from __future__ import annotations

import datetime
import secrets

import yaml

from qlora_exp.config.enums import Engine, Method
from qlora_exp.config.schema import Config, to_plain
from qlora_exp.paths import OutputPaths, RunPaths, make_folder, slug
from qlora_exp.records import redaction
from qlora_exp.records.files import read_record, write_json, write_text
from qlora_exp.records.method_name import LORA, method_name
from qlora_exp.records.model_name import variant_name
from qlora_exp.records.types import SCHEMA_VERSION, Environment, RunRecord, Status, Trial
from qlora_exp.runs import sleep_engine
from qlora_exp.system import environment

NOT_RECORDED = ("sweep", "workers", "notify")
"""Sections of the configuration that say nothing about a run. A command or URL to notify may hold a secret, too."""


def create_record(
    config: Config,
    outputs: OutputPaths,
    probed: Environment,
    resume: str | None,
    run_id: str | None,
    trial: Trial | None,
) -> tuple[RunRecord, RunPaths]:
    """Write the first record (status RUNNING) of a new run, or of run ``resume``, and return it with its paths.

    ``run_id``: the new run's id; ``None``: one made of time, model and rank.
    """
    plain = redaction.redact({key: value for key, value in to_plain(config).items() if key not in NOT_RECORDED})
    if resume is not None:
        paths = outputs.run(resume)
        earlier = read_record(paths.record)
        record = earlier.replace(
            status=Status.RUNNING,
            ended_at=None,
            config=plain if trial is not None else earlier.config,
            failure=None,
            earlier_failures=(*earlier.earlier_failures, *((earlier.failure,) if earlier.failure is not None else ())),
            environment=probed,
            process=environment.process_identity(),
            trial=trial or earlier.trial,
        )
    else:
        run_id = run_id or _new_run_id(config)
        paths = outputs.run(run_id)
        make_folder(paths.folder, exist_ok=trial is not None)
        record = RunRecord(
            schema_version=SCHEMA_VERSION,
            run_id=run_id,
            name=redaction.redact_text(_name(config, trial)),
            status=Status.RUNNING,
            started_at=current_time(),
            ended_at=None,
            config=plain,
            environment=probed,
            process=environment.process_identity(),
            seed=config.seed,
            trial=trial,
        )
        if config.training.engine is Engine.sleep:
            record = sleep_engine.mark_synthetic(record)
    write_text(paths.config, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_json(paths.record, record)
    return record, paths


def remove_record(paths: RunPaths) -> None:
    for file in (paths.record, paths.config, paths.lock):
        file.unlink(missing_ok=True)
    paths.folder.rmdir()


def _name(config: Config, trial: Trial | None) -> str:
    name = config.name or display_name(config)
    return name if trial is None else f"{name} #{trial.number}"


def display_name(config: Config) -> str:
    """Return model, quantization, rank, targets and seed in a few words, e.g. ``embedded-base nf4 r8 attention s1``."""
    targets = "+".join(config.targets.modules) if config.targets.modules else config.targets.set
    model = variant_name(vars(config.model))
    return f"{model} {config.quantization.mode.value} {_tuning(config, f' {targets}')} s{config.seed}"


def _tuning(config: Config, targets: str = "") -> str:
    """Return ``r8`` and the targets, or another method's name."""
    name = method_name(to_plain(config))
    layers = "" if name == LORA else f" {name.removeprefix('lora ')}"
    return f"r{config.lora.r}{targets}{layers}" if config.method.kind is Method.lora else name


def _new_run_id(config: Config) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    model = variant_name(vars(config.model))
    return slug(f"{stamp}-{model}-{config.quantization.mode.value}-{_tuning(config)}-{secrets.token_hex(2)}", 120)


def current_time() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
