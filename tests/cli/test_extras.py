"""Packages of the extras: without them a command says in one sentence what installs them, before it does anything."""

import importlib.util
from pathlib import Path

import pytest

from tiny_fine_tuned import WAN, fine_tuned
from vsa_diffusers import load_vsa, save_vsa
from vsa_diffusers.bench import layers
from vsa_diffusers.cli import app, script
from vsa_diffusers.generation import loading

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
CALLS = {
    "compare": [MODEL, "a ring", "--output", "new"],
    "tune": [MODEL, "a ring", "--psnr", "30", "--output", "new"],
    "inspect": [MODEL, "a ring", "--output", "new"],
    "bench": ["--plot", "new.png"],
    "generate": [MODEL, "a ring", "--lora", "mine", "--output", "new.mp4"],
}


@pytest.fixture
def without(monkeypatch):
    """Hides a package."""
    find = importlib.util.find_spec

    def hide(package):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
        )

    return hide


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        *(("compare", package, "report") for package in ("torchmetrics", "matplotlib", "jinja2")),
        *(("tune", package, "report") for package in ("torchmetrics", "matplotlib", "jinja2")),
        *(("inspect", package, "report") for package in ("matplotlib", "jinja2")),
        ("bench", "matplotlib", "report"),
        ("generate", "peft", "train"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_before_anything_is_done(
    capsys, tmp_path, monkeypatch, without, command, package, extra
):
    def work(*arguments, **options):
        pytest.fail("it has begun")

    without(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.DiffusionPipeline, "from_pretrained", work)
    monkeypatch.setattr(layers, "measure_shape", work)
    with pytest.raises(SystemExit) as ended:
        app.main([command, *CALLS[command]])
    assert ended.value.code == script.REFUSED
    told = " ".join(capsys.readouterr().err.split())
    assert f'needs {package}; pip install "vsa_diffusers[{extra}]"' in told
    assert list(tmp_path.iterdir()) == []


def test_a_saved_lora_is_refused_by_name_without_peft(tmp_path, without):
    save_vsa(fine_tuned(WAN.build(), lora=True, gates=False), tmp_path)
    model = WAN.build()
    without("peft")
    with pytest.raises(ImportError, match=r'needs peft; pip install "vsa_diffusers\[train\]"'):
        load_vsa(model, tmp_path)
    assert not getattr(model, "peft_config", {})
