"""What is on the disk tells prompts, and is computed with: nobody else can read it, and nobody else can plant any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.workers.disk_cache import cache_folder
from headwise.workers.errors import InvalidValueError
from headwise.workers.jit import kernel_cache
from headwise.workers.kv.store import DiskStore
from tests.workers.kv.kv_blocks import PAYLOAD, file_of, files, holds, key_of, opened, put


@pytest.fixture
def umask() -> Iterator[None]:
    """Lets new files be written by everybody, but for what their maker says."""
    before = os.umask(0)
    yield
    os.umask(before)


def anothers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it seem that a path is another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)


def refusal(path: Path) -> str:
    with pytest.raises(InvalidValueError) as caught:
        DiskStore(path, 1, 2, b"identity", PAYLOAD)
    assert caught.value.field == "disk_kv_path" and caught.value.fix
    return str(caught.value)


@pytest.mark.usefixtures("umask")
def test_all_that_is_made_is_the_users_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "kv") as store:
        put(store, 0, 1, 2)
        made = [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]
        assert len(made) > 7
        for path in made:
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("below", [".", "rank-1-of-2"])
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, below: str, mode: int) -> None:
    with opened(tmp_path / "kv"):
        pass
    folder = tmp_path / "kv" / below
    folder.chmod(mode)
    message = refusal(tmp_path / "kv")
    assert str(folder) in message and f"{mode:04o}" in message
    folder.chmod(0o700)
    with opened(tmp_path / "kv"):
        pass


@pytest.mark.parametrize("below", [".", "rank-1-of-2"])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "kv"):
        pass
    folder = tmp_path / "kv" / below
    anothers(folder, monkeypatch)
    assert "another user" in (message := refusal(tmp_path / "kv")) and str(folder) in message


def test_a_folder_like_tmp_where_nobody_can_rename_anothers_is_fine(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with opened(tmp_path) as store:
        put(store, 0)
        assert holds(store, key_of(0))


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
    (tmp_path / "rank-1-of-2").chmod(0o755)
    with opened(tmp_path) as store:
        assert (tmp_path / "rank-1-of-2").stat().st_mode & 0o777 == 0o700 and holds(store, key_of(0))


def test_the_folder_of_a_rank_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "rank-1-of-2").symlink_to(tmp_path / "elsewhere")
    assert str(tmp_path / "rank-1-of-2") in refusal(tmp_path)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_path_that_is_given_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir(mode=0o700)
    (tmp_path / "kv").symlink_to(tmp_path / "large-disk")
    with opened(tmp_path / "kv") as store:
        put(store, 0)
    assert files(tmp_path / "large-disk")
    (tmp_path / "large-disk").chmod(0o777)
    assert "0777" in refusal(tmp_path / "kv")


def link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["journal", "lock"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
    elsewhere = tmp_path / "elsewhere"
    link(tmp_path / "rank-1-of-2" / name, elsewhere)
    elsewhere.write_bytes(b"precious")
    if name == "lock":
        assert "lock" in refusal(tmp_path)
    else:
        with opened(tmp_path) as store:
            assert len(store) == 0
            put(store, 1)
    assert elsewhere.read_bytes() == b"precious"


def test_blocks_are_not_written_through_a_link_in_place_of_their_folder(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
    elsewhere, folder = tmp_path / "elsewhere", file_of(tmp_path, 0).parent
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    with opened(tmp_path) as store:
        assert not holds(store, key_of(0))
        put(store, 0)
        assert holds(store, key_of(0)) and not folder.is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


@pytest.mark.parametrize("plant", [link, lambda path, elsewhere: os.chown(path, 12345, -1)])
def test_a_block_that_is_a_link_or_anothers_file_is_a_miss(tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    if plant is not link and os.geteuid():
        pytest.skip("only root gives files away")
    with opened(tmp_path) as store:
        put(store, 0, 1)
    plant(file_of(tmp_path, 0), tmp_path / "elsewhere")
    with opened(tmp_path) as store:
        assert store.stored_keys() == [key_of(1)]
        plant(file_of(tmp_path, 1), tmp_path / "elsewhere")
        assert not holds(store, key_of(1))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("umask")
def test_what_is_kept_for_the_next_start_is_the_users_alone(cache: Path) -> None:
    """Compiled code is loaded from there."""
    assert cache_folder("kernels", "key") == cache / "kernels" / "key"
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "kernels", cache / "kernels" / "key")] == [
        0o700
    ] * 3
    (cache / "kernels").chmod(0o775)  # as an older version made it
    assert cache_folder("kernels", "key").is_dir() and (cache / "kernels").stat().st_mode & 0o777 == 0o755


def test_a_part_of_the_cache_may_be_on_another_disk(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    (tmp_path / "large").mkdir(mode=0o755)
    (cache / "models").symlink_to(tmp_path / "large")
    assert cache_folder("models") == cache / "models"
    assert (tmp_path / "large").stat().st_mode & 0o777 == 0o700
    (tmp_path / "large").chmod(0o777)
    with pytest.raises(InvalidValueError, match="others can write to"):
        cache_folder("models")


def test_what_another_user_may_have_put_in_the_cache_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache_folder("kernels", kernel_cache.current_key())
    monkeypatch.setattr(kernel_cache, "_warnings", [])
    folder.chmod(0o777)
    assert kernel_cache.kernel_folder.__wrapped__() is None
    assert f"others can write to {folder}" in capsys.readouterr().err
    folder.chmod(0o700)
    anothers(folder, monkeypatch)
    with pytest.raises(InvalidValueError, match=r"^HEADWISE_CACHE=.* belongs to another user"):
        cache_folder("kernels", kernel_cache.current_key())
