"""A task's data: read, validated row by row, divided, formatted as a chat or plainly, and tokenized."""

from qlora_exp.data.few_shots import FewShotDraw, few_shot_draws
from qlora_exp.data.formatting import plain_prompt, resolve_format
from qlora_exp.data.items import Item, Splits
from qlora_exp.data.loading import load_data, to_training_dataset
from qlora_exp.data.messages import Message
from qlora_exp.data.model_limits import check_positions, check_vocabulary
from qlora_exp.data.preview import PreviewItem, PreviewToken, preview
from qlora_exp.data.report import rows_report
from qlora_exp.data.rows import Example
from qlora_exp.data.sources import state_of_files
from qlora_exp.data.splits import RawSplits, load_rows

__all__ = [
    "Example",
    "FewShotDraw",
    "Item",
    "Message",
    "PreviewItem",
    "PreviewToken",
    "RawSplits",
    "Splits",
    "check_positions",
    "check_vocabulary",
    "few_shot_draws",
    "load_data",
    "load_rows",
    "plain_prompt",
    "preview",
    "resolve_format",
    "rows_report",
    "state_of_files",
    "to_training_dataset",
]
