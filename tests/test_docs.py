"""Pages that are written from the code stay current."""
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_config_page_is_current():
    spec = importlib.util.spec_from_file_location("write_config_docs", ROOT / "scripts" / "write_config_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "config.md").read_text() == script.text(), "run: python scripts/write_config_docs.py"
