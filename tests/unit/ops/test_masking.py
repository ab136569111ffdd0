"""What is masked, what is shown, and that no secret gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.config.options import OPTIONS
from mpserverd.config.show import toml_value
from mpserverd.ops import masking
from mpserverd.ops.masking import MASK


def test_every_shown_key_is_an_option() -> None:
    assert {option.key for option in OPTIONS} >= masking.SHOWN_KEYS


def test_known_settings_are_shown_and_everything_else_is_masked() -> None:
    tree: dict[str, Any] = {
        "server": {"workers": 3, "secret": "x", "nested": {"deep": "y"}},
        "listener": [{"name": "raw", "tokens": ["a"], "tls_key": "/etc/key"}],
        "layout": {"a": {"size": 16, "other": "z"}},
        "monitor": {"redis_url": "redis://u:p@h"},
        "loose": "value",
    }
    assert masking.masked_settings(tree) == {
        "server": {"workers": 3, "secret": MASK, "nested": MASK},
        "listener": [{"name": "raw", "tokens": MASK, "tls_key": MASK}],
        "layout": {"a": {"size": 16, "other": MASK}},
        "monitor": {"redis_url": MASK},
        "loose": MASK,
    }


@pytest.mark.parametrize(
    "text",
    [
        "url redis://user:SECRETVALUE@host/0",
        "url nats://SECRETVALUE@host",
        "Authorization: Bearer SECRETVALUE",
        "authorization=Basic SECRETVALUE==",
        'token = "SECRETVALUE"',
        "monitor.token='SECRETVALUE'",
        '{"api_key": "SECRETVALUE"}',
        "tokens = ['SECRETVALUE', 'more SECRETVALUE']",
        "PASSWORD=SECRETVALUE next",
        "passphrase: SECRETVALUE",
        "-----BEGIN EC PRIVATE KEY-----\nSECRETVALUE\n-----END EC PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nSECRETVALUE and no end",
    ],
)
def test_what_looks_like_a_secret_is_cut_out(text: str) -> None:
    assert "SECRETVALUE" not in masking.scrub(text, ())


@pytest.mark.parametrize(
    "text",
    ["connection ended stream=press-7 bytes=123456", "spool=/var/lib/mpserverd free=412", "see https://example.org/x"],
)
def test_ordinary_lines_stay_as_they_are(text: str) -> None:
    assert masking.scrub(text, {"abc"}) == text


secrets = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=6, max_size=30).filter(
    lambda text: text not in MASK
)


@given(secret=secrets)
def test_a_masked_value_is_cut_out_wherever_else_it_stands(secret: str) -> None:
    config = f"[monitor]\nanything = {toml_value(secret)}\n[server]\nworkers = 2\n"
    known = masking.secrets_of(config)
    assert secret in known
    assert secret not in masking.scrub(f"it was <{secret}> and again {secret}", known)
    tree = masking.scrub_tree({"a": [secret, {"b": f"x {secret}"}], "n": 5, "t": True}, known)
    assert secret not in json.dumps(tree, ensure_ascii=False)
    assert (tree["n"], tree["t"]) == (5, True)


def test_secrets_of_a_torn_file_are_known_too() -> None:
    known = masking.secrets_of(
        '[server]\nworkers = 2\n[monitor\ntoken = "hunter2-hunter2"\n[[sink]]\nurl = \'abcdefgh\n'
    )
    assert {"hunter2-hunter2"} <= known
    assert "hunter2-hunter2" not in masking.scrub("x hunter2-hunter2 y", known)


def test_a_number_that_is_a_secret_is_cut_out_and_its_like_are_not() -> None:
    known = masking.secrets_of("[monitor]\npin = 271828\n")
    assert masking.scrub("pin 271828, 2718281828 bytes", known) == f"pin {MASK}, 2718281828 bytes"
    assert masking.scrub_tree({"a": 271828, "b": 2718281828}, known) == {"a": MASK, "b": 2718281828}


def test_overrides_on_a_command_line_are_masked_by_the_same_list() -> None:
    words = [
        "mpserverd",
        "--set",
        "server.workers=2",
        "--set",
        "monitor.token=abcdef",
        "--set=listener.0.tls_key=k3yk3y",
    ]
    assert masking.masked_arguments(words) == [
        "mpserverd", "--set", "server.workers=2", "--set", f"monitor.token={MASK}", f"--set=listener.0.tls_key={MASK}",
    ]  # fmt: skip
    assert masking.secrets_of_arguments(words) == {"abcdef", "k3yk3y"}
    layout = ["--set", "layout.a.size=16", "--set", "listener.0.name=x"]
    assert masking.masked_arguments(layout) == layout
