"""The report's section on predicted memory: which trials were skipped, and how often the prediction was wrong."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_exp.analysis.report_content import Section, StudyInfo, value_table

FEASIBILITY_COLUMNS = {
    "limit_bytes": ("memory limit", "bytes"),
    "skipped": ("not started", "integer"),
    "seconds_saved": ("training saved", "seconds"),
    "borderline": ("tried near the limit", "integer"),
    "borderline_out_of_memory": ("of these out of memory", "integer"),
    "out_of_memory": ("out of memory though predicted to fit", "integer"),
    "above_limit": ("peak above the limit", "integer"),
    "compared": ("compared", "integer"),
}


def feasibility_section(studies: Sequence[StudyInfo]) -> Section | None:
    """Return the section; ``None`` if no study has a memory limit."""
    limited = [study for study in studies if study.predicted_memory]
    if not limited:
        return None
    rows = [(study.name, *(study.predicted_memory.get(key) for key in FEASIBILITY_COLUMNS)) for study in limited]
    return Section(
        "feasibility",
        "Trials that would not have fitted",
        tuple(f"{study.predicted_memory['sentence']}." for study in limited),
        (value_table(("study", *FEASIBILITY_COLUMNS.values()), rows),),
        points=(
            "Whether a trial that was not started would have fitted after all is unknown. The time saved is its"
            " predicted training time; it might have run out of memory sooner.",
        ),
    )
