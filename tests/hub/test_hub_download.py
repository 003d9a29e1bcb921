import hashlib
import os
from collections import deque
from pathlib import Path

import pytest

from ssmvision.hub import DownloadError, download, fetch_from_hub, fetch_url, file_sha256

BODY = bytes(range(256)) * 2000
RELEASE = "/owner/VMamba/releases/download/%23v2cls/vssm_tiny.pth"


@pytest.fixture
def on_hub(hub):
    hub.path = hub.add("owner/name", "w.pth", BODY)
    return hub


@pytest.fixture
def on_web(hub):
    hub.path = RELEASE
    hub.files[RELEASE] = BODY
    return hub


def get_from_hub(hub, **kwargs):
    return fetch_from_hub("owner/name", "w.pth", **kwargs)


def get_from_web(hub, **kwargs):
    return fetch_url(hub.url + RELEASE, **kwargs)


@pytest.fixture(params=["hub", "web"])
def source(request):
    """A server with one file and the function that fetches it, once from the Hub and once from a plain url."""
    server = request.getfixturevalue(f"on_{request.param}")
    fetch = get_from_hub if request.param == "hub" else get_from_web
    return server, lambda **kwargs: fetch(server, **kwargs)


def test_fetches_once_and_caches(source):
    server, fetch = source
    assert fetch().read_bytes() == BODY
    assert fetch().read_bytes() == BODY
    assert server.count("GET") == 1


@pytest.mark.parametrize("faults", [["reset"], [500, 502, 503, 504], ["short", "reset", 503]])
def test_passing_faults_are_retried(source, faults):
    server, fetch = source
    server.faults[server.path] = deque(faults)
    assert fetch().read_bytes() == BODY
    assert not server.faults[server.path]


def test_tries_are_bounded(source):
    server, fetch = source
    server.faults[server.path] = deque([503] * 50)
    with pytest.raises(DownloadError, match="failed 5 times, last with: HTTP status 503"):
        fetch()
    assert server.count("GET") == download.TRIES


def test_other_statuses_are_not_retried(source):
    server, fetch = source
    server.faults[server.path] = deque([418])
    with pytest.raises(DownloadError, match="HTTP status 418"):
        fetch()
    assert server.count("GET") == 1


@pytest.mark.parametrize("given", [False, True])
def test_a_bit_flip_in_the_cache_is_repaired(source, given):
    server, fetch = source
    sha256 = hashlib.sha256(BODY).hexdigest() if given else None
    path = fetch(sha256=sha256).resolve()
    before = path.stat()
    path.write_bytes(BODY[:99] + bytes([BODY[99] ^ 4]) + BODY[100:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch(sha256=sha256).read_bytes() == BODY
    assert server.count("GET") == 2


@pytest.mark.parametrize("fault", ["wrong", "fewer"])
def test_wrong_bytes_are_fetched_once_more(fault, on_hub):
    on_hub.faults[on_hub.path] = deque([fault])
    assert get_from_hub(on_hub).read_bytes() == BODY
    assert on_hub.count("GET") == 2


def test_wrong_bytes_twice_are_refused_and_removed(on_hub, tmp_path):
    on_hub.faults[on_hub.path] = deque(["wrong"] * 2)
    with pytest.raises(DownloadError, match=r"owner/name/w\.pth has sha256 .* twice in a row"):
        get_from_hub(on_hub)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(BODY)]


def test_given_digest_is_checked(source):
    _, fetch = source
    with pytest.raises(DownloadError, match="not the published"):
        fetch(sha256="0" * 64)
    assert file_sha256(fetch(sha256=hashlib.sha256(BODY).hexdigest().upper()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((404, "EntryNotFound"), "repository owner/name has no such file"),
        ((404, "RepoNotFound"), "no public repository owner/name"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((403, "GatedRepo"), "is gated: ask for access at .*owner/name and log in"),
    ],
)
def test_hub_refusals_are_one_sentence(on_hub, error, message):
    on_hub.errors[on_hub.path] = error
    with pytest.raises(DownloadError, match=message) as caught:
        get_from_hub(on_hub)
    assert "\n" not in str(caught.value)
    assert on_hub.count("GET") == 0


def test_missing_url_is_one_sentence(hub):
    with pytest.raises(DownloadError, match=r"gone\.pth cannot be downloaded: HTTP status 404\."):
        fetch_url(hub.url + "/gone.pth")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "w.pth", "https://example.org/"])
def test_only_http_files(url):
    with pytest.raises(DownloadError, match="no http"):
        fetch_url(url)


def test_offline_with_a_cold_cache_says_what_to_do(source, monkeypatch):
    server, fetch = source
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="not in the cache and HF_HUB_OFFLINE is set; load it once while online"):
        fetch()
    assert not server.log


def test_offline_with_a_warm_cache_works(source, monkeypatch):
    server, fetch = source
    fetch()
    server.close()
    assert fetch().read_bytes() == BODY
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch().read_bytes() == BODY


def test_server_down_with_a_cold_cache(source, monkeypatch):
    server, fetch = source
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the Hub client waits 24 s in all
    server.close()
    with pytest.raises(DownloadError, match="not in the cache and its server cannot be reached"):
        fetch()


def test_a_file_put_by_hand_is_used_offline(on_web, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="or put the file at") as caught:
        get_from_web(on_web)
    path = Path(str(caught.value).rpartition(" at ")[2].removesuffix("."))
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert get_from_web(on_web) == path


def test_urls_with_one_file_name_do_not_collide(hub):
    hub.files |= {"/a/w.pth": b"a" * 9, "/b/w.pth": b"b" * 9}
    assert fetch_url(hub.url + "/a/w.pth").read_bytes() != fetch_url(hub.url + "/b/w.pth").read_bytes()


def test_cache_dir_is_respected(source, tmp_path):
    _, fetch = source
    assert (tmp_path / "elsewhere") in fetch(cache_dir=tmp_path / "elsewhere").parents


def test_nothing_is_left_of_a_cut_download(on_web, tmp_path):
    on_web.faults[RELEASE] = deque(["short"] * download.TRIES)
    with pytest.raises(DownloadError, match="IncompleteRead"):
        get_from_web(on_web)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("address", "warns"), [("http://mirror.example", True), ("https://mirror.example", False)])
def test_unencrypted_remote_endpoints_are_announced(address, warns, recwarn):
    download._warn_if_insecure.cache_clear()
    download._warn_if_insecure(address)
    download._warn_if_insecure("http://127.0.0.1:80")
    assert len(recwarn) == warns
