"""Real servers on loopback for the tests, each its own process, started when first asked for and stopped at the end."""

import atexit
import contextlib
import functools
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_hub import HubServer

_AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """A port that refuses connections, and that no other server can take meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and never listens
        yield bound.getsockname()[1]


def start(command: list[str], port: int, log: Path, **options: object) -> subprocess.Popen:
    """Start a server that this process ends, wait until it listens, and return its process."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)  # type: ignore[call-overload]
    atexit.register(_end, process)
    for _ in range(600):
        if process.poll() is not None:
            break
        with socket.socket() as client:
            client.settimeout(1)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    pytest.fail(f"{command[0]} did not start: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="servers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def s3_endpoint() -> str:
    """The end point of an S3 server in a process of its own; credentials are in the environment."""
    return s3_server()[0]


@functools.cache
def s3_server() -> tuple[str, subprocess.Popen]:
    """The end point of that server, and its process."""
    pytest.importorskip("moto", reason="the S3 server of the tests is moto's")
    pytest.importorskip("obstore")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = start(command, port, _scratch() / "s3.log")
    endpoint = f"http://127.0.0.1:{port}"
    for bucket in ("team", "other"):
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
    return endpoint, process


def s3_environment(endpoint: str | None = None) -> dict[str, str]:
    """The environment in which s3:// is the tests' own server, or a proxy before it."""
    return {**_AWS, "AWS_ENDPOINT_URL": endpoint or s3_endpoint(), "AWS_EC2_METADATA_DISABLED": "true"}


def use_s3(endpoint: str | None = None) -> None:
    """Have s3:// mean that server in this process from now on."""
    os.environ.update(s3_environment(endpoint))


@functools.cache
def nginx() -> tuple[str, Path]:
    """The URL of an nginx and the folder that it serves, with listings."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    port, home = free_port(), _scratch() / "nginx"
    files = home / "files"
    files.mkdir(parents=True)
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {home}/{kind};" for kind in kinds)
    (home / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;"
        f"events {{}} http {{ access_log off; {temporary} keepalive_requests 100000; server {{"
        f" listen 127.0.0.1:{port}; location / {{ root {files}; autoindex on; }}"
        f" location /away/ {{ return 302 http://localhost:{port}/elsewhere/; }}"
        f" location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }} }} }}"
    )
    start([program, "-p", str(home), "-c", str(home / "nginx.conf")], port, home / "log")
    return f"http://127.0.0.1:{port}", files


@functools.cache
def hub() -> HubServer:
    """A server that speaks the Hub's API, shared by the tests of a process."""
    constants = pytest.importorskip("huggingface_hub.constants")
    # As HF_HUB_DISABLE_XET=1 does, which the client reads when it is first imported.
    constants.HF_HUB_DISABLE_XET = True
    server = HubServer()
    server.__enter__()
    return server


def hub_environment(endpoint: str | None = None) -> dict[str, str]:
    """The environment in which hf:// is the tests' own server, or a proxy before it."""
    return {"HF_ENDPOINT": endpoint or hub().url, "HF_TOKEN": "hf_of_the_tests", "HF_HUB_DISABLE_XET": "1"}


@functools.cache
def ssh_host() -> tuple[str, Path]:
    """The sftp:// URL of an OpenSSH server for this user, and a home whose .ssh knows it."""
    pytest.importorskip("paramiko")
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    places = ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server")
    sftp = next((path for path in places if Path(path).exists()), "")
    if program is None or not sftp:
        pytest.skip("OpenSSH's server is not installed (Debian: openssh-server)")
    port, home = free_port(), _scratch() / "ssh"
    keys = home / ".ssh"
    keys.mkdir(parents=True, mode=0o700)
    for name in ("host", "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
    kind, key = (keys / "host.pub").read_text().split()[:2]
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized_keys\n"
        f"PidFile {home}/pid\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
        f"MaxStartups 100\nMaxSessions 100\nSubsystem sftp {sftp}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    start([program, "-D", "-e", "-f", str(home / "sshd_config")], port, home / "log")
    return f"sftp://{getpass.getuser()}@127.0.0.1:{port}", home


def in_home(home: Path, ask: Callable[[], object]) -> object:
    """What `ask` returns with another home directory."""
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(home)
    try:
        return ask()
    finally:
        if before is not None:
            os.environ["HOME"] = before
