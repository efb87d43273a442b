"""`data check` and the check before training: counts that equal the prepared prompts', every bad record listed."""
import io
import json
import logging
import shutil

import pytest
from rich.console import Console

from sophiavl_fast.cli import main
from sophiavl_fast.data.check import check_dataset, print_summary
from sophiavl_fast.data.dataset import Dataset
from sophiavl_fast.data.loader import Loader
from tests.data.conftest import picture, record


@pytest.fixture
def mixed(store):
    """Eight records: 0 to 2 images each, one image cut short behind a sound header, one unknown type."""
    whole = store.folder / store.image("cut.png", picture(0, 100, 100))
    whole.write_bytes(whole.read_bytes()[:5000])
    paths = [store.image(f"{i}.png", picture(i, 50 + 10 * i, 80)) for i in range(4)]
    rows = [record(0), record(1, path=paths[0]), record(2, path=paths[1:3], problem_type="OCR"), record(3, path="cut.png"),
            record(4, problem_type="txt"), record(5, problem_type="text"), record(6, path=paths[3]), record(7)]
    return store.add("mixed", rows)


def test_summary_equals_the_prompts(store, processor, mixed):
    dataset = Dataset.open(mixed, store.registry, template="plain")
    summary = check_dataset(dataset, processor, max_tokens=500)
    prompts = [dataset.prompt(i, processor) for i in (0, 1, 2, 5, 6, 7)]
    assert summary.tokens == [len(p.expanded_ids) for p in prompts]
    assert dict(summary.types) == {"numerical": 4, "ocr": 1, "text": 1} and dict(summary.images) == {0: 3, 1: 2, 2: 1}
    assert summary.sizes == [(50, 80), (60, 80), (70, 80), (80, 80)]
    assert [line.split(": ")[0] for line in summary.bad] == [f"{store.folder}/mixed.jsonl:{n}" for n in (4, 5)]
    assert (summary.records, summary.checked) == (8, 8)


def test_threads_and_order(store, processor):
    store.add("many", [record(i, problem="x" * i + "?", solution="" if i % 7 == 0 else "1") for i in range(300)])
    dataset = Dataset.open("many", store.registry, template="plain")
    one, many = (check_dataset(dataset, processor, workers=w) for w in (1, 6))
    assert (one.bad, one.tokens) == (many.bad, many.tokens) and len(one.bad) == 43
    seen = []
    sampled = check_dataset(dataset, processor, sample=100, on_progress=lambda done, total: seen.append((done, total)))
    assert sampled.checked == 100 == len(sampled.tokens) + len(sampled.bad) and seen == [(64, 100), (100, 100)]


def test_too_long_prompts_are_bad_by_header_alone(store, processor):
    path = store.image("a.png", picture(0, 200, 200))
    dataset = Dataset.open(store.add("long", [record(1, path=path)]), store.registry, template="plain")
    length = check_dataset(dataset, processor).tokens[0]
    assert not check_dataset(dataset, processor, max_tokens=length).bad
    assert f"the prompt has {length} tokens, more than" in check_dataset(dataset, processor, max_tokens=length - 1).bad[0]


def test_print_summary_shows_everything(store, processor, mixed):
    summary = check_dataset(Dataset.open(mixed, store.registry, template="plain"), processor)
    console = Console(record=True, width=100, file=io.StringIO())
    print_summary(summary, console)
    text = console.export_text()
    assert "8 checked" in text and "2 bad" in text and "numerical 4, ocr 1, text 1" in text and "0: 3, 1: 2, 2: 1" in text
    assert all(line in text for line in summary.bad) and f"max {max(summary.tokens)}" in text


def test_command(store, model_folder, mixed, capsys):
    assert main(["data", "check", mixed, "--registry", str(store.registry), "--model", str(model_folder), "--templates", "plain"]) == 2
    out = capsys.readouterr().out
    assert "mixed.jsonl:4: " in out and "mixed.jsonl:5: unknown problem_type 'txt'; did you mean 'text'?" in out and "p50" in out
    store.add("fine", [record(1)])
    assert main(["data", "check", "fine", "--registry", str(store.registry)]) == 0
    assert "not counted" in capsys.readouterr().out


def test_command_with_a_wrong_name_is_one_line(store, mixed, capsys):
    assert main(["data", "check", "mixd", "--registry", str(store.registry)]) == 2
    assert capsys.readouterr().err.strip() == (f"sophiavl-fast: dataset 'mixd' is not in registry '{store.registry}'; did you mean 'mixed'?")


def test_half_a_surrogate_pair_is_a_bad_record_and_can_be_printed(store, capsysbinary):
    rows = [record(1), record(2, problem_id="a\ud83d"), record(5, problem_id="a\ud83d"), record(3, path="b\ud83d.png"), record(4, problem_type="c\ud83d")]
    store.add("set", rows)
    assert main(["data", "check", "set", "--registry", str(store.registry)]) == 2
    out = capsysbinary.readouterr().out.decode()
    assert "4 bad" in out and "unknown problem_type 'c\\ud83d'" in out and "('b\\ud83d.png')" in out and out.count("'problem_id' holds half") == 2


def test_golds_that_no_answer_can_match_are_bad_records(store, capsys):
    four = {"problem_type": "multiple choice", "options": ["w", "x", "y", "z"]}
    bad = [record(i, **four, solution=gold) for i, gold in enumerate(("2", "E", "foo", "<answer>A,E</answer>"))]
    good = [record(10 + i, **four, solution=gold) for i, gold in enumerate(("<answer>A</answer>", "A, C", "ABD", "x", "(D)"))]
    store.add("set", [*bad, *good, record(20, solution="$"), record(21, problem_type="free-form", solution="$"),
                      record(22, problem_type="multiple choice", solution="E")])
    assert main(["data", "check", "set", "--registry", str(store.registry)]) == 2
    out = capsys.readouterr().out
    for line, gold in enumerate(("2", "E", "foo", "A,E"), 1):
        assert f"set.jsonl:{line}: the solution '{gold}' names none of the 4 options: expected letters A to D" in out
    assert "set.jsonl:10: the solution '$' can be matched by no answer" in out and "5 bad" in out


def test_sample_reads_some_before_training(store, processor, caplog):
    """A bad record outside the sample is met, and refused, in the stream; one inside it stops the start."""
    rows = [record(i) for i in range(600)]
    rows[1] = record(1, solution="")
    store.add("large", rows)
    loader = Loader.open(store.config("large", check="sample", shuffle=False), processor)
    with pytest.raises(Exception, match=r"large.jsonl:2: record without solution"):
        loader.next(4)
    loader.close()
    with caplog.at_level(logging.WARNING):
        Loader.open(store.config("large", on_error="skip"), processor).close()
    assert "large: 1 of 600 records cannot be used and are replaced when met" in caplog.text


def test_command_counts_what_a_run_would_end_at(store, model_folder, tmp_path, capsys):
    """More images than an engine takes; a prompt that leaves no room for a response in the model."""
    path = store.image("a.png", picture(0))
    store.add("much", [record(0), record(1, path=[path] * 16), record(2, path=[path] * 17), record(3, problem="x" * 300)])
    check = ["data", "check", "much", "--registry", str(store.registry), "--templates", "plain"]
    assert main(check) == 2
    out = capsys.readouterr().out
    assert "much.jsonl:3: 17 images; the rollout engine takes at most 16" in out and "1 bad" in out
    small = shutil.copytree(model_folder, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024 + 300
    (small / "config.json").write_text(json.dumps(config))
    assert main([*check, "--model", str(small)]) == 2
    out = capsys.readouterr().out
    assert "2 bad" in out and "much.jsonl:4: the prompt has" in out and "with 1024 new ones more than the 1324 of the model itself" in out


def test_command_counts_by_the_runs_own_lengths(store, model_folder, tmp_path, capsys):
    """Defaults would call a small model's every record too long, and pass prompts that a run with a lower limit refuses."""
    store.add("short", [record(0), record(1, problem="x" * 300)])
    small = shutil.copytree(model_folder, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (small / "config.json").write_text(json.dumps(config))
    check = ["data", "check", "short", "--registry", str(store.registry), "--templates", "plain"]
    assert main([*check, "--model", str(small)]) == 2
    out = capsys.readouterr().out
    assert "2 bad" in out and "--max-new-tokens" in out and "not counted" not in out
    assert main([*check, "--model", str(small), "--max-new-tokens", "32"]) == 0
    assert main([*check, "--model", str(small), "--max-new-tokens", "32", "--max-prompt-tokens", "100"]) == 2
    assert "1 bad" in capsys.readouterr().out
    assert main([*check, "--max-prompt-tokens", "100"]) == 2
    assert "counted with --model only" in capsys.readouterr().err
