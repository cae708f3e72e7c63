"""The command line: what it prints, writes and refuses."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from longspan.cli import main
from longspan.cluster.bandwidth import required_bits_per_s
from longspan.cluster.papers import streaming_diloco
from longspan.schedule.outer import OuterJob
from longspan.trace import Span, read_trace

OUTER = (
    "simulate outer --params 10e9 --layers 48 --step 0.8 --every 100 --delay 1 --bits 4 "
    "--fragment-layers 3 --utilisation 0.5,0.8,0.9,0.95,0.99"
)
RING = "simulate ring --cluster workstations-10gbe --length 8192"


def run(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints; it must end well."""
    with pytest.raises(SystemExit) as end:
        main(words.split())
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out


def test_help_names_the_commands_and_loads_little() -> None:
    code = (
        "import sys; from longspan.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for name in ("diagnose", "train", "demo", "simulate", "lab"):
        assert f" {name} " in done.stdout


def test_outer_tells_the_papers_bandwidths(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(f"{OUTER} --json", capsys))
    needed = required_bits_per_s(OuterJob(10e9, 48, 0.8, bits=4), told["utilisations"])
    assert told["gbit_per_s"] == [bits / 1e9 for bits in needed]
    assert told["utilisations"] == [0.5, 0.8, 0.9, 0.95, 0.99]
    assert (told["method"], told["every"], told["bits"]) == ("streaming", 100, 4)
    told = json.loads(run(f"{OUTER} --method data-parallel --json", capsys))
    assert (told["method"], told["every"], told["delay"]) == ("data-parallel", 1, 0)
    words = run(f"{OUTER} --method diloco", capsys)
    assert "Gbit/s needed" in words and "99 %" in words


def test_outer_says_where_the_grid_ends(capsys: pytest.CaptureFixture[str]) -> None:
    job = "simulate outer --layers 4 --step 0.1 --every 10 --utilisation 0.5"
    assert "> 1,000.0" in run(f"{job} --params 1e15", capsys)
    assert "≤ 0.1" in run(f"{job} --params 1e3", capsys)


def test_the_papers_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(streaming_diloco())
    monkeypatch.setattr("longspan.cluster.papers.streaming_diloco", lambda: iter(rows))
    words = run("simulate paper streaming-diloco", capsys)
    assert "75 of 75 cells are within one step" in words and "104.8 / 104.8" in words
    told = json.loads(run("simulate paper streaming-diloco --json", capsys))
    assert len(told) == 15 and {len(row["steps_apart"]) for row in told} == {5}


def test_ring_compares_the_orders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawn = tmp_path / "new" / "ring.svg"
    words = run(f"{RING} --ranks 4 --timeline {drawn}", capsys).splitlines()
    assert "8,192 tokens in zigzag order on 4 ranks" in words[0]
    assert words[1].startswith("Devices compute") and "are sent" in words[2] and not words[3]
    assert words[4].split() == ["one", "attention", "contiguous", "zigzag", "striped"]
    assert words[-2] == "Next:" and words[-1].startswith("longspan ")
    assert ElementTree.parse(drawn)
    told = json.loads(run(f"{RING} --json", capsys))
    assert told["ranks"] == 8 and list(told["orders"]) == ["contiguous", "zigzag", "striped"]
    assert len(told["orders"]["zigzag"]["utilisation"]) == 8


def test_ring_writes_traces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for _ in range(2):  # a second run replaces the first one's trace
        run(f"{RING} --ranks 2 --trace {tmp_path}/a.jsonl", capsys)
    rows = list(read_trace(tmp_path / "a.jsonl"))
    run(f"{RING} --ranks 2 --trace {tmp_path}/a.json", capsys)
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    spans = [row for row in rows if isinstance(row, Span)]
    assert len(spans) == len(rows) == sum(event["ph"] == "X" for event in events)


def test_the_next_command_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = run(f"{RING} --ranks 3 --order contiguous", capsys).splitlines()
    again = words[-1].removeprefix("longspan ").replace("ring.svg", f"{tmp_path}/ring.svg")
    assert "on 3 ranks" in run(again, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("simulate ring --cluster nosuch --length 9", "no cluster at nosuch: give a YAML file or"),
        (f"{RING} --order snake", "unknown order 'snake': use one of contiguous, zigzag, striped"),
        (f"{RING} --ranks 99", "99 ranks on a cluster of 8"),
        (f"{RING} --kv-heads 5", "multiple of the KV heads"),
        (f"{RING} --trace a.txt", "name it .jsonl"),
        (f"{OUTER} --utilisation 1.5", "a utilisation lies between 0 and 1, not at 1.5"),
        (f"{OUTER} --utilisation half", "'half' is not a list of shares"),
        (f"{OUTER} --method zero", "unknown method 'zero': use one of data-parallel, diloco"),
        (f"{OUTER} --layers 0", "layers must be more than 0"),
        ("simulate paper nosuch", "use streaming-diloco"),
        ("lab run --nodes 0 -- true", "nodes is 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out
    assert printed.err.startswith("longspan: ") and printed.err.count("\n") == 1
    assert said in printed.err
