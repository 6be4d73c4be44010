"""`vsa-diffusers inspect`: its numbers, its pictures and its page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vsa_diffusers.cli import app, script
from vsa_diffusers.inspection import report

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
OPTIONS = (
    "--height=64", "--width=64", "--frames=9", "--steps=2", "--block-size=2x2x2", "--ratio=0.25", "--query=0,1,1",
    "--query-tiles=3", "--json",
)  # fmt: skip
PICTURES = ("mass.png", "error.png", "sharpness.png", "curves.png", "query.png")


class Page(HTMLParser):
    """All that a page refers to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.references, self.text, self.pictures = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href", "srcset", "poster") if name in attributes]
        if tag == "img":
            self.pictures.append(attributes)

    def handle_data(self, data):
        self.text.append(data)


def run(capsys, directory, *options, prompt="a <red> circle"):
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", MODEL, prompt, "--output", str(directory), *OPTIONS, *options])
    return ended.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("inspection")


@pytest.fixture(scope="module")
def numbers(directory):
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.echo", printed.append)
        with pytest.raises(SystemExit) as ended:
            app.main(["inspect", MODEL, "a <red> circle", "--output", str(directory), *OPTIONS])
    assert ended.value.code == 0
    return json.loads(printed[0])


def test_json_tells_of_every_layer_and_step(numbers, directory):
    assert json.loads((directory / "inspection.json").read_text()) == numbers
    assert [layer["position"] for layer in numbers["layers"]] == list(range(6))
    assert numbers["steps"] == [0, 1]
    assert {each["kept"] for each in numbers["observations"]} == {2}
    assert {each["query"]["tile"] for each in numbers["observations"]} == {0}
    assert numbers["call"]["num_frames"] == 9
    assert (numbers["query"], numbers["query_tiles"]) == ([0, 1, 1], 3)
    for layer in numbers["layers"]:
        assert 0 < layer["mass"] <= layer["best_mass"] <= 1
        assert 0 < layer["error"] <= layer["worst_error"] < 1


def test_the_pictures_are_pictures(numbers, directory):
    for name in PICTURES:
        with Image.open(directory / name) as picture:
            assert picture.width > 300
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 20


def test_the_page_refers_to_nothing_outside_of_itself_and_names_what_it_shows(numbers, directory):
    html = (directory / report.PAGE).read_text(encoding="utf-8")
    page = Page(html)
    text = " ".join(page.text)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert "http" not in re.sub(r'"data:[^"]*"', "", html)  # letters of a picture may spell anything
    assert len(page.pictures) == len(PICTURES)
    assert all(len(picture["alt"]) > 10 for picture in page.pictures)
    assert "a <red> circle" in text
    assert numbers["dense"]["advice"] in text
    assert numbers["dense"]["rule"] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers=x"], "--layers 'x' must be whole numbers"),
        (["--query=0,99,0"], "is not on the video's grid"),
        (["--at-steps=0,7"], "the run has 2 steps"),
        (["--ratio=1.5"], "top_k_ratio=1.5"),
        (["--set", "no_such=1"], "no_such"),
    ],
)
def test_what_is_refused_is_one_sentence_and_leaves_nothing(capsys, tmp_path, options, message):
    code, printed = run(capsys, tmp_path / "new", *options)
    assert code == script.REFUSED
    assert message in " ".join(printed.err.split())
    assert printed.out == ""
    assert not (tmp_path / "new").exists()


def test_what_fails_while_drawing_leaves_the_files_of_before(directory, numbers, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def broken(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(report.figures, "draw_query", broken)
    code, printed = run(capsys, directory, "--layers=0", "--at-steps=1")
    assert code == script.REFUSED
    assert "No space left" in printed.err
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
