"""What users run stands on its own."""

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RESEARCH = {path.stem for path in (EXAMPLES / "research").glob("*.py")}
SCRIPTS = [path for path in EXAMPLES.rglob("*.py") if "research" not in path.parts]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_users_run_imports_nothing_from_research(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & (RESEARCH | {"research"})


def test_there_is_research_to_keep_out():
    assert {"procedural_video", "tiny_evidence", "vsa_evidence"} <= RESEARCH
