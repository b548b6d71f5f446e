"""The rig's arithmetic and its output, without any load: a wrong ratio would be believed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.perf import results
from tests.perf.__main__ import parse
from tests.perf.cases import CASES, TARGETS, Target
from tests.perf.load import Measurement
from tests.perf.servers import KINDS, Server


def measurement(rate: float, cpu: float, p99: float = 100, **extra: float) -> Measurement:
    return Measurement(int(rate * 2), 2.0, 0, 50, 80, p99, cpu / 4, cpu * 3 / 4, extra)


def sample() -> results.Results:
    found = results.Results(facts={
        "date": "2025-01-01T00:00:00", "machine": "2 CPUs", "kernel": "Linux", "options": "", "versions": {},
    })
    # The machine runs at half its speed in the second round: each ratio stays what it is.
    for number, speed in enumerate((1.0, 0.5, 1.0)):
        found.add("plain", "kore-uring", number, measurement(90_000 * speed, 8 / speed))
        found.add("plain", "nginx", number, measurement(100_000 * speed, 6 / speed))
        found.add("paced", "kore-uring", number, measurement(1000, 8, p99=150 / speed))
        found.add("paced", "nginx", number, measurement(1000, 8, p99=100 / speed))
        found.add("idle", "kore-uring", number, measurement(1000, 8, idle_bytes=3000, idle_rate=0.97))
    return found


def test_ratios_are_medians_of_rounds() -> None:
    """A ratio is taken within a round, so that what drifts between rounds cancels; more is better for CPU time too."""
    throughput, cpu = sample().ratio("plain", "kore-uring", "nginx")
    assert throughput == pytest.approx(0.9)
    assert cpu == pytest.approx(6 / 8)


def test_rounds_without_a_partner_do_not_count() -> None:
    """A round in which only one of two was measured gives no ratio."""
    found = results.Results()
    found.add("plain", "a", 0, measurement(100, 1))
    found.add("plain", "b", 1, measurement(100, 1))
    assert found.ratio("plain", "a", "b") == (None, None)
    assert found.ratio("nothing", "a", "b") == (None, None)


@pytest.mark.parametrize(("figure", "value", "expected"), [
    ("ratio", 1.2, "aim met"), ("ratio", 0.9, "met"), ("ratio", 0.8, "MISSED"), ("ratio", None, ""),
    ("idle_bytes", 0.8, "aim met"), ("idle_bytes", 0.95, "MISSED"),
])
def test_verdicts(figure: str, value: float | None, expected: str) -> None:
    """Bounds are lower bounds, or upper bounds where less is better."""
    bounds = (0.9, 1.0) if figure == "ratio" else (0.9, 0.85)
    assert results.verdict(Target("t", "plain", "a", "b", *bounds, figure), value) == expected


def test_other_figures_of_targets() -> None:
    """Differences and single figures come from where they were measured."""
    found = sample()
    by_figure = {target.figure: target for target in TARGETS}
    assert found.against(by_figure["p99_above"]) == (50, None)
    assert found.against(by_figure["idle_bytes"]) == (3000, None)
    assert found.against(by_figure["start_seconds"]) == (None, None)


def test_a_late_generator_measures_nothing() -> None:
    """A round in which the generator itself was held up tells nothing about p99."""
    found = results.Results()
    target = next(target for target in TARGETS if target.figure == "p99_above")
    found.add("paced", "kore-uring", 0, measurement(1000, 8, p99=100, late=20))
    found.add("paced", "nginx", 0, measurement(1000, 8, p99=30_000, late=30_000))
    assert found.against(target) == (None, None)
    found.add("paced", "kore-uring", 1, measurement(1000, 8, p99=120, late=20))
    found.add("paced", "nginx", 1, measurement(1000, 8, p99=100, late=20))
    assert found.against(target) == (20, None)


def test_tables_and_json_take_what_is_there() -> None:
    """Missing servers and cases leave dashes, never an exception; JSON holds every round."""
    found = sample()
    found.missing["fastwsgi"] = "not installed"
    text = results.target_table(found) + results.facts_text(found)
    text += "".join(results.case_table(found, case) for case in CASES)
    assert "missing: fastwsgi: not installed" in text
    assert "90,000" in text
    assert "0.90" in text
    data = json.loads(json.dumps(found.as_dict()))
    assert len(data["results"]["plain"]["nginx"]) == 3
    assert data["missing"] == {"fastwsgi": "not installed"}


def test_readme_is_updated_between_its_marks(tmp_path: Path) -> None:
    """Only what stands between the marks changes, twice the same; without marks nothing is written."""
    page = tmp_path / "README.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    for _ in range(2):
        results.update_readme(page, results.readme_table(sample()))
        text = page.read_text()
        assert text.startswith(f"before\n{results.BEGIN}\n| work |")
        assert text.endswith(f"{results.END}\nafter\n")
        assert "old" not in text
        assert "| 0.90 | 0.75 |" in text
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="no place"):
        results.update_readme(page, "table")
    assert page.read_text() == "nothing here"


def test_the_readme_has_a_place_for_the_table() -> None:
    """`make bench UPDATE=1` finds both marks."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    assert text.index(results.BEGIN) < text.index(results.END)


def test_cases_and_targets_name_what_exists() -> None:
    """Every entry is a known server, every target a known case and label."""
    labels = {case.name: [entry.label for entry in case.entries] for case in CASES}
    for case in CASES:
        assert len(set(labels[case.name])) == len(case.entries)
        assert {entry.server for entry in case.entries} <= set(KINDS)
        assert set(case.short) <= {entry.server for entry in case.entries}
    for target in TARGETS:
        assert target.ours in labels[target.case]
        assert not target.theirs or target.theirs in labels[target.case]


@pytest.mark.parametrize("arguments", [
    ["--cases", "nonsense"], ["--peers", "nonsense"], ["--plot", "x.png"], ["--update", "--cases", "startup"],
    ["--update", "--peers", "nginx"], ["--update", "--short"],
])  # fmt: skip
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt case is an error and not an empty run, and half a run does not take the place of a whole one."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err or "nonsense" in arguments


def test_the_sandbox_is_on_where_a_row_says_so_and_nowhere_else() -> None:
    """The same load with and without, on both engines; whoever runs the rig has no say in which is which."""
    sandboxed = {name for name, kind in KINDS.items() if kind.env.get("KORE_SANDBOX") == "yes"}
    assert sandboxed == {"kore-sandbox-uring", "kore-sandbox-epoll"}
    for case in CASES:
        for entry in case.entries:
            assert (entry.server in sandboxed) == entry.label.endswith(" sandboxed")
    cost = [target for target in TARGETS if "in the sandbox" in target.name]
    assert [(target.ours, target.theirs) for target in cost] == [
        (f"kore-{engine} sandboxed", f"kore-{engine}") for engine in ("uring", "epoll", "uring", "epoll")]
    loads = {case.name: {entry.label: entry for entry in case.entries} for case in CASES}
    for target in cost:
        ours, theirs = loads[target.case][target.ours], loads[target.case][target.theirs]
        assert (ours.path, ours.connections, ours.script) == (theirs.path, theirs.connections, theirs.script)
        assert KINDS[ours.server].env["KORE_IO"] == KINDS[theirs.server].env["KORE_IO"]
        assert (target.least, target.figure) == (0.95, "ratio")


@pytest.mark.parametrize(("name", "filters"), [("kore-epoll", "0"), ("kore-sandbox-epoll", "2")])
def test_servers_of_the_rig_are_confined_as_their_row_says(name: str, filters: str, monkeypatch) -> None:
    """The kernel says so of the worker, whatever the environment said; as root it is another user in another root."""
    if filters == "2":
        pytest.importorskip("pyseccomp")
        pytest.importorskip("prctl")
    monkeypatch.setenv("KORE_SANDBOX", "no" if filters == "2" else "yes")
    server = Server(KINDS[name], sys.executable, min(os.sched_getaffinity(0)))
    try:
        assert server.answers("/files/1k") == b"k" * 1024
        worker = next(pid for pid in server.pids if b"wrk" in Path(f"/proc/{pid}/cmdline").read_bytes())
        status = dict(re.findall(r"(\w+):\t(.*)", Path(f"/proc/{worker}/status").read_text()))
        assert status["Seccomp"] == filters
        if os.geteuid() == 0:
            confined = filters == "2"
            assert (status["Uid"].split()[0] != "0") == confined
            assert os.readlink(f"/proc/{worker}/root") == (str(server.folder) if confined else "/")
    finally:
        server.close()


def test_the_notes_say_which_rows_are_without_the_sandbox() -> None:
    """Both tables do."""
    assert results.SANDBOX_NOTE in results.target_table(sample())
    assert results.SANDBOX_NOTE[1:] in results.readme_table(sample())
