"""Where this server sends what clients asked it to send: to public addresses, and to the one it looked at."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import AddressRefused, OutboundFailed
from serve_app.outbound import Outbound, is_public, resolve_host, url_problem

PUBLIC = "93.184.216.34"


class Net:
    """A name server and every host behind it."""

    def __init__(self, *addresses: str, status: int = 200) -> None:
        self.addresses = list(addresses)
        self.status = status
        self.looked_up: list[tuple[str, int]] = []
        self.requests: list[httpx.Request] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append((host, port))
        return self.addresses

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self.status, headers={"location": "http://169.254.169.254/"})

    def outbound(self, *, any_address: bool = False) -> Outbound:
        transport = httpx.MockTransport(self.answer)
        return Outbound(any_address=any_address, timeout_s=5, resolve=self.resolve, transport=transport)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "64:ff9b:1::7f00:1",
        "64:ff9b:1:ffff::1",
        "2002:a00:1::",
        "2001:0:7f00:1::",
        "::7f00:1",
        "::10.0.0.1",
        "::ffff:0:10.0.0.1",
        "fec0::1",
        "feff::1",
    ],
)
async def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address]):
        net = Net(*addresses)
        with pytest.raises(AddressRefused):
            await net.outbound().post("https://example.com/", b"", {})
        assert net.requests == []


@pytest.mark.parametrize("address", ["2606:4700::1111", "64:ff9c::1", "2001:4860:4860::8888"])
def test_a_public_address_of_version_6_is_one(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
@pytest.mark.parametrize("start", ["::", "::ffff:0:", "64:ff9b::", "64:ff9b:1::"])
def test_an_address_that_a_gateway_turns_into_another_is_not_public(start: str, address: object) -> None:
    assert not is_public(f"{start}{address}")


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_the_one_inside(address: object) -> None:
    assert is_public(f"::ffff:{address}") == is_public(str(address))


async def test_the_connection_goes_to_the_address_that_was_looked_at_under_its_name() -> None:
    net = Net(PUBLIC)
    await net.outbound().post("https://example.com:8443/hook?a=b", b"body", {"webhook-id": "1"})
    [request] = net.requests
    assert net.looked_up == [("example.com", 8443)]
    assert str(request.url) == f"https://{PUBLIC}:8443/hook?a=b"
    assert (request.headers["host"], request.extensions["sni_hostname"]) == ("example.com:8443", "example.com")
    assert (request.content, request.headers["webhook-id"]) == (b"body", "1")


@pytest.mark.parametrize("status", [301, 307, 400, 500])
async def test_a_redirect_is_not_followed_and_only_a_2xx_is_a_delivery(status: int) -> None:
    net = Net(PUBLIC, status=status)
    with pytest.raises(OutboundFailed, match=str(status)):
        await net.outbound().post("https://example.com/", b"", {})
    assert len(net.requests) == 1


async def test_a_name_without_an_address_is_a_failure_without_the_name() -> None:
    with pytest.raises(OutboundFailed, match="name") as caught:
        await Net().outbound().post("https://secret.example.com/", b"", {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [UnicodeError("secret"), UnicodeEncodeError("idna", "secret", 0, 1, "x"), OSError()])
async def test_a_name_that_cannot_be_looked_up_is_a_failure_without_the_name(error: Exception) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise error

    outbound = Outbound(any_address=False, timeout_s=5, resolve=resolve)
    with pytest.raises(OutboundFailed, match="name") as caught:
        await outbound.post("https://secret.example.com/", b"", {})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://straße.example/", "xn--strae-oqa.example"),
        ("https://xn--a/", "xn--a"),
        ("https://" + "a" * 63 + ".example.com./", "a" * 63 + ".example.com."),
        ("https://my_host.example.com/", "my_host.example.com"),
    ],
)
async def test_the_name_that_is_looked_up_is_the_one_that_is_sent(url: str, name: str) -> None:
    net = Net(PUBLIC)
    assert url_problem(url, any_address=False) is None
    await net.outbound().post(url, b"", {})
    assert net.looked_up == [(name, 443)]
    assert (net.requests[0].headers["host"], net.requests[0].extensions["sni_hostname"]) == (name, name)


async def test_a_connection_that_fails_is_told_without_its_address() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("https://secret.example.com refused")

    outbound = Outbound(
        any_address=False, timeout_s=5, resolve=Net(PUBLIC).resolve, transport=httpx.MockTransport(refuse)
    )
    with pytest.raises(OutboundFailed, match="ConnectError") as caught:
        await outbound.post("https://secret.example.com/", b"", {})
    assert "secret" not in str(caught.value)
    await outbound.close()


async def test_a_setting_allows_what_is_beside_the_server() -> None:
    net = Net("127.0.0.1")
    await net.outbound(any_address=True).post("http://receiver/", b"", {})
    assert len(net.requests) == 1
    assert "127.0.0.1" in await resolve_host("127.0.0.1", 80)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://",
        "/hook",
        "https://user:pass@example.com/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest",
        "https://example.com/" + "x" * 2048,
        "https://exa mple.com/",
        "https://a..b/",
        "https://.example.com/",
        "https://example.com../",
        "https://" + "a" * 64 + ".example.com/",
        "https://" + "a." * 127 + "com/",
        "https://a:b@/",
        "https://[::7f00:1]/",
        "https://[64:ff9b:1::1]/",
        "",
    ],
)
async def test_a_url_that_is_wrong_by_its_text_is_refused_before_any_look_up(url: str) -> None:
    net = Net(PUBLIC)
    assert url_problem(url, any_address=False) is not None
    with pytest.raises(AddressRefused):
        await net.outbound().post(url, b"", {})
    assert net.looked_up == []
