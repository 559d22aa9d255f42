"""What a pod of this project's image runs to become a Ray node: `python -m cluster.node`, as root.

The Ray cluster launcher reaches a node over SSH. An SSH session has none of the variables that the image and the pod
were given, so they are left in ENVIRONMENT_FILE, which the commands of cluster.yaml read. Host keys are made here,
because those of an image would be the same on all pods, and known to whoever has the image.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

SSHD = "/usr/sbin/sshd"
ENVIRONMENT_FILE = Path("run/raylora/environment")
# By this name RunPod gives a pod its owner's key.
PUBLIC_KEY_VARIABLE = "PUBLIC_KEY"
# Of the session that reads the file, not of the one that wrote it.
OWN_TO_A_SESSION = frozenset(
    {"HOME", "HOSTNAME", "LOGNAME", "MAIL", "OLDPWD", "PWD", "SHELL", "SHLVL", "TERM", "USER", "_", PUBLIC_KEY_VARIABLE}
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def exports(environment: Mapping[str, str]) -> str:
    """Lines for a shell that give it these variables, whatever their values hold."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(environment.items())
        if name not in OWN_TO_A_SESSION and _NAME.fullmatch(name)
    )


def prepare(root: Path, home: Path, environment: Mapping[str, str]) -> None:
    """Make what sshd and the sessions need below `root`, and let in the key that the pod was given to `home`.

    Safe to repeat: keys that are there stay. Raises OSError, subprocess.CalledProcessError.
    """
    (root / "run" / "sshd").mkdir(parents=True, exist_ok=True, mode=0o755)
    (root / "etc" / "ssh").mkdir(parents=True, exist_ok=True, mode=0o755)
    subprocess.run(["ssh-keygen", "-A", "-f", str(root)], check=True, stdout=subprocess.DEVNULL)  # noqa: S607
    file = root / ENVIRONMENT_FILE
    _own_folder(file.parent)
    _write_own(file, exports(environment))
    key = environment.get(PUBLIC_KEY_VARIABLE, "").strip()
    if key:
        _let_in(home / ".ssh", key)


def _let_in(folder: Path, key: str) -> None:
    _own_folder(folder)
    file = folder / "authorized_keys"
    known = file.read_text() if file.exists() else ""
    if key not in known.splitlines():
        _write_own(file, f"{known.rstrip()}\n{key}\n".lstrip())


def _own_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _write_own(file: Path, text: str) -> None:
    """In one step, and never readable by others."""
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)
    draft.replace(file)


def main() -> None:
    """Become sshd, in the foreground, its log on standard error."""
    prepare(Path("/"), Path.home(), os.environ)
    os.execv(SSHD, [SSHD, "-D", "-e"])  # noqa: S606 sshd demands to be started by its full path


if __name__ == "__main__":
    main()
