// The control "preset" on top of the node ToMe: it sets the options of a preset, and shows which one they are.
// It is worked out from the options and not saved, so a workflow has one truth: the options themselves.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "ToMe";
const NAME = "preset";

function fits(preset, widgets) {
  return Object.entries(preset).every(([option, value]) => {
    const now = widgets.get(option)?.value;
    return typeof value === "number" ? Math.abs(now - value) < 1e-6 : now === value;
  });
}

function addPreset(node, { presets, custom, label, help }) {
  const widgets = new Map(node.widgets.map((widget) => [widget.name, widget]));
  const governed = new Set(Object.values(presets).flatMap(Object.keys));
  if ([...governed].some((option) => !widgets.has(option))) return; // a node of another version

  const preset = node.addWidget(
    "combo",
    NAME,
    custom,
    (name) => {
      for (const [option, value] of Object.entries(presets[name] ?? {})) {
        const widget = widgets.get(option);
        widget.value = value;
        widget.callback?.(value, app.canvas, node);
      }
      show();
    },
    { values: [...Object.keys(presets), custom], serialize: false },
  );
  preset.label = label;
  preset.tooltip = help;
  preset.serialize = false;
  node.widgets.unshift(node.widgets.pop());

  function show() {
    preset.value = Object.keys(presets).find((name) => fits(presets[name], widgets)) ?? custom;
  }

  for (const option of governed) {
    const widget = widgets.get(option);
    const callback = widget.callback;
    widget.callback = function (...args) {
      const result = callback?.apply(this, args);
      show();
      return result;
    };
  }
  const { onConfigure, onSerialize } = node;
  node.onConfigure = function (...args) {
    onConfigure?.apply(this, args);
    show();
  };
  // Saving counts all widgets, loading only those that are saved: without this the values would move by one.
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    if (data.widgets_values?.length) {
      data.widgets_values = [...data.widgets_values].filter((_, i) => this.widgets[i]?.serialize !== false);
    }
  };
  show();
}

// What locales/ calls the control in the page's language: the page itself looks up only what the server sent.
async function ownTexts() {
  try {
    const texts = await (await api.fetchApi("/i18n")).json();
    const { name, tooltip } = texts[app.extensionManager.setting.get("Comfy.Locale")].nodeDefs[NODE].inputs[NAME];
    return { label: name, help: tooltip };
  } catch {
    return {}; // no texts in this language, or a ComfyUI that has none at all
  }
}

let presets = null;

app.registerExtension({
  name: "ToMe.Presets",
  async beforeRegisterNodeDef(_type, definition) {
    if (definition.name !== NODE) return;
    presets = definition.input?.required?.ratio?.[1]?.tome_presets;
    if (presets) presets = { ...presets, ...(await ownTexts()) };
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE && presets) addPreset(node, presets);
  },
});
