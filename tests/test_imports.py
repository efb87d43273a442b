"""Import direction: config, types <- kernels <- rooms <- evaluate <- recipes <- cli; rooms know each other only through types."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "rollout", "rewards", "algorithms", "policy", "monitor")
LEVEL = {"errors": 0, "compat": 0, "argument_types": 0, "config_ranges": 0.3, "model_folder": 0.3, "recorded": 0.3, "config_errors": 0.3,
         "config_checks": 0.5, "config": 1, "types": 1, "kernels": 2, **dict.fromkeys(ROOMS, 3), "evaluate": 4,
         "recipes": 5, "reward_commands": 5.5, "cli": 6, "__main__": 7}


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, lazy imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "sophiavl_fast" else [f"sophiavl_fast.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("sophiavl_fast.")}
    return found


def files() -> list[tuple[str, Path]]:
    package = [(p.relative_to(ROOT / "sophiavl_fast").parts[0].removesuffix(".py"), p) for p in (ROOT / "sophiavl_fast").rglob("*.py")]
    return [x for x in package if x[0] != "__init__"] + [("kernels", p) for p in (ROOT / "kernels" / "ops").glob("*.py")]


@pytest.mark.parametrize("room,path", files(), ids=lambda x: str(x.relative_to(ROOT)) if isinstance(x, Path) else x)
def test_imports_go_one_way(room, path):
    for other in imported_rooms(path) - {room, "__version__"}:
        assert LEVEL[other] < LEVEL[room], f"{path.relative_to(ROOT)} ({room}) imports {other}"
        assert room != "kernels", f"kernels import nothing of the rest, but {path.name} imports {other}"


def test_config_imports_no_torch():
    code = "import sys, sophiavl_fast.config, sophiavl_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_kernels_folder_is_no_package():
    """transformers would import a root package named `kernels` in place of its own optional dependency."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u, sys; s = u.find_spec('kernels'); sys.exit(bool(s and s.origin))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
