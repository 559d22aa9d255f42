"""What a pod makes of itself before sshd runs."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from cluster.node import ENVIRONMENT_FILE, exports, prepare

NASTY = {
    "RAYLORA_S3_SECRET_ACCESS_KEY": "a'b\"c $HOME `id` \\ !",
    "RAYLORA_MODELS": '{"x": "/models/x"}',
    "TWO_LINES": "one\ntwo; exit 1\n",
    "EMPTY": "",
}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA somebody"

needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_session_gets_every_value_as_it_was(tmp_path: Path, shell: str) -> None:
    file = tmp_path / "environment"
    file.write_text(exports(NASTY))
    program = shutil.which(shell)
    assert program is not None
    done = subprocess.run([program, "-c", f". {file}; env -0"], env={}, capture_output=True, text=True, check=True)
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    assert {name: found[name] for name in NASTY} == NASTY


def test_what_is_a_sessions_own_or_no_name_for_a_shell_is_left_out() -> None:
    assert (
        exports({"HOME": "/root", "PWD": "/", "PUBLIC_KEY": KEY, "a.b": "1", "x;id": "1", "A": "1"}) == "export A=1\n"
    )


@needs_ssh_keygen
def test_a_pod_gets_host_keys_of_its_own_and_keeps_them(tmp_path: Path) -> None:
    def host_key(root: Path) -> bytes:
        prepare(root, root / "home", {})
        return (root / "etc/ssh/ssh_host_ed25519_key").read_bytes()

    one, other = host_key(tmp_path / "a"), host_key(tmp_path / "b")
    assert one != other
    assert host_key(tmp_path / "a") == one
    assert (tmp_path / "a/run/sshd").is_dir()


@needs_ssh_keygen
def test_variables_and_keys_are_their_owners_alone(tmp_path: Path) -> None:
    environment = {**NASTY, "PUBLIC_KEY": KEY}
    file, keys = tmp_path / ENVIRONMENT_FILE, tmp_path / "home/.ssh/authorized_keys"
    file.parent.mkdir(parents=True)
    file.write_text("from before")
    file.chmod(0o644)
    keys.parent.mkdir(parents=True)
    keys.write_text("ssh-rsa AAAA another")
    prepare(tmp_path, tmp_path / "home", environment)
    prepare(tmp_path, tmp_path / "home", environment)
    assert file.read_text() == exports(environment)
    assert keys.read_text() == f"ssh-rsa AAAA another\n{KEY}\n"
    for path, mode in ((file, 0o600), (keys, 0o600), (file.parent, 0o700), (keys.parent, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
