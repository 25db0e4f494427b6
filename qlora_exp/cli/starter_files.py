"""What ``qlora-exp init`` writes: a small task of one's own, the settings to run it, a sweep over it, and a README."""

from __future__ import annotations

from pathlib import Path

from qlora_exp.errors import QloraExpError

FILES = Path(__file__).resolve().parent / "starter"


def write_starter(folder: Path) -> list[Path]:
    """Write the starter files into ``folder``, which may exist; nothing that is there is overwritten.

    Returns the written paths. Raises :class:`QloraExpError` where a file of that name is there already, or the folder
    can't be made; then nothing was written.
    """
    sources = {path.relative_to(FILES): path for path in sorted(FILES.rglob("*")) if path.is_file()}
    there = [str(name) for name in sources if (folder / name).exists()]
    if there:
        raise QloraExpError(
            f"{', '.join(there)} would be overwritten", str(folder.absolute()), "qlora-exp init NEW_FOLDER"
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
