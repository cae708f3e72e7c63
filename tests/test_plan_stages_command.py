"""``longspan plan-stages``: what it says, what it keeps, what it refuses."""

import json
from pathlib import Path

import pytest

from longspan.cli import main
from longspan.plan import StagePlan, read_plan
from longspan.planner.stage_file import examples, read_stages
from longspan.report.stages import draw_stages

SHORT = """
dims: {time: 3, space: 64, channel: 32}
sequence: [time, space]
stages:
  - {name: a, mixes: [space], heads: 4, dims: {space: 32}}
  - {name: b, mixes: [time], flops: 1e+9}
"""


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["plan-stages", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("name", examples())
def test_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    cluster = ["--cluster", "workstations-10gbe"] if name == "plant" else []
    code, out, _ = told(capsys, name, "--ranks", "8", *cluster)
    assert code == 0
    assert ("Ulysses" in out) == (name != "axial")  # it has a stage that mixes both dims
    for word in ("Megatron-style", "busiest rank sends", "after the last one"):
        assert word in out
    if name == "video":
        assert "switch time to space" in out and "50 % less" in out
    if name == "text":
        assert "ring" in out or "head exchange" in out
    assert len(read_stages(name).build()) % read_stages(name).repeat == 0


def test_json_and_the_plan_that_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    code, out, _ = told(capsys, "video", "--ranks", "4", "--json", "--out", str(kept))
    assert code == 0
    plan = read_plan(StagePlan, kept)
    drawn = draw_stages(plan)
    assert drawn.count('rx="4"') == 2 * 9  # a cell for either dim of the first stages
    assert "the first 9 of 56 stages" in drawn
    found = json.loads(out)
    assert found["sent_bytes"] == plan.sent_bytes
    assert len(found["stages"]) == len(plan.stages) == 56
    assert {rival["name"] for rival in found["rivals"]} == {"ulysses", "ring", "gather", "megatron"}


def test_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(SHORT)
    stages = read_stages(path).build()
    assert stages[0].sizes["space"] == 32 and stages[1].sizes["space"] == 64
    assert stages[1].flops == 1e9 and not stages[1].heads
    assert told(capsys, str(path), "--ranks", "4")[0] == 0
    # A graph: the third stage takes two results, the fourth what comes from outside.
    joined = (
        "  - {name: c, mixes: [time], after: [a, b]}\n  - {name: d, mixes: [time], after: []}\n"
    )
    path.write_text(SHORT + joined + "repeat: 2\n")
    stages = read_stages(path).build()
    assert stages[6].after == ("a.1", "b.1") and stages[7].after == () and stages[4].after is None
    code, out, _ = told(capsys, str(path), "--ranks", "4", "--json")
    assert code == 0 and json.loads(out)["stages"][6]["after"] == ["a.1", "b.1"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "is not YAML"),
        (SHORT.replace("sequence", "sequences"), "sequence: Field required"),
        (SHORT.replace("heads: 4", "heads: 5"), "no multiple of 5 heads"),
        (SHORT.replace("mixes: [time]", "mixes: [times]"), "mixes 'times'"),
        (SHORT.replace("[time, space]\nst", "[depth]\nst"), "'depth' is no dim"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, match: str
) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(text)
    code, _, said = told(capsys, str(path), "--ranks", "4")
    assert code == 2 and match in said and len(said.splitlines()) == 1
    code, _, said = told(capsys, str(tmp_path / "none.yaml"))
    assert code == 2 and "give a YAML file or one of" in said
