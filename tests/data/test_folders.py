"""A folder's data files are all read as the split that their names say, or the task is refused: none is ignored."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qlora_exp.config.enums import InvalidRows
from qlora_exp.data.splits import RawSplits, load_rows
from qlora_exp.errors import DataError, Problems, QloraExpError

Configure = Callable[..., Any]
SPLITS = ("train", "validation", "test")


def rows_of(start: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(start, start + count)]


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_delimited(rows: list[dict[str, Any]], mark: str) -> bytes:
    return "\n".join(mark.join(row) for row in [["prompt", "completion"], *map(dict.values, rows)]).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


def as_feather(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: as_delimited(rows, ","),
    ".tsv": lambda rows: as_delimited(rows, "\t"),
    ".parquet": as_parquet,
    ".feather": as_feather,
}
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = path.suffix.lower() if path.suffix.lower() in PACKERS else ""
    ending = (Path(path.stem) if packed else path).suffix.lower()
    content = WRITERS[ending](rows)
    path.write_bytes(PACKERS[packed](content) if packed else content)


def write_all(folder: Path, names: list[str]) -> None:
    """Each file with rows that no other has."""
    for number, name in enumerate(names):
        if Path(name).suffix.lower() in (*WRITERS, *PACKERS):
            write(folder / name, rows_of(100 * number, 10))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}" if name.endswith(".json") else "text")


def origins(rows: RawSplits, split: str) -> list[str]:
    return list(dict.fromkeys(example.file for example in getattr(rows, split)))


LAYOUTS = {
    "capitals": (["train.jsonl"], ["Validation.jsonl"], ["TEST.JSONL"]),
    "compressed": (["train.jsonl.gz"], ["validation.csv.bz2"], ["test.json.xz"]),
    "zstandard": (["train.jsonl.zst"], ["validation.parquet"], ["test.tsv"]),
    "other kinds": (["train.ndjson"], ["validation.feather"], ["test.tsv.gz"]),
    "the Hub's shards": (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["validation-00000-of-00001.parquet"],
        ["test-00000-of-00001-a09b74b3ef9c3b56.parquet"],
    ),
    "the Hub's folder": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/validation-00000-of-00001.jsonl"],
        ["data/test.jsonl"],
    ),
    "numbers": ([f"train_{n}.jsonl" for n in range(11)], ["validation1.jsonl", "validation2.jsonl"], ["test.0.csv"]),
    "counted from 1": (["train-1-of-2.csv", "train-2-of-2.csv"], ["validation.csv"], ["test.csv"]),
    "folders": (
        ["train/part-2.jsonl", "train/part-10.jsonl"],
        ["Validation/anything.csv"],
        ["test/more/a.json", "test/more/b.json"],
    ),
    "folders in data": (["data/train/a.parquet"], ["data/validation/a.parquet"], ["data/test/a.parquet"]),
    "a folder that Spark wrote": (["train.parquet/part-00000-x.snappy.parquet"], ["validation.csv"], ["test.csv"]),
}
HARMLESS = [
    *("README.md", ".gitattributes", "LICENSE", "LICENSE.txt", "dataset_infos.json", "train.py", "test.log"),
    *("train.yaml", "labels.json", ".train.jsonl", "._train.jsonl", "notes.txt", "picture.png", "config.json"),
    *("filter_report.json", "dataset_manifest.json", "train.jsonl.bak", "test.jsonl~", "test.jsonl.md5"),
    *("validation/a.py", "validation/a.txt", "test/.gitkeep"),
    *("outputs/mlflow.db", "outputs/runs/x/items_before_test.parquet", "src/package.json", "_SUCCESS"),
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_file_of_a_split_is_read_in_order_and_names_its_rows(
    layout: tuple[list[str], ...], tmp_path: Path, configure: Configure
) -> None:
    write_all(tmp_path, [name for names in layout for name in names])
    rows = load_rows(configure(tmp_path).task)
    for split, names in zip(SPLITS, layout, strict=True):
        assert origins(rows, split) == names
        assert len(getattr(rows, split)) == 10 * len(names)
    ids = [example.item_id for split in SPLITS for example in getattr(rows, split)]
    assert len(set(ids)) == len(ids)


def test_files_that_are_evidently_no_data_are_left_alone(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train.jsonl", "test.jsonl"])
    for name in HARMLESS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('["a", "b"]' if name == "labels.json" else "{}")
    rows = load_rows(configure(tmp_path).task)
    assert len(rows.train) + len(rows.validation) == len(rows.test) == 10


REFUSED = {
    "other names": (["train.jsonl", "holdout.jsonl", "testing.jsonl"], ("holdout.jsonl would", "testing.jsonl would")),
    "one other name": (["train.jsonl", "val.parquet"], ("rename it to validation.parquet",)),
    "an ambiguous name": (["train.jsonl", "eval.csv"], ("rename it to validation.csv or to test.csv",)),
    "other shards": (["train.csv", "dev-00000-of-00001.csv"], ("rename it to validation-00000-of-00001.csv",)),
    "an unknown name": (["train.jsonl", "extra.csv"], ("extra.csv would not be read", "move it out")),
    "JSON rows of an unknown name": (["train.jsonl", "more.json"], ("more.json would not be read",)),
    "a version": (["train.jsonl", "train_clean.jsonl"], ("train_clean.jsonl would not be read",)),
    "compressed, of another name": (["train.jsonl", "dev.jsonl.gz"], ("rename it to validation.jsonl.gz",)),
    "an archive": (["train.jsonl", "validation.zip"], ("validation.zip would not be read", "save it as")),
    "a spreadsheet": (["train.jsonl", "test.xlsx"], ("test.xlsx would not be read",)),
    "a download that was cut off": (["train.jsonl", "validation.jsonl.part"], ("validation.jsonl.part would not",)),
    "a backup of a split that isn't there": (["train.csv", "test.csv.bak"], ("test.csv.bak would not be read",)),
    "another tool's ending": (["train.jsonl", "validation.jsonlines"], ("rename it to validation.jsonl",)),
    "a short ending": (["train.jsonl", "test.pq"], ("rename it to test.parquet",)),
    "an archive in a split's folder": (["train/a.jsonl", "train/b.zip"], ("train/b.zip would not be read",)),
    "a cut-off file in a split's folder": (["train/a.csv", "train/b.csv.tmp"], ("train/b.csv.tmp would not be read",)),
    "plain text in a split's folder": (["train.csv", "test/a.txt"], ("the folder test holds no file that is read",)),
    "two folders of a split": (
        ["train/a.csv", "data/train/a.csv"],
        ("two sources for train: the folders data/train and train",),
    ),
    "plain text": (["train.jsonl", "test.txt"], ("test.txt would not be read",)),
    "one shard of two": (["train.jsonl", "train-00001-of-00002.jsonl"], ("two files for train",)),
    "a missing shard": (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], ("2 of 3 shards", "missing: 1")),
    "a missing test shard": (["train.csv", "test-00001-of-00002.csv"], ("test has 1 of 2 shards", "missing: 0")),
    "two sets of shards": (["train-0-of-1.csv", "train-0-of-2.csv", "train-1-of-2.csv"], ("different sets",)),
    "a shard in two kinds": (["train-0-of-1.csv", "train-0-of-1.json"], ("two files for train, shard 0",)),
    "numbers with a gap": (["train_0.csv", "train_2.csv"], ("aren't numbered from 0 or 1",)),
    "lengths": (["train_512.csv", "train_1024.csv"], ("aren't numbered from 0 or 1",)),
    "a version number": (["train.csv", "train2.csv"], ("two files for train",)),
    "file and folder": (["train.csv", "train/a.csv"], ("two sources for train", "keep one")),
    "a folder of another name": (["train.csv", "dev/a.csv"], ("the folder dev would not be read", "to validation")),
    "a folder of two kinds": (["train/a.csv", "train/a.jsonl"], (".csv and .jsonl",)),
    "a missing shard in a folder": (["train/data-00001-of-00002.csv"], ("1 of 2 shards", "missing: 0")),
    "configurations": (["main/train.csv", "socratic/train.csv"], ("no train file", "task.path=", "socratic")),
    "a configuration more": (["train.csv", "other/test.csv"], ("the folder other would not be read",)),
    "no train but training": (["training.csv", "test.csv"], ("no train file", "rename it to train.csv")),
    "capitals twice": (["train.csv", "TRAIN.csv"], ("two files for train",)),
    "packed and not": (["train.csv", "train.csv.gz"], ("two files for train",)),
}


@pytest.mark.parametrize(("names", "says"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_would_not_be_read_is_named(
    names: list[str], says: tuple[str, ...], tmp_path: Path, configure: Configure
) -> None:
    write_all(tmp_path, names)
    with pytest.raises((DataError, Problems)) as error:
        load_rows(configure(tmp_path, invalid_rows=InvalidRows.drop).task)
    for part in (*says, "do:  "):
        assert part in str(error.value)


def test_a_link_to_nothing_is_named(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train.jsonl"])
    (tmp_path / "more.json").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"more\.json would not be read"):
        load_rows(configure(tmp_path).task)


def test_one_shard_is_no_data_set(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train-00000-of-00002.jsonl"])
    with pytest.raises(DataError, match="one of 2 shards") as error:
        load_rows(configure(tmp_path / "train-00000-of-00002.jsonl").task)
    assert f"task.path={tmp_path}" in str(error.value)


def test_a_file_named_by_itself_says_which_splits_it_leaves_out(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train.jsonl", "test.jsonl.gz", "other.jsonl"])
    [note] = load_rows(configure(tmp_path / "train.jsonl").task).notes
    assert "not read: test.jsonl.gz" in note
    assert load_rows(configure(tmp_path / "other.jsonl").task).notes == ()


@pytest.mark.parametrize("ending", PACKERS)
def test_a_torn_compressed_file_is_named(ending: str, tmp_path: Path, configure: Configure) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(PACKERS[ending](as_jsonl(rows_of(0, 500)))[:-20])
    with pytest.raises(DataError, match=f"can't be unpacked as {ending}"):
        load_rows(configure(path).task)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", gzip.compress(b"{}"), "add .gz to its name"),
        ("rows.csv", b"PK\x03\x04....", "ZIP archive or a spreadsheet"),
        ("rows.jsonl", as_parquet(rows_of(0, 3)), "name it .parquet"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ("rows.csv", b"<!DOCTYPE html>\n<html></html>", "a web page"),
    ],
    ids=["gzip", "zip", "parquet", "git-lfs", "web page"],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(
    name: str, content: bytes, says: str, tmp_path: Path, configure: Configure
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(configure(tmp_path / name).task)
    assert says in str(error.value)


def saved(folder: Path, splits: tuple[str, ...]) -> Path:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.ClassLabel(names=["neg", "pos"])}
    )
    columns = {
        split: {"prompt": [f"{split} {n}" for n in range(12)], "completion": [n % 2 for n in range(12)]}
        for split in splits
    }
    read = {split: datasets.Dataset.from_dict(values, features=features) for split, values in columns.items()}
    datasets.DatasetDict(read).save_to_disk(folder, num_shards=dict.fromkeys(splits, 2))
    return folder


def test_a_data_set_saved_by_datasets_is_read_with_its_class_names(tmp_path: Path, configure: Configure) -> None:
    folder = saved(tmp_path / "d", SPLITS)
    (folder / "train" / "cache-0123456789abcdef.arrow").write_bytes(b"of an earlier map()")
    rows = load_rows(configure(folder, kind="classification").task)
    assert [len(getattr(rows, split)) for split in SPLITS] == [12, 12, 12]
    assert set(rows.options) == {"neg", "pos"}
    assert origins(rows, "train") == ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"]
    one = load_rows(configure(folder / "train", kind="classification").task)
    assert len(one.train) + len(one.validation) + len(one.test) == 12


@pytest.mark.parametrize(
    ("splits", "removed", "says"),
    [
        (("train", "unsupervised"), None, "the split 'unsupervised' would not be read"),
        (("test",), None, "no split 'train'"),
        (("train", "test"), "test", "the split 'test' is missing"),
        (("train", "test"), "test/data-00001-of-00002.arrow", "1 of 2 files of the saved data set are missing"),
    ],
)
def test_a_saved_data_set_is_read_whole_or_refused(
    splits: tuple[str, ...], removed: str | None, says: str, tmp_path: Path, configure: Configure
) -> None:
    folder = saved(tmp_path / "d", splits)
    if removed:
        place = folder / removed
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(QloraExpError) as error:
        load_rows(configure(folder).task)
    assert says in str(error.value)


def test_an_empty_folder_of_a_split_is_refused(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train.jsonl"])
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match="the folder validation is empty"):
        load_rows(configure(tmp_path).task)


def test_links_to_folders_are_followed_and_a_loop_is_read_once(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path / "elsewhere", ["part.jsonl", "deep/part.jsonl"])
    task = tmp_path / "task"
    write(task / "train" / "a.jsonl", rows_of(500, 10))
    write(task / "test.jsonl", rows_of(700, 10))
    (task / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (task / "train" / "again").symlink_to(task / "train")
    rows = load_rows(configure(task).task)
    assert {example.file for example in (*rows.train, *rows.validation)} == {
        *("train/a.jsonl", "train/linked/part.jsonl", "train/linked/deep/part.jsonl")
    }
    assert len(rows.train) + len(rows.validation) == 30


def test_backups_and_arrays_beside_the_files_of_a_split_are_left_alone(tmp_path: Path, configure: Configure) -> None:
    write_all(tmp_path, ["train/a.jsonl", "test/b.jsonl"])
    for name in ("a.jsonl.bak", "a.jsonl~", "a.jsonl.sha256", "vectors.npy", "README.txt", "_SUCCESS"):
        (tmp_path / "train" / name).write_text("x")
    rows = load_rows(configure(tmp_path).task)
    assert len(rows.train) + len(rows.validation) == len(rows.test) == 10
