"""What ``qlora-exp init`` writes: a small task of one's own, the settings to run it, and a README."""

from __future__ import annotations

from pathlib import Path

from qlora_exp.errors import QloraExpError

FILES = Path(__file__).resolve().parent / "files"


def write_starter(folder: Path) -> list[Path]:
    """Write the starter files into ``folder``, which may exist; nothing that is there is overwritten.

    Returns the written paths. Raises :class:`QloraExpError` where a file of that name is there already, or the folder
    can't be made; then nothing was written.
    """
    sources = sorted(path for path in FILES.iterdir() if path.is_file())
    there = [source.name for source in sources if (folder / source.name).exists()]
    if there:
        raise QloraExpError(
            f"{', '.join(there)} would be overwritten", str(folder.absolute()), "qlora-exp init NEW_FOLDER"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            (folder / source.name).write_bytes(source.read_bytes())
    except OSError as error:
        raise QloraExpError(
            f"the folder can't be written: {error.strerror}", str(folder.absolute()), "qlora-exp init OTHER_FOLDER"
        ) from None
    return [folder / source.name for source in sources]
