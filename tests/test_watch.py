"""The page over a running run: what it tells, whom it tells, and that a real browser shows it."""

import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from longspan.errors import DataError
from longspan.report.alerts import alerts
from longspan.report.watch import Server, serve
from longspan.trace import Note, Row, Sample, Span, TraceWriter

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


def steps(losses: list[float], speed: float = 100.0) -> list[Row]:
    return [
        Sample(n, {"loss": loss, "tokens_per_s": speed, "step_s": 0.1, "tokens": 10})
        for n, loss in enumerate(losses, 1)
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    run = tmp_path / "run"
    writer = TraceWriter(run / "trace.jsonl")
    start = {"run": HOSTILE, "world": 4, "axes": {"dp": 1, "sp": 4}, "steps": 60}
    for row in [Note("start", start), *steps([5 - 0.05 * n for n in range(40)])]:
        writer.write(row)
    writer.close()
    with serve(run) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def ask(server: Server, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.headers)


def test_only_who_has_the_address_is_answered(server: Server) -> None:
    token = server.watch.token
    assert server.server_address[0] == "127.0.0.1"
    status, page, headers = ask(server, f"/?token={token}")
    assert status == 200 and "<script nonce=" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path, host in [("/", None), ("/?token=x", None), (f"/?token={token}", "evil.example")]:
        status, text, _ = ask(server, path, host)
        assert status == 403 and token not in text
    assert ask(server, f"/etc/passwd?token={token}")[0] == 404


def test_the_state_is_the_traces(server: Server) -> None:
    state = json.loads(ask(server, f"/state?token={server.watch.token}")[1])
    assert dict(state["figures"])["steps"] == "40"
    assert len(state["charts"]) == 2 and len(state["verdict"]) == 3
    assert "\x1b" not in state["name"]


def test_a_browser_shows_it(server: Server, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=4000"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", server.address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr
    assert "&lt;img src=x" in shown.stdout and "<img" not in shown.stdout
    assert len(re.findall("<svg", shown.stdout)) == 2
    assert "as of" in shown.stdout


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        assert server.watch.state()["figures"] == []
    with pytest.raises(DataError, match="no run at"):
        serve(tmp_path / "none")


def test_alerts() -> None:
    calm = steps([3.0 + 0.01 * (n % 5) for n in range(60)])
    assert alerts(calm) == []
    assert "not" not in str(alerts(calm, silent_s=1.0))
    assert alerts(calm, silent_s=60.0)[0].startswith("Nothing was written for 1 min")
    assert alerts([*calm, Note("end", {"reason": "done"})], silent_s=60.0) == []
    assert "Loss spike at step 61" in alerts([*calm, Sample(61, {"loss": 4.0})])[0]
    assert "stopped being a number" in alerts([*calm, Sample(61, {"loss": float("nan")})])[0]
    slow = steps([3.0] * 8, speed=20.0)
    assert "20 % of the usual speed" in alerts([*calm, *slow])[0]
    spans = [Span("f", rank, "compute", 0.0, 2.0 if rank == 2 else 1.0) for rank in range(4)]
    assert alerts(spans) == ["Rank 2 computes 2× as long as the others: a straggler."]
    assert "Site lost: site b." in alerts([Note("site_lost", {"site": "b"})])
