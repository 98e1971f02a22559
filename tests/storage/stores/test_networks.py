"""Networks as people have them: proxies, the user's fsspec configuration, and refusals that are no absent cache."""

from __future__ import annotations

import datetime
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.caches.small import make_corpus
from support.commands import Run, refused
from support.servers.fault_proxy import Fault, FaultProxy
from support.servers.s3 import Bucket
from support.servers.web import Folder, FolderHandler, Proxy, running, serving

from storage import LogitCache
from storage.errors import InputError, LogitCacheError, StoreUnavailable
from storage.stores import open_store, remote

TOKENS = np.arange(40, dtype=np.uint16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache in it; no proxy, and hosts that have answered nothing yet."""
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path / "copies"))
    monkeypatch.setenv("LOGIT_CACHE_TIMEOUT_S", "14")
    monkeypatch.setattr(remote, "_answered", set())
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    make_corpus(str(tmp_path / "served" / "cache"), TOKENS, 41)
    return tmp_path / "served"


@pytest.fixture
def web(folder: Path) -> Iterator[tuple[str, Folder]]:
    with serving(folder) as (url, server):
        yield f"{url}/cache", server


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of localhost, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def tokens(url: str) -> np.ndarray:
    return LogitCache.open(url).tokens.read(0, len(TOKENS))


def test_a_web_server_is_read_through_the_proxy_of_the_environment(
    web: tuple[str, Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = web
    proxy = Proxy(server.server_port)
    with running(proxy) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert np.array_equal(tokens("http://cache.example/cache"), TOKENS)
        assert len(proxy.asked) == len(server.asked) > 0
        assert all(address.startswith("http://cache.example/cache/") for _, address in proxy.asked)
        proxy.asked.clear()
        monkeypatch.setenv("NO_PROXY", "localhost")
        assert np.array_equal(tokens(url), TOKENS)
        assert not proxy.asked


def test_https_through_a_proxy_with_an_authority_of_ones_own(
    folder: Path, certificate: Path, installed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(0)
    with serving(folder, certificate) as (url, server), running(proxy) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        done = installed("logit-cache", "inspect", f"{url}/cache")
        # The server lists nothing: the record was read, and the list of teachers was refused.
        refused(done, "cannot list")
        assert ("CONNECT", f"localhost:{server.server_port}") in proxy.asked
        assert any(path.endswith("/zarr.json") for _, path in server.asked)


def test_s3_is_reached_through_the_proxy_too(moto_bucket: Bucket, folder: Path) -> None:
    url = moto_bucket.upload(folder / "cache", "cache")
    proxy = Proxy(int(moto_bucket.server.url.rpartition(":")[2]))
    with running(proxy) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert np.array_equal(tokens(url), TOKENS)
    assert proxy.asked


def test_the_users_fsspec_configuration_holds(web: tuple[str, Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"X-Token": "mine"}}})
    url, server = web
    assert np.array_equal(tokens(url), TOKENS)
    assert {headers.get("X-Token") for headers in server.headers} == {"mine"}
    filesystem = open_store(url)._fs  # type: ignore[attr-defined]
    assert filesystem.client_kwargs["trust_env"]
    assert filesystem.client_kwargs["timeout"].sock_read == 14


@pytest.mark.parametrize("protocol", ["s3", "s3a"])
def test_the_users_endpoint_of_s3_holds(
    moto_bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    url = moto_bucket.upload(folder / "cache", "cache").replace("s3://", f"{protocol}://")
    given = {"endpoint_url": moto_bucket.server.url, "config_kwargs": {"max_pool_connections": 7}}
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert np.array_equal(tokens(url), TOKENS)
    config = open_store(url)._fs.config_kwargs  # type: ignore[attr-defined]
    assert (config["max_pool_connections"], config["read_timeout"]) == (7, 14.0)


def test_an_object_of_a_web_server_is_one_request(web: tuple[str, Folder]) -> None:
    url, server = web
    LogitCache.open(url)
    assert server.asked == [("GET", "/cache/zarr.json")]


def outcome(url: str) -> str:
    began = time.monotonic()
    with pytest.raises(LogitCacheError) as raised:
        LogitCache.open(url)
    assert time.monotonic() - began < 30, "sooner than the patience of 40 seconds"
    assert "\n" not in str(raised.value)
    assert url in str(raised.value), "it says where"
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "AccessRefused: .*access refused .401.*credentials"),
        (403, "AccessRefused: .*access refused .403.*credentials"),
        (407, "AccessRefused: .*the proxy refuses"),
        (400, "StoreUnavailable: .*the server answers 400.*check the URL"),
        (451, "StoreUnavailable: .*the server answers 451"),
        (503, "StoreUnavailable: .*no usable answer within 1 s .*503.*check the address"),
        (404, "CacheNotFound: .*no cache there"),
        (410, "CacheNotFound: .*no cache there"),
    ],
)
def test_a_refusal_is_no_absent_cache(
    web: tuple[str, Folder], monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    if status == 503:
        monkeypatch.setenv("LOGIT_CACHE_PATIENCE_S", "1")
    url, server = web
    server.refusals["zarr.json"] = status
    assert re.match(words, outcome(url)), outcome(url)
    # Nor is it an absent object, for whoever asks for lengths.
    if status in (404, 410):
        assert open_store(url).size("zarr.json") is None
    else:
        with pytest.raises(StoreUnavailable):
            open_store(url).size("zarr.json")


def test_a_server_without_head_states_lengths(
    web: tuple[str, Folder], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = web
    monkeypatch.setattr(FolderHandler, "do_HEAD", lambda self: self.send_error(403))
    assert open_store(url).size("zarr.json") == (folder / "cache" / "zarr.json").stat().st_size


def test_a_server_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGIT_CACHE_TIMEOUT_S", "0.5")
    monkeypatch.setenv("LOGIT_CACHE_PATIENCE_S", "1")
    with FaultProxy("http://127.0.0.1:9") as proxy:
        proxy.faults.append(Fault("stall"))
        assert "StoreUnavailable: " in (said := outcome(f"{proxy.url}/cache"))
        assert "no usable answer within 1 s" in said


def test_a_certificate_that_nobody_knows(folder: Path, certificate: Path) -> None:
    with serving(folder, certificate) as (url, _):
        said = outcome(f"{url}/cache")
    assert "StoreUnavailable: " in said
    assert "no secure connection" in said
    assert "SSL_CERT_FILE" in said


NO_ADDRESS = {"no such name": socket.EAI_NONAME, "no network": socket.EAI_AGAIN}


@pytest.mark.parametrize("failure", NO_ADDRESS)
@pytest.mark.parametrize("url", ["https://host.invalid/cache", "s3://bucket/cache", "hf://datasets/lab/cache"])
def test_a_name_without_address_ends_soon(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, failure: str
) -> None:
    def resolve(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(NO_ADDRESS[failure], failure)

    fsspec.filesystem("memory")  # its loop's own socket pair
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(remote, "CONNECT_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host.invalid")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    if url.startswith("hf"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "StoreUnavailable: " in (said := outcome(url))
    assert "offline, or no such host" in said


def test_a_host_that_has_answered_is_waited_for(web: tuple[str, Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = web
    store = open_store(url)
    store.read("zarr.json")
    monkeypatch.setattr(remote, "CONNECT_S", 0.0)
    left = [socket.gaierror(socket.EAI_AGAIN, "a moment ago")] * 2

    def request() -> str:
        if left:
            raise left.pop()
        return "right"

    assert store._ask("key", request) == "right"  # type: ignore[attr-defined]


def test_a_hub_that_is_not_to_be_asked(installed: Run) -> None:
    began = time.monotonic()
    done = installed("logit-cache", "inspect", "hf://datasets/lab/cache")
    refused(done, "hf://datasets/lab/cache", "offline, since HF_HUB_OFFLINE is set")
    assert time.monotonic() - began < 30


def test_a_bucket_that_does_not_exist(moto_bucket: Bucket) -> None:
    assert "StoreNotFound: s3://nowhere-at-all-9/cache: there is no such bucket" in outcome(
        "s3://nowhere-at-all-9/cache"
    )
    assert "no cache there" in outcome(f"{moto_bucket.url}/cache")


@pytest.mark.parametrize("url", ["https://host/cache?key=a", "https://host/cache#part", "http://host:port/cache"])
def test_web_addresses_that_name_no_folder(url: str) -> None:
    with pytest.raises(InputError, match="URL"):
        LogitCache.open(url)


def test_nothing_is_written_to_a_web_server(web: tuple[str, Folder], run: Run, text_file: Path) -> None:
    url, server = web
    with pytest.raises(InputError, match="for reading only"):
        open_store(url).check_writable()
    words = ("--text", text_file, "--train-tokenizer", 300)
    refused(run("logit-cache", "tokenize", *words, "--out", url.replace("/cache", "/new")), "read")
    refused(run("logit-cache", "verify", url, "--repair"), "for reading only")
    assert not [path for method, path in server.asked if method not in ("GET", "HEAD")]
