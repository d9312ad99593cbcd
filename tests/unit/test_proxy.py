"""The proxy that other tests break connections with does what it says, in front of a plain echo server."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy

PATIENCE = 10.0
"""Seconds after which something that must come is taken as lost."""
NOTHING_FOR = 0.3
"""Seconds without a byte that count as nothing coming."""


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets; keeps it in ``received``; says goodbye at the end of input."""

    received: bytearray

    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                self.received += data
                self.request.sendall(data)
            self.request.sendall(b"goodbye")
        except ConnectionError:
            return  # cut by the proxy: a test's purpose


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@pytest.fixture
def received() -> bytearray:
    return bytearray()


@pytest.fixture
def proxy(received: bytearray) -> Iterator[Proxy]:
    handler = type("ThisEcho", (Echo,), {"received": received})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with Proxy(("127.0.0.1", server.server_address[1])) as made:
                yield made
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as stream:
        yield stream


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)


def read(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = stream.recv(count - len(data))
        if not chunk:
            break
        data += chunk
    return data


def assert_silent(stream: socket.socket) -> None:
    stream.settimeout(NOTHING_FOR)
    with pytest.raises(TimeoutError):
        stream.recv(1)
    stream.settimeout(PATIENCE)


def ended(stream: socket.socket) -> bool:
    """Whether the other side has closed or reset the connection: which of the two is up to the kernel."""
    try:
        return stream.recv(1) == b""
    except ConnectionResetError:
        return True


def exchange(stream: socket.socket, data: bytes) -> None:
    stream.sendall(data)
    assert read(stream, len(data)) == data


def test_forwards_both_ways(client: socket.socket, proxy: Proxy) -> None:
    exchange(client, b"hello")
    exchange(client, b"x" * 1_000_000)
    assert (proxy.connections, proxy.accepted) == (1, 1)


def test_forwards_the_end_of_input(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert read(client, 100) == b"goodbye"


def test_cut_resets_open_connections_and_takes_new_ones(client: socket.socket, proxy: Proxy) -> None:
    exchange(client, b"hello")
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with connect(proxy) as another:
        exchange(another, b"again")


def test_cut_without_reset_ends_the_stream(client: socket.socket, proxy: Proxy) -> None:
    exchange(client, b"hello")
    assert proxy.cut(reset=False) == 1
    assert client.recv(1) == b""


def test_stall_keeps_back_until_resumed(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    exchange(client, b"hello")
    proxy.stall()
    client.sendall(b"held")
    assert_silent(client)
    assert bytes(received) == b"hello"
    proxy.resume()
    assert read(client, 4) == b"held"


def test_stall_of_answers_lets_requests_through(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    exchange(client, b"hello")
    proxy.stall(TO_CLIENT)
    client.sendall(b"request")
    assert_silent(client)
    assert bytes(received) == b"hellorequest"
    proxy.resume()
    assert read(client, 7) == b"request"


def test_stall_holds_for_new_connections(proxy: Proxy) -> None:
    proxy.stall()
    with connect(proxy) as late:
        late.sendall(b"late")
        assert_silent(late)
        proxy.resume()
        assert read(late, 4) == b"late"


def test_delay_keeps_order_and_bytes(client: socket.socket, proxy: Proxy) -> None:
    proxy.delay(0.4, TO_CLIENT)
    client.sendall(b"slow")
    assert_silent(client)
    assert read(client, 4) == b"slow"


def test_half_close_towards_the_server(client: socket.socket, proxy: Proxy) -> None:
    exchange(client, b"hello")
    proxy.half_close(TO_SERVER)
    assert read(client, 100) == b"goodbye"


def test_half_close_towards_the_client(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    exchange(client, b"hello")
    proxy.half_close(TO_CLIENT)
    assert client.recv(1) == b""


def test_refuse_keeps_open_connections(client: socket.socket, proxy: Proxy) -> None:
    exchange(client, b"hello")
    proxy.refuse()
    with connect(proxy) as late:
        assert ended(late)
    exchange(client, b"still here")
    proxy.resume()
    with connect(proxy) as welcome:
        exchange(welcome, b"welcome")


def test_when_a_request_passes_its_answer_is_stalled(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    when = proxy.when(TO_SERVER, b"launch", stall=TO_CLIENT)
    exchange(client, b"before")
    assert not when.happened
    client.sendall(b"please launch this")
    when.wait()
    assert_silent(client)
    assert bytes(received) == b"beforeplease launch this"
    with connect(proxy) as another:
        exchange(another, b"launch")  # once, and on that connection only


def test_when_a_request_passes_it_is_kept_back(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    when = proxy.when(TO_SERVER, b"launch", stall=TO_SERVER)
    client.sendall(b"please launch this")
    when.wait()
    assert_silent(client)
    assert bytes(received) == b""
    proxy.resume()
    assert read(client, 18) == b"please launch this"


def test_when_finds_what_spans_two_chunks(client: socket.socket, proxy: Proxy) -> None:
    when = proxy.when(TO_SERVER, b"launch", cut=True)
    exchange(client, b"...lau")
    client.sendall(b"nch...")
    when.wait()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_when_bytes_have_passed(client: socket.socket, proxy: Proxy) -> None:
    when = proxy.when(TO_CLIENT, 10, stall=TO_CLIENT)
    exchange(client, b"12345")
    assert not when.happened
    client.sendall(b"67890")
    when.wait()
    assert_silent(client)


def test_when_answers_carry_it(client: socket.socket, proxy: Proxy, received: bytearray) -> None:
    when = proxy.when(TO_CLIENT, b"secret", cut=True)
    client.sendall(b"a secret")
    when.wait()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert bytes(received) == b"a secret"


def test_waiting_for_what_does_not_come_says_so(client: socket.socket, proxy: Proxy) -> None:
    when = proxy.when(TO_SERVER, b"never", cut=True)
    exchange(client, b"something else")
    with pytest.raises(TimeoutError, match="never"):
        when.wait(0.01)


def test_a_server_that_is_down_looks_down(tmp_path: Path) -> None:
    with Proxy(str(tmp_path / "no-such-socket")) as proxy, connect(proxy) as stream:
        assert ended(stream)


def test_conninfo_goes_through_the_proxy() -> None:
    with Proxy.before("host=/somewhere port=5433 dbname='it\\'s' user=me") as proxy:
        assert proxy._target == "/somewhere/.s.PGSQL.5433"
        assert f"port={proxy.port}" in proxy.conninfo
        assert "user=me" in proxy.conninfo
        assert "host=127.0.0.1" in proxy.conninfo
