"""``export``: the adapter, merged model and GGUF files of a finished run, and whether they suit a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_exp.cli.arguments import OutputRoot, Run, examples, outputs_of

if TYPE_CHECKING:
    from qlora_exp.export.results import Artefact, Export


def add_to(app: typer.Typer) -> None:
    app.command(
        "export",
        epilog=examples(
            "qlora-exp export last",
            "qlora-exp export last --to my_model --formats adapter,merged",
            "qlora-exp export last --formats q4_0 --phone --usd-per-hour 2.5",
            "qlora-exp export last --formats merged --push OWNER/NAME",
        ),
    )(export)


def export(
    run: Run,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="New or empty folder; default: export/ in the run's folder"),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Comma-separated: adapter, merged, q8_0, q5_1, q5_0, q4_1, q4_0"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the merged model: bfloat16 or float16")] = None,
    check_items: Annotated[
        int | None, typer.Option(help="Number of items on which the exported files are checked; 0: no check")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest accepted loss of accuracy of an exported file, as a share of items")
    ] = None,
    usd_per_hour: Annotated[
        float | None,
        typer.Option(help="Price of the training machine; default: from the record, else from conf/prices.yaml"),
    ] = None,
    phone: Annotated[
        bool | None, typer.Option("--phone", help="Show every criterion of whether the model runs on a phone")
    ] = None,
    phone_file_bytes: Annotated[int | None, typer.Option(help="Largest file size that is accepted for a phone")] = None,
    phone_memory_bytes: Annotated[int | None, typer.Option(help="Largest memory that is accepted for a phone")] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Push the first of --formats, with its card, to this new private repository on the Hub",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push public")] = False,
    push_again: Annotated[
        bool, typer.Option("--push-again", help="With --push: add a commit to a repository that exists")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json")] = False,
    output_root: OutputRoot = None,
) -> int:
    """Write a run's adapter, merged model and GGUF files, and check that they still answer its task.

    The defaults are in conf/export.yaml. With --push, an export that exists is pushed as it is.
    """
    from qlora_exp.config.enums import DeviceChoice
    from qlora_exp.records.find import find_run
    from qlora_exp.runs.process import hide_other_gpus, set_threads, silence_libraries

    hide_other_gpus(DeviceChoice.auto)
    set_threads(None)
    silence_libraries()
    paths = find_run(run, outputs_of(output_root))
    from qlora_exp.export.export import export_folder, export_run, exported_before, load_settings, push_export
    from qlora_exp.export.push import Push, check_push
    from qlora_exp.runs.console import ProgressReporter

    settings = load_settings(
        {
            "formats": [name.strip() for name in formats.split(",") if name.strip()] if formats is not None else None,
            "dtype": dtype,
            "check_items": check_items,
            "tolerance": tolerance,
            "usd_per_hour": usd_per_hour,
            "phone": phone,
            "phone_file_bytes": phone_file_bytes,
            "phone_memory_bytes": phone_memory_bytes,
        }
    )
    destination = Push(push, not public, push_again) if push is not None else None
    if destination is not None:
        check_push(destination)
    folder, address = export_folder(paths, to), None
    exported = exported_before(paths, to) if destination is not None else None
    with ProgressReporter() as observer:
        if exported is None:
            exported, folder = export_run(paths, to, settings, observer.phase)
        if destination is not None:
            observer.phase(f"push to {destination.repository}")
            address = push_export(paths, to, settings, destination)
    if as_json:
        print((folder / "export.json").read_text(encoding="utf-8"), end="")
        return 0
    for line in _lines(exported, settings.phone):
        print(line)
    print(f"export: {folder}  (README.md says how to use it)")
    if address is not None:
        print(f"pushed: {address}")
    return 0


def _lines(exported: Export, criteria: bool) -> list[str]:
    phone = exported.phone
    lines = [_line(artefact) for artefact in exported.artefacts]
    lines.append(f"{phone.question}: {phone.answer}{f' ({phone.artefact})' if phone.artefact else ''}")
    if criteria:
        lines += [f"  {criterion.name:18}{criterion.answer:11}{criterion.detail}" for criterion in phone.criteria]
    return lines


def _line(artefact: Artefact) -> str:
    parts = [f"{artefact.path:18}{artefact.size_bytes / 1e6:9.2f} MB"]
    check, runtime = artefact.check, artefact.runtime
    if check is not None and check.exported is not None and check.run is not None:
        name = (check.metric or "").replace("_", " ")
        parts.append(f"{name} {check.exported:.3f} (run {check.run:.3f}; within {check.tolerance:g}: {check.answer})")
    elif check is not None:
        parts.append(f"not checked: {check.why}")
    if check is not None and check.tokenization_note is not None:
        parts.append(check.tokenization_note)
    if runtime is not None and runtime.peak_resident_bytes is not None:
        parts.append(f"{runtime.peak_resident_bytes / 1e6:.0f} MB RAM")
    if runtime is not None and runtime.generated_tokens_per_second is not None:
        parts.append(f"{runtime.generated_tokens_per_second:,.1f} tokens/s on one thread")
    return "   ".join(parts)
