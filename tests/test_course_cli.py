"""course.py in a copy of its own: real environments, but a pip that writes metadata and downloads nothing."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What real pip prints to its error stream (pip 23 to 25), shortened.
PIP_SAYS = {
    "no network": (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip._vendor."
        "urllib3.connection.HTTPSConnection>: Failed to establish a new connection: [Errno -3] Temporary "
        "failure in name resolution')': /simple/tqdm/\nERROR: No matching distribution found for tqdm"
    ),
    "disk full": "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    "certificate": (
        "WARNING: Retrying after connection broken by 'SSLError(SSLCertVerificationError(1, '[SSL: "
        "CERTIFICATE_VERIFY_FAILED]'))'\nERROR: No matching distribution found for tqdm"
    ),
    "not offered": "ERROR: No matching distribution found for tqdm",
    "not writable": "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'a'",
    "broken off": "pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool: Read timed out.",
    "something else": "ERROR: the moon is in the wrong place",
}

FAKE_PIP = """
import os, pathlib, re, signal, sys, sysconfig, time

signal.signal(signal.SIGINT, lambda *_: sys.exit("ERROR: Operation cancelled by user"))
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit(print("pip 99"))
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(" ".join(arguments) + "\\n")
site = pathlib.Path(sysconfig.get_paths()["purelib"])


def fail(text):
    sys.stderr.write(text + "\\n")
    sys.exit(1)


def install(requirement):
    name = re.match("[A-Za-z0-9._-]+", requirement).group()
    info = site / (re.sub("[-_.]+", "_", name) + "-9.9.dist-info")
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: %s\\nVersion: 9.9\\n" % name)
    if name == os.environ.get("FAKE_PIP_HANGS_AT"):
        print("hanging", flush=True)
        time.sleep(60)
    (info / "RECORD").touch()


there = (site / "torch-9.9.dist-info").exists()
source = next((s for s in ("--no-index", "--index-url") if s in arguments), "ordinary")
offers = os.environ.get("FAKE_PIP_TORCH_FROM", "--no-index")
if source != "ordinary" and not there and source != offers:
    fail(os.environ.get("FAKE_PIP_INDEX_SAYS", "ERROR: No matching distribution found for torch>=2.6"))
if os.environ.get("FAKE_PIP_SAYS") and source == "ordinary":
    fail(os.environ["FAKE_PIP_SAYS"])
for option, value in zip(arguments, arguments[1:] + [""]):
    if option == "-r":
        for line in pathlib.Path(value).read_text().splitlines():
            if line.split("#")[0].strip():
                install(line)
    elif option.startswith("torch"):
        install(option)
"""

# Makes environments without pip and puts the fake one there: no other part of course.py is changed.
FAKING = """
import pathlib, subprocess, sys
import course

def run(command, echo, real=course.run):
    if command[1:3] != ["-m", "venv"]:
        return real(command, echo)
    subprocess.run([*command, "--without-pip"], check=True)
    site = pathlib.Path(course.inspect([])["site"])
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(pathlib.Path(FAKE_PIP_FILE).read_text())
    return 0, ""

course.run = run
course.has_nvidia_gpu = lambda: False
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with course.py, its requirement files, two notebooks and a package, and no environment."""
    home = tmp_path / "the course"
    for folder in ("notebooks/demos", "dsv2"):
        (home / folder).mkdir(parents=True)
    for file in ("course.py", "requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / file, home / file)
    for notebook in ("00_start_here", "03_decoupled_rope", "demos/attention"):
        (home / "notebooks" / f"{notebook}.ipynb").write_text("{}", encoding="utf-8")
    (home / "dsv2/__init__.py").write_text("word = 'found'\n", encoding="utf-8")
    (tmp_path / "fake_pip.py").write_text(FAKE_PIP, encoding="utf-8")
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "pip.log"))
    for name in ("DSV2_TORCH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def course(home, monkeypatch):
    """course.py of that folder as a module; what it would start is noted in `course.started`."""
    spec = importlib.util.spec_from_file_location("course", home / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "course", module)
        exec(FAKING.replace("FAKE_PIP_FILE", repr(str(home.parent / "fake_pip.py"))), {})
    module.started = []
    monkeypatch.setattr(module, "hand_over", lambda *call: module.started.append(call) or 0)
    monkeypatch.setattr(module.signal, "signal", lambda *call: None)
    return module


def as_a_program(home: Path, *arguments: str) -> list[str]:
    """The command that runs `course.py ARGUMENTS` of that folder with the fake pip."""
    faking = FAKING.replace("FAKE_PIP_FILE", repr(str(home.parent / "fake_pip.py")))
    # Where the tests run in the background, programs inherit that SIGINT is ignored.
    code = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"sys.path.insert(0, {str(home)!r})\n{faking}\nsys.exit(course.main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *arguments]


def pip_calls(home: Path) -> list[str]:
    log = home.parent / "pip.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


# ---------------------------------------------------------------------------------------------- an old Python


@pytest.mark.parametrize(
    "version, too_old",
    [((3, 6, 15), True), ((3, 9, 18), True), ((3, 10, 0), False), ((3, 13, 1), False), ((4, 0, 0), False)],
)
def test_python_version(course, version, too_old):
    problem = course.version_problem(version, "/usr/bin/python3")
    assert bool(problem) == too_old
    if too_old:
        assert "3.10" in problem and f"{version[0]}.{version[1]}" in problem and "/usr/bin/python3" in problem


def test_an_old_python_can_read_the_file():
    source = (ROOT / "course.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 7))
    # 3.6 has no `annotations` in __future__; the check must come before anything that 3.6 lacks.
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    check = next(node for node in tree.body if isinstance(node, ast.If))
    assert [alias.name for node in imports if node.lineno < check.lineno for alias in node.names] == ["sys"]
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in imports)


@pytest.mark.parametrize("minor", [6, 7, 8, 9])
def test_an_old_python_gets_a_sentence(minor):
    python = shutil.which(f"python3.{minor}")
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"Python 3.{minor} is not on this machine.")
    ended = subprocess.run([python, str(ROOT / "course.py"), "lab"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "needs Python 3.10 or newer" in ended.stderr and f"3.{minor}" in ended.stderr
    assert "Traceback" not in ended.stderr and "SyntaxError" not in ended.stderr


# ------------------------------------------------------------------------------------------- the command line


def test_help_names_every_command_and_nothing_else(course, capsys):
    assert course.main(["--help"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert shown == ["lab", "test", "bench", *course.ON_EXERCISES]


@pytest.mark.parametrize("arguments", [[], ["labb"], ["--port", "8888"]])
def test_a_wrong_command_shows_the_usage(course, capsys, arguments):
    assert course.main(arguments) == 2
    said = capsys.readouterr()
    assert "usage:" in said.out + said.err


def test_asking_for_help_installs_nothing(course, home):
    assert course.main(["test", "--help"]) == 0
    assert not (home / ".venv").exists()


def test_ctrl_c_ends_quietly(course, capsys, monkeypatch):
    def interrupted(files):
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "prepare", interrupted)
    assert course.main(["test"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- the environment


def test_first_run_installs_and_the_second_does_nothing(course, home, capsys):
    assert course.main(["lab", "--no-browser"]) == 0
    assert "Making .venv" in capsys.readouterr().out
    calls = pip_calls(home)
    assert calls[-1].endswith(f"-r {home / 'requirements.txt'}")
    assert course.main(["lab", "--no-browser"]) == 0
    assert pip_calls(home) == calls
    assert "Making" not in capsys.readouterr().out
    assert len(course.started) == 2


def test_the_package_is_importable_from_anywhere_also_after_a_move(course, home, tmp_path):
    course.prepare([course.TO_RUN])
    moved = home.rename(tmp_path / "moved")
    python = moved / course.venv_python().relative_to(home)
    ended = subprocess.run(
        [python, "-c", "import dsv2; print(dsv2.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(ended.stdout.strip()).resolve() == (moved / "dsv2/__init__.py").resolve(), ended.stderr


def test_test_extras_come_when_they_are_needed(course, home):
    course.main(["lab"])
    assert "requirements-test.txt" not in "".join(pip_calls(home))
    course.main(["test"])
    calls = pip_calls(home)
    assert "requirements-test.txt" in calls[-1]
    course.main(["lab"])
    course.main(["bench", "model"])
    assert pip_calls(home) == calls


def test_changed_requirements_are_installed(course, home):
    course.prepare([course.TO_RUN])
    with open(home / "requirements.txt", "a", encoding="utf-8") as file:
        file.write("newcomer>=1  # wanted from now on\n")
    course.prepare([course.TO_RUN])
    assert course.inspect(["newcomer"])["found"] == {"newcomer": "9.9"}
    count = len(pip_calls(home))
    course.prepare([course.TO_RUN])
    assert len(pip_calls(home)) == count


def test_a_package_removed_by_hand_is_installed_again(course):
    course.prepare([course.TO_RUN])
    shutil.rmtree(Path(course.inspect([])["site"]) / "einops-9.9.dist-info")
    course.prepare([course.TO_RUN])
    assert "einops" in course.inspect(["einops"])["found"]


def test_a_damaged_stamp_means_installing_again(course, home):
    course.prepare([course.TO_RUN])
    count = len(pip_calls(home))
    for stamp in ("", "[1]", "{", '"words"', '{"requirements.txt": 3}', "\0"):
        course.STAMP.write_text(stamp, encoding="utf-8")
        assert not course.up_to_date([course.TO_RUN])
    course.prepare([course.TO_RUN])
    assert len(pip_calls(home)) > count and course.up_to_date([course.TO_RUN])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that ends a process politely.")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT] if os.name != "nt" else [])
def test_an_interrupted_installation_is_recovered_from(course, home, sent):
    environment = dict(os.environ, FAKE_PIP_HANGS_AT="safetensors")
    process = subprocess.Popen(
        as_a_program(home, "lab", "--no-browser"),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.strip() == "hanging":
            break
    if sent == signal.SIGTERM:
        process.send_signal(sent)  # course.py alone: it must take pip with it
    else:
        os.killpg(process.pid, sent)  # as Ctrl-C in a terminal, or a machine that goes down
    said = process.communicate(timeout=30)[1]  # ends when pip, which holds the same pipe, has ended too
    if sent != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in said, said
    assert not course.STAMP.exists()
    torn = Path(course.inspect([])["site"]) / "safetensors-9.9.dist-info"
    assert torn.exists() and not (torn / "RECORD").exists()
    (torn.parent / "~afetensors").mkdir()
    course.prepare([course.TO_RUN])
    assert (torn / "RECORD").exists() and not (torn.parent / "~afetensors").exists()
    assert course.up_to_date([course.TO_RUN])


@pytest.mark.parametrize("damage", ["empty", "no python", "no pip"])
def test_a_half_made_environment_is_made_anew(course, home, capsys, damage):
    if damage == "empty":
        (home / ".venv").mkdir()
    else:
        course.prepare([course.TO_RUN])
        if damage == "no python":
            course.venv_python().unlink()
        else:
            shutil.rmtree(Path(course.inspect([])["site"]) / "pip")
            course.STAMP.unlink()
    assert course.main(["lab"]) == 0
    said = capsys.readouterr().out
    assert ".venv is half-made" in said and ("no pip" if damage == "no pip" else "no Python") in said
    assert course.up_to_date([course.TO_RUN])


def test_a_file_in_the_place_of_the_environment_is_left_alone(course, home, capsys):
    (home / ".venv").write_text("mine", encoding="utf-8")
    assert course.main(["lab"]) == 1
    assert "remove or rename" in capsys.readouterr().err
    assert (home / ".venv").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_no_venv_module(course, capsys, monkeypatch, module):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        course.importlib.util, "find_spec", lambda name: None if name == module else real(name)
    )
    assert course.main(["lab"]) == 1
    said = capsys.readouterr().err
    assert module in said and "apt install python3" in said and "Traceback" not in said


def test_a_folder_that_cannot_be_written(course, home, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(home / ".venv.lock"))

    monkeypatch.setattr(course, "open", refuse, raising=False)
    assert course.main(["lab"]) == 1
    said = capsys.readouterr().err
    assert "cannot write into its own folder" in said and "Copy it" in said


def test_two_at_once_wait_for_each_other(course, home):
    with open(home / ".venv.lock", "a") as first, open(home / ".venv.lock", "a") as second:
        assert course.try_lock(first.fileno())
        assert not course.try_lock(second.fileno())
        first.close()
        assert course.try_lock(second.fileno())


def test_the_one_that_waited_does_not_install_again(course, home, capsys, monkeypatch):
    course.prepare([course.TO_RUN])
    count = len(pip_calls(home))
    answers = iter([False, True])  # not yet up to date before the wait, up to date after it
    monkeypatch.setattr(course, "up_to_date", lambda files: next(answers))
    locks = iter([False, True])
    monkeypatch.setattr(course, "try_lock", lambda descriptor: next(locks))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    course.prepare([course.TO_RUN])
    assert "waiting for it" in capsys.readouterr().out
    assert len(pip_calls(home)) == count


def test_another_environment_around_does_not_leak_in(course, home, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    monkeypatch.setenv("VIRTUAL_ENV", "/other")
    variables = course.environment_variables()
    assert "PYTHONPATH" not in variables and "PYTHONHOME" not in variables
    assert variables["VIRTUAL_ENV"] == str(home / ".venv")
    assert variables["PATH"].split(os.pathsep)[0] == str(course.venv_python().parent)


# ------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    "failure, meaning, advice",
    [
        ("no network", "cannot be reached", "Check the network"),
        ("disk full", "the disk is full", "Free some space"),
        ("certificate", "certificate is not trusted", "PIP_CERT"),
        ("not offered", "not offered for Python", "another Python"),
        ("not writable", "cannot be written", "user who owns"),
        ("something else", "the moon is in the wrong place", "Run this again"),
    ],
)
def test_a_failed_installation_says_what_to_do(course, capsys, monkeypatch, failure, meaning, advice):
    monkeypatch.setenv("FAKE_PIP_SAYS", PIP_SAYS[failure])
    assert course.main(["lab"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("course.py: ") and meaning in last and advice in last
    assert not course.STAMP.exists() and not course.started
    monkeypatch.delenv("FAKE_PIP_SAYS")
    assert course.main(["lab"]) == 0


def test_too_little_disk_space(course, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(course.shutil, "disk_usage", lambda folder: usage._replace(free=int(1.5e9)))
    assert course.main(["lab"]) == 1
    said = capsys.readouterr().err
    assert "1.5 GB free" in said and "3 GB" in said and "Traceback" not in said


def test_a_small_temporary_folder(course, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    sizes = {course.ROOT: int(50e9)}
    monkeypatch.setattr(
        course.shutil, "disk_usage", lambda folder: usage._replace(free=sizes.get(folder, int(0.3e9)))
    )
    assert course.main(["lab"]) == 1
    assert "TMPDIR" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- PyTorch


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.parametrize(
    "offered_by, says, asked",
    [
        ("--no-index", "from a wheel on this machine", ["--no-index"]),
        ("--index-url", "CPU build from", ["--no-index", "--index-url"]),
        ("ordinary", "the ordinary build", ["--no-index", "--index-url"]),
    ],
)
def test_pytorch_without_a_gpu(course, home, capsys, monkeypatch, linux, offered_by, says, asked):
    monkeypatch.setenv("FAKE_PIP_TORCH_FROM", offered_by)
    monkeypatch.setattr(course, "check_space", lambda needed: None)
    course.prepare([course.TO_RUN])
    assert says in capsys.readouterr().out
    *before, last = pip_calls(home)
    assert [next(s for s in ("--no-index", "--index-url") if s in call) for call in before] == asked
    assert all("--no-deps" in call for call in before)
    assert "-r" in last.split() and "torch" in course.inspect(["torch"])["found"]


def test_pytorch_that_is_there_is_left_alone(course, home, capsys, linux):
    course.prepare([course.TO_RUN])
    capsys.readouterr()
    course.prepare([course.TO_RUN, course.TO_TEST])
    assert "already there" in capsys.readouterr().out
    assert not any("--index-url" in call for call in pip_calls(home))


def test_a_broken_download_does_not_turn_into_a_larger_one(course, home, capsys, monkeypatch, linux):
    monkeypatch.setenv("FAKE_PIP_TORCH_FROM", "ordinary")
    monkeypatch.setenv("FAKE_PIP_INDEX_SAYS", PIP_SAYS["broken off"])
    assert course.main(["lab"]) == 1
    assert "PyTorch could not be installed" in capsys.readouterr().err
    assert not any("-r" in call.split() for call in pip_calls(home))


@pytest.mark.parametrize("platform, gpu", [("linux", True), ("darwin", False), ("win32", False)])
def test_pytorch_elsewhere_is_pip_s_own_choice(course, home, monkeypatch, platform, gpu):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(course, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(course, "check_space", lambda needed: None)
    course.prepare([course.TO_RUN])
    assert len(pip_calls(home)) == 1


def test_pytorch_by_request(course, home, monkeypatch, linux):
    course.prepare([course.TO_RUN])
    count = len(pip_calls(home))
    monkeypatch.setenv("DSV2_TORCH", "torch==2.11.0 --index-url https://example.org/cu126")
    monkeypatch.setenv("FAKE_PIP_TORCH_FROM", "--index-url")
    course.prepare([course.TO_RUN])
    assert pip_calls(home)[count].endswith("torch==2.11.0 --index-url https://example.org/cu126")
    assert len(pip_calls(home)) == count + 2
    course.prepare([course.TO_RUN])
    monkeypatch.delenv("DSV2_TORCH")
    course.prepare([course.TO_RUN])
    assert len(pip_calls(home)) == count + 2


# -------------------------------------------------------------------------------------------------------- lab


def option(command: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(name + "="))


@pytest.fixture
def ready(course, monkeypatch):
    """The module with its environment taken as made."""
    monkeypatch.setattr(course, "prepare", lambda files: None)
    return course


def test_lab_opens_the_first_notebook_on_a_free_port(ready, home):
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 8888))
        except OSError:
            pass  # taken already, which is as good
        listener.listen()
        assert ready.main(["lab"]) == 0
    command, folder = ready.started[0]
    assert int(option(command, "--ServerApp.port")) > 8888
    assert option(command, "--LabApp.default_url") == "/lab/tree/notebooks/00_start_here.ipynb"
    assert option(command, "--ServerApp.root_dir") == str(home) == str(folder)
    assert "--no-browser" not in command


def test_lab_passes_its_options_on(ready, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert ready.main(["lab", "03", "--port", str(port), "--no-browser"]) == 0
    command, _ = ready.started[0]
    assert option(command, "--ServerApp.port") == str(port)
    assert "03_decoupled_rope" in option(command, "--LabApp.default_url")
    assert "--no-browser" in command
    assert f"http://localhost:{port}/" in capsys.readouterr().out


def test_a_taken_port(ready, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert ready.main(["lab", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port} is taken" in said and "--port" in said
    suggested = int(said.partition("--port ")[2].partition(",")[0])
    assert suggested != port and not ready.port_problem(suggested)
    assert not ready.started


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_an_impossible_port(ready, capsys, port):
    assert ready.main(["lab", f"--port={port}"]) == 1
    assert "between 1 and 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, found",
    [
        ("00_start_here", "00_start_here"),
        ("03", "03_decoupled_rope"),
        ("notebooks/03_decoupled_rope.ipynb", "03_decoupled_rope"),
        ("03_decoupled_rope.ipynb", "03_decoupled_rope"),
        ("attention", "demos/attention"),
    ],
)
def test_find_notebook(course, home, name, found, monkeypatch):
    monkeypatch.chdir(home.parent)  # not here, where such a notebook lies
    assert course.find_notebook(name) == home / "notebooks" / f"{found}.ipynb"


@pytest.mark.parametrize("name, why", [("99", "There are: 00_start_here"), ("0", "several notebooks")])
def test_a_notebook_that_is_not_there(ready, capsys, name, why):
    assert ready.main(["lab", name]) == 1
    assert why in capsys.readouterr().err


def test_a_notebook_outside_the_course(ready, capsys, tmp_path):
    (tmp_path / "own.ipynb").write_text("{}", encoding="utf-8")
    assert ready.main(["lab", str(tmp_path / "own.ipynb")]) == 1
    assert "copy it" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- test and bench


@pytest.mark.parametrize("status", [0, 1, 5])
def test_test_ends_as_pytest_does(course, home, tmp_path, status):
    course.prepare([course.TO_RUN, course.TO_TEST])
    fake = f"""
        import os, sys
        print("pytest in", os.getcwd(), sys.argv[1:])
        print("== closing line ==")
        sys.exit({status})
    """
    (Path(course.inspect([])["site"]) / "pytest.py").write_text(textwrap.dedent(fake), encoding="utf-8")
    ended = subprocess.run(
        as_a_program(home, "test", "tests/test_x.py", "-k", "y"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == status, ended.stderr
    started, closing = ended.stdout.strip().splitlines()
    assert str(home) in started
    assert started.endswith("['--nbval-lax', '--nbval-current-env', 'tests/test_x.py', '-k', 'y']")
    assert closing == "== closing line =="


@pytest.mark.parametrize("command", ["check", "hint", "progress", "solution", "reset", "build-exercises"])
def test_commands_on_exercises_run_where_the_reader_is(ready, home, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert ready.main([command, "02.3", "--help"]) == 0
    script = str(home / "dsv2" / "course" / "__main__.py")
    assert ready.started == [([script, command, "02.3", "--help"], tmp_path)]


def test_bench_runs_the_package_where_the_reader_is(ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ready.main(["bench", "model", "--quick"]) == 0
    assert ready.started == [(["-m", "dsv2.bench", "model", "--quick"], tmp_path)]
