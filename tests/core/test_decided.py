"""The text of what autotune decided: one form, read back as written; and which version changed a seed's picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared_tome import ToMeConfig
from shared_tome.autotune.decision_log import DecisionLog, together
from shared_tome.autotune.paying import Given
from shared_tome.changes import CHANGES, COMFYUI, SCRIPTS, WEBUI, version, why_another_picture
from shared_tome.decided import parse

ROOT = Path(__file__).resolve().parents[2]
LATENT = (128, 96)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("", ""),
        ("  ", ""),
        ("+128x96", "+128x96"),
        ("-64x48/640/8, +128x96/320/8;+128x96", "+128x96 +128x96/320/8 -64x48/640/8"),
        ("multires +1x4096/1024/8/512 +16x30x52/1536/12", "multires +16x30x52/1536/12 +1x4096/1024/8/512"),
        ("-all +64x64@0.50 +64x64@.75", "+64x64@0.5 +64x64@0.75 -all"),
        ("+8x8 +8x8", "+8x8"),
        ("+64\u00d764/640/8", "+64x64/640/8"),
        ("\u221264\u00d764/640/8 \u20138x8", "-64x64/640/8 -8x8"),
        ("Decisions: sample +64x64", "sample +64x64"),
        ("Decisions (as set): +64x64", "+64x64"),
        ("sample", "sample"),
    ],
)
def test_a_text_has_one_form(written, text):
    assert parse(written).text == text == ToMeConfig(method="auto", decisions=written).decisions
    assert parse(text) == parse(written)


@pytest.mark.parametrize(
    "word",
    ["64x64", "+64", "+64x", "+64x64/8", "+64x64/8/", "+64x64@2", "+64x64@", "*64x64", "+9999999x1", "+all/8/8", "auto",
     "+64x64 sample", "+64x64/1/2/3/4", "+１x２", "+64x64\u0000"],
)  # fmt: skip
def test_what_has_no_meaning_is_named(word):
    with pytest.raises(ValueError, match="decisions must be words such as") as error:
        ToMeConfig(decisions=word)
    assert repr(word.split()[-1]) in str(error.value)


@pytest.mark.parametrize("value", [None, 3, ["+64x64"], b"+64x64"])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="decisions must be a text"):
        ToMeConfig(decisions=value)


def test_a_name_that_is_merged_and_left_alone_is_refused():
    with pytest.raises(ValueError, match="decisions has 64x64 as merged and as left alone"):
        ToMeConfig(decisions="+64x64 -64x64")
    assert parse("+64x64@0.5 -64x64@0.75").of("64x64", 0.75) is False


def test_the_nearest_word_counts():
    decided = parse("+64x64@0.5 -64x64 -all@0.25 +all")
    assert [decided.of("64x64", ratio) for ratio in (0.5, 0.75)] == [True, False]
    assert [decided.of("8x8/8/8", ratio) for ratio in (0.25, 0.5)] == [False, True]
    assert parse("+64x64").of("8x8", 0.5) is None


def test_named_levels_and_other_methods_are_refused():
    with pytest.raises(ValueError, match="decisions needs levels auto, got levels '0,1'"):
        ToMeConfig(decisions="+64x64", levels="0,1")
    with pytest.raises(ValueError, match="decisions is of method multires, got method 'sample'; set method to auto"):
        ToMeConfig(decisions="multires +64x64", method="sample")


@pytest.mark.parametrize(("named", "multires"), [("multires", False), ("sample", True)])
def test_auto_is_what_is_named(named, multires):
    asked = ToMeConfig(method="auto", ratio=0.9, decisions=named)
    assert asked.resolved(multires).method == named
    assert asked.resolved(multires).ratio == (0.84 if named == "multires" else 0.9)


def test_a_log_tells_what_a_text_takes():
    config, log = ToMeConfig(ratio=0.5), DecisionLog()
    log.resolve(ToMeConfig(method="auto"), config)
    log.made_step(config, LATENT, None, True)
    log.made_layer(config, (64, 48), 640, 8, None, False)
    log.made_layer(config, LATENT, 320, 8, None, True)
    assert log.text == "sample +128x96 +128x96/320/8 -64x48/640/8" and log.as_text == f"Decisions: {log.text}"
    assert log.leaves_alone and log.notes() == []
    other = ToMeConfig(ratio=0.25)
    log.made_layer(other, LATENT, 320, 8, None, False)
    assert log.text == "sample +128x96 -128x96/320/8@0.25 +128x96/320/8@0.5 -64x48/640/8"
    again = ToMeConfig(ratio=0.5, decisions=log.text)
    assert log.layer(again, LATENT, 320, 8) == Given(True) and log.layer(again, (64, 48), 640, 8) == Given(False)
    assert log.layer(again.replace(ratio=0.25), LATENT, 320, 8) == Given(False)
    assert log.layer(again, (32, 24), 640, 8) is None and log.step(again, LATENT) == Given(True)
    assert together([log, DecisionLog()]).text == log.text


def test_named_levels_are_no_decision():
    log = DecisionLog()
    log.made_layer(ToMeConfig(levels="0"), LATENT, 320, 8, None, True)
    log.all_merged(ToMeConfig(levels="0"))
    assert log.text == "" == log.as_text


# --- versions ---------------------------------------------------------------------------------------------------------

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_project():
    assert version() == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert version() == re.search(r"^## (.+)$", CHANGELOG, re.MULTILINE)[1]


def test_the_changelog_and_the_table_say_the_same():
    found = []
    for release in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        number, _, body = release.partition("\n")
        part = re.search(r"^### The picture of a seed\n(.*?)(?=^###? |\Z)", body, re.MULTILINE | re.DOTALL)
        lines = re.split(r"^- ", part[1], flags=re.MULTILINE)[1:] if part else []
        found += [(number, " ".join(line.split()).rstrip(".")) for line in lines]
    assert found == [(change.version, f"{change.what} ({', '.join(change.hosts)})") for change in CHANGES]


@pytest.mark.parametrize(
    ("host", "options", "says"),
    [
        (COMFYUI, {}, {"noise levels", "measures each layer", "are left alone", "stays in use"}),
        (WEBUI, {}, {"measures each layer", "are left alone"}),
        (WEBUI, {"start": 0.2}, {"count noise", "measures each layer", "are left alone"}),
        (SCRIPTS, {"levels": "0", "method": "downsample"}, set()),
        (SCRIPTS, {"levels": "0", "method": "merge", "partition": "fixed_2d", "share_match": True}, {"share match"}),
        (WEBUI, {"decisions": "+64x64"}, {"are left alone"}),
    ],
)
def test_an_older_text_is_told_what_has_changed_for_its_options(host, options, says):
    line = why_another_picture("0.1.0", ToMeConfig(**options), host)
    every = {"noise levels", "count noise", "measures each layer", "share match", "are left alone", "stays in use"}
    assert {word for word in every if word in (line or "")} == says
    assert line is None or ("saved with ToMe 0.1.0" in line and "no way back" in line)


def test_a_text_of_this_version_is_told_nothing_and_one_without_a_version_is_older():
    assert why_another_picture(version(), ToMeConfig(), COMFYUI) is None
    for nothing in ("", "nightly", "1f95d717", "9"):
        assert "saved without ToMe's version" in why_another_picture(nothing, ToMeConfig(), COMFYUI)
    assert "newer than this" in why_another_picture("99.0.0", ToMeConfig(), COMFYUI)
