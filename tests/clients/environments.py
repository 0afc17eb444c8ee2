"""The clients, and an environment for each: made once in ``.cache/clients``, again when its requirements change."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import ROOT

FOLDER = ROOT / ".cache" / "clients"
STAMP = "requirements.txt"  # in an environment: what was installed into it
PYTEST = "pytest>=9,<10"


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
      name: of its distribution, and of the folder of its environment.
      requirements: what pip installs besides pytest.
      checks: the file beside this one that talks to the server through it.
    """

    name: str
    requirements: tuple[str, ...]
    checks: str

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / "bin" / "python"


CLIENTS = (
    Client("openai", ("openai>=3.50,<4",), "check_openai.py"),
    Client("litellm", ("litellm>=1.106,<2",), "check_litellm.py"),
    Client("langchain-openai", ("langchain-openai>=1.7,<2",), "check_langchain.py"),
    Client("lm-eval", ("lm-eval[api]>=0.4.13,<0.5", "transformers>=5.10,<6"), "check_lm_eval.py"),
    Client("aiperf", ("aiperf>=0.13,<0.14",), "check_aiperf.py"),
    Client("inference-perf", ("inference-perf>=0.7,<0.8",), "check_inference_perf.py"),
    Client("schemathesis", ("schemathesis>=4.32,<5",), "check_schemathesis.py"),
)


class InstallError(RuntimeError):
    """The environment of a client could not be made: there may be no network."""


def prepare(client: Client) -> str:
    """The version of a client in its environment, which is made if need be.

    Raises:
      InstallError: pip failed; the message is the end of what it said.
    """
    wanted = "\n".join([f"# Python {sys.version.split()[0]}", PYTEST, *client.requirements, ""])
    stamp = client.folder / STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        print(
            f"Installing {' '.join(client.requirements)} into {client.folder.relative_to(ROOT)}", flush=True
        )
        shutil.rmtree(client.folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(client.folder)])
        pip = [str(client.python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run([*pip, "install", "--quiet", PYTEST, *client.requirements])
        stamp.write_text(wanted, encoding="utf-8")
    version = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return run([str(client.python), "-c", version, client.name]).strip()


def run(command: list[str]) -> str:
    """What a command prints; raises InstallError with its last line of errors when it fails."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise InstallError(lines[-1] if lines else f"exit status {result.returncode}")
    return result.stdout
