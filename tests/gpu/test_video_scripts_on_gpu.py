"""The scripts for real models with their own defaults of device and dtype, on tiny random pipelines."""

from importlib.util import find_spec

import hunyuan_vsa
import ltx2_vsa
import pytest
import torch
import wan22_two_experts
import wan_vsa

from tiny_ltx2_files import tiny_ltx2
from tiny_text_pipeline import tiny_hunyuan_video, tiny_pipeline
from vsa_diffusers.cli.script import run_script
from vsa_diffusers.video_files import read_frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("imageio_ffmpeg") is None, reason="runs with ffmpeg: pip install 'imageio[ffmpeg]'"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]
SCRIPTS = {
    hunyuan_vsa: ("--model", tiny_hunyuan_video),
    ltx2_vsa: ("--checkpoint", tiny_ltx2),
    wan22_two_experts: ("--model", lambda: tiny_pipeline(experts=2)),
    wan_vsa: ("--model", tiny_pipeline),
}
SIZE = ["--height=64", "--width=64", "--num-frames=9", "--num-inference-steps=3"]


@pytest.mark.parametrize("more", ["--compile", "--offload=model", "--offload=sequential", "--offload=group"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_makes_its_two_videos(script, more, tmp_path):
    option, build = SCRIPTS[script]
    build().save_pretrained(tmp_path / "model")
    words = [option, str(tmp_path / "model"), *SIZE, more, "--compare", "--output", str(tmp_path / "a.mp4")]
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, words)
    assert ended.value.code == 0
    assert len(read_frames(tmp_path / "a.mp4")) == len(read_frames(tmp_path / "a_dense.mp4")) == 9
