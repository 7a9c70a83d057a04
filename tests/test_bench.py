"""The benchmark: rows of the JSON contract, results that are checked while they are timed, and a reason for everything not measured."""

import json
import sys
import textwrap
from pathlib import Path

import numba
import pytest
from typer.testing import CliRunner

from hf_he.bench import native, report, runner, worker
from hf_he.bench.operations import BOOTSTRAP_SLOTS, COMBINATION, LINEAR, PER_WEIGHT, PRIMITIVES, WEIGHTED_SUM, Instance
from hf_he.bench.runner import Library, LibraryError, Measurements, Process, Turns, find_libraries, measure
from hf_he.ckks.parameters import CKKSParameters
from hf_he.cli import app

TOY = Instance(11, 4)
ONCE = Turns(rounds=2, runs=2, seconds=60.0, threads=2)
CONTRACT = {"library", "version", "op", "ring_dimension", "limbs", "threads", "median_ms", "runs"}


def peer(folder: Path, body: str, name: str = "openfhe") -> Library:
    """A peer whose script is `body`, run by this interpreter."""
    script = folder / f"peer_{name}.py"
    script.write_text(textwrap.dedent(body), encoding="utf-8")
    return Library(name, (sys.executable, "-I", worker.__file__, str(script)))


SLEEPER = """
    import time
    from worker import Operation

    VERSION = "7.1"

    def open_library(log2_degree, limbs, threads, names, shape):
        print("noise on stdout does no harm")
        operation = Operation(lambda: time.sleep(0.002) or 5.0, lambda result: abs(result - 5.5), times=3, threads=1)
        return {"key_switching": "none"}, {"rotate": operation}, {"ntt": "it has no transforms"}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The native engine on an insecure toy set, beside a peer that sleeps and one that is not there."""
    folder = tmp_path_factory.mktemp("peers")
    found = Measurements()
    libraries = [find_libraries(None)[0], peer(folder, SLEEPER), Library("tenseal", reason="no wheel for this machine")]
    measure(libraries, TOY, PRIMITIVES, ONCE, found)
    measure(libraries[:1], Instance(11, 4, (5, 3)), LINEAR, ONCE, found)
    return found


def test_rows_have_the_fields_of_the_contract_and_are_json(measured):
    assert {row["op"] for row in measured.rows if row["library"] == "native"} == {*PRIMITIVES, f"{COMBINATION}_5x3", f"{PER_WEIGHT}_5x3"}
    for row in json.loads(json.dumps(measured.rows, allow_nan=False)):
        assert row.keys() >= CONTRACT
        assert row["ring_dimension"] == 2048 and row["limbs"] == 4
        assert row["median_ms"] > 0 and row["runs"] == 4
        assert row["threads"] == (1 if row["op"] == "ntt" or row["library"] == "openfhe" else 2)


def test_what_was_timed_was_also_right(measured):
    for row in measured.rows:
        if row["library"] == "native":
            assert row["max_error"] < 1e-5, row["op"]


@pytest.mark.filterwarnings("ignore:CKKS parameters with N")
@pytest.mark.parametrize("name", ["bootstrap", "bootstrap_64_slots"])
def test_bootstrapping_has_a_row_for_all_and_for_sparse_slots(monkeypatch, name):
    toy = CKKSParameters.from_bits(11, 50, 40, 3, 50, 4, insecure=True, bootstrap=True)
    monkeypatch.setattr(native, "parameter_set", lambda _: toy)
    described, operations, absent = native.open_library(16, 32, numba.get_num_threads(), (name,), (0, 0))
    operation = operations[name]
    assert list(operations) == [name] and absent == {} and described["limbs"] == len(toy.full_moduli)
    assert operation.check(operation.run()) < 2.0**-13
    assert operation.details["slots"] == (BOOTSTRAP_SLOTS[name] or toy.slots)
    assert operation.details["levels_left"] == 3 and operation.details["key_bytes"] > 0 and operation.details["keygen_s"] > 0
    row = {**rows_of(native=5.0)[0], "op": name, "max_error": 1e-5, **operation.details}
    assert report.wide_table([row])[1] == [[{"bootstrap": "bootstrap"}.get(name, "bootstrap, 2^6 slots"), "2^14 x 8", "5 (3 levels left, error 1.0e-05)", "-"]]


def test_a_peer_is_measured_in_its_own_process_with_its_own_scale(measured):
    row = next(row for row in measured.rows if row["library"] == "openfhe")
    assert (row["op"], row["version"], row["max_error"]) == ("rotate", "7.1", 0.5)
    assert row["median_ms"] >= 6.0


def test_everything_not_measured_has_its_reason(measured):
    assert {"library": "tenseal", "what": "everything", "reason": "no wheel for this machine"} in measured.absent
    assert {"library": "openfhe", "what": "ntt", "reason": "it has no transforms"} in measured.absent


def test_peers_without_an_environment_say_how_to_make_one(tmp_path):
    (tmp_path / "desilo.failed").write_text("needs Python 3.12, which was not found\n", encoding="utf-8")
    reasons = {library.name: library.reason for library in find_libraries(tmp_path)}
    assert reasons["native"] == ""
    assert "setup_peers.sh" in reasons["fhelium"]
    assert reasons["desilo"] == "needs Python 3.12, which was not found"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os, sys\nprint('out of luck', file=sys.stderr)\nos._exit(3)", "its process ended with status 3: out of luck"),
        ("VERSION = '1'\ndef open_library(*_):\n    raise RuntimeError('ring too large')", "RuntimeError: ring too large"),
    ],
)
def test_a_peer_that_breaks_does_not_break_the_run(tmp_path, body, reason):
    found = Measurements()
    measure([peer(tmp_path, body)], TOY, PRIMITIVES, ONCE, found)
    assert found.rows == []
    assert [entry["reason"] for entry in found.absent] == [reason]


def test_a_peer_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TIMEOUT", 0.2)
    process = Process(peer(tmp_path, "import time\ntime.sleep(5)"), threads=1)
    with pytest.raises(LibraryError, match="no answer"):
        process.ask({"time": "rotate", "runs": 1, "seconds": 1})
    process._process.kill()
    process.close()


def test_turns_begin_with_another_library_each_round(tmp_path):
    log = tmp_path / "log"
    body = SLEEPER.replace("time.sleep(0.002)", f"open({str(log)!r}, 'a').write(__file__[-10:-3] + ' ') and None")
    libraries = [peer(tmp_path, body, name) for name in ("openfhe", "fhelium")]
    measure(libraries, TOY, ("rotate",), Turns(rounds=2, runs=1), Measurements())
    order = log.read_text(encoding="utf-8").split()
    assert order == ["openfhe", "fhelium"] + ["openfhe"] * 2 + ["fhelium"] * 4 + ["openfhe"] * 2


@pytest.mark.parametrize("memory_gb", [8.0, 6.0, 3.0])
def test_libraries_that_do_not_fit_together_are_measured_in_groups(tmp_path, memory_gb):
    """One peer a group at least, also where the engine alone leaves no room for another like it."""

    def announce(text):
        said.append(text)
        assert len(said) < 20, "the groups do not end"

    body = SLEEPER + "\n    import worker\n    worker._memory_gb = lambda: 4.0\n"
    found, said = Measurements(), []
    libraries = [peer(tmp_path, body, name) for name in ("native", "openfhe", "fhelium")]
    measure(libraries, TOY, ("rotate",), Turns(rounds=1, runs=2, memory_gb=memory_gb), found, announce)
    opened = [text.rpartition(" ")[2] for text in said if "keys" in text]
    assert opened == ["native", "openfhe", "native", "fhelium"]
    assert {row["library"]: row["runs"] for row in found.rows} == {"native": 4, "openfhe": 2, "fhelium": 2}


def rows_of(**milliseconds):
    shared = {"ring_dimension": 1 << 14, "threads": 2, "runs": 3, "version": "1", "parameters": {"key_switching": "-"}}
    return [{**shared, "library": library, "op": "rotate", "limbs": 9 if library == "desilo" else 8, "median_ms": ms} for library, ms in milliseconds.items()]


def test_tables_compare_with_the_fastest_peer_even_when_it_has_a_limb_more():
    rows = rows_of(native=2.0, openfhe=13.0, desilo=12.0)
    header, lines = report.wide_table(rows)
    assert header == ["operation", "N x limbs", "hf_he", "OpenFHE", "DESILO FHE", "fastest peer / hf_he"]
    assert lines == [["rotate", "2^14 x 8", "2", "13", "12", "6.0x"]]


def layer(op, inputs=128, outputs=512, **milliseconds):
    return [{**row, "inputs": inputs, "outputs": outputs, "op": f"{op}_{inputs}x{outputs}"} for row in rows_of(**milliseconds)]


def test_ratios_of_linear_layers_are_of_their_own_row_and_the_single_calls_says_of_which():
    rows = [
        *layer(COMBINATION, native=500.0),
        *layer(PER_WEIGHT, native=22000.0, tenseal=20000.0, desilo=21000.0),
        *layer(WEIGHTED_SUM, tenseal=19000.0),
        *layer(COMBINATION, 64, native=250.0),
    ]
    assert report.wide_table(rows)[1] == [
        ["linear, one call, 128 -> 512", "2^14 x 8", "500", "-", "-", "38.0x (TenSEAL, weighted sums)"],
        ["linear, per weight, 128 -> 512", "2^14 x 8", "22,000", "20,000", "21,000", "0.91x"],
        ["linear, weighted sums, 128 -> 512", "2^14 x 8", "-", "19,000", "-", "-"],
        ["linear, one call, 64 -> 512", "2^14 x 8", "250", "-", "-", "-"],
    ]
    factors = {(line[0], line[2]): line[-1] for line in report.long_table([row for row in rows if row["library"] != "desilo"])[1]}
    assert factors["linear, per weight, 128 -> 512", "hf_he"] == "1.0" and factors["", "TenSEAL"] == "0.91"
    assert factors["linear, one call, 128 -> 512", "hf_he"] == "1.0" and factors["linear, weighted sums, 128 -> 512", "TenSEAL"] == "-"


def test_columns_of_libraries_on_one_thread_say_so():
    rows = rows_of(native=2.0, lattigo=12.0)
    rows[1]["threads"] = 1
    rows += [{**rows[0], "op": "ntt", "threads": 1}]
    assert report.wide_table(rows)[0] == ["operation", "N x limbs", "hf_he", "Lattigo (1 thread)", "fastest peer / hf_he"]
    assert report.wide_table([{**row, "threads": 1} for row in rows])[0][2:4] == ["hf_he", "Lattigo"]


def test_report_is_written_between_the_markers(tmp_path):
    data = {
        "machine": {"date": "today", "cpu": "a CPU", "flags": ["avx2"], "caches": {"L1": "32K"}, "cores": 2, "memory_gb": 8.0, "system": "Linux",
                    "python": "3.12", "packages": {"numba": "1"}},
        "threads": 2, "load": [0.1, 1.9], "rows": rows_of(native=2.0, openfhe=13.0), "absent": [{"library": "lattigo", "what": "everything", "reason": "why"}],
    }  # fmt: skip
    document = report.insert(f"# Title\n{report.BEGIN}\nold\n{report.END}\nnotes\n", report.markdown(data))
    assert document.startswith("# Title\n") and document.endswith("\nnotes\n") and "old" not in document
    assert "| rotate | 2^14 x 8 | 2 | 13 | 6.5x |" in document
    assert "- Lattigo. everything: why" in document
    report.plot(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_command_line_prints_a_list_of_rows(tmp_path):
    result = CliRunner().invoke(app, ["bench", "primitives", "--quick", "--json", "--peers", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["op"] for row in rows] == list(PRIMITIVES)
    assert all(row.keys() >= CONTRACT and row["ring_dimension"] == 1 << 14 and row["limbs"] == 8 for row in rows)
