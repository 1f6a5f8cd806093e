"""What tests/hosts/a1111.py reads out of a real host's log."""

from __future__ import annotations

from pathlib import Path

import shared_tome
from shared_tome.attention import self_token
from shared_tome.hooks.guard import why_left_whole
from shared_tome.inspect.reasons import why_not_served
from shared_tome.merging import residual
from tests.hosts import a1111
from tests.hosts.a1111 import ASKED, own_tracebacks

ROOT = Path(__file__).resolve().parents[2]

OURS = """*** Error running process: /x/extensions/tome/scripts/tome.py
    Traceback (most recent call last):
      File "/x/modules/scripts.py", line 1, in process
        script.process(p, *args)
      File "/x/extensions/tome/a1111_extension/script.py", line 2, in process
    ValueError: bad
---
"""
OTHERS = """Traceback (most recent call last):
  File "/x/modules/txt2img.py", line 1, in txt2img
KeyError: 'q'
[ToMe] sample 0.5, a line that names a1111_extension/ after it
"""
AS_ASKED = f"""Traceback (most recent call last):
  File "/x/extensions/tome/a1111_extension/forge.py", line 1, in tome_wrapper
    out = run(args)
  File "/x/extensions/tome-host-test/scripts/tome_host_test.py", line 2, in stop
RuntimeError: {ASKED}
"""


def test_a_traceback_through_this_extension_counts():
    (found,) = own_tracebacks(f"start\n{OTHERS}{AS_ASKED}{OURS}{OTHERS}")
    assert found.endswith("ValueError: bad") and "a1111_extension/script.py" in found


def test_others_and_the_exception_that_a_check_raises_do_not():
    assert not own_tracebacks(f"start\n{OTHERS}{AS_ASKED}{OTHERS}{AS_ASKED}")
    assert not own_tracebacks("[ToMe] a1111_extension/")


def test_one_that_the_host_cut_short_counts_too():
    (found,) = own_tracebacks('Traceback (most recent call last):\n  File "/x/shared_tome/merging/plan.py", line 1')
    assert "plan.py" in found


def test_checks_look_for_what_the_code_says(tome):
    """A line that was reworded must not leave a check blind, or wrong of a host that is right."""
    assert why_left_whole("attn1", None, 1, 1, replaced=True) == a1111.REPLACED_SELF
    assert why_left_whole("attn2", None, 1, 1, replaced=True) == a1111.REPLACED_CROSS
    assert a1111.FEW in why_not_served(shared_tome.ToMeConfig(min_tokens=2**20), (8, 8), (8, 8))
    assert a1111.NOT_KEPT in self_token.NOT_KEPT and a1111.NO_LSE in self_token.NO_LSE
    assert residual.TRANSFORMER.startswith(a1111.NOT_EXACT)
    assert a1111.NO_WEIGHTS in tome.block.NO_WEIGHTS
    for file, words in (("a1111_extension/script.py", a1111.BUILT_IN), ("a1111_extension/block.py", a1111.NO_LEVEL)):
        assert words in (ROOT / file).read_text(encoding="utf-8")
    assert a1111.NO_GRID in (ROOT / "comfy_tome/unet_call.py").read_text(encoding="utf-8")


def test_a_pass_whose_steps_are_all_left_out_says_so(host, tome, monkeypatch):
    lines = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: lines.append(text % args if args else text))
    plain, _ = host.generate(steps=4)
    found, p = host.generate([{"ratio": 0.5, "min_tokens": 0, "start": 0.55, "end": 0.7}], steps=4)
    assert (found[0] == plain[0]).all() and not p.extra_generation_params
    assert sum(a1111.NO_STEPS in line for line in lines) == 1
