#!/usr/bin/env python3
"""The one entry point of the course: makes the environment .venv on first use, then runs a command in it.

Needs nothing but Python 3.10 or newer. Python 3.6 can read this file too, and runs it as far as the check
of the version, so that an old Python gives a sentence instead of a syntax error.
"""

import sys


def version_problem(version, executable="python3"):
    """What to tell someone whose Python is too old, or "" if it is new enough."""
    if tuple(version[:2]) >= (3, 10):
        return ""
    return (
        f"The course needs Python 3.10 or newer; {executable} is Python {version[0]}.{version[1]}.\n"
        "Install a newer one (https://www.python.org/downloads/, or your system's package manager)\n"
        "and start the course with it, for example: python3.12 course.py lab"
    )


if version_problem(sys.version_info):
    sys.exit(version_problem(sys.version_info, sys.executable))

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "dsv2-installed.json"  # written after a complete installation, removed before the next one
TO_RUN = "requirements.txt"
TO_TEST = "requirements-test.txt"
FIRST_NOTEBOOK = "00_start_here"
FIRST_PORT = 8888
ON_EXERCISES = ("check", "hint", "progress", "solution", "reset", "build-exercises")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Free space asked for, in GB: (beside course.py, in the temporary folder that pip downloads into). The whole
# environment measures 1.7 GB with the CPU build of PyTorch; the CUDA build brings about 7 GB of libraries.
SPACE_FOR_CPU = (3.0, 1.0)
SPACE_FOR_CUDA = (10.0, 4.0)
SPACE_WITHOUT_TORCH = (1.0, 0.5)

USAGE = """\
usage: python3 course.py COMMAND [options]

  lab [NOTEBOOK] [--port N] [--no-browser]   open the course in JupyterLab
  test [pytest's arguments]                  run the tests and the notebooks, e.g. test -k rope
  bench [arguments]                          run the benchmarks (python -m dsv2.bench)

  check 02 | check 02.3                      check your answers to a chapter's exercises, or to one
  hint 02.3                                  the next of three hints
  progress                                   what is done
  solution 02.3                              the worked solution, when yours has passed
  reset 02.3                                 begin an exercise again; your version is kept
  build-exercises                            make exercises/ from solutions/; your changes are kept

The first run makes .venv beside this file and installs what the course needs; later runs start at once.
Set DSV2_TORCH to choose the PyTorch to install, e.g. DSV2_TORCH="torch==2.11.0".
"""


class Stop(Exception):
    """The command cannot go on; the message says why and what to do."""


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit status, or 1 (cannot go on), 2 (no such command), 130 (Ctrl-C)."""
    commands = {"lab": lab, "test": test, "bench": bench}
    commands.update((word, partial(on_exercises, word)) for word in ON_EXERCISES)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        print(f"course.py: there is no command {name!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    if name in ("test", "bench") and rest and rest[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    # A polite kill also ends pip, which would otherwise go on writing into .venv alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return commands[name](rest)
    except Stop as stop:
        print(f"course.py: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


# --------------------------------------------------------------------------------------------------- commands


def lab(arguments: list[str]) -> int:
    """Open JupyterLab on a notebook of the course."""
    parser = argparse.ArgumentParser(prog="course.py lab", description="Open the course in JupyterLab.")
    parser.add_argument(
        "notebook", nargs="?", default=FIRST_NOTEBOOK, help="a notebook's file, or how its name begins: 03"
    )
    parser.add_argument("--port", type=int, help=f"the first free one from {FIRST_PORT} on, unless given")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    options = parser.parse_args(arguments)
    notebook = find_notebook(options.notebook)
    port = choose_port(options.port)
    prepare([TO_RUN])
    page = "/lab/tree/" + notebook.relative_to(ROOT).as_posix()
    command = [
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--LabApp.default_url={page}",
        "--ServerApp.answer_yes=True",  # one Ctrl-C ends it, without a question
        "--log-level=WARN",
    ]
    if options.no_browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # root in a container is usual; Jupyter would refuse it
    say(f"JupyterLab starts on http://localhost:{port}{page} (Ctrl-C stops it)")
    return hand_over(command, ROOT)


def test(arguments: list[str]) -> int:
    """Run pytest on the tests and on every notebook."""
    prepare([TO_RUN, TO_TEST])
    # Lax: a notebook must run without an error; its committed outputs hold timings, which vary.
    return hand_over(["-m", "pytest", "--nbval-lax", "--nbval-current-env", *arguments], ROOT)


def bench(arguments: list[str]) -> int:
    """Run the benchmarks; they compare with the libraries that the tests need."""
    prepare([TO_RUN, TO_TEST])
    return hand_over(["-m", "dsv2.bench", *arguments], Path.cwd())


def on_exercises(command: str, arguments: list[str]) -> int:
    """Check exercises, and what belongs to that: see dsv2/course/commands.py."""
    prepare([TO_RUN])
    # By its path, not with -m: that would load PyTorch before the command is known.
    return hand_over([str(ROOT / "dsv2" / "course" / "__main__.py"), command, *arguments], Path.cwd())


def find_notebook(name: str) -> Path:
    """The notebook called `name`: a path, a file in notebooks/, or the beginning of one's name.

    Raises Stop if there is none or more than one, or if it lies outside the course.
    """
    folder = ROOT / "notebooks"
    for path in (Path(name), ROOT / name, folder / name):
        if path.is_file():
            path = path.resolve()
            if ROOT in path.parents:
                return path
            raise Stop(f"{path} is not in the course's folder {ROOT}; copy it into {folder}.")
    found = sorted(folder.glob(f"**/{name}*.ipynb"))
    if len(found) == 1:
        return found[0]
    if found:
        raise Stop(f"{name!r} fits several notebooks: {', '.join(path.stem for path in found)}.")
    known = ", ".join(sorted(path.stem for path in folder.glob("*.ipynb"))) or "none"
    raise Stop(f"there is no notebook {name!r}. There are: {known}.")


def choose_port(wanted: int | None) -> int:
    """The port to serve on: `wanted`, or the first free one from 8888 on. Raises Stop if there is none."""
    if wanted is None:
        free = next((port for port in range(FIRST_PORT, FIRST_PORT + 100) if not port_problem(port)), None)
        if free is None:
            raise Stop(f"ports {FIRST_PORT} to {FIRST_PORT + 99} are all taken; name a free one with --port.")
        return free
    if not 1 <= wanted <= 65535:
        raise Stop(f"--port must be between 1 and 65535, not {wanted}.")
    problem = port_problem(wanted)
    if problem:
        raise Stop(f"port {wanted} {problem}; try --port {choose_port(None)}, or leave --port out.")
    return wanted


def port_problem(port: int) -> str:
    """Why a server on this machine cannot listen on `port`; "" if it can."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if os.name != "nt":  # there it would let two servers share the port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken"
            if error.errno in (errno.EACCES, errno.EPERM):
                return "is not allowed for this user"
            # Anything else: this machine has no such address family.
    return ""


# ------------------------------------------------------------------------------------------------ environment


def prepare(files: list[str]) -> None:
    """Bring .venv to the state that the requirement files ask for; at once if it is in that state already.

    Raises Stop, saying what to do, if that is not possible here.
    """
    if up_to_date(files):
        return
    with only_one_at_a_time():
        if up_to_date(files):  # the one we waited for did it
            return
        make_environment()
        install(files)


def up_to_date(files: list[str]) -> bool:
    """True if the last installation was complete, was of these requirement files, and is still there."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = digests(files)
    if "DSV2_TORCH" in os.environ:
        wanted["DSV2_TORCH"] = os.environ["DSV2_TORCH"]
    if not isinstance(stamp, dict) or any(stamp.get(key) != value for key, value in wanted.items()):
        return False
    names = [name for file in files for name in requirements(file)]
    state = inspect(names)
    if state is None or state["python"] != stamp.get("python") or len(state["found"]) < len(names):
        return False
    put_on_path(Path(state["site"]))
    return True


def digests(files: list[str]) -> dict[str, str]:
    """The SHA-256 of each requirement file."""
    return {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in files}


def requirements(file: str) -> dict[str, str]:
    """The requirements of a file by distribution name: `{"torch": "torch>=2.6", ...}`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {re.match(r"[A-Za-z0-9._-]+", line).group(): line for line in lines if line}


def venv_python() -> Path:
    """The environment's interpreter."""
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


INSPECT = """
import importlib.metadata, json, sys, sysconfig
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
python = "%d.%d" % sys.version_info[:2]
print(json.dumps({"python": python, "site": sysconfig.get_paths()["purelib"], "found": found}))
"""


def inspect(names: list[str]) -> dict | None:
    """What .venv's Python says: its version, its site-packages, the versions of `names`; None if broken."""
    try:
        answer = subprocess.run([venv_python(), "-I", "-c", INSPECT, *names], capture_output=True, text=True)
        return json.loads(answer.stdout)
    except (OSError, ValueError):
        return None


def environment_problem() -> str:
    """What an existing .venv lacks; "" if it can be used."""
    state = inspect([])
    if state is None:
        return "it has no Python that runs"
    if version_problem([int(number) for number in state["python"].split(".")]):
        return f"its Python is {state['python']}"
    pip = subprocess.run([venv_python(), "-I", "-m", "pip", "--version"], capture_output=True)
    return "it has no pip that runs" if pip.returncode else ""


def make_environment() -> None:
    """Make .venv, or make it anew if it is half-made. Raises Stop if that is not possible."""
    if VENV.is_symlink() or VENV.is_file():
        raise Stop(f"{VENV} is not a folder of its own; remove or rename it, then run this again.")
    if VENV.exists():
        problem = environment_problem()
        if not problem:
            return
        if Path(sys.prefix).resolve() == VENV:
            raise Stop(f".venv is half-made ({problem}); run this again with a Python outside of it.")
        say(f".venv is half-made ({problem}): making it anew")
        try:
            shutil.rmtree(VENV)
        except OSError as error:
            raise Stop(f"the half-made .venv cannot be removed ({error}); remove {VENV} by hand.") from None
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise Stop(
                f"this Python ({sys.executable}) lacks the module {module}, which makes environments. "
                f"On Debian and Ubuntu: sudo apt install python3.{sys.version_info.minor}-venv. "
                "Elsewhere install Python from https://www.python.org/downloads/. Then run this again."
            )
    check_space((0.2, 0.1))
    say(f"Making .venv with Python {sys.version.split()[0]}")
    code, errors = run([sys.executable, "-m", "venv", str(VENV)], echo=False)
    if code or environment_problem():
        raise Stop(explain(errors, "the environment .venv could not be made"))


def install(files: list[str]) -> None:
    """Install the requirement files into .venv and stamp it. Raises Stop if something fails."""
    STAMP.unlink(missing_ok=True)
    state = inspect(["torch"])
    site = Path(state["site"])
    remove_remains(site)
    linux = sys.platform.startswith("linux")
    cuda = linux and has_nvidia_gpu()
    if "torch" in state["found"]:
        check_space(SPACE_WITHOUT_TORCH)
    else:
        check_space(SPACE_FOR_CUDA if cuda else SPACE_FOR_CPU)
    say(f"Installing what the course needs ({' and '.join(files)}); the first time takes some minutes")
    install_torch(cpu_build=linux and not cuda)
    arguments = [argument for file in files for argument in ("-r", str(ROOT / file))]
    code, errors = pip(*arguments)
    if code:
        raise Stop(explain(errors, "the installation did not finish"))
    put_on_path(site)
    stamp = {"python": state["python"], "DSV2_TORCH": os.environ.get("DSV2_TORCH", ""), **digests(files)}
    STAMP.write_text(json.dumps(stamp, indent=1), encoding="utf-8")


def remove_remains(site: Path) -> None:
    """Take away what a killed pip leaves behind and later takes for an installed package.

    pip writes a package's RECORD last, and renames what it replaces to a name that begins with ~.
    """
    torn = [info for info in site.glob("*.dist-info") if not (info / "RECORD").is_file()]
    for path in [*torn, *site.glob("~*")]:
        shutil.rmtree(path, ignore_errors=True)


def put_on_path(site: Path) -> None:
    """Let the environment's Python import the course from this folder, through a .pth file.

    The path in it is relative, so that the folder can be moved.
    """
    pth = site / "dsv2-course.pth"
    line = Path(os.path.relpath(ROOT, site)).as_posix() + "\n"
    if not pth.is_file() or pth.read_text(encoding="utf-8") != line:
        pth.write_text(line, encoding="utf-8")


@contextlib.contextmanager
def only_one_at_a_time():
    """Hold the lock on setting up .venv; wait while another course.py holds it. Ends with the process."""
    try:
        handle = open(ROOT / ".venv.lock", "a")
    except OSError as error:
        raise Stop(
            f"the course cannot write into its own folder ({error}). "
            "Copy it to a folder that is yours, or start it as the user who owns it."
        ) from None
    with handle:
        waiting = False
        while not try_lock(handle.fileno()):
            if not waiting:
                say("Another course.py is setting up .venv; waiting for it")
            waiting = True
            time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file against other processes; False if one of them holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network folders have no locks; going on is then better than waiting for ever.
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


# ----------------------------------------------------------------------------------------------- installation


def install_torch(cpu_build: bool) -> None:
    """Install PyTorch where pip alone would take a needless CUDA build; say in one line what was chosen."""
    asked = os.environ.get("DSV2_TORCH", "")
    if asked:
        say(f"PyTorch: {asked}, as DSV2_TORCH asks")
        code, errors = pip(*shlex.split(asked))
        if code:
            raise Stop(explain(errors, f"DSV2_TORCH={asked!r} could not be installed"))
        return
    if not cpu_build:
        say("PyTorch: the ordinary build for this system")
        return
    torch = requirements(TO_RUN)["torch"]
    before = inspect(["torch"])["found"]
    # Either already there, or offered on disk by pip's own configuration (a classroom's folder of wheels).
    code, _ = pip("--no-index", "--no-deps", torch, echo=False)
    if code == 0:
        found = inspect(["torch"])["found"]
        source = "already there" if found == before else "from a wheel on this machine"
        say(f"PyTorch: {found['torch']}, {source}")
        return
    say(f"PyTorch: no NVIDIA GPU here, so the CPU build from {TORCH_CPU_INDEX}")
    patience = ("--retries", "1", "--timeout", "15")
    code, errors = pip("--index-url", TORCH_CPU_INDEX, "--no-deps", *patience, torch, echo=False)
    if code == 0:
        return
    if not looks_like(errors, NOT_OFFERED):  # pip's last word when an index does not answer, too
        raise Stop(explain(errors, "PyTorch could not be installed"))
    say("PyTorch: that cannot be reached, so the ordinary build (with CUDA libraries, several GB)")
    check_space(SPACE_FOR_CUDA)


def has_nvidia_gpu() -> bool:
    """True if an NVIDIA driver shows itself."""
    traces = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia"))
    return bool(shutil.which("nvidia-smi")) or any(trace.exists() for trace in traces)


def check_space(needed: tuple[float, float]) -> None:
    """Raise Stop if the disk of the course or of temporary files has fewer free GB than `needed`."""
    for folder, gigabytes in zip((ROOT, Path(tempfile.gettempdir())), needed, strict=True):
        free = shutil.disk_usage(folder).free / 1e9
        if free < gigabytes:
            raise Stop(
                f"the disk of {folder} has {free:.1f} GB free and the installation needs {gigabytes:g} GB. "
                "Free some space (python3 -m pip cache purge may help)"
                + (", or set TMPDIR to a folder on a larger disk." if folder != ROOT else ".")
            )


def pip(*arguments: str, echo: bool = True) -> tuple[int, str]:
    """Install with the environment's pip, progress shown; returns its exit status and error output."""
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    return run([*command, "--prefer-binary", *arguments], echo=echo)


def run(command: list[str], echo: bool) -> tuple[int, str]:
    """Run a program to its end: its output goes to the terminal, its errors too if `echo`; returns both ends.

    Only the error stream passes through here, so that progress bars still know their terminal.
    """
    said = []
    with subprocess.Popen(
        command,
        env=environment_variables(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:

        def listen() -> None:
            for line in process.stderr:
                said.append(line)
                if echo:
                    print(line, end="", file=sys.stderr, flush=True)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            listener.join(timeout=5)
    return process.returncode, "".join(said)


def environment_variables() -> dict[str, str]:
    """The variables for programs of .venv: its own programs first, nothing of another environment."""
    variables = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__"):
        variables.pop(name, None)
    variables["VIRTUAL_ENV"] = str(VENV)
    variables["PATH"] = str(venv_python().parent) + os.pathsep + variables.get("PATH", "")
    variables["PIP_USER"] = "0"  # a configured `user = true` makes pip fail in an environment
    variables["JUPYTER_PREFER_ENV_PATH"] = "1"  # not a kernel of the same name in the home folder
    return variables


UNREACHABLE = (
    "NewConnectionError|Failed to establish a new connection|NameResolutionError|name resolution|"
    "getaddrinfo failed|Network is unreachable|No route to host|ConnectTimeout|Read timed out|"
    "Connection refused|ProxyError|RemoteDisconnected|Connection aborted|ConnectionResetError|"
)
NOT_OFFERED = "No matching distribution found|403 Client Error|404 Client Error|"
CERTIFICATE = "CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError|"
NO_SPACE = "No space left on device|Errno 28|WinError 112|not enough space on the disk|Disk quota exceeded|"
NO_WRITING = "Permission denied|Read-only file system|Access is denied|Errno 13|Errno 30|"


def looks_like(errors: str, signs: str) -> bool:
    """True if one of the signs, separated by |, is in the error output."""
    return any(sign in errors for sign in signs.split("|") if sign)


def explain(errors: str, what: str) -> str:
    """A sentence on what failed, what it means, and what to do, from a program's error output."""
    again = "then run this again: it goes on where it stopped."
    if looks_like(errors, NO_SPACE):
        return f"{what}: the disk is full. Free some space, {again}"
    if looks_like(errors, CERTIFICATE):
        return f"{what}: the package index's certificate is not trusted (a proxy?). Set PIP_CERT, {again}"
    if looks_like(errors, UNREACHABLE):
        return f"{what}: the package index cannot be reached. Check the network (and HTTPS_PROXY), {again}"
    if looks_like(errors, NO_WRITING):
        return f"{what}: {VENV} cannot be written. Start the course as the user who owns the folder, {again}"
    if looks_like(errors, NOT_OFFERED):
        bits = 64 if sys.maxsize > 2**32 else 32
        return (
            f"{what}: a package is not offered for Python {sys.version.split()[0]} ({bits} bit) here. "
            "Remove .venv and start the course with another Python, 64 bit, between 3.10 and 3.13."
        )
    last = [line.strip() for line in errors.strip().splitlines() if line.strip()][-1:]
    return f"{what}{': ' + last[0] if last else ''}. Run this again; if it fails again, remove {VENV} first."


# ---------------------------------------------------------------------------------------------------- running


def hand_over(arguments: list[str], folder: Path) -> int:
    """Go on as the environment's Python with `arguments` in `folder`; its exit status becomes ours."""
    command = [str(venv_python()), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # there is no exec there: the shell would come back at once
        return subprocess.call(command, cwd=folder, env=environment_variables())
    # The new program must not inherit a handler it cannot have set.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    os.execve(command[0], command, environment_variables())


def say(sentence: str) -> None:
    """Print one line about what is going on."""
    print(f"course.py: {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
