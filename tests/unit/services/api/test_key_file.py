"""API keys that are replaced while the API runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.api import key_file
from services.api.auth import Access, access_of, digest_of, mint_key
from services.api.key_file import KeyFile
from shared.runtime.settings import Settings
from tests.fakes.api import Client, Recorder, World
from tests.fakes.metrics import value

READER, NIGHTLY = mint_key(), mint_key()
READER_LINE, NIGHTLY_LINE = (
    f"{name}:read:{digest_of(key)}" for name, key in (("reader", READER), ("nightly", NIGHTLY))
)
WAIT_MAX_S = 10.0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Return a recorder in place of the module's log."""
    recorder = Recorder()
    monkeypatch.setattr(key_file, "_log", recorder)
    return recorder


def opened(path: Path) -> tuple[Access, KeyFile]:
    """Return the access control and the file of keys of an API that has read the file at its start."""
    path.chmod(0o640)
    settings = Settings.model_validate({"api_access": "keys", "api_keys_file": str(path)})
    access = access_of(settings)
    return access, KeyFile(settings, access)


def names(access: Access) -> list[str]:
    """Return the names of the known keys."""
    return [key.name for key in access.keys]


async def test_keys_are_replaced_after_two_equal_readings(tmp_path: Path, log: Recorder) -> None:
    """A key that was removed is unknown, one that was added is known; the log names both, and no digest."""
    file = tmp_path / "keys"
    file.write_text(READER_LINE)
    access, keys = opened(file)
    file.write_text(f"{NIGHTLY_LINE}\n")
    await keys.read()
    assert names(access) == ["reader"]
    await keys.read()
    assert names(access) == ["nightly"]
    assert log.entries == [("api_keys_reloaded", {"added": ["nightly"], "changed": [], "removed": ["reader"]})]


async def test_a_file_that_is_being_written_is_not_used(tmp_path: Path) -> None:
    """A reading between two writes changes nothing, even if its lines are valid."""
    file = tmp_path / "keys"
    file.write_text(f"{READER_LINE}\n{NIGHTLY_LINE}\n")
    access, keys = opened(file)
    file.write_text("")
    await keys.read()
    file.write_text(f"{READER_LINE}\n{NIGHTLY_LINE}\n")
    await keys.read()
    await keys.read()
    assert names(access) == ["reader", "nightly"]


@pytest.mark.parametrize(
    "content", [None, b"reader:write:0", b"\xff", READER_LINE.encode()[:-1]], ids=["gone", "bad", "no text", "cut"]
)
async def test_an_invalid_file_keeps_the_last_valid_keys(tmp_path: Path, log: Recorder, content: bytes | None) -> None:
    """An unusable file changes no key, is logged once without its content; the metric is 0 until it is valid."""
    file = tmp_path / "keys"
    file.write_text(READER_LINE)
    access, keys = opened(file)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    for _ in range(3):
        await keys.read()
    assert (names(access), access.needs_key) == (["reader"], True)
    assert [event for event, _ in log.entries] == ["api_keys_not_reloaded"]
    assert digest_of(READER)[:-1] not in str(log.entries)
    assert value("tripfold_api_keys_file_valid") == 0
    file.write_text(READER_LINE)
    await keys.read()
    assert value("tripfold_api_keys_file_valid") == 1


@pytest.mark.parametrize(("mode", "warned"), [(0o640, False), (0o644, True), (0o642, True)])
async def test_a_file_that_everybody_may_read_is_used_with_a_warning(
    tmp_path: Path, log: Recorder, mode: int, warned: bool
) -> None:
    """The warning names the file and the remedy once, each time that the file becomes readable by others."""
    file = tmp_path / "keys"
    file.write_text(READER_LINE)
    access, keys = opened(file)
    for exposed in (mode, mode, 0o600, mode):
        file.chmod(exposed)
        await keys.read()
    assert names(access) == ["reader"]
    warning = ("api_keys_file_exposed", {"path": str(file), "remedy": f"chmod o= {file}"})
    assert log.entries == ([warning, warning] if warned else [])


def test_a_running_api_refuses_a_revoked_key_and_never_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is behind links that change as those of a Kubernetes secret; in the end it has no key at all."""
    monkeypatch.setattr(key_file, "READ_INTERVAL_S", 0.01)
    publish(tmp_path, 1, [READER_LINE, NIGHTLY_LINE])
    (tmp_path / "keys").symlink_to(Path("..data") / "keys")
    with World().client(api_access="keys", api_keys_file=str(tmp_path / "keys")) as client:
        assert [status(client, key) for key in (READER, NIGHTLY, "")] == [200, 200, 401]
        publish(tmp_path, 2, [NIGHTLY_LINE])
        wait_until_refused(client, READER)
        assert status(client, NIGHTLY) == 200
        publish(tmp_path, 3, [])
        wait_until_refused(client, NIGHTLY)
        assert status(client, "") == 401


def publish(folder: Path, version: int, lines: Sequence[str]) -> None:
    """Replace the content of a mounted secret as the kubelet does: write a new folder, and rename a link to it."""
    (folder / f"..{version}").mkdir()
    (folder / f"..{version}" / "keys").write_text("\n".join(lines))
    (folder / "..data_tmp").symlink_to(f"..{version}")
    (folder / "..data_tmp").rename(folder / "..data")


def status(client: Client, key: str) -> int:
    """Return the status of a request with a key."""
    return client.get("/process-requests", headers={"X-API-Key": key}).status_code


def wait_until_refused(client: Client, key: str) -> None:
    """Wait until a key is unknown."""
    deadline_s = time.monotonic() + WAIT_MAX_S
    while status(client, key) != 401:
        assert time.monotonic() < deadline_s, "the key still works"
        time.sleep(0.01)
