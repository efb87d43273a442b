"""Records in every format -> examples and prompts; every kind of bad record is one line with its file and place."""
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sophiavl_fast.data import parquet
from sophiavl_fast.data.dataset import BadRecord, Dataset, problem_type
from sophiavl_fast.errors import UserError
from tests.data.conftest import picture, record


def opened(store, name: str, **kwargs) -> Dataset:
    return Dataset.open(name, store.registry, **({"template": "plain"} | kwargs))


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_formats_give_the_same_examples(store, kind):
    path = store.image("im/a.png")
    rows = [record(5, path=path, data_type="image", options=["x", "y"], problem_type="multiple choice", solution="<answer>B</answer>", process="because"),
            record(6, path="")]
    dataset = opened(store, store.add("set", rows, kind))
    first, second = dataset.example(0), dataset.example(1)
    assert (first.id, first.problem_type, first.gold, first.options, first.process) == ("5", "multiple_choice", "B", ["x", "y"], "because")
    assert [i.path for i in first.images] == [str(store.folder / path)] and second.images == []
    assert first.record["data_source"] == "test" and first.record["path"] == [str(store.folder / path)]
    assert first.where == f"{store.folder}/set.{kind}" + (":1" if kind == "jsonl" else "[0]")


def test_prompt(store, processor):
    path = store.image("a.png")
    dataset = opened(store, store.add("set", [record(5, path=path, data_type="image", extra={"a": [1]})]))
    prompt = dataset.prompt(0, processor)
    assert (prompt.id, prompt.dataset, prompt.question, prompt.gold) == ("set:5", "set", "What is 5?", "5")
    assert prompt.token_ids.count(processor.image_token_id) == 1 == len(prompt.images)
    assert prompt.expanded_ids.count(processor.image_token_id) == prompt.image_grid_thw.prod() // 4
    assert prompt.image_paths == [str(store.folder / path)] and prompt.record["extra"] == {"a": [1]}
    json.dumps(prompt.record)


def test_text_only_gets_no_image(store, processor):
    prompt = opened(store, store.add("set", [record(1)])).prompt(0, processor)
    assert prompt.images == [] and prompt.pixel_values is None and processor.image_token_id not in prompt.expanded_ids


def test_many_images_in_the_order_of_their_marks(store, processor):
    paths = [store.image(f"{i}.png", picture(i, 56 + 28 * i, 56)) for i in range(8)]
    dataset = opened(store, store.add("set", [record(1, path=paths, problem="<image>" * 8 + "?"), record(2, path=paths)]))
    marked, unmarked = dataset.prompt(0, processor), dataset.prompt(1, processor)
    assert marked.image_grid_thw[:, 1].tolist() == [4 + 2 * i for i in range(8)]
    assert torch.equal(marked.pixel_values, unmarked.pixel_values)


def test_bytes_images_in_parquet(store, processor):
    out = io.BytesIO()
    picture(3).save(out, "PNG")
    rows = [record(1, path=[{"bytes": out.getvalue(), "path": "gone.png"}] * 2, data_type="image")]
    prompt = opened(store, store.add("set", rows, "parquet")).prompt(0, processor)
    assert len(prompt.images) == 2 and prompt.image_paths == ["", ""]
    path = store.image("same.png", picture(3))
    same = opened(store, store.add("other", [record(1, path=[path, path])])).prompt(0, processor)
    assert torch.equal(prompt.pixel_values, same.pixel_values)
    json.dumps(prompt.record)


def test_other_columns(store):
    columns = {"q": "prompt", "label": "answer", "pics": "images", "kind": "problem_type"}
    store.add("set", [{"q": "2+2?", "label": 4, "kind": "OCR", "pics": []}], columns=columns)
    example = opened(store, "set").example(0)
    assert (example.problem, example.gold, example.problem_type, example.id) == ("2+2?", "4", "ocr", "#0")


def test_entry_extensions(store):
    row = record(1, problem_type="")
    store.add("set", [row, record(2, reasoning_check="own")], template="sophia", problem_type="text", reasoning_check="rule")
    dataset = opened(store, "set")
    assert dataset.template.name == "sophia" and dataset.example(0).problem_type == "text"
    assert [dataset.example(i).record["reasoning_check"] for i in (0, 1)] == ["rule", "own"]


@pytest.mark.parametrize("name,normal", [
    ("multiple choice", "multiple_choice"), ("Multiple-Choice", "multiple_choice"), ("multiple_choice", "multiple_choice"), ("numerical", "numerical"),
    ("OCR", "ocr"), ("ocr", "ocr"),
    ("free-form", "free_form"), ("free_form", "free_form"), ("freeform", "free_form"), ("caption", "free_form"), ("text", "text"),
])
def test_problem_types(name, normal):
    assert problem_type(name) == normal


BAD = {
    "unknown problem_type 'numeric'; did you mean 'numerical'": {"problem_type": "numeric"},
    "no problem_type; valid: numerical, multiple_choice": {"problem_type": None},
    "record without solution ('solution' is missing)": {"solution": None},
    "record without solution ('solution' is empty)": {"solution": "<answer> </answer>"},
    "empty question ('problem')": {"problem": "  "},
    "'problem' must be text, not list": {"problem": ["a"]},
    "'options' must be a list, not str": {"options": "a, b"},
    "option 2 of 'options' is missing": {"options": ["a", None]},
    "option 1 of 'options' is missing": {"options": [float("nan")]},
    "'options[1]' must be text, not list": {"options": ["a", ["b"]]},
    "'options[0]' must be text, not bool": {"options": [True, False]},
    "'options' holds 27 options; letters name at most 26": {"options": [str(i) for i in range(27)], "problem_type": "multiple choice"},
    "'solution' is missing": {"solution": float("nan")},
    "'solution' must be text, not bool": {"solution": True},
    "empty question": {"problem": float("nan")},
    "'problem' must be text, not bool": {"problem": False},
    "'solution' holds a stray <answer>: expected one <answer>..</answer>": {"solution": "<answer>5"},
    "'solution' holds a stray </answer>": {"solution": "5</answer>"},
    "'solution' holds a stray </ANSWER>": {"solution": "<answer>5</answer> or 6</ANSWER>"},
    "'solution' holds a stray < answer >": {"solution": "< answer >5</answer>"},
    "no problem_type": {"problem_type": float("nan")},
    "1 <image> placeholders for 0 images": {"problem": "<image> what?"},
    "data_type is 'image', but 'path' names none": {"data_type": "image"},
    "does not exist": {"path": "none.png"},
    "leaves its base folder": {"path": "../../etc/passwd"},
    "is a URL": {"path": "https://x.org/a.png"},
    "image 1: a path holds no null character": {"path": "a\0b.png"},
    "'problem' holds half a surrogate pair": {"problem": "what? \ud800"},
    "'solution' holds half a surrogate pair": {"solution": "\udc00"},
    "image 1: a path holds no half of a surrogate pair": {"path": "a\ud83d.png"},
    "'problem_id' holds half a surrogate pair": {"problem_id": "a\ud83d"},
    "is corrupt": {"path": "broken.png"},
    "problem_id 1 is that of": {"problem_id": 1},
    "more than data.max_prompt_tokens = 300": {"problem": "x" * 300},
    "holds the special token '<|im_end|>'": {"problem": "stop <|im_end|>"},
}


@pytest.mark.parametrize("solution,gold", [
    ("<ANSWER> 5 </ANSWER>", "5"), ("<Answer>a\nb</answer>", "a\nb"), ("so <answer>5</answer>", "5"), (5, "5"), (0.5, "0.5"),
])
def test_gold_answers(store, solution, gold):
    assert opened(store, store.add("set", [record(1, solution=solution)])).example(0).gold == gold


def test_nan_in_a_table_is_a_missing_value(store):
    """As pandas writes a column in which some values are missing."""
    rows = [record(1.0, solution=4.0, process=float("nan"), path=float("nan"), options=float("nan")), record(float("nan"), solution=float("nan"))]
    for row in rows:
        row |= {"process": float("nan"), "path": float("nan"), "options": float("nan")}
    dataset = opened(store, store.add("set", [*rows, record(float("nan")) | rows[0] | {"problem_id": float("nan")}], "parquet"))
    first, third = dataset.example(0), dataset.example(2)
    assert (first.gold, first.process, first.images, first.options, third.id) == ("4.0", "", [], [], "#2")
    with pytest.raises(BadRecord, match=r"set.parquet\[1\]: record without solution \('solution' is missing\)"):
        dataset.example(1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_is_not_there(store, kind):
    store.add("set", [{"question": "2+2?", "label": "4", "problem_type": "OCR"}], kind, columns={"qestion": "prompt", "label": "answer"})
    with pytest.raises(BadRecord, match="no column 'qestion', the record's question; did you mean 'question'"):
        opened(store, "set").example(0)
    store.add("set", [{"problem": "2+2?", "solutions": "4", "problem_type": "OCR"}], kind)
    with pytest.raises(BadRecord, match="no column 'solution', the record's solution; did you mean 'solutions'"):
        opened(store, "set").example(0)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("message", BAD)
def test_bad_records(store, processor, message, kind):
    (store.folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    store.add("set", [record(1), record(2, **BAD[message])], kind)
    dataset = opened(store, "set")
    dataset.prompt(0, processor, 300)
    with pytest.raises(BadRecord) as error:
        dataset.prompt(1, processor, 300)
    text = str(error.value)
    assert text.startswith(f"{store.folder}/set.{kind}" + (":2: " if kind == "jsonl" else "[1]: ")) and message in text and "\n" not in text


def test_jsonl_lines_are_counted_with_blank_and_broken_ones(store):
    store.add("set", [json.dumps(record(1)) + "\n", "\n", "{broken\n", "[1]\n", json.dumps(record(2))])
    dataset = opened(store, "set")
    assert len(dataset) == 4 and dataset.example(3).where.endswith("set.jsonl:5")
    with pytest.raises(BadRecord, match=r"set.jsonl:3: not JSON"):
        dataset.example(1)
    with pytest.raises(BadRecord, match=r"set.jsonl:4: expected a record, not list"):
        dataset.example(2)


def test_a_file_that_is_not_there_names_what_is(store):
    store.add("set", [record(1)])
    (store.folder / "json").mkdir()
    (store.folder / "json" / "thinking_156k.json").write_text("[]")
    store.add("gone", [], "json", file_path="json/thinking.json")
    (store.folder / "json" / "thinking.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"json/thinking.json' does not exist; did you mean '.*/json/thinking_156k.json'"):
        opened(store, "gone")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_file_that_may_not_be_read_is_one_line(store, monkeypatch, kind):
    """As an ordinary user meets it; these tests may run as root, for whom no file is locked."""
    store.add("set", [record(1)], kind)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("os.open", "pathlib.Path.read_bytes", "pyarrow.parquet.read_metadata"):
        monkeypatch.setattr(name, refuse)
    with pytest.raises(UserError, match=rf"data file '.*set.{kind}' cannot be read( as parquet)?: .*Permission denied"):
        opened(store, "set")


def test_a_folder_that_may_not_be_looked_into_is_one_line(store, locked):
    store.add("set", [record(1)], file_path="locked/set.jsonl")
    with pytest.raises(UserError, match=r"data file '.*locked/set.jsonl' cannot be read: Permission denied"):
        opened(store, "set")


@pytest.mark.parametrize("name", ["a\0b.jsonl", "a\ud83d.jsonl"])
def test_a_file_name_that_no_file_can_have(store, name):
    store.add("set", [record(1)], file_path=name)
    with pytest.raises(UserError, match="no file can have this name"):
        opened(store, "set")


def test_nesting_without_end_is_a_bad_line(store):
    deep = "[" * 100_000
    store.add("lines", [json.dumps(record(1)) + "\n", deep + "\n"])
    with pytest.raises(BadRecord, match=r"lines.jsonl:2: not JSON"):
        opened(store, "lines").example(1)
    (store.folder / "deep.json").write_text(deep)
    store.add("deep", [], "json", file_path="deep.json")
    (store.folder / "deep.json").write_text(deep)
    with pytest.raises(UserError, match=r"deep.json' is not JSON"):
        opened(store, "deep")


def test_a_registry_entry_with_an_unknown_type_is_named(store):
    store.add("set", [record(1)], problem_type="numeric")
    with pytest.raises(UserError, match=r"registry '.*dataset_info.json', dataset 'set': unknown problem_type 'numeric'; did you mean 'numerical'"):
        opened(store, "set")


def test_repeated_ids_name_both_places(store):
    store.add("set", [record(1), record(2), record("1")])
    with pytest.raises(BadRecord, match=r"set.jsonl:3: problem_id 1 is that of .*set.jsonl:1 too"):
        opened(store, "set").example(2)


def test_a_missing_id_is_the_records_place(store):
    store.add("set", [record(None), record(None), record(1)])
    dataset = opened(store, "set")
    assert [dataset.example(i).id for i in range(3)] == ["#0", "#1", "1"]


def test_unusable_files(store):
    store.add("missing", [record(1)])
    (store.folder / "missing.jsonl").unlink()
    store.add("empty", [])
    store.add("object", [], "json")
    (store.folder / "object.json").write_text("{}")
    store.add("lines", [], "json")
    (store.folder / "lines.json").write_text("{}\n{}\n")
    store.add("odd", [record(1)], file_path="odd.csv")
    (store.folder / "odd.csv").write_text("")
    (store.folder / "bad.parquet").write_text("no parquet")
    store.add("bad", [record(1)], file_path="bad.parquet")
    store.add("split", [record(1)])
    for name, message in {"missing": "missing.jsonl' does not exist", "empty": "holds no record", "object": "must hold a list of records",
                          "lines": "name it .jsonl if", "odd": "expected .json, .jsonl", "bad": "cannot be read as parquet",
                          "split@test": "'@test': data file .* is not a folder"}.items():
        with pytest.raises(UserError, match=message) as error:
            opened(store, name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"), ("train/a", "train/b", "test/a"),
                                   ("data/train-0", "data/train-1", "data/test-0")])
def test_parquet_folders_and_splits(store, names):
    for i, name in enumerate(names):
        (store.folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([record(10 * i + j) for j in range(3)]), store.folder / "set" / f"{name}.parquet")
    store.add("set", [], "folder", file_path="set")
    train, test = opened(store, "set"), opened(store, "set@test")
    assert [train.example(i).id for i in range(len(train))] == ["0", "1", "2", "10", "11", "12"]
    assert train.example(4).where == f"{store.folder}/set/{names[1]}.parquet[1]"
    assert [test.example(i).id for i in range(len(test))] == ["20", "21", "22"] and test.name == "set@test"
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        opened(store, "set@tset")


def test_large_parquet_is_mapped_from_disk(store, monkeypatch, tmp_path):
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.add("set", [record(i) for i in range(200)], "parquet")
    dataset = opened(store, "set")
    assert [dataset.example(i).id for i in (0, 63, 64, 199)] == ["0", "63", "64", "199"]
    (cached,) = (tmp_path / "cache" / "sophiavl_fast").iterdir()
    written = cached.stat().st_mtime_ns
    assert opened(store, "set").example(5).id == "5" and cached.stat().st_mtime_ns == written
    store.add("set", [record(i + 1000) for i in range(200)], "parquet")
    assert opened(store, "set").example(5).id == "1005"
