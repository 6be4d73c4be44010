from typing import Annotated

import pytest
import typer

from vsa_diffusers.cli.script import INTERRUPTED, REFUSED, run_script


def script(
    top_k_ratio: Annotated[float, typer.Option(help="Share of tiles.")] = 0.5,
    block_size: Annotated[tuple[int, int, int], typer.Option(help="Tokens per tile.")] = (4, 4, 4),
) -> None:
    """Do what is told."""
    if top_k_ratio == 0:
        raise KeyboardInterrupt
    if top_k_ratio > 2:
        raise RuntimeError("a fault")
    if top_k_ratio > 1:
        raise ValueError(f"top_k_ratio={top_k_ratio} is more\n  than 1; use [0.5].")
    print(top_k_ratio, block_size)


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        run_script(script, words)
    return ended.value.code, capsys.readouterr()


def test_options_are_written_with_hyphens_or_underscores(capsys):
    for words in (
        ("--top-k-ratio=0.25", "--block-size", "1", "2", "3"),
        ("--top_k_ratio=0.25", "--block_size", *"123"),
    ):
        assert run(capsys, *words) == (0, ("0.25 (1, 2, 3)\n", ""))


def test_help_has_every_option_and_its_help(capsys):
    code, printed = run(capsys, "--help")
    assert code == 0
    for told in ("Do what is told.", "--top-k-ratio", "Share of tiles.", "--block-size", "--traceback", "default: 0.5"):
        assert told in printed.out


def test_what_is_refused_is_one_line_and_status_2(capsys):
    code, printed = run(capsys, "--top-k-ratio=1.5")
    assert (code, printed.out) == (REFUSED, "")
    assert printed.err == "error: top_k_ratio=1.5 is more than 1; use [0.5].\n"
    code, printed = run(capsys, "--top-k-ratio=1.5", "--traceback")
    assert code == REFUSED
    assert "Traceback" in printed.err


def test_a_fault_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        run_script(script, ["--top-k-ratio=3"])


def test_ctrl_c_ends_it_with_its_own_status(capsys):
    assert run(capsys, "--top-k-ratio=0")[0] == INTERRUPTED
