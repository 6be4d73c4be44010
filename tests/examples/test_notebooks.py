"""The notebooks: each runs, at small sizes, and what is committed of it is what its text says."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

import make_notebooks

NOTEBOOKS = sorted(make_notebooks.NOTEBOOKS.glob("*.py"))
VIDEO = "CALL = dict(height=128, width=128, num_frames=13, num_inference_steps=2)"
SMALLER = {
    "1_quick_start": VIDEO,
    "2_how_vsa_works": f"{VIDEO}; STEP = 1",
    "3_choosing_settings": VIDEO,
    "4_fine_tuning": "\n".join(
        [
            "SIZE = dict(height=64, width=64, num_frames=13)",
            "CLIPS, TRAIN_STEPS, BATCH, SIGMAS = 4, 2, 1, 1",
            "VIDEO = dict(height=64, width=64, num_frames=9, num_inference_steps=1)",
            "WORK = {work!r}",
        ]
    ),
    "5_your_own_transformer": "LATENTS = (1, 4, 8, 16, 16)",
}
# A kernel that ran another notebook knows nothing of it; small sizes make few tiles, and that is warned of.
BEFORE = """%reset -f
import torch, warnings
torch.set_num_threads(1)
warnings.filterwarnings('ignore', '.*tiles; with fewer.*')"""
BYTES = 400_000
QUICK = ("1_quick_start", "5_your_own_transformer")  # the others take minutes on two cores
FOREIGN = re.compile(r"/(home|root|tmp|usr|work|var)/|[A-Z]:\\\\")


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: importing torch and diffusers anew would take most of the time."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    yield manager
    if manager.has_kernel:
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    "text",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda value: value.stem,
)
def test_it_runs_from_top_to_bottom_without_noise(text, kernel, tmp_path):
    notebook = make_notebooks.read(text, SMALLER[text.stem].format(work=str(tmp_path / "work")))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE, id="before"))
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(text.parent)}})
    client.execute(reset_kc=False, cleanup_kc=False)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("text", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_has_the_cells_of_the_text(text):
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    expected = [(cell.cell_type, cell.source) for cell in make_notebooks.read(text).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == expected


@pytest.mark.parametrize("text", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_small_and_say_nothing_of_the_machine(text):
    content = text.with_suffix(".ipynb").read_text()
    notebook = nbformat.reads(content, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert len(content) < BYTES
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [found for output in outputs for found in FOREIGN.findall(str(output))]
    assert not any(cell.cell_type == "code" and cell.execution_count is None for cell in notebook.cells)
