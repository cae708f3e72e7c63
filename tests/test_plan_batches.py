"""The command that plans batches, and its picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from longspan.cli import main
from longspan.plan import BatchPlan, Group, MicroBatch
from longspan.report.groups import draw_groups


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, [20000, *range(50, 4000, 100)])), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        main(["plan-batches", *map(str, arguments)])
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_modes_side_by_side(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "batch.svg"
    how = ("--lengths", lengths, "--cluster", "8xa100-40gb", "--model", "7b", "--global-batch", 20)
    code, out, _ = run(capsys, *how, "--picture", drawn)
    assert code == 0
    assert "static" in out and "flexible" in out and "lower bound" in out
    ElementTree.parse(drawn)
    code, out, _ = run(capsys, *how, "--json")
    told = json.loads(out)
    assert list(told) == ["static", "uniform", "flexible"]
    assert told["flexible"]["seconds"] <= told["static"]["seconds"]
    assert len(told["flexible"]["plans"][0]["lengths"]) == 20


def test_mistakes_are_one_line(lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--lengths", lengths, "--cluster", "8xa100-40gb")
    for more in (
        ("--model", "no-such-model"),
        ("--model", "7b", "--memory", "much"),
        ("--model", "7b", "--checkpointing", "some"),
        ("--model", "7b", "--memory", "1GiB"),
    ):
        code, _, err = run(capsys, *how, *more)
        assert code == 2 and err.startswith("longspan: ") and err.count("\n") == 1, err
    assert run(capsys, "--lengths", "none", *how[2:], "--model", "7b")[0] == 2


def test_picture_shows_every_sequence() -> None:
    groups = (
        Group((0, 1), (0,), "ring", 2.0, 10, 10),
        Group((2,), (1, 3), "heads", 1.5, 0, 10),
        Group((3,), (2,), "heads", 1.0, 0, 10),
    )
    plan = BatchPlan((900, 100, 50, 40), (MicroBatch(groups, 2.0),), "world", 2.0, 1.9)
    root = ElementTree.fromstring(draw_groups(plan, 4))
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert [title.split(" tokens")[0] for title in titles if " tokens" in title] == [
        "900",
        "100",
        "40",
        "50",
    ]
