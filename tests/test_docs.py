"""Pages that are written from the code stay current."""
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_config_page_is_current():
    spec = importlib.util.spec_from_file_location("write_config_docs", ROOT / "scripts" / "write_config_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "config.md").read_text() == script.text(), "run: python scripts/write_config_docs.py"


def test_what_dynamic_sampling_adds_is_told():
    """Metrics that only its runs have: a reader meets them in metrics.jsonl first."""
    named = set(re.findall(r'"(rollout/\w+)"', (ROOT / "sophiavl_fast" / "recipes" / "sampling.py").read_text()))
    [row] = [line for line in (ROOT / "docs" / "config.md").read_text().splitlines() if line.startswith("| `rollout.resample`")]
    assert len(named) == 3 and all(name in row for name in (*named, "reward/outcome"))


def test_every_key_is_told_and_every_row_has_its_cells():
    rows = [line for line in (ROOT / "docs" / "config.md").read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", row) for row in rows]
    assert len(rows) > 130 and all(len(c) == 6 and len(c[4].strip()) > 5 for c in cells), [c[1] for c in cells if len(c) != 6 or len(c[4].strip()) <= 5]


ROOMS = "alarm|debug|eval|mem|optim|policy|response|reward|rollout|time|train|transfer|trust"


def test_every_metric_is_told():
    """Names as the code writes them; those that it puts together are told by their families."""
    named = {name for path in (ROOT / "sophiavl_fast").rglob("*.py") for name in re.findall(rf'"((?:{ROOMS})/[a-z0-9_/]*[a-z0-9])"', path.read_text())}
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert len(named) > 50 and not [name for name in sorted(named) if f"`{name}`" not in page]
    assert all(f"`time/transfer_{phase}_s`" in page for phase in ("wake", "gather", "convert", "send", "load", "reset", "hidden"))
