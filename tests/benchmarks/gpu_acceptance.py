"""Checks on a GPU machine all that only a GPU can show: stages with a time limit each, which later calls continue.

python tests/benchmarks/gpu_acceptance.py --out DIR --resume DIR/state.json   # make gpu-acceptance
python tests/benchmarks/gpu_acceptance.py --rehearse --out DIR                # make gpu-rehearsal: on a CPU, with mocks
python tests/benchmarks/gpu_acceptance.py --pack WHEELS --sets ACL            # wheels for a machine without a network
python tests/benchmarks/gpu_acceptance.py --here --wheels WHEELS …            # there: this checkout, not installed
python tests/benchmarks/gpu_acceptance.py --collect DIR/state.json            # docs/gpu.md and the table of cells

Exit code 0: all checks passed; 1: one failed; 2: wrong arguments; 75: call the same command again, it continues.
CONTRIBUTING.md, "With a GPU", has the steps.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_kit import packing
from gpu_kit.runner import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ROOT, Call, Findings, Stage, run, source_version

REHEARSED_BOX_SECONDS = 240.0
"""Of each stage in a rehearsal, on a machine that may be busy."""


@dataclass(frozen=True)
class KitStage(Stage):
    """``function`` of ``gpu_kit.module`` is the stage."""

    module: str
    function: str


STAGES = (
    KitStage("preflight", 60, "correctness", "preflight"),
    KitStage("gpu_tests", 120, "correctness", "gpu_tests"),
    KitStage("recipe", 60, "correctness", "recipe"),
    KitStage("out_of_memory", 240, "correctness", "out_of_memory"),
    KitStage("cells", 330, "speed", "first_cells"),
    KitStage("plain_trl", 360, "speed", "plain_trl"),
    KitStage("more_cells", 300, "speed", "more_cells"),
    KitStage("anatomy", 150, "speed", "anatomy"),
    KitStage("warm_base", 150, "trial_processes", "warm_base"),
    KitStage("killed", 120, "trial_processes", "killed"),
    KitStage("shared_card", 180, "trial_processes", "shared_card"),
    KitStage("sticky_error", 90, "trial_processes", "sticky_error"),
    KitStage("calibration", 60, "speed", "calibration"),
    KitStage("meters", 40, "kinds", "meters"),
    KitStage("scoring", 180, "speed", "scoring"),
    KitStage("study", 180, "trial_processes", "study"),
    KitStage("kinds", 150, "kinds", "kinds"),
)
"""In order of importance: what comes first is known if time runs out."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_acceptance"), help="for results")
    parser.add_argument("--resume", type=Path, metavar="STATE", help="state.json of an earlier call, if it exists")
    parser.add_argument("--call-seconds", type=float, help="start no stage that may not end within this")
    parser.add_argument("--only", help="stages, separated by commas")
    parser.add_argument("--again", action="store_true", help="repeat stages that failed, once")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with two-layer models and mocks")
    parser.add_argument("--here", action="store_true", help="use this checkout without an installation")
    parser.add_argument("--wheels", type=Path, help="with --here: install these wheels, without a network")
    parser.add_argument("--pack", type=Path, metavar="WHEELS", help="download wheels into this folder, and end")
    parser.add_argument("--sets", default="ACL", help="of wheels: A always, B MLflow, C transformers, L Liger")
    parser.add_argument("--limit-mib", type=float, default=64.0, help="of wheels and repository together")
    parser.add_argument("--python", default="3.12", help="the GPU machine's version, for --pack")
    parser.add_argument("--collect", type=Path, metavar="STATE", help="write the documents of a state, and end")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for --collect")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.pack is not None:
        return packing.pack(given.pack, given.sets, given.limit_mib, given.python)
    if given.collect is not None:
        from gpu_kit import collect

        return collect.collect(given.collect, given.docs)
    if given.stage is not None:
        return run_one(given.stage, given.out, given.rehearse)
    return run_all(given)


def run_all(given: argparse.Namespace) -> int:
    began = time.monotonic()
    names = [stage.name for stage in STAGES]
    chosen = given.only.split(",") if given.only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        print(f"error: no stage {', '.join(unknown)}: choose from {', '.join(names)}")
        return EXIT_USAGE
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    paths = [str(ROOT), str(ROOT / "qlora_exp" / "plugins")] if given.here else []
    if given.here:
        site = Path(tempfile.gettempdir()) / f"qlora-exp-gpu-site-{os.getuid()}"
        packing.install_here(site, given.wheels)
        paths.insert(0, str(site))
        environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        sys.path[:0] = paths
    if given.rehearse:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    else:
        from qlora_exp.errors import QloraExpError
        from qlora_exp.system.gpus import cards, use_one_gpu

        try:
            use_one_gpu(environment)
        except QloraExpError as error:
            print(f"error: {error}")
            return EXIT_USAGE
        if not cards():
            print("error: this machine has no NVIDIA GPU: make gpu-rehearsal runs the stages on a CPU")
            return EXIT_USAGE
    out = given.out.resolve()
    options = ["--out", str(out), *(["--rehearse"] if given.rehearse else [])]
    stages = [
        Stage(stage.name, REHEARSED_BOX_SECONDS if given.rehearse else stage.box_seconds)
        for stage in STAGES
        if stage.name in chosen
    ]
    from qlora_exp.system.environment import git_state

    commit, changed = git_state(ROOT / "qlora_exp")
    call = Call(
        stages=stages,
        command_of=lambda name: [sys.executable, str(Path(__file__).resolve()), "--stage", name, *options],
        out=out,
        version=source_version(),
        resume=given.resume,
        call_seconds=None if given.call_seconds is None else given.call_seconds - (time.monotonic() - began),
        again=given.again,
        rehearsal=given.rehearse,
        environment=environment,
        at_once=2 if given.rehearse else 1,
        about={"commit": commit, "commit_changed": changed},
    )
    code = run(call)
    if code in (EXIT_OK, EXIT_FAILED):
        from gpu_kit.inputs import scratch_folder

        shutil.rmtree(out / "scratch" if given.rehearse else scratch_folder(), ignore_errors=True)
    return code


def run_one(name: str, out: Path, rehearse: bool) -> int:
    """Run a stage in this process."""
    stage = next(stage for stage in STAGES if stage.name == name)
    from qlora_exp.runs.process import silence_libraries

    silence_libraries()
    from gpu_kit.inputs import Kit

    shutil.rmtree(out / "outputs" / name, ignore_errors=True)  # a sweep would continue an earlier one
    if rehearse:
        from gpu_kit import mocked

        mocked.install()
    function = getattr(importlib.import_module(f"gpu_kit.{stage.module}"), stage.function)
    function(Kit(name, Findings(out / f"{name}.json"), out, rehearse))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
