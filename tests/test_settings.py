"""Options: each is read, refused and documented by the one table."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.application.config import Config, assigned, freeze, reset, snapshot
from kore.application.documentation import options_markdown
from kore.application.kinds import Integer
from kore.application.settings import OPTIONS, Settings, UnknownOptionError
from kore.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]

# Kore-api.md section 6 and 21: every name, with the default of the reference.
DEFAULTS = {
    "workers": None, "worker_max_connections": 512, "worker_rlimit_nofiles": 768, "worker_accept_threshold": 16,
    "worker_death_policy": "restart", "worker_set_affinity": True, "worker_no_accept": (), "pidfile": "kore.pid",
    "socket_backlog": 5000, "logfile": None, "tls_version": "both", "tls_cipher": None, "tls_dhparam": None,
    "rand_file": None, "deployment": None, "acme_email": None, "acme_eab_kid": None, "acme_eab_key": None,
    "acme_ca_bundle": None, "acme_volatile": False,
    "acme_provider": "https://acme-v02.api.letsencrypt.org/directory", "pledge": (), "seccomp_tracing": False,
    "sandbox_programs": (),
    "filemap_ext": None, "filemap_index": "index.html", "http_media_type": (), "http_header_max": 4096,
    "http_header_timeout": 10, "http_body_max": 1024000, "http_body_timeout": 60, "http_write_timeout": 60,
    "http_body_disk_offload": 0,
    "http_body_disk_path": "tmp_files", "http_server_version": "kore (0.1.0)", "http_pretty_error": False,
    "http_hsts_enable": 31536000, "http_keepalive_time": 20, "http_request_ms": 10, "http_request_limit": 1000,
    "websocket_maxframe": 16384, "websocket_max_message": 1024 * 1024, "websocket_timeout": 120,
    "websocket_deflate": True,
    "pgsql_conn_max": 2, "pgsql_queue_limit": 1000,
    "task_threads": 2, "curl_timeout": 60, "curl_recv_max": 2097152, "file": None, "root": None, "runas": None,
    "sandbox": None, "sandbox_read": (), "sandbox_write": (), "sandbox_connect": (),
    "keymgr_root": None, "keymgr_runas": None, "acme_root": None, "acme_runas": None,
}  # fmt: skip

UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1

RANGES = {
    "workers": (1, 255), "worker_max_connections": (1, UINT32_MAX), "worker_rlimit_nofiles": (1, UINT32_MAX),
    "worker_accept_threshold": (1, UINT32_MAX), "socket_backlog": (0, UINT32_MAX), "http_header_max": (1, 65535),
    "http_header_timeout": (1, 65535), "http_body_max": (0, INT64_MAX), "http_body_timeout": (1, 65535),
    "http_write_timeout": (1, 65535),
    "http_body_disk_offload": (0, INT64_MAX), "http_hsts_enable": (0, INT64_MAX), "http_keepalive_time": (0, 65535),
    "http_request_ms": (0, UINT32_MAX), "http_request_limit": (0, UINT32_MAX), "websocket_maxframe": (0, INT64_MAX),
    "websocket_max_message": (0, INT64_MAX), "websocket_timeout": (0, INT64_MAX),
    "pgsql_conn_max": (0, 65535), "pgsql_queue_limit": (0, UINT32_MAX),
    "task_threads": (0, 255), "curl_timeout": (0, 65535), "curl_recv_max": (0, INT64_MAX),
}  # fmt: skip


@pytest.fixture
def config() -> Config:
    return Config()


def test_every_option_of_the_reference_is_there_with_its_default():
    assert {name: option.default for name, option in OPTIONS.items()} == DEFAULTS
    assert dataclasses.asdict(Settings()) == DEFAULTS


def test_reading_gives_the_default_until_something_is_assigned(config):
    assert {name: getattr(config, name) for name in OPTIONS} == DEFAULTS
    config.workers = 2
    assert config.workers == 2
    assert assigned(config) == {"workers"}
    assert sorted(OPTIONS) == dir(config)


@pytest.mark.parametrize(("name", "low", "high"), [(name, *bounds) for name, bounds in RANGES.items()])
def test_integers_hold_their_bounds_as_int_and_as_text(config, name, low, high):
    for value in (low, high):
        setattr(config, name, value)
        assert getattr(config, name) == value
        setattr(config, name, str(value))
        assert getattr(config, name) == value
    for value in (low - 1, high + 1, str(low - 1), str(high + 1), "", "x", "1x", " 1", "1.0", "1_0", "٣", 1.5, None,
                  True, b"1", [1], 10**5000, "9" * 5000):  # fmt: skip
        with pytest.raises(ConfigurationError) as caught:
            setattr(config, name, value)
        assert f"kore.config.{name} = " in str(caught.value)
        assert "allowed is an integer from" in str(caught.value)
        assert len(str(caught.value)) < 300
    assert getattr(config, name) == high, "a refused value changes nothing"


def test_the_message_names_option_value_and_what_is_allowed(config):
    with pytest.raises(ConfigurationError) as caught:
        config.workers = 0
    assert str(caught.value) == "kore.config.workers = 0: out of range; allowed is an integer from 1 to 255"
    with pytest.raises(ConfigurationError, match=r"deployment = 'prod': none of the choices; allowed is one of dev,"):
        config.deployment = "prod"
    with pytest.raises(ConfigurationError, match=r"seccomp_tracing = 'maybe': .*allowed is yes or no"):
        config.seccomp_tracing = "maybe"


@pytest.mark.parametrize(
    ("text", "number"), [("0x10", 16), ("0XfF", 255), ("010", 8), ("10", 10), ("19", 19), ("08", 8)]
)
def test_the_accept_threshold_counts_by_the_base_in_its_text(config, text, number):
    config.worker_accept_threshold = text
    assert config.worker_accept_threshold == number
    with pytest.raises(ConfigurationError):
        config.workers = "0x10"


@pytest.mark.parametrize("name", ["worker_set_affinity", "seccomp_tracing", "http_pretty_error"])
def test_switches_take_words_numbers_and_booleans(config, name):
    for value in (True, 1, "1", "yes", "YES", "True", "on"):
        setattr(config, name, value)
        assert getattr(config, name) is True
    for value in (False, 0, "0", "no", "No", "False", "off"):
        setattr(config, name, value)
        assert getattr(config, name) is False
    for value in (2, -1, "2", "", "maybe", None, 1.0, b"yes", []):
        with pytest.raises(ConfigurationError, match="True and False"):
            setattr(config, name, value)


def test_ports_and_paths_of_the_sandbox_collect(config):
    config.sandbox_connect = 5432
    config.sandbox_connect = ["443", "any"]
    config.sandbox_read = Path("/srv/data")
    config.sandbox_read = "more"
    config.sandbox = "no"
    found = snapshot(config)
    assert found.sandbox_connect == (5432, 443, "any")
    assert found.sandbox_read == ("/srv/data", "more")
    assert found.sandbox is False
    for bad in (0, 65536, "http", True, "ANY", "", None):
        with pytest.raises(ConfigurationError, match=r"_connect = .*; allowed is a port from 1 to 65535, or 'any'"):
            config.sandbox_connect = bad


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("deployment", "dev", "dev"),
        ("deployment", "development", "dev"),
        ("deployment", "docker", "docker"),
        ("deployment", "production", "production"),
        ("worker_death_policy", "terminate", "terminate"),
        ("tls_version", "1.3", "1.3"),
        ("tls_version", 1.2, "1.2"),
        ("pidfile", "/run/x.pid", "/run/x.pid"),
        ("pidfile", Path("/run/x.pid"), "/run/x.pid"),
        ("runas", "www", "www"),
        ("runas", 1000, "1000"),
        ("http_server_version", "s", "s"),
        ("http_server_version", "x" * 53, "x" * 53),
        ("acme_email", "new.user+kore@example.org", "new.user+kore@example.org"),
        ("acme_provider", "https://127.0.0.1:14000/dir", "https://127.0.0.1:14000/dir"),
        ("acme_provider", "https://[::1]:14000/dir?x=1", "https://[::1]:14000/dir?x=1"),
        ("acme_provider", "https://ca.example", "https://ca.example"),
        ("acme_volatile", "yes", True),
    ],
)
def test_choices_texts_and_paths(config, name, value, kept):
    setattr(config, name, value)
    assert getattr(config, name) == kept
    assert getattr(snapshot(config), name) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deployment", "Dev"), ("deployment", ""), ("deployment", None), ("deployment", True), ("deployment", 1),
        ("worker_death_policy", "exit"), ("tls_version", "1.1"), ("pidfile", ""), ("pidfile", "a\0b"),
        ("pidfile", None), ("pidfile", 3), ("pidfile", b"x"), ("runas", "a\nb"), ("runas", ""), ("runas", True),
        ("http_server_version", "x" * 54), ("http_server_version", "a\r\nset-cookie: b"),
        ("http_server_version", " a"), ("http_server_version", "ü"),
        ("acme_email", "nobody"), ("acme_email", "a@b, c@d"), ("acme_email", "mailto:a@b"), ("acme_email", "a@b?c=d"),
        ("acme_email", None), ("acme_email", "a" * 251 + "@b.c"),
        ("acme_provider", "http://ca.example/directory"), ("acme_provider", "ca.example"), ("acme_provider", "https://"),
        ("acme_provider", "https://a:b@ca.example/"), ("acme_provider", "https://ca.example:123456/"),
        ("acme_provider", "https://ca.example/ x"), ("acme_provider", "https://ca.example/\n"),
    ],
)  # fmt: skip
def test_what_is_no_such_text_is_refused(config, name, value):
    with pytest.raises(ConfigurationError, match=rf"kore\.config\.{name} = .*; allowed is "):
        setattr(config, name, value)


def test_repeatable_options_collect(config):
    config.http_media_type = "text/markdown md Markdown"
    config.http_media_type = ["image/webp .webp", "text/html html"]
    config.worker_no_accept = 2
    config.worker_no_accept = "3"
    kept = (("text/markdown", ("md", "markdown")), ("image/webp", ("webp",)), ("text/html", ("html",)))
    assert config.http_media_type == kept
    assert snapshot(config).worker_no_accept == (2, 3)
    for value in ("text/plain", "", "plain txt", "text/plain " + "x " * 10, 7, None, ["text/plain"], "a/b ."):
        with pytest.raises(ConfigurationError, match="http_media_type"):
            config.http_media_type = value
    with pytest.raises(ConfigurationError, match="more than 255"):
        config.worker_no_accept = [1] * 256
    assert config.worker_no_accept == (2, 3)


def test_options_that_do_not_go_together_are_refused_together(config):
    config.http_media_type = "text/markdown md"
    config.http_media_type = "text/x-md md"
    with pytest.raises(ConfigurationError, match=r"extension 'md' is given to both text/markdown and text/x-md"):
        snapshot(config)
    reset(config)
    config.worker_no_accept = 3
    assert snapshot(config).worker_no_accept == (3,)
    config.workers = 2
    with pytest.raises(ConfigurationError, match=r"worker_no_accept = 3: no such worker; allowed .* 1 to 2"):
        snapshot(config)
    reset(config)
    config.workers = 1
    config.worker_no_accept = 1
    with pytest.raises(ConfigurationError, match="names every worker"):
        snapshot(config)


@pytest.mark.parametrize(("given", "lacking"), [
    ("acme_eab_kid", "acme_eab_key"), ("acme_eab_key", "acme_eab_kid"),
])
def test_external_account_binding_takes_both_or_none(config, given, lacking):
    setattr(config, given, "x")
    with pytest.raises(ConfigurationError, match=rf"^kore\.config\.{given}: is of no use without {lacking}; allowed"):
        snapshot(config)
    setattr(config, lacking, "y")
    assert (getattr(snapshot(config), given), getattr(snapshot(config), lacking)) == ("x", "y")


def test_programs_of_the_sandbox_or_none(config):
    assert snapshot(config).sandbox_programs == ()
    config.sandbox_programs = "none"
    assert snapshot(config).sandbox_programs == ("none",)
    config.sandbox_programs = "/bin/ls"
    with pytest.raises(ConfigurationError, match=r"sandbox_programs: none, and /bin/ls; allowed is none alone"):
        snapshot(config)
    reset(config)
    config.sandbox_programs = ["/bin/ls", Path("/usr/local/bin")]
    assert snapshot(config).sandbox_programs == ("/bin/ls", "/usr/local/bin")


def test_an_unknown_name_is_an_error_that_names_the_closest(config):
    with pytest.raises(UnknownOptionError, match=r"^kore\.config\.worker: there .*; did you mean workers\?$"):
        config.worker = 1
    with pytest.raises(AttributeError, match="did you mean http_body_max"):
        _ = config.http_max_body
    with pytest.raises(ConfigurationError, match=r"docs/options\.md"):
        config.zzz = 1
    assert not hasattr(config, "nothing_like_it")
    assert getattr(config, "Workers", 5) == 5


def test_deleting_is_an_attribute_error(config):
    config.workers = 2
    for name in ("workers", "nonsense"):
        with pytest.raises(AttributeError, match="can't be deleted"):
            delattr(config, name)
    assert config.workers == 2


def test_after_the_start_assignments_are_runtime_errors(config):
    config.workers = 2
    freeze(config)
    for name in ("workers", "nonsense"):
        with pytest.raises(RuntimeError, match=rf"kore\.config\.{name}: .* after the start"):
            setattr(config, name, 3)
    assert config.workers == 2
    reset(config)
    config.workers = 3


def test_the_object_shows_itself_as_the_reference_does(config):
    assert f"{type(config).__module__}.{type(config).__name__}" == "kore.config"
    assert repr(config) == "<kore.config as by default>"
    config.workers = 2
    assert repr(config) == "<kore.config workers=2>"


def test_the_snapshot_is_frozen_and_separate(config):
    settings = snapshot(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.workers = 3
    config.workers = 9
    assert settings.workers is None


@given(st.one_of(st.integers(), st.text(), st.floats(), st.binary(), st.none(), st.booleans(), st.lists(st.text())))
def test_whatever_is_assigned_is_taken_or_refused_with_a_message(value):
    config = Config()
    for name, option in OPTIONS.items():
        refusal = option.kind.allowed
        try:
            setattr(config, name, value)
        except ConfigurationError as caught:
            refusal = str(caught)
        assert option.kind.allowed in refusal


@given(st.text(max_size=30))
def test_whatever_the_name_is(name):
    config = Config()
    try:
        setattr(config, name, 1)
    except ConfigurationError:
        assert name not in OPTIONS or name in str(OPTIONS)


@given(st.integers(-(2**70), 2**70))
def test_an_integer_and_its_text_are_the_same(number):
    kind = Integer(-(2**69), 2**69)
    outcomes = []
    for value in (number, str(number)):
        try:
            outcomes.append(kind.parse(value))
        except ValueError as problem:
            outcomes.append(str(problem))
    assert outcomes[0] == outcomes[1]


def test_the_documentation_is_current_and_complete():
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == options_markdown(), "run: python -m kore.application.documentation > docs/options.md"
    for name, option in OPTIONS.items():
        assert f"| `{name}` | {option.default_text} | {option.kind.allowed} | {option.meaning}" in page


def test_the_documentation_prints_itself():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kore.application.documentation"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout == options_markdown()
    assert done.stderr == ""
