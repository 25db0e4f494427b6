"""The files of ``qlora-exp init``: a small task, the settings to run it, a sweep over it, and a README."""

from __future__ import annotations

from pathlib import Path

from qlora_exp.errors import QloraExpError

FILES = Path(__file__).resolve().parent / "starter"


def write_starter(folder: Path) -> list[Path]:
    """Write the starter files into ``folder``, which may exist, and return their paths.

    Raises:
        QloraExpError: a file of that name exists (then nothing is written), or the folder can't be written.
    """
    sources = {path.relative_to(FILES): path for path in sorted(FILES.rglob("*")) if path.is_file()}
    existing = [str(name) for name in sources if (folder / name).exists()]
    if existing:
        raise QloraExpError(
            f"{', '.join(existing)} would be overwritten", str(folder.absolute()), "qlora-exp init NEW_FOLDER"
        )
    try:
        for name, source in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read_bytes())
    except OSError as error:
        raise QloraExpError(
            f"the folder can't be written: {error.strerror}", str(folder.absolute()), "qlora-exp init OTHER_FOLDER"
        ) from None
    return [folder / name for name in sources]
