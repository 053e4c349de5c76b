"""Results are pushed to a remote and pulled into a new clone, which then has nothing to run."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from helpers import Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def push_and_pull(
    project: Project, folder: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Push, and pull into a clone at `folder`."""
    project.commit("remote")
    project.run("dvc", "push", environment=environment)
    project.run("git", "clone", "-q", str(project.folder), str(folder))
    clone = Project(folder)
    clone.run("dvc", "pull", environment=environment)
    assert not (folder / ".resume").exists()
    output = clone.run("dvc", "repro")
    assert "up to date" in output and "Running stage" not in output
    assert clone.results() == project.results()
    for name in ("runs/vlm_finetune/model_final.safetensors", "runs/evaluate/predictions.csv"):
        assert (folder / name).read_bytes() == (project.folder / name).read_bytes()


def test_results_travel_through_a_folder(finished: Project, tmp_path: Path) -> None:
    finished.run("dvc", "remote", "add", "-f", "-d", "storage", str(tmp_path / "remote"))
    push_and_pull(finished, tmp_path / "elsewhere/clone")


def test_results_travel_through_s3(
    finished: Project, tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    keys = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),  # not the user's
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    for name in ("config", "credentials"):
        (tmp_path / name).touch()
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="panollava")
    finished.run("dvc", "remote", "add", "-f", "-d", "storage", "s3://panollava/results")
    finished.run("dvc", "remote", "modify", "storage", "endpointurl", s3_server)
    push_and_pull(finished, tmp_path / "clone", keys)
    assert client.list_objects_v2(Bucket="panollava")["KeyCount"] > 20
