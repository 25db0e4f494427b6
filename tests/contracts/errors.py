"""Exit code and *where* of user errors: what a script that reads them relies on. Their words may change."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from tests.contracts.calling import call, called_in
from tests.contracts.masking import masked
from tests.contracts.plans import write_rows

WHERE = re.compile(r"^\s*where:\s*(.*)$", re.MULTILINE)
PROGRESS = re.compile(r"^\[ *\d+\.\d s\].*\n", re.MULTILINE)
MODEL = "model=local model.path={models}"
TASK = "task=local task.path={rows}"
SLEEP = "training.engine=sleep training.sleep_seconds=0.01 tracking=off output_root=failed"
QUICK = "training.max_steps=1 tracking=off training.device=cpu"

ERRORS = {
    "a misspelt key": "run lora.rank=8",
    "a key of another group": "run training.lr=1e-4",
    "a misspelt group": "run quantisation=nf4",
    "a choice that there isn't": "run quantization=nf5",
    "a family that there isn't": "run model=llama3_8b",
    "a value of another type": "run lora.r=eight",
    "a value out of bounds": "run lora.r=0",
    "an enum's value": "run model.variant=chat",
    "not a pair": "run lora.r",
    "a list without -m": "run lora.r=8,16",
    "a multirun with a bad point": "run -m quantization=nf4,nf5",
    "settings that exclude each other": "run lora.init=pissa quantization=nf4",
    "both steps and tokens": "run training.max_steps=10 training.max_tokens=1000",
    "a micro-batch that doesn't divide": "run training.batch_size=32 training.micro_batch_size=5",
    "attention that needs padding": "run training.padding_free=on model.attention=eager",
    "an unknown optimizer": "run training.optimizer=adamw_8bits",
    "an unknown metric in a goal": "run 'task.goal=\"acuracy >= 0.5\"'",
    "several at once": "run lora.rank=8 quantization=nf5 training.lr=1",
    "an interpolation of nothing": "run 'name=\"${nope}\"'",
    "a code path": "run task._target_=os.system",
    "no settings file": "run --from nowhere.yaml",
    "a broken settings file": "run --from broken.yaml",
    "a settings file with a misspelt key": "run --from misspelt.yaml",
    "no task path": "validate task=local",
    "no such data file": "validate task=local task.path=nowhere.jsonl",
    "an empty data file": "validate task=local task.path=empty.jsonl",
    "a broken row": f"validate {TASK.format(rows='broken.jsonl')}",
    "a row without its column": f"validate {TASK.format(rows='column.jsonl')}",
    "an empty completion": f"validate {TASK.format(rows='blank.jsonl')}",
    "a column that there isn't": f"validate {TASK.format(rows='rows.jsonl')} task.columns.prompt=question",
    "a split that there isn't": "data preview --split valid",
    "no model path": "validate model=local",
    "no such model folder": f"validate {MODEL.format(models='nowhere')}",
    "an empty model folder": f"validate {MODEL.format(models='empty_model')}",
    "a model folder without weights": f"validate {MODEL.format(models='no_weights')}",
    "a broken config.json": f"validate {MODEL.format(models='broken_config')}",
    "pickled weights": f"validate {MODEL.format(models='pickled')}",
    "a target module that there isn't": "validate targets.modules=[q_prj]",
    "too little memory": f"run {QUICK} budget.memory_bytes=1000000 quantization=fp32",
    "a budget too small for a step": f"run {QUICK} budget.tokens=1",
    "a budget in dollars without a price": "run budget.usd=1 budget.usd_per_hour=0",
    "no such sweep": "sweep rank_dubling",
    "a sweep's sampler": "sweep demo sweep.sampler=tpee",
    "a sweep's pruner without evaluations": "sweep rank_by_quantization model=smollm2_135m sweep.pruner=asha",
    "an unbounded search": "sweep pareto sweep.n_trials=null",
    "an objective that there isn't": "sweep pareto 'sweep.objectives=[minimize scores.after.los]'",
    "a condition on no axis": "sweep lora_search '+sweep.conditions.seed=\"nope == 1\"'",
    "a sweep of a wrong point": "sweep rank_by_quantization model=smollm2_135m lora.r=4,0",
    "a ladder without margin": "sweep rank_doubling sweep.ladder.margin=-1",
    "no such run": "show 2026",
    "no such run to resume": "run --resume 2026",
    "no such run to repeat": "rerun 2026",
    "no run at all": "show last",
    "no such study": "status demo",
    "no such study to resume": "resume demo",
    "a study to report": "report nothing",
    "nothing to export": "export last",
    "a list that there isn't": "ls modells",
    "an unknown command": "trian",
    "an unknown option": "run --dryrun",
    "a missing argument": "show",
    "an option's bad value": "ls runs --limit zero",
    "an unknown card": "plan --device rtx9090",
    "a size that isn't one": "plan --fit much",
    "two options that exclude each other": "plan --sizes --fit 24GB",
    "a plan too large for a card": "plan --fit 1GB model=llama3_1_8b lora.r=16 training.max_length=512 targets=mlp",
    "a table that there isn't": "analyze nowhere.csv --margin 0.1",
    "a table without ranks": "analyze no_ranks.csv --margin 0.1",
    "a margin below zero": "analyze ranks.csv --margin -1",
    "a folder whose files are there": "init mine",
    "a run that fails": f"run {SLEEP} training.sleep_fault=fail",
    "a run without memory": f"run {SLEEP} training.sleep_fault=out_of_memory",
    "a run that diverges": f"run {SLEEP} training.sleep_fault=diverge",
}


def errors(folder: Path) -> dict[str, Any]:
    """What was wrong → command, exit code, every *where*, and the message."""
    write_files(folder)
    with called_in(folder):
        return {name: one_error(name, folder) for name in ERRORS}


def one_error(name: str, folder: Path) -> dict[str, Any]:
    called = call(*shlex.split(ERRORS[name]))
    message = masked(PROGRESS.sub("", called.err).strip(), {str(folder): "<folder>"})
    where = [text.strip() for text in WHERE.findall(message)]
    traceback = "Traceback" in message
    return {"command": ERRORS[name], "exit_code": called.code, "where": where, "message": message, "bare": traceback}


def write_files(folder: Path) -> None:
    """The files that the errors are about."""
    rows = [{"prompt": f"Row {number} is", "completion": "odd" if number % 2 else "even"} for number in range(30)]
    write_rows(folder / "rows.jsonl")
    faults = {
        "broken.jsonl": [*map(json.dumps, rows[:3]), '{"prompt": ', *map(json.dumps, rows[3:])],
        "column.jsonl": [*map(json.dumps, rows[:4]), '{"prompt": "x"}', *map(json.dumps, rows[4:])],
        "blank.jsonl": [*map(json.dumps, rows[:5]), '{"prompt": "x", "completion": ""}', *map(json.dumps, rows[5:])],
        "empty.jsonl": [],
        "broken.yaml": ["lora: {r: 8"],
        "misspelt.yaml": ["lora:", "  rank: 8"],
        "no_ranks.csv": ["width,score", "8,1.0", "16,0.9"],
        "ranks.csv": ["rank,loss,seed", "8,1.0,1", "8,1.1,2", "16,0.9,1", "16,0.95,2"],
    }
    for name, lines in faults.items():
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "task.yaml").write_text("seed: 2\n", encoding="utf-8")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 100}
    for name, files in {
        "empty_model": {},
        "no_weights": {"config.json": json.dumps(llama)},
        "broken_config": {"config.json": "{", "model.safetensors": ""},
        "pickled": {"config.json": json.dumps(llama), "pytorch_model.bin": "x"},
    }.items():
        (folder / name).mkdir(exist_ok=True)
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
