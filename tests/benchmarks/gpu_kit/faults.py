"""Faults in the trial processes of a real sweep: a folder with sitecustomize.py on PYTHONPATH, which every new
interpreter imports first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAULT_VARIABLE = "QLORA_EXP_GPU_KIT_FAULT"
MARKER_VARIABLE = "QLORA_EXP_GPU_KIT_MARKER"
REHEARSE_VARIABLE = "QLORA_EXP_GPU_KIT_REHEARSE"
PROGRAMS = ("qlora_exp.orchestration.trial_main", "qlora_exp.orchestration.fork_server")
FAULTY_RANK = 2
"""Trials of this rank fail; a fault never depends on the order of trials."""
KILL_AT_STEP = 5
SMALL_BYTES = 8e9
SITE = f"""
import os, sys
if any(program in sys.orig_argv for program in {PROGRAMS!r}):
    sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
    from gpu_kit import faults
    faults.install()
"""


def environment_with(fault: str, site: Path, rehearse: bool) -> Mapping[str, str]:
    """Return the environment of a command whose trial processes have ``fault`` (``none``: only the rehearsal's GPU)."""
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    (site / "marker").unlink(missing_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        FAULT_VARIABLE: fault,
        MARKER_VARIABLE: str(site / "marker"),
        REHEARSE_VARIABLE: "1" if rehearse else "",
    }


def install() -> None:
    """Install the fault of the environment in this process, and the rehearsal's GPU if it asks for one."""
    from transformers import Trainer

    rehearse = bool(os.environ.get(REHEARSE_VARIABLE))
    if rehearse:
        from gpu_kit import mocked

        mocked.install()
    fault = {"sticky": _sticky, "killed": _killed, "slow": _slow, "small memory": _small_memory, "none": _none}
    before_step = fault[os.environ[FAULT_VARIABLE]]
    step = Trainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        before_step(self, rehearse)
        return step(self, model, *args, **kwargs)

    Trainer.training_step = training_step


def _rank(trainer: Any) -> int:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return int(next(iter(model.peft_config.values())).r)


def _none(trainer: Any, rehearse: bool) -> None:
    pass


_broken: list[int] = []


def _sticky(trainer: Any, rehearse: bool) -> None:
    """A failed assertion on the device makes the process's CUDA context unusable: every later call raises, too."""
    import torch

    if rehearse and (_broken or _rank(trainer) == FAULTY_RANK):
        _broken.append(1)
        raise RuntimeError("CUDA error: device-side assert triggered")
    if not rehearse and _rank(trainer) == FAULTY_RANK:
        torch._assert_async(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()


def _killed(trainer: Any, rehearse: bool) -> None:
    """SIGKILL to the process, once."""
    marker = Path(os.environ[MARKER_VARIABLE])
    if _rank(trainer) == FAULTY_RANK and trainer.state.global_step == KILL_AT_STEP and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _slow(trainer: Any, rehearse: bool) -> None:
    Path(os.environ[MARKER_VARIABLE]).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(0.5)


def _small_memory(trainer: Any, rehearse: bool) -> None:
    """This process may allocate 8 GB of the card. In a rehearsal, a micro-batch of more than two rows doesn't fit."""
    import torch

    if not rehearse:
        torch.cuda.set_per_process_memory_fraction(min(1.0, SMALL_BYTES / torch.cuda.mem_get_info()[1]))
    elif trainer.args.per_device_train_batch_size > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB")
