"""Another project in a Python environment of its own, asked one question at a time so that both sides alternate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def peer_python(name: str, packages: tuple[str, ...]) -> Path:
    """Return the Python of the environment .venv-NAME, made with the packages where it is not there yet."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making {folder.name} with {', '.join(packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


class Peer:
    """A program of the peer's side that stays up; a line it reads is a question in JSON, a line it writes the answer.

    It runs on one thread and waits while our side is measured.
    """

    def __init__(self, python: Path, program: Path):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return the answer; raise RuntimeError where the peer gave none, its own message being on stderr."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended at {question}")
        return json.loads(answer)
