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
