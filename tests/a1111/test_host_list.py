"""What tests/hosts/a1111.py reads out of a real host's log."""

from __future__ import annotations

from tests.hosts.a1111 import ASKED, own_tracebacks

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
