"""Files in other people's formats."""

from __future__ import annotations

import json

import pytest

from smolora.data.tables import READERS, read_table, splits_of

RECORDS = [{"question": "Which\ncolour, then?", "answer": "red"}, {"question": "é", "answer": '"'}]


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("ending", READERS)
def test_every_format_gives_the_same_records(tmp_path, ending):
    assert read_table(write(tmp_path / f"x{ending}", RECORDS)) == RECORDS


def save_like_datasets(folder, records):
    """The files of `datasets.Dataset.save_to_disk`, in two shards."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(records)
    names = []
    for part in range(len(records)):
        names.append({"filename": f"data-{part:05}-of-{len(records):05}.arrow"})
        path = str(folder / names[-1]["filename"])
        with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(part, 1))
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))


def test_a_folder_of_datasets(tmp_path):
    save_like_datasets(tmp_path / "one", RECORDS)
    assert splits_of(tmp_path / "one") == {"": (tmp_path / "one",)} and read_table(tmp_path / "one") == RECORDS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert splits_of(tmp_path) == {"train": (tmp_path / "train",), "test": (tmp_path / "test",)}


def test_datasets_own_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "d")
    ((path,),) = splits_of(tmp_path / "d").values()
    assert read_table(path) == RECORDS


def test_a_folder_with_a_file_for_each_split(tmp_path):
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.csv"]
    shards = [write(tmp_path / name, RECORDS) for name in names]
    assert splits_of(tmp_path) == {"train": tuple(shards[:2]), "val": (shards[2],)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "", r"x\.txt: must end with \.json, \.jsonl"),
        ("x.json", "{}", "must hold a list of records"),
        ("x.json", "[1]", "record 0: must be an object, got 1"),
        ("x.json", "[]", "must hold a record, got none"),
        ("x.jsonl", '{"a": 1}\n{', "line 2: not JSON"),
        ("x.csv", "a,a\n1,2\n", "columns must have different names, got a, a"),
        ("x.csv", "a,b\n1\n", "line 2: must have 2 cells, got 1"),
        ("x.csv", 'a\n"x', "line 2: unexpected end of data"),
        ("x.parquet", "a", "not Parquet"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_table(tmp_path / name)
    assert name in str(error.value)


def test_what_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        splits_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a folder that datasets saved, or have a file named train"):
        splits_of(tmp_path)


def test_a_list_under_a_key(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": RECORDS}))
    assert read_table(tmp_path / "x.json") == RECORDS
