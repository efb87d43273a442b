"""report.html: its numbers are the run's, nothing a model wrote becomes markup, and it needs nothing but itself."""
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess

import pytest
from PIL import Image

from sophiavl_fast.config import build, dump
from sophiavl_fast.errors import UserError
from sophiavl_fast.monitor import browser, groups, panels, report
from sophiavl_fast.monitor.metrics import RunLog
from sophiavl_fast.monitor.report import write_report

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- {{ 7*7 }} </p>"


class Page(html.parser.HTMLParser):
    """Every element with its attributes, the text of each script by id, and all other text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self._script = [], {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._script = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += f" {data}"
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def json(self, name):
        return json.loads(self.scripts[name], parse_constant=pytest.fail)


def sample(step, group, i, **changes):
    return {"id": f"set:{step}-{group}", "step": step, "group": group, "prompt": "How many?", "images": [], "gold": "7", "problem_type": "numerical",
            "response": f"<think>I count {i}.</think><answer>{i}</answer>", "response_tokens": 9, "finish_reason": "stop", "outcome": float(i % 2),
            "format_ok": True, "thinking": 0.5, "total": 0.5, "gamma": 0.75, "trust_weight": 0.3, "advantage": 0.1, "uniform": False, "sound": i % 2 == 0,
            "weight_version": step - 1} | changes


def make_run(folder, *, steps=3, planned=3, per_step=2, n=4, changes=None, evaluate=True):
    config = build({"run": {"dir": str(folder), "steps": planned}, "model": {"path": "models/x"}, "data": {"train": "a"}, "monitor": {"tensorboard": False},
                    "thinking": {"backend": "local", "path": "judge"}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    log = RunLog(folder, config, None)
    if evaluate:
        log.metrics(0, {"eval/accuracy": 0.25, "eval/reasoning": 0.2, "eval/accuracy/ocr": 0.125, "eval/count": 8})
    for step in range(1, steps + 1):
        log.samples([sample(step, g, i, **(changes or {})) for g in range(per_step) for i in range(n)])
        metrics = {"loss": 1 / 3 / step, "reward/total": math.pi * step, "trust/gamma": math.nan, "time/rollout_s": 0.1 + step, "odd/number": step}
        if evaluate and step == steps:
            metrics |= {"eval/accuracy": 0.875, "eval/reasoning": 0.5, "eval/accuracy/ocr": 0.75, "eval/count": 8}
        log.metrics(step, metrics)
    log.close()
    return folder


def read(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_embedded_numbers_equal_metrics_jsonl(tmp_path):
    page = read(make_run(tmp_path / "run"))
    assert page.json("metrics") == [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert page.json("metrics")[2]["reward/total"] == 2 * math.pi and page.json("metrics")[1]["trust/gamma"] is None


def test_before_and_after_by_type(tmp_path):
    page = read(make_run(tmp_path / "run"))
    words = page.text.split()
    at = words.index("all")  # the first row of the table
    assert words[at:at + 7] == ["all", "0.250", "0.875", "+62.5", "0.200", "0.500", "+30.0"]
    at = words.index("ocr")
    assert words[at:at + 4] == ["ocr", "0.125", "0.750", "+62.5"]


def test_what_a_model_wrote_stays_text(tmp_path):
    changes = {"response": f"<think>{EVIL}</think><answer>{EVIL}</answer>", "prompt": EVIL, "gold": EVIL, "problem_type": EVIL, "images": [EVIL]}
    run_dir = make_run(tmp_path / "run", changes=changes)
    (run_dir / "config.yaml").write_text(f"run: {{dir: x, steps: 3}}\nmodel: {{path: {json.dumps(EVIL)}}}\n")
    page = read(run_dir)
    assert page.json("samples")[0]["responses"][0]["answer"] == page.json("samples")[0]["prompt"] == EVIL
    assert not [e for e in page.elements if e[0] == "img" or any(name.startswith("on") for name in e[1])]
    assert sum(tag == "script" for tag, _ in page.elements) == 6 and " 49 " not in page.text
    assert EVIL in page.text, "the model's path and the configuration show it as text"


def test_the_page_is_self_contained(tmp_path):
    picture = tmp_path / "p.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    page = read(make_run(tmp_path / "run", changes={"images": [str(picture)]}))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base") and "src" not in attributes and "href" not in attributes
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    assert page.json("pictures")[str(picture)]["uri"].startswith("data:image/png;base64,")


def test_an_interrupted_run_with_a_torn_line(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=2, planned=10, evaluate=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"step": 3, "lo')
    page = read(run_dir)
    assert "2 steps of 10; unfinished" in page.text and "Before and after" not in page.text
    assert [m["step"] for m in page.json("metrics")] == [1, 2]


def test_a_run_without_thinking_samples_or_config(tmp_path):
    page = read(make_run(tmp_path / "off", changes={"thinking": None, "gamma": 1.0}))
    assert "Trust in mixed groups" not in page.text and len(page.json("samples")) == 6
    run_dir = make_run(tmp_path / "bare")
    (run_dir / "samples.jsonl").unlink()
    (run_dir / "config.yaml").unlink()
    page = read(run_dir)
    assert page.json("samples") == [] and "3 steps" in page.text and "Samples" not in page.text


def test_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no step yet: metrics\.jsonl is missing"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"holds no step yet: metrics\.jsonl is empty"):
        write_report(tmp_path)


@pytest.mark.parametrize("file,number,change,words", [
    ("metrics.jsonl", 2, lambda row: row.pop("step"), "no step"),
    ("metrics.jsonl", 2, lambda row: row.update(step="2"), 'step = "2": expected a whole number'),
    ("metrics.jsonl", 3, lambda row: row.update(loss="low"), 'loss = "low": expected a number or null'),
    ("metrics.jsonl", 3, lambda row: row.update({"time/step_s": [1]}), "time/step_s = [1]: expected a number"),
    ("metrics.jsonl", 1, lambda row: row.update(loss=math.nan), "is not a JSON object"),
    ("samples.jsonl", 5, lambda row: row.pop("step"), "no step"),
    ("samples.jsonl", 5, lambda row: row.pop("id"), "no id"),
    ("samples.jsonl", 5, lambda row: row.update(id=["a"]), 'id = ["a"]: expected a name'),
    ("samples.jsonl", 5, lambda row: row.update(group={}), "group = {}: expected a name or number"),
    ("samples.jsonl", 6, lambda row: row.update(gamma="high"), 'gamma = "high": expected a number or null'),
    ("samples.jsonl", 6, lambda row: row.update(response=7), "response = 7: expected a text"),
    ("samples.jsonl", 6, lambda row: row.update(images="a.png"), 'images = "a.png": expected a list of paths'),
    ("samples.jsonl", 6, lambda row: row.update(images=[1]), "images = [1]: expected a list of paths"),
])
def test_a_damaged_log_is_named_with_its_line(tmp_path, file, number, change, words):
    path = make_run(tmp_path / "run") / file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number - 1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=re.escape(f"{path}: line {number}") + ".*" + re.escape(words)):
        write_report(tmp_path / "run")


@pytest.mark.parametrize("content,words", [
    (b"run: {steps: 3\nmodel: [", "config.yaml: line 2 is not YAML"), (b"a: \xff", "config.yaml is not YAML"), (b"- 1\n", "must hold a mapping, not list"),
    (b"run: {steps: many}", "run.steps = 'many': expected a number"), (b"trust: {threshold: [1]}", "trust.threshold = [1]: expected a number")])
def test_a_damaged_config_is_named(tmp_path, content, words):
    (make_run(tmp_path / "run") / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        write_report(tmp_path / "run")


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "report.html").mkdir()
    with pytest.raises(UserError, match=r"run folder '.*run': .*report.html.*: Is a directory"):
        write_report(run_dir)
    (run_dir / "samples.jsonl").unlink()
    (run_dir / "samples.jsonl").mkdir()
    with pytest.raises(UserError, match=r"run folder '.*run': '.*samples.jsonl': Is a directory"):
        write_report(run_dir)


def test_gamma_over_mixed_groups(tmp_path):
    rows = []
    for g, (outcomes, gamma) in enumerate([((0, 1), 1.0), ((0, 1), 0.74), ((1, 0), 0.4), ((1, 1), 1.0), ((0, 0), 1.0), ((0.4, 0.6), 0.95)]):
        rows += [sample(1, g, i, outcome=float(o), gamma=gamma) for i, o in enumerate(outcomes)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    view = groups.gamma_view(groups.index(path), threshold=0.5)
    assert (view.groups, view.mixed, view.below, view.lowest) == (6, 4, 3, 0.4)
    assert view.mean_below == pytest.approx((0.74 + 0.4 + 0.95) / 3)
    assert {low: count for low, _, count in view.bins if count} == {0.4: 1, 0.7: 1, 0.95: 1}
    assert view.bins[0][0] == 0.35 and view.bins[-1][:2] == (0.95, 1.0)


def test_groups_are_chosen_whole_and_evenly(tmp_path):
    make_run(tmp_path / "run", steps=50, planned=50, per_step=4, n=8)
    every = groups.index(tmp_path / "run" / "samples.jsonl")
    chosen = groups.spread(every, 400)
    assert len(every) == 200 and len(chosen) == 50 and all(len(g.starts) == 8 for g in chosen)
    assert chosen[0] is every[0] and chosen[-1] is every[-1] and len({g.step for g in chosen}) == 50
    assert groups.spread(every[:1], 400) == every[:1] and groups.spread([], 400) == []


def test_large_pictures_shrink_and_bad_ones_are_notes(tmp_path):
    Image.effect_noise((1600, 1000), 80).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    found = browser.Pictures()
    for name in ("large.png", "text.png", "gone.png"):
        found.add(str(tmp_path / name))
    found.add("")
    large, text, gone, raw = found.found.values()
    assert large["uri"].startswith("data:image/jpeg") and len(large["uri"]) < 300_000 and (large["width"], large["height"]) == (1600, 1000)
    assert "text.png" in text["note"] and "gone.png" in gone["note"] and "bytes" in raw["note"]


def test_a_response_out_of_format_is_shown_whole():
    told = browser._response(sample(1, 0, 0, response="just 7"), 0.5)
    assert told["raw"] == "just 7" and "answer" not in told
    told = browser._response(sample(1, 0, 1), 0.5)
    assert (told["thinking_text"], told["answer"], told["correct"]) == ("I count 1.", "1", True)


REGULAR = re.compile(r"\s*<think>(?P<thinking>.*?)</think>(?P<between>.*?)<answer>(?P<answer>.*?)</answer>(?P<rest>.*)", re.DOTALL)


def test_a_response_is_split_as_the_regular_expression_says():
    """Every sequence of five of these pieces."""
    for pieces in itertools.product(("<think>", "</think>", "<answer>", "</answer>", " \n\x1f", "a <"), repeat=5):
        for text in ("".join(pieces), "<think>" + "".join(pieces)):
            expected = REGULAR.fullmatch(text)
            assert browser._split(text) == (expected and (expected["thinking"], expected["answer"])), text


@pytest.mark.parametrize("text", ["<think>" + "</think><answer>" * 20_000, "<think>" * 20_000, " " * 20_000 + "<think>" + "</think>" * 20_000,
                                  "<think></think>" + "<answer>" * 20_000 + "</answer"], ids=["both", "opened", "closed", "answers"])
def test_a_response_of_nothing_but_tags_is_split_in_no_time(text):
    assert "raw" in browser._response(sample(1, 0, 0, response=text), 0.5)  # it simply has to come back


def test_every_number_has_a_curve_once():
    main, more = panels.choose([{"step": 1, "loss": 0.5, "time/rollout_s": 1.0, "new/key": 3, "flag": True, "empty": None}])
    assert [p.title for p in main] == ["Loss", "Time by phase"] and [s for p in more for s in p.series] == [("new/key", "key")]


def test_overlap_is_drawn_where_rollouts_run_ahead():
    times = {"step": 1, "time/step_s": 2.0, "time/update_s": 1.9, "time/rollout_s": 0.1}
    assert "Sampling beside the update" not in [p.title for p in panels.choose([times])[0]]
    main, more = panels.choose([times | {"rollout/busy_s": 1.8}])
    assert report._tiles([times | {"rollout/logprob_diff_max": 1.5, "rollout/probe_diff_max": 2e-5}])[0]["value"] == "2.0e-05"
    assert [s[0] for p in main if p.title == "Sampling beside the update" for s in p.series] == ["time/step_s", "rollout/busy_s", "time/update_s"] and not more


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_draws_the_page(tmp_path):
    changes = {"response": EVIL, "prompt": EVIL}
    path = write_report(make_run(tmp_path / "run", changes=changes))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3000"]
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert re.search(r"<title>run · sophiavl-fast</title>", dom), "no script of the model's ran"
    assert '<img src="x"' not in dom, "nor did it become an element"
    assert dom.count('<article class="group">') == 6 and dom.count('<details class="response">') == 24
    assert dom.count('<figure class="panel">') == 7 and "24 responses in 6 groups" in dom
    shot = tmp_path / "page.png"
    subprocess.run([CHROMIUM, *flags, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=120, check=True)
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24)) > 100
