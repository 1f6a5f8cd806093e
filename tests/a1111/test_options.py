"""What comes in: arguments, settings, the plot's axes; what goes out: the picture's text."""

from __future__ import annotations

import dataclasses
import re
import types

import pytest

from .host import FIRST, VERSION

NAMES = ("enabled", "ratio", "hires_ratio", "seed_rule")


def test_every_option_of_the_core_is_in_the_panel_with_its_own_range_and_text(host, tome):
    widgets = {widget.name: widget for widget in tome.options.WIDGETS}
    controls = dict(zip(tome.options.NAMES, host.tabs["txt2img"].inputs[1:], strict=True))
    for widget in tome.core.ToMeConfig.widgets():
        option, control = widget.option, controls[widget.name]
        assert widgets[widget.name].option == option
        assert (control.label, control.info, control.value) == (option.label, option.line, widget.default)
        for name in ("minimum", "maximum"):
            if hasattr(control, name):
                assert getattr(control, name) == getattr(option, name)
        if option.choices:
            assert tuple(control.choices) == option.choices


def test_each_text_of_the_panel_and_the_settings_is_one_line_with_a_link(host, tome):
    """To the page that says more, as the host serves it."""
    texts = {widget.name: widget.option.line for widget in (*tome.options.WIDGETS, *tome.settings._page())}
    assert len(texts) > 24
    for name, text in texts.items():
        assert 0 < len(text) <= 100 and "\n" not in text and text.endswith("."), name
    link = '<a href="file=docs/settings.md?1" target="_blank">'
    for info in host.opts.data_labels.values():
        assert link in info.comment_after and len(info.comment_after) < 250
    assert tome.panel.link("More") == f"{link}More</a>"


def test_a_host_that_serves_no_files_gets_the_pages_name(tome, monkeypatch):
    monkeypatch.setattr(tome.panel, "webpath", None)
    assert tome.panel.link("More") == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"ToMe version": "0.1.0"}, "saved with ToMe 0.1.0. The same seed may give another picture"),
        ({}, "saved without ToMe&#x27;s version, so with 0.1.0 or by hand"),
        ({"ToMe version": "99.0"}, "newer than this"),
        ({"ToMe version": VERSION}, None),
    ],
)
def test_a_text_of_another_version_says_what_has_changed(host, tome, lines, text, says):
    """In the panel and in the log; the next text takes it away."""
    *fields, (_, older) = host.tabs["txt2img"].scripts[0].infotext_fields
    parameters = {"ToMe ratio": "0.5", **text}
    told = older(parameters)
    for field in fields:
        field[1](parameters)
    if says is None:
        assert told == "" and not lines
        return
    assert says in told and told.startswith("<p>The pasted text was ")
    assert len(lines) == 1 and lines[0].startswith("[ToMe] the picture's text was saved with")
    assert "go by noise levels" not in lines[0], "of other hosts"
    assert older({"Steps": "20"}) == ""


def test_the_order_of_arguments_is_a_promise(tome):
    """Scripts that use the API count on it: new options go to the end."""
    assert tome.options.NAMES[:16] == (
        "enabled", "ratio", "hires_ratio", "seed_rule", "stride_x", "stride_y", "method", "seed", "partition",
        "levels", "start", "end", "ratio_end", "cross_attention", "mlp", "proportional",
    )  # fmt: skip
    assert tome.options.NAMES[16:] == (
        "reduce", "min_tokens", "share_match", "map", "own_token", "whole", "half", "decisions",
        "exact_every",
    )  # fmt: skip


def test_ui_has_no_side_effects(host):
    script = host.tabs["txt2img"].scripts[0]
    data, callbacks = dict(host.opts.data), {name: list(found) for name, found in host.callbacks.items()}
    state = {name: value for name, value in vars(script).items() if name not in ("infotext_fields",)}
    first, second = script.ui(False), script.ui(False)
    assert [c.value for c in first] == [c.value for c in second]
    assert host.opts.data == data and host.callbacks == callbacks
    assert {name: value for name, value in vars(script).items() if name not in ("infotext_fields",)} == state


def test_the_host_does_not_freeze_the_start_values(host):
    assert all(control.do_not_save_to_config for control in host.tabs["txt2img"].inputs[1:])


def test_element_ids_are_the_tabs_own(host):
    ids = [control.elem_id for tab in host.tabs.values() for control in tab.inputs[1:]]
    assert len(ids) == len(set(ids)) and all(ids)


@pytest.mark.parametrize("level", [None, "WARNING", "INFO"])
def test_our_lines_are_seen_whatever_logging_the_host_has_set_up(tome, monkeypatch, capsys, level):
    """A1111 sets up none, reForge shows warnings alone."""
    import logging

    root, ours = logging.RootLogger(level or "WARNING"), tome.notes.logger
    if level is not None:
        root.addHandler(logging.StreamHandler())
    monkeypatch.setattr(logging, "root", root)
    for name, value in (("parent", root), ("handlers", []), ("propagate", True), ("level", 0), ("_cache", {})):
        monkeypatch.setattr(ours, name, value)
    tome.notes.set_up_log()
    tome.notes.Notes().say("hello")
    assert capsys.readouterr().err == "[ToMe] hello\n"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(host):
    """The host with Settings by which its pictures of 256 tokens are merged, or their text would tell nothing."""
    host.opts.data["tome_min_tokens"] = 0
    host.start()
    return host


# What its text tells beside the rest: the attention of its model keeps no own tokens.
MERGED = {"ToMe decisions": FIRST, "ToMe version": VERSION}
SMALL = {"ToMe min tokens": 0, "ToMe own token": False, **MERGED}


def test_a_short_list_keeps_the_defaults(small):
    _, p = small.generate([True, 0.5])
    assert p.extra_generation_params == {"ToMe ratio": 0.5, "ToMe method": "sample", **SMALL}


def test_nulls_keep_the_defaults(small):
    _, p = small.generate([True, None, None, None, 3])
    assert p.extra_generation_params == {"ToMe ratio": 0.75, "ToMe stride x": 3, "ToMe method": "sample", **SMALL}


def test_nulls_in_an_object_are_as_left_out(small):
    """Among them those that this host adds: "enabled": null does not switch ToMe off."""
    nulls = {"enabled": None, "preset": None, "method": None, "seed_rule": None, "hires_ratio": None}
    made, p = small.generate([{"ratio": 0.5, **nulls}])
    assert p.extra_generation_params == {"ToMe ratio": 0.5, "ToMe method": "sample", **SMALL}
    assert (made[0] == small.generate([{"ratio": 0.5}])[0][0]).all()


def test_names_in_one_object(small):
    _, p = small.generate([{"ratio": 0.25, "method": "merge", "stride_y": 4}])
    assert p.extra_generation_params == {
        "ToMe ratio": 0.25, "ToMe stride y": 4, "ToMe method": "merge", "ToMe min tokens": 0, **MERGED,
    }  # fmt: skip


def test_the_settings_are_the_defaults_of_a_short_list_and_of_names(small):
    small.opts.data["tome_method"] = "merge"
    small.start()
    for args in ([True, 0.5], [{"ratio": 0.5}]):
        _, p = small.generate(args)
        assert p.extra_generation_params["ToMe method"] == "merge"


BAD = [
    ([True, 7], "ratio must be a number in 0.0 to 1.0, got 7"),
    ([True, "0.5"], "ratio"),
    ([True, float("nan")], "ratio"),
    (["yes", 0.5], "enabled"),
    ([True, 0.5, -0.5], "hires_ratio"),
    ([True, 0.5, True], "hires_ratio"),
    ([True, 0.5, None, "random"], "seed_rule"),
    ([{"rato": 0.5}], "rato"),
    ([{"preset": "fast"}], "preset must be one of Quality, Balanced, Fast, got 'fast'"),
    ([{"preset": "Custom"}], "preset"),
    ([{"preset": ["Fast"]}], "preset"),
    ([{"map": "yes"}], "map"),
    ([{"method": "tomato"}], "method"),
    ([{"levels": "9"}], "levels"),
    ([{"start": 0.9, "end": 0.1}], "start"),
    ([{"mlp": True}], "mlp"),
    ([{"stride_x": 2.5}], "stride"),
    ([[True]], "enabled"),
    ([{"decisions": "+64"}], "decisions must be words such as +128x128"),
    ([{"decisions": 3}], "decisions must be a text"),
    ([{"decisions": "+16x16/32/2 -16x16/32/2"}], "decisions has 16x16/32/2 as merged and as left alone"),
    ([{"decisions": "+16x16/32/2", "levels": "0"}], "decisions needs levels auto, got levels '0'"),
    ([{"decisions": "merge +8x8/64/2", "method": "sample"}], "decisions is of method merge, got method 'sample'"),
]


@pytest.mark.parametrize(("args", "text"), BAD)
def test_a_bad_value_in_a_request_is_http_422(host, monkeypatch, args, text):
    import sys

    class HTTPException(Exception):
        def __init__(self, status_code, detail):
            super().__init__(detail)
            self.status_code, self.detail = status_code, detail

    monkeypatch.setitem(sys.modules, "fastapi", types.SimpleNamespace(HTTPException=HTTPException))
    with pytest.raises(HTTPException) as error:
        host.generate(args)
    assert error.value.status_code == 422 and text in error.value.detail


@pytest.mark.parametrize(("args", "text"), BAD)
def test_a_bad_value_of_a_person_is_a_line_and_a_picture_without(host, args, text):
    plain, _ = host.generate()
    runner = host.tabs["txt2img"]
    from . import host as program

    values = [*args, *runner.defaults[1 + len(args) :]]
    p = program.Processing(host, scripts=runner, script_args=(0, *values))
    found = host.process_images(p)
    assert (found[0] == plain[0]).all() and not p.extra_generation_params
    assert any(text in comment and "off for this picture" in comment for comment in p.comments)


def test_off_looks_at_nothing_else(host):
    _, p = host.generate([False, 99, "x"])
    assert not p.troubles


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_settings_page(host, tome):
    labels = host.opts.data_labels
    assert {f"tome_{name}" for name in tome.options.NAMES} | {"tome_img2img_ratio", "tome_report"} == set(labels)
    assert all(info.section == ("tome", "ToMe") for info in labels.values())
    step = tome.core.ToMeConfig.options()["ratio"].step
    assert labels["tome_ratio"].component_args == {"minimum": 0.0, "maximum": 1.0, "step": step}
    for name in ("hires_ratio", "img2img_ratio"):
        assert labels[f"tome_{name}"].component_args == {"minimum": -1.0, "maximum": 1.0, "step": step}


def test_the_report_alone_needs_no_new_page(host):
    waits = {name for name, info in host.opts.data_labels.items() if "requires Reload UI" in info.comment_after}
    assert set(host.opts.data_labels) - waits == {"tome_report"}


def test_a_setting_changes_what_the_panel_starts_with(host):
    host.opts.data.update(tome_ratio=0.4, tome_enabled=True, tome_method="merge")
    host.start()
    for tab in host.tabs.values():
        assert tab.defaults[1:3] == [True, 0.4] and "merge" in tab.defaults


def test_img2img_may_start_with_a_ratio_of_its_own(host):
    host.opts.data.update(tome_ratio=0.4, tome_img2img_ratio=0.2)
    host.start()
    assert host.tabs["txt2img"].defaults[2] == 0.4 and host.tabs["img2img"].defaults[2] == 0.2
    host.opts.data.update(tome_img2img_ratio=0.0)
    host.start()
    assert host.tabs["img2img"].defaults[2] == 0.0


def test_on_by_default_merges_without_being_asked(host):
    plain, _ = host.generate()
    host.opts.data.update(tome_enabled=True, tome_min_tokens=0)
    host.start()
    assert (host.generate()[0][0] != plain[0]).any()


def test_a_setting_out_of_range_is_passed_over(host):
    host.opts.data.update(tome_ratio=5, tome_method="tomato", tome_img2img_ratio="x", tome_start=0.5)
    host.start()
    defaults = host.tabs["img2img"].defaults
    assert defaults[2] == 0.75 and "auto" in defaults and 0.5 in defaults


@pytest.fixture
def lines(tome, monkeypatch):
    """What the log gets."""
    found = []
    monkeypatch.setattr(tome.notes.logger, "info", lambda text, *args: found.append(text % args if args else text))
    return found


def test_settings_that_are_null_are_the_defaults_and_that_is_said(host, tome, lines):
    """As a cleared number field leaves them in the host's file."""
    expected = {tab: list(runner.defaults) for tab, runner in host.tabs.items()}
    for key in (*(f"tome_{name}" for name in tome.options.NAMES), "tome_img2img_ratio", "tome_report"):
        host.opts.data[key] = None
        lines.clear()
        host.start()
        assert {tab: runner.defaults for tab, runner in host.tabs.items()} == expected
        assert key == "tome_report" or any(key in line for line in lines), key
    host.generate([{"ratio": 0.5, "min_tokens": 0}])
    assert any("tome_report" in line for line in lines)


@pytest.mark.parametrize(
    ("saved", "option", "used"),
    [
        ({"tome_start": 0.9, "tome_end": 0.1}, "end", 1.0),
        ({"tome_mlp": True}, "mlp", False),
        ({"tome_cross_attention": True, "tome_method": "downsample"}, "cross_attention", False),
    ],
)
def test_settings_that_are_possible_alone_but_not_together(host, tome, lines, saved, option, used):
    """Or no picture would be made with ToMe until somebody found out why."""
    host.opts.data.update(saved, tome_enabled=True, tome_min_tokens=0)
    host.start()
    values = dict(zip(tome.options.NAMES, host.tabs["img2img"].defaults[1:], strict=True))
    assert values[option] == used and any(f"tome_{option}" in line for line in lines)
    for name, value in saved.items():
        assert name == f"tome_{option}" or values[name.removeprefix("tome_")] == value
    _, p = host.generate(steps=12)
    assert p.extra_generation_params["ToMe ratio"] == 0.75 and not p.troubles


# --- infotext ---------------------------------------------------------------------------------------------------------


def _parse(text):
    """The host's own pattern, in short: name: value, with quotes around values that hold commas."""
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text)
    return {key: value.strip('"') for key, value in found}


def _write(parameters):
    return ", ".join(f'{k}: "{v}"' if "," in str(v) else f"{k}: {v}" for k, v in parameters.items())


@pytest.mark.parametrize(
    ("levels", "decisions"), [("0,1", ""), ("auto", "+64x64/320/8@0.5 -32x32/640/8 +16x16/1280/8")]
)
def test_what_is_written_is_read_back(host, tome, levels, decisions):
    """Named levels and decisions exclude each other."""
    config = tome.core.ToMeConfig(
        ratio=0.35, stride=(2, 3), method="merge", partition="random", levels=levels, start=0.1, end=0.9, ratio_end=0.0,
        cross_attention=True, mlp=True, proportional=False, reduce="pick", min_tokens=512, share_match=True, seed=2**40,
        own_token=not tome.core.ToMeConfig().own_token, whole=0.3, half=0.45,
        decisions=decisions, exact_every=5,
    )  # fmt: skip
    for field in dataclasses.fields(config):
        tried = getattr(config, field.name) != field.default or field.name == ("levels" if decisions else "decisions")
        assert tried, f"{field.name} is not put to the test"
    chosen = tome.options.Settings(True, 0.2, "fixed", config)
    parameters = {"Steps": 20}
    tome.infotext.write(parameters, chosen)
    values = tome.infotext.read(_parse(_write(parameters)))
    assert tome.options.settings_from(values) == chosen


def test_defaults_are_read_back_too(host, tome):
    chosen = tome.options.settings_from({"enabled": True})
    parameters = {}
    tome.infotext.write(parameters, chosen)
    assert parameters == {"ToMe ratio": 0.75, "ToMe method": "sample", "ToMe version": VERSION}
    assert tome.options.settings_from(tome.infotext.read(_parse(_write(parameters)))) == chosen


def test_paste_fields_set_every_control(host, tome):
    script = host.tabs["txt2img"].scripts[0]
    *controls, older = script.infotext_fields
    names = [name for name in tome.options.NAMES if name != "map"]  # a map changes no picture: no text tells of it
    assert len(controls) == len(names)
    parameters = {"ToMe ratio": "0.35", "ToMe method": "merge", "ToMe MLP": "True", "ToMe min tokens": "512"}
    pasted = {name: field[1](parameters) for name, field in zip(names, controls, strict=True)}
    assert pasted["enabled"] is True and pasted["ratio"] == 0.35 and pasted["mlp"] is True
    assert pasted["min_tokens"] == 512 and pasted["stride_x"] == 2
    without = [field[1]({"Steps": "20"}) for field in controls]
    assert without[0] is False and set(without[1:]) == {None}
    assert older[0] not in host.tabs["txt2img"].inputs and older[1]({"Steps": "20"}) == ""


@pytest.mark.parametrize(
    ("label", "value"), [("ToMe method", "tomato"), ("ToMe levels", "x"), ("ToMe MLP", "maybe"), ("ToMe start", "?")]
)
def test_an_unknown_value_in_a_picture_becomes_the_default(tome, label, value):
    values = tome.infotext.read({"ToMe ratio": "0.5", label: value})
    found, default = (
        tome.options.settings_from(given).resolved(multires=False)
        for given in (values, {"enabled": True, "ratio": 0.5})
    )
    assert found == default


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ({"ToMe start": "0.9", "ToMe end": "0.1"}, "end"),
        ({"ToMe MLP": "True"}, "mlp"),
        ({"ToMe method": "downsample", "ToMe cross-attention": "True"}, "cross_attention"),
    ],
)
def test_pasted_values_that_are_not_possible_together(host, tome, lines, text, option):
    parameters = {"ToMe ratio": "0.5", "ToMe version": VERSION, **text}
    *fields, _ = host.tabs["txt2img"].scripts[0].infotext_fields
    fields = dict(zip(("enabled", *tome.infotext.LABELS), fields, strict=True))
    pasted = {name: field[1](parameters) for name, field in fields.items()}
    assert pasted[option] == tome.options.by_name()[option].default
    assert tome.options.settings_from(pasted).enabled
    assert len(lines) == 1 and option in lines[0] and "from the picture's text" in lines[0]


# --- the plot ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(host):
    """xyz_grid.py's module as the host keeps it."""

    class AxisOption:
        def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
            self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices

    module = types.SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Nothing", str, None)])
    script_class = type("Script", (), {"__module__": "xyz_grid.py"})
    host.scripts.scripts_data.append(types.SimpleNamespace(script_class=script_class, module=module))
    for callback in host.callbacks["before_ui"] * 2:  # twice must not double them
        callback()
    host.scripts.scripts_data.pop()
    return {option.label: option for option in module.axis_options}


def test_axes_reach_the_generation_and_switch_tome_on(small, grid):
    host = small
    assert list(grid) == [
        "Nothing", "[ToMe] Preset", "[ToMe] Ratio", "[ToMe] Hires ratio", "[ToMe] Stride", "[ToMe] Method",
        "[ToMe] Partition", "[ToMe] Levels", "[ToMe] Start", "[ToMe] End", "[ToMe] Ratio at the end",
        "[ToMe] Cross-attention", "[ToMe] MLP", "[ToMe] Proportional attention", "[ToMe] Reduce", "[ToMe] Min tokens",
        "[ToMe] Share match", "[ToMe] Own token", "[ToMe] Share whole", "[ToMe] Share at half", "[ToMe] Decisions",
        "[ToMe] Exact every",
    ]  # fmt: skip
    p = cell_of(host)
    grid["[ToMe] Ratio"].apply(p, 0.3, [0.3])
    grid["[ToMe] Method"].apply(p, "merge", ["merge"])
    grid["[ToMe] Stride"].apply(p, "2x4", ["2x4"])
    grid["[ToMe] Start"].apply(p, 0.2, [0.2])
    host.process_images(p)
    assert p.extra_generation_params == {
        "ToMe ratio": 0.3, "ToMe stride y": 4, "ToMe method": "merge", "ToMe start": 0.2, "ToMe min tokens": 0,
        **MERGED,
    }  # fmt: skip


def cell_of(host, **request):
    """A picture of the plot before its axes are applied."""
    from . import host as program

    runner = host.tabs["txt2img"]
    return program.Processing(host, scripts=runner, script_args=tuple(runner.defaults), **request)


@pytest.mark.parametrize("order", [("Preset", "Ratio"), ("Ratio", "Preset")])
def test_the_axis_of_an_option_wins_over_the_presets(small, grid, order):
    """The host applies them in the order in which they stand."""
    p, values = cell_of(small), {"Preset": "Fast", "Ratio": 0.3}
    for axis in order:
        grid[f"[ToMe] {axis}"].apply(p, values[axis], [values[axis]])
    small.process_images(p)
    told = p.extra_generation_params
    assert (told["ToMe ratio"], told["ToMe start"]) == (0.3, 0.1)


def test_every_axis_sets_its_own_option(tome, host, grid):
    for axis, value, option in (
        ("Exact every", 4, "exact_every"),
        ("Decisions", "+16x16", "decisions"),
        ("Own token", "False", "own_token"),
        ("Levels", "0,1", "levels"),
    ):
        p = cell_of(host)
        grid[f"[ToMe] {axis}"].apply(p, grid[f"[ToMe] {axis}"].type(value), [value])
        chosen = tome.options.settings_from(tome.xyz.overrides_of(p))
        wanted = False if value == "False" else value
        assert chosen.enabled and tome.infotext.values_of(chosen)[option] == wanted


def test_a_cell_whose_options_are_not_possible_together_stays_empty(small, grid, lines):
    """An unmerged picture there would be taken for one of these options."""
    for is_api in (False, True):
        p = cell_of(small)
        p.is_api = is_api
        grid["[ToMe] Start"].apply(p, 0.5, [0.5])
        grid["[ToMe] End"].apply(p, 0.25, [0.25])
        with pytest.raises(Exception, match="start must not be after end"):  # the plot catches it
            small.process_images(p)
    assert [line for line in lines if "start must not be after end" in line] and not small.errors
    assert "ToMe ratio" not in small.generate()[1].extra_generation_params


def test_a_copy_for_another_cell_of_the_plot_shares_nothing(host, grid):
    import copy

    p = cell_of(host)
    grid["[ToMe] Ratio"].apply(p, 0.3, [0.3])
    twin = copy.copy(p)
    grid["[ToMe] Ratio"].apply(twin, 0.6, [0.6])
    assert p.tome_overrides["ratio"] == 0.3 and twin.tome_overrides["ratio"] == 0.6


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("Ratio", [0.5, 1.5]),
        ("Method", ["sample", "tomato"]),
        ("Preset", ["Fast", "Custom"]),
        ("Stride", ["2", "0"]),
        ("Stride", ["2x2x2"]),
        ("Stride", ["²"]),
        ("Start", [2.0]),
        ("Exact every", [2, 1]),
        ("Decisions", ["tomato"]),
        ("MLP", ["perhaps"]),
    ],
)
def test_a_bad_value_on_an_axis_stops_the_plot_before_it_starts(grid, axis, values):
    with pytest.raises(RuntimeError, match="ToMe: "):
        grid[f"[ToMe] {axis}"].confirm(None, values)


def test_good_values_on_an_axis_pass(grid):
    for axis, values in (
        ("Ratio", [0.0, 1.0]),
        ("Preset", ["Fast"]),
        ("Method", ["merge"]),
        ("Stride", ["2", "4x2"]),
        ("Start", [0.4]),
        ("Exact every", [0, 2, 16]),
        ("Decisions", ["", "+16x16 -8x8/64/2"]),
        ("Own token", ["True", "False"]),
    ):
        grid[f"[ToMe] {axis}"].confirm(None, values)
