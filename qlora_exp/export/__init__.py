"""From a finished run to files that others can use: adapter, merged model, and GGUF for a phone."""

from qlora_exp.export.exporting import export_run
from qlora_exp.export.results import Artefact, Criterion, Export, PhoneAnswer, Runtime, TaskCheck
from qlora_exp.export.settings import load_settings

__all__ = [
    "Artefact",
    "Criterion",
    "Export",
    "PhoneAnswer",
    "Runtime",
    "TaskCheck",
    "export_run",
    "load_settings",
]
