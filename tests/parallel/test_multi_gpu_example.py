"""`examples/multi_gpu.py`, launched as a user would, on processes without GPUs."""

import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest

ROOT = Path(__file__).parents[2]


def launch(output: Path, *arguments: str, ranks: int = 2, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = ROOT / "examples" / "multi_gpu.py"
    return start([*before, script, "--num-inference-steps=2", f"--output={output}", *arguments], ranks)


def start(what: list, ranks: int = 2) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--standalone",
        ROOT / "tests" / "support" / "ranks_on_cpu.py", *what,
    ]  # fmt: skip
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)


def test_two_processes_make_one_video_that_the_first_one_writes(tmp_path):
    run = launch(tmp_path / "video.mp4")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("17 frames by 2 processes") == 1
    assert len(imageio.imread(tmp_path / "video.mp4")) == 17


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--guidance-parallel"], ["--fsdp"]], ids=lambda each: each[0])
def test_the_video_is_the_same_with(arguments, tmp_path):
    for name, more in {"one": [], "other": arguments}.items():
        run = launch(tmp_path / f"{name}.mp4", *more)
        assert run.returncode == 0, run.stderr
    one, other = (imageio.imread(tmp_path / f"{name}.mp4").astype(float) for name in ("one", "other"))
    assert one.std() > 1
    assert abs(one - other).mean() < 1


@pytest.mark.slow
def test_one_rank_that_fails_ends_the_others_within_seconds_and_says_why(tmp_path):
    begin = time.monotonic()
    well = launch(tmp_path / "video.mp4")
    took = time.monotonic() - begin
    begin = time.monotonic()
    run = launch(tmp_path / "none.mp4", before=("--rank-fails=1",))
    assert well.returncode == 0, well.stderr
    assert run.returncode != 0
    assert "this rank ran out of memory" in run.stderr
    assert time.monotonic() - begin < 2 * took + 30
    assert not (tmp_path / "none.mp4").exists()


@pytest.mark.slow
def test_generate_makes_one_video_by_two_processes_and_ends_both_with_one_sentence(tmp_path):
    script = tmp_path / "generate.py"
    script.write_text("from vsa_diffusers.cli.app import main\n\nmain()\n")
    size = ("--height=64", "--width=64", "--frames=17", "--steps=2", "--guidance_parallel")
    command = [script, "generate", ROOT / "examples" / "tiny_wan", "a red circle", *size]
    run = start([*command, "--output", tmp_path / "video.mp4"])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("17 frames of 64x64") == 1
    assert len(imageio.imread(tmp_path / "video.mp4")) == 17
    run = start([*command, "--output", tmp_path / "none.mp4", "--block-size=7"])
    assert run.returncode != 0
    assert "error: block_size=(7,)" in run.stderr
    assert not (tmp_path / "none.mp4").exists()
