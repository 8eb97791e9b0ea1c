"""scripts/demo and scripts/test as programs: arguments, exit codes, and that nothing is left running."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = ("shared_schema", "twin", "server", "client", "training")

SERVER = """#!{python}
import http.server, pathlib, sys, os
root = pathlib.Path(__file__).parents[2]
(root / "server.pid").write_text(str(os.getpid()))
(root / "server-arguments").write_text(" ".join(sys.argv[1:]))
if (root / "server-fails").exists():
    sys.exit("cannot load the model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        failed = root / "never-ready"
        self.send_response(503 if failed.exists() else 200 if self.path == "/readyz" else 404)
        self.end_headers()
        if failed.exists():
            self.wfile.write(failed.read_bytes())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

CLIENT = """#!{python}
import json, pathlib, sys, urllib.request
root = pathlib.Path(__file__).parents[2]
arguments = sys.argv[1:]
(root / "arguments.json").write_text(json.dumps(arguments))
url = arguments[arguments.index("--server") + 1]
assert urllib.request.urlopen(url + "/readyz", timeout=5).status == 200
episode = pathlib.Path(arguments[arguments.index("--record") + 1]) / "20260101-000000-task"
episode.mkdir(parents=True)
(episode / "view.html").write_text("page")
sys.exit(int((root / "exit-code").read_text()))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment counts as installed and whose two programs are doubles."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    for name in DISTRIBUTIONS:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / name / "pyproject.toml", tmp_path / name)
    card = tmp_path / "models/twin/base/model_card.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    bin_folder = tmp_path / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    for name, text in (("vlm2vla-server", SERVER), ("vlm2vla-client", CLIENT)):
        (bin_folder / name).write_text(text.format(python=sys.executable))
        (bin_folder / name).chmod(0o755)
    command = 'source scripts/_env.sh; printf %s "$(fingerprint .venv/bin/python "${DEV_TOOLS[@]}")" > "$ENV_MARK"'
    environment = {**os.environ, "ENV_MARK": ".venv/.vlm2vla-run"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=30, env=environment)
    (tmp_path / "exit-code").write_text("0")
    return tmp_path


def demo(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(checkout / "scripts/demo"), *arguments], capture_output=True, text=True, timeout=60)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def server_stopped(checkout: Path) -> bool:
    pid = int((checkout / "server.pid").read_text())
    deadline_s = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not is_running(pid)


def test_demo_runs_the_client_with_the_defaults_and_says_where_the_page_is(checkout: Path) -> None:
    done = demo(checkout)
    assert done.returncode == 0, done.stderr
    arguments = (checkout / "arguments.json").read_text()
    for expected in ('"run"', '"--sim"', '"--task", "pick up the carrot"', '"--seed", "1000000"'):
        assert expected in arguments
    assert "runs/20260101-000000-task/view.html" in done.stdout
    assert server_stopped(checkout)


def test_demo_passes_arguments_on_and_adds_no_second_default(checkout: Path) -> None:
    demo(checkout, "--task", "wipe the sink", "--seed=7", "--max-cycles", "3")
    arguments = (checkout / "arguments.json").read_text()
    assert arguments.count("--task") == 1
    assert arguments.count("--seed") == 1
    assert '"--max-cycles", "3"' in arguments
    assert '"--sim"' in arguments


def test_demo_serves_another_model_and_lets_the_simulator_verify(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo(checkout).returncode == 0
    assert "serve --twin " in (checkout / "server-arguments").read_text()
    assert "--verifier" not in (checkout / "arguments.json").read_text()
    monkeypatch.setenv("VLM2VLA_DEMO_MODEL", "models/other")
    missing = demo(checkout)
    assert missing.returncode == 2 and "models/other is missing" in missing.stderr
    shutil.copytree(checkout / "models/twin", checkout / "models/other")
    shutil.rmtree(checkout / "runs")
    assert demo(checkout).returncode == 0
    served = (checkout / "server-arguments").read_text()
    assert "serve --model models/other/base --adapter twin=models/other/adapter " in served
    assert '"--verifier", "twin"' in (checkout / "arguments.json").read_text()


@pytest.mark.parametrize("code", [3, 5])
def test_demo_exits_with_the_code_of_the_client(checkout: Path, code: int) -> None:
    (checkout / "exit-code").write_text(str(code))
    assert demo(checkout).returncode == code
    assert server_stopped(checkout)


def test_demo_says_why_a_server_did_not_start(checkout: Path) -> None:
    (checkout / "server-fails").touch()
    done = demo(checkout)
    assert done.returncode == 4
    assert "cannot load the model" in done.stderr
    assert not (checkout / "arguments.json").exists()


def test_demo_does_not_wait_for_a_server_that_says_why_it_will_never_be_ready(checkout: Path) -> None:
    answer = {"error": {"code": "not_ready", "details": {"reason": "adapter 'twin' does not change the model"}}}
    (checkout / "never-ready").write_text(json.dumps(answer))
    done = demo(checkout)
    assert done.returncode == 4
    assert "does not change the model" in done.stderr
    assert server_stopped(checkout)


def test_demo_refuses_an_engine_that_it_does_not_know(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VLA_ENGINE", "openai")
    done = demo(checkout)
    assert done.returncode == 2
    assert "VLM2VLA_ENGINE=openai" in done.stderr


def test_demo_names_a_missing_model(checkout: Path) -> None:
    shutil.rmtree(checkout / "models")
    done = demo(checkout)
    assert done.returncode == 2
    assert "models/twin" in done.stderr


def test_a_missing_python_is_explained(checkout: Path) -> None:
    command = "source scripts/_env.sh; PATH=/nonexistent find_python"
    done = subprocess.run(["/bin/bash", "-c", command], cwd=checkout, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "3.11" in done.stderr
    assert "VLM2VLA_PYTHON" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"), [(["twins"], "expected server, twin or episodes"), (["twin"], "soak_twin.py is missing")]
)
def test_soak_names_what_it_can_do_and_what_is_missing(checkout: Path, arguments: list[str], word: str) -> None:
    done = subprocess.run([str(checkout / "scripts/soak"), *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.parametrize("arguments", [["server", "--robots", "2"], ["--robots", "2"]])
def test_soak_runs_its_program_with_the_other_arguments(checkout: Path, arguments: list[str]) -> None:
    (checkout / "bench").mkdir()
    (checkout / "bench/soak_server.py").write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    done = subprocess.run([str(checkout / "scripts/soak"), *arguments], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (1, "['--robots', '2']"), done.stderr


TRAIN = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
with (pathlib.Path(__file__).parents[2] / "commands.jsonl").open("a") as file:
    file.write(json.dumps(["train", *arguments]) + "\\n")
out = pathlib.Path(arguments[arguments.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "summary.json").write_text(json.dumps({{"seconds": 60.0, "steps": 7}}))
"""

MEASURE = """#!{python}
import json, pathlib, sys, urllib.request
root, arguments = pathlib.Path(__file__).parents[2], sys.argv[1:]
with (root / "commands.jsonl").open("a") as file:
    file.write(json.dumps(["client", *arguments]) + "\\n")
if "--server" in arguments:
    assert urllib.request.urlopen(arguments[arguments.index("--server") + 1] + "/readyz", timeout=5).status == 200
if "--suite" in arguments:
    out, suite = (pathlib.Path(arguments[arguments.index(name) + 1]) for name in ("--out", "--suite"))
    out.mkdir(parents=True, exist_ok=True)
    right = 9 if out.name == "after" else 1
    one = {{"successes": right, "trials": 10, "wilson_95": {{"low": 0.1, "high": 0.9}}}}
    (out / "summary.json").write_text(json.dumps({{"suites": {{suite.name: one}}}}))
sys.exit(3 if arguments[0] == "run" else 0)
"""


def evening(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(checkout / "scripts/evening"), *arguments], capture_output=True, text=True, timeout=60)


def test_evening_goes_from_recordings_to_success_before_and_after(checkout: Path) -> None:
    for name, text in (("vlm2vla-train", TRAIN), ("vlm2vla-client", MEASURE)):
        (checkout / ".venv/bin" / name).write_text(text.format(python=sys.executable))
        (checkout / ".venv/bin" / name).chmod(0o755)
    out = checkout / "out"
    done = evening(checkout, str(out), "--steps", "7", "--trials", "10")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "evening.json").read_text())
    assert [result[name]["successes"] for name in ("before", "after", "kept_before", "kept")] == [1, 9, 1, 1]
    assert result["after"]["suite"] == "pick_carrot_es" and result["kept"]["suite"] == "pick_carrot"
    assert result["seconds_in_all"] == 60.0 * len(result["seconds"]) == 660.0 and result["steps"] == 7
    commands = [json.loads(line) for line in (checkout / "commands.jsonl").read_text().splitlines()]
    assert "expert" in commands[0] and "--record" in commands[0]
    assert commands[1][1] == "ingest" and str(out / "recorded/episodes") in commands[1]
    trained = next(one for one in commands if one[1] == "sft")
    assert str(checkout / "models/twin/adapter") in trained and trained.count("--examples") == 3
    assert [one[one.index("--means") + 1] for one in commands if "--means" in one] == [
        "recoge la zanahoria=pick up the carrot"
    ]
    measured = [one for one in commands if one[:2] == ["client", "eval"] and "--verifier" in one][1:]
    assert [one[one.index("--model") + 1] for one in measured] == ["twin", "evening", "twin", "evening"]
    assert {one[one.index("--seed") + 1] for one in measured} == {"1000000"}
    assert commands[-1][1] == "run" and "that one failed" in done.stdout
    assert server_stopped(checkout)
    (checkout / "server-fails").touch()
    done = evening(checkout, str(checkout / "again"))
    assert done.returncode == 4 and "cannot load the model" in done.stderr


def test_evening_takes_recordings_of_ones_own_and_knows_its_options(checkout: Path) -> None:
    (checkout / ".venv/bin/vlm2vla-train").write_text("#!/bin/sh\necho \"$@\" >> \"$0.log\"; exit 1\n")
    (checkout / ".venv/bin/vlm2vla-train").chmod(0o755)
    assert evening(checkout, str(checkout / "out"), "--recordings", "mine").returncode == 1, "the first failure ends it"
    told = (checkout / ".venv/bin/vlm2vla-train.log").read_text()
    assert told.startswith("ingest --format recordings --input mine") and told.count("\n") == 1
    for wrong in ([], ["--steps", "3"], ["out", "--steps"], ["out", "--what", "1"]):
        assert evening(checkout, *wrong).returncode == 2
    assert "50 demonstrations" in evening(checkout, "--help").stdout
