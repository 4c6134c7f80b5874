from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import PREPARED, run

MAIN = [sys.executable, "-c", "from torch_grood.cli import main; main()"]


def _child(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, *arguments], capture_output=True, text=True, env=os.environ | variables, timeout=120, check=False
    )


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.code == 0
    for name in ("fit", "calibrate", "score", "info"):
        assert name in result.out
        help_text = run(name, "--help")
        assert help_text.code == 0
        assert f"Examples: grood {name} " in help_text.out


def test_version() -> None:
    from torch_grood import __version__

    assert run("--version").out == f"torch-grood {__version__}"


def test_help_comes_without_torch() -> None:
    code = "import sys; sys.argv = ['grood', '--help']\nfrom torch_grood.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\n"
    code += "print('loaded:', [m for m in ('torch', 'numpy', 'PIL', 'torchvision', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.rstrip().endswith("loaded: []")


def test_usage_errors_exit_with_2() -> None:
    for arguments in (("score",), ("nope",), ("fit", "--model"), ("info", "x", "--format", "xml")):
        assert run(*arguments).code == 2


def test_a_mistake_is_one_line_in_a_real_process(tmp_path: Path) -> None:
    found = _child("info", str(tmp_path / "absent.grood"), COLUMNS="40")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    debug = _child("info", str(tmp_path / "absent.grood"), GROOD_DEBUG="1")
    assert "Traceback" in debug.stderr
    assert debug.returncode == 1


def test_missing_typer_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom torch_grood.cli import main\nmain()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert "pip install 'torch-grood[cli]'" in found.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_leaves_the_old_file(digits: Path) -> None:
    (digits / "nets.py").write_text(
        (digits / "nets.py").read_text() + "\ndef slow(num_classes=4):\n"
        "    import pathlib, time\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    old = (digits / "net.grood").read_bytes()
    child = subprocess.Popen(
        [*MAIN, "fit", "--model", "nets.py:slow", *PREPARED, "--train", "train", "--output", "net.grood"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as CI may be, ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (digits / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert (digits / "net.grood").read_bytes() == old
