"""dataset_info.json's form, relative paths, both directions of columns, and what is packaged."""
import json

import pytest

from sophiavl_fast import config as tree
from sophiavl_fast.data import registry
from sophiavl_fast.data.dataset import Dataset
from sophiavl_fast.errors import UserError


def write(folder, **entries):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def test_paths_start_at_the_registry_file(tmp_path):
    entry = registry.find("a", write(tmp_path, a={"file_path": "x/a.json", "image_base_path": "../images", "template": "t/mine.yaml"}))
    assert entry.file_path == tmp_path / "x/a.json" and entry.image_base_path == tmp_path / "../images"
    assert entry.template == str(tmp_path / "t/mine.yaml")
    assert registry.find("b", write(tmp_path, b={"file_path": "/abs/a.json", "template": "plain"})).template == "plain"
    assert registry.find("b", tmp_path / "dataset_info.json").file_path.as_posix() == "/abs/a.json"


def test_a_registry_as_sophiavl_r1_writes_it_starts_at_the_working_directory(tmp_path, monkeypatch):
    """Its verl/data/dataset_info.json names verl/data/demo.json, and is used from the repository's root."""
    (tmp_path / "verl/data").mkdir(parents=True)
    bare = {"file_path": "verl/data/demo.json", "image_base_path": "verl/data"}
    file = write(tmp_path / "verl/data", bare=bare, demo=bare | {"template": "verl/mine.yaml"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"'{tmp_path}/verl/data/verl/data/demo.json' does not exist.* \(not at '{tmp_path}/verl/data/demo.json' either\)"):
        Dataset.open("bare", file)
    (tmp_path / "verl/data/demo.json").write_text("[]")
    for name in (file, "verl/data/dataset_info.json"):
        entry = registry.find("demo", name)
        assert entry.file_path == tmp_path / "verl/data/demo.json" and entry.image_base_path == tmp_path / "verl/data"
        assert entry.template == str(tmp_path / "verl/mine.yaml")
    (tmp_path / "verl/data/verl/data").mkdir(parents=True)
    (tmp_path / "verl/data/verl/data/demo.json").write_text("[]")  # beside the registry comes first
    entry = registry.find("demo", file)
    assert entry.file_path == tmp_path / "verl/data/verl/data/demo.json" and entry.image_base_path == tmp_path / "verl/data/verl/data"


def test_a_packaged_set_that_is_not_downloaded_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SOPHIAVL_DATA", str(tmp_path))
    with pytest.raises(UserError, match=rf"ocr.json' does not exist \(download the set into '{tmp_path}', or set SOPHIAVL_DATA to the folder that holds it\)"):
        Dataset.open("SophiaVL-R1-130k-OCR")
    write(tmp_path, mine={"file_path": f"{tmp_path}/no/where/it.json"})
    with pytest.raises(UserError, match=rf"data file '{tmp_path}/no/where/it.json' does not exist$"):
        Dataset.open("mine", tmp_path / "dataset_info.json")


@pytest.mark.parametrize("columns", [
    {"question": "prompt", "label": "answer", "pics": "images", "kind": "problem_type"},
    {"prompt": "question", "answer": "label", "images": "pics", "problem_type": "kind"},
])
def test_columns_in_both_directions(tmp_path, columns):
    found = registry.find("a", write(tmp_path, a={"file_path": "a.json", "columns": columns})).columns
    assert found == registry.ROLES | {"prompt": "question", "answer": "label", "images": "pics", "problem_type": "kind"}


def test_the_public_repositorys_columns_are_the_default(tmp_path):
    given = {"problem": "prompt", "solution": "answer", "path": "images"}
    assert registry.find("a", write(tmp_path, a={"file_path": "a.json", "columns": given})).columns == registry.ROLES


def test_packaged_entries_stay_visible_and_can_be_overridden(tmp_path, monkeypatch):
    monkeypatch.setenv("SOPHIAVL_DATA", "/big/disk")
    mine = write(tmp_path, a={"file_path": "a.json"}, **{"SophiaVL-R1-130k-OCR": {"file_path": "ocr.json"}})
    assert str(registry.find("SophiaVL-R1-130k-Math", mine).file_path) == "/big/disk/SophiaVL-R1-130k/json/math.json"
    assert registry.find("SophiaVL-R1-130k-OCR", mine).file_path == tmp_path / "ocr.json"
    assert registry.find("SophiaVL-R1-Thinking-156k").registry == registry.PACKAGED


def test_shipped_configs_name_packaged_datasets():
    from pathlib import Path

    for path in (Path(__file__).parents[2] / "configs").glob("trust_grpo*.yaml"):
        data = tree.build(tree._read(path)).data
        for name in data.train if isinstance(data.train, dict) else data.train.split(","):
            registry.find(name.strip())


def test_splits_are_part_of_the_name(tmp_path):
    entry = registry.find("a@test", write(tmp_path, a={"file_path": "folder"}))
    assert (entry.name, entry.split) == ("a@test", "test")


@pytest.mark.parametrize("entry,message", [
    ({"file_path": "a.json", "colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
    ({"image_base_path": "x"}, "dataset 'a': no 'file_path'"),
    ({"file_path": "a.json", "columns": {"question": "promt"}}, "unknown role 'promt'; did you mean 'prompt'"),
    ({"file_path": "a.json", "columns": {"q": "prompt", "p": "prompt"}}, "two columns play the same role"),
    ({"file_path": "a.json", "columns": ["prompt"]}, "must map column names to roles"),
    ({"file_path": 3}, "'file_path' must be a string"),
    ({"file_path": "~nosuchuser/a.json"}, "dataset 'a': a path begins with '~' and no home folder is known for it"),
    ({"file_path": "a.json", "image_base_path": "~nosuchuser"}, "dataset 'a': a path begins with '~'"),
])
def test_malformed_entries(tmp_path, entry, message):
    with pytest.raises(UserError, match=message):
        registry.find("a", write(tmp_path, a=entry))


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match=r"'geometri' is not in registry '.*dataset_info.json'; did you mean 'geometry'"):
        registry.find("geometri", write(tmp_path, geometry={"file_path": "a.json"}))
    with pytest.raises(UserError, match=r"data.registry: '.*none.json' does not exist"):
        registry.find("a", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        registry.find("a", tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="must map each dataset's name"):
        registry.find("a", tmp_path / "list.json")
