// What the node ToMe has beside its options: a control "preset", which sets some of them and shows which preset they
// are, and a button that shows the options that most people leave as they are. Neither is saved: a workflow has one
// truth, the options themselves.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "ToMe";
const VERSION = "tome_version"; // the property that keeps it

const TOLD = "$$node-text-preview"; // the page's own widget, in which the server's line stands

const near = (a, b) => (typeof a === "number" ? Math.abs(a - b) < 1e-6 : a === b);
const setting = (name) => app.extensionManager?.setting?.get(name);

// The height of a node of the classic canvas with room for all of the line below its controls.
function tall(node) {
  const text = node.widgets?.find((widget) => widget.name === TOLD)?.value ?? "";
  const lines = Math.ceil((7 * text.length) / Math.max(1, node.size[0] - 50));
  return node.computeSize()[1] + 16 * Math.max(0, lines - 2);
}

// Put a control that is not saved at a place among the node's.
function addControl(node, place, type, name, value, callback, options, { label, tooltip }) {
  const control = node.addWidget(type, name, value, callback, { ...options, serialize: false });
  Object.assign(control, { label, tooltip, serialize: false });
  node.widgets.splice(place, 0, node.widgets.pop());
  return control;
}

// Call what follows after each change of a widget.
function afterChange(widget, follow) {
  const callback = widget.callback;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    follow();
    return result;
  };
}

function addPreset(node, widgets, { presets, custom, label, help }) {
  const governed = new Set(Object.values(presets).flatMap(Object.keys));
  if ([...governed].some((option) => !widgets.has(option))) return null; // a node of another version
  const choose = (name) => {
    for (const [option, value] of Object.entries(presets[name] ?? {})) {
      const widget = widgets.get(option);
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
    show();
  };
  const values = [...Object.keys(presets), custom];
  const preset = addControl(node, 0, "combo", "preset", custom, choose, { values }, { label, tooltip: help });
  const fits = (options) => Object.entries(options).every(([option, value]) => near(value, widgets.get(option)?.value));
  const show = () => {
    preset.value = Object.keys(presets).find((name) => fits(presets[name])) ?? custom;
  };
  for (const option of governed) afterChange(widgets.get(option), show);
  return show;
}

// The classic canvas shows advanced options always; Nodes 2.0 has a button of its own, which keeps the same state:
// node.showAdvanced, saved with the node.
function addFold(node, widgets, defaults, { more, fewer, help, idle }) {
  const folded = [...widgets.values()].filter((widget) => widget.options?.advanced);
  if (!folded.length) return null;
  const always = () => Boolean(setting("Comfy.Node.AlwaysShowAdvancedWidgets"));
  const isOpen = () => Boolean(node.showAdvanced) || always();
  const whenOpen = tall(node);
  const hide = (widget, when) => Object.defineProperty(widget, "hidden", { get: when, set() {} });
  for (const widget of folded) hide(widget, () => !isOpen());
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    node.setSize([node.size[0], tall(node)]);
    node.setDirtyCanvas?.(true, true);
  };
  const button = addControl(
    node, node.widgets.indexOf(folded[0]), "button", "more", null, toggle, { canvasOnly: true },
    { label: more, tooltip: help },
  );
  hide(button, always);
  const { onDrawForeground, onConfigure } = node;
  node.onDrawForeground = function (...args) { // the page may have opened or closed the node since
    const changed = folded.filter(({ name, value }) => defaults.has(name) && !near(defaults.get(name), value)).length;
    button.label = node.showAdvanced ? fewer : changed ? `${more} (${changed})` : more;
    return onDrawForeground?.apply(this, args);
  };
  let model = null; // what the server told of the model at the last run: see ofModel
  const show = () => {
    const method = widgets.get("method")?.value;
    const without = [...(idle[model?.means?.[method] ?? method] ?? []), ...(model?.idle ?? [])];
    for (const { name, value } of widgets.values()) {
      // What was switched on and would be refused stays, so that it can be switched off.
      const switchedOn = value === true && defaults.get(name) === false;
      widgets.get(name).disabled = without.includes(name) && !switchedOn;
    }
    node.setDirtyCanvas?.(true, true);
  };
  for (const widget of widgets.values()) afterChange(widget, show);
  const mark = (told) => {
    model = told;
    show();
  };
  ofModel.set(node, mark);
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function (...args) {
    mark(null); // maybe another model
    return onConnectionsChange?.apply(this, args);
  };
  node.setSize([node.size[0], tall(node)]);
  node.onConfigure = function (data, ...args) {
    onConfigure?.call(this, data, ...args);
    // Saved with all options in sight: their room is not needed any more.
    if (!isOpen() && data.size?.[1] >= whenOpen) node.setSize([node.size[0], tall(node)]);
  };
  return show;
}

// The version of ToMe that a workflow was saved with goes to the server with each prompt, so that a run can say what has
// changed since. It is saved among the node's properties, by name: values are saved by place, and older workflows have
// none. A run makes the picture of this version, so what is saved from then on is this one.
function addVersion(node, widget) {
  const current = defaults.get(widget.name);
  let ran = false;
  widget.serialize = false;
  Object.defineProperty(widget, "hidden", { get: () => true, set() {} });
  const { beforeQueued } = widget;
  widget.beforeQueued = function (...args) {
    ran = true;
    return beforeQueued?.apply(this, args);
  };
  const { onConfigure, onSerialize } = node;
  node.onConfigure = function (data, ...args) {
    onConfigure?.call(this, data, ...args);
    widget.value = data.properties?.[VERSION] ?? "";
    ran = false;
  };
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    data.properties = { ...data.properties, [VERSION]: ran ? current : widget.value };
  };
}

function addControls(node) {
  const widgets = new Map(node.widgets.map((widget) => [widget.name, widget]));
  const version = widgets.get("version");
  if (version) addVersion(node, version);
  widgets.delete("version");
  const shows = [addPreset(node, widgets, texts.presets), texts.folded && addFold(node, widgets, defaults, texts.folded)];
  const show = () => shows.forEach((one) => one?.());
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

// What locales/ calls the controls in the page's language: the page itself looks up only what the server sent.
async function ownTexts() {
  try {
    const known = await (await api.fetchApi("/i18n")).json();
    return known[setting("Comfy.Locale")].nodeDefs[NODE].inputs;
  } catch {
    return {}; // no texts in this language, or a ComfyUI that has none at all
  }
}

// By node: takes what has no meaning for its model (idle), and what a method means there (means).
const ofModel = new WeakMap();

// A node by its id in the prompt: of nested graphs the ids of all levels, with colons between.
function nodeOf(id) {
  let node = null, graph = app.graph;
  for (const part of String(id).split(":")) {
    node = graph?.nodes?.find((one) => String(one.id) === part);
    graph = node?.subgraph;
  }
  return node;
}

let texts = null;
let defaults = new Map();

app.registerExtension({
  name: "ToMe.Presets",
  setup() {
    api.addEventListener("tome.model", ({ detail }) => ofModel.get(nodeOf(detail.node))?.(detail));
    // After the page's own listener, which shows the line.
    api.addEventListener("progress_text", () =>
      queueMicrotask(() => {
        if (setting("Comfy.VueNodes.Enabled")) return; // there a node grows by itself
        for (const node of app.canvas?.graph?.nodes ?? []) {
          const grows = node.comfyClass === NODE && node.widgets?.some((widget) => widget.name === TOLD);
          if (grows && node.size[1] < tall(node)) node.setSize([node.size[0], tall(node)]);
        }
      }),
    );
  },
  async beforeRegisterNodeDef(_type, definition) {
    if (definition.name !== NODE) return;
    const { tome_presets: presets, tome_folded: folded } = definition.input?.required?.ratio?.[1] ?? {};
    if (!presets) return;
    const { preset = {}, more = {}, fewer = {} } = await ownTexts();
    texts = {
      presets: { ...presets, label: preset.name ?? presets.label, help: preset.tooltip ?? presets.help },
      folded: folded && {
        ...folded,
        more: more.name ?? folded.more,
        help: more.tooltip ?? folded.help,
        fewer: fewer.name ?? folded.fewer,
      },
    };
    const inputs = { ...definition.input.required, ...definition.input.optional };
    defaults = new Map(Object.entries(inputs).map(([name, spec]) => [name, spec[1]?.default]));
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE && texts) addControls(node);
  },
});
