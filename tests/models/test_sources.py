"""Sources: what each format gives, and what is wrong with a file in one sentence."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from edgepress.errors import EdgepressError, InputError
from edgepress.models import media, sources
from edgepress.models.sources import Table, idx, table
from PIL import Image


def texts_and_labels(path: Path) -> tuple[list[Any], list[Any]]:
    found = sources.read(str(path), {})
    columns = [list(sources.column(found, name, {})) for name in ("text", "label")]
    return columns[0], [str(label) for label in columns[1]]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_every_format_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    lines = {
        ".csv": 'text,label\n"a, b",1\nnull,0\n',
        ".tsv": "text\tlabel\na, b\t1\nnull\t0\n",
        ".jsonl": '{"text": "a, b", "label": 1}\n{"text": "null", "label": 0}\n',
    }
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pd.DataFrame({"text": ["a, b", "null"], "label": [1, 0]}).to_parquet(path)
    else:
        path.write_text(lines[suffix])
    assert texts_and_labels(path) == (["a, b", "null"], ["1", "0"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("b.csv", "text,label\n", "no rows"),
        ("c.csv", "review,stars\ngood,1\n", "no column 'text'.*review, stars"),
        ("e.csv", 'text,label\n"open,1\n', "cannot be read"),
        ("f.jsonl", "{not json}\n", "cannot be read"),
        ("g.xlsx", "x", "not something that rows are read from"),
        ("h.parquet", "PAR1 no", "cannot be read"),
        ("i.npz", "PK no", "cannot be read as arrays"),
        ("j.csv", "text,label\ncaf\xe9,1\n", "not UTF-8 text, from line 2 on"),
        ("k.csv", "text,label\na, b,1\nc,0\n", "more fields than its first line has names"),
        ("l.jsonl", '[{"text": "a", "label": 1}]', "no column 'text'"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(EdgepressError, match=message):
        texts_and_labels(path)


def test_columns_beside_the_fields_are_read_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2], "y": 3, "label": 1}\n{"x": [3, 4], "y": 5, "label": 0}\n')
    found = sources.read(str(tmp_path / "a.jsonl"), {"x": "x"}).columns
    assert found == {"x": [[1, 2], [3, 4]], "y": [None, None], "label": [1, 0]}


def test_tables_that_hold_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 9)
    content = (tmp_path / "a.png").read_bytes()
    for cell in (content, {"bytes": content, "path": "a.png"}, {"bytes": None, "path": "a.png"}, "a.png"):
        pd.DataFrame({"image": [cell], "label": [1]}).to_parquet(tmp_path / "a.parquet")
        (found,) = sources.read(str(tmp_path / "a.parquet"), {}).columns["image"]
        assert media.digest(found) == media.digest(content)
        assert media.pixels(found, (3, 4, 4))[0, 0].tolist() == [9, 0, 0]
        assert media.pixels(found, (1, 4, 4)).shape == (4, 4)
    with pytest.raises(InputError, match="holds float64, not bytes"):
        media._opened(np.zeros((4, 4)), "L")


def test_a_table_larger_than_what_is_kept_is_sampled_whatever_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MOST_ROWS", 50)
    monkeypatch.setattr(table, "PIECE", 16)
    lines = [f"text {row},{row % 2}" for row in range(1000)]
    for name, order in (("a.csv", lines), ("b.csv", lines[::-1])):
        (tmp_path / name).write_text("\n".join(["text,label", *order]))
    first, second = (texts_and_labels(tmp_path / name)[0] for name in ("a.csv", "b.csv"))
    assert len(first) == 50
    assert first == second[::-1], "the same rows, in the order of their file"
    assert first != [f"text {row}" for row in range(50)]


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.ones((3, 2)), label=np.arange(3))
    assert {name: len(values) for name, values in sources.read(str(tmp_path / "good.npz"), {}).columns.items()} == {
        "x": 3,
        "label": 3,
    }
    np.savez(tmp_path / "uneven.npz", x=np.ones((3, 2)), label=np.arange(4))
    with pytest.raises(InputError, match="x 3, label 4"):
        sources.read(str(tmp_path / "uneven.npz"), {})
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as arrays"):
        sources.read(str(tmp_path / "objects.npz"), {})
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="cannot be read as arrays"):
        sources.read(str(tmp_path / "pickle.npz"), {})


def write_idx(path: Path, array: Any) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(header + array.astype(np.uint8).tobytes())


def test_idx_files_with_their_own_split(tmp_path: Path) -> None:
    images = np.arange(5 * 4 * 3).reshape(5, 4, 3)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(5))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:2])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(2))
    found = sources.read(str(tmp_path), {})
    np.testing.assert_array_equal(found.columns["image"], np.concatenate([images, images[:2]]))
    assert found.held_out is not None
    assert found.held_out.tolist() == [False] * 5 + [True] * 2
    whole = (tmp_path / "t10k-images-idx3-ubyte").read_bytes()
    for damaged, message in (
        (whole[:-1], "cut short"),
        (b"\1\2" + whole, "not an idx file"),
        (whole[:9], "not an idx"),
    ):
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            sources.read(str(tmp_path), {})
    huge = b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31)
    (tmp_path / "huge-idx3-ubyte").write_bytes(huge)
    with pytest.raises(InputError, match="cut short"):
        idx.decode(tmp_path / "huge-idx3-ubyte")


def test_saved_datasets_with_splits_names_and_images(tmp_path: Path) -> None:
    import datasets

    def part(count: int) -> Any:
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["cat", "dog"]),
                "text": datasets.Value("string"),
            }
        )
        images = [Image.new("RGB", (3, 2), (row, 0, 0)) for row in range(count)]
        rows = {
            "image": images,
            "label": [row % 2 for row in range(count)],
            "text": [f"t{row}" for row in range(count)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": part(4), "test": part(2), "validation": part(3)}).save_to_disk(tmp_path / "set")
    found = sources.read(str(tmp_path / "set"), {})
    assert found.label_names == ("cat", "dog")
    assert found.held_out is not None
    assert found.held_out.sum() == 2
    assert len(found) == 6
    assert found.columns["text"][1] == "t1"
    assert np.asarray(Image.open(io.BytesIO(found.columns["image"][3])))[0, 0].tolist() == [3, 0, 0]
    datasets.DatasetDict({"train": part(4), "unsupervised": part(2), "val": part(3)}).save_to_disk(tmp_path / "val")
    found = sources.read(str(tmp_path / "val"), {})
    assert found.held_out is not None
    assert found.held_out.tolist() == [False] * 4 + [True] * 3
    datasets.DatasetDict({"test": part(4)}).save_to_disk(tmp_path / "alone")
    found = sources.read(str(tmp_path / "alone"), {})
    assert (len(found), found.held_out) == (4, None)
    (tmp_path / "set" / "train" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as a saved dataset"):
        sources.read(str(tmp_path / "set"), {})


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def test_folders_of_images(tmp_path: Path) -> None:
    for held in ("test", "val"):
        for number, name in enumerate(["train/cat/a.png", "train/dog/b.png", f"{held}/cat/c.jpg"]):
            picture(tmp_path / held / name, number)
        found = sources.read(str(tmp_path / held), {})
        assert list(found.columns["label"]) == ["cat", "dog", "cat"]
        assert found.held_out is not None
        assert found.held_out.tolist() == [False, False, True]
        assert found.label_names == ("cat", "dog")
    (tmp_path / "val" / "train" / "metadata.csv").write_text("file_name,label\ncat/a.png,dog\n")
    (tmp_path / "val" / "val" / "metadata.csv").write_text("file_name,label\ncat/c.jpg,cat\n")
    assert list(sources.read(str(tmp_path / "val"), {}).columns["label"]) == ["dog", "cat"]
    (tmp_path / "val" / "val" / "metadata.csv").write_text("file_name,text\ncat/c.jpg,a cat\n")
    with pytest.raises(InputError, match="differ in what they have: image, label and image, text"):
        sources.read(str(tmp_path / "val"), {})
    picture(tmp_path / "flat" / "a.png")
    assert set(sources.read(str(tmp_path / "flat"), {}).columns) == {"image"}
    picture(tmp_path / "flat" / "cat" / "b.png")
    with pytest.raises(InputError, match="in no class's folder"):
        sources.read(str(tmp_path / "flat"), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        sources.read(str(tmp_path / "empty"), {})


def test_metadata_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "other.png")
    (tmp_path / "one" / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    found = sources.read(str(tmp_path / "one"), {})
    assert found.columns["image"] == [tmp_path / "one" / "a.png"]
    assert found.columns["label"] == ["cat"]
    for name in ("nowhere.png", "../other.png", "/etc/hostname"):
        (tmp_path / "one" / "metadata.csv").write_text(f"file_name,label\n{name},cat\n")
        with pytest.raises(InputError, match="not a file in its folder"):
            sources.read(str(tmp_path / "one"), {})


def recording(path: Path, rate: int, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(int(rate * seconds)) / rate
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((16384 * np.sin(2 * np.pi * 440 * times)).astype("<i2").tobytes())


def test_recordings_are_resampled(tmp_path: Path) -> None:
    for rate in (16000, 48000):
        recording(tmp_path / f"{rate}.wav", rate)
    low, high = (media.samples_of(tmp_path / f"{rate}.wav", 16000) for rate in (16000, 48000))
    assert len(low) == len(high) == 8000
    assert np.corrcoef(low, high)[0, 1] > 0.999
    assert 0.49 < low.max() < 0.51
    decoded = {"array": media.samples_of(tmp_path / "48000.wav", 48000), "sampling_rate": 48000}
    np.testing.assert_array_equal(media.samples_of(decoded, 16000), high)
    (tmp_path / "bad.wav").write_bytes(b"RIFF no")
    with pytest.raises(InputError, match=r"bad\.wav cannot be read as a recording"):
        media.samples_of(tmp_path / "bad.wav", 16000)


def test_functions_that_return_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_rows.py").write_text(
        "def listed():\n    return [{'text': 'a', 'label': 1}, {'text': 'b', 'label': 0}]\n"
        "def columns():\n    return {'text': ['a', 'b'], 'label': [1, 0]}\n"
        "def wrong():\n    return {'text': ['a'], 'label': [1, 0]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("listed", "columns"):
        found = sources.read(f"made_rows:{name}", {})
        assert list(found.columns["text"]) == ["a", "b"]
        assert list(found.columns["label"]) == [1, 0]
    with pytest.raises(InputError, match="columns of one length"):
        sources.read("made_rows:wrong", {})


def test_every_source_file_is_listed() -> None:
    folder = Path(sources.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(sources.SOURCES)
    assert len(Table("nothing", {})) == 0
